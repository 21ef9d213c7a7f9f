//! Peers that keep memory: shares of the receive window that they do not use, and frames that they never end. Each test
//! compares with a quiet run on the same machine.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use haul::{Client, Config, Identity, Kind, MemoryStore, ServerTrust};
use quinn::Connection;

use crate::hostile::peer::*;
use crate::support::command::Serving;
use crate::support::path::{Path, Settings};
use crate::support::{Host, content, to, write};

/// One way. The round trip of 100 ms makes the receive window count.
const DELAY: Duration = Duration::from_millis(50);
/// What the path carries, in bytes a second: little enough for a debug build.
const RATE: u64 = 4 << 20;
/// A transfer of some three seconds.
const SIZE: usize = 12 << 20;

/// Silence after which a share that was used counts as idle.
const IDLE_TIME: Duration = Duration::from_secs(2);

/// What an idle connection has done before.
#[derive(Debug, Clone, Copy)]
enum Idle {
    /// Nothing after the handshake.
    Connected,
    /// A file of unknown length was admitted, as of a pipe without output.
    Admitted,
    /// Small files were admitted, for which memory is reserved.
    Reserving,
    /// Some content came, and then no more.
    Begun,
}

impl Idle {
    const ALL: [Self; 4] = [
        Self::Connected,
        Self::Admitted,
        Self::Reserving,
        Self::Begun,
    ];

    async fn open(self, host: &Host) -> (Peer, Option<Session>) {
        let peer = Peer::connect(host).await;
        if matches!(self, Self::Connected) {
            return (peer, None);
        }
        let mut session = peer.session().await;
        match self {
            Self::Connected => {}
            Self::Admitted => {
                let mut pipe = entry(0, &[b"pipe"], Kind::File);
                pipe.size = None;
                session.announce(&pipe).await;
                session.verdict().await;
            }
            Self::Reserving => {
                for id in 0..8 {
                    session
                        .announce(&file(id, &format!("s{id}"), 200_000))
                        .await;
                }
                session.verdict().await;
            }
            Self::Begun => {
                session.wanted(0, "large", 64 << 20).await;
                let body = vec![0; 256 << 10];
                let (send, receipt) = session.transfer(&plan(0, &[(0, 64 << 20)]), &body).await;
                std::mem::forget((send, receipt));
            }
        }
        (peer, Some(session))
    }
}

/// Sends a file over a path with delay; returns how long it takes.
async fn time_of_a_transfer(host: &Host, name: &str) -> Duration {
    let settings = Settings {
        delay: DELAY,
        rate: Some(RATE),
        queue: 1 << 20,
        ..Settings::default()
    };
    let path = Path::to(host.address, 7, settings).await;
    let trust = ServerTrust {
        pin: Some(host.key_id),
        ..ServerTrust::default()
    };
    let identity = Identity::generate().unwrap();
    let port = path.address.port();
    let client = Client::connect(&identity, &trust, "127.0.0.1", port, &patient()).await;
    let client = client.unwrap();
    let source = tempfile::tempdir().unwrap();
    let from = source.path().join("f");
    write(&from, &content(1, SIZE));
    let begin = Instant::now();
    let options = to(&[&from], name);
    let outcome = within(client.push(&options, haul::ignore())).await.unwrap();
    assert_eq!(outcome.sent.failed, 0, "{:?}", outcome.sent.failures);
    let took = begin.elapsed();
    client.close().await;
    took
}

/// Compares a transfer beside idle connections of each kind with a quiet one.
async fn beside_idle_connections(connections: usize) {
    // One permit for each, so that only memory is shared.
    let config = Config {
        max_transfers: 4 * connections,
        max_connections: 4 * connections + 100,
        ..patient()
    };
    for idle in Idle::ALL {
        let host = Host::serving(Arc::new(MemoryStore::new()), config.clone());
        let mut quiet = time_of_a_transfer(&host, "quiet").await;
        let mut hostile = Vec::new();
        for _ in 0..connections {
            hostile.push(idle.open(&host).await);
        }
        tokio::time::sleep(IDLE_TIME).await;
        let mut beside = time_of_a_transfer(&host, "beside").await;
        // Another program may have taken the processor. What these peers take, they take each time.
        for again in 0..2 {
            if quiet.as_secs_f64() >= 0.9 * beside.as_secs_f64() {
                break;
            }
            let calm = Host::serving(Arc::new(MemoryStore::new()), config.clone());
            quiet = time_of_a_transfer(&calm, "quiet").await;
            beside = time_of_a_transfer(&host, &format!("beside{again}")).await;
        }
        let ratio = quiet.as_secs_f64() / beside.as_secs_f64();
        println!("{connections} connections, {idle:?}: {quiet:?} and {beside:?}, ratio {ratio:.2}");
        assert!(ratio >= 0.9, "{idle:?}: {quiet:?} and {beside:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forty_idle_connections_take_no_window_from_others() {
    beside_idle_connections(40).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_idle_connections_take_no_window() {
    beside_idle_connections(200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "opens 4,000 connections: takes minutes"]
async fn a_thousand_idle_connections_take_no_window() {
    haul::internal::storage::open_files::raise_open_files();
    beside_idle_connections(1_000).await;
}

/// What a peer's streams begin with, and never end.
#[derive(Debug, Clone, Copy)]
enum Unfinished {
    Request,
    Hello,
    Plan,
    Manifest,
}

impl Unfinished {
    /// The bytes of each stream of a connection.
    fn bytes(self, handle: u64) -> Vec<u8> {
        const LENGTH: [u8; 4] = [0x80, 0, 0xff, 0xff];
        let mut bytes = match self {
            Self::Request => [&[1], &hello()[..], &[2], &LENGTH].concat(),
            Self::Hello => vec![1, 1, 0x4f, 0xff],
            Self::Plan => [&head(3, handle)[..], &[0x20], &LENGTH].concat(),
            // Of a session that is not yet there.
            Self::Manifest => head(2, 0),
        };
        // Less than the length says.
        let length = if let Self::Hello = self {
            4_090
        } else {
            65_000
        };
        bytes.resize(length, 0);
        bytes
    }
}

/// Fills 1,100 streams as far as the server's window allows, and returns once nothing moves any more.
async fn fill_streams(connection: &Connection, bytes: Vec<u8>) {
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..1_100 {
        let connection = connection.clone();
        let bytes = bytes.clone();
        tasks.spawn(async move {
            let Ok((mut send, receive)) = connection.open_bi().await else {
                return;
            };
            let _ = send.write_all(&bytes).await;
            std::future::pending::<()>().await;
            drop(receive);
        });
    }
    let sent = || connection.stats().frame_tx.stream;
    let mut before = 0;
    while sent() > before {
        before = sent();
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    // On a busy machine the server may give such a peer up meanwhile. It keeps nothing then either.
    if let Some(closed) = connection.close_reason() {
        println!("closed: {closed}");
    }
    std::mem::forget(tasks);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[cfg(target_os = "linux")]
async fn unfinished_frames_keep_little_memory() {
    for unfinished in [
        Unfinished::Request,
        Unfinished::Hello,
        Unfinished::Plan,
        Unfinished::Manifest,
    ] {
        let server = Serving::start(&[]);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, server.port));
        let identity = Identity::generate().unwrap();
        let connecting = Peer::connecting(address, server.key_id, &identity, |_| {});
        let (endpoint, connection) = within(connecting).await;
        let connection = connection.unwrap();
        let peer = Peer::of(endpoint, connection.clone());
        let session = peer.session().await;
        let quiet = server.resident();
        fill_streams(&connection, unfinished.bytes(session.handle)).await;
        let growth = server.resident().saturating_sub(quiet);
        println!("{unfinished:?}: {} KiB", growth >> 10);
        assert!(growth <= 16 << 20, "{unfinished:?}: {} KiB", growth >> 10);
    }
}
