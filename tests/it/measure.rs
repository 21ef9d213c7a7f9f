//! Measurements of the path to a server, over real sockets; and peers that ask for more than they may.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::BytesMut;
use haul::bench::{MeasureOptions, Measurement, Probe};
use haul::internal::net::stream::{MessageReader, StreamError};
use haul::internal::protocol::{Measure, Message, Ping, Pong, Received};
use haul::{Client, Code, Config, Error, Event, Identity, MemoryStore, Result, ServerTrust};
use quinn::{Connection, SendStream};

use crate::hostile::peer::{Peer, impatient, within};
use crate::support::{Host, recorder};

/// Short for a silent peer, and long enough for an honest one on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(2);

fn host(config: Config) -> Host {
    Host::serving(Arc::new(MemoryStore::new()), config)
}

fn second() -> MeasureOptions {
    MeasureOptions {
        time: Some(Duration::from_secs(1)),
        ..MeasureOptions::default()
    }
}

async fn measure(host: &Host, options: &MeasureOptions) -> Result<Measurement> {
    let client = host.connect().await?;
    let measured = within(client.measure(options, haul::ignore())).await;
    client.close().await;
    measured
}

/// The head of a measurement stream.
fn head(probe: Probe, milliseconds: u32) -> Vec<u8> {
    let mut bytes = BytesMut::from(&[4][..]);
    Measure {
        probe,
        milliseconds,
    }
    .put(&mut bytes);
    bytes.to_vec()
}

/// An echo stream that has been answered, so that it has a place.
async fn echo(peer: &Peer) -> (SendStream, MessageReader) {
    let (mut send, mut answers) = peer.open(&head(Probe::Echo, u32::MAX)).await;
    within(send.write_all(&Ping { id: 7 }.to_bytes()))
        .await
        .unwrap();
    assert_eq!(within(answers.read::<Pong>()).await.unwrap().id, 7);
    (send, answers)
}

/// Returns how the server ends its half, whatever it sends before.
async fn end(answers: MessageReader) -> Result<(), Code> {
    let (mut stream, _, _) = answers.into_parts();
    loop {
        match within(stream.read_chunk(usize::MAX, false))
            .await
            .map_err(StreamError::from)
        {
            Ok(Some(_)) => {}
            Ok(None) => return Ok(()),
            Err(StreamError::Reset(code)) => return Err(code),
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_directions_have_a_rate_and_round_trips() {
    let host = host(Config::default());
    let client = host.connect().await.unwrap();
    let (observer, events) = recorder();
    let measured = within(client.measure(&second(), observer)).await.unwrap();
    for (probe, load) in [
        (Probe::Up, measured.up.unwrap()),
        (Probe::Down, measured.down.unwrap()),
    ] {
        assert!(
            load.rate > 1e6 && load.rate.is_finite(),
            "{probe:?}: {load:?}"
        );
        assert!(
            load.bytes > 1 << 20 && load.packets_sent > 10,
            "{probe:?}: {load:?}"
        );
        assert!(
            load.time >= Duration::from_millis(500),
            "{probe:?}: {load:?}"
        );
        assert!(
            load.rtt.count > 0 && load.rtt.p95 >= load.rtt.median && load.loss() < 1.0,
            "{probe:?}: {load:?}"
        );
        let seen: Vec<_> = events
            .lock()
            .unwrap()
            .iter()
            .filter_map(|event| match event {
                Event::Measuring {
                    probe: seen, bytes, ..
                } if *seen == probe => Some(*bytes),
                _ => None,
            })
            .collect();
        assert!(
            seen.is_sorted() && seen.len() > 1 && *seen.last().unwrap() <= load.bytes,
            "{probe:?}: {seen:?}"
        );
    }
    assert!(
        measured.idle.count >= 3 && measured.idle.min > Duration::ZERO,
        "{:?}",
        measured.idle
    );
    assert!(measured.idle.min <= measured.idle.median && measured.idle.median <= measured.idle.p95);
    // The connection is still usable.
    let again = MeasureOptions {
        up: false,
        ..second()
    };
    assert!(
        within(client.measure(&again, haul::ignore()))
            .await
            .unwrap()
            .up
            .is_none()
    );
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_duration_out_of_bounds_is_refused_before_sending() {
    let host = host(Config::default());
    for time in [Duration::ZERO, Duration::from_secs(61), Duration::MAX] {
        let refused = measure(
            &host,
            &MeasureOptions {
                time: Some(time),
                ..second()
            },
        )
        .await;
        assert!(
            matches!(&refused, Err(Error::Usage(why)) if why.contains("1 to 60")),
            "{refused:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_measurement_that_is_too_long_is_cut_to_the_limit() {
    let host = host(Config {
        max_measurement: Duration::from_millis(200),
        ..impatient()
    });
    let peer = Peer::connect(&host).await;
    let (mut send, answers) = peer.open(&head(Probe::Down, u32::MAX)).await;
    send.finish().unwrap();
    assert_eq!(end(answers).await, Err(Code::Done));

    let (mut send, answers) = peer.open(&head(Probe::Up, u32::MAX)).await;
    let filler = vec![0; 64 << 10];
    let filling = tokio::spawn(async move { while send.write_all(&filler).await.is_ok() {} });
    assert_eq!(end(answers).await, Ok(()), "the sum, and a clean end");
    within(filling).await.unwrap();

    let (_pings, answers) = echo(&peer).await;
    let pinging = tokio::spawn({
        let connection = peer.connection.clone();
        let mut pings = _pings;
        async move {
            while pings.write_all(&Ping { id: 8 }.to_bytes()).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            drop(connection);
        }
    });
    assert_eq!(
        end(answers).await,
        Err(Code::Done),
        "an echo does not go on for ever either"
    );
    pinging.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn excess_measurements_are_refused_until_there_is_room() {
    let host = host(Config::default());
    let mut peers = Vec::new();
    // Two on each connection, and six for the strangers of one network.
    for _ in 0..3 {
        let peer = Peer::connect(&host).await;
        let held = [echo(&peer).await, echo(&peer).await];
        let (_send, answers) = peer.open(&head(Probe::Down, 1_000)).await;
        assert_eq!(
            end(answers).await,
            Err(Code::Busy),
            "a third on its connection"
        );
        peers.push((peer, held));
    }
    let refused = measure(&host, &second()).await;
    assert!(
        matches!(&refused, Err(Error::Refused(why)) if why.code == Code::Busy),
        "{refused:?}"
    );
    let (_, held) = peers.pop().unwrap();
    for (mut send, answers) in held {
        send.finish().unwrap();
        assert_eq!(end(answers).await, Err(Code::Done));
    }
    measure(&host, &second()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_measurement_is_given_up_and_frees_its_place() {
    let host = host(Config {
        max_measurement: Duration::from_secs(1),
        deadline: DEADLINE,
        ..Config::default()
    });
    let mut silent = Vec::new();
    for _ in 0..4 {
        let peer = Peer::connect_as(&host, &Identity::generate().unwrap(), |transport| {
            // The client grants no more credit than this for the download.
            transport.receive_window(10_000_u32.into());
        })
        .await;
        // One sends nothing and the other reads nothing.
        let (up, down) = (
            peer.open(&head(Probe::Up, 60_000)).await,
            peer.open(&head(Probe::Down, 60_000)).await,
        );
        silent.push((peer, up, down));
    }
    for (peer, ..) in &silent {
        peer.closed_with(Code::TimedOut, "nothing is left of it that would keep it")
            .await;
    }
    measure(&host, &second()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_measure_breaks_the_protocol() {
    let host = host(Config::default());
    for bytes in [
        &[4, 0x31, 3, 0xa1, 0, 3][..],
        &[4, 0x30, 5, 0xa2, 0, 9, 1, 1],
        &[4, 0x30, 64, 0],
        &[4, 0x30, 65],
    ] {
        let peer = Peer::connect(&host).await;
        let (mut send, _answers) = peer.open(bytes).await;
        send.finish().unwrap();
        peer.closed_with(Code::Protocol, &format!("{bytes:?}"))
            .await;
    }
    let peer = Peer::connect(&host).await;
    let (mut pings, _answers) = echo(&peer).await;
    within(
        pings.write_all(
            &Pong {
                id: 8,
                packets_sent: 0,
                packets_lost: 0,
                rtt: 0,
            }
            .to_bytes(),
        ),
    )
    .await
    .unwrap();
    peer.closed_with(Code::Protocol, "no ping").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_server_ends_a_measurement_with_the_reason() {
    let mut host = host(Config::default());
    let client = host.connect().await.unwrap();
    let (begun, beginning) = tokio::sync::oneshot::channel::<()>();
    let begun = Mutex::new(Some(begun));
    let measuring = tokio::spawn(async move {
        let observer: haul::Observer = Arc::new(move |event| {
            if let Event::Measuring { .. } = event {
                drop(begun.lock().unwrap().take());
            }
        });
        client
            .measure(
                &MeasureOptions {
                    time: Some(Duration::from_secs(60)),
                    ..second()
                },
                observer,
            )
            .await
    });
    let _ = within(beginning).await;
    host.stop();
    let ended = within(measuring).await.unwrap();
    assert!(matches!(ended, Err(Error::Stopping)), "{ended:?}");
    within(host.stopped()).await;
}

/// Returns the result of a measurement by a server that answers its streams like this.
async fn by_server<F: Future<Output = ()> + Send + 'static>(
    serve: impl FnOnce(Connection) -> F + Send + 'static,
) -> Result<Measurement> {
    let identity = Identity::generate().unwrap();
    let trust = ServerTrust {
        pin: Some(identity.key_id()),
        ..ServerTrust::default()
    };
    let config =
        haul::internal::net::endpoint::server_config(&identity, &Config::default()).unwrap();
    let endpoint = haul::internal::net::endpoint::bind(
        SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        Some(config),
    )
    .unwrap();
    let port = endpoint.local_addr().unwrap().port();
    let serving =
        tokio::spawn(async move { serve(endpoint.accept().await.unwrap().await.unwrap()).await });
    let config = Config {
        deadline: DEADLINE,
        ..Config::default()
    };
    let client = Client::connect(
        &Identity::generate().unwrap(),
        &trust,
        "127.0.0.1",
        port,
        &config,
    )
    .await
    .unwrap();
    let measured = within(client.measure(&second(), haul::ignore())).await;
    serving.abort();
    measured
}

/// Accepts the next stream of a client, and returns its probe.
async fn measured_stream(connection: &Connection) -> (Probe, SendStream, MessageReader) {
    let (send, receive) = connection.accept_bi().await.unwrap();
    let mut reader = MessageReader::new(receive);
    assert_eq!(reader.byte().await.unwrap(), 4);
    (reader.read::<Measure>().await.unwrap().probe, send, reader)
}

/// Answers pings without end, with figures that make no sense.
async fn answer_pings((_, mut send, mut pings): (Probe, SendStream, MessageReader)) {
    while let Ok(Ping { id }) = pings.read().await {
        let packets_sent = if id % 2 == 0 { u64::MAX } else { 0 };
        let pong = Pong {
            id,
            packets_sent,
            packets_lost: u64::MAX,
            rtt: u64::MAX,
        };
        let _ = send.write_all(&pong.to_bytes()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_measurements_is_reported() {
    let ended = by_server(|connection| async move {
        // As a server does that does not know the type.
        let (mut send, mut receive) = connection.accept_bi().await.unwrap();
        receive.stop(Code::Unsupported.number().into()).unwrap();
        send.reset(Code::Unsupported.number().into()).unwrap();
        connection.closed().await;
    });
    let ended = ended.await;
    assert!(
        matches!(&ended, Err(Error::Refused(why)) if why.text.contains("too old")),
        "{ended:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_never_answers_is_given_up() {
    let ended = by_server(|connection| async move { drop(connection.closed().await) }).await;
    assert!(matches!(ended, Err(Error::Lost(_))), "{ended:?}");
    // The server answers pings, and then does not answer the load.
    let ended = by_server(|connection| async move {
        tokio::spawn(answer_pings(measured_stream(&connection).await));
        let _held = measured_stream(&connection).await;
        connection.closed().await;
    });
    let ended = ended.await;
    assert!(matches!(ended, Err(Error::Lost(_))), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn made_up_figures_cause_neither_panic_nor_endless_work() {
    let made_up = |forever: bool| {
        by_server(move |connection| async move {
            tokio::spawn(answer_pings(measured_stream(&connection).await));
            let (_, mut send, _filler) = measured_stream(&connection).await;
            for bytes in (0..if forever { u64::MAX } else { 10_000 }).rev() {
                let received = Received {
                    bytes,
                    microseconds: u64::MAX - bytes,
                };
                if send.write_all(&received.to_bytes()).await.is_err() {
                    return drop(connection.closed().await);
                }
            }
            send.finish().unwrap();
            let (_, mut send, _) = measured_stream(&connection).await;
            send.write_all(b"next to nothing").await.unwrap();
            send.finish().unwrap();
            connection.closed().await;
        })
    };
    let measured = made_up(false).await.unwrap();
    assert!(measured.up.unwrap().rate.is_finite());
    let down = measured.down.unwrap();
    assert!(down.bytes == 15 && down.loss() <= 1.0, "{down:?}");
    let ended = made_up(true).await;
    assert!(matches!(ended, Err(Error::Lost(_))), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_servers_rate_limit_holds_for_measurements() {
    let limit = haul::Rate::from_bytes(500_000);
    let host = host(Config {
        limit,
        ..Config::default()
    });
    let measured = measure(
        &host,
        &MeasureOptions {
            up: false,
            ..second()
        },
    )
    .await
    .unwrap();
    let rate = measured.down.unwrap().rate;
    assert!(
        rate < 8_000_000.0,
        "{rate} bit/s on loopback, which carries a hundred times as much"
    );
}
