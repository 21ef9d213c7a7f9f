//! The upkeep of a sending connection: its send window, probes while the peer is silent, and a way out for its close.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use quinn::Connection;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::congestion::Steering;
use crate::error::lock::lock;
use crate::net::endpoint::INITIAL_SEND_WINDOW;

/// Bounds of the interval at which the window is adjusted, which is half a round trip: Startup doubles the bytes in
/// flight each round trip.
const MIN_TICK_INTERVAL: Duration = Duration::from_millis(10);
const MAX_TICK_INTERVAL: Duration = Duration::from_millis(250);
/// Unacknowledged bytes that every connection may keep. A thousand readers that acknowledge nothing take a gigabyte
/// at most; it carries 80 Mbit/s at 100 ms.
const MIN_SEND_WINDOW: usize = INITIAL_SEND_WINDOW;
/// Send window in congestion windows: the bytes in flight, as many written and not yet sent, and twice that for
/// Startup to grow into. More would only make progress run ahead of the receiver.
const WINDOWS: f64 = 4.0;
/// Probability that a packet is still missing when the window may end. quinn frees sent data only from the front of a
/// stream, so a packet that is lost again and again keeps all data behind it, for the round trips until it arrives.
/// Half as many again cover the time to detect each loss. At 20 % loss, 4 windows carried 67 of 100 Mbit/s, and these
/// carry 89.
const MISSING_PROBABILITY: f64 = 1e-5;
/// Congestion windows for each round trip that a missing packet takes.
const WINDOWS_FOR_EACH_LOSS: f64 = 3.0;
/// Silence after which a probe is sent through a full window, and the interval of further ones. A recovered path is
/// found within a second, where quinn's probes may be 38 s apart.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(1);
/// Round trips that a silence must last, on paths where they exceed [`SILENCE_TIMEOUT`].
const SILENCE_ROUND_TRIPS: u32 = 4;

/// Memory of a process for unacknowledged bytes, beyond [`MIN_SEND_WINDOW`] for each connection.
#[derive(Debug)]
pub(crate) struct SendMemory(AtomicUsize);

impl SendMemory {
    pub(crate) fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(bytes)))
    }

    /// Resizes a lease as far as memory is left; returns the new size.
    fn resize(&self, leased: usize, wanted: usize) -> usize {
        if wanted <= leased {
            self.0.fetch_add(leased - wanted, Relaxed);
            return wanted;
        }
        let mut granted = 0;
        let _ = self.0.fetch_update(Relaxed, Relaxed, |free| {
            granted = free.min(wanted - leased);
            Some(free - granted)
        });
        leased + granted
    }
}

/// Maintains a connection until this is dropped or the connection ends.
pub(crate) struct SendWindow {
    task: JoinHandle<()>,
    /// The task's. It ends with the connection, so that others get the memory, even while this value is held.
    state: Weak<SendWindowState>,
}

struct SendWindowState {
    connection: Connection,
    memory: Arc<SendMemory>,
    leased: Mutex<usize>,
    limit: usize,
}

impl SendWindow {
    /// Starts the task. At most `limit` bytes are kept unacknowledged; those above [`MIN_SEND_WINDOW`] come from
    /// `memory`.
    pub(crate) fn start(connection: Connection, memory: &Arc<SendMemory>, limit: usize) -> Self {
        let state = Arc::new(SendWindowState {
            connection,
            memory: memory.clone(),
            leased: Mutex::new(0),
            limit,
        });
        Self {
            state: Arc::downgrade(&state),
            task: tokio::spawn(state.run()),
        }
    }
}

impl Drop for SendWindow {
    fn drop(&mut self) {
        let state = self.state.upgrade();
        self.task.abort();
        if let Some(state) = state
            && state.connection.close_reason().is_some()
        {
            state.let_close_through();
        }
    }
}

impl SendWindowState {
    async fn run(self: Arc<Self>) {
        let mut silence = SilenceDetector::new(&self.connection);
        loop {
            let tick = (self.connection.rtt() / 2).clamp(MIN_TICK_INTERVAL, MAX_TICK_INTERVAL);
            tokio::select! {
                _ = self.connection.closed() => return self.let_close_through(),
                () = sleep(tick) => {}
            }
            self.fit_memory();
            if silence.is_silent(&self.connection) {
                tracing::debug!("the peer is silent; probing");
                self.steer(Steering::probe);
            }
        }
    }

    fn fit_memory(&self) {
        let path = self.connection.stats().path;
        let loss = path.lost_packets as f64 / path.sent_packets.max(1) as f64;
        let wanted = (windows(loss) * path.cwnd as f64) as usize;
        let wanted = wanted.min(self.limit.saturating_sub(MIN_SEND_WINDOW));
        let mut leased = lock(&self.leased);
        // Small changes do not justify waking the connection.
        if wanted.abs_diff(*leased) > (*leased / 8).max(MIN_SEND_WINDOW / 8) {
            *leased = self.memory.resize(*leased, wanted);
            self.connection
                .set_send_window((MIN_SEND_WINDOW.min(self.limit) + *leased) as u64);
        }
    }

    fn let_close_through(&self) {
        self.steer(Steering::close);
    }

    fn steer(&self, action: impl FnOnce(&Steering)) {
        if let Some(steering) = Steering::of(&self.connection) {
            action(&steering);
            // Setting the same window again only wakes the connection.
            let leased = *lock(&self.leased);
            self.connection
                .set_send_window((MIN_SEND_WINDOW.min(self.limit) + leased) as u64);
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

/// Congestion windows to keep at this loss.
fn windows(loss: f64) -> f64 {
    // Each round trip leaves the fraction `loss` of the missing packets; 0.5 bounds the estimate while little is
    // known.
    let round_trips = MISSING_PROBABILITY.ln() / loss.clamp(MISSING_PROBABILITY, 0.5).ln();
    (WINDOWS_FOR_EACH_LOSS * round_trips).max(WINDOWS)
}

/// Detects that nothing comes back although packets were sent.
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
            // A connection that sends nothing expects nothing.
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
    use std::net::{Ipv4Addr, SocketAddr};

    use super::*;
    use crate::auth::identity::Identity;
    use crate::auth::trust::trust_any_key;
    use crate::config::Config;
    use crate::net::connect::connect_relay;
    use crate::net::endpoint::relay_server_config;

    #[tokio::test]
    async fn a_closed_connection_keeps_no_send_memory() {
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let config = Config::default();
        let server = relay_server_config(&Identity::generate().unwrap(), &config).unwrap();
        let server = quinn::Endpoint::server(server, loopback).unwrap();
        let port = server.local_addr().unwrap().port();
        let accepted = tokio::spawn(async move { server.accept().await.unwrap().await });
        let endpoint = quinn::Endpoint::client(loopback).unwrap();
        let trust = trust_any_key(None);
        let connected = connect_relay(&endpoint, &trust, "127.0.0.1", port, &config).await;
        let connection = connected.unwrap();
        let window = SendWindow::start(connection.clone(), &SendMemory::new(1 << 20), 1 << 20);
        assert_eq!(window.state.strong_count(), 1);
        connection.close(0_u8.into(), b"");
        let returned = async {
            while window.state.strong_count() > 0 {
                tokio::task::yield_now().await;
            }
        };
        let returned = tokio::time::timeout(Duration::from_secs(60), returned).await;
        returned.expect("the window holds the memory");
        accepted.abort();
    }

    #[test]
    fn memory_is_leased_while_it_lasts_and_returned() {
        let memory = SendMemory::new(10);
        assert_eq!(memory.resize(0, 6), 6);
        assert_eq!(memory.resize(0, 6), 4);
        assert_eq!(memory.resize(4, 9), 4);
        assert_eq!(memory.resize(6, 1), 1);
        assert_eq!(memory.resize(4, 9), 9);
    }

    #[test]
    fn more_loss_needs_more_windows() {
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
