//! Streams that are silent, incomplete, or not wanted.

use std::sync::Arc;

use haul::internal::net::stream::MessageReader;
use haul::internal::protocol::Verdict;
use haul::internal::protocol::{Committed, Hello, Message, Refused, put_varint};
use haul::{Admission, Code, Config, Error, Identity, MemoryStore};
use quinn::ConnectionError;

use crate::hostile::peer::*;
use crate::support::content;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_silent_streams_are_given_up() {
    let arena = Arena::new(impatient());
    let peer = Peer::connect(&arena.host).await;
    let _session = peer.session().await;
    let mut silent = Vec::new();
    for _ in 0..1_000 {
        silent.push(within(peer.connection.open_bi()).await.unwrap());
    }
    // In QUIC, opening a stream opens all earlier ones.
    let (last, _) = silent.last_mut().unwrap();
    within(last.write_all(&[3])).await.unwrap();
    arena.honest().await;
    for (send, _) in &mut silent {
        assert_eq!(stopped(send).await, Code::TimedOut);
    }
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_waits_for_a_paused_disk_is_not_given_up() {
    const LARGE: usize = 3 << 20;
    let config = impatient();
    let deadline = config.deadline;
    let (arena, store) = Arena::with_slow_disk(config);
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    session.wanted(0, "large", LARGE as u64).await;
    session.wanted(1, "small", 5).await;
    let held = store.hold();
    // Opened first, and without credit to begin on it, as if the other stream had used all of it.
    let (mut late, receipt) = within(peer.connection.open_bi()).await.unwrap();
    let mut late_receipt = MessageReader::new(receipt);
    let body = content(7, LARGE);
    let bytes = [&body[..], &trailer(&body)].concat();
    let plan_of_it = plan(0, &[(0, LARGE as u64)]);
    let standing = async {
        tokio::time::sleep(deadline * 4).await;
        drop(held);
    };
    let ((mut large, mut receipt), ()) =
        tokio::join!(session.transfer(&plan_of_it, &bytes), standing);
    large.finish().unwrap();
    let whole = [
        &head(3, session.handle),
        &plan(1, &[(0, 5)]).to_bytes()[..],
        b"small",
        &trailer(b"small"),
    ]
    .concat();
    within(late.write_all(&whole)).await.unwrap();
    late.finish().unwrap();
    for (receipt, size) in [(&mut receipt, LARGE as u64), (&mut late_receipt, 5)] {
        assert_eq!(
            within(receipt.read::<Committed>()).await.unwrap().bytes,
            size
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_with_half_a_head_is_given_up() {
    let arena = Arena::new(impatient());
    let peer = Peer::connect(&arena.host).await;
    let session = peer.session().await;
    let whole = [
        &head(3, session.handle)[..],
        &plan(0, &[(0, 5)]).to_bytes()[..],
    ]
    .concat();
    let mut streams = Vec::new();
    for length in 1..whole.len() {
        streams.push(peer.open(&whole[..length]).await);
    }
    for kind in [2, 3] {
        // The first byte of a handle that has eight.
        streams.push(peer.open(&[kind, 0xc0]).await);
    }
    for (send, _) in &mut streams {
        assert_eq!(stopped(send).await, Code::TimedOut);
    }
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_request_ends_its_session_by_the_deadline() {
    let arena = Arena::new(impatient());
    let peer = Peer::connect(&arena.host).await;
    let whole = [&[1], &hello()[..], &push_into(&[])[..]].concat();
    let mut streams = Vec::new();
    for length in 1..whole.len() {
        streams.push(peer.open(&whole[..length]).await);
    }
    // No manifest follows.
    streams.push(peer.open(&whole).await);
    for (send, _) in &mut streams {
        // The connection is closed once no session runs on it.
        let _ = within(send.stopped()).await;
    }
    peer.closed_with(Code::TimedOut, "").await;
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unwanted_streams_are_refused_and_the_connection_lives() {
    let arena = Arena::new(impatient());
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    let handle = session.handle;
    session.wanted(3, "a", 5).await;
    let transfer =
        |handle, id| [&head(3, handle)[..], &plan(id, &[(0, 5)]).to_bytes()[..]].concat();
    let unasked = [
        (vec![0], Code::Unsupported),
        (vec![5, 1, 2, 3], Code::Unsupported),
        (vec![0xff; 100], Code::Unsupported),
        (transfer(handle, 0), Code::NotWanted),
        (transfer(handle, u64::MAX), Code::NotWanted),
        (transfer(handle + 400, 3), Code::NotWanted),
        (head(2, handle), Code::NotWanted),
        (head(2, (1 << 62) - 1), Code::NotWanted),
    ];
    for (bytes, code) in unasked {
        let (mut send, _receive) = peer.open(&bytes).await;
        assert_eq!(stopped(&mut send).await, code, "{bytes:?}");
    }
    // The wanted file is still wanted, once.
    let (mut send, mut receipt) = session.transfer(&plan(3, &[(0, 5)]), b"12345").await;
    within(send.write_all(&trailer(b"12345"))).await.unwrap();
    send.finish().unwrap();
    within(receipt.read::<Committed>()).await.unwrap();
    let (mut again, _receipt) = session.transfer(&plan(3, &[(0, 5)]), b"54321").await;
    assert_eq!(stopped(&mut again).await, Code::NotWanted);
    assert_eq!(std::fs::read(arena.served().join("a")).unwrap(), b"12345");
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_streams_for_one_wanted_file_write_one_file() {
    let arena = Arena::new(impatient());
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    session.wanted(0, "a", 1 << 20).await;
    let content = vec![9; 1 << 20];
    let (mut first, mut receipt) = session
        .transfer(&plan(0, &[(0, 1 << 20)]), &content[..1000])
        .await;
    // The first to arrive gets it; only the server knows which one that is.
    let (mut second, mut other) = session
        .transfer(&plan(0, &[(0, 1 << 20)]), &content[..1000])
        .await;
    for stream in [&mut first, &mut second] {
        let _ = within(stream.write_all(&content[1000..])).await;
        let _ = within(stream.write_all(&trailer(&content))).await;
        let _ = stream.finish();
    }
    let receipts = [
        within(receipt.read::<Committed>()).await.is_ok(),
        within(other.read::<Committed>()).await.is_ok(),
    ];
    assert_eq!(
        receipts.iter().filter(|&&r| r).count(),
        1,
        "one of them is the transfer"
    );
    assert_eq!(arena.names(), ["a"]);
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_request_is_refused_as_unsupported() {
    let arena = Arena::new(impatient());
    let peer = Peer::connect(&arena.host).await;
    let mut unknown = bytes::BytesMut::from(&[0x77][..]);
    put_varint(&mut unknown, 60_000);
    unknown.resize(unknown.len() + 60_000, 1);
    for request in [unknown.to_vec(), vec![0xff, 0]] {
        let (_, _control, mut answers) = peer.ask(&request).await;
        within(answers.read::<Hello>()).await.unwrap();
        let refused: haul::Reason = within(answers.read::<Refused>()).await.unwrap().why.into();
        assert_eq!(refused.code, Code::Unsupported);
    }
    let mut session = peer.session().await;
    session.wanted(0, "a", 5).await;
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_closes_at_any_point_leaves_nothing_behind() {
    let arena = Arena::new(Config {
        max_transfers: 1,
        ..impatient()
    });
    for state in 0..9 {
        let peer = Peer::connect(&arena.host).await;
        let mut open = Vec::new();
        match state {
            0 => {}
            1 => open.push(peer.open(&[1]).await),
            2 => {
                let (_, control, answers) = peer.ask(&[]).await;
                open.push((control, answers));
            }
            3 => {
                let (_, control, answers) = peer.ask(&push_into(&[])).await;
                open.push((control, answers));
            }
            _ => {
                let mut session = peer.session().await;
                let size = if state % 2 == 0 { 5 } else { 1 << 20 };
                if state > 4 {
                    session.wanted(0, "gone", size).await;
                }
                if state > 6 {
                    open.push(session.transfer(&plan(0, &[(0, size)]), b"1234").await);
                }
                peer.connection.close(1_u8.into(), b"");
            }
        }
        peer.connection.close(1_u8.into(), b"");
        arena.honest().await;
        assert!(!arena.served().join("gone").exists(), "{state}");
    }
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_ends_halfway_is_over() {
    let arena = Arena::new(Config {
        max_transfers: 1,
        ..impatient()
    });
    let peer = Peer::connect(&arena.host).await;
    // The control stream ends without End: the session is over, and its manifest with it.
    let mut session = peer.session().await;
    session.wanted(0, "a", 1 << 20).await;
    session.control.finish().unwrap();
    assert!(
        within(session.answers.frame(4096)).await.is_err()
            || peer.connection.close_reason().is_some()
    );
    arena.honest().await;
    // Reset instead of ended.
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    session.wanted(0, "a", 1 << 20).await;
    session.control.reset(6_u8.into()).unwrap();
    assert!(within(session.answers.frame(4096)).await.is_err());
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_client_gets_its_key_and_the_line_to_admit_it() {
    watch_panics();
    let identity = Identity::generate().unwrap();
    let key_id = identity.key_id();
    let options = haul::ServerOptions {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        identity,
        admission: Admission::default(),
        store: Arc::new(MemoryStore::new()),
        config: impatient(),
        observer: haul::ignore(),
    };
    let server = haul::Server::bind(options).unwrap();
    let address = server.local_addresses()[0];
    let serving = tokio::spawn(server.run(std::future::pending(), std::future::pending()));
    let stranger = Identity::generate().unwrap();
    let sentence = loop {
        let (_endpoint, connection) =
            within(Peer::connecting(address, key_id, &stranger, |_| {})).await;
        match within(connection.unwrap().closed()).await {
            ConnectionError::ApplicationClosed(close) => {
                assert_eq!(
                    haul::internal::net::stream::code_of(close.error_code),
                    Code::NotAdmitted
                );
                break String::from_utf8(close.reason.to_vec()).unwrap();
            }
            // See Peer::closed_with.
            ConnectionError::Reset => {}
            other => panic!("{other}"),
        }
    };
    assert!(
        sentence.contains(&format!("authorized_keys: {} NAME", stranger.key_id())),
        "{sentence}"
    );

    // The same, as a user sees it.
    let trust = haul::ServerTrust {
        pin: Some(key_id),
        ..Default::default()
    };
    let config = Config::default();
    let client = haul::Client::connect(&stranger, &trust, "127.0.0.1", address.port(), &config);
    let client = within(client).await.unwrap();
    let source = tempfile::tempdir().unwrap();
    let options = crate::support::to(&[source.path()], "x");
    let error = within(client.push(&options, haul::ignore()))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::NotAdmitted(why) if why.text.contains(&stranger.key_id().to_string())),
        "{error}"
    );
    serving.abort();
    no_panics();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_without_a_certificate_is_refused() {
    let arena = Arena::new(impatient());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let trust = haul::ServerTrust {
        pin: Some(arena.host.key_id),
        ..Default::default()
    };
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(
            trust
                .verifier("127.0.0.1", arena.host.address.port())
                .unwrap(),
        )
        .with_no_client_auth();
    tls.alpn_protocols = vec![haul::internal::protocol::ALPN.to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let endpoint =
        haul::internal::net::endpoint::bind("127.0.0.1:0".parse().unwrap(), None).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    // A TLS 1.3 client finishes its handshake before the server has decided; the alert arrives later.
    let refused = match within(
        endpoint
            .connect_with(config, arena.host.address, "127.0.0.1")
            .unwrap(),
    )
    .await
    {
        Ok(connection) => within(connection.closed()).await,
        Err(error) => error,
    };
    assert!(
        matches!(refused, ConnectionError::ConnectionClosed(_)),
        "{refused}"
    );
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_that_do_not_ascend_break_the_protocol() {
    let arena = Arena::new(impatient());
    for ids in [[5, 5], [5, 4], [u64::MAX, 0], [u64::MAX, u64::MAX]] {
        let peer = Peer::connect(&arena.host).await;
        let mut session = peer.session().await;
        session.wanted(ids[0], "first", 5).await;
        session.announce(&file(ids[1], "second", 5)).await;
        peer.closed_with(Code::Protocol, &format!("{ids:?}")).await;
    }
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    session
        .announce(&entry(u64::MAX, &[b"d"], haul::Kind::Directory))
        .await;
    assert_eq!(session.verdict().await, Verdict::Done(u64::MAX));
    arena.unharmed().await;
}
