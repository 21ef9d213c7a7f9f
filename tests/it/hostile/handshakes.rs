//! Handshakes that never end, and addresses that are not the sender's.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use haul::{Config, Identity, KeyId, ServerTrust};
use quinn::Endpoint;
use tokio::net::UdpSocket;
use tokio::time::timeout;

use crate::hostile::peer::{Arena, within};
use crate::support::command::Serving;

/// Handshakes of an attacker: more than a server has places.
const MANY: usize = 1_100;

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// How clients begin their handshakes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hello {
    /// With the post-quantum key exchange, in two datagrams.
    Large,
    /// With X25519 alone, in one datagram: the least that a server answers.
    Small,
}

fn client_config(key_id: KeyId, hello: Hello) -> quinn::ClientConfig {
    let identity = Identity::generate().unwrap();
    let trust = ServerTrust {
        pin: Some(key_id),
        ..ServerTrust::default()
    };
    let verifier = trust.verifier("127.0.0.1", 1).unwrap();
    if hello == Hello::Large {
        let config = Config::default();
        return haul::internal::net::endpoint::client_config(&identity, verifier, &config).unwrap();
    }
    let provider = rustls::crypto::CryptoProvider {
        kx_groups: vec![rustls::crypto::aws_lc_rs::kx_group::X25519],
        ..rustls::crypto::aws_lc_rs::default_provider()
    };
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(identity.chain().to_vec(), identity.private_key())
        .unwrap();
    tls.alpn_protocols = vec![haul::internal::protocol::ALPN.to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    quinn::ClientConfig::new(Arc::new(crypto))
}

/// Clients behind a path that carries their Initials to the server, and back only Retry packets: each proves its address and
/// never ends its handshake.
struct Unfinished {
    _endpoint: Endpoint,
    path: tokio::task::JoinHandle<()>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// The type of a long-header packet (RFC 9000, section 17.2).
fn is_long(datagram: &[u8], kind: u8) -> bool {
    datagram
        .first()
        .is_some_and(|first| first & 0xb0 == 0x80 | kind << 4)
}

impl Unfinished {
    async fn begin(server: SocketAddr, key_id: KeyId, count: usize) -> Self {
        let clients = UdpSocket::bind(LOOPBACK).await.unwrap();
        let entrance = clients.local_addr().unwrap();
        let onwards = UdpSocket::bind(LOOPBACK).await.unwrap();
        onwards.connect(server).await.unwrap();
        let path = tokio::spawn(async move {
            let mut back = None;
            let mut there_buffer = vec![0; 2_048];
            let mut back_buffer = vec![0; 2_048];
            loop {
                tokio::select! {
                    Ok((length, from)) = clients.recv_from(&mut there_buffer) => {
                        back = Some(from);
                        if is_long(&there_buffer[..length], 0) {
                            let _ = onwards.send(&there_buffer[..length]).await;
                        }
                    }
                    Ok(length) = onwards.recv(&mut back_buffer) => {
                        if is_long(&back_buffer[..length], 3) && let Some(back) = back {
                            let _ = clients.send_to(&back_buffer[..length], back).await;
                        }
                    }
                    else => {}
                }
            }
        });
        let endpoint = haul::internal::net::endpoint::bind(LOOPBACK, None).unwrap();
        let config = client_config(key_id, Hello::Small);
        let mut tasks = Vec::new();
        for _ in 0..count {
            let connecting = endpoint
                .connect_with(config.clone(), entrance, "127.0.0.1")
                .unwrap();
            tasks.push(tokio::spawn(async move { drop(connecting.await) }));
            // Sockets drop what arrives too fast.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Self {
            _endpoint: endpoint,
            path,
            tasks,
        }
    }

    fn end(self) {
        self.path.abort();
        self.tasks.iter().for_each(|task| task.abort());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_never_end_keep_no_one_out() {
    let serving = Serving::start(&[]);
    let quiet = serving.connect().await;
    quiet.close().await;
    let before = serving.resident();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, serving.port));
    let attack = Unfinished::begin(address, serving.key_id, MANY).await;
    // Honest clients come from the attacker's address, while the handshakes are open.
    for _ in 0..5 {
        within(serving.connect()).await.close().await;
    }
    let grown = serving.resident().saturating_sub(before);
    attack.end();
    println!("{MANY} unfinished handshakes: {before} bytes before, {grown} more");
    assert!(
        grown < 40 << 20,
        "{MANY} unfinished handshakes hold {grown} bytes"
    );
}

/// The first datagrams of clients that get no answer, by client.
async fn first_flights(key_id: KeyId, count: usize, hello: Hello) -> Vec<Vec<Vec<u8>>> {
    let sink = UdpSocket::bind(LOOPBACK).await.unwrap();
    let mut flights = HashMap::<Vec<u8>, Vec<Vec<u8>>>::new();
    let config = client_config(key_id, hello);
    let datagrams = if hello == Hello::Large { 2 } else { 1 };
    let mut buffer = vec![0; 2_048];
    let endpoint = haul::internal::net::endpoint::bind(LOOPBACK, None).unwrap();
    let mut connecting = Vec::new();
    for number in 1..=count {
        let begun = endpoint.connect_with(config.clone(), sink.local_addr().unwrap(), "127.0.0.1");
        connecting.push(begun.unwrap());
        while flights
            .values()
            .filter(|flight| flight.len() == datagrams)
            .count()
            < number
        {
            let length = within(sink.recv(&mut buffer)).await.unwrap();
            // The destination connection id is the client's choice, and differs.
            let id = buffer[6..6 + usize::from(buffer[5])].to_vec();
            let flight = flights.entry(id).or_default();
            // More is a repetition.
            if flight.len() < datagrams {
                flight.push(buffer[..length].to_vec());
            }
        }
    }
    flights.into_values().collect()
}

/// Sends datagrams to a server from a new address, and returns the sum of all that comes back until `silence`.
async fn answer_to(server: SocketAddr, datagrams: &[Vec<u8>], silence: Duration) -> usize {
    let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
    for datagram in datagrams {
        socket.send_to(datagram, server).await.unwrap();
    }
    let mut buffer = vec![0; 65_536];
    let mut received = 0;
    while let Ok(length) = timeout(silence, socket.recv(&mut buffer)).await {
        received += length.unwrap();
    }
    received
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unproven_address_gets_at_most_three_times_what_it_sent() {
    let arena = Arena::new(Config {
        half_open: Duration::from_secs(3),
        ..crate::hostile::peer::patient()
    });
    let silence = Duration::from_secs(4);
    let mut attacks = Vec::new();
    for hello in [Hello::Small, Hello::Large] {
        let mut flights = first_flights(arena.host.key_id, 3, hello).await;
        attacks.push(("whole", flights.pop().unwrap()));
        attacks.push(("first only", flights.pop().unwrap()[..1].to_vec()));
        let again = flights.pop().unwrap();
        attacks.push(("repeated", [&again[..], &again[..1]].concat()));
    }
    let server = arena.host.address;
    let answers: Vec<_> = attacks
        .iter()
        .map(|(_, datagrams)| {
            let datagrams = datagrams.clone();
            tokio::spawn(async move { answer_to(server, &datagrams, silence).await })
        })
        .collect();
    for ((what, datagrams), answer) in attacks.iter().zip(answers) {
        let sent: usize = datagrams.iter().map(Vec::len).sum();
        let received = answer.await.unwrap();
        let factor = received as f64 / sent as f64;
        println!("{what}: {sent} bytes sent, {received} received, {factor:.2}");
        assert!(factor <= 3.0, "{what}: {factor:.2}");
    }
    arena.unharmed().await;
}
