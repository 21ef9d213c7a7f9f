//! Flow control: limits the bytes that all connections together have received and not yet written.
//!
//! In quinn, reading grants the sender new credit (MAX_DATA, RFC 9000, section 4.1), so an application that always
//! reads has no back-pressure. haul always reads, since one blocked stream must not block the others, and steers the
//! credit instead. Bytes that are read and not yet written are *unflushed*. A connection's receive window is its
//! share less its unflushed bytes. So quinn's buffers and the unflushed bytes together stay within the share, and all
//! shares within the [`MemoryLimit`].
//!
//! A share follows use. An idle connection has the minimum. The first bytes of content, or a reservation for them,
//! raise it at once to many times what came; then it doubles as TCP's receive window does. What a connection has not
//! used for two seconds is parked when others need the memory.

mod state;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use quinn::{Connection, VarInt};
use tokio::sync::Notify;
use tokio::time::sleep;

use self::state::FlowControlState;
use crate::auth::identity::KeyId;
use crate::error::Code;
use crate::error::lock::lock;
use crate::net::memory_limit::{Member, MemoryLimit, Parked};
use crate::net::stream::{Direction, StreamError, silence, varint_of};

/// A peer counts as unresponsive when it acknowledges nothing for this long and for [`UNRESPONSIVE_ROUND_TRIPS`]: quinn
/// has probed it four times by then.
const UNRESPONSIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Round trips that the silence must last, on paths where they exceed [`UNRESPONSIVE_TIMEOUT`].
const UNRESPONSIVE_ROUND_TRIPS: u32 = 16;

/// Largest body in bytes that comes into reserved memory.
const RESERVED_BODY_LIMIT: u64 = 256 << 10;

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

impl FlowControl {
    /// Takes the minimum share for a connection; `None` when no memory is left.
    pub fn open(
        connection: Connection,
        key: KeyId,
        memory: &Arc<MemoryLimit>,
    ) -> Option<Arc<Self>> {
        let state = FlowControlState::new(memory.admit(key)?, connection.rtt());
        let flow_control = Arc::new(Self {
            connection,
            memory: memory.clone(),
            state: Mutex::new(state),
            freed: Notify::new(),
            active_work: AtomicUsize::new(0),
            started_work: AtomicUsize::new(0),
        });
        let member: Weak<dyn Member> = Arc::downgrade(&flow_control) as _;
        memory.register(member);
        Some(flow_control)
    }

    /// The connection.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Counts bytes as unflushed. Call it right after reading them, without an await in between: it takes back the
    /// credit that reading has granted before much more can arrive.
    pub fn add_unflushed(&self, bytes: usize) {
        let mut state = lock(&self.state);
        state.add(bytes, &self.memory, || self.connection.rtt());
        self.set_window(&mut state);
    }

    /// Counts the content of a small body as use of the share. Its reservation alone is none; a large body is counted as
    /// it is read.
    pub(crate) fn body_came(&self, bytes: u64) {
        if bytes <= RESERVED_BODY_LIMIT {
            lock(&self.state).small_body_came(bytes as usize);
        }
    }

    /// Prepares for the content of a file that this end has just asked for.
    pub(crate) fn expect_content(&self) {
        let mut state = lock(&self.state);
        state.expect_content(&self.memory);
        self.set_window(&mut state);
    }

    /// Takes the whole first share at once. For a client, which has one connection, chose its server, and may leave a
    /// listing unread while other streams go on.
    pub(crate) fn take_first_share(&self) {
        let mut state = lock(&self.state);
        state.take_first_share(&self.memory);
        self.set_window(&mut state);
    }

    /// Returns the credit of bytes that were written.
    pub fn release(&self, bytes: usize) {
        let mut state = lock(&self.state);
        if state.release(bytes) {
            self.set_window(&mut state);
        }
        drop(state);
        self.freed.notify_one();
    }

    /// Total time so far in which unflushed bytes took up much of the window.
    pub fn slow_writes(&self) -> Duration {
        lock(&self.state).slow_writes.total()
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
        let window = state.window();
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
        state.unflushed >= state.share.bytes() / 4
    }

    /// Reserves memory for the whole body of a small file. `None` when the body is too large for that on this
    /// connection. Waits while other small bodies use the memory. Cancelling takes nothing.
    pub async fn reserve(self: &Arc<Self>, bytes: usize) -> Option<Reservation> {
        loop {
            {
                let mut state = lock(&self.state);
                let reserved = state.reserve(bytes, &self.memory, || self.connection.rtt());
                self.set_window(&mut state);
                if reserved? {
                    return Some(Reservation {
                        flow: self.clone(),
                        bytes,
                    });
                }
            }
            self.freed.notified().await;
        }
    }

    fn set_window(&self, state: &mut FlowControlState) {
        self.connection
            .set_receive_window(varint(state.next_window()));
    }
}

impl std::fmt::Debug for FlowControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowControl")
            .field("connection", &self.connection.stable_id())
            .finish_non_exhaustive()
    }
}

impl Member for FlowControl {
    fn park_unused(&self) {
        // Whoever holds the lock uses the share now.
        let Ok(mut state) = self.state.try_lock() else {
            return;
        };
        state.park_unused();
    }

    fn parked(&self) -> Option<Parked> {
        let state = self.state.try_lock().ok()?;
        (state.share.parked() > 0).then(|| Parked {
            key: state.share.key(),
            idle: state.idle(),
        })
    }

    fn evict(&self) {
        tracing::info!("closed an idle connection: others need the memory");
        self.connection.close(
            varint_of(Code::Busy),
            b"the server needs the memory of this idle connection; connect again",
        );
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
        lock(&self.flow.state).unreserve(self.bytes);
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
