//! Memory: what all connections together may have received and not yet written.
//!
//! In quinn, reading is what grants the sender new credit (MAX_DATA, RFC 9000, section 4.1), so an application that
//! always reads has no back-pressure at all. haul reads always, since one blocked stream must not hold up the others,
//! and steers the credit instead: bytes that are read and not yet written are *held*, and a connection's receive window
//! is its share less what it holds. What quinn buffers and what is held stay within the share together; the shares of
//! all connections stay within the [`MemoryLimit`].

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quinn::{Connection, VarInt};
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::net::stream::{Direction, StreamError, silence};

/// Share of every admitted connection, in bytes: some 20 packets, so that even then a window is worth a round trip.
pub const MIN_SHARE: usize = 32 << 10;
/// Share to begin with where the budget has it, in bytes: enough for 160 Mbit/s at 100 ms, and for any rate on a LAN.
const START_SHARE: usize = 2 << 20;
/// This part of the budget (one in so many) is kept for connections to come: only first shares are taken from it.
/// Half of 64 MiB is 1,024 shares of [`MIN_SHARE`]; the other half carries 1 Gbit/s at 200 ms (25 MB).
const RESERVE: usize = 2;
/// A newcomer starts with at most this part of what is above the reserve (one in so many).
const START_PART: usize = 8;
/// The share is doubled when this part of it (one in so many) was read within a round trip.
const GROWTH_PART: usize = 4;
/// Credit is given back in steps of this part of the share (one in so many): each step costs a MAX_DATA frame. With 8, as
/// in quinn, the frames are so far apart that at 20 % loss a lost one stops the sender until a timeout; of 32, the next
/// makes up for it.
const STEP: usize = 32;
/// The store holds the sender up while so much of the share is held (one in so many), reservations apart: less than half
/// of a window is left to send with.
const HELD_UP: usize = 2;
/// Small bodies may reserve up to this part of a share (one in so many), so that large ones always find credit.
const RESERVABLE: usize = 2;

/// A peer that acknowledges nothing for so long, and for so many round trips, does not answer: quinn has asked four times by
/// then.
const UNRESPONSIVE: Duration = Duration::from_secs(3);
const ROUND_TRIPS: u32 = 16;

/// Bytes of memory shared by the connections of a process.
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
    /// A budget of so many bytes; at least one share of [`MIN_SHARE`].
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

    /// Bytes not shared out.
    pub fn free(&self) -> usize {
        lock(&self.state).free
    }

    fn first_share(&self) -> Option<usize> {
        let mut state = lock(&self.state);
        let spare = state.free.saturating_sub(self.total / RESERVE);
        let share = START_SHARE.min(spare / START_PART).max(MIN_SHARE);
        state.free = state.free.checked_sub(share)?;
        state.shares += 1;
        Some(share)
    }

    fn grow(&self, wanted: usize) -> usize {
        let mut state = lock(&self.state);
        let granted = wanted.min(state.free.saturating_sub(self.total / RESERVE));
        state.free -= granted;
        granted
    }

    /// Bytes that a connection with this share should give back when the reserve is being used: what it has above an equal
    /// part of the rest.
    fn excess(&self, share: usize) -> usize {
        let state = lock(&self.state);
        if state.free >= self.total / RESERVE {
            return 0;
        }
        share.saturating_sub(
            ((self.total - self.total / RESERVE) / state.shares.max(1)).max(MIN_SHARE),
        )
    }

    fn give_back(&self, bytes: usize, whole_share: bool) {
        let mut state = lock(&self.state);
        state.free += bytes;
        state.shares -= usize::from(whole_share);
    }
}

/// A connection's share of the [`MemoryLimit`], and its receive window as it follows from it.
///
/// The share grows as TCP's receive window does under autotuning: doubled when a quarter of it was used within one round
/// trip, so that it follows the bandwidth-delay product and stays small where the path needs little. TCP has half; but at
/// 20 % loss each way a grant of credit is often lost too, and takes two round trips more.
pub struct FlowControl {
    connection: Connection,
    budget: Arc<MemoryLimit>,
    state: Mutex<FlowControlState>,
    /// Told whenever a reservation may have become possible.
    freed: Notify,
    /// How much is at work on this side, see [`FlowControl::at_work`].
    at_work: AtomicUsize,
    /// How much ever was.
    worked: AtomicUsize,
}

struct FlowControlState {
    share: usize,
    /// Read and not yet written.
    held: usize,
    /// Part of `held` that small bodies have reserved.
    reserved: usize,
    /// `held` as the receive window was last set by.
    applied: usize,
    /// Bytes read since `since`.
    read: usize,
    since: Instant,
    round_trip: Duration,
    held_up: HeldUp,
}

/// How long much of the window was held, and since when it is now.
#[derive(Default)]
struct HeldUp {
    total: Duration,
    since: Option<Instant>,
}

impl HeldUp {
    fn set(&mut self, much: bool) {
        match (much, self.since) {
            (true, None) => self.since = Some(Instant::now()),
            (false, Some(since)) => (self.total, self.since) = (self.total + since.elapsed(), None),
            _ => {}
        }
    }
}

impl FlowControlState {
    fn note_held_up(&mut self) {
        self.held_up
            .set(self.held.saturating_sub(self.reserved) >= self.share / HELD_UP);
    }
}

impl FlowControl {
    /// Takes a first share for a connection; `None` when there is none left.
    pub fn open(connection: Connection, budget: &Arc<MemoryLimit>) -> Option<Arc<Self>> {
        let share = budget.first_share()?;
        connection.set_receive_window(varint(share));
        let round_trip = connection.rtt();
        let since = Instant::now();
        let held_up = HeldUp::default();
        let state = FlowControlState {
            share,
            held: 0,
            reserved: 0,
            applied: 0,
            read: 0,
            since,
            round_trip,
            held_up,
        };
        let budget = budget.clone();
        let state = Mutex::new(state);
        let freed = Notify::new();
        let (at_work, worked) = Default::default();
        Some(Arc::new(Self {
            connection,
            budget,
            state,
            freed,
            at_work,
            worked,
        }))
    }

    /// The connection whose window this is.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Counts bytes as held. To be called right after they were read, with no await between, so that the credit that
    /// reading granted is taken off again before much more can be read.
    pub fn hold(&self, bytes: usize) {
        let mut state = lock(&self.state);
        state.held += bytes;
        state.read += bytes;
        self.tune(&mut state);
        self.apply(&mut state);
        state.note_held_up();
    }

    /// Gives credit back for bytes that the disk has taken.
    pub fn release(&self, bytes: usize) {
        let mut state = lock(&self.state);
        state.held = state.held.saturating_sub(bytes);
        state.note_held_up();
        let excess = self.budget.excess(state.share).min(bytes);
        state.share -= excess;
        if excess > 0 {
            self.budget.give_back(excess, false);
        }
        let step = state.share / STEP;
        if state.applied.saturating_sub(state.held) >= step || state.held <= step {
            self.apply(&mut state);
        }
        drop(state);
        self.freed.notify_one();
    }

    /// How long, so far, much of the window was held by bytes that the disk had not taken.
    pub fn held_up(&self) -> Duration {
        let held_up = &lock(&self.state).held_up;
        held_up.total
            + held_up
                .since
                .map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Says that this side is at work on what came, on its disk or in the queue for it, until what this returns is dropped.
    pub(crate) fn at_work(self: &Arc<Self>) -> AtWork {
        self.worked.fetch_add(1, Ordering::SeqCst);
        self.at_work.fetch_add(1, Ordering::SeqCst);
        AtWork(self.clone())
    }

    /// Ends when the peer has been silent for `time`, and up to as long again, while this side was not at work: what one
    /// file holds may be the credit of all, and the peer has none to send with then.
    pub(crate) async fn silence(&self, time: Duration) {
        loop {
            let before = self.worked.load(Ordering::SeqCst);
            let began_at_work = self.at_work.load(Ordering::SeqCst) > 0;
            silence(&self.connection, Direction::Receiving, time).await;
            if !began_at_work && self.worked.load(Ordering::SeqCst) == before {
                return;
            }
        }
    }

    /// Waits for something of the peer, but not beyond its [`silence`](Self::silence).
    pub(crate) async fn or_timeout_on_silence<T>(
        &self,
        time: Duration,
        wait: impl Future<Output = T>,
    ) -> Result<T, StreamError> {
        tokio::select! {
            biased;
            done = wait => Ok(done),
            () = self.silence(time) => Err(StreamError::TimedOut),
        }
    }

    /// Has the peer acknowledge something if it is there. quinn has no PING to ask for, but what grants credit is acknowledged
    /// as well; and what is granted here is taken back at once.
    pub(crate) fn ask(&self) {
        let state = lock(&self.state);
        let window = state.share.saturating_sub(state.applied);
        self.connection.set_receive_window(varint(window + 1));
        self.connection.set_receive_window(varint(window));
    }

    /// Ends once the peer acknowledges nothing any more, or the connection is closed.
    pub(crate) async fn unresponsive(&self) {
        loop {
            let before = self.connection.stats().udp_rx.datagrams;
            self.ask();
            let wait = UNRESPONSIVE.max(self.connection.rtt() * ROUND_TRIPS);
            tokio::select! {
                _ = self.connection.closed() => return,
                () = sleep(wait) => {}
            }
            if self.connection.stats().udp_rx.datagrams == before {
                return;
            }
        }
    }

    /// Whether so much is held that credit runs short, and what is held should go to the disk without waiting for more.
    pub fn is_short(&self) -> bool {
        let state = lock(&self.state);
        state.held >= state.share / 4
    }

    /// Sets memory aside for the whole body of a small file; `None` when it is no small one for this connection.
    /// Waits while other small bodies have it. Cancelling it is harmless.
    pub async fn reserve(self: &Arc<Self>, bytes: usize) -> Option<Reservation> {
        loop {
            {
                let mut state = lock(&self.state);
                if state.reserved + bytes > state.share / RESERVABLE {
                    self.grow(&mut state);
                }
                if bytes > state.share / RESERVABLE {
                    return None;
                }
                if state.reserved + bytes <= state.share / RESERVABLE {
                    state.reserved += bytes;
                    drop(state);
                    self.hold(bytes);
                    return Some(Reservation {
                        window: self.clone(),
                        bytes,
                    });
                }
            }
            self.freed.notified().await;
        }
    }

    fn tune(&self, state: &mut FlowControlState) {
        if state.read >= state.share / GROWTH_PART {
            if state.since.elapsed() <= state.round_trip {
                self.grow(state);
            }
            state.read = 0;
            state.since = Instant::now();
            state.round_trip = self.connection.rtt();
        }
    }

    fn grow(&self, state: &mut FlowControlState) {
        let more = self.budget.grow(state.share);
        if more > 0 {
            state.share += more;
            self.apply(state);
        }
    }

    fn apply(&self, state: &mut FlowControlState) {
        state.applied = state.held;
        self.connection
            .set_receive_window(varint(state.share.saturating_sub(state.held)));
    }
}

impl Drop for FlowControl {
    fn drop(&mut self) {
        self.budget.give_back(lock(&self.state).share, true);
    }
}

/// Work of this side on what came over a connection.
pub(crate) struct AtWork(Arc<FlowControl>);

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.at_work.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Memory set aside for the body of one small file; given back when dropped.
pub struct Reservation {
    window: Arc<FlowControl>,
    bytes: usize,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        lock(&self.window.state).reserved -= self.bytes;
        self.window.release(self.bytes);
    }
}

/// Bytes that are held; given back bit by bit, and at the latest when dropped.
pub struct UnflushedBytes {
    window: Arc<FlowControl>,
    bytes: usize,
}

impl UnflushedBytes {
    /// Nothing held yet.
    pub fn new(window: Arc<FlowControl>) -> Self {
        Self { window, bytes: 0 }
    }

    /// Holds more, as [`FlowControl::hold`].
    pub fn add(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.window.hold(bytes);
    }

    /// Gives back, as [`FlowControl::release`].
    pub fn release(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.window.release(bytes);
    }
}

impl Drop for UnflushedBytes {
    fn drop(&mut self) {
        self.window.release(self.bytes);
    }
}

fn varint(bytes: usize) -> VarInt {
    VarInt::from_u64(bytes as u64).unwrap_or(VarInt::MAX)
}

/// A poisoned lock means that another task panicked; the numbers behind it are still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_connections_all_find_a_share_and_the_sum_stays_within_the_budget() {
        let budget = MemoryLimit::new(64 << 20);
        let shares: Vec<_> = std::iter::from_fn(|| budget.first_share())
            .take(2000)
            .collect();
        assert!(shares.len() >= 1024, "{} shares", shares.len());
        assert_eq!(shares.iter().sum::<usize>() + budget.free(), 64 << 20);
        assert_eq!(shares[0], START_SHARE);
        assert_eq!(*shares.last().unwrap(), MIN_SHARE);
    }

    #[test]
    fn growth_leaves_the_reserve_to_newcomers() {
        let budget = MemoryLimit::new(1 << 20);
        let first = budget.first_share().unwrap();
        let grown = first + budget.grow(usize::MAX);
        assert_eq!(budget.free(), (1 << 20) / RESERVE);
        assert!(budget.first_share().is_some());
        assert!(
            budget.excess(grown) > 0,
            "the first gives back what is above its part once others are there"
        );
    }
}
