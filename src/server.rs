//! The server: accept loop, limits and graceful stop.
//!
//! The file is longer than 400 lines because a connection is readable here from handshake to end.

mod running;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Endpoint, Incoming};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, debug, info, info_span, warn};

use crate::auth::identity::Identity;
use crate::auth::{Admission, Rights};
use crate::bench::{self, MeasurementPermits};
use crate::config::Config;
use crate::error::{Code, Error, Result};
use crate::net::endpoint::{self, Port};
use crate::net::flow_control::FlowControl;
use crate::net::memory_limit::MemoryLimit;
use crate::net::qlog;
use crate::net::rate_limit::{RateLimits, TokenBucket};
use crate::net::send_window::{SendMemory, SendWindow};
use crate::net::stream::{MessageReader, MessageStream, MessageWriter, lost_connection, varint_of};
use crate::storage::Store;
use crate::storage::open_files::limit_to_open_files;
use crate::transfer::blocking::blocking;
use crate::transfer::events::Observer;
use crate::transfer::receive::{FileLocks, Keep, Permits, Receiver, Receiving, RequestedNames};
use crate::transfer::session::{
    MakeReceiver, OfferedContent, Opened, ServerSession, Sessions, accept_streams, listings, serve,
};

use running::Running;

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
    shared: Arc<ServerState>,
}

/// A client that wants to prove that it knows a code.
pub struct Introduction {
    /// The client's connection. It lasts as long as the streams.
    pub connection: Connection,
    /// The client's messages.
    pub reader: MessageReader,
    /// The answers to the client.
    pub writer: MessageWriter,
}

/// State that all connections share.
struct ServerState {
    admission: Admission,
    store: Arc<dyn Store>,
    offered: Option<Arc<OfferedContent>>,
    introductions: Option<mpsc::Sender<Introduction>>,
    quic: quinn::ServerConfig,
    config: Config,
    observer: Observer,
    /// Limits the transfers that write at the same time, over all connections.
    permits: Arc<Semaphore>,
    /// Limits the connections.
    connections: Arc<Semaphore>,
    memory: Arc<MemoryLimit>,
    send_memory: Arc<SendMemory>,
    /// Limits the measurements.
    measurements: Arc<Semaphore>,
    /// Limits the listings.
    listings: Arc<Semaphore>,
    /// The rate limit of all bytes sent, over all connections.
    limit: Option<Arc<TokenBucket>>,
    file_locks: Arc<FileLocks>,
    pushes: Arc<FileLocks<[u8; 16]>>,
    /// Cancelled when the server stops and refuses new work.
    stopping: CancellationToken,
    tasks: TaskTracker,
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
        let permits = limit_to_open_files(config.max_transfers);
        if permits < config.max_transfers {
            warn!(
                permits,
                wanted = config.max_transfers,
                "fewer transfers at the same time: the limit of open files (RLIMIT_NOFILE) is low"
            );
        }
        let shared = Arc::new(ServerState {
            admission,
            store,
            offered,
            introductions,
            quic,
            permits: Arc::new(Semaphore::new(permits)),
            connections: Arc::new(Semaphore::new(config.max_connections)),
            memory: MemoryLimit::new(config.memory),
            send_memory: SendMemory::new(config.send_memory),
            measurements: MeasurementPermits::of_server(),
            listings: listings(),
            limit: config.limit.map(|rate| Arc::new(TokenBucket::new(rate))),
            file_locks: Arc::default(),
            pushes: Arc::default(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
            config,
            observer,
        });
        Ok(Self { ports, shared })
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
        let shared = &self.shared;
        let endpoints: Vec<_> = self
            .ports
            .iter()
            .map(|port| port.endpoint.clone())
            .collect();
        let _close_on_drop = CloseOnDrop(&endpoints);
        for endpoint in &endpoints {
            shared.tasks.spawn(accept(endpoint.clone(), shared.clone()));
        }
        let sweeper = tokio::spawn(sweep(shared.store.clone(), shared.config.keep_partials));
        stop.await;
        sweeper.abort();
        info!("stopping: refusing new transfers, waiting for running ones");
        shared.stopping.cancel();
        for endpoint in &endpoints {
            endpoint.set_server_config(None);
        }
        shared.tasks.close();
        tokio::select! {
            () = shared.tasks.wait() => {}
            () = now => info!("stopping at once"),
            () = sleep(shared.config.grace) => info!("the grace period is over; partials are kept for resume"),
        }
        close(&endpoints);
        // Waits until the CONNECTION_CLOSE frames were sent. The timeout covers peers that do not answer.
        for endpoint in &endpoints {
            let _ = timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
        }
    }
}

const STOPPING: &[u8] = b"the server is stopping";

fn close(endpoints: &[Endpoint]) {
    for endpoint in endpoints {
        endpoint.close(varint_of(Code::Stopping), STOPPING);
    }
}

fn stop(connection: &Connection) {
    connection.close(varint_of(Code::Stopping), STOPPING);
}

/// Closes the endpoints when the server's future is dropped. Without it, the connections would go on, because they are
/// tasks of their own.
struct CloseOnDrop<'a>(&'a [Endpoint]);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        close(self.0);
    }
}

/// The most sessions at the same time on one connection. A push and a pull at once are two. Each may hold 1 MiB of
/// unanswered entries, which takes several times that in memory.
const MAX_SESSIONS: usize = 8;

/// How long a stopping server waits until its last packets were sent.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// The bounds of the time between two searches for stale partials. Within them, the time is the age at which partials are
/// stale. A search reads all directories, so it must not run often.
const SWEEP_INTERVAL: (Duration, Duration) =
    (Duration::from_secs(600), Duration::from_secs(24 * 3600));

async fn sweep(store: Arc<dyn Store>, age: Duration) {
    let mut interval = tokio::time::interval(age.clamp(SWEEP_INTERVAL.0, SWEEP_INTERVAL.1));
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

async fn accept(endpoint: Endpoint, shared: Arc<ServerState>) {
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            () = shared.stopping.cancelled() => return,
        };
        let Some(incoming) = incoming else { return };
        // Above half of the limit, clients must prove their address with a Retry packet, because an attacker may be using
        // forged addresses (RFC 9000, section 8.1.2).
        let crowded = shared.connections.available_permits() < shared.config.max_connections / 2;
        if crowded && !incoming.remote_address_validated() && incoming.may_retry() {
            // Cannot fail, because `may_retry` was checked.
            let _ = incoming.retry();
            continue;
        }
        let Ok(place) = shared.connections.clone().try_acquire_owned() else {
            debug!(from = %incoming.remote_address(), "refused: too many connections");
            incoming.refuse();
            continue;
        };
        let span = info_span!("connection", from = %incoming.remote_address());
        shared
            .tasks
            .spawn(connection(incoming, shared.clone(), place).instrument(span));
    }
}

/// Returns the configuration of one connection with a qlog trace. Creating the file blocks, so it runs on a blocking thread.
async fn traced(shared: Arc<ServerState>) -> Arc<quinn::ServerConfig> {
    let plain = Arc::new(shared.quic.clone());
    let trace = move || endpoint::with_qlog(&shared.quic, &shared.config);
    blocking("trace a connection", trace).await.unwrap_or(plain)
}

/// Runs a connection from handshake to end. The permit counts it among the connections, and is released at the end.
async fn connection(incoming: Incoming, shared: Arc<ServerState>, _place: OwnedSemaphorePermit) {
    let handshake = shared.config.handshake;
    let tracing = shared.clone();
    let mut connecting = Box::pin(timeout(handshake, async move {
        match &tracing.config.qlog {
            Some(_) => incoming.accept_with(traced(tracing).await)?.await,
            None => incoming.await,
        }
    }));
    let connected = tokio::select! {
        connected = &mut connecting => connected,
        // The server accepts nothing new, and does not wait for this client, which may be gone. A task finishes the
        // handshake, because dropping it would close the connection without a reason, and the client may already think that
        // it is connected.
        () = shared.stopping.cancelled() => {
            tokio::spawn(async move {
                if let Ok(Ok(connection)) = connecting.await {
                    stop(&connection);
                }
            });
            return;
        }
    };
    let connection = match connected {
        Ok(Ok(connection)) => connection,
        Ok(Err(lost)) => return debug!(why = %lost_connection(&lost), "the handshake failed"),
        Err(_) => return debug!("the handshake took too long"),
    };
    let Some((key_id, chain)) = endpoint::peer(&connection) else {
        return connection.close(varint_of(Code::NotAdmitted), b"a certificate is needed");
    };
    // authorized_keys is read for each connection, which blocks.
    let deciding = shared.clone();
    let decide = move || deciding.admission.rights_of(&chain);
    let rights = match blocking("look up a key", decide).await {
        Ok(rights) => rights,
        Err(why) => {
            info!(%key_id, %why, "not admitted");
            connection.close(varint_of(why.code), why.text.raw().as_bytes());
            connection.closed().await;
            return;
        }
    };
    info!(%key_id, name = rights.name.as_deref().unwrap_or("-"), "connected");
    let Some(window) = FlowControl::open(connection.clone(), &shared.memory) else {
        return connection.close(
            varint_of(Code::Busy),
            b"the server has no memory for another connection",
        );
    };
    let _send_window = SendWindow::start(
        connection.clone(),
        &shared.send_memory,
        shared.config.limited_send_window(),
    );
    let lost = serve_connection(connection, window, shared, key_id.0, rights).await;
    match lost {
        quinn::ConnectionError::ApplicationClosed(close)
            if close.error_code == varint_of(Code::Done) =>
        {
            info!(%key_id, "disconnected");
        }
        lost => info!(%key_id, why = %lost_connection(&lost), "disconnected"),
    }
}

/// Serves the sessions of a connection until the client closes it, it is lost, or it was idle for too long.
async fn serve_connection(
    connection: Connection,
    window: Arc<FlowControl>,
    shared: Arc<ServerState>,
    owner: [u8; 32],
    rights: Rights,
) -> quinn::ConnectionError {
    let sessions = Sessions::of_server();
    let permits = Arc::new(Permits::new(shared.permits.clone()));
    let running = Arc::new(Running::default());
    let session = Arc::new(ServerSession {
        connection: connection.clone(),
        sessions: sessions.clone(),
        store: shared.store.clone(),
        offered: shared.offered.clone(),
        owner,
        pushes: shared.pushes.clone(),
        may_read: rights.read,
        may_write: rights.write,
        config: shared.config.clone(),
        listings: shared.listings.clone(),
        limit: shared.limit.clone(),
        observer: shared.observer.clone(),
        stopping: shared.stopping.clone(),
        receiver: receivers(&shared, (owner, rights.read), permits, window.clone()),
    });
    let places = Arc::new(MeasurementPermits::of_connection(
        shared.measurements.clone(),
    ));
    let opened = {
        let session = session;
        let running = running.clone();
        let connection = connection.clone();
        let window = window.clone();
        let shared = shared.clone();
        // The streams are accepted in tasks that do not inherit the connection's span.
        let span = tracing::Span::current();
        move |what, stream: MessageStream| {
            let others = running.begin();
            let session = session.clone();
            let running = running.clone();
            let connection = connection.clone();
            let window = window.clone();
            let places = places.clone();
            let shared = shared.clone();
            let tasks = shared.tasks.clone();
            let handle = match what {
                Opened::Session => Some(stream.id()),
                Opened::Measurement | Opened::Introduction => None,
            };
            let serve = async move {
                let result = match what {
                    Opened::Session => serve(&session, stream, others < MAX_SESSIONS).await,
                    Opened::Introduction => {
                        introduce(&shared, connection.clone(), stream).await;
                        Ok(())
                    }
                    Opened::Measurement if !session.may_read && !session.may_write => {
                        stream.reject(Code::NotAllowed);
                        Ok(())
                    }
                    Opened::Measurement => {
                        let limits = RateLimits::new(session.limit.clone());
                        let config = &session.config;
                        let stopping = &session.stopping;
                        bench::serve(&window, &places, stream, config, &limits, stopping).await
                    }
                };
                running.end();
                match result {
                    Ok(()) => {}
                    Err(Error::Protocol(why)) => {
                        warn!(%why, "closed: the peer broke the protocol");
                        connection.close(varint_of(Code::Protocol), why.raw().as_bytes());
                    }
                    Err(error) => info!(%error, "session ended"),
                }
            };
            tasks.spawn(serve.instrument(info_span!(parent: &span, "session", handle)));
        }
    };
    let streams = accept_streams(&window, &sessions, shared.config.deadline, opened);
    tokio::pin!(streams);
    loop {
        tokio::select! {
            lost = &mut streams => return lost,
            // A connection without a session holds a permit that other clients may need.
            () = running.idle_for(shared.config.deadline) => {
                connection.close(varint_of(Code::TimedOut), b"no session was running");
            }
            // Running sessions tell their clients themselves. The client closes once it has its summary.
            () = async {
                shared.stopping.cancelled().await;
                running.idle_for(Duration::ZERO).await;
            } => {
                stop(&connection);
            }
            () = async {
                shared.stopping.cancelled().await;
                window.unresponsive().await;
            } => {
                debug!("no reply from the client while the server is stopping");
                connection.close(varint_of(Code::TimedOut), b"no reply while the server was stopping");
            }
        }
    }
}

/// Passes a client to the task that checks codes, and waits until that task is done with it.
async fn introduce(shared: &ServerState, connection: Connection, stream: MessageStream) {
    let Some(introductions) = &shared.introductions else {
        return stream.reject(Code::Unsupported);
    };
    let MessageStream { reader, writer } = stream;
    let done = writer.delivered();
    match introductions.try_send(Introduction {
        connection,
        reader,
        writer,
    }) {
        Ok(()) => done.await,
        Err(full) => {
            let Introduction { reader, writer, .. } = full.into_inner();
            MessageStream { reader, writer }.reject(Code::Busy);
        }
    }
}

/// Returns the function that makes the receiver of a session on this connection.
fn receivers(
    shared: &Arc<ServerState>,
    (owner, may_read): ([u8; 32], bool),
    permits: Arc<Permits>,
    window: Arc<FlowControl>,
) -> MakeReceiver {
    let shared = shared.clone();
    Box::new(move |push, place, spared| {
        Receiver::new(Receiving {
            store: shared.store.clone(),
            place,
            asked: RequestedNames::Any,
            most: None,
            take: push.take.unwrap_or_default(),
            spared,
            keep: Keep {
                owner: shared.config.allow_owner,
                xattrs: true,
                ..Keep::default()
            },
            owner,
            durability: push.durability,
            // The sender knows this option of its user, and applies it itself.
            fail_specials: false,
            permits: permits.clone(),
            window: window.clone(),
            // A key without the right to read gets no dedupe, because its timing would reveal which content exists.
            index: shared
                .config
                .index
                .clone()
                .filter(|_| may_read && !push.take.unwrap_or_default().no_dedupe),
            claims: shared.file_locks.clone(),
            session: push.session,
            config: shared.config.clone(),
            ledger: Arc::default(),
            observer: shared.observer.clone(),
            stopping: shared.stopping.clone(),
        })
    })
}
