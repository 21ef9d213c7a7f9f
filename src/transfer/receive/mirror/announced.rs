//! The announced paths of a mirror.

use std::hash::{BuildHasher, RandomState};
use std::sync::Mutex;

use crate::error::lock::lock;
use crate::protocol::path::RelativePath;
use crate::storage::{Held, KeptShare};

/// Most announced entries that are remembered. A larger mirror removes nothing; nor does one whose entries do not fit
/// in the memory of its connection, some two million at a server.
pub(super) const MAX_ANNOUNCED: usize = 4 << 20;

/// Bytes of a digest that are kept; another one chooses the shard. With keys that no peer knows, one of a million
/// paths has the digest of another by a chance of 2^-9, and then one unannounced path is not removed.
const DIGEST: usize = 5;
const SHARDS: usize = 256;
/// A shard grows by this part (1/N).
const GROWTH_PART: usize = 8;

/// Digests of the announced paths. The paths themselves would take twenty times the memory.
pub(in crate::transfer::receive) struct Announced {
    /// Keys that no peer knows, so that none can make two paths equal.
    hasher: RandomState,
    entries: Mutex<Digests>,
    /// Paths of omitted sources: FIFOs, sockets and devices, which are never sent, and files that vanished. Existing
    /// files with these paths stay.
    omitted: Mutex<Digests>,
}

/// A set of digests, in shards that are sorted.
struct Digests {
    shards: Vec<Vec<[u8; DIGEST]>>,
    count: usize,
    overflows: bool,
    held: Held,
}

impl Announced {
    pub(in crate::transfer::receive) fn new(memory: &KeptShare) -> Self {
        Self {
            hasher: RandomState::new(),
            entries: Mutex::new(Digests::new(memory)),
            omitted: Mutex::new(Digests::new(memory)),
        }
    }

    /// Records the destination path of an entry.
    pub(in crate::transfer::receive) fn insert(&self, path: &RelativePath) {
        lock(&self.entries).insert(self.digest(path));
    }

    /// Records the path of an omitted source. It does not count as an entry: a source with only omitted files is
    /// empty.
    pub(in crate::transfer::receive) fn insert_omitted(&self, path: &RelativePath) {
        lock(&self.omitted).insert(self.digest(path));
    }

    pub(super) fn contains(&self, path: &RelativePath) -> bool {
        lock(&self.entries).contains(self.digest(path))
    }

    pub(super) fn is_omitted(&self, path: &RelativePath) -> bool {
        lock(&self.omitted).contains(self.digest(path))
    }

    /// Returns the number of announced paths.
    pub(super) fn count(&self) -> usize {
        lock(&self.entries).count
    }

    /// Returns whether more was announced than can be remembered.
    pub(super) fn overflows(&self) -> bool {
        lock(&self.entries).overflows || lock(&self.omitted).overflows
    }

    fn digest(&self, path: &RelativePath) -> [u8; 8] {
        self.hasher.hash_one(path.as_bytes()).to_le_bytes()
    }
}

impl Digests {
    fn new(memory: &KeptShare) -> Self {
        Self {
            shards: Vec::new(),
            count: 0,
            overflows: false,
            held: memory.hold(),
        }
    }

    fn insert(&mut self, digest: [u8; 8]) {
        if self.shards.is_empty() {
            self.shards.resize(SHARDS, Vec::new());
        }
        let [shard, a, b, c, d, e, ..] = digest;
        let digest = [a, b, c, d, e];
        let shard = &mut self.shards[usize::from(shard)];
        let Err(place) = shard.binary_search(&digest) else {
            return;
        };
        if shard.len() == shard.capacity() {
            let more = shard.len() / GROWTH_PART + GROWTH_PART;
            if self.count >= MAX_ANNOUNCED || !self.held.grow_table(more * DIGEST) {
                self.overflows = true;
                return;
            }
            shard.reserve_exact(more);
        }
        shard.insert(place, digest);
        self.count += 1;
    }

    fn contains(&self, digest: [u8; 8]) -> bool {
        let [shard, a, b, c, d, e, ..] = digest;
        let shard = self.shards.get(usize::from(shard));
        shard.is_some_and(|shard| shard.binary_search(&[a, b, c, d, e]).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::storage::KeptMemory;

    fn path(n: usize) -> RelativePath {
        RelativePath::from_components(["directory", &n.to_string()]).unwrap()
    }

    #[test]
    fn a_mirror_of_a_million_files_fits_in_the_share_of_a_connection() {
        let memory = KeptMemory::new(Config::default().session_memory);
        let announced = Announced::new(&memory.share([1; 32]));
        for n in 0..1_000_000 {
            announced.insert(&path(n));
        }
        announced.insert(&path(7));
        assert!(!announced.overflows());
        // Two of them may have the same digest.
        assert!(announced.count() > 999_990 && announced.count() <= 1_000_000);
        assert!(
            (0..1_000_000)
                .step_by(997)
                .all(|n| announced.contains(&path(n)))
        );
        let strangers = (1_000_000..2_000_000).filter(|&n| announced.contains(&path(n)));
        assert!(strangers.count() < 10);
        assert!(memory.used() < 8 << 20, "{}", memory.used());
    }

    #[test]
    fn a_mirror_beyond_its_memory_overflows() {
        let announced = Announced::new(&KeptShare::whole(20_000));
        (0..10_000).for_each(|n| announced.insert(&path(n)));
        assert!(announced.overflows() && announced.count() < 10_000);
    }
}
