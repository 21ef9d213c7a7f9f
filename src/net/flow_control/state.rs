//! The numbers behind a connection's receive window: what was granted, what is used, and what follows.

use std::time::{Duration, Instant};

use crate::net::endpoint::INITIAL_WINDOW;
use crate::net::memory_limit::{IDLE_TIME, MIN_SHARE, MemoryLimit, Share};

/// The share is doubled when this part of it (1/N) was read within a round trip.
const GROWTH_PART: usize = 4;
/// Largest share in bytes that the first bytes of content bring at once: enough for 160 Mbit/s at 100 ms, and for any
/// rate on a LAN.
const FIRST_SHARE: usize = 2 << 20;
/// Part of the rest of the pool (1/N) that one connection may take in this way, so that many may start at once.
const FIRST_PART: usize = 8;
/// The first share, as a multiple of the content that came within [`USE_TIME`] or a round trip. In Startup the sender
/// sends three times as much in the next round trip, and a lost grant costs two more.
const FIRST_FACTOR: usize = 32;
/// Content that an admitted file counts as, in bytes, before any of it comes: the initial flight of a sender on a
/// satellite link (384 KB) then finds credit.
const ADMITTED_USE: usize = 16 << 10;
/// Shortest time over which use is measured. On a shorter round trip a burst would count as little.
const USE_TIME: Duration = Duration::from_millis(100);
/// A share is used if as much as it holds comes in this time,
const KEPT_TIME: Duration = Duration::from_secs(1);
/// or in so many round trips. Growth never makes it more than eight times what comes in one.
const KEPT_ROUND_TRIPS: u32 = 8;
/// The part of the transport's initial window in bytes that is not in the minimum share. The peer had it before it was
/// admitted.
const BASE_WINDOW: usize = INITIAL_WINDOW as usize - MIN_SHARE;
/// Credit is returned in steps of this part of the share (1/N), since each step costs a MAX_DATA frame. With 8, as in
/// quinn, frames are so far apart that at 20 % loss a lost one stops the sender until a timeout. With 32, the next
/// one makes up for it.
const CREDIT_STEP_PART: usize = 32;
/// Part of the share (1/N) that must be unflushed, without reservations, before the store counts as slowing the
/// sender down: less than half of the window is left.
const SLOW_PART: usize = 2;
/// Part of a share (1/N) that small bodies may reserve, so that large ones always find credit.
const RESERVABLE_PART: usize = 2;
/// The numbers of one connection. They change with what it receives; [`next_window`](Self::next_window) is what follows.
#[derive(Debug)]
pub(super) struct FlowControlState {
    pub(super) share: Share,
    /// Bytes read and not yet written.
    pub(super) unflushed: usize,
    /// Part of `unflushed` that small bodies have reserved.
    pub(super) reserved: usize,
    /// Bytes that were reserved and returned, for which quinn's window was not raised again. quinn still grants what a
    /// lowered window has taken away, until as much is read. So raising it for content that never came would grant the
    /// bytes twice. The next reservations and reads use them up.
    withheld: usize,
    /// `unflushed` when the receive window was last set.
    applied_unflushed: usize,
    /// The receive window that was last set.
    applied_window: usize,
    /// Bytes read since `round_start`.
    read_in_round: usize,
    round_start: Instant,
    round_trip: Duration,
    recent_use: RecentUse,
    pub(super) slow_writes: SlowWriteClock,
}

impl FlowControlState {
    pub(super) fn new(share: Share, round_trip: Duration) -> Self {
        Self {
            share,
            unflushed: 0,
            reserved: 0,
            withheld: 0,
            applied_unflushed: 0,
            applied_window: INITIAL_WINDOW as usize,
            read_in_round: 0,
            round_start: Instant::now(),
            round_trip,
            recent_use: RecentUse::new(),
            slow_writes: SlowWriteClock::default(),
        }
    }

    /// Counts bytes that were read. The share grows with them.
    pub(super) fn add(
        &mut self,
        bytes: usize,
        memory: &MemoryLimit,
        round_trip: impl Fn() -> Duration,
    ) {
        self.recent_use.add(bytes);
        self.add_unflushed(bytes, memory, round_trip);
    }

    /// Counts the content of a small body that has come. It was added when it was reserved, which alone is no use.
    pub(super) fn small_body_came(&mut self, bytes: usize) {
        self.recent_use.add(bytes);
    }

    fn add_unflushed(
        &mut self,
        bytes: usize,
        memory: &MemoryLimit,
        round_trip: impl Fn() -> Duration,
    ) {
        self.withheld = self.withheld.saturating_sub(bytes);
        self.unflushed += bytes;
        if self.round_start.elapsed() > self.round_trip.max(USE_TIME) {
            self.start_round(round_trip());
        }
        self.read_in_round += bytes;
        self.grow_to_first_share(0, memory);
        if self.read_in_round >= self.share.bytes() / GROWTH_PART {
            if self.round_start.elapsed() <= self.round_trip {
                self.grow(memory);
            }
            self.start_round(round_trip());
        }
        self.update_slow_writes();
    }

    /// Counts bytes that were written or dropped. Returns whether the window is to be set.
    pub(super) fn release(&mut self, bytes: usize) -> bool {
        self.unflushed = self.unflushed.saturating_sub(bytes);
        self.update_slow_writes();
        self.share.give_back(bytes);
        let step = self.share.bytes() / CREDIT_STEP_PART;
        self.applied_unflushed.saturating_sub(self.unflushed) >= step || self.unflushed <= step
    }

    /// Reserves bytes for a small body; `None` if the share cannot hold it, and `Some(false)` if it cannot now.
    pub(super) fn reserve(
        &mut self,
        bytes: usize,
        memory: &MemoryLimit,
        round_trip: impl Fn() -> Duration,
    ) -> Option<bool> {
        if self.reserved + bytes > self.reservable() {
            self.grow_to_first_share(bytes, memory);
        }
        if self.reserved + bytes > self.reservable() {
            self.grow(memory);
        }
        if bytes > self.reservable() {
            return None;
        }
        let fits = self.reserved + bytes <= self.reservable();
        if fits {
            self.reserved += bytes;
            self.add_unflushed(bytes, memory, round_trip);
        }
        Some(fits)
    }

    /// Ends a reservation; [`release`](Self::release) counts its bytes.
    pub(super) fn unreserve(&mut self, bytes: usize) {
        self.reserved -= bytes;
        self.withheld += bytes;
    }

    /// Prepares for the content of a file that this end asks for.
    pub(super) fn expect_content(&mut self, memory: &MemoryLimit) {
        self.grow_to_first_share(ADMITTED_USE, memory);
    }

    /// Takes the largest first share.
    pub(super) fn take_first_share(&mut self, memory: &MemoryLimit) {
        self.grow_to_first_share(FIRST_SHARE / FIRST_FACTOR, memory);
    }

    /// Parks the part of the share that is not used.
    pub(super) fn park_unused(&mut self) {
        let kept = KEPT_TIME.max(self.round_trip * KEPT_ROUND_TRIPS);
        let used = self.recent_use.in_time(kept).max(self.in_memory());
        let unused = self.share.grown().saturating_sub(used);
        if unused > 0 {
            self.share.park(unused);
        }
    }

    /// How long no content has come.
    pub(super) fn idle(&self) -> Duration {
        self.recent_use.last.elapsed()
    }

    /// The receive window that was last set.
    pub(super) fn window(&self) -> usize {
        self.applied_window
    }

    /// The receive window to set.
    pub(super) fn next_window(&mut self) -> usize {
        let bytes = self.share.bytes();
        // At most half is withheld, so that a share which has shrunk does not end in a window of 0.
        self.withheld = self.withheld.min(bytes / RESERVABLE_PART);
        self.applied_unflushed = self.unflushed;
        self.applied_window = (BASE_WINDOW + bytes).saturating_sub(self.unflushed + self.withheld);
        self.applied_window
    }

    /// Unflushed bytes that have come.
    fn in_memory(&self) -> usize {
        self.unflushed.saturating_sub(self.reserved)
    }

    /// Bytes that small bodies may reserve.
    fn reservable(&self) -> usize {
        self.share.bytes() / RESERVABLE_PART
    }

    fn update_slow_writes(&mut self) {
        let is_slow = self.in_memory() >= self.share.bytes() / SLOW_PART;
        self.slow_writes.set(is_slow);
    }

    fn start_round(&mut self, round_trip: Duration) {
        self.read_in_round = 0;
        self.round_start = Instant::now();
        self.round_trip = round_trip;
    }

    /// Raises the share at once to a multiple of the bytes of this round and `more`. A step is at least a half, since
    /// each costs a MAX_DATA frame.
    fn grow_to_first_share(&mut self, more: usize, memory: &MemoryLimit) {
        let wanted = FIRST_SHARE.min((self.read_in_round + more).saturating_mul(FIRST_FACTOR));
        let grown = self.share.grown();
        let step = if wanted < FIRST_SHARE { grown / 2 } else { 0 };
        if wanted <= grown + step {
            return;
        }
        if memory.room() / FIRST_PART < wanted - grown {
            memory.reclaim();
        }
        let wanted = wanted.min(memory.room() / FIRST_PART);
        if wanted > grown {
            self.share.grow(wanted - grown);
        }
    }

    /// Doubles the share, if necessary with memory that others do not use.
    fn grow(&mut self, memory: &MemoryLimit) {
        let wanted = self.share.bytes();
        if memory.room() < wanted {
            memory.reclaim();
        }
        self.share.grow(wanted);
    }
}

/// The content that came in the current period and in the one before. A period ends with the first content after
/// [`IDLE_TIME`].
#[derive(Debug)]
struct RecentUse {
    since: Instant,
    bytes: usize,
    last: Instant,
    /// Bytes a second in the period before.
    rate_before: f64,
}

impl RecentUse {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            since: now,
            bytes: 0,
            last: now,
            rate_before: 0.0,
        }
    }

    fn add(&mut self, bytes: usize) {
        self.last = Instant::now();
        let period = self.last.duration_since(self.since);
        if period >= IDLE_TIME {
            self.rate_before = self.bytes as f64 / period.as_secs_f64();
            self.since = self.last;
            self.bytes = 0;
        }
        self.bytes += bytes;
    }

    /// The bytes that come in `time` at the present rate. A period that has just begun counts as [`USE_TIME`].
    fn in_time(&self, time: Duration) -> usize {
        if self.last.elapsed() >= IDLE_TIME {
            return 0;
        }
        let period = self.since.elapsed().max(USE_TIME);
        let mut rate = self.bytes as f64 / period.as_secs_f64();
        if period < IDLE_TIME {
            rate = rate.max(self.rate_before);
        }
        (rate * time.as_secs_f64()) as usize
    }
}

/// How long the store has slowed the sender down, and since when it does now.
#[derive(Debug, Default)]
pub(super) struct SlowWriteClock {
    total: Duration,
    since: Option<Instant>,
}

impl SlowWriteClock {
    /// The time so far.
    pub(super) fn total(&self) -> Duration {
        self.total + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn set(&mut self, slow: bool) {
        match (slow, self.since) {
            (true, None) => self.since = Some(Instant::now()),
            (false, Some(since)) => {
                self.total += since.elapsed();
                self.since = None;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
