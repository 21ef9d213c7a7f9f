//! The server: accept loop, limits and graceful stop.

mod admission_control;
mod connection;
mod introduction;
mod rates;
mod report;
mod running;
mod slots;
mod state;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Endpoint, Incoming};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use tracing::{Instrument, debug, info, info_span, warn};

use crate::auth::Admission;
use crate::auth::identity::Identity;
use crate::config::Config;
use crate::error::{Code, Error, Result};
use crate::net::endpoint::{self, Port};
use crate::net::qlog;
use crate::net::stream::varint_of;
use crate::storage::Store;
use crate::transfer::blocking::blocking;
use crate::transfer::events::Observer;
use crate::transfer::session::OfferedContent;

use connection::{STOPPING, run_connection};
pub use introduction::Introduction;
use slots::HandshakeSlot;
use state::{ServerState, SharedLimits};

/// The parts and settings of a server.
pub struct ServerOptions {
    /// Addresses to listen on; port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
    /// The key and certificate of this server.
    pub identity: Identity,
    /// The rights of each client key.
    pub admission: Admission,
    /// The files that are served.
    pub store: Arc<dyn Store>,
    /// Limits and timeouts.
    pub config: Config,
    /// Receives the events of all sessions.
    pub observer: Observer,
}

/// A server that is bound to its addresses. It accepts connections once it runs.
pub struct Server {
    ports: Vec<Port>,
    state: Arc<ServerState>,
}

impl Server {
    /// Binds the addresses. It must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Io`] when an address cannot be bound, with the address; [`Error::Usage`] when no address is given.
    pub fn bind(options: ServerOptions) -> Result<Self> {
        Self::bind_with(options, None, None)
    }

    /// Binds the addresses of a server that offers content instead of its store. Receivers that want to prove that they know a
    /// code are passed to `introductions`; when that is full, they are refused.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub(crate) fn bind_offering(
        options: ServerOptions,
        offered: OfferedContent,
        introductions: mpsc::Sender<Introduction>,
    ) -> Result<Self> {
        Self::bind_with(options, Some(Arc::new(offered)), Some(introductions))
    }

    fn bind_with(
        options: ServerOptions,
        offered: Option<Arc<OfferedContent>>,
        introductions: Option<mpsc::Sender<Introduction>>,
    ) -> Result<Self> {
        let ServerOptions {
            listen,
            identity,
            admission,
            store,
            config,
            observer,
        } = options;
        if listen.is_empty() {
            return Err(Error::Usage(
                "cannot start a server: there is no address to listen on".into(),
            ));
        }
        if let Some(directory) = &config.qlog {
            qlog::prepare(directory)?;
        }
        let quic = endpoint::server_config(&identity, &config)?;
        let ports = listen
            .into_iter()
            .map(|address| Port::listening(address, &identity, quic.clone()));
        let ports = ports.collect::<Result<_>>()?;
        let state = Arc::new(ServerState {
            admission,
            store,
            offered,
            introductions,
            quic,
            observer,
            limits: SharedLimits::new(&config),
            config: Arc::new(config),
            file_locks: Arc::default(),
            pushes: Arc::default(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        Ok(Self { ports, state })
    }

    /// Returns the addresses that the server listens on, with the ports that the system chose.
    pub fn local_addresses(&self) -> Vec<SocketAddr> {
        self.ports
            .iter()
            .filter_map(|port| port.endpoint.local_addr().ok())
            .collect()
    }

    /// Returns the UDP ports that the server listens on.
    pub fn ports(&self) -> &[Port] {
        &self.ports
    }

    /// Serves until `stop` is ready. Then it refuses new transfers, waits up to [`Config::grace`] for running ones, and keeps
    /// partials of the rest. `now` ends that wait at once.
    ///
    /// Dropping the future closes all connections at once. Committed files are not lost.
    pub async fn run(self, stop: impl Future<Output = ()>, now: impl Future<Output = ()>) {
        let state = &self.state;
        let endpoints: Vec<_> = self
            .ports
            .iter()
            .map(|port| port.endpoint.clone())
            .collect();
        let _close_on_drop = CloseOnDrop(&endpoints);
        for port in &self.ports {
            state.tasks.spawn(accept(port.clone(), state.clone()));
        }
        let sweeper = tokio::spawn(sweep(state.store.clone(), state.config.keep_partials));
        let reporter = AbortOnDropHandle::new(tokio::spawn(report::run(state.clone())));
        stop.await;
        sweeper.abort();
        info!("stopping: refusing new transfers, waiting for running ones");
        state.stopping.cancel();
        for endpoint in &endpoints {
            endpoint.set_server_config(None);
        }
        state.tasks.close();
        tokio::select! {
            () = state.tasks.wait() => {}
            () = now => info!("stopping at once"),
            () = sleep(state.config.grace) => info!("the grace period is over; partials are kept for resume"),
        }
        close(&endpoints);
        drop(reporter);
        report::report(&state.limits.rates);
        // Waits until the CONNECTION_CLOSE frames were sent. The timeout covers peers that do not answer.
        for endpoint in &endpoints {
            let _ = timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
        }
    }
}

fn close(endpoints: &[Endpoint]) {
    for endpoint in endpoints {
        endpoint.close(varint_of(Code::Stopping), STOPPING);
    }
}

/// Closes the endpoints when the server's future is dropped. Without it, the connections would go on, because they are
/// tasks of their own.
struct CloseOnDrop<'a>(&'a [Endpoint]);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        close(self.0);
    }
}

/// How long a stopping server waits until its last packets were sent.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// The bounds of the time between two searches for stale partials. Within them, the time is the age at which partials are
/// stale. A search reads all directories, so it must not run often.
const MIN_SWEEP_INTERVAL: Duration = Duration::from_secs(600);
const MAX_SWEEP_INTERVAL: Duration = Duration::from_secs(24 * 3600);

async fn sweep(store: Arc<dyn Store>, age: Duration) {
    let mut interval = tokio::time::interval(age.clamp(MIN_SWEEP_INTERVAL, MAX_SWEEP_INTERVAL));
    loop {
        interval.tick().await;
        let store = store.clone();
        match blocking("remove stale partials", move || store.sweep(age)).await {
            Ok(0) => {}
            Ok(removed) => info!(removed, "removed stale partials"),
            Err(why) => warn!(%why, "cannot remove stale partials"),
        }
    }
}

async fn accept(port: Port, state: Arc<ServerState>) {
    loop {
        let incoming = tokio::select! {
            incoming = port.endpoint.accept() => incoming,
            () = state.stopping.cancelled() => return,
        };
        let Some(incoming) = incoming else { return };
        let Some((incoming, slot)) = begin_handshake(incoming, &port, &state.limits) else {
            continue;
        };
        let span = info_span!("connection", from = %incoming.remote_address());
        state
            .tasks
            .spawn(run_connection(incoming, state.clone(), slot).instrument(span));
    }
}

/// Decides whether a handshake begins; see [`admission_control`].
fn begin_handshake(
    incoming: Incoming,
    port: &Port,
    limits: &SharedLimits,
) -> Option<(Incoming, HandshakeSlot)> {
    let address = incoming.remote_address();
    let validated = incoming.remote_address_validated();
    // Only validated addresses count for the rate before they have a slot, or forged ones would use up the rate of others.
    if validated && !limits.rates.may_connect(address.ip()) {
        debug!(from = %address, "too many connections in a short time; the client will ask again");
        // Cheaper than a refusal, and an honest client repeats its datagram.
        incoming.ignore();
        return None;
    }
    let slot = limits.handshakes.begin(address.ip(), validated);
    let slot = match validated {
        true => slot,
        false => slot
            .filter(|_| limits.rates.may_connect(address.ip()))
            .and_then(|slot| Some(slot.limit(port.limit(address)?))),
    };
    match slot {
        Some(slot) => Some((incoming, slot)),
        None => {
            // Cannot fail, because a validated client always has a slot.
            let _ = incoming.retry();
            None
        }
    }
}
