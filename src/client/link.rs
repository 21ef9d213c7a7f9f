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
use crate::config::Config;
use crate::error::{Error, Result};
use crate::net::address::canonical;
use crate::net::connect::Connected;
use crate::net::endpoint;
use crate::transfer::events::Route;
use crate::transfer::session::{ConnectionMemory, Delivered, PeerConnection};

/// Time for the last messages of a session to arrive before the connection is closed. At round trips of up to 200 ms, quinn
/// has sent them four times by then.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(3);

/// A verified connection to the server. It is closed when its last user drops it.
pub(super) struct Link {
    pub(super) endpoint: quinn::Endpoint,
    pub(super) connection: Arc<PeerConnection>,
    pub(super) route: Route,
    own_port: bool,
    /// Sessions that have ended, but whose last messages the server has not acknowledged yet.
    undelivered: TaskTracker,
    accept_task: JoinHandle<()>,
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
    pub(super) fn over(dialed: Dialed, config: &Config) -> Result<Self> {
        let Connected {
            endpoint,
            connection: quic,
        } = dialed.connected;
        let (key_id, _) = endpoint::peer(&quic).ok_or_else(|| Error::NotTrusted {
            host: quic.remote_address().to_string().into(),
            why: "it presented no certificate".into(),
        })?;
        let opened = PeerConnection::open(quic, key_id, &ConnectionMemory::of_client(config));
        let connection = opened.ok_or_else(|| {
            Error::Usage(
                "cannot connect: the configuration allows no memory for a connection".into(),
            )
        })?;
        connection.flow_control().take_first_share();
        let accept_task = {
            let connection = connection.clone();
            let deadline = config.deadline;
            // A server opens no control streams. If it does, they are reset.
            tokio::spawn(async move {
                drop(connection.accept_streams(deadline, |_, _| {}).await);
            })
        };
        Ok(Self {
            endpoint,
            connection,
            route: dialed.route,
            own_port: dialed.own_port,
            undelivered: TaskTracker::new(),
            accept_task,
        })
    }

    /// The QUIC connection.
    pub(super) fn quic(&self) -> &Connection {
        self.connection.quic()
    }

    /// The server's address as users write it: a socket for both families shows IPv4 as IPv6.
    pub(super) fn address(&self) -> SocketAddr {
        canonical(self.quic().remote_address())
    }

    /// Keeps the connection open until the server has the last messages of a session, up to [`DELIVERY_TIMEOUT`]: quinn
    /// closes it when its last user drops it.
    pub(super) fn keep_open_until(&self, delivered: Delivered) {
        let quic = self.quic().clone();
        self.undelivered.spawn(async move {
            let _ = timeout(DELIVERY_TIMEOUT, delivered).await;
            drop(quic);
        });
    }

    /// Waits until the server has the last messages of all sessions, up to [`DELIVERY_TIMEOUT`].
    pub(super) async fn delivered(&self) {
        self.undelivered.close();
        self.undelivered.wait().await;
    }

    /// Returns the reason once the connection must be lost.
    pub(super) async fn lost(&self, keep_alive: Duration) -> String {
        let own_endpoint = self.own_port.then_some(&self.endpoint);
        tokio::select! {
            reason = watch::server_exited(own_endpoint, self.quic(), keep_alive) => reason,
            reason = watch::handshake_lost(self.quic()) => reason,
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.accept_task.abort();
    }
}
