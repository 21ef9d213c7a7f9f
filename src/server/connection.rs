//! One connection of the server, from its handshake to its end.

use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, ConnectionError, Incoming};
use rustls::pki_types::CertificateDer;
use tokio::time::timeout;
use tracing::instrument::WithSubscriber;
use tracing::{Dispatch, Instrument, Span, debug, info, info_span, warn};

use super::introduction::introduce;
use super::running::Running;
use super::slots::{HandshakeSlot, PlaceSlot};
use super::state::ServerState;
use crate::auth::Rights;
use crate::auth::identity::KeyId;
use crate::bench::{self, MeasurementPermits};
use crate::error::{Code, Error, Reason, Result};
use crate::net::endpoint::{self, MAX_STREAMS};
use crate::net::share::Holder;
use crate::net::stream::{MessageStream, lost_connection, varint_of};
use crate::transfer::blocking::blocking;
use crate::transfer::context::Context;
use crate::transfer::session::{PeerConnection, Purpose, ServerContext, serve};

/// The reason that a stopping server gives when it closes a connection.
pub(super) const STOPPING: &[u8] = b"the server is stopping";

/// The reason that a server without a free place gives.
const FULL: &[u8] = b"the server has no place for another connection; try again later";

/// The most sessions at the same time on one connection. A push and a pull at once are two. Each may hold 1 MiB of
/// unanswered entries, which takes several times that in memory.
const MAX_SESSIONS: usize = 8;

/// Runs a connection from handshake to end. It counts among the handshakes until it has a place.
pub(super) async fn run_connection(
    incoming: Incoming,
    state: Arc<ServerState>,
    slot: HandshakeSlot,
) {
    let admitted = tokio::select! {
        admitted = admit(incoming, &state) => admitted,
        () = slot.evicted() => {
            debug!("too many handshakes of this network at the same time");
            None
        }
    };
    let Some(admitted) = admitted else {
        return slot.keep_for_close();
    };
    let Admitted {
        quic,
        holder,
        rights,
    } = admitted;
    let running = Arc::<Running>::default();
    let limits = &state.limits;
    let Some(place) = limits.places.take(holder, &running) else {
        debug!(key_id = %holder.key_id, "refused: too many connections");
        return quic.close(varint_of(Code::Busy), FULL);
    };
    drop(slot);
    let key_id = holder.key_id;
    let is_logged = limits.rates.log.allows(holder);
    if is_logged {
        info!(%key_id, name = rights.name.as_deref().unwrap_or("-"), "connected");
    }
    let Some(connection) = PeerConnection::open(quic.clone(), key_id, &limits.memory) else {
        return quic.close(
            varint_of(Code::Busy),
            b"the server has no memory for another connection",
        );
    };
    quic.set_max_concurrent_bi_streams(MAX_STREAMS.into());
    let client = Client {
        connection,
        rights,
        holder,
        running,
        place,
    };
    let lost = Served::new(client, state).run().await;
    if is_logged {
        log_end(key_id, &lost);
    }
}

/// A client that was admitted.
struct Admitted {
    quic: Connection,
    holder: Holder,
    rights: Rights,
}

/// Ends the handshake and looks the client up; `None` if it is not admitted.
async fn admit(incoming: Incoming, state: &Arc<ServerState>) -> Option<Admitted> {
    let ip = incoming.remote_address().ip();
    let quic = shake_hands(incoming, state).await?;
    let Some((key_id, chain)) = endpoint::peer(&quic) else {
        quic.close(varint_of(Code::NotAdmitted), b"a certificate is needed");
        return None;
    };
    let stranger = Holder {
        key_id,
        stranger: Some(ip),
    };
    match rights_of(state, chain).await {
        Ok(rights) if rights.known => Some(Admitted {
            quic,
            rights,
            holder: Holder {
                key_id,
                stranger: None,
            },
        }),
        Ok(rights) => Some(Admitted {
            quic,
            rights,
            holder: stranger,
        }),
        Err(why) => {
            if state.limits.rates.refusals.allows(stranger) {
                info!(%key_id, %why, "not admitted");
            }
            quic.close(varint_of(why.code), why.text.raw().as_bytes());
            quic.closed().await;
            None
        }
    }
}

/// Ends the handshake; `None` if it fails, or if the server stops first.
async fn shake_hands(incoming: Incoming, state: &Arc<ServerState>) -> Option<Connection> {
    let tracing = state.clone();
    let mut connecting = Box::pin(timeout(state.config.half_open, async move {
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
        () = state.stopping.cancelled() => {
            tokio::spawn(async move {
                if let Ok(Ok(connection)) = connecting.await {
                    connection.close(varint_of(Code::Stopping), STOPPING);
                }
            });
            return None;
        }
    };
    match connected {
        Ok(Ok(connection)) => return Some(connection),
        Ok(Err(lost)) => debug!(why = %lost_connection(&lost), "the handshake failed"),
        Err(_) => debug!("the handshake took too long"),
    }
    None
}

/// Returns the configuration of one connection with a qlog trace. Creating the file blocks, so it runs on a blocking thread.
async fn traced(state: Arc<ServerState>) -> Arc<quinn::ServerConfig> {
    let plain = Arc::new(state.quic.clone());
    let trace = move || endpoint::with_qlog(&state.quic, &state.config);
    blocking("trace a connection", trace).await.unwrap_or(plain)
}

/// Looks the client up. authorized_keys is read for each connection, which blocks.
async fn rights_of(
    state: &Arc<ServerState>,
    chain: Vec<CertificateDer<'static>>,
) -> Result<Rights, Reason> {
    let state = state.clone();
    blocking("look up a key", move || state.admission.rights_of(&chain)).await
}

fn log_end(key_id: KeyId, lost: &ConnectionError) {
    match lost {
        ConnectionError::ApplicationClosed(close) if close.error_code == varint_of(Code::Done) => {
            info!(%key_id, "disconnected");
        }
        lost => info!(%key_id, why = %lost_connection(lost), "disconnected"),
    }
}

/// A client that has a place.
struct Client {
    connection: Arc<PeerConnection>,
    rights: Rights,
    holder: Holder,
    running: Arc<Running>,
    place: PlaceSlot,
}

/// A connection that is being served.
struct Served {
    connection: Arc<PeerConnection>,
    server: ServerContext,
    measurements: MeasurementPermits,
    holder: Holder,
    running: Arc<Running>,
    place: PlaceSlot,
    state: Arc<ServerState>,
    /// The span of the connection, which the tasks of its streams do not inherit.
    span: Span,
}

impl Served {
    fn new(client: Client, state: Arc<ServerState>) -> Arc<Self> {
        let Client {
            connection,
            rights,
            holder,
            running,
            place,
        } = client;
        let limits = &state.limits;
        Arc::new(Self {
            server: ServerContext {
                context: Context {
                    connection: connection.clone(),
                    config: state.config.clone(),
                    limits: limits.rate.clone(),
                    observer: state.observer.clone(),
                    stopping: state.stopping.clone(),
                },
                store: state.store.clone(),
                offered: state.offered.clone(),
                rights,
                holder,
                pushes: state.pushes.clone(),
                file_locks: state.file_locks.clone(),
                permits: limits.transfers.connection(connection.key_id().0),
                listings: limits.listings.clone(),
            },
            connection,
            measurements: MeasurementPermits::of_connection(limits.measurements.clone(), holder),
            holder,
            running,
            place,
            span: Span::current(),
            state,
        })
    }

    /// Serves the sessions of a connection until the client closes it, it is lost, or it was idle for too long.
    async fn run(self: Arc<Self>) -> ConnectionError {
        let quic = self.connection.quic();
        let stopping = &self.state.stopping;
        let deadline = self.state.config.deadline;
        let started = {
            let served = self.clone();
            move |purpose, stream| served.clone().start(purpose, stream)
        };
        let streams = self.connection.accept_streams(deadline, started);
        tokio::pin!(streams);
        loop {
            tokio::select! {
                lost = &mut streams => return lost,
                // A connection without a session holds a permit that other clients may need.
                () = self.running.idle_for(deadline) => {
                    quic.close(varint_of(Code::TimedOut), b"no session was running");
                }
                () = self.place.evicted() => {
                    quic.close(varint_of(Code::TimedOut), b"no session was running, and another client needed the place");
                }
                // Running sessions tell their clients themselves. The client closes once it has its summary.
                () = async {
                    stopping.cancelled().await;
                    self.running.idle_for(Duration::ZERO).await;
                } => {
                    quic.close(varint_of(Code::Stopping), STOPPING);
                }
                () = async {
                    stopping.cancelled().await;
                    self.connection.flow_control().unresponsive().await;
                } => {
                    debug!("no reply from the client while the server is stopping");
                    quic.close(varint_of(Code::TimedOut), b"no reply while the server was stopping");
                }
            }
        }
    }

    /// Starts the task that serves a stream.
    fn start(self: Arc<Self>, purpose: Purpose, stream: MessageStream) {
        let others = self.running.begin();
        let handle = match purpose {
            Purpose::Session => Some(stream.id()),
            Purpose::Measurement | Purpose::Introduction => None,
        };
        let span = info_span!(parent: &self.span, "session", handle);
        let tasks = self.state.tasks.clone();
        let serve = async move {
            self.state.limits.rates.session(self.holder).await;
            let is_logged = self.state.limits.rates.log.allows(self.holder);
            let result = match is_logged {
                true => self.serve(purpose, stream, others).await,
                false => {
                    let unlogged = self.serve(purpose, stream, others);
                    unlogged.with_subscriber(Dispatch::none()).await
                }
            };
            self.running.end();
            match self.connection.close_on_protocol_error(result) {
                Err(Error::Protocol(why)) if is_logged => {
                    warn!(%why, "closed: the peer broke the protocol");
                }
                Err(error) if is_logged => info!(%error, "session ended"),
                _ => {}
            }
        };
        tasks.spawn(serve.instrument(span));
    }

    /// Serves a stream, while `others` run on this connection.
    async fn serve(&self, purpose: Purpose, stream: MessageStream, others: usize) -> Result<()> {
        match purpose {
            Purpose::Session => {
                let share = self.state.limits.sessions.take(self.holder);
                let room = others < MAX_SESSIONS && share.is_some();
                serve(&self.server, stream, room).await
            }
            Purpose::Introduction => {
                let Some(_share) = self.state.limits.introductions.take(self.holder) else {
                    stream.reject(Code::Busy);
                    return Ok(());
                };
                let introductions = self.state.introductions.as_ref();
                introduce(introductions, self.connection.quic().clone(), stream).await;
                Ok(())
            }
            Purpose::Measurement if !self.server.rights.read && !self.server.rights.write => {
                stream.reject(Code::NotAllowed);
                Ok(())
            }
            Purpose::Measurement => {
                bench::serve(&self.server.context, &self.measurements, stream).await
            }
        }
    }
}
