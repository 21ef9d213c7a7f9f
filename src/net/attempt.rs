//! One attempt to connect to one address of a server.

use std::future::{IntoFuture, pending};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::{Connecting, Connection, ConnectionError, TransportErrorCode};
use rustls::pki_types::ServerName;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::endpoint::{client_config, endpoint_config, relay_client_config, runtime};
use super::reachability::{ReplySocket, port_is_closed, refusal, unspecified};
use super::socket::udp_socket;
use super::stream::close_error;
use crate::auth::identity::Identity;
use crate::auth::trust::ServerVerifier;
use crate::config::Config;
use crate::error::text::PeerText;
use crate::error::{Error, Result};
use crate::protocol::ALPN;

/// Silence after the server's last reply before the system is asked whether the port is still open. A single refusal
/// is not enough, since a firewall that is being set up may refuse for a moment.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(1);
/// Consecutive refusals that count as a stopped server.
const REFUSAL_LIMIT: u32 = 2;
/// When a handshake times out, a last reply older than this means that it broke off; a newer one means a slow path.
/// Twice a lost reply fits in: quinn sends again after 1 s, then 2 s.
const STALE_REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// Age of an unfinished handshake at which a second one starts in parallel; doubled each time. quinn doubles its
/// probe timeout with every lost packet and resets it only when the handshake ends: at 20 % loss each way some
/// handshakes took a minute.
const PARALLEL_HANDSHAKE_INTERVAL: Duration = Duration::from_secs(1);
/// Limit of handshakes in addition to the first: at 1, 3 and 7 s.
const MAX_PARALLEL_HANDSHAKES: usize = 3;
/// TLS alert no_application_protocol (RFC 7301, section 3.2).
const NO_APPLICATION_PROTOCOL: u8 = 120;

/// A connection to a server whose key or certificate was verified.
#[derive(Debug, Clone)]
pub struct Connected {
    /// The connection's endpoint; [`connect`](super::connect::connect) opens one for each connection. After closing the
    /// connection, wait for `wait_idle`, so that the close reaches the peer.
    pub endpoint: quinn::Endpoint,
    /// The connection. Its `remote_address` is the address that answered.
    pub connection: quinn::Connection,
}

pub(super) fn without_brackets(host: &str) -> &str {
    host.strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .unwrap_or(host)
}

/// An attempt to connect to one address of a host.
pub(super) struct Attempt {
    pub(super) host: String,
    pub(super) address: SocketAddr,
    /// `None` for a relay, which asks for no key.
    pub(super) identity: Option<Identity>,
    pub(super) verifier: Arc<ServerVerifier>,
    pub(super) config: Config,
    /// Start of the time that all attempts share.
    pub(super) started: Instant,
}

impl Attempt {
    pub(super) async fn run(self) -> Result<Connected> {
        // Each attempt has its own socket, of the address's family. Whatever it receives comes from that address or
        // is a stray packet.
        let unspecified = unspecified(self.address);
        let failed = || Error::io(format!("cannot open a UDP socket on {unspecified}"));
        let runtime = runtime()?;
        let socket = Arc::new(ReplySocket {
            inner: runtime
                .wrap_udp_socket(udp_socket(unspecified)?)
                .map_err(failed())?,
            server: self.address,
            last_reply: Mutex::default(),
        });
        let endpoint = quinn::Endpoint::new_with_abstract_socket(
            endpoint_config(),
            None,
            socket.clone(),
            runtime,
        )
        .map_err(failed())?;
        let no_reply = async {
            let reason = tokio::select! {
                reason = refusal(self.address) => reason,
                () = sleep_until(self.started + self.config.first_reply) => format!(
                    "nothing answers: is `haul serve` running there, and does the network let UDP port {} through?", self.address.port()
                ),
            };
            if socket.last_reply().is_some() {
                pending().await
            } else {
                reason
            }
        };
        tokio::select! {
            ended = self.handshake(&endpoint) => ended.map(|connection| Connected { endpoint, connection }),
            reason = no_reply => Err(self.unreachable(reason)),
            reason = self.stopped(&socket) => Err(self.unreachable(reason)),
            () = sleep_until(self.started + self.config.handshake) => Err(self.unreachable(timeout_reason(socket.last_reply()))),
        }
    }

    /// Connects over a shared endpoint. Replies from this address alone cannot be observed there.
    pub(super) async fn connect_over(&self, endpoint: &quinn::Endpoint) -> Result<Connected> {
        tokio::select! {
            ended = self.handshake(endpoint) => {
                ended.map(|connection| Connected { endpoint: endpoint.clone(), connection })
            }
            () = sleep_until(self.started + self.config.handshake) => Err(self.unreachable(match &self.identity {
                Some(_) => "nothing answers",
                None => "nothing answers: is `haul relay` running there, and does the network let UDP through to it?",
            })),
        }
    }

    /// Returns the first handshake that ends. A failed one counts too: the server answered it, or the endpoint is
    /// broken.
    async fn handshake(&self, endpoint: &quinn::Endpoint) -> Result<Connection> {
        let mut handshakes = JoinSet::new();
        let mut interval = PARALLEL_HANDSHAKE_INTERVAL;
        loop {
            handshakes.spawn(self.begin(endpoint)?.into_future());
            tokio::select! {
                Some(ended) = handshakes.join_next() => return self.finish(ended),
                () = sleep(interval), if handshakes.len() <= MAX_PARALLEL_HANDSHAKES => interval *= 2,
            }
        }
    }

    /// Starts a handshake. Each has its own configuration, since each writes its own trace.
    fn begin(&self, endpoint: &quinn::Endpoint) -> Result<Connecting> {
        let client = match &self.identity {
            Some(identity) => client_config(identity, self.verifier.clone(), &self.config)?,
            None => relay_client_config(self.verifier.clone(), &self.config)?,
        };
        endpoint
            .connect_with(client, self.address, &self.server_name())
            .map_err(|error| self.unreachable(error.to_string()))
    }

    fn finish(
        &self,
        ended: Result<Result<Connection, ConnectionError>, JoinError>,
    ) -> Result<Connection> {
        let ended = ended.map_err(|error| self.unreachable(error.to_string()))?;
        ended.map_err(|error| self.handshake_error(error))
    }

    /// Resolves to the reason when a server that has answered stops before the handshake ends.
    async fn stopped(&self, socket: &ReplySocket) -> String {
        let mut before = None;
        let mut refusals = 0;
        while refusals < REFUSAL_LIMIT {
            sleep(SILENCE_TIMEOUT).await;
            let last_reply = socket.last_reply();
            let silent = last_reply.is_some() && last_reply == before;
            before = last_reply;
            let refused = silent
                && timeout(SILENCE_TIMEOUT, port_is_closed(self.address))
                    .await
                    .is_ok();
            refusals = if refused { refusals + 1 } else { 0 };
        }
        format!(
            "it answered, but stopped before the handshake ended: nothing listens on port {} any more; was the server stopped?",
            self.address.port()
        )
    }

    /// The server name for TLS: the host, or its address where the host is not a valid DNS name.
    fn server_name(&self) -> String {
        let bare = without_brackets(&self.host);
        match ServerName::try_from(bare) {
            Ok(_) => bare.to_owned(),
            Err(_) => self.address.ip().to_string(),
        }
    }

    fn unreachable(&self, reason: impl Into<PeerText>) -> Error {
        Error::Unreachable {
            host: self.host.as_str().into(),
            address: self.address,
            why: reason.into(),
        }
    }

    fn handshake_error(&self, error: ConnectionError) -> Error {
        if let Some(error) = self.verifier.take_failure() {
            return error;
        }
        let code = match &error {
            ConnectionError::TransportError(e) => Some(e.code),
            ConnectionError::ConnectionClosed(close) => Some(close.error_code),
            _ => None,
        };
        if code == Some(TransportErrorCode::crypto(NO_APPLICATION_PROTOCOL)) {
            return self.unreachable(format!(
                "it speaks QUIC, but not {}",
                String::from_utf8_lossy(ALPN)
            ));
        }
        match error {
            ConnectionError::ApplicationClosed(close) => close_error(&close),
            ConnectionError::ConnectionClosed(_)
                if code == Some(TransportErrorCode::CONNECTION_REFUSED) =>
            {
                self.unreachable("the server is full; try again later")
            }
            ConnectionError::ConnectionClosed(_)
                if code == Some(TransportErrorCode::APPLICATION_ERROR) =>
            {
                self.unreachable(
                    "it closed the connection during the handshake; is the server stopping?",
                )
            }
            ConnectionError::VersionMismatch => {
                self.unreachable("it supports no QUIC version that haul supports")
            }
            ConnectionError::TransportError(e) if is_tls(e.code) => Error::NotTrusted {
                host: self.verifier.host().into(),
                why: e.reason.into(),
            },
            error => self.unreachable(error.to_string()),
        }
    }
}

/// Explains a handshake that timed out, by when the last reply arrived.
fn timeout_reason(last_reply: Option<Instant>) -> String {
    match last_reply.map(|at| at.elapsed()) {
        None => "nothing answers".into(),
        Some(silence) if silence >= STALE_REPLY_TIMEOUT => format!(
            "something answered, but sent nothing in the last {} s, and the handshake did not end in time; was the server \
             stopped, or the network cut?",
            silence.as_secs()
        ),
        Some(_) => {
            "something answers, but the handshake did not end in time; does the network lose most of it, or is the \
                    server overloaded?"
                .into()
        }
    }
}

/// Whether the code is CRYPTO_ERROR, a TLS alert (RFC 9001, section 4.8).
fn is_tls(code: TransportErrorCode) -> bool {
    (0x100..0x200).contains(&u64::from(code))
}
