//! The first names of files with several names. A link is made only to a file that this session brought or found
//! unchanged. The sender refers to the file by the id of its entry, never by a path.

use std::collections::HashMap;
use std::sync::Mutex;

use super::path_list::PathList;
use crate::error::lock::lock;
use crate::protocol::path::RelativePath;
use crate::storage::{Held, KeptShare};

/// Memory for a remembered name beside its path, in bytes: an id and a place in a table that may be half empty.
const NAME_COST: usize = 40;
/// The place of a name that another file has.
const TAKEN: u32 = u32::MAX;

/// Paths of files that may get further names, by the ids of their entries. Further names of files that do not fit in
/// memory are sent as separate files.
pub(super) struct FirstNames(Mutex<State>);

struct State {
    /// Places in `paths`, or [`TAKEN`].
    names: HashMap<u64, u32>,
    paths: PathList,
    held: Held,
}

/// The first name of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FirstName {
    /// The file has this path.
    At(RelativePath),
    /// Another file has the name and stays.
    Taken,
}

impl FirstNames {
    pub(super) fn new(memory: &KeptShare) -> Self {
        Self(Mutex::new(State {
            names: HashMap::new(),
            paths: PathList::default(),
            held: memory.hold(),
        }))
    }

    /// Records the path of an entry that announced further names.
    pub(super) fn insert(&self, id: u64, hard_link: Option<u64>, path: &RelativePath) {
        if hard_link == Some(id) {
            let mut state = lock(&self.0);
            let cost = NAME_COST + state.paths.cost(path);
            if state.held.grow_table(cost) {
                let place = u32::try_from(state.paths.push(path)).unwrap_or(TAKEN);
                state.names.insert(id, place);
            }
        }
    }

    /// Records that another file keeps the name of an entry with further names. Nothing is linked to it.
    pub(super) fn insert_taken(&self, id: u64, hard_link: Option<u64>) {
        if hard_link == Some(id) {
            let mut state = lock(&self.0);
            if state.held.grow_table(NAME_COST) {
                state.names.insert(id, TAKEN);
            }
        }
    }

    /// Returns the first name with this id, if it is remembered.
    pub(super) fn get(&self, id: u64) -> Option<FirstName> {
        let state = lock(&self.0);
        match *state.names.get(&id)? {
            TAKEN => Some(FirstName::Taken),
            place => state.paths.get(place as usize).map(FirstName::At),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundred_thousand_names_fit_in_the_share_of_a_connection() {
        let memory =
            crate::storage::KeptMemory::new(crate::config::Config::default().session_memory);
        let share = memory.share([1; 32]);
        let names = FirstNames::new(&share);
        let path = |n: u64| {
            let names = ["home", "user", "backups", "2024-11-28", "packages"];
            let path = RelativePath::from_components(names).unwrap();
            let directory = path
                .join(format!("directory-{}", n / 50).as_bytes())
                .unwrap();
            directory
                .join(format!("a-file-of-some-length-{n}").as_bytes())
                .unwrap()
        };
        for n in 0..100_000 {
            names.insert(n, Some(n), &path(n));
        }
        for n in (0..100_000).step_by(997) {
            assert_eq!(names.get(n), Some(FirstName::At(path(n))));
        }
        drop(names);
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn names_beyond_the_memory_are_not_remembered() {
        let share = KeptShare::whole(1_000);
        let names = FirstNames::new(&share);
        let path = RelativePath::from_components(["a"]).unwrap();
        (0..100).for_each(|n| names.insert(n, Some(n), &path));
        (100..200).for_each(|n| names.insert_taken(n, Some(n)));
        assert!(names.get(0).is_some() && names.get(99).is_none() && names.get(199).is_none());
        assert_eq!(names.get(200), None);
    }
}
