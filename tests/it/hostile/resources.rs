//! Peers that use up credit, memory, threads and places, and return none.

use bytes::BytesMut;
use haul::internal::protocol::{End, Hello, Message, Ready, Refused};
use haul::{Code, Config, Identity, Kind, Reason};

use crate::hostile::peer::*;
use crate::support::write;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_reads_no_verdicts_loses_only_its_session() {
    let arena = Arena::new(impatient());
    let identity = Identity::generate().unwrap();
    let peer = Peer::connect_as(&arena.host, &identity, |t| {
        t.stream_receive_window(500_u32.into());
    })
    .await;
    let mut session = peer.session().await;
    let mut entries = BytesMut::new();
    for id in 0..5_000 {
        entry(id, &[b".."], Kind::Directory).put(&mut entries);
    }
    within(session.manifest.write_all(&entries)).await.unwrap();
    arena.honest().await;
    assert!(
        within(session.answers.frame(4096)).await.is_err(),
        "the session is over, and nothing more is said"
    );
    peer.closed_with(Code::TimedOut, "").await;
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_reads_no_receipts_does_not_block_others() {
    let arena = Arena::new(Config {
        max_transfers: 1,
        ..impatient()
    });
    let identity = Identity::generate().unwrap();
    // Credit for hello, ready and verdicts, which are read, and for less than one whole receipt.
    let peer = Peer::connect_as(&arena.host, &identity, |t| {
        t.receive_window(1_000_u32.into());
    })
    .await;
    let mut session = peer.session().await;
    for id in 0..200 {
        session.wanted(id, &format!("f{id}"), 5).await;
        let (mut send, receipt) = session.transfer(&plan(id, &[(0, 5)]), b"12345").await;
        let _ = within(send.write_all(&trailer(b"other"))).await;
        let _ = send.finish();
        std::mem::forget(receipt);
        if id == 5 {
            break;
        }
    }
    session.announce(&file(900, "large", 1 << 20)).await;
    arena.honest().await;
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_grants_no_credit_for_an_answer_is_given_up() {
    let arena = Arena::new(impatient());
    let identity = Identity::generate().unwrap();
    let peer = Peer::connect_as(&arena.host, &identity, |t| {
        t.stream_receive_window(2_u32.into());
    })
    .await;
    let (_, control, _answers) = peer.ask(&push_into(&[])).await;
    let _ = within(control.stopped()).await;
    peer.closed_with(Code::TimedOut, "").await;
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_connections_leave_memory_for_a_new_one() {
    let arena = Arena::new(Config {
        memory: 1 << 20,
        deadline: std::time::Duration::from_secs(20),
        ..impatient()
    });
    let mut hostile = Vec::new();
    for _ in 0..8 {
        let peer = Peer::connect(&arena.host).await;
        let mut session = peer.session().await;
        session.wanted(0, "w", 64 << 20).await;
        // A body whose first byte never arrives delays nothing, since it is read unordered; a message does.
        let mut filled = Vec::new();
        for _ in 0..20 {
            let (connection, head) = (peer.connection.clone(), head(3, session.handle));
            // Earlier data may have filled the window already: then not even a head can be sent.
            filled.push(tokio::spawn(async move {
                let (mut send, receive) = connection.open_bi().await.unwrap();
                let plan = [0x20, 0x80, 0, 0xff, 0xff];
                let _ = send
                    .write_all(&[&head[..], &plan, &[0; 65_000]].concat())
                    .await;
                std::future::pending::<()>().await;
                drop(receive);
            }));
        }
        hostile.push((peer, session, filled));
    }
    arena.honest().await;
    for (_, _, filled) in &hostile {
        filled.iter().for_each(|task| task.abort());
    }
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unanswered_pulls_take_no_thread_from_others() {
    // tokio has 512 threads for blocking work.
    const PULLS: usize = 560;
    const EACH: usize = 7;
    let arena = Arena::new(patient());
    write(&arena.served().join("f"), b"12345");
    let many: Vec<&[&[u8]]> = vec![&[b"f"]; 1_200];
    let request = pull_of(&many, 1);
    let mut hostile = Vec::new();
    for _ in 0..PULLS / EACH {
        let peer = Peer::connect(&arena.host).await;
        let mut open = Vec::new();
        for _ in 0..EACH {
            let (_, control, mut answers) = peer.ask(&request).await;
            within(answers.read::<Hello>()).await.unwrap();
            within(answers.read::<Ready>()).await.unwrap();
            let manifest = within(peer.connection.accept_bi()).await.unwrap();
            open.push((control, answers, manifest));
        }
        hostile.push((peer, open));
    }
    arena.honest().await;
    drop(hostile);
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn excess_sessions_on_one_connection_are_refused() {
    let arena = Arena::new(patient());
    let peer = Peer::connect(&arena.host).await;
    let mut sessions = Vec::new();
    let refused: Reason = loop {
        let (handle, control, mut answers) = peer.ask(&push_into(&[])).await;
        within(answers.read::<Hello>()).await.unwrap();
        let answer = within(answers.frame(Ready::LIMIT)).await.unwrap().unwrap();
        if answer.kind == Refused::TYPE {
            break answer.decode::<Refused>().unwrap().why.into();
        }
        let manifest = peer.open(&head(2, handle)).await;
        sessions.push((control, answers, manifest));
        assert!(
            sessions.len() < 100,
            "each may keep a mebibyte of entries unanswered"
        );
    };
    assert_eq!(refused.code, Code::Busy);
    // A session that ends makes room for another.
    let (mut control, mut answers, (mut manifest, _verdicts)) = sessions.pop().unwrap();
    manifest.finish().unwrap();
    within(control.write_all(&End::default().to_bytes()))
        .await
        .unwrap();
    within(answers.read::<haul::Summary>()).await.unwrap();
    within(control.stopped()).await.ok();
    // The server removes it from its count a moment after it has released the stream.
    within(async {
        loop {
            let (_, _control, mut answers) = peer.ask(&push_into(&[])).await;
            answers.read::<Hello>().await.unwrap();
            if answers.frame(Ready::LIMIT).await.unwrap().unwrap().kind == Ready::TYPE {
                return;
            }
        }
    })
    .await;
    arena.unharmed().await;
}
