//! The memory limit that all connections of a process share.
//!
//! Each connection has [`MIN_SHARE`]. More is granted by use from a *pool*, half of the limit, which all connections
//! share. A grant of QUIC credit cannot be taken back (RFC 9000, section 4.1: MAX_DATA only grows). So the share of a
//! connection that does not use it is *parked*: others may have the memory again, and what the peer may still send
//! counts under a limit of its own, `PARKED_FACTOR` times the memory limit and `PARKED_KEY_PART` of it for each
//! key. Parked credit ends when the peer uses it, or with the connection.
//!
//! A process thus keeps at most, in bytes of received content:
//!
//! | part | default |
//! |---|---|
//! | the memory limit: the minimum of each connection, and the pool | 64 MiB |
//! | parked credit of all connections | 256 MiB |
//! | the rest of the transport's initial window, 32 KiB for each connection | 32 MiB for 1,024 |

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use crate::auth::identity::KeyId;
use crate::error::lock::lock;

/// Share of every admitted connection, in bytes: some 20 packets, so that a window is still worth a round trip.
pub const MIN_SHARE: usize = 32 << 10;
/// Part of the memory limit (1/N) that is the pool. Half of 64 MiB carries 1 Gbit/s at 200 ms (25 MB); the other half is
/// 1,024 shares of [`MIN_SHARE`].
const POOL_PART: usize = 2;
/// Parked credit of all connections, as a multiple of the memory limit.
const PARKED_FACTOR: usize = 4;
/// Part of the memory limit (1/N) that the parked credit of one key may be: 8 MiB of 64.
const PARKED_KEY_PART: usize = 8;
/// Time in which a connection must use its share; then the unused part may be parked.
pub(super) const IDLE_TIME: Duration = Duration::from_secs(2);
/// Shortest time between two searches for unused shares, which visit every connection.
const RECLAIM_INTERVAL: Duration = Duration::from_millis(250);
/// Time after a refused grant in which large shares shrink to an equal part of the pool.
const SHORTAGE_TIME: Duration = Duration::from_secs(1);

/// Memory in bytes shared by the connections of a process.
#[derive(Debug)]
pub struct MemoryLimit {
    total: usize,
    state: Mutex<MemoryLimitState>,
}

#[derive(Debug, Default)]
struct MemoryLimitState {
    connections: usize,
    /// Bytes of the pool that connections have.
    grown: usize,
    /// Connections that have bytes of the pool.
    growers: usize,
    parked: usize,
    /// Parked credit by key; without entries of 0.
    parked_by_key: HashMap<KeyId, usize>,
    /// When a grant was last refused for want of memory.
    short_since: Option<Instant>,
    reclaimed_at: Option<Instant>,
    members: Vec<Weak<dyn Member>>,
}

/// A connection, as the memory limit sees it. The limit calls it without holding its own lock. A connection whose state
/// is locked is in use, and is passed over.
pub(super) trait Member: Send + Sync + std::fmt::Debug {
    /// Parks the part of the share that is not used.
    fn park_unused(&self);
    /// Returns what the connection has parked, and since when it has received nothing.
    fn parked(&self) -> Option<Parked>;
    /// Closes the connection, because there is no room for the parked credit of others.
    fn evict(&self);
}

/// What a connection has parked.
pub(super) struct Parked {
    pub(super) key: KeyId,
    pub(super) idle: Duration,
}

impl MemoryLimit {
    /// A limit of `total` bytes; at least one share of [`MIN_SHARE`].
    pub fn new(total: usize) -> Arc<Self> {
        Arc::new(Self {
            total: total.max(MIN_SHARE),
            state: Mutex::default(),
        })
    }

    /// Takes the minimum for a connection; `None` when no memory is left.
    pub(super) fn admit(self: &Arc<Self>, key: KeyId) -> Option<Share> {
        let mut state = self.lock();
        let taken = (state.connections + 1) * MIN_SHARE + state.grown;
        if taken > self.total {
            return None;
        }
        state.connections += 1;
        drop(state);
        Some(Share {
            memory: self.clone(),
            key,
            grown: 0,
            parked: 0,
        })
    }

    /// Adds a connection to those whose unused shares are parked on demand.
    pub(super) fn register(&self, member: Weak<dyn Member>) {
        let mut state = self.lock();
        // Removes as many as came since the last time, so that the list stays as long as there are connections.
        if state.members.len() >= 2 * state.connections {
            state
                .members
                .retain(|member| Weak::strong_count(member) > 0);
        }
        state.members.push(member);
    }

    /// Bytes of the pool that no connection has.
    pub(super) fn room(&self) -> usize {
        self.room_in(&self.lock())
    }

    fn room_in(&self, state: &MemoryLimitState) -> usize {
        let pool = self.total / POOL_PART;
        let rest = self.total - state.connections * MIN_SHARE;
        pool.min(rest).saturating_sub(state.grown)
    }

    /// Parks the unused shares of all connections, if that was not tried just now. Where no more can be parked, it closes
    /// the connection of the key that has parked most which has been idle for longest. Returns whether it has tried.
    pub(super) fn reclaim(&self) -> bool {
        let members: Vec<_> = {
            let mut state = self.lock();
            let now = Instant::now();
            let is_early = |at: Instant| now.duration_since(at) < RECLAIM_INTERVAL;
            if state.reclaimed_at.is_some_and(is_early) {
                return false;
            }
            state.reclaimed_at = Some(now);
            state.members.iter().filter_map(Weak::upgrade).collect()
        };
        members.iter().for_each(|member| member.park_unused());
        // Another connection could not park its first share any more.
        let is_full = self.lock().parked + self.total / PARKED_KEY_PART > self.parked_limit();
        if is_full {
            let idlest = members
                .iter()
                .filter_map(|member| member.parked().map(|parked| (member, parked)))
                .filter(|(_, parked)| parked.idle >= IDLE_TIME)
                .max_by_key(|(_, parked)| {
                    let of_key = self.lock().parked_by_key.get(&parked.key).copied();
                    (of_key, parked.idle)
                });
            if let Some((member, _)) = idlest {
                member.evict();
            }
        }
        true
    }

    fn parked_limit(&self) -> usize {
        self.total.saturating_mul(PARKED_FACTOR)
    }

    /// Locks even if another task panicked: no update leaves the numbers inconsistent.
    fn lock(&self) -> MutexGuard<'_, MemoryLimitState> {
        lock(&self.state)
    }
}

impl MemoryLimitState {
    fn unpark(&mut self, key: KeyId, bytes: usize) {
        self.parked -= bytes;
        if let Some(of_key) = self.parked_by_key.get_mut(&key) {
            *of_key -= bytes;
            if *of_key == 0 {
                self.parked_by_key.remove(&key);
            }
        }
    }
}

/// One connection's share of the memory. Dropping it returns everything.
#[derive(Debug)]
pub(super) struct Share {
    memory: Arc<MemoryLimit>,
    key: KeyId,
    /// Bytes of the pool.
    grown: usize,
    /// Credit that the peer has beyond the share.
    parked: usize,
}

impl Share {
    /// Bytes that the connection may keep: the share and the parked credit.
    pub(super) fn bytes(&self) -> usize {
        MIN_SHARE + self.grown + self.parked
    }

    /// Bytes of the pool.
    pub(super) fn grown(&self) -> usize {
        self.grown
    }

    /// The key of the peer.
    pub(super) fn key(&self) -> KeyId {
        self.key
    }

    /// Credit that is parked.
    pub(super) fn parked(&self) -> usize {
        self.parked
    }

    /// Takes up to `wanted` bytes from the pool. What is parked comes first, and is no new credit for the peer. A key
    /// that has parked all it may gets nothing new. Returns whether everything was granted.
    pub(super) fn grow(&mut self, wanted: usize) -> bool {
        let memory = self.memory.clone();
        let mut state = memory.lock();
        let mut granted = wanted.min(memory.room_in(&state));
        if granted < wanted {
            state.short_since = Some(Instant::now());
        }
        let from_parked = granted.min(self.parked);
        let of_key = state.parked_by_key.get(&self.key).copied().unwrap_or(0);
        if of_key - from_parked >= memory.total / PARKED_KEY_PART {
            granted = from_parked;
        }
        state.unpark(self.key, from_parked);
        state.grown += granted;
        state.growers += usize::from(self.grown == 0 && granted > 0);
        self.parked -= from_parked;
        self.grown += granted;
        granted == wanted
    }

    /// Parks up to `wanted` bytes of the share, as far as the limits of parked credit allow.
    pub(super) fn park(&mut self, wanted: usize) {
        let mut state = self.memory.lock();
        let of_key = state.parked_by_key.get(&self.key).copied().unwrap_or(0);
        let room = (self.memory.parked_limit().saturating_sub(state.parked))
            .min((self.memory.total / PARKED_KEY_PART).saturating_sub(of_key));
        let parked = wanted.min(self.grown).min(room);
        if parked == 0 {
            return;
        }
        state.parked += parked;
        *state.parked_by_key.entry(self.key).or_default() += parked;
        state.grown -= parked;
        self.grown -= parked;
        self.parked += parked;
        state.growers -= usize::from(self.grown == 0);
    }

    /// Returns memory for `released` bytes that have left it: parked credit, and while others are short of memory, what
    /// exceeds an equal part of the pool.
    pub(super) fn give_back(&mut self, released: usize) {
        if self.grown == 0 && self.parked == 0 {
            return;
        }
        let mut state = self.memory.lock();
        let used = released.min(self.parked);
        if used > 0 {
            state.unpark(self.key, used);
            self.parked -= used;
        }
        let is_short = state
            .short_since
            .is_some_and(|since| since.elapsed() < SHORTAGE_TIME);
        if is_short && self.grown > 0 {
            let equal = self.memory.total / POOL_PART / state.growers.max(1);
            let excess = self.grown.saturating_sub(equal).min(released - used);
            state.grown -= excess;
            self.grown -= excess;
            state.growers -= usize::from(excess > 0 && self.grown == 0);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.memory.lock();
        state.connections -= 1;
        state.grown -= self.grown;
        state.growers -= usize::from(self.grown > 0);
        state.unpark(self.key, self.parked);
    }
}

#[cfg(test)]
mod tests;
