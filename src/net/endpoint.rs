//! Builds QUIC endpoints and connection settings from identity, trust and limits.
//! It is longer than 400 lines because it keeps all settings of QUIC in one place.

mod relay;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{AckFrequencyConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig};
use quinn_proto::HashedConnectionIdGenerator;
use rustls::pki_types::CertificateDer;
use rustls::server::danger::ClientCertVerifier;
use rustls::version::TLS13;
use tokio::time::{sleep, timeout};

use crate::auth::identity::{Identity, KeyId, provider};
use crate::auth::trust::{ClientVerifier, ServerVerifier};
use crate::config::Config;
use crate::error::{Code, Error, Result};
use crate::net::amplification::{LimitedSocket, Unproven, UnprovenAddresses};
use crate::net::qlog::Role;
use crate::net::socket::udp_socket;
use crate::protocol::{ALPN, RELAY_ALPN};

pub(crate) use relay::{RELAY_STREAMS, relay_server_config};

/// Streams that a peer may have open at the same time: 1,000 transfers, and room for the control and manifest streams
/// of some sessions. At 100 ms, 1,000 streams carry 2,400 small files a second, and 100 only 450.
pub const MAX_STREAMS: u32 = 1_100;
/// Streams that a client may open before it is admitted: some sessions, which it begins with its handshake. quinn allocates
/// every permitted stream, and 1,100 take 90 KB for each connection.
const HANDSHAKE_STREAMS: u32 = 16;
/// Receive window in bytes of a new connection until the peer is admitted. Then
/// [`FlowControl`](crate::net::flow_control::FlowControl) raises it, within the memory limit of all connections.
pub const INITIAL_WINDOW: u32 = 64 << 10;
/// Receive window of a single stream, in bytes: unlimited, since the connection's window is the limit.
const STREAM_WINDOW: u32 = u32::MAX;
/// Largest UDP payload in bytes that is probed for and received. Above 6,550, ten segments of one GSO batch exceed 64
/// KiB, and quinn falls back to single packets.
pub(crate) const MAX_DATAGRAM_SIZE: u16 = 6_500;
/// UDP payload in bytes that every QUIC path carries (RFC 9000, section 14). MTU discovery starts here.
const INITIAL_DATAGRAM_SIZE: u16 = 1_200;
/// Limit of handshakes that wait for the server to accept or refuse them.
const MAX_INCOMING: usize = 1_024;
/// Bytes buffered for one waiting handshake: a ClientHello with its ML-KEM share takes two datagrams, and the client
/// sends again what does not fit.
const INCOMING_BUFFER_SIZE: u64 = 16 << 10;
/// Bytes buffered for all waiting handshakes.
const TOTAL_INCOMING_BUFFER_SIZE: u64 = 4 << 20;
/// Packets sent later that must be acknowledged before a packet counts as lost. The value is so high that time alone
/// decides: with RFC 9002's 3, 5 ms of jitter leave 11 of 100 Mbit/s.
const PACKET_THRESHOLD: u32 = 1_000;
/// Round-trip times after which an overtaken packet counts as lost. RFC 9002 has 9/8. With 1.25, reordering by a
/// quarter of the RTT is no loss; waiting costs little, since each piece is written at its own offset.
const TIME_THRESHOLD: f32 = 1.25;
/// Round-trip time assumed before one is measured; the first handshake packets are sent again after three times that.
/// RFC 9002, section 6.2.2, recommends 333 ms; then each loss in a handshake costs a second, and at 5 % each way one
/// handshake in four has one. On a longer path some 2 KB are sent twice.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// Packets that the receiver takes before it acknowledges; QUIC's default is two. Where the return path has a
/// hundredth of the bandwidth, as on ADSL or by satellite, so many ACKs fill it: 100 Mbit/s carried 37 of file, and
/// 89 with this value.
const ACK_ELICITING_THRESHOLD: u32 = 6;
/// Longest time that the receiver may delay an ACK. RFC 9000 has 25 ms; since the controller measures delays, it is a
/// fifth of that.
const MAX_ACK_DELAY: Duration = Duration::from_millis(5);
/// Missing packets at which the receiver acknowledges at once; 0 is never, since time alone decides what is lost.
/// Otherwise a lossy path has one ACK for each packet.
const ACK_REORDERING_THRESHOLD: u32 = 0;

/// Time that a close waits for its last packet to be sent.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval at which a close checks whether its packet was sent.
const CLOSE_INTERVAL: Duration = Duration::from_millis(2);

/// Send window in bytes before [`SendWindow`](crate::net::send_window::SendWindow) fits it to the path.
pub(crate) const INITIAL_SEND_WINDOW: usize = 1 << 20;

/// Configures a listening server. The handshake accepts every client that holds the key of its certificate; check its
/// rights with [`Admission::rights_of`](crate::auth::Admission::rights_of) next. This configuration is not traced:
/// `with_qlog` adds a trace for each connection.
///
/// # Errors
/// [`Error::Usage`] when key, certificate or limits cannot be used.
pub fn server_config(identity: &Identity, config: &Config) -> Result<quinn::ServerConfig> {
    let mut tls = server_tls(identity, Arc::new(ClientVerifier))?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    listening_config(tls, server_transport(config)?)
}

fn listening_config(
    mut tls: rustls::ServerConfig,
    transport: TransportConfig,
) -> Result<quinn::ServerConfig> {
    // No resumption, so that each connection proves its key again, and no 0-RTT, which anyone can replay.
    tls.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    tls.max_early_data_size = 0;
    let crypto = QuicServerConfig::try_from(tls).map_err(unusable)?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    server
        .transport_config(Arc::new(transport))
        .migration(true)
        .max_incoming(MAX_INCOMING)
        .incoming_buffer_size(INCOMING_BUFFER_SIZE)
        .incoming_buffer_size_total(TOTAL_INCOMING_BUFFER_SIZE);
    Ok(server)
}

/// Configures one accepted connection, traced if [`Config::qlog`] is set. Do not use it for a second one. Fails as
/// [`server_config`].
pub(crate) fn with_qlog(
    server: &quinn::ServerConfig,
    config: &Config,
) -> Result<Arc<quinn::ServerConfig>> {
    let mut server = server.clone();
    let mut transport = server_transport(config)?;
    add_qlog(&mut transport, config, Role::Server);
    server.transport_config(Arc::new(transport));
    Ok(Arc::new(server))
}

#[cfg_attr(
    not(feature = "qlog"),
    expect(unused_variables, reason = "qlog::prepare has refused")
)]
fn add_qlog(transport: &mut TransportConfig, config: &Config, role: Role) {
    #[cfg(feature = "qlog")]
    if let Some(directory) = &config.qlog {
        crate::net::qlog::record(transport, directory, role);
    }
}

/// Configures a client's connection to the host of the verifier. With [`Config::qlog`], use it for one connection
/// only.
///
/// # Errors
/// [`Error::Usage`] when key, certificate or limits cannot be used.
pub fn client_config(
    identity: &Identity,
    verifier: Arc<ServerVerifier>,
    config: &Config,
) -> Result<quinn::ClientConfig> {
    connecting_config(client_tls(Some(identity), verifier, ALPN)?, config)
}

/// Configures a connection to a relay, which does not learn this end's key. Fails as [`client_config`].
pub(super) fn relay_client_config(
    verifier: Arc<ServerVerifier>,
    config: &Config,
) -> Result<quinn::ClientConfig> {
    connecting_config(client_tls(None, verifier, RELAY_ALPN)?, config)
}

fn connecting_config(tls: rustls::ClientConfig, config: &Config) -> Result<quinn::ClientConfig> {
    let crypto = QuicClientConfig::try_from(tls).map_err(unusable)?;
    let mut client = quinn::ClientConfig::new(Arc::new(crypto));
    let mut transport = transport(config)?;
    transport.keep_alive_interval(Some(config.keep_alive));
    add_qlog(&mut transport, config, Role::Client);
    client.transport_config(Arc::new(transport));
    Ok(client)
}

fn server_tls(
    identity: &Identity,
    verifier: Arc<dyn ClientCertVerifier>,
) -> Result<rustls::ServerConfig> {
    rustls::ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])
        .and_then(|b| {
            b.with_client_cert_verifier(verifier)
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
    Error::Usage(format!("cannot use key and certificate: {error}"))
}

/// The settings of an accepted connection. It gets its [`MAX_STREAMS`] with its place.
fn server_transport(config: &Config) -> Result<TransportConfig> {
    let mut transport = transport(config)?;
    transport.max_concurrent_bidi_streams(HANDSHAKE_STREAMS.into());
    Ok(transport)
}

fn transport(config: &Config) -> Result<TransportConfig> {
    let idle = IdleTimeout::try_from(config.idle_timeout).map_err(|_| {
        Error::Usage(format!(
            "cannot use an idle timeout of {:?}: it is too long",
            config.idle_timeout
        ))
    })?;
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_DATAGRAM_SIZE);
    let mut acknowledgements = AckFrequencyConfig::default();
    acknowledgements
        .ack_eliciting_threshold(ACK_ELICITING_THRESHOLD.into())
        .max_ack_delay(Some(MAX_ACK_DELAY))
        .reordering_threshold(ACK_REORDERING_THRESHOLD.into());
    let mut transport = TransportConfig::default();
    transport
        .ack_frequency_config(Some(acknowledgements))
        .max_concurrent_bidi_streams(MAX_STREAMS.into())
        .max_concurrent_uni_streams(0_u8.into())
        .datagram_receive_buffer_size(None)
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(INITIAL_WINDOW.into())
        .send_window(config.limited_send_window().min(INITIAL_SEND_WINDOW) as u64)
        .max_idle_timeout(Some(idle))
        .initial_rtt(INITIAL_RTT)
        .initial_mtu(INITIAL_DATAGRAM_SIZE)
        .min_mtu(INITIAL_DATAGRAM_SIZE)
        .mtu_discovery_config(Some(mtu))
        .packet_threshold(PACKET_THRESHOLD)
        .time_threshold(TIME_THRESHOLD)
        .congestion_controller_factory(config.congestion.factory());
    Ok(transport)
}

/// Opens a UDP port, as a server if `server` is given. `[::]` includes IPv4; on a machine without IPv6 it becomes
/// `0.0.0.0`.
///
/// # Errors
/// [`Error::Io`] with the address when the system refuses, or outside of a tokio runtime.
pub fn bind(address: SocketAddr, server: Option<quinn::ServerConfig>) -> Result<quinn::Endpoint> {
    let socket = udp_socket(address)?;
    quinn::Endpoint::new(endpoint_config(), server, socket, runtime()?)
        .map_err(Error::io(format!("cannot open UDP {address}")))
}

/// A UDP port with an endpoint, from which single datagrams can be sent too.
#[derive(Debug, Clone)]
pub struct Port {
    /// The endpoint. It receives everything that arrives at the port.
    pub endpoint: quinn::Endpoint,
    raw_socket: Arc<std::net::UdpSocket>,
    /// The addresses to which the port sends little yet.
    unproven: Arc<UnprovenAddresses>,
}

impl Port {
    /// Opens a UDP port for a server. After a restart on the same address, it tells the previous clients by stateless
    /// resets that their connections are lost (RFC 9000, section 10.3.2). The reset key derives from the server's own
    /// key.
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
        Self::open(socket, reset_endpoint_config(identity, local), Some(server))
    }

    /// Opens a UDP port for a client.
    ///
    /// # Errors
    /// As [`bind`].
    pub fn dialing(address: SocketAddr) -> Result<Self> {
        Self::open(udp_socket(address)?, endpoint_config(), None)
    }

    fn open(
        socket: std::net::UdpSocket,
        config: EndpointConfig,
        server: Option<quinn::ServerConfig>,
    ) -> Result<Self> {
        let failed = || Error::io("cannot open an endpoint on a UDP socket");
        let raw_socket = Arc::new(socket.try_clone().map_err(failed())?);
        let runtime = runtime()?;
        let unproven = UnprovenAddresses::new();
        let socket = runtime.wrap_udp_socket(socket).map_err(failed())?;
        let socket = LimitedSocket::new(socket, unproven.clone());
        let endpoint = quinn::Endpoint::new_with_abstract_socket(config, server, socket, runtime);
        Ok(Self {
            endpoint: endpoint.map_err(failed())?,
            raw_socket,
            unproven,
        })
    }

    /// Limits what is sent to an address from which a handshake came, until its address is proven; `None` if it cannot be
    /// limited now.
    pub(crate) fn limit(&self, address: SocketAddr) -> Option<Unproven> {
        self.unproven.limit(address)
    }

    /// Sends a datagram from this port. It may be lost, also because the system's buffer is full.
    pub fn send(&self, datagram: &[u8], to: SocketAddr) {
        let is_ipv6 = self
            .raw_socket
            .local_addr()
            .is_ok_and(|local| local.is_ipv6());
        let to = match to {
            SocketAddr::V4(v4) if is_ipv6 => {
                SocketAddr::from((v4.ip().to_ipv6_mapped(), v4.port()))
            }
            other => other,
        };
        if let Err(error) = self.raw_socket.send_to(datagram, to) {
            tracing::trace!(%to, %error, "cannot send a datagram");
        }
    }
}

/// Derives a reset key for each address: with one key for several endpoints, an attacker who knows a connection id
/// could use one endpoint to reset the connections of another (RFC 9000, section 21.11).
fn reset_endpoint_config(identity: &Identity, address: SocketAddr) -> EndpointConfig {
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
    // Connection ids are keyed: the next process would take random ones for forged, and drop their packets silently.
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
    limit_payload(config)
}

pub(super) fn endpoint_config() -> EndpointConfig {
    limit_payload(EndpointConfig::default())
}

fn limit_payload(mut config: EndpointConfig) -> EndpointConfig {
    config
        .max_udp_payload_size(MAX_DATAGRAM_SIZE)
        .expect("MAX_DATAGRAM_SIZE is within QUIC's limits");
    config
}

pub(super) fn runtime() -> Result<Arc<dyn quinn::Runtime>> {
    quinn::default_runtime().ok_or_else(|| {
        Error::io("cannot open an endpoint")(io::Error::other("no tokio runtime is running"))
    })
}

/// Returns the peer's key id and certificates, its own certificate first. TLS has verified that the peer holds the
/// key. `None` before the handshake has ended.
pub fn peer(connection: &quinn::Connection) -> Option<(KeyId, Vec<CertificateDer<'static>>)> {
    let chain = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    let key_id = KeyId::of_certificate(chain.first()?).ok()?;
    Some((key_id, *chain))
}

/// Closes a connection, and waits until the close was sent, for up to a second.
pub(crate) async fn close_and_flush(
    endpoint: &quinn::Endpoint,
    connection: &quinn::Connection,
    code: Code,
) {
    let datagrams_sent = || connection.stats().udp_tx.datagrams;
    let before = datagrams_sent();
    connection.close(code.number().into(), b"");
    let flushed = async {
        // Waiting for quinn to be idle would take three more timeouts (RFC 9000, section 10.2), 0.4 s at 100 ms.
        while datagrams_sent() == before {
            sleep(CLOSE_INTERVAL).await;
        }
        // quinn counts a packet when it builds it, just before it sends it.
        sleep(CLOSE_INTERVAL).await;
    };
    let _ = timeout(CLOSE_TIMEOUT, async {
        tokio::select! {
            () = flushed => {}
            () = endpoint.wait_idle() => {}
        }
    })
    .await;
}
