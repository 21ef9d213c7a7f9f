//! A client's connection, and what belongs to it.

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

/// How long a connection outlives its last session, so that its last messages arrive: quinn has sent them four times by
/// then at round trips of up to 200 ms.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(3);

/// A connection to the right server. It ends with the last that uses it.
pub(super) struct Link {
    pub(super) endpoint: quinn::Endpoint,
    pub(super) connection: Connection,
    pub(super) sessions: Arc<Sessions>,
    pub(super) window: Arc<FlowControl>,
    pub(super) route: Route,
    own_port: bool,
    /// Sessions that are over, and whose last messages the server does not have yet.
    undelivered: TaskTracker,
    streams: JoinHandle<()>,
    _upkeep: SendWindow,
}

/// A connection to the right server, and how it goes there.
pub(crate) struct Dialed {
    pub(crate) connected: Connected,
    pub(crate) route: Route,
    /// The endpoint is this connection's own: it may go on from another port.
    pub(crate) own_port: bool,
}

pub(crate) type Dialing = Pin<Box<dyn Future<Output = Result<Dialed>> + Send>>;

/// Makes a connection to the right server, as often as it is needed.
pub(crate) struct Dial {
    /// By whatever way.
    pub(crate) any: Box<dyn Fn() -> Dialing + Send + Sync>,
    /// By a way that is not relayed. It may take long to fail.
    pub(crate) direct: Option<Box<dyn Fn() -> Dialing + Send + Sync>>,
}

impl Link {
    /// A link over a connection that is new.
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
        let nobody = || {
            let host = connection.remote_address().to_string();
            Error::NotTrusted {
                host: host.into(),
                why: "it presented no certificate".into(),
            }
        };
        let (key_id, _) = endpoint::peer(&connection).ok_or_else(nobody)?;
        let window = FlowControl::open(connection.clone(), &MemoryLimit::new(config.memory))
            .ok_or_else(|| Error::Usage("no memory is allowed for a connection".into()))?;
        // A client has but this connection; its send window is all that bounds it.
        let most = config.limited_send_window();
        let upkeep = SendWindow::start(connection.clone(), &SendMemory::new(most), most);
        let sessions = Sessions::of_client();
        let streams = {
            let window = window.clone();
            let sessions = sessions.clone();
            let deadline = config.deadline;
            // A server opens no control streams; one that does sees them reset.
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
                streams,
                _upkeep: upkeep,
            },
            key_id,
        ))
    }

    /// Where the server is, as people write it: a socket that takes both families shows IPv4 as IPv6.
    pub(super) fn address(&self) -> SocketAddr {
        let remote = self.connection.remote_address();
        SocketAddr::new(remote.ip().to_canonical(), remote.port())
    }

    /// This connection's part of a push.
    pub(super) async fn push(
        &self,
        (push, limits): (&Push, &RateLimits),
        sender: &mut Sender,
        config: &Config,
        begun: impl FnOnce(),
        outcome: &mut Outcome,
    ) -> Result<()> {
        let gone = self.gone(config);
        let over = (&self.connection, limits);
        self.close_on_protocol_error(
            session::push(over, push, sender, config.deadline, begun, gone, outcome).await,
        )
    }

    /// This connection's part of a pull.
    pub(super) async fn pull(
        &self,
        pull: &Pull,
        receiver: impl AsyncFnOnce(&Ready) -> Result<Arc<Receiver>>,
        config: &Config,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let gone = self.gone(config);
        let over = (&self.connection, &self.sessions);
        let pulled = session::pull(over, pull, receiver, config.deadline, gone, outcome).await;
        let delivered = self.close_on_protocol_error(pulled)?;
        // Holds the connection, which is closed with the last that holds it.
        let connection = self.connection.clone();
        self.undelivered.spawn(async move {
            let _ = timeout(DELIVERY_TIMEOUT, delivered).await;
            drop(connection);
        });
        Ok(())
    }

    /// Waits until the server has the last messages of all sessions, for [`DELIVERY_TIMEOUT`] at most.
    pub(super) async fn delivered(&self) {
        self.undelivered.close();
        self.undelivered.wait().await;
    }

    /// Ends, with the reason, when nothing more can be expected of this connection.
    async fn gone(&self, config: &Config) -> String {
        tokio::select! {
            why = watch::gone(self.own_port.then_some(&self.endpoint), &self.connection, config.keep_alive) => why,
            why = watch::unconfirmed(&self.connection) => why,
        }
    }

    /// A server that breaks the protocol is told so, and left.
    pub(super) fn close_on_protocol_error<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(Error::Protocol(why)) = &result {
            self.connection
                .close(varint_of(Code::Protocol), why.raw().as_bytes());
        }
        result
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.streams.abort();
    }
}
