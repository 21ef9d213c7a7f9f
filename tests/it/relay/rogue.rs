//! Relays that break every rule: each end detects it, or finds another path, and the words of the code stay secret.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use haul::internal::net::stream::{MessageReader, MessageWriter};
use haul::internal::protocol::{Address, Forward, Found, Message, Place, Placed, RELAY_ALPN, Seek};
use haul::pairing::receive;
use haul::pairing::route::Whereabouts;
use haul::pairing::send;
use haul::{Code, Config, Error, Identity};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Connection, Endpoint};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::relay::stage::*;

/// How a rogue handles a stream that begins with this type of message.
type Script =
    Arc<dyn Fn(u8, Stream) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

struct Stream {
    connection: Connection,
    /// Kept, so that the stream is not stopped.
    _reader: MessageReader,
    writer: MessageWriter,
}

impl Stream {
    async fn say(&mut self, message: &impl Message) {
        // The client that asked may be gone.
        let _ = self.writer.write(message).await;
    }

    async fn say_bytes(&mut self, bytes: &[u8]) {
        let _ = self.writer.write_bytes(bytes.to_vec().into()).await;
    }

    /// Waits until the connection ends.
    async fn hold(self) {
        self.connection.closed().await;
    }
}

/// A relay that follows a script.
struct Rogue {
    address: SocketAddr,
    /// Connections so far.
    came: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

fn server(alpn: &[u8]) -> Endpoint {
    let identity = Identity::generate().unwrap();
    if alpn == haul::internal::protocol::ALPN {
        let config =
            haul::internal::net::endpoint::server_config(&identity, &Config::default()).unwrap();
        return haul::internal::net::endpoint::bind(LOOPBACK, Some(config)).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(identity.chain().to_vec(), identity.private_key())
        .unwrap();
    tls.alpn_protocols = vec![alpn.to_vec()];
    let config =
        quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).unwrap()));
    haul::internal::net::endpoint::bind(LOOPBACK, Some(config)).unwrap()
}

impl Rogue {
    fn follows<F: Future<Output = ()> + Send + 'static>(
        script: impl Fn(u8, Stream) -> F + Send + Sync + 'static,
    ) -> Self {
        let script: Script = Arc::new(move |kind, stream| Box::pin(script(kind, stream)));
        let endpoint = server(RELAY_ALPN);
        let address = endpoint.local_addr().unwrap();
        let came = Arc::new(AtomicUsize::new(0));
        let mut task = JoinSet::new();
        let count = Arc::clone(&came);
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Some(incoming) = endpoint.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                let script = script.clone();
                connections.spawn(async move {
                    let Ok(connection) = incoming.await else {
                        return;
                    };
                    let mut streams = JoinSet::new();
                    while let Ok((send, receive)) = connection.accept_bi().await {
                        let (script, connection) = (script.clone(), connection.clone());
                        streams.spawn(async move {
                            let mut reader = MessageReader::new(receive);
                            let Ok(Some(frame)) = reader.frame(4096).await else {
                                return;
                            };
                            let writer = MessageWriter::new(send);
                            script(
                                frame.kind,
                                Stream {
                                    connection,
                                    _reader: reader,
                                    writer,
                                },
                            )
                            .await;
                        });
                    }
                });
            }
        });
        Self {
            address,
            came,
            _task: task,
        }
    }

    fn at(&self) -> haul::pairing::rendezvous::RelayAt {
        at(self.address)
    }
}

fn placed() -> Placed {
    Placed {
        number: 5_555,
        seen: Address(NOWHERE),
    }
}

fn found(addresses: impl IntoIterator<Item = SocketAddr>) -> Found {
    Found {
        addresses: addresses.into_iter().map(Address).collect(),
        forward: None,
    }
}

/// The code given to the other end, which seeks 5555.
fn code() -> haul::pairing::code::ShortCode {
    "5555-maple-canyon-orbit".parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attacker_in_the_middle_is_detected_and_learns_nothing() {
    let (middle, honest) = (server(haul::internal::protocol::ALPN), Host::new());
    let mut sending = Sending::by(honest.at()).await;
    let code = sending.code();
    let address = middle.local_addr().unwrap();
    let rogue = Rogue::follows(move |_, mut stream| async move {
        stream.say(&found([address])).await;
        stream.hold().await;
    });
    let sender = sending.offering.addresses()[0];
    // The attacker passes on what both ends send, with one connection to each.
    let between = async {
        let receiver = middle.accept().await.unwrap().await.unwrap();
        let trust = haul::internal::auth::trust::trust_any_key(None);
        let identity = Identity::generate().unwrap();
        let to = haul::internal::net::connect::connect(
            &identity,
            &trust,
            "127.0.0.1",
            sender.port(),
            &Config::default(),
        )
        .await;
        let to = to.unwrap();
        let (mut back, mut there) = receiver.accept_bi().await.unwrap();
        let (mut onward, mut answers) = to.connection.open_bi().await.unwrap();
        let mut seen = Vec::new();
        let (mut up, mut down) = (vec![0; 4096], vec![0; 4096]);
        loop {
            tokio::select! {
                read = there.read(&mut up) => match read {
                    Ok(Some(length)) => drop(onward.write_all(&up[..length]).await),
                    _ => break,
                },
                read = answers.read(&mut down) => match read {
                    Ok(Some(length)) => {
                        seen.extend_from_slice(&down[..length]);
                        let _ = back.write_all(&down[..length]).await;
                    }
                    _ => break,
                },
            }
        }
        let _ = back.finish();
        receiver.closed().await;
        seen
    };
    let (met, came, seen) = tokio::join!(
        meet(&code, rogue.at()),
        sending.offering.meet(),
        within(between)
    );
    assert_eq!(refusal(met).code, Code::NotAdmitted);
    assert!(matches!(came.unwrap(), send::Met::Burnt { .. }));
    for secret in [&b"alice"[..], b"small", b"large"] {
        assert!(!seen.windows(secret.len()).any(|window| window == secret));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_led_to_a_third_machine_burns_no_code() {
    let honest = Host::new();
    let (mut asked, mut third) = (
        Sending::by(honest.at()).await,
        Sending::by(honest.at()).await,
    );
    let (code, elsewhere) = (asked.code(), third.offering.addresses()[0]);
    let rogue = Rogue::follows(move |_, mut stream| async move {
        stream.say(&found([elsewhere])).await;
        stream.hold().await;
    });
    tokio::select! {
        met = meet(&code, rogue.at()) => assert_eq!(refusal(met).code, Code::NotFound),
        met = third.offering.meet() => panic!("{met:?}"),
        met = asked.offering.meet() => panic!("{met:?}"),
    }
    // Both codes are still valid.
    for sending in [&mut asked, &mut third] {
        let code = sending.code();
        let receiving = async { meet(&code, honest.at()).await.unwrap().decline().await };
        let ((), met) = tokio::join!(receiving, sending.offering.meet());
        assert!(matches!(met.unwrap(), send::Met::Declined { .. }));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_gives_up_a_false_relay_within_bounds() {
    type Answer = fn() -> Vec<u8>;
    let answers: [(&str, Answer); 8] = [
        ("noise", || vec![0x17; 500]),
        ("another message", || placed().to_bytes().to_vec()),
        ("a length alone", || {
            vec![Found::TYPE, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]
        }),
        ("18 addresses", || {
            found(vec![NOWHERE; 18]).to_bytes().to_vec()
        }),
        ("half a message", || {
            found([NOWHERE]).to_bytes()[..5].to_vec()
        }),
        ("no address", || found([]).to_bytes().to_vec()),
        ("nowhere", || {
            found([
                NOWHERE,
                "0.0.0.0:0".parse().unwrap(),
                "224.0.0.1:1".parse().unwrap(),
            ])
            .to_bytes()
            .to_vec()
        }),
        ("a refusal to steer terminals", || {
            let why = haul::Reason::new(Code::Busy, "\x1b[2Jno").into();
            haul::internal::protocol::Refused { why }
                .to_bytes()
                .to_vec()
        }),
    ];
    let mut running = JoinSet::new();
    for (name, answer) in answers {
        running.spawn(async move {
            let rogue = Rogue::follows(move |kind, mut stream| async move {
                assert_eq!(kind, Seek::TYPE);
                stream.say_bytes(&answer()).await;
                if name == "half a message" {
                    stream.writer.finish();
                    stream.connection.closed().await;
                } else {
                    stream.hold().await;
                }
            });
            let error = meet(&code(), rogue.at()).await.map(|_| ()).unwrap_err();
            let text = error.to_string();
            assert!(!text.contains('\x1b'), "{name}: {text}");
            match name {
                "no address" | "nowhere" => {
                    assert!(
                        matches!(error, Error::Unreachable { .. } | Error::Resolve { .. }),
                        "{name}: {error:?}"
                    )
                }
                "a refusal to steer terminals" => {
                    assert!(matches!(error, Error::Refused(_)), "{error:?}")
                }
                _ => assert!(matches!(error, Error::Protocol(_)), "{name}: {error:?}"),
            }
        });
    }
    while let Some(ended) = running.join_next().await {
        ended.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_relay_does_not_hide_a_sender_on_the_local_network() {
    // A relay that never answers is given up in the same way, after 10 s.
    let rogue =
        Rogue::follows(move |_, stream| async move { stream.connection.close(0_u8.into(), b"") });
    let sending = Sending::by(rogue.at()).await;
    assert!(sending.offering.relay_failure().is_some());
    assert!(!sending.code().is_of_relay());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_retries_a_relay_that_sends_nonsense() {
    let rogue = Rogue::follows(move |kind, mut stream| async move {
        assert_eq!(kind, Place::TYPE);
        stream.say(&placed()).await;
        stream.say_bytes(&[0x17; 3_000]).await;
        stream.hold().await;
    });
    let mut sending = Sending::by(rogue.at()).await;
    let (code, addresses) = (sending.code(), sending.offering.addresses().to_vec());
    assert_eq!(code.number(), 5_555);
    while rogue.came.load(Ordering::SeqCst) < 3 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let at = Whereabouts {
        addresses,
        relay: None,
        own: Vec::new(),
    };
    let identity = Identity::generate().unwrap();
    let receiving = async {
        within(receive::meet(&(&code).into(), at, &identity, &impatient()))
            .await
            .unwrap()
            .decline()
            .await
    };
    let ((), met) = tokio::join!(receiving, sending.offering.meet());
    assert!(matches!(met.unwrap(), send::Met::Declined { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_cannot_make_a_sender_flood_third_machines() {
    let victim = UdpSocket::bind(LOOPBACK).await.unwrap();
    let at = victim.local_addr().unwrap();
    // Endless messages, each with all that a message can hold.
    let rogue = Rogue::follows(move |_, mut stream| async move {
        stream.say(&placed()).await;
        let forward = Forward {
            port: 9,
            token: [7; 32],
        };
        let found = Found {
            forward: Some(forward),
            ..found([at; 17])
        };
        loop {
            if stream.writer.write(&found).await.is_err() {
                return;
            }
        }
    });
    let begun = Instant::now();
    let sending = Sending::by(rogue.at()).await;
    let mut datagram = [0; 64];
    for count in 0..21_u32 {
        let (length, _) = within(victim.recv_from(&mut datagram)).await.unwrap();
        assert_eq!(datagram[..length], [0], "a byte that QUIC drops");
        // The first is sent at once; a late arrival does not cause more.
        assert!(
            begun.elapsed() >= Duration::from_millis(95) * count,
            "{count} in {:?}",
            begun.elapsed()
        );
    }
    drop(sending);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replayed_exchanges_do_not_count_as_guesses() {
    let honest = Host::new();
    let mut sending = Sending::by(honest.at()).await;
    let (code, sender) = (sending.code(), sending.offering.addresses()[0]);
    // An attacker in the middle who has recorded an honest receiver's messages, here to another machine, and replays
    // them.
    let trust = haul::internal::auth::trust::trust_any_key(None);
    let (middle, kept) = (
        server(haul::internal::protocol::ALPN),
        Arc::new(tokio::sync::Mutex::new(Vec::new())),
    );
    let address = middle.local_addr().unwrap();
    let rogue = Rogue::follows(move |_, mut stream| async move {
        stream.say(&found([address])).await;
        stream.hold().await;
    });
    let keep = kept.clone();
    let recording = async {
        let receiver = middle.accept().await.unwrap().await.unwrap();
        let (_back, mut there) = receiver.accept_bi().await.unwrap();
        let mut bytes = vec![0; 4096];
        let length = there.read(&mut bytes).await.unwrap().unwrap();
        keep.lock().await.extend_from_slice(&bytes[..length]);
        receiver.close(0_u8.into(), b"");
    };
    let (met, ()) = tokio::join!(meet(&code, rogue.at()), within(recording));
    assert!(met.is_err());
    let replaying = async {
        let identity = Identity::generate().unwrap();
        let to = haul::internal::net::connect::connect(
            &identity,
            &trust,
            "127.0.0.1",
            sender.port(),
            &Config::default(),
        )
        .await;
        let (mut onward, answers) = to.as_ref().unwrap().connection.open_bi().await.unwrap();
        onward.write_all(&kept.lock().await).await.unwrap();
        let mut answers = MessageReader::new(answers);
        within(answers.read::<haul::internal::protocol::Hello>())
            .await
            .unwrap();
        within(answers.read::<haul::internal::protocol::Introduced>())
            .await
            .unwrap();
        // The attacker has no key of the exchange and leaves: nothing was tried, and no code is burnt.
        to.unwrap().connection.close(0_u8.into(), b"");
        meet(&code, honest.at()).await.unwrap().decline().await;
    };
    let ((), met) = tokio::join!(replaying, sending.offering.meet());
    assert!(matches!(met.unwrap(), send::Met::Declined { .. }));
}
