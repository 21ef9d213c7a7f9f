//! The memory limit that all connections of a process share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Smallest share of an admitted connection, in bytes: some 20 packets, so that a window is still worth a round trip.
pub const MIN_SHARE: usize = 32 << 10;
/// Initial share in bytes if the memory limit allows: enough for 160 Mbit/s at 100 ms, and for any rate on a LAN.
const INITIAL_SHARE: usize = 2 << 20;
/// Reserved part of the memory limit (1/N): only initial shares are taken from it. Half of 64 MiB is 1,024 shares of
/// [`MIN_SHARE`]; the other half carries 1 Gbit/s at 200 ms (25 MB).
const RESERVE_PART: usize = 2;
/// Part (1/N) of the memory above the reserve that one initial share may take.
const INITIAL_PART: usize = 8;

/// Memory in bytes shared by the connections of a process.
#[derive(Debug)]
pub struct MemoryLimit {
    total: usize,
    state: Mutex<MemoryLimitState>,
}

#[derive(Debug)]
struct MemoryLimitState {
    free: usize,
    shares: usize,
}

impl MemoryLimit {
    /// A limit of `total` bytes; at least one share of [`MIN_SHARE`].
    pub fn new(total: usize) -> Arc<Self> {
        let total = total.max(MIN_SHARE);
        Arc::new(Self {
            total,
            state: Mutex::new(MemoryLimitState {
                free: total,
                shares: 0,
            }),
        })
    }

    /// Bytes that no connection has.
    pub fn free(&self) -> usize {
        self.lock().free
    }

    pub(super) fn initial_share(&self) -> Option<usize> {
        let mut state = self.lock();
        let spare = state.free.saturating_sub(self.total / RESERVE_PART);
        let share = INITIAL_SHARE.min(spare / INITIAL_PART).max(MIN_SHARE);
        state.free = state.free.checked_sub(share)?;
        state.shares += 1;
        Some(share)
    }

    pub(super) fn grow(&self, wanted: usize) -> usize {
        let mut state = self.lock();
        let granted = wanted.min(state.free.saturating_sub(self.total / RESERVE_PART));
        state.free -= granted;
        granted
    }

    /// Bytes that a connection with this share should return while the reserve is in use: its surplus over an equal
    /// part of the rest.
    pub(super) fn excess(&self, share: usize) -> usize {
        let state = self.lock();
        if state.free >= self.total / RESERVE_PART {
            return 0;
        }
        share.saturating_sub(
            ((self.total - self.total / RESERVE_PART) / state.shares.max(1)).max(MIN_SHARE),
        )
    }

    pub(super) fn put_back(&self, bytes: usize, is_whole_share: bool) {
        let mut state = self.lock();
        state.free += bytes;
        state.shares -= usize::from(is_whole_share);
    }
}

impl MemoryLimit {
    /// Locks even if another task panicked: no update leaves the numbers inconsistent.
    fn lock(&self) -> MutexGuard<'_, MemoryLimitState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_connections_get_shares_within_the_limit() {
        let memory = MemoryLimit::new(64 << 20);
        let shares: Vec<_> = std::iter::from_fn(|| memory.initial_share())
            .take(2000)
            .collect();
        assert!(shares.len() >= 1024, "{} shares", shares.len());
        assert_eq!(shares.iter().sum::<usize>() + memory.free(), 64 << 20);
        assert_eq!(shares[0], INITIAL_SHARE);
        assert_eq!(*shares.last().unwrap(), MIN_SHARE);
    }

    #[test]
    fn growth_leaves_the_reserve_to_new_connections() {
        let memory = MemoryLimit::new(1 << 20);
        let first = memory.initial_share().unwrap();
        let grown = first + memory.grow(usize::MAX);
        assert_eq!(memory.free(), (1 << 20) / RESERVE_PART);
        assert!(memory.initial_share().is_some());
        assert!(
            memory.excess(grown) > 0,
            "the first returns its surplus once there are others"
        );
    }
}
