//! Which peers are admitted, over real sockets on loopback: every way to be the right peer, and every way not to be.

#[allow(dead_code, reason = "its main is for `cargo run --example`")]
#[path = "../../examples/team_certificates.rs"]
mod team_certificates;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::support::own_port;
use haul::internal::auth::trust::ClientVerifier;
use haul::internal::net::connect::{self, Connected};
use haul::internal::net::endpoint;
use haul::internal::protocol::ALPN;
use haul::{
    Admission, Anyone, Code, Config, Error, Home, Identity, KeyId, Reason, Result, ServerTrust,
    known_hosts,
};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionError, TransportErrorCode, VarInt};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tempfile::TempDir;

/// Nothing here takes long; a test that waits longer has failed.
const FAR: Duration = Duration::from_secs(600);
/// TLS alert certificate_required (RFC 8446, section 6.2).
const CERTIFICATE_REQUIRED: u8 = 116;
/// TLS alert decrypt_error: a signature that does not verify.
const DECRYPT_ERROR: u8 = 51;

/// A server on loopback that accepts every handshake and keeps its result.
struct Server {
    endpoint: quinn::Endpoint,
    address: SocketAddr,
    accepted: tokio::sync::mpsc::UnboundedReceiver<Result<quinn::Connection, ConnectionError>>,
}

impl Server {
    fn start(identity: &Identity) -> Self {
        Self::with(endpoint::server_config(identity, &Config::default()).unwrap())
    }

    fn with(config: quinn::ServerConfig) -> Self {
        let endpoint = endpoint::bind("127.0.0.1:0".parse().unwrap(), Some(config)).unwrap();
        let address = endpoint.local_addr().unwrap();
        let (send, accepted) = tokio::sync::mpsc::unbounded_channel();
        let accepting = endpoint.clone();
        tokio::spawn(async move {
            while let Some(incoming) = accepting.accept().await {
                let _ = send.send(incoming.await);
            }
        });
        Self {
            endpoint,
            address,
            accepted,
        }
    }

    /// A server with a TLS configuration of its own, for wrong ones.
    fn with_tls(tls: rustls::ServerConfig) -> Self {
        Self::with(quinn::ServerConfig::with_crypto(Arc::new(
            QuicServerConfig::try_from(tls).unwrap(),
        )))
    }

    async fn next(&mut self) -> Result<quinn::Connection, ConnectionError> {
        soon(self.accepted.recv()).await.unwrap()
    }

    async fn connect(&self, client: &Identity, trust: &ServerTrust) -> Result<Connected> {
        let (host, port) = (self.address.ip().to_string(), self.address.port());
        soon(connect::connect(
            client,
            trust,
            &host,
            port,
            &Config::default(),
        ))
        .await
    }
}

/// Connects a new client to a server.
async fn dial(host: &str, port: u16, trust: ServerTrust, config: Config) -> Result<Connected> {
    soon(connect::connect(&new(), &trust, host, port, &config)).await
}

/// Fails a test that would hang.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future)
        .await
        .expect("it hangs")
}

fn new() -> Identity {
    Identity::generate().unwrap()
}

fn pin(identity: &Identity) -> ServerTrust {
    ServerTrust {
        pin: Some(identity.key_id()),
        ..ServerTrust::default()
    }
}

fn known_hosts_in(directory: &TempDir) -> (PathBuf, ServerTrust) {
    let file = directory.path().join("known_hosts");
    (
        file.clone(),
        ServerTrust {
            known_hosts: Some(file),
            ..ServerTrust::default()
        },
    )
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The certificates of one and the key of another.
fn impostor(shown: &Identity, held: &Identity) -> Arc<SingleCertAndKey> {
    let key = provider()
        .key_provider
        .load_private_key(held.private_key())
        .unwrap();
    Arc::new(CertifiedKey::new(shown.chain().to_vec(), key).into())
}

fn server_tls() -> rustls::ConfigBuilder<rustls::ServerConfig, rustls::server::WantsServerCert> {
    rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(Arc::new(ClientVerifier))
}

fn client_tls(
    server: &Identity,
) -> rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert> {
    rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(pin(server).verifier("127.0.0.1", 1).unwrap())
}

/// Connects with a TLS configuration of its own. The client of TLS 1.3 may finish before the server refuses it.
async fn raw(
    server: &Server,
    mut tls: rustls::ClientConfig,
) -> Result<quinn::Connection, ConnectionError> {
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let client = endpoint::bind("127.0.0.1:0".parse().unwrap(), None).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    soon(
        client
            .connect_with(config, server.address, "127.0.0.1")
            .unwrap(),
    )
    .await
}

/// Returns the error of a client that the server refuses in the handshake.
async fn refused(server: &mut Server, tls: rustls::ClientConfig) -> TransportErrorCode {
    let ended = match raw(server, tls).await {
        Ok(connection) => soon(connection.closed()).await,
        Err(e) => e,
    };
    assert!(server.next().await.is_err(), "the server took it");
    let ConnectionError::ConnectionClosed(close) = ended else {
        panic!("{ended}")
    };
    close.error_code
}

#[tokio::test]
async fn a_pin_admits_only_its_key() {
    let (server, client, other) = (new(), new(), new());
    let mut listening = Server::start(&server);

    let connected = listening.connect(&client, &pin(&server)).await.unwrap();
    assert_eq!(connected.connection.remote_address(), listening.address);
    assert_eq!(
        endpoint::peer(&connected.connection).unwrap().0,
        server.key_id()
    );
    let accepted = listening.next().await.unwrap();
    assert_eq!(
        endpoint::peer(&accepted).unwrap(),
        (client.key_id(), client.chain().to_vec())
    );

    let error = listening.connect(&client, &pin(&other)).await.unwrap_err();
    assert!(
        matches!(&error, Error::WrongPin { pinned, presented, .. }
            if *pinned == other.key_id().to_string() && *presented == server.key_id().to_string()),
        "{error}"
    );
    assert!(
        listening.next().await.is_err(),
        "the client went on after all"
    );
}

#[tokio::test]
async fn with_a_pin_nothing_else_is_consulted() {
    let (server, directory) = (new(), TempDir::new().unwrap());
    let listening = Server::start(&server);
    let (file, mut trust) = known_hosts_in(&directory);
    std::fs::write(&file, "a line that makes no sense\n").unwrap();
    assert!(matches!(
        listening.connect(&new(), &trust).await,
        Err(Error::Home { .. })
    ));
    trust.pin = Some(server.key_id());
    listening.connect(&new(), &trust).await.unwrap();
}

#[tokio::test]
async fn a_changed_key_of_a_known_host_is_an_alarm() {
    let (server, client, directory) = (new(), new(), TempDir::new().unwrap());
    let listening = Server::start(&server);
    let (file, trust) = known_hosts_in(&directory);

    let Err(Error::UnknownHost { host, key_id }) = listening.connect(&client, &trust).await else {
        panic!()
    };
    assert_eq!(host, listening.address.to_string());
    let key_id: KeyId = key_id.parse().unwrap();
    assert_eq!(key_id, server.key_id());

    known_hosts::add(&file, &host, &key_id).unwrap();
    listening.connect(&client, &trust).await.unwrap();

    let old = new().key_id();
    std::fs::write(&file, format!("{host} {old}\n")).unwrap();
    let error = listening.connect(&client, &trust).await.unwrap_err();
    let Error::ChangedHost {
        known,
        presented,
        file: named,
        ..
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!(
        (known, presented, named),
        (&old.to_string(), &key_id.to_string(), &file)
    );

    known_hosts::add(&file, &host, &key_id).unwrap();
    listening.connect(&client, &trust).await.unwrap();
}

/// An authority that signs leaves.
struct Authority(
    Issuer<'static, KeyPair>,
    rustls::pki_types::CertificateDer<'static>,
);

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "a team");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self(Issuer::new(params, key), certificate)
    }

    fn sign(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        change(&mut params);
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Identity::from_pem(certificate.pem().as_bytes(), key.serialize_pem().as_bytes()).unwrap()
    }
}

fn expired(params: &mut CertificateParams) {
    params.not_after = date_time_ymd(2001, 1, 1);
    params.not_before = date_time_ymd(2000, 1, 1);
}

#[tokio::test]
async fn an_authority_vouches_for_both_sides() {
    let authority = Authority::new();
    let (server, client) = (
        authority.sign("127.0.0.1", |_| {}),
        authority.sign("alice", |_| {}),
    );
    let mut listening = Server::start(&server);
    let trust = ServerTrust {
        authorities: vec![authority.1.clone()],
        ..ServerTrust::default()
    };
    listening.connect(&client, &trust).await.unwrap();

    let admission = Admission {
        authorities: vec![authority.1.clone()],
        ..Admission::default()
    };
    let (_, chain) = endpoint::peer(&listening.next().await.unwrap()).unwrap();
    let rights = admission.rights_of(&chain).unwrap();
    assert!(rights.read && rights.write);
    assert_eq!(rights.name.as_deref(), Some("alice"));

    let strangers = Authority::new();
    assert!(
        admission
            .rights_of(strangers.sign("alice", |_| {}).chain())
            .is_err()
    );
    assert!(admission.rights_of(new().chain()).is_err());
    assert!(
        admission
            .rights_of(authority.sign("alice", expired).chain())
            .is_err()
    );
    let trust = ServerTrust {
        authorities: vec![strangers.1],
        ..ServerTrust::default()
    };
    assert!(matches!(
        listening.connect(&client, &trust).await,
        Err(Error::UnknownHost { .. })
    ));
}

#[tokio::test]
async fn an_authority_does_not_vouch_for_other_names_or_times() {
    let authority = Authority::new();
    let trust = ServerTrust {
        authorities: vec![authority.1.clone()],
        ..ServerTrust::default()
    };
    let wrong = [
        (authority.sign("example.org", |_| {}), "name"),
        (authority.sign("127.0.0.1", expired), "expired"),
    ];
    for (server, why) in wrong {
        let listening = Server::start(&server);
        let error = listening.connect(&new(), &trust).await.unwrap_err();
        assert!(
            matches!(error, Error::NotTrusted { .. }) && error.to_string().contains(why),
            "{error}"
        );
    }
}

#[tokio::test]
async fn known_hosts_takes_precedence_over_an_authority() {
    let (authority, directory) = (Authority::new(), TempDir::new().unwrap());
    let listening = Server::start(&authority.sign("127.0.0.1", |_| {}));
    let (file, mut trust) = known_hosts_in(&directory);
    trust.authorities.push(authority.1.clone());
    listening.connect(&new(), &trust).await.unwrap();
    known_hosts::add(&file, &listening.address.to_string(), &new().key_id()).unwrap();
    assert!(matches!(
        listening.connect(&new(), &trust).await,
        Err(Error::ChangedHost { .. })
    ));
}

#[tokio::test]
async fn a_server_with_the_right_certificate_and_another_key_fails() {
    let (server, client) = (new(), new());
    let mut tls = server_tls().with_cert_resolver(impostor(&server, &new()));
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut listening = Server::with_tls(tls);
    let error = listening.connect(&client, &pin(&server)).await.unwrap_err();
    assert!(
        matches!(error, Error::NotTrusted { .. })
            && error.to_string().contains("does not hold the key"),
        "{error}"
    );
    assert!(listening.next().await.is_err());
}

#[tokio::test]
async fn a_client_with_the_right_certificate_and_another_key_fails() {
    let (server, admitted, other) = (new(), new(), new());
    let mut listening = Server::start(&server);
    let tls = |key| client_tls(&server).with_client_cert_resolver(impostor(&admitted, key));
    let code = refused(&mut listening, tls(&other)).await;
    assert_eq!(code, TransportErrorCode::crypto(DECRYPT_ERROR));
    // The key was the cause: with its own key, the same certificate is accepted.
    let _connection = raw(&listening, tls(&admitted)).await.unwrap();
    assert_eq!(
        endpoint::peer(&listening.next().await.unwrap()).unwrap().0,
        admitted.key_id()
    );
}

#[tokio::test]
async fn a_client_without_a_certificate_fails() {
    let server = new();
    let mut listening = Server::start(&server);
    let code = refused(&mut listening, client_tls(&server).with_no_client_auth()).await;
    assert_eq!(code, TransportErrorCode::crypto(CERTIFICATE_REQUIRED));
}

#[tokio::test]
async fn a_refused_client_gets_the_line_that_admits_it() {
    let (server, client, directory) = (new(), new(), TempDir::new().unwrap());
    let mut listening = Server::start(&server);
    let authorized_keys = directory.path().join("authorized_keys");
    let admission = Admission {
        authorized_keys: Some(authorized_keys.clone()),
        ..Admission::default()
    };

    let connected = listening.connect(&client, &pin(&server)).await.unwrap();
    let accepted = listening.next().await.unwrap();
    let Reason { code, text } = admission
        .rights_of(&endpoint::peer(&accepted).unwrap().1)
        .unwrap_err();
    accepted.close(VarInt::from_u32(code.number()), text.raw().as_bytes());
    let ConnectionError::ApplicationClosed(close) = soon(connected.connection.closed()).await
    else {
        panic!()
    };
    let Error::NotAdmitted(why) = haul::internal::net::stream::close_error(&close) else {
        panic!()
    };
    assert_eq!(why.code, Code::NotAdmitted);

    let (_, line) = why.text.raw().split_once("authorized_keys: ").unwrap();
    std::fs::write(&authorized_keys, line).unwrap();
    listening.connect(&client, &pin(&server)).await.unwrap();
    let accepted = listening.next().await.unwrap();
    assert!(
        admission
            .rights_of(&endpoint::peer(&accepted).unwrap().1)
            .is_ok(),
        "the file was not read afresh"
    );
}

#[tokio::test]
async fn a_closed_port_is_reported_at_once() {
    let free = SocketAddr::from((Ipv4Addr::LOCALHOST, own_port()));
    let config = Config {
        first_reply: FAR,
        handshake: FAR,
        ..Config::default()
    };
    let error = dial("127.0.0.1", free.port(), ServerTrust::default(), config)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Unreachable { address, .. } if *address == free),
        "{error}"
    );
    assert!(error.to_string().contains("nothing listens"), "{error}");
}

#[tokio::test]
async fn silence_is_reported_after_the_first_deadline() {
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let config = Config {
        first_reply: Duration::from_millis(200),
        handshake: FAR,
        ..Config::default()
    };
    let error = dial("127.0.0.1", port, ServerTrust::default(), config)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("nothing answers") && error.contains(&format!("UDP port {port}")),
        "{error}"
    );
}

/// Answers the first datagram with a long header (not the probe) with these bytes, and every other with silence.
async fn answer(socket: tokio::net::UdpSocket, reply: impl Fn(&[u8]) -> Vec<u8>) {
    let mut buffer = [0; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
        if length > 1 {
            socket
                .send_to(&reply(&buffer[..length]), from)
                .await
                .unwrap();
        }
    }
}

#[tokio::test]
async fn a_host_that_answers_gets_the_longer_deadline() {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let port = socket.local_addr().unwrap().port();
    let millis = Duration::from_millis;
    let config = Config {
        first_reply: millis(1000),
        handshake: millis(2000),
        ..Config::default()
    };
    let error = tokio::select! {
        _ = answer(socket, |_| b"\xffwhat?".to_vec()) => unreachable!(),
        error = dial("127.0.0.1", port, ServerTrust::default(), config) => error,
    };
    let error = error.unwrap_err().to_string();
    assert!(error.contains("something answers"), "{error}");
}

#[tokio::test]
async fn a_server_killed_in_a_handshake_is_reported_at_once() {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let port = socket.local_addr().unwrap().port();
    let config = Config {
        first_reply: FAR,
        handshake: FAR,
        ..Config::default()
    };
    let killed = async move {
        let mut buffer = [0; 2048];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            // The first datagram of a server's answer, and no more.
            if length > 1 {
                return socket.send_to(b"\xffwhat?", from).await.unwrap();
            }
        }
    };
    let (error, _) = tokio::join!(
        dial("127.0.0.1", port, ServerTrust::default(), config),
        killed
    );
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("stopped before the handshake ended"),
        "{error}"
    );
    assert!(
        error.contains(&format!("nothing listens on port {port} any more")),
        "{error}"
    );
}

#[tokio::test]
async fn a_server_with_another_quic_version_is_reported_as_such() {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let port = socket.local_addr().unwrap().port();
    // Version Negotiation (RFC 9000, section 17.2.1): the client's connection ids, exchanged, and one other version.
    let negotiate = |initial: &[u8]| {
        let (destination, rest) = initial[6..].split_at(initial[5].into());
        let source = &rest[1..=rest[0].into()];
        let id = |id: &[u8]| [&[id.len() as u8], id].concat();
        [
            &[0x80, 0, 0, 0, 0][..],
            &id(source),
            &id(destination),
            &0x6b33_43cf_u32.to_be_bytes(),
        ]
        .concat()
    };
    let error = tokio::select! {
        _ = answer(socket, negotiate) => unreachable!(),
        error = dial("127.0.0.1", port, ServerTrust::default(), Config::default()) => error,
    };
    let error = error.unwrap_err().to_string();
    assert!(error.contains("no QUIC version"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_not_haul_is_reported_as_such() {
    let server = new();
    for alpn in [vec![b"h3".to_vec()], vec![]] {
        let mut tls = server_tls()
            .with_single_cert(server.chain().to_vec(), server.private_key())
            .unwrap();
        tls.alpn_protocols = alpn;
        let error = Server::with_tls(tls)
            .connect(&new(), &pin(&server))
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Unreachable { .. }), "{error}");
        assert!(
            error.to_string().contains("speaks QUIC, but not haul/1"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_full_server_reports_that_it_is_busy() {
    let server = new();
    let config = endpoint::server_config(&server, &Config::default()).unwrap();
    let listening = endpoint::bind("127.0.0.1:0".parse().unwrap(), Some(config)).unwrap();
    let port = listening.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Some(incoming) = listening.accept().await {
            incoming.refuse();
        }
    });
    let error = dial("127.0.0.1", port, pin(&server), Config::default())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("the server is full"), "{error}");
}

#[tokio::test]
async fn a_stopped_server_is_not_waited_for() {
    // The server answers a handshake with stateless resets.
    let stopping = endpoint::bind("127.0.0.1:0".parse().unwrap(), None).unwrap();
    let port = stopping.local_addr().unwrap().port();
    let hour = Duration::from_secs(3600);
    let config = Config {
        first_reply: Duration::from_millis(500),
        handshake: hour,
        ..Config::default()
    };
    let error = dial("127.0.0.1", port, ServerTrust::default(), config)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("nothing answers"), "{error}");
}

#[tokio::test]
async fn a_host_without_an_address_is_reported_by_name() {
    // Too long for the resolver to send a query.
    let host = "a".repeat(300);
    let error = dial(&host, 1, ServerTrust::default(), Config::default())
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Resolve { host: named, .. } if *named == host),
        "{error}"
    );
}

#[tokio::test]
async fn the_default_address_takes_both_families_and_a_name_finds_it() {
    let server = new();
    let config = endpoint::server_config(&server, &Config::default()).unwrap();
    let listening = endpoint::bind("[::]:0".parse().unwrap(), Some(config)).unwrap();
    let port = listening.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Some(incoming) = listening.accept().await {
            kept.push(incoming.await);
        }
    });
    let has_ipv6 = std::net::UdpSocket::bind("[::1]:0").is_ok();
    for host in ["127.0.0.1", "localhost", "[::1]", "::1"] {
        if has_ipv6 || !host.contains(':') {
            dial(host, port, pin(&server), Config::default())
                .await
                .expect(host);
        }
    }
}

#[tokio::test]
async fn an_address_that_refuses_does_not_block_another() {
    // Where localhost has two addresses, one of them has no server.
    let server = new();
    let listening = Server::start(&server);
    let port = listening.address.port();
    let connected = dial("localhost", port, pin(&server), Config::default())
        .await
        .unwrap();
    assert_eq!(connected.connection.remote_address(), listening.address);
    drop(listening.endpoint);
}

#[tokio::test]
async fn a_path_that_carries_large_datagrams_gets_them() {
    let server = new();
    let mut listening = Server::start(&server);
    let connected = listening.connect(&new(), &pin(&server)).await.unwrap();
    let accepted = listening.next().await.unwrap();
    tokio::spawn(async move {
        while let Ok((_, mut stream)) = accepted.accept_bi().await {
            let _ = stream.read_to_end(1 << 20).await;
        }
    });
    soon(async {
        while connected.connection.stats().path.current_mtu < 6_000 {
            let (mut stream, _answers) = connected.connection.open_bi().await.unwrap();
            stream.write_all(&[0; 32 << 10]).await.unwrap();
            stream.finish().unwrap();
            stream.stopped().await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_team_with_the_example_certificates_trusts_each_other() {
    let directory = TempDir::new().unwrap();
    let team = |name: &str| {
        team_certificates::make(directory.path(), &[name.to_owned()]).unwrap();
        Home::at(directory.path().join(name))
    };
    // One at a time: the existing authority is used again.
    let (server, alice) = (team("localhost"), team("alice"));
    let id = alice.identity().unwrap().key_id();
    assert_eq!(
        team("alice").identity().unwrap().key_id(),
        id,
        "a key was overwritten"
    );
    assert!(team_certificates::make(directory.path(), &["../x".to_owned()]).is_err());

    let mut listening = Server::start(&server.identity().unwrap());
    let (trust, port) = (
        ServerTrust::of_home(&alice, None).unwrap(),
        listening.address.port(),
    );
    let client = alice.identity().unwrap();
    soon(connect::connect(
        &client,
        &trust,
        "localhost",
        port,
        &Config::default(),
    ))
    .await
    .unwrap();
    let (_, chain) = endpoint::peer(&listening.next().await.unwrap()).unwrap();
    let rights = Admission::of_home(&server, Anyone::default())
        .unwrap()
        .rights_of(&chain)
        .unwrap();
    assert_eq!(rights.name.as_deref(), Some("alice"));
}

#[test]
fn unreadable_authorities_are_an_error() {
    let directory = TempDir::new().unwrap();
    let home = Home::at(directory.path());
    assert_eq!(ServerTrust::of_home(&home, None).unwrap().authorities, []);
    for bad in [
        "nonsense",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ] {
        std::fs::write(home.authorities(), bad).unwrap();
        assert!(
            matches!(
                Admission::of_home(&home, Anyone::default()),
                Err(Error::Home { .. })
            ),
            "{bad}"
        );
    }
}
