//! The first names of files with several names. A link is made only to a file that this session brought or found
//! unchanged. The sender refers to the file by the id of its entry, never by a path.

use std::collections::HashMap;
use std::sync::Mutex;

use super::tasks::lock;
use crate::protocol::path::RelativePath;

/// Memory for the paths that a session remembers, in bytes. Further names of other files are sent as separate files.
const MAX_BYTES: usize = 16 << 20;
/// Memory for a remembered path beyond its length, in bytes.
const ENTRY_OVERHEAD: usize = 64;

/// Paths of files that may get further names, by the ids of their entries.
#[derive(Default)]
pub(super) struct FirstNames(Mutex<State>);

#[derive(Default)]
struct State {
    names: HashMap<u64, FirstName>,
    bytes: usize,
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
    /// Records the path of an entry that announced further names.
    pub(super) fn insert(&self, id: u64, hard_link: Option<u64>, path: &RelativePath) {
        if hard_link == Some(id) {
            let bytes = ENTRY_OVERHEAD + path.as_bytes().len();
            lock(&self.0).insert(id, FirstName::At(path.clone()), bytes);
        }
    }

    /// Records that another file keeps the name of an entry with further names. Nothing is linked to it.
    pub(super) fn insert_taken(&self, id: u64, hard_link: Option<u64>) {
        if hard_link == Some(id) {
            lock(&self.0).insert(id, FirstName::Taken, ENTRY_OVERHEAD);
        }
    }

    /// Returns the first name with this id, if it is remembered.
    pub(super) fn get(&self, id: u64) -> Option<FirstName> {
        lock(&self.0).names.get(&id).cloned()
    }
}

impl State {
    fn insert(&mut self, id: u64, name: FirstName, bytes: usize) {
        self.bytes += bytes;
        if self.bytes <= MAX_BYTES {
            self.names.insert(id, name);
        }
    }
}
