//! From identity, trust and limits to QUIC endpoints and connections.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{AckFrequencyConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig};
use quinn_proto::HashedConnectionIdGenerator;
use rustls::pki_types::CertificateDer;
use rustls::version::TLS13;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::{sleep, timeout};

use crate::auth::identity::{Identity, KeyId, provider};
use crate::auth::trust::{ClientVerifier, ServerVerifier};
use crate::config::Config;
use crate::error::{Code, Error, Reason, Result};
use crate::net::qlog::Role;
use crate::protocol::{ALPN, RELAY_ALPN};

/// Streams that a peer may have open at the same time: a thousand transfers, since at 100 ms 1,000 streams carry 2,400
/// small files a second and 100 only 450; and room for control and manifest of some sessions.
pub const MAX_STREAMS: u32 = 1_100;
/// Bytes that a peer may send on a new connection before it is admitted. It is raised then with
/// `Connection::set_receive_window`, within the budget of all connections.
pub const INITIAL_WINDOW: u32 = 64 << 10;
/// Window of a single stream in bytes: as good as none. What is bounded is the connection.
const STREAM_WINDOW: u32 = u32::MAX;
/// Largest UDP payload in bytes that is probed for and taken. Above 6,550, ten segments of one GSO batch are over
/// 64 KiB, and quinn falls back to single packets.
pub(crate) const MAX_DATAGRAM: u16 = 6_500;
/// The UDP payload that every path of QUIC carries (RFC 9000, section 14); discovery goes up from here.
const INITIAL_DATAGRAM: u16 = 1_200;
/// Handshakes that wait for the server to take or refuse them.
const MAX_INCOMING: usize = 1_024;
/// Bytes kept for one handshake that waits, and for all of them: a ClientHello with its ML-KEM share takes two
/// datagrams, and what does not fit is sent again.
const INCOMING_BUFFER: u64 = 16 << 10;
const INCOMING_BUFFERS: u64 = 4 << 20;
/// How many packets later ones must have overtaken one before it counts as lost. So many that time alone decides: with
/// RFC 9002's 3, 5 ms of jitter leave 11 of 100 Mbit/s.
const PACKET_THRESHOLD: u32 = 1_000;
/// How long after its sending a packet that later ones have overtaken counts as lost, in round-trip times. RFC 9002 has
/// 9/8; reordering by a quarter of the RTT is not lost then, and as each piece is written where it belongs, nothing
/// waits for the lost ones.
const TIME_THRESHOLD: f32 = 1.25;
/// Round-trip time that is assumed before one is measured. It decides when a handshake's first packets are sent again: after
/// three times that. RFC 9002, section 6.2.2, recommends 333 ms; with it each loss in a handshake costs a second, and at 5 %
/// each way one handshake in four has one. On a longer path some 2 KB are sent twice.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// Packets that the receiver takes before it acknowledges, where it would each second one: on a way back that carries a
/// hundredth of the way there, as on ADSL or by satellite, those alone fill it: 100 Mbit/s carried 37 of file, and now 89.
const ACK_PACKETS: u32 = 6;
/// How long the receiver may wait for that many. RFC 9000 has 25 ms; as the controller looks at delays, a fifth of that.
const ACK_DELAY: Duration = Duration::from_millis(5);
/// How many packets may be missing before one that comes out of order is acknowledged at once: any, since time alone decides
/// what is lost. Otherwise a lossy path has an acknowledgement for each packet.
const ACK_REORDERED: u32 = 0;
/// Asked of the system for each direction, in bytes: 30 ms of 1 Gbit/s. Linux gives 208 KiB by default and at most
/// `net.core.rmem_max`.
const SOCKET_BUFFER: usize = 4 << 20;

/// How long closing waits for its last packet to go out.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// How often it looks.
const CLOSE_INTERVAL: Duration = Duration::from_millis(2);

/// What a connection keeps until it is acknowledged, in bytes, before upkeep fits it to the path.
pub(crate) const FIRST_SEND_WINDOW: usize = 1 << 20;

/// What a server needs to listen. Every client that holds the key of its certificate comes through the handshake; ask
/// [`Admission::judge`](crate::auth::Admission::judge) next. It is not traced: each
/// connection has a trace of its own, which the server gives it as it accepts.
///
/// # Errors
/// [`Error::Usage`] when key, certificate or limits cannot be used.
pub fn server_config(identity: &Identity, config: &Config) -> Result<quinn::ServerConfig> {
    let mut tls = server_tls(identity)?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    accepting(tls, config)
}

fn accepting(mut tls: rustls::ServerConfig, config: &Config) -> Result<quinn::ServerConfig> {
    // No resumption, so that each connection proves its key anew; and no 0-RTT, which anybody can replay.
    tls.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    tls.max_early_data_size = 0;
    let crypto = QuicServerConfig::try_from(tls).map_err(unusable)?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    server
        .transport_config(Arc::new(transport(config)?))
        .migration(true)
        .max_incoming(MAX_INCOMING)
        .incoming_buffer_size(INCOMING_BUFFER)
        .incoming_buffer_size_total(INCOMING_BUFFERS);
    Ok(server)
}

/// What a relay needs to listen: it asks nobody for a key.
///
/// # Errors
/// As [`server_config`].
pub(crate) fn relay_server_config(
    identity: &Identity,
    config: &Config,
) -> Result<quinn::ServerConfig> {
    let mut tls = rustls::ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])
        .and_then(|b| {
            b.with_no_client_auth()
                .with_single_cert(identity.chain().to_vec(), identity.private_key())
        })
        .map_err(unusable)?;
    tls.alpn_protocols = vec![RELAY_ALPN.to_vec()];
    accepting(tls, config)
}

/// The same server for one connection, which is traced if [`Config::qlog`] says so; it takes no second one.
///
/// # Errors
/// As [`server_config`].
pub(crate) fn traced(
    server: &quinn::ServerConfig,
    config: &Config,
) -> Result<Arc<quinn::ServerConfig>> {
    let mut server = server.clone();
    let mut transport = transport(config)?;
    record(&mut transport, config, Role::Server);
    server.transport_config(Arc::new(transport));
    Ok(Arc::new(server))
}

#[cfg_attr(
    not(feature = "qlog"),
    expect(unused_variables, reason = "qlog::prepare has refused")
)]
fn record(transport: &mut TransportConfig, config: &Config, role: Role) {
    #[cfg(feature = "qlog")]
    if let Some(directory) = &config.qlog {
        crate::net::qlog::record(transport, directory, role);
    }
}

/// What a client needs to connect to the host that the verifier is for; once, where [`Config::qlog`] asks for a trace.
///
/// # Errors
/// [`Error::Usage`] when key, certificate or limits cannot be used.
pub fn client_config(
    identity: &Identity,
    verifier: Arc<ServerVerifier>,
    config: &Config,
) -> Result<quinn::ClientConfig> {
    dialing(client_tls(Some(identity), verifier, ALPN)?, config)
}

/// What either end needs to connect to a relay, which learns no key of it.
///
/// # Errors
/// As [`client_config`].
pub(super) fn relay_client_config(
    verifier: Arc<ServerVerifier>,
    config: &Config,
) -> Result<quinn::ClientConfig> {
    dialing(client_tls(None, verifier, RELAY_ALPN)?, config)
}

fn dialing(tls: rustls::ClientConfig, config: &Config) -> Result<quinn::ClientConfig> {
    let crypto = QuicClientConfig::try_from(tls).map_err(unusable)?;
    let mut client = quinn::ClientConfig::new(Arc::new(crypto));
    let mut transport = transport(config)?;
    transport.keep_alive_interval(Some(config.keep_alive));
    record(&mut transport, config, Role::Client);
    client.transport_config(Arc::new(transport));
    Ok(client)
}

fn server_tls(identity: &Identity) -> Result<rustls::ServerConfig> {
    rustls::ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])
        .and_then(|b| {
            b.with_client_cert_verifier(Arc::new(ClientVerifier))
                .with_single_cert(identity.chain().to_vec(), identity.private_key())
        })
        .map_err(unusable)
}

fn client_tls(
    identity: Option<&Identity>,
    verifier: Arc<ServerVerifier>,
    alpn: &[u8],
) -> Result<rustls::ClientConfig> {
    let builder = rustls::ClientConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut tls = match identity {
        Some(identity) => builder
            .with_client_auth_cert(identity.chain().to_vec(), identity.private_key())
            .map_err(unusable)?,
        None => builder.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![alpn.to_vec()];
    tls.resumption = rustls::client::Resumption::disabled();
    tls.enable_early_data = false;
    Ok(tls)
}

fn unusable(error: impl std::fmt::Display) -> Error {
    Error::Usage(format!("key and certificate cannot be used: {error}"))
}

fn transport(config: &Config) -> Result<TransportConfig> {
    let idle = IdleTimeout::try_from(config.idle_timeout).map_err(|_| {
        Error::Usage(format!(
            "an idle timeout of {:?} is too long",
            config.idle_timeout
        ))
    })?;
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_DATAGRAM);
    let mut acknowledgements = AckFrequencyConfig::default();
    acknowledgements
        .ack_eliciting_threshold(ACK_PACKETS.into())
        .max_ack_delay(Some(ACK_DELAY))
        .reordering_threshold(ACK_REORDERED.into());
    let mut transport = TransportConfig::default();
    transport
        .ack_frequency_config(Some(acknowledgements))
        .max_concurrent_bidi_streams(MAX_STREAMS.into())
        .max_concurrent_uni_streams(0_u8.into())
        .datagram_receive_buffer_size(None)
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(INITIAL_WINDOW.into())
        .send_window(config.limited_send_window().min(FIRST_SEND_WINDOW) as u64)
        .max_idle_timeout(Some(idle))
        .initial_rtt(INITIAL_RTT)
        .initial_mtu(INITIAL_DATAGRAM)
        .min_mtu(INITIAL_DATAGRAM)
        .mtu_discovery_config(Some(mtu))
        .packet_threshold(PACKET_THRESHOLD)
        .time_threshold(TIME_THRESHOLD)
        .congestion_controller_factory(config.congestion.factory());
    Ok(transport)
}

/// Opens a UDP port, as a server when `server` is given. `[::]` takes IPv4 too; on a machine without IPv6 it becomes
/// `0.0.0.0`.
///
/// # Errors
/// [`Error::Io`] naming the address when the system refuses, or when this is called outside of a tokio runtime.
pub fn bind(address: SocketAddr, server: Option<quinn::ServerConfig>) -> Result<quinn::Endpoint> {
    let socket = udp_socket(address)?;
    quinn::Endpoint::new(endpoint_config(), server, socket, runtime()?)
        .map_err(Error::io(format!("cannot open UDP {address}")))
}

/// A UDP port with an endpoint on it, beside which single datagrams can be sent from it.
#[derive(Debug, Clone)]
pub struct Port {
    /// The endpoint. It alone receives.
    pub endpoint: quinn::Endpoint,
    beside: Arc<std::net::UdpSocket>,
}

impl Port {
    /// Opens a UDP port as a server that, when it is started anew on the same address, tells the clients of before that their
    /// connections are gone: by stateless resets (RFC 9000, section 10.3.2), whose key comes from the server's own.
    ///
    /// # Errors
    /// As [`bind`].
    pub fn listening(
        address: SocketAddr,
        identity: &Identity,
        server: quinn::ServerConfig,
    ) -> Result<Self> {
        let socket = udp_socket(address)?;
        let local = socket
            .local_addr()
            .map_err(Error::io(format!("cannot open UDP {address}")))?;
        Self::on(socket, resetting(identity, local), Some(server))
    }

    /// Opens a UDP port for a client.
    ///
    /// # Errors
    /// As [`bind`].
    pub fn dialing(address: SocketAddr) -> Result<Self> {
        Self::on(udp_socket(address)?, endpoint_config(), None)
    }

    fn on(
        socket: std::net::UdpSocket,
        config: EndpointConfig,
        server: Option<quinn::ServerConfig>,
    ) -> Result<Self> {
        let failed = || Error::io("cannot open an endpoint on a UDP socket");
        let beside = Arc::new(socket.try_clone().map_err(failed())?);
        let endpoint = quinn::Endpoint::new(config, server, socket, runtime()?).map_err(failed())?;
        Ok(Self { endpoint, beside })
    }

    /// Sends a datagram from this port. Like any datagram, it may be lost, also because the system has no room for it now.
    pub fn send(&self, datagram: &[u8], to: SocketAddr) {
        let is_ipv6 = self.beside.local_addr().is_ok_and(|local| local.is_ipv6());
        let to = match to {
            SocketAddr::V4(v4) if is_ipv6 => {
                SocketAddr::from((v4.ip().to_ipv6_mapped(), v4.port()))
            }
            other => other,
        };
        if let Err(error) = self.beside.send_to(datagram, to) {
            tracing::trace!(%to, %error, "a datagram could not be sent");
        }
    }
}

/// Whoever learned a connection's id could have a second endpoint of the same key reset it (RFC 9000, section 21.11): so
/// each address has a key of its own.
fn resetting(identity: &Identity, address: SocketAddr) -> EndpointConfig {
    let key = identity.private_key();
    let derive = |context: &str| {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        hasher
            .update(address.to_string().as_bytes())
            .update(b" ")
            .update(key.secret_der());
        *hasher.finalize().as_bytes()
    };
    let tokens = hmac::Key::new(
        hmac::HMAC_SHA256,
        &derive("haul 2025-06 stateless reset tokens"),
    );
    let [a, b, c, d, e, f, g, h, ..] = derive("haul 2025-06 connection ids");
    let ids = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let mut config = EndpointConfig::new(Arc::new(tokens));
    // Random ids of before would look forged to the next process, and be dropped without a word.
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
    limited(config)
}

pub(super) fn endpoint_config() -> EndpointConfig {
    limited(EndpointConfig::default())
}

fn limited(mut config: EndpointConfig) -> EndpointConfig {
    config
        .max_udp_payload_size(MAX_DATAGRAM)
        .expect("MAX_DATAGRAM is within QUIC's limits");
    config
}

pub(super) fn runtime() -> Result<Arc<dyn quinn::Runtime>> {
    quinn::default_runtime().ok_or_else(|| {
        Error::io("cannot open an endpoint")(io::Error::other("no tokio runtime is running"))
    })
}

/// A UDP socket on an address, with buffers for much traffic. `[::]` takes IPv4 too.
pub(crate) fn udp_socket(address: SocketAddr) -> Result<std::net::UdpSocket> {
    use io::ErrorKind::{AddrInUse, AddrNotAvailable, Unsupported};
    let any_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
    match open_socket(address) {
        Err(e)
            if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
                && (matches!(e.kind(), AddrNotAvailable | Unsupported) || is_no_ipv6(&e)) =>
        {
            tracing::debug!("no IPv6 here ({e}): {any_v4} instead of {address}");
            open_socket(any_v4)
        }
        socket => socket,
    }
    .map_err(|e| match e.kind() {
        AddrInUse => Error::io(format!(
            "cannot listen on {address}: another server may be running on this port; choose another with --listen"
        ))(e),
        _ => Error::io(format!("cannot open UDP {address}"))(e),
    })
}

fn is_no_ipv6(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
}

fn open_socket(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    let asked = socket
        .set_recv_buffer_size(SOCKET_BUFFER)
        .and(socket.set_send_buffer_size(SOCKET_BUFFER));
    socket.bind(&address.into())?;
    let receive = socket.recv_buffer_size()?;
    let send = socket.send_buffer_size()?;
    tracing::debug!(%address, receive, send, ?asked, "socket buffers granted, in bytes; {SOCKET_BUFFER} were asked for");
    Ok(socket.into())
}

/// The peer's key id and certificates, own one first. TLS has verified that it holds the key. `None` before the
/// handshake is over.
pub fn peer(connection: &quinn::Connection) -> Option<(KeyId, Vec<CertificateDer<'static>>)> {
    let chain = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    let key_id = KeyId::of_certificate(chain.first()?).ok()?;
    Some((key_id, *chain))
}

/// Closes a connection, and waits until that has gone out, for a second at most.
pub(crate) async fn goodbye(
    endpoint: &quinn::Endpoint,
    connection: &quinn::Connection,
    code: Code,
) {
    let sent = || connection.stats().udp_tx.datagrams;
    let before = sent();
    connection.close(code.number().into(), b"");
    let gone = async {
        // Waiting for quinn to be idle would take three timeouts more (RFC 9000, section 10.2), 0.4 s at 100 ms.
        while sent() == before {
            sleep(CLOSE_INTERVAL).await;
        }
        // It is counted when it is made, and sent right after.
        sleep(CLOSE_INTERVAL).await;
    };
    let _ = timeout(CLOSE_TIMEOUT, async {
        tokio::select! {
            () = gone => {}
            () = endpoint.wait_idle() => {}
        }
    })
    .await;
}

/// What a peer meant by closing the connection with a [`Code`] of ours.
pub fn closed(close: &quinn::ApplicationClose) -> Error {
    let code = Code::from_number(u32::try_from(close.error_code.into_inner()).unwrap_or(u32::MAX));
    Reason::new(code, String::from_utf8_lossy(&close.reason)).into()
}
