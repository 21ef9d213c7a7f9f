//! Flow control: limits the bytes that all connections together have received and not yet written.
//!
//! In quinn, reading grants the sender new credit (MAX_DATA, RFC 9000, section 4.1), so an application that always
//! reads has no back-pressure. haul always reads, since one blocked stream must not block the others, and steers the
//! credit instead. Bytes that are read and not yet written are *unflushed*. A connection's receive window is its
//! share less its unflushed bytes. So quinn's buffers and the unflushed bytes together stay within the share, and all
//! shares within the [`MemoryLimit`].

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quinn::{Connection, VarInt};
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::net::memory_limit::MemoryLimit;
use crate::net::stream::{Direction, StreamError, silence};

/// The share is doubled when this part of it (1/N) was read within a round trip.
const GROWTH_PART: usize = 4;
/// Credit is returned in steps of this part of the share (1/N), since each step costs a MAX_DATA frame. With 8, as in
/// quinn, frames are so far apart that at 20 % loss a lost one stops the sender until a timeout. With 32, the next
/// one makes up for it.
const CREDIT_STEP_PART: usize = 32;
/// Part of the share (1/N) that must be unflushed, without reservations, before the store counts as slowing the
/// sender down: less than half of the window is left.
const SLOW_PART: usize = 2;
/// Part of a share (1/N) that small bodies may reserve, so that large ones always find credit.
const RESERVABLE_PART: usize = 2;
/// A peer counts as unresponsive when it acknowledges nothing for this long and for [`UNRESPONSIVE_ROUND_TRIPS`]: quinn
/// has probed it four times by then.
const UNRESPONSIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Round trips that the silence must last, on paths where they exceed [`UNRESPONSIVE_TIMEOUT`].
const UNRESPONSIVE_ROUND_TRIPS: u32 = 16;

/// A connection's share of the [`MemoryLimit`], and the receive window that follows from it.
///
/// The share grows like TCP's receive window under autotuning: it doubles when a quarter of it was used within one
/// round trip. So it follows the bandwidth-delay product and stays small on slow paths. TCP's threshold is half; but
/// at 20 % loss each way a credit grant is often lost too, and takes two more round trips.
pub struct FlowControl {
    connection: Connection,
    memory: Arc<MemoryLimit>,
    state: Mutex<FlowControlState>,
    /// Notified when a reservation may have become possible.
    freed: Notify,
    /// Tasks that work on received bytes now; see [`FlowControl::start_work`].
    active_work: AtomicUsize,
    /// Tasks that ever did.
    started_work: AtomicUsize,
}

struct FlowControlState {
    share: usize,
    /// Bytes read and not yet written.
    unflushed: usize,
    /// Part of `unflushed` that small bodies have reserved.
    reserved: usize,
    /// `unflushed` when the receive window was last set.
    applied_unflushed: usize,
    /// Bytes read since `round_start`.
    read_in_round: usize,
    round_start: Instant,
    round_trip: Duration,
    slow_writes: SlowWriteClock,
}

/// How long the store has slowed the sender down, and since when it does now.
#[derive(Default)]
struct SlowWriteClock {
    total: Duration,
    since: Option<Instant>,
}

impl SlowWriteClock {
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

impl FlowControlState {
    fn update_slow_writes(&mut self) {
        self.slow_writes
            .set(self.unflushed.saturating_sub(self.reserved) >= self.share / SLOW_PART);
    }
}

impl FlowControl {
    /// Takes an initial share for a connection; `None` when no memory is left.
    pub fn open(connection: Connection, memory: &Arc<MemoryLimit>) -> Option<Arc<Self>> {
        let share = memory.initial_share()?;
        connection.set_receive_window(varint(share));
        let round_trip = connection.rtt();
        let state = FlowControlState {
            share,
            unflushed: 0,
            reserved: 0,
            applied_unflushed: 0,
            read_in_round: 0,
            round_start: Instant::now(),
            round_trip,
            slow_writes: SlowWriteClock::default(),
        };
        let memory = memory.clone();
        let state = Mutex::new(state);
        let freed = Notify::new();

        Some(Arc::new(Self {
            connection,
            memory,
            state,
            freed,
            active_work: AtomicUsize::new(0),
            started_work: AtomicUsize::new(0),
        }))
    }

    /// The connection.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Counts bytes as unflushed. Call it right after reading them, without an await in between: it takes back the
    /// credit that reading has granted before much more can arrive.
    pub fn add_unflushed(&self, bytes: usize) {
        let mut state = lock(&self.state);
        state.unflushed += bytes;
        state.read_in_round += bytes;
        self.grow_with_rate(&mut state);
        self.set_window(&mut state);
        state.update_slow_writes();
    }

    /// Returns the credit of bytes that were written.
    pub fn release(&self, bytes: usize) {
        let mut state = lock(&self.state);
        state.unflushed = state.unflushed.saturating_sub(bytes);
        state.update_slow_writes();
        let excess = self.memory.excess(state.share).min(bytes);
        state.share -= excess;
        if excess > 0 {
            self.memory.put_back(excess, false);
        }
        let step = state.share / CREDIT_STEP_PART;
        if state.applied_unflushed.saturating_sub(state.unflushed) >= step
            || state.unflushed <= step
        {
            self.set_window(&mut state);
        }
        drop(state);
        self.freed.notify_one();
    }

    /// Total time so far in which unflushed bytes took up much of the window.
    pub fn slow_writes(&self) -> Duration {
        let slow_writes = &lock(&self.state).slow_writes;
        slow_writes.total
            + slow_writes
                .since
                .map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Marks this end as working on received bytes, on its disk or in the queue for it, until the guard is dropped.
    pub(crate) fn start_work(self: &Arc<Self>) -> WorkGuard {
        self.started_work.fetch_add(1, Ordering::SeqCst);
        self.active_work.fetch_add(1, Ordering::SeqCst);
        WorkGuard(self.clone())
    }

    /// Resolves when the peer was silent for `time`, and up to twice as long, while this end had no work. While one
    /// file's unflushed bytes use up the credit of all, the peer cannot send.
    pub(crate) async fn silence(&self, time: Duration) {
        loop {
            let before = self.started_work.load(Ordering::SeqCst);
            let was_working = self.active_work.load(Ordering::SeqCst) > 0;
            silence(&self.connection, Direction::Receiving, time).await;
            if !was_working && self.started_work.load(Ordering::SeqCst) == before {
                return;
            }
        }
    }

    /// Awaits `wait`, or fails with [`StreamError::TimedOut`] on the peer's [`silence`](Self::silence).
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

    /// Makes a live peer send an ACK. quinn offers no PING, but a MAX_DATA frame is acknowledged too, so this grants
    /// one byte of credit and takes it back at once.
    pub(crate) fn request_ack(&self) {
        let state = lock(&self.state);
        let window = state.share.saturating_sub(state.applied_unflushed);
        self.connection.set_receive_window(varint(window + 1));
        self.connection.set_receive_window(varint(window));
    }

    /// Resolves once the peer acknowledges nothing any more, or the connection is closed.
    pub(crate) async fn unresponsive(&self) {
        loop {
            let before = self.connection.stats().udp_rx.datagrams;
            self.request_ack();
            let wait = UNRESPONSIVE_TIMEOUT.max(self.connection.rtt() * UNRESPONSIVE_ROUND_TRIPS);
            tokio::select! {
                _ = self.connection.closed() => return,
                () = sleep(wait) => {}
            }
            if self.connection.stats().udp_rx.datagrams == before {
                return;
            }
        }
    }

    /// Whether credit runs short, so that unflushed bytes should be written without waiting for more.
    pub fn is_short(&self) -> bool {
        let state = lock(&self.state);
        state.unflushed >= state.share / 4
    }

    /// Reserves memory for the whole body of a small file. `None` when the body is too large for that on this
    /// connection. Waits while other small bodies use the memory. Cancelling takes nothing.
    pub async fn reserve(self: &Arc<Self>, bytes: usize) -> Option<Reservation> {
        loop {
            {
                let mut state = lock(&self.state);
                if state.reserved + bytes > state.share / RESERVABLE_PART {
                    self.grow(&mut state);
                }
                if bytes > state.share / RESERVABLE_PART {
                    return None;
                }
                if state.reserved + bytes <= state.share / RESERVABLE_PART {
                    state.reserved += bytes;
                    drop(state);
                    self.add_unflushed(bytes);
                    return Some(Reservation {
                        flow: self.clone(),
                        bytes,
                    });
                }
            }
            self.freed.notified().await;
        }
    }

    fn grow_with_rate(&self, state: &mut FlowControlState) {
        if state.read_in_round >= state.share / GROWTH_PART {
            if state.round_start.elapsed() <= state.round_trip {
                self.grow(state);
            }
            state.read_in_round = 0;
            state.round_start = Instant::now();
            state.round_trip = self.connection.rtt();
        }
    }

    fn grow(&self, state: &mut FlowControlState) {
        let more = self.memory.grow(state.share);
        if more > 0 {
            state.share += more;
            self.set_window(state);
        }
    }

    fn set_window(&self, state: &mut FlowControlState) {
        state.applied_unflushed = state.unflushed;
        self.connection
            .set_receive_window(varint(state.share.saturating_sub(state.unflushed)));
    }
}

impl Drop for FlowControl {
    fn drop(&mut self) {
        self.memory.put_back(lock(&self.state).share, true);
    }
}

/// Guard of one task that works on received bytes.
pub(crate) struct WorkGuard(Arc<FlowControl>);

impl Drop for WorkGuard {
    fn drop(&mut self) {
        self.0.active_work.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Memory reserved for the body of one small file; returned on drop.
pub struct Reservation {
    flow: Arc<FlowControl>,
    bytes: usize,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        lock(&self.flow.state).reserved -= self.bytes;
        self.flow.release(self.bytes);
    }
}

/// Unflushed bytes of one transfer; returned piece by piece, the rest on drop.
pub struct UnflushedBytes {
    flow: Arc<FlowControl>,
    bytes: usize,
}

impl UnflushedBytes {
    /// No bytes yet.
    pub fn new(flow: Arc<FlowControl>) -> Self {
        Self { flow, bytes: 0 }
    }

    /// Adds bytes, as [`FlowControl::add_unflushed`].
    pub fn add(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.flow.add_unflushed(bytes);
    }

    /// Returns bytes, as [`FlowControl::release`].
    pub fn release(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.flow.release(bytes);
    }
}

impl Drop for UnflushedBytes {
    fn drop(&mut self) {
        self.flow.release(self.bytes);
    }
}

fn varint(bytes: usize) -> VarInt {
    VarInt::from_u64(bytes as u64).unwrap_or(VarInt::MAX)
}

/// Locks even if another task panicked: no update leaves the numbers inconsistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
