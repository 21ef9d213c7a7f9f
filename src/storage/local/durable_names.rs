//! Remembers which directories are on disk with all directories above them, so that each is synced once.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard};

use crate::error::lock::lock;
use crate::protocol::path::RelativePath;

/// Most directories in the cache (32 bytes each). A full cache is cleared, which only costs time.
const MAX_DURABLE: usize = 65_536;

/// Digests of the paths of durable directories.
#[derive(Default)]
pub(super) struct DurableNames(Mutex<HashSet<blake3::Hash>>);

impl DurableNames {
    pub(super) fn contains(&self, path: &RelativePath) -> bool {
        self.lock().contains(&digest(path))
    }

    pub(super) fn insert_all(&self, paths: &[RelativePath]) {
        let mut durable = self.lock();
        if durable.len() + paths.len() > MAX_DURABLE {
            durable.clear();
        }
        durable.extend(paths.iter().map(digest));
    }

    /// Forgets a directory that was created again.
    pub(super) fn remove(&self, path: &RelativePath) {
        self.lock().remove(&digest(path));
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<blake3::Hash>> {
        lock(&self.0)
    }
}

fn digest(path: &RelativePath) -> blake3::Hash {
    blake3::hash(path.as_bytes())
}
