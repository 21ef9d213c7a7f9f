//! A client's connection and its tasks.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use quinn::Connection;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::watch;
use crate::auth::identity::KeyId;
use crate::config::Config;
use crate::error::{Code, Error, Result};
use crate::net::connect::Connected;
use crate::net::endpoint;
use crate::net::flow_control::FlowControl;
use crate::net::memory_limit::MemoryLimit;
use crate::net::rate_limit::RateLimits;
use crate::net::send_window::{SendMemory, SendWindow};
use crate::net::stream::varint_of;
use crate::protocol::{Pull, Push, Ready};
use crate::transfer::events::Route;
use crate::transfer::receive::Receiver;
use crate::transfer::send::Sender;
use crate::transfer::session::{self, Outcome, Sessions, accept_streams};

/// Time for the last messages of a session to arrive before the connection is closed. At round trips of up to 200 ms, quinn
/// has sent them four times by then.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(3);

/// A verified connection to the server. It is closed when its last user drops it.
pub(super) struct Link {
    pub(super) endpoint: quinn::Endpoint,
    pub(super) connection: Connection,
    pub(super) sessions: Arc<Sessions>,
    pub(super) window: Arc<FlowControl>,
    pub(super) route: Route,
    own_port: bool,
    /// Sessions that have ended, but whose last messages the server has not acknowledged yet.
    undelivered: TaskTracker,
    accept_task: JoinHandle<()>,
    _send_window: SendWindow,
}

/// A verified connection to the server, and its route.
pub(crate) struct Dialed {
    pub(crate) connected: Connected,
    pub(crate) route: Route,
    /// Whether the endpoint has only this connection, which may then move to another port.
    pub(crate) own_port: bool,
}

pub(crate) type Dialing = Pin<Box<dyn Future<Output = Result<Dialed>> + Send>>;

/// Connects to the same server again, as often as needed.
pub(crate) struct Dial {
    /// Over any route.
    pub(crate) any: Box<dyn Fn() -> Dialing + Send + Sync>,
    /// Over a route without a relay. It may take long to fail.
    pub(crate) direct: Option<Box<dyn Fn() -> Dialing + Send + Sync>>,
}

impl Link {
    /// Makes a link from a new connection.
    ///
    /// # Errors
    /// [`Error::NotTrusted`] without a certificate; [`Error::Usage`] when the configuration allows no memory.
    pub(super) fn over(dialed: Dialed, config: &Config) -> Result<(Self, KeyId)> {
        let Dialed {
            connected:
                Connected {
                    endpoint,
                    connection,
                },
            route,
            own_port,
        } = dialed;
        let not_trusted = || {
            let host = connection.remote_address().to_string();
            Error::NotTrusted {
                host: host.into(),
                why: "it presented no certificate".into(),
            }
        };
        let (key_id, _) = endpoint::peer(&connection).ok_or_else(not_trusted)?;
        let window = FlowControl::open(connection.clone(), &MemoryLimit::new(config.memory))
            .ok_or_else(|| {
                Error::Usage(
                    "cannot connect: the configuration allows no memory for a connection".into(),
                )
            })?;
        // A client has one connection, so the memory for sending is its send window.
        let limit = config.limited_send_window();
        let send_window = SendWindow::start(connection.clone(), &SendMemory::new(limit), limit);
        let sessions = Sessions::of_client();
        let accept_task = {
            let window = window.clone();
            let sessions = sessions.clone();
            let deadline = config.deadline;
            // A server opens no control streams. If it does, they are reset.
            tokio::spawn(async move {
                drop(accept_streams(&window, &sessions, deadline, |_, _| {}).await)
            })
        };
        Ok((
            Self {
                endpoint,
                connection,
                sessions,
                window,
                route,
                own_port,
                undelivered: TaskTracker::new(),
                accept_task,
                _send_window: send_window,
            },
            key_id,
        ))
    }

    /// The server's address as users write it: a socket for both families shows IPv4 as IPv6.
    pub(super) fn address(&self) -> SocketAddr {
        let remote = self.connection.remote_address();
        SocketAddr::new(remote.ip().to_canonical(), remote.port())
    }

    /// Runs a push over this connection. Calls `on_ready` once the server is ready.
    pub(super) async fn push(
        &self,
        push: &Push,
        limits: &RateLimits,
        sender: &mut Sender,
        config: &Config,
        on_ready: impl FnOnce(),
        outcome: &mut Outcome,
    ) -> Result<()> {
        let lost = self.lost(config);
        let over = (&self.connection, limits);
        self.close_on_protocol_error(
            session::push(over, push, sender, config.deadline, on_ready, lost, outcome).await,
        )
    }

    /// Runs a pull over this connection.
    pub(super) async fn pull(
        &self,
        pull: &Pull,
        receiver: impl AsyncFnOnce(&Ready) -> Result<Arc<Receiver>>,
        config: &Config,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let lost = self.lost(config);
        let over = (&self.connection, &self.sessions);
        let pulled = session::pull(over, pull, receiver, config.deadline, lost, outcome).await;
        let delivered = self.close_on_protocol_error(pulled)?;
        // Keeps the connection open: quinn closes it when its last user drops it.
        let connection = self.connection.clone();
        self.undelivered.spawn(async move {
            let _ = timeout(DELIVERY_TIMEOUT, delivered).await;
            drop(connection);
        });
        Ok(())
    }

    /// Waits until the server has the last messages of all sessions, up to [`DELIVERY_TIMEOUT`].
    pub(super) async fn delivered(&self) {
        self.undelivered.close();
        self.undelivered.wait().await;
    }

    /// Returns the reason once the connection must be lost.
    async fn lost(&self, config: &Config) -> String {
        tokio::select! {
            reason = watch::server_exited(self.own_port.then_some(&self.endpoint), &self.connection, config.keep_alive) => reason,
            reason = watch::handshake_lost(&self.connection) => reason,
        }
    }

    /// Closes the connection after a protocol error, and reports it to the server.
    pub(super) fn close_on_protocol_error<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(Error::Protocol(reason)) = &result {
            self.connection
                .close(varint_of(Code::Protocol), reason.raw().as_bytes());
        }
        result
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.accept_task.abort();
    }
}
