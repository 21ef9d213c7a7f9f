//! What a connection that sends needs now and then: memory for what is not yet acknowledged, a probe while nothing comes
//! back, and a way out for its close.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use quinn::Connection;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::congestion::Steering;
use crate::net::endpoint::FIRST_SEND_WINDOW;

/// Looked at twice a round trip, within these bounds: Startup doubles what is in flight each round trip.
const TICK_INTERVAL: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// What a connection may keep unacknowledged at any rate, in bytes. A thousand readers that acknowledge nothing take a
/// gigabyte at most; it carries 80 Mbit/s at 100 ms.
const MIN_SEND_WINDOW: usize = FIRST_SEND_WINDOW;
/// More than that follows the congestion window: what is in flight, as much that is written and not yet sent, and twice
/// that for Startup to grow into. More would only make progress run ahead of the receiver.
const WINDOWS: f64 = 4.0;
/// quinn frees what a stream has sent from its front only, so a packet that is lost again and again keeps all behind it:
/// for as many round trips as it takes until one in so many packets is through, and half as many again for the time that
/// each loss takes to be found. At 20 % loss, 4 windows carried 67 of 100 Mbit/s, and these carry 89.
const RARE: f64 = 1e-5;
const RARE_WINDOWS: f64 = 3.0;
/// Silence after which something is sent through a full window, and again after each such time. At 1 s a path that is back
/// is found within a second, where quinn's probes may be 38 s apart.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(1);
/// Round trips of silence that are no silence yet.
const SILENCE_ROUND_TRIPS: u32 = 4;

/// Memory that the connections of a process keep what is not yet acknowledged in, beyond [`MIN_SEND_WINDOW`] each.
#[derive(Debug)]
pub(crate) struct SendMemory(AtomicUsize);

impl SendMemory {
    pub(crate) fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(bytes)))
    }

    /// Changes what a lease has as far as there is memory.
    fn resize(&self, has: usize, wants: usize) -> usize {
        if wants <= has {
            self.0.fetch_add(has - wants, Relaxed);
            return wants;
        }
        let mut granted = 0;
        let _ = self.0.fetch_update(Relaxed, Relaxed, |free| {
            granted = free.min(wants - has);
            Some(free - granted)
        });
        has + granted
    }
}

/// Looks after a connection until it is dropped or the connection ends.
pub(crate) struct SendWindow {
    task: JoinHandle<()>,
    state: Arc<SendWindowState>,
}

struct SendWindowState {
    connection: Connection,
    memory: Arc<SendMemory>,
    leased: Mutex<usize>,
    most: usize,
}

impl SendWindow {
    /// Begins. At most `most` bytes are kept unacknowledged, of which what is above [`MIN_SEND_WINDOW`] comes from `memory`.
    pub(crate) fn begin(connection: Connection, memory: &Arc<SendMemory>, most: usize) -> Self {
        let state = Arc::new(SendWindowState {
            connection,
            memory: memory.clone(),
            leased: Mutex::new(0),
            most,
        });
        let task = tokio::spawn(state.clone().run());
        Self { task, state }
    }
}

impl Drop for SendWindow {
    fn drop(&mut self) {
        self.task.abort();
        if self.state.connection.close_reason().is_some() {
            self.state.let_close_out();
        }
    }
}

impl SendWindowState {
    async fn run(self: Arc<Self>) {
        let mut heard = SilenceDetector::new(&self.connection);
        loop {
            let tick = (self.connection.rtt() / 2).clamp(TICK_INTERVAL.0, TICK_INTERVAL.1);
            tokio::select! {
                _ = self.connection.closed() => return self.let_close_out(),
                () = sleep(tick) => {}
            }
            self.fit_memory();
            if heard.is_silent(&self.connection) {
                tracing::debug!("nothing comes back; probing");
                self.steer(Steering::probe);
            }
        }
    }

    fn fit_memory(&self) {
        let path = self.connection.stats().path;
        let loss = path.lost_packets as f64 / path.sent_packets.max(1) as f64;
        let wants = (windows(loss) * path.cwnd as f64) as usize;
        let wants = wants.min(self.most.saturating_sub(MIN_SEND_WINDOW));
        let mut leased = self.leased.lock().unwrap_or_else(PoisonError::into_inner);
        // Small changes are not worth waking the connection for.
        if wants.abs_diff(*leased) > (*leased / 8).max(MIN_SEND_WINDOW / 8) {
            *leased = self.memory.resize(*leased, wants);
            self.connection
                .set_send_window((MIN_SEND_WINDOW.min(self.most) + *leased) as u64);
        }
    }

    fn let_close_out(&self) {
        self.steer(Steering::close);
    }

    fn steer(&self, how: impl FnOnce(&Steering)) {
        if let Some(steering) = Steering::of(&self.connection) {
            how(&steering);
            // Setting what is set wakes the connection, and does nothing else.
            let leased = *self.leased.lock().unwrap_or_else(PoisonError::into_inner);
            self.connection
                .set_send_window((MIN_SEND_WINDOW.min(self.most) + leased) as u64);
        }
    }
}

impl Drop for SendWindowState {
    fn drop(&mut self) {
        let leased = self
            .leased
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        self.memory.resize(*leased, 0);
    }
}

/// How many congestion windows to keep at this loss.
fn windows(loss: f64) -> f64 {
    // Each round trip leaves the part `loss` of what was missing; the half bounds it where nothing is known yet.
    let round_trips = RARE.ln() / loss.clamp(RARE, 0.5).ln();
    (RARE_WINDOWS * round_trips).max(WINDOWS)
}

/// Whether what is sent is answered at all.
struct SilenceDetector {
    received: u64,
    sent: u64,
    since: Instant,
}

impl SilenceDetector {
    fn new(connection: &Connection) -> Self {
        let stats = connection.stats();
        Self {
            received: stats.udp_rx.datagrams,
            sent: stats.udp_tx.datagrams,
            since: Instant::now(),
        }
    }

    fn is_silent(&mut self, connection: &Connection) -> bool {
        let stats = connection.stats();
        let received = stats.udp_rx.datagrams;
        let sent = stats.udp_tx.datagrams;
        if received != self.received || sent == self.sent {
            // A connection that sends nothing waits for nothing.
            *self = Self {
                received,
                sent,
                since: Instant::now(),
            };
            return false;
        }
        let silent =
            self.since.elapsed() > SILENCE_TIMEOUT.max(connection.rtt() * SILENCE_ROUND_TRIPS);
        if silent {
            self.since = Instant::now();
        }
        silent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_granted_while_there_is_some_and_comes_back() {
        let memory = SendMemory::new(10);
        assert_eq!(memory.resize(0, 6), 6);
        assert_eq!(memory.resize(0, 6), 4);
        assert_eq!(memory.resize(4, 9), 4);
        assert_eq!(memory.resize(6, 1), 1);
        assert_eq!(memory.resize(4, 9), 9);
    }

    #[test]
    fn the_more_is_lost_the_more_is_kept() {
        assert_eq!(windows(0.0), WINDOWS);
        assert!(
            windows(0.01) > 7.0 && windows(0.2) > 20.0,
            "{} {}",
            windows(0.01),
            windows(0.2)
        );
        assert!(windows(1.0) < 50.0);
    }
}
