//! Shares: how much of a common stock one peer may hold at the same time.
//!
//! A key that an administrator listed is counted as one holder. Anyone can make further keys, so a key that is not listed is
//! also counted with its network (an IPv4 address or the first 64 bits of an IPv6 address) and its site (the first 48 bits).

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use crate::auth::identity::KeyId;
use crate::error::lock::lock;
use crate::net::address;

/// Returns the network of one subscriber: an IPv4 address, or the first 64 bits of an IPv6 address.
pub(crate) fn network(ip: IpAddr) -> IpAddr {
    address::network(ip, 32, 64)
}

/// Returns the site of a subscriber: an IPv4 address, or the first 48 bits of an IPv6 address. Providers give whole sites to
/// one customer, who can use 65,536 networks at once.
pub(crate) fn site(ip: IpAddr) -> IpAddr {
    address::network(ip, 32, 48)
}

/// Who holds what a connection takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) key_id: KeyId,
    /// The address, if the key is not listed.
    pub(crate) stranger: Option<IpAddr>,
}

/// A group whose parts are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Group {
    /// One key.
    Key(KeyId),
    /// The strangers of one network.
    Network(IpAddr),
    /// The strangers of one site.
    Site(IpAddr),
}

impl Holder {
    /// The groups that the holder is counted with.
    pub(crate) fn groups(self) -> impl Iterator<Item = Group> {
        let of_stranger = |ip| [Group::Network(network(ip)), Group::Site(site(ip))];
        std::iter::once(Group::Key(self.key_id))
            .chain(self.stranger.map(of_stranger).into_iter().flatten())
    }
}

/// The most parts of a stock that may be held at the same time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ShareLimits {
    pub(crate) all: usize,
    pub(crate) key: usize,
    /// Of the strangers of one network.
    pub(crate) network: usize,
    /// Of the strangers of one site.
    pub(crate) site: usize,
}

impl ShareLimits {
    /// The limit of one group.
    pub(crate) fn of(&self, group: Group) -> usize {
        match group {
            Group::Key(_) => self.key,
            Group::Network(_) => self.network,
            Group::Site(_) => self.site,
        }
    }
}

/// A stock of equal parts, of which each holder gets a limited share.
#[derive(Debug)]
pub(crate) struct Shares {
    limits: ShareLimits,
    held: Mutex<Held>,
}

/// Parts that are held, in all and by group. It has no more groups than three for each part.
#[derive(Debug, Default)]
struct Held {
    all: usize,
    by_group: HashMap<Group, usize>,
}

/// One part, until dropped.
#[derive(Debug)]
pub(crate) struct Share {
    shares: Arc<Shares>,
    holder: Holder,
}

impl Shares {
    pub(crate) fn new(limits: ShareLimits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            held: Mutex::default(),
        })
    }

    /// Takes a part; `None` if a limit is reached.
    pub(crate) fn take(self: &Arc<Self>, holder: Holder) -> Option<Share> {
        let mut held = lock(&self.held);
        let is_full = |group| {
            held.by_group
                .get(&group)
                .is_some_and(|count| *count >= self.limits.of(group))
        };
        if held.all >= self.limits.all || holder.groups().any(is_full) {
            return None;
        }
        held.all += 1;
        for group in holder.groups() {
            *held.by_group.entry(group).or_default() += 1;
        }
        Some(Share {
            shares: self.clone(),
            holder,
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut held = lock(&self.shares.held);
        held.all -= 1;
        for group in self.holder.groups() {
            if let Some(count) = held.by_group.get_mut(&group) {
                *count -= 1;
                if *count == 0 {
                    held.by_group.remove(&group);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::identity::Identity;

    fn key() -> KeyId {
        Identity::generate().unwrap().key_id()
    }

    fn stranger(ip: &str) -> Holder {
        Holder {
            key_id: key(),
            stranger: Some(ip.parse().unwrap()),
        }
    }

    fn shares() -> Arc<Shares> {
        Shares::new(ShareLimits {
            all: 10,
            key: 4,
            network: 3,
            site: 6,
        })
    }

    #[test]
    fn a_key_gets_its_share_and_leaves_the_rest_to_others() {
        let shares = shares();
        let listed = || Holder {
            key_id: key(),
            stranger: None,
        };
        let (first, second, third) = (listed(), listed(), listed());
        let mut held: Vec<_> = (0..4).map(|_| shares.take(first).unwrap()).collect();
        assert!(shares.take(first).is_none());
        held.extend((0..4).map(|_| shares.take(second).unwrap()));
        held.extend((0..2).map(|_| shares.take(third).unwrap()));
        assert!(shares.take(third).is_none(), "the stock is empty");
        held.truncate(3);
        assert!(
            shares.take(first).is_some(),
            "what is returned is given again"
        );
    }

    #[test]
    fn fresh_keys_do_not_enlarge_the_share_of_a_network_or_site() {
        let shares = shares();
        let mut held: Vec<_> = (0..3)
            .map(|i| {
                shares
                    .take(stranger(&format!("2001:db8:1:1::{i}")))
                    .unwrap()
            })
            .collect();
        assert!(shares.take(stranger("2001:db8:1:1::9")).is_none());
        held.extend((2..5).map(|i| {
            shares
                .take(stranger(&format!("2001:db8:1:{i}::1")))
                .unwrap()
        }));
        assert!(shares.take(stranger("2001:db8:1:ffff::1")).is_none());
        assert!(shares.take(stranger("2001:db8:2::1")).is_some());
        assert!(shares.take(stranger("::ffff:192.0.2.1")).is_some());
        drop(held);
        assert!(lock(&shares.held).by_group.is_empty(), "nothing is kept");
    }
}
