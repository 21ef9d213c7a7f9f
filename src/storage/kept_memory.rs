//! Memory that peers make a process keep: names of directories, rules, tables of paths, entries without an answer.
//!
//! All of it is counted in one [`KeptMemory`], for each connection, for each key and in all. A quarter is reserved for
//! small shares, so that something is left for the next key, however many there are. Of the rest a key may hold a quarter
//! of what is free at the time. What does not fit is refused or done in smaller pieces.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::error::lock::lock;

/// The part (1/N) of the free memory that a key may hold: a fifth of all when it is alone.
const KEY_PART: usize = 4;
/// The part (1/N) of the total that only small shares are taken from.
const RESERVE_PART: usize = 4;
/// Small shares in the reserve: one for each of the connections that a server serves, 32 KiB of 128 MiB.
const SMALL_SHARES: usize = 1024;
/// The part (1/N) of the total that one connection may hold: 12.8 of 128 MiB. This suffices for a mirror of a million
/// files (6 MiB), and for a hundred thousand files with further names.
const CONNECTION_PART: usize = 10;
/// A table may be this many times as large as what it leaves free, so that names and rules always find room.
const TABLE_PART: usize = 3;
/// Memory in bytes that the open directories of a walk may take in any case, also when none is free: some 50 levels.
const MIN_LEVELS: usize = 32 << 10;
/// Memory in bytes for what the user of this process has named itself, such as the trees of a push.
const LOCAL_LIMIT: usize = 256 << 20;

/// The memory of a process for what its peers make it keep.
#[derive(Debug)]
pub struct KeptMemory {
    total: usize,
    /// Whether one owner may have everything.
    is_whole: bool,
    state: Mutex<KeptState>,
}

#[derive(Debug, Default)]
struct KeptState {
    used: usize,
    /// Bytes that each key holds.
    keys: HashMap<[u8; 32], usize>,
}

impl KeptMemory {
    /// Memory of `total` bytes that many keys share.
    pub fn new(total: usize) -> Arc<Self> {
        Arc::new(Self {
            total,
            is_whole: false,
            state: Mutex::default(),
        })
    }

    /// Memory of `total` bytes for one owner.
    pub fn whole(total: usize) -> Arc<Self> {
        Arc::new(Self {
            total,
            is_whole: true,
            state: Mutex::default(),
        })
    }

    /// Starts to count the memory of a connection with a peer of this key.
    pub fn share(self: &Arc<Self>, key: [u8; 32]) -> KeptShare {
        let limit = if self.is_whole {
            self.total
        } else {
            self.total / CONNECTION_PART
        };
        KeptShare(Arc::new(ShareState {
            memory: self.clone(),
            key,
            limit,
            used: Mutex::new(0),
        }))
    }

    /// Bytes that are held, over all connections.
    pub fn used(&self) -> usize {
        lock(&self.state).used
    }
}

/// The memory of one connection. Cheap to clone. The default is for what the user has named: 256 MiB.
#[derive(Debug, Clone)]
pub struct KeptShare(Arc<ShareState>);

#[derive(Debug)]
struct ShareState {
    memory: Arc<KeptMemory>,
    key: [u8; 32],
    limit: usize,
    used: Mutex<usize>,
}

impl Default for KeptShare {
    fn default() -> Self {
        Self::whole(LOCAL_LIMIT)
    }
}

impl KeptShare {
    /// A share of its own, of `total` bytes.
    pub fn whole(total: usize) -> Self {
        KeptMemory::whole(total).share([0; 32])
    }

    /// Starts to hold memory, beginning with none.
    pub fn hold(&self) -> Held {
        Held {
            share: self.clone(),
            bytes: 0,
        }
    }

    /// Holds memory, or returns `None` if it does not fit.
    pub fn try_hold(&self, bytes: usize) -> Option<Held> {
        let mut held = self.hold();
        held.grow(bytes).then_some(held)
    }

    /// Holds memory for a directory that is opened below others. `None` if it does not fit and the tree is deep.
    pub(crate) fn hold_level<'a>(
        &self,
        bytes: usize,
        outer: impl Iterator<Item = &'a Held>,
    ) -> Option<Held> {
        self.try_hold(bytes).or_else(|| {
            let open: usize = outer.map(Held::bytes).sum();
            let mut held = self.hold();
            (open + bytes <= MIN_LEVELS).then(|| {
                held.grow_anyway(bytes);
                held
            })
        })
    }

    /// Bytes that still fit.
    pub fn free(&self) -> usize {
        let used = lock(&self.0.used);
        let state = lock(&self.0.memory.state);
        self.0.free(*used, &state)
    }

    fn add(&self, bytes: usize, must_fit: bool) -> bool {
        let mut used = lock(&self.0.used);
        let mut state = lock(&self.0.memory.state);
        if must_fit && bytes > self.0.free(*used, &state) {
            return false;
        }
        *used += bytes;
        state.used += bytes;
        *state.keys.entry(self.0.key).or_default() += bytes;
        true
    }

    fn remove(&self, bytes: usize) {
        let mut used = lock(&self.0.used);
        let mut state = lock(&self.0.memory.state);
        *used -= bytes;
        state.used -= bytes;
        if let Some(of_key) = state.keys.get_mut(&self.0.key) {
            *of_key -= bytes;
            if *of_key == 0 {
                state.keys.remove(&self.0.key);
            }
        }
    }
}

impl ShareState {
    fn free(&self, used: usize, state: &KeptState) -> usize {
        let free = self.memory.total.saturating_sub(state.used);
        let of_connection = self.limit.saturating_sub(used);
        if self.memory.is_whole {
            return free.min(of_connection);
        }
        let of_key = state.keys.get(&self.key).copied().unwrap_or_default();
        let reserve = self.memory.total / RESERVE_PART;
        let small = (reserve / SMALL_SHARES).saturating_sub(of_key);
        // The key may grow by x while its use is at most a part of what is free then: of_key + x <= (shared - x) / PART.
        let shared = free.saturating_sub(reserve);
        let growth = (shared / KEY_PART).saturating_sub(of_key) * KEY_PART / (KEY_PART + 1);
        let growth = growth.max(small);
        free.min(of_connection).min(growth)
    }
}

/// Memory that is held; returned when it is dropped.
#[derive(Debug, Default)]
pub struct Held {
    share: KeptShare,
    bytes: usize,
}

impl Held {
    /// Holds more, or returns `false` if it does not fit.
    pub fn grow(&mut self, bytes: usize) -> bool {
        let fits = self.share.add(bytes, true);
        self.bytes += if fits { bytes } else { 0 };
        fits
    }

    /// Holds more for a table, or returns `false`. It leaves something for the names and rules of a walk.
    pub fn grow_table(&mut self, bytes: usize) -> bool {
        let left = self.room().saturating_sub(bytes);
        self.bytes + bytes <= left.saturating_mul(TABLE_PART) && self.grow(bytes)
    }

    /// Holds more even if it does not fit, for the least that a session needs to go on. Its own bound must be small.
    pub fn grow_anyway(&mut self, bytes: usize) {
        self.share.add(bytes, false);
        self.bytes += bytes;
    }

    /// Returns a part, at most what it holds.
    pub fn shrink(&mut self, bytes: usize) {
        let bytes = bytes.min(self.bytes);
        self.share.remove(bytes);
        self.bytes -= bytes;
    }

    /// Bytes that still fit.
    pub fn room(&self) -> usize {
        self.share.free()
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.share.remove(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: usize = 1 << 20;

    fn take_all(share: &KeptShare) -> Held {
        let mut held = share.hold();
        while held.grow(4096) {}
        held
    }

    #[test]
    fn one_key_leaves_most_of_the_memory_to_others() {
        let memory = KeptMemory::new(128 * MIB);
        let one: Vec<_> = (0..100).map(|_| take_all(&memory.share([1; 32]))).collect();
        assert!(one[0].bytes() <= 128 * MIB / CONNECTION_PART);
        let of_key: usize = one.iter().map(Held::bytes).sum();
        assert!(of_key <= 128 * MIB / 5 && of_key > 128 * MIB * 3 / 4 / 5 - MIB);
        let other = take_all(&memory.share([2; 32]));
        assert!(other.bytes() > 12 * MIB, "{}", other.bytes());
        drop((one, other));
        assert_eq!(memory.used(), 0);
        assert!(lock(&memory.state).keys.is_empty());
    }

    #[test]
    fn a_thousand_keys_leave_something_to_the_next() {
        let memory = KeptMemory::new(128 * MIB);
        let key = |n: u32| {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&n.to_le_bytes());
            key
        };
        // Each takes all that it gets, and returns nothing.
        let all: Vec<_> = (0..1000).map(|n| take_all(&memory.share(key(n)))).collect();
        let least = all.iter().map(Held::bytes).min().unwrap();
        assert!(least >= 28 << 10, "{least}");
        assert!(memory.used() <= 128 * MIB);
        let next = memory.share(key(1000)).free();
        assert!(next >= 28 << 10, "{next}");
    }

    #[test]
    fn the_only_owner_has_everything() {
        let share = KeptShare::whole(MIB);
        assert_eq!(share.free(), MIB);
        let mut held = share.try_hold(MIB).unwrap();
        assert!(share.try_hold(1).is_none());
        held.grow_anyway(10);
        held.shrink(20);
        assert_eq!(share.free(), 10);
    }

    proptest! {
        #[test]
        fn no_step_exceeds_the_total(steps in proptest::collection::vec((0_u8..5, 0_usize..4096, any::<bool>()), 1..200)) {
            let memory = KeptMemory::new(10_000);
            let mut all: Vec<_> = (0..5).map(|key| memory.share([key / 2; 32]).hold()).collect();
            for (at, bytes, grow) in steps {
                let held = &mut all[usize::from(at)];
                if grow {
                    let free = held.share.free();
                    prop_assert_eq!(held.grow(bytes), bytes <= free);
                } else {
                    held.shrink(bytes);
                }
                prop_assert!(memory.used() <= 10_000);
                prop_assert_eq!(memory.used(), all.iter().map(Held::bytes).sum::<usize>());
            }
        }
    }
}
