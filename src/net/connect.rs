//! A client's way to a server: every address of the host, and an error as early as one can be told.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{IntoFuture, pending};
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AsyncUdpSocket, Connecting, Connection, ConnectionError, TransportErrorCode, UdpPoller,
};
use rustls::pki_types::ServerName;
use tokio::net::{UdpSocket, lookup_host};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::endpoint::{
    client_config, closed, endpoint_config, relay_client_config, runtime, udp_socket,
};
use crate::auth::identity::Identity;
use crate::auth::trust::{ServerTrust, ServerVerifier};
use crate::config::Config;
use crate::error::text::PeerText;
use crate::error::{Error, Result};
use crate::protocol::ALPN;

/// Time between the attempts on a host's addresses (RFC 8305, section 5).
const ATTEMPT_INTERVAL: Duration = Duration::from_millis(250);
/// Addresses of a host that are tried, at most: their attempts run at the same time.
const MAX_ADDRESSES: usize = 8;
/// What asks the system whether anything listens. A first byte of zero is neither a long header nor, without the fixed
/// bit, a short one, so QUIC endpoints drop it (RFC 9000, section 17.3.1).
const PROBE: [u8; 1] = [0];
/// Set in the first byte of every packet of a handshake (RFC 8999, section 5.1). What answers without it has stopped to
/// serve: a stateless reset.
const LONG_HEADER: u8 = 0x80;
/// Silence, once something was heard, after which the system is asked whether the server is still there; and how often, as
/// a firewall that is being set up may refuse for a moment.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(1);
const REFUSALS: u32 = 2;
/// A handshake that did not end in time has broken off when its last answer is as old as this, or else goes too slowly. At
/// twice a lost answer, quinn asks again after 1 s, then 2 s.
const RESET_RETRY_TIMEOUT: Duration = Duration::from_secs(5);
/// Age of a handshake that is not over at which another begins beside it, each time doubled. quinn doubles its patience with
/// every packet that is lost and does not forget it before the handshake ends: at 20 % loss each way some took a minute.
const BESIDE: Duration = Duration::from_secs(1);
/// How many begin beside the first, at most: at 1, 3 and 7 s.
const MAX_BESIDE: usize = 3;
/// TLS alert no_application_protocol (RFC 7301, section 3.2).
const NO_APPLICATION_PROTOCOL: u8 = 120;

/// A connection to a server that is the right one.
#[derive(Debug, Clone)]
pub struct Connected {
    /// The endpoint that the connection runs on, and no other. Wait for `wait_idle` after closing the connection, so
    /// that the peer hears of it.
    pub endpoint: quinn::Endpoint,
    /// The connection. Its `remote_address` is the one that answered.
    pub connection: quinn::Connection,
}

/// Connects to a host, whose addresses are tried 250 ms after each other until one works.
///
/// The server has not judged this client yet: when it does not admit its key, it closes the connection with
/// [`Code::NotAdmitted`](crate::error::Code::NotAdmitted); see [`closed`](super::endpoint::closed).
///
/// # Errors
/// - [`Error::Resolve`]: the host has no address.
/// - [`Error::Unreachable`]: at once where the system tells that nothing listens, after `config.first_reply` when
///   nothing came back, after `config.handshake` in any case; also when the server is full or is no haul.
/// - [`Error::UnknownHost`], [`Error::ChangedHost`], [`Error::WrongPin`], [`Error::NotTrusted`]: it is not the right
///   server. Nothing was sent to it.
/// - [`Error::Usage`] and [`Error::Home`]: what `identity`, `trust` or `config` say cannot be used.
pub async fn connect(
    identity: &Identity,
    trust: &ServerTrust,
    host: &str,
    port: u16,
    config: &Config,
) -> Result<Connected> {
    let verifier = trust.verifier(host, port)?;
    if let Some(directory) = &config.qlog {
        crate::net::qlog::prepare(directory)?;
    }
    let mut addresses = resolve(host, port, config.handshake).await?;
    let started = Instant::now();
    let mut attempts = JoinSet::new();
    let mut failure = None;
    loop {
        if let Some(address) = addresses.pop_front() {
            let attempt = Attempt {
                host: host.to_owned(),
                address,
                identity: Some(identity.clone()),
                verifier: verifier.clone(),
                config: config.clone(),
                started,
            };
            attempts.spawn(attempt.run());
        }
        tokio::select! {
            Some(ended) = attempts.join_next() => match ended {
                Ok(Ok(connected)) => return Ok(connected),
                Ok(Err(error @ (Error::Unreachable { .. } | Error::Io { .. }))) => failure = Some(error),
                // It is the wrong server, or the right one that refuses: no other address makes that better.
                Ok(Err(error)) => return Err(error),
                Err(_) => {}
            },
            () = sleep(ATTEMPT_INTERVAL), if !addresses.is_empty() => {}
            else => return Err(failure.unwrap_or_else(|| no_address(host, "no address"))),
        }
    }
}

/// Connects to somebody who may be at any of these addresses, over an endpoint that is there already; the first connection
/// counts. Addresses come as they are found, and are tried at once.
///
/// # Errors
/// As [`connect`]; [`Error::Unreachable`] too when none of the addresses is any better by the time for a handshake.
pub(crate) async fn connect_over(
    endpoint: &quinn::Endpoint,
    identity: &Identity,
    trust: &ServerTrust,
    addresses: &[SocketAddr],
    config: &Config,
) -> Result<Connected> {
    let started = Instant::now();
    let mut attempts = JoinSet::new();
    let mut failure = None;
    for &address in addresses {
        let host = address.ip().to_string();
        let verifier = trust.verifier(&host, address.port())?;
        let config = Config {
            qlog: None,
            ..config.clone()
        };
        let attempt = Attempt {
            host,
            address,
            identity: Some(identity.clone()),
            verifier,
            config,
            started,
        };
        let endpoint = endpoint.clone();
        attempts.spawn(async move { attempt.over(&endpoint).await });
    }
    while let Some(ended) = attempts.join_next().await {
        match ended {
            Ok(Ok(connected)) => return Ok(connected),
            Ok(Err(error)) => failure = Some(error),
            Err(_) => {}
        }
    }
    Err(failure.unwrap_or_else(|| no_address("the other machine", "no address of it is known")))
}

/// Connects to a relay, over an endpoint that is there already. Its addresses are tried 250 ms after each other, as
/// [`connect`] does.
///
/// # Errors
/// As [`connect`].
pub(crate) async fn connect_relay(
    endpoint: &quinn::Endpoint,
    trust: &ServerTrust,
    (host, port): (&str, u16),
    config: &Config,
) -> Result<Connection> {
    let addresses = resolve(host, port, config.handshake).await?;
    connect_relay_at(endpoint, trust, (host, port), addresses, config).await
}

/// Connects to a relay that has these addresses; the first that works counts.
async fn connect_relay_at(
    endpoint: &quinn::Endpoint,
    trust: &ServerTrust,
    (host, port): (&str, u16),
    mut addresses: VecDeque<SocketAddr>,
    config: &Config,
) -> Result<Connection> {
    let verifier = trust.verifier(host, port)?;
    let is_ipv6 = endpoint.local_addr().is_ok_and(|local| local.is_ipv6());
    addresses.retain(|address| is_ipv6 || address.is_ipv4());
    let config = Config {
        qlog: None,
        handshake: config.first_reply,
        ..config.clone()
    };
    let mut attempts = JoinSet::new();
    let mut failure = None;
    loop {
        if let Some(address) = addresses.pop_front() {
            let attempt = Attempt {
                host: host.to_owned(),
                address,
                identity: None,
                verifier: verifier.clone(),
                config: config.clone(),
                started: Instant::now(),
            };
            let endpoint = endpoint.clone();
            attempts.spawn(async move { attempt.over(&endpoint).await });
        }
        tokio::select! {
            Some(ended) = attempts.join_next() => match ended {
                Ok(Ok(connected)) => return Ok(connected.connection),
                Ok(Err(error @ (Error::Unreachable { .. } | Error::Io { .. }))) => failure = Some(error),
                // It is the wrong relay, or the right one that refuses: no other address makes that better.
                Ok(Err(error)) => return Err(error),
                Err(_) => {}
            },
            () = sleep(ATTEMPT_INTERVAL), if !addresses.is_empty() => {}
            else => return Err(failure.unwrap_or_else(|| no_address(host, "no address"))),
        }
    }
}

/// The addresses of a host in the resolver's order, but with IPv6 and IPv4 in turn (RFC 8305, section 4).
async fn resolve(host: &str, port: u16, limit: Duration) -> Result<VecDeque<SocketAddr>> {
    let bare = without_brackets(host);
    let found: Vec<_> = match timeout(limit, lookup_host((bare, port))).await {
        Ok(found) => found
            .map_err(|e| no_address(host, &e.to_string()))?
            .collect(),
        Err(_) => return Err(no_address(host, "the resolver does not answer")),
    };
    let mut addresses = interleave(found);
    addresses.truncate(MAX_ADDRESSES);
    Ok(addresses)
}

/// IPv6 and IPv4 in turn, each in the order given, the family that came first before the other.
fn interleave(found: Vec<SocketAddr>) -> VecDeque<SocketAddr> {
    let first_is_ipv6 = found.first().is_some_and(SocketAddr::is_ipv6);
    let (next, other): (Vec<_>, Vec<_>) = found
        .into_iter()
        .partition(|a| a.is_ipv6() == first_is_ipv6);
    let mut next = VecDeque::from(next);
    let mut other = VecDeque::from(other);
    let mut addresses = VecDeque::new();
    while let Some(address) = next.pop_front() {
        addresses.push_back(address);
        if !other.is_empty() {
            std::mem::swap(&mut next, &mut other);
        }
    }
    addresses
}

fn no_address(host: &str, why: &str) -> Error {
    Error::Resolve {
        host: host.into(),
        why: why.into(),
    }
}

fn without_brackets(host: &str) -> &str {
    host.strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .unwrap_or(host)
}

/// A handshake with one address of a host.
struct Attempt {
    host: String,
    address: SocketAddr,
    /// None towards a relay.
    identity: Option<Identity>,
    verifier: Arc<ServerVerifier>,
    config: Config,
    /// The time for all attempts runs from then.
    started: Instant,
}

impl Attempt {
    async fn run(self) -> Result<Connected> {
        // A socket for each attempt: of the address's family, and what it hears comes from there or is a stray.
        let unspecified = unspecified(self.address);
        let what = || Error::io(format!("cannot open a UDP socket on {unspecified}"));
        let runtime = runtime()?;
        let socket = Arc::new(Listening {
            inner: runtime
                .wrap_udp_socket(udp_socket(unspecified)?)
                .map_err(what())?,
            from: self.address,
            heard: Mutex::default(),
        });
        let endpoint = quinn::Endpoint::new_with_abstract_socket(
            endpoint_config(),
            None,
            socket.clone(),
            runtime,
        )
        .map_err(what())?;
        let nobody_there = async {
            let why = tokio::select! {
                why = refusal(self.address) => why,
                () = sleep_until(self.started + self.config.first_reply) => format!(
                    "nothing answers: is `haul serve` running there, and UDP port {} open on the way?", self.address.port()
                ),
            };
            if socket.heard().is_some() {
                pending().await
            } else {
                why
            }
        };
        tokio::select! {
            ended = self.handshake(&endpoint) => ended.map(|connection| Connected { endpoint, connection }),
            why = nobody_there => Err(self.unreachable(why)),
            why = self.gone(&socket) => Err(self.unreachable(why)),
            () = sleep_until(self.started + self.config.handshake) => Err(self.unreachable(unfinished(socket.heard()))),
        }
    }

    /// The same over an endpoint that others use too: nothing is known then of what was heard from this address alone.
    async fn over(&self, endpoint: &quinn::Endpoint) -> Result<Connected> {
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

    /// The first connection that comes about. One that fails decides too: it was answered, or the endpoint is broken.
    async fn handshake(&self, endpoint: &quinn::Endpoint) -> Result<Connection> {
        let mut handshakes = JoinSet::new();
        let mut patience = BESIDE;
        loop {
            handshakes.spawn(self.begin(endpoint)?.into_future());
            tokio::select! {
                Some(ended) = handshakes.join_next() => return self.ended(ended),
                () = sleep(patience), if handshakes.len() <= MAX_BESIDE => patience *= 2,
            }
        }
    }

    /// Each handshake has its own configuration, since each is traced apart.
    fn begin(&self, endpoint: &quinn::Endpoint) -> Result<Connecting> {
        let client = match &self.identity {
            Some(identity) => client_config(identity, self.verifier.clone(), &self.config)?,
            None => relay_client_config(self.verifier.clone(), &self.config)?,
        };
        endpoint
            .connect_with(client, self.address, &self.server_name())
            .map_err(|error| self.unreachable(error.to_string()))
    }

    fn ended(
        &self,
        ended: Result<Result<Connection, ConnectionError>, JoinError>,
    ) -> Result<Connection> {
        let ended = ended.map_err(|error| self.unreachable(error.to_string()))?;
        ended.map_err(|error| self.failed(error))
    }

    /// Ends, with a sentence, when a server that has answered goes away before the handshake is over.
    async fn gone(&self, socket: &Listening) -> String {
        let mut before = None;
        let mut refusals = 0;
        while refusals < REFUSALS {
            sleep(SILENCE_TIMEOUT).await;
            let heard = socket.heard();
            let silent = heard.is_some() && heard == before;
            before = heard;
            let refused = silent
                && timeout(SILENCE_TIMEOUT, nobody_listens(self.address))
                    .await
                    .is_ok();
            refusals = if refused { refusals + 1 } else { 0 };
        }
        format!(
            "it answered and was gone before the handshake ended: nothing listens on port {} any more. Was it stopped?",
            self.address.port()
        )
    }

    /// The name in TLS: the host, or the address where the resolver knows a host by a name that TLS has no form for.
    fn server_name(&self) -> String {
        let bare = without_brackets(&self.host);
        match ServerName::try_from(bare) {
            Ok(_) => bare.to_owned(),
            Err(_) => self.address.ip().to_string(),
        }
    }

    fn unreachable(&self, why: impl Into<PeerText>) -> Error {
        Error::Unreachable {
            host: self.host.as_str().into(),
            address: self.address,
            why: why.into(),
        }
    }

    fn failed(&self, error: ConnectionError) -> Error {
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
            ConnectionError::ApplicationClosed(close) => closed(&close),
            ConnectionError::ConnectionClosed(_) if code == Some(TransportErrorCode::CONNECTION_REFUSED) => {
                self.unreachable("the server is full; try again later")
            }
            ConnectionError::ConnectionClosed(_) if code == Some(TransportErrorCode::APPLICATION_ERROR) => {
                self.unreachable("it ended the connection in the middle of the handshake. Is the server being stopped?")
            }
            ConnectionError::VersionMismatch => self.unreachable("it speaks another version of QUIC"),
            ConnectionError::TransportError(e) if is_tls(e.code) => {
                Error::NotTrusted {
                    host: self.verifier.host().into(),
                    why: e.reason.into(),
                }
            }
            error => self.unreachable(error.to_string()),
        }
    }
}

/// What is known when the time for a handshake is up, by when something was last heard.
fn unfinished(heard: Option<Instant>) -> String {
    match heard.map(|heard| heard.elapsed()) {
        None => "nothing answers".into(),
        Some(silence) if silence >= RESET_RETRY_TIMEOUT => format!(
            "something answered, but nothing came in the last {} s and the handshake did not end in time. Was the server \
             stopped, or the network cut?",
            silence.as_secs()
        ),
        Some(_) => {
            "something answers, but the handshake did not end in time. Does the network lose most of it, or has the \
                    server too much to do?"
                .into()
        }
    }
}

/// CRYPTO_ERROR: a TLS alert (RFC 9001, section 4.8).
fn is_tls(code: TransportErrorCode) -> bool {
    (0x100..0x200).contains(&u64::from(code))
}

fn unspecified(like: SocketAddr) -> SocketAddr {
    match like {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// Ends, with a sentence, only when the system tells that nothing can be reached at an address.
///
/// quinn's socket is not connected and so never learns of ICMP's "port unreachable". A connected one does.
async fn refusal(address: SocketAddr) -> String {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable, PermissionDenied};
    let error = probe(address).await;
    match error.kind() {
        ConnectionRefused => format!(
            "nothing listens there: is `haul serve` running, and on port {}?",
            address.port()
        ),
        HostUnreachable | NetworkUnreachable | PermissionDenied => error.to_string(),
        // Out of descriptors, say: that tells nothing of the server.
        _ => pending().await,
    }
}

/// Ends only when the system tells that no process has this port of its host.
pub async fn nobody_listens(address: SocketAddr) {
    if probe(address).await.kind() != io::ErrorKind::ConnectionRefused {
        pending().await
    }
}

/// Ends with what the system says against reaching an address.
async fn probe(address: SocketAddr) -> io::Error {
    let probe = async || -> io::Result<Infallible> {
        let socket = UdpSocket::bind(unspecified(address)).await?;
        socket.connect(address).await?;
        socket.send(&PROBE).await?;
        loop {
            // An answer to the probe is none of our business.
            socket.recv(&mut [0]).await?;
        }
    };
    let Err(error) = probe().await;
    error
}

/// Goes on from another UDP port (RFC 9000, section 9.3.1): for a way through the network that was forgotten there, such
/// as a NAT's. Connections stay, and packets that still come to the old port are taken.
///
/// # Errors
/// [`Error::Io`] when the system gives no port; then everything stays as it was.
pub fn rebind(endpoint: &quinn::Endpoint, remote: SocketAddr) -> Result<()> {
    let unspecified = unspecified(remote);
    endpoint
        .rebind(udp_socket(unspecified)?)
        .map_err(Error::io(format!(
            "cannot open a UDP socket on {unspecified}"
        )))
}

/// A socket that notes when something last came back from where we connect to.
#[derive(Debug)]
struct Listening {
    inner: Arc<dyn AsyncUdpSocket>,
    from: SocketAddr,
    heard: Mutex<Option<Instant>>,
}

impl Listening {
    fn heard(&self) -> Option<Instant> {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsyncUdpSocket for Listening {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let received = ready!(self.inner.poll_recv(cx, bufs, meta))?;
        let heard = bufs.iter().zip(&meta[..received]).any(|(packet, meta)| {
            let from_there =
                (meta.addr.ip(), meta.addr.port()) == (self.from.ip(), self.from.port());
            from_there && packet.first().is_some_and(|first| first & LONG_HEADER != 0)
        });
        // Packets after the handshake have a short header.
        if heard {
            *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        Poll::Ready(Ok(received))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_get_their_turn() {
        let list = |text: &str| -> Vec<SocketAddr> {
            text.split(' ').map(|a| a.parse().unwrap()).collect()
        };
        let found = list("[::1]:1 [::2]:1 [::3]:1 1.1.1.1:1");
        assert_eq!(interleave(found), list("[::1]:1 1.1.1.1:1 [::2]:1 [::3]:1"));
        let found = list("1.1.1.1:1 [::1]:1 [::2]:1");
        assert_eq!(interleave(found), list("1.1.1.1:1 [::1]:1 [::2]:1"));
        assert_eq!(interleave(vec![]), []);
    }

    #[tokio::test]
    async fn dead_addresses_of_a_relay_hold_up_no_live_one() {
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let config = Config {
            first_reply: Duration::from_secs(600),
            ..Config::default()
        };
        let relay =
            crate::net::endpoint::relay_server_config(&Identity::generate().unwrap(), &config);
        let relay = quinn::Endpoint::server(relay.unwrap(), loopback).unwrap();
        let silent = [(); 2].map(|()| std::net::UdpSocket::bind(loopback).unwrap());
        let mut addresses: VecDeque<_> = silent.iter().map(|s| s.local_addr().unwrap()).collect();
        addresses.push_back(relay.local_addr().unwrap());
        let accepted = tokio::spawn(async move { relay.accept().await.unwrap().await });
        let endpoint = quinn::Endpoint::client(loopback).unwrap();
        let trust = ServerTrust {
            by_code: true,
            ..ServerTrust::default()
        };
        let connected = connect_relay_at(&endpoint, &trust, ("relay", 1), addresses, &config);
        let connected = timeout(Duration::from_secs(60), connected).await;
        connected.expect("it waits for the dead").unwrap();
        accepted.await.unwrap().unwrap();
    }
}
