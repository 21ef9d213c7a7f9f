//! The server: accept loop, limits, graceful stop.

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
use crate::net::stream::{MessageReader, MessageWriter, lost_connection, varint_of};
use crate::storage::Store;
use crate::storage::open_files::limit_to_open_files;
use crate::transfer::events::Observer;
use crate::transfer::receive::{FileLocks, Keep, Permits, Receiver, Receiving, RequestedNames};
use crate::transfer::session::{
    MakeReceiver, OfferedContent, Opened, ServerSession, Sessions, accept_streams, listings, serve,
};

use running::Running;

/// What a server needs to begin.
pub struct ServerOptions {
    /// Addresses to listen on; port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
    /// Who this server is.
    pub identity: Identity,
    /// Who may do what.
    pub admission: Admission,
    /// What is served.
    pub store: Arc<dyn Store>,
    /// Limits and deadlines.
    pub config: Config,
    /// Takes the events of all sessions.
    pub observer: Observer,
}

/// A server that is bound to its addresses, and takes connections once it runs.
pub struct Server {
    ports: Vec<Port>,
    shared: Arc<ServerState>,
}

/// Somebody who wants to show that it knows a code.
pub struct Introduction {
    /// The connection, which lasts for as long as the streams do.
    pub connection: Connection,
    /// What it has to say.
    pub reader: MessageReader,
    /// For the answers.
    pub writer: MessageWriter,
}

/// What all connections share.
struct ServerState {
    admission: Admission,
    store: Arc<dyn Store>,
    offered: Option<Arc<OfferedContent>>,
    introductions: Option<mpsc::Sender<Introduction>>,
    quic: quinn::ServerConfig,
    config: Config,
    observer: Observer,
    /// The one semaphore that bounds the transfers which write at the same time.
    permits: Arc<Semaphore>,
    /// Bounds the connections.
    connections: Arc<Semaphore>,
    budget: Arc<MemoryLimit>,
    send_memory: Arc<SendMemory>,
    /// Bounds the streams of measurements.
    measurements: Arc<Semaphore>,
    /// Bounds the listings.
    listings: Arc<Semaphore>,
    /// The limit of what all connections send.
    limit: Option<Arc<TokenBucket>>,
    claims: Arc<FileLocks>,
    pushes: Arc<FileLocks<[u8; 16]>>,
    /// Nothing new from here on.
    stopping: CancellationToken,
    tasks: TaskTracker,
}

impl Server {
    /// Binds the addresses. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Io`] when an address cannot be had, naming it; [`Error::Usage`] when there is none.
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
                "a server needs an address to listen on".into(),
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
                "fewer transfers at a time: the system allows few open files"
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
            budget: MemoryLimit::new(config.memory),
            send_memory: SendMemory::new(config.send_memory),
            measurements: MeasurementPermits::of_server(),
            listings: listings(),
            limit: config.limit.map(|rate| Arc::new(TokenBucket::new(rate))),
            claims: Arc::default(),
            pushes: Arc::default(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
            config,
            observer,
        });
        Ok(Self { ports, shared })
    }

    /// The addresses it listens on, with the ports that the system gave.
    pub fn local_addresses(&self) -> Vec<SocketAddr> {
        self.ports
            .iter()
            .filter_map(|port| port.endpoint.local_addr().ok())
            .collect()
    }

    /// The UDP ports that it listens on.
    pub fn ports(&self) -> &[Port] {
        &self.ports
    }

    /// Serves until `stop` is done; then takes no new transfers, lets those under way end within
    /// [`Config::grace`], and keeps partials of the rest. `now`, once done, ends that wait at once.
    ///
    /// Dropping the future stops without grace; nothing that was committed is lost by it.
    pub async fn run(self, stop: impl Future<Output = ()>, now: impl Future<Output = ()>) {
        let shared = &self.shared;
        let endpoints: Vec<_> = self
            .ports
            .iter()
            .map(|port| port.endpoint.clone())
            .collect();
        let _closes = CloseOnDrop(&endpoints);
        for endpoint in &endpoints {
            shared.tasks.spawn(accept(endpoint.clone(), shared.clone()));
        }
        let sweeping = tokio::spawn(sweep(shared.store.clone(), shared.config.keep_partials));
        stop.await;
        sweeping.abort();
        info!("stopping: no new transfers, those under way may end");
        shared.stopping.cancel();
        for endpoint in &endpoints {
            endpoint.set_server_config(None);
        }
        shared.tasks.close();
        tokio::select! {
            () = shared.tasks.wait() => {}
            () = now => info!("stopping at once"),
            () = sleep(shared.config.grace) => info!("the time is up; partials stay for resume"),
        }
        close(&endpoints);
        // The goodbyes go out; a peer that is gone does not keep us.
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

/// A server whose future is dropped goes on no further: its connections are tasks of their own.
struct CloseOnDrop<'a>(&'a [Endpoint]);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        close(self.0);
    }
}

/// Sessions at the same time on one connection. A push and a pull at once are two; each may hold a mebibyte of entries
/// unanswered, several times that in memory.
const MAX_SESSIONS: usize = 8;

/// How long a stopping server waits for its last packets to go out.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// How often stale partials are looked for: as often as they may grow old, within these bounds, as it reads all directories.
const SWEEP_INTERVAL: (Duration, Duration) =
    (Duration::from_secs(600), Duration::from_secs(24 * 3600));

async fn sweep(store: Arc<dyn Store>, age: Duration) {
    let mut turn = tokio::time::interval(age.clamp(SWEEP_INTERVAL.0, SWEEP_INTERVAL.1));
    loop {
        turn.tick().await;
        let store = store.clone();
        match tokio::task::spawn_blocking(move || store.sweep(age)).await {
            Ok(Ok(0)) => {}
            Ok(Ok(removed)) => info!(removed, "stale partials swept"),
            Ok(Err(why)) => warn!(%why, "stale partials could not be swept"),
            Err(_) => return,
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
        // Half full is where somebody may be filling it with addresses that are not his (RFC 9000, section 8.1.2).
        let crowded = shared.connections.available_permits() < shared.config.max_connections / 2;
        if crowded && !incoming.remote_address_validated() && incoming.may_retry() {
            // Fails only for what may not be retried.
            let _ = incoming.retry();
            continue;
        }
        let Ok(place) = shared.connections.clone().try_acquire_owned() else {
            debug!(from = %incoming.remote_address(), "refused: full");
            incoming.refuse();
            continue;
        };
        let span = info_span!("connection", from = %incoming.remote_address());
        shared
            .tasks
            .spawn(connection(incoming, shared.clone(), place).instrument(span));
    }
}

/// The configuration of one connection that is traced. Making its file blocks.
async fn traced(shared: Arc<ServerState>) -> Arc<quinn::ServerConfig> {
    let plain = Arc::new(shared.quic.clone());
    let traced =
        tokio::task::spawn_blocking(move || endpoint::with_qlog(&shared.quic, &shared.config))
            .await;
    traced.ok().and_then(Result::ok).unwrap_or(plain)
}

/// A connection from handshake to end. It takes its place among the connections with it.
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
        // Nothing new from here on; and it may be somebody who is gone, who is not waited for. Dropped, it would be closed
        // without a reason, while its client may think already that it is connected.
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
        Ok(Err(lost)) => return debug!(why = %lost_connection(&lost), "no handshake"),
        Err(_) => return debug!("the handshake took too long"),
    };
    let Some((key_id, chain)) = endpoint::peer(&connection) else {
        return connection.close(varint_of(Code::NotAdmitted), b"a certificate is needed");
    };
    // The file of authorized keys is read anew each time; that blocks.
    let deciding = shared.clone();
    let decided = tokio::task::spawn_blocking(move || deciding.admission.rights_of(&chain)).await;
    let rights = match decided.unwrap_or_else(|_| Err(Code::Internal.into())) {
        Ok(rights) => rights,
        Err(why) => {
            info!(%key_id, %why, "not admitted");
            connection.close(varint_of(why.code), why.text.raw().as_bytes());
            connection.closed().await;
            return;
        }
    };
    info!(%key_id, name = rights.name.as_deref().unwrap_or("-"), "connected");
    let Some(window) = FlowControl::open(connection.clone(), &shared.budget) else {
        return connection.close(
            varint_of(Code::Busy),
            b"the server has no memory left for another connection",
        );
    };
    let _upkeep = SendWindow::start(
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

/// Serves the sessions of a connection until it ends: by the client, by loss, or because it has been idle.
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
        // The streams are accepted in tasks that stand outside of the connection's span.
        let span = tracing::Span::current();
        move |what, bi| {
            let others = running.begin();
            let session = session.clone();
            let running = running.clone();
            let connection = connection.clone();
            let window = window.clone();
            let places = places.clone();
            let shared = shared.clone();
            let tasks = shared.tasks.clone();
            let handle = if let Opened::Session(handle) = what {
                Some(handle)
            } else {
                None
            };
            let serve = async move {
                let result = match what {
                    Opened::Session(handle) => {
                        serve(&session, handle, bi, others < MAX_SESSIONS).await
                    }
                    Opened::Introduction => {
                        introduce(&shared, connection.clone(), bi).await;
                        Ok(())
                    }
                    Opened::Measurement if !session.may_read && !session.may_write => {
                        reject_stream(bi.0, bi.1, Code::NotAllowed);
                        Ok(())
                    }
                    Opened::Measurement => {
                        let limits = RateLimits::new(session.limit.clone());
                        let (reader, writer) = bi;
                        let config = &session.config;
                        let stopping = &session.stopping;
                        bench::serve(&window, &places, reader, writer, config, &limits, stopping)
                            .await
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
            // A connection without a session only takes a place that others need.
            () = running.idle_for(shared.config.deadline) => {
                connection.close(varint_of(Code::TimedOut), b"no session was running");
            }
            // Sessions that run are told by themselves; the client closes once it has its summary.
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
                debug!("nothing comes back, and the server is stopping");
                connection.close(varint_of(Code::TimedOut), b"nothing came back while the server was stopping");
            }
        }
    }
}

/// Hands somebody over to whoever knows the code, and waits until that is done with.
async fn introduce(
    shared: &ServerState,
    connection: Connection,
    (reader, writer): (MessageReader, MessageWriter),
) {
    let Some(introductions) = &shared.introductions else {
        return reject_stream(reader, writer, Code::Unsupported);
    };
    let done = writer.delivered();
    match introductions.try_send(Introduction {
        connection,
        reader,
        writer,
    }) {
        Ok(()) => done.await,
        Err(full) => {
            let Introduction { reader, writer, .. } = full.into_inner();
            reject_stream(reader, writer, Code::Busy);
        }
    }
}

fn reject_stream(mut reader: MessageReader, writer: MessageWriter, code: Code) {
    reader.stop(code);
    writer.reset(code);
}

/// How a session of this connection makes its receiver.
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
            // The sender's user has said so to the sender.
            fail_specials: false,
            permits: permits.clone(),
            window: window.clone(),
            // Whoever may not read must not find out what is there, not even by the time that it takes.
            index: shared
                .config
                .index
                .clone()
                .filter(|_| may_read && !push.take.unwrap_or_default().no_dedupe),
            claims: shared.claims.clone(),
            session: push.session,
            config: shared.config.clone(),
            ledger: Arc::default(),
            observer: shared.observer.clone(),
            stopping: shared.stopping.clone(),
        })
    })
}
