//! Users and groups, by number and by name. Two machines often give the same person different numbers, so the name
//! counts if both know it, as in rsync. Root is root everywhere.

use std::collections::HashMap;
use std::sync::Mutex;

use nix::unistd::{Gid, Group, Uid, User};

use super::metadata::OwnerIds;
use crate::error::lock::lock;
use crate::protocol::{MAX_OWNER_NAME, Owner};

/// Most cached answers of the system's user database, for each kind. A full cache is cleared.
const MAX_CACHED: usize = 1024;

/// Cached answers of the system's user database. A query may take a network round trip.
#[derive(Default)]
pub(crate) struct Owners {
    users: Cache<u32, Option<Vec<u8>>>,
    groups: Cache<u32, Option<Vec<u8>>>,
    user_ids: Cache<Vec<u8>, Option<u32>>,
    group_ids: Cache<Vec<u8>, Option<u32>>,
}

#[derive(Default)]
struct Cache<K, V>(Mutex<HashMap<K, V>>);

impl<K: std::hash::Hash + Eq + Clone, V: Clone> Cache<K, V> {
    fn get(&self, key: &K, ask: impl FnOnce(&K) -> V) -> V {
        let mut answers = lock(&self.0);
        if let Some(answer) = answers.get(key) {
            return answer.clone();
        }
        if answers.len() >= MAX_CACHED {
            answers.clear();
        }
        let answer = ask(key);
        answers.insert(key.clone(), answer.clone());
        answer
    }
}

impl Owners {
    /// Returns an owner and group for the wire, with their names if `names` says so.
    pub(crate) fn announced(&self, owner: OwnerIds, names: bool) -> Owner {
        let OwnerIds { user, group } = owner;
        let name = |of: Option<String>| {
            of.map(String::into_bytes)
                .filter(|name| name.len() <= MAX_OWNER_NAME)
        };
        if !names {
            return Owner {
                user,
                group,
                ..Owner::default()
            };
        }
        let user_name = self.users.get(&user, |&id| {
            name(
                User::from_uid(Uid::from_raw(id))
                    .ok()?
                    .map(|user| user.name),
            )
        });
        let group_name = self.groups.get(&group, |&id| {
            name(
                Group::from_gid(Gid::from_raw(id))
                    .ok()?
                    .map(|group| group.name),
            )
        });
        Owner {
            user,
            group,
            user_name,
            group_name,
        }
    }

    /// Returns the user and group ids on this machine: by name if it is known, otherwise by number.
    pub(crate) fn local_ids(&self, owner: &Owner, names: bool) -> OwnerIds {
        let user = |name: &Vec<u8>| {
            Some(
                User::from_name(std::str::from_utf8(name).ok()?)
                    .ok()??
                    .uid
                    .as_raw(),
            )
        };
        let group = |name: &Vec<u8>| {
            Some(
                Group::from_name(std::str::from_utf8(name).ok()?)
                    .ok()??
                    .gid
                    .as_raw(),
            )
        };
        let named = |name: &Option<Vec<u8>>, id: u32| name.clone().filter(|_| names && id != 0);
        let user =
            named(&owner.user_name, owner.user).and_then(|name| self.user_ids.get(&name, user));
        let group =
            named(&owner.group_name, owner.group).and_then(|name| self.group_ids.get(&name, group));
        OwnerIds {
            user: user.unwrap_or(owner.user),
            group: group.unwrap_or(owner.group),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_names_count_and_root_stays_root() {
        let owners = Owners::default();
        let ids = |user, group| OwnerIds { user, group };
        let here = User::from_uid(Uid::from_raw(65_534))
            .unwrap()
            .expect("the user 65534 has a name");
        let there = Owner {
            user: 4_000_001,
            group: 4_000_002,
            user_name: Some(here.name.into()),
            group_name: None,
        };
        assert_eq!(owners.local_ids(&there, true), ids(65_534, 4_000_002));
        assert_eq!(owners.local_ids(&there, false), ids(4_000_001, 4_000_002));
        let root = Owner {
            user: 0,
            group: 0,
            ..there.clone()
        };
        assert_eq!(owners.local_ids(&root, true), ids(0, 0));
        let unknown = Owner {
            user_name: Some(b"unknown\xff".to_vec()),
            ..there
        };
        assert_eq!(owners.local_ids(&unknown, true), ids(4_000_001, 4_000_002));
        let announced = |user, group, names| owners.announced(ids(user, group), names);
        assert_eq!(announced(65_534, 4_000_002, true).group_name, None);
        assert!(announced(65_534, 0, true).user_name.is_some());
        assert_eq!(announced(65_534, 0, false).user_name, None);
    }
}
