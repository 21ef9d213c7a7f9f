//! The announced paths of a mirror.

use std::collections::HashSet;
use std::sync::Mutex;

use crate::protocol::path::RelativePath;
use crate::transfer::receive::tasks::lock;

/// Most announced entries that are remembered, at 32 bytes each. A larger mirror removes nothing.
pub(super) const MAX_ANNOUNCED: usize = 4 << 20;

/// The first half of a BLAKE3 digest. Collisions are infeasible.
type PathDigest = [u8; 16];

/// Digests of the announced paths. The paths themselves would take ten times the memory.
#[derive(Debug, Default)]
pub(in crate::transfer::receive) struct Announced {
    entries: Mutex<HashSet<PathDigest>>,
    /// Paths of omitted sources: FIFOs, sockets and devices, which are never sent, and files that vanished. Existing
    /// files with these paths stay.
    omitted: Mutex<HashSet<PathDigest>>,
}

impl Announced {
    /// Records the destination path of an entry.
    pub(in crate::transfer::receive) fn insert(&self, path: &RelativePath) {
        remember(&self.entries, path);
    }

    /// Records the path of an omitted source. It does not count as an entry: a source with only omitted files is
    /// empty.
    pub(in crate::transfer::receive) fn insert_omitted(&self, path: &RelativePath) {
        remember(&self.omitted, path);
    }

    pub(super) fn contains(&self, path: &RelativePath) -> bool {
        lock(&self.entries).contains(&path_digest(path))
    }

    pub(super) fn is_omitted(&self, path: &RelativePath) -> bool {
        lock(&self.omitted).contains(&path_digest(path))
    }

    /// Returns the number of announced paths.
    pub(super) fn count(&self) -> usize {
        lock(&self.entries).len()
    }

    /// Returns whether more was announced than can be remembered.
    pub(super) fn overflows(&self) -> bool {
        self.count() > MAX_ANNOUNCED || lock(&self.omitted).len() > MAX_ANNOUNCED
    }
}

fn remember(digests: &Mutex<HashSet<PathDigest>>, path: &RelativePath) {
    let mut digests = lock(digests);
    if digests.len() <= MAX_ANNOUNCED {
        digests.insert(path_digest(path));
    }
}

fn path_digest(path: &RelativePath) -> PathDigest {
    let mut digest = PathDigest::default();
    digest.copy_from_slice(&blake3::hash(path.as_bytes()).as_bytes()[..16]);
    digest
}
