//! Transfers that are wrong on purpose.

use haul::internal::protocol::Verdict;
use haul::internal::protocol::{Committed, Entry, Failed, Message, Plan, Push};
use haul::{Code, Config, Delete, Durability, Identity, Kind, Reason, ReceiveOptions};

use crate::hostile::peer::*;
use crate::support::{content, write};

/// One size that fits into reserved memory, and one that needs a permit first.
const SIZES: [u64; 2] = [5_000, 600_000];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_on_a_new_connection_ends_the_old_one() {
    // No deadline passes, and no permit is lent, during this test.
    let hour = std::time::Duration::from_secs(3600);
    let arena = Arena::new(Config {
        max_transfers: 1,
        stall: hour,
        deadline: hour,
        ..Config::default()
    });
    let (own, push) = (Identity::generate().unwrap(), push_into(&[]));
    let dead = Peer::connect_as(&arena.host, &own, |_| {}).await;
    let mut before = dead.session_as(&push).await;
    // The session has the only permit, and a queue of others behind it.
    before.wanted(0, "f0", 1 << 20).await;
    for id in 1..5 {
        before.announce(&file(id, &format!("f{id}"), 1 << 20)).await;
    }
    // The same id has no meaning for another key.
    let other = Peer::connect(&arena.host).await;
    let _other = other.session_as(&push).await;
    let back = Peer::connect_as(&arena.host, &own, |_| {}).await;
    let mut session = back.session_as(&push).await;
    dead.closed_with(Code::Superseded, "the connection before")
        .await;
    for id in 0..5 {
        let body = content(id, 1 << 20);
        session.wanted(id, &format!("f{id}"), 1 << 20).await;
        let all = [&body[..], &trailer(&body)].concat();
        let (mut send, mut receipt) = session.transfer(&plan(id, &[(0, 1 << 20)]), &all).await;
        send.finish().unwrap();
        assert_eq!(
            within(receipt.read::<Committed>()).await.unwrap().bytes,
            1 << 20
        );
    }
    assert!(other.connection.close_reason().is_none());
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_that_differs_from_its_plan_leaves_nothing() {
    let arena = Arena::new(patient());
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    let mut id = 0;
    for size in SIZES {
        let body = content(1, size as usize);
        let whole = [(0, size)];
        let good = [&body[..], &trailer(&body)].concat();
        let with = |tail: &[u8]| [&body[..], tail].concat();
        let cases: Vec<(&str, Plan, Vec<u8>, Code)> = vec![
            ("no trailer", plan(0, &whole), body.clone(), Code::Protocol),
            (
                "half a trailer",
                plan(0, &whole),
                good[..good.len() - 1].to_vec(),
                Code::Protocol,
            ),
            (
                "half the body",
                plan(0, &whole),
                body[..100].to_vec(),
                Code::Protocol,
            ),
            ("nothing", plan(0, &whole), vec![], Code::Protocol),
            (
                "wrong digest",
                plan(0, &whole),
                with(&trailer(b"other")),
                Code::Corrupt,
            ),
            (
                "more behind the trailer",
                plan(0, &whole),
                [&good[..], b"x"].concat(),
                Code::Protocol,
            ),
            ("a long body", plan(0, &whole), with(&good), Code::Protocol),
            (
                "an endless body",
                plan(0, &whole),
                with(&vec![0; 3 << 20]),
                Code::Protocol,
            ),
            (
                "garbage for a trailer",
                plan(0, &whole),
                with(&[0x21, 5, 1, 2, 3, 4, 5]),
                Code::Protocol,
            ),
            (
                "an endless trailer",
                plan(0, &whole),
                with(&[0x21, 0xff, 0xff, 0xff]),
                Code::Protocol,
            ),
            (
                "another message",
                plan(0, &whole),
                with(&[0x0a, 1, 0xa0]),
                Code::Protocol,
            ),
            (
                "beyond the file",
                plan(0, &[(0, size + 1)]),
                good.clone(),
                Code::Protocol,
            ),
            (
                "far beyond",
                plan(0, &[(0, size), (1 << 62, 1 << 61)]),
                good.clone(),
                Code::Protocol,
            ),
            (
                "what is not held",
                plan(0, &[(1000, size - 1000)]),
                good[1000..].to_vec(),
                Code::Protocol,
            ),
            (
                "nothing planned",
                plan(0, &[]),
                trailer(&body),
                Code::Protocol,
            ),
            (
                "a hole beyond the file",
                with_holes(plan(0, &whole), &[(size, 1)]),
                good.clone(),
                Code::Protocol,
            ),
            (
                "a hole far beyond",
                with_holes(plan(0, &whole), &[(1 << 62, 1 << 61)]),
                good.clone(),
                Code::Protocol,
            ),
            (
                "too little hole",
                with_holes(plan(0, &[(0, 9)]), &[(10, size - 10)]),
                trailer(&body),
                Code::Protocol,
            ),
            (
                "a hole for another's digest",
                with_holes(plan(0, &[(0, size - 1)]), &[(size - 1, 1)]),
                [&body[1..], &trailer(&body)].concat(),
                Code::Corrupt,
            ),
            (
                "another encoding",
                Plan {
                    encoding: 7,
                    ..plan(0, &whole)
                },
                good.clone(),
                Code::Unsupported,
            ),
            (
                "pieces",
                Plan {
                    encoding: 1,
                    ..plan(0, &[])
                },
                good.clone(),
                [Code::Unsupported, Code::Protocol][usize::from(size > 256 << 10)],
            ),
        ];
        for (what, plan, bytes, code) in cases {
            let name = format!("f{id}");
            write(&arena.served().join(&name), b"old");
            session.wanted(id, &name, size).await;
            let (mut send, mut receipt) = session.transfer(&Plan { id, ..plan }, &bytes).await;
            // The stream may have been stopped by now.
            let _ = send.finish();
            let why: Reason = within(receipt.read::<Failed>())
                .await
                .expect(what)
                .why
                .into();
            assert_eq!(why.code, code, "{what} of {size}: {why}");
            assert_eq!(
                arena.names(),
                std::slice::from_ref(&name),
                "{what} of {size}: no partial"
            );
            assert_eq!(
                std::fs::read(arena.served().join(&name)).unwrap(),
                b"old",
                "{what} of {size}"
            );
            std::fs::remove_file(arena.served().join(&name)).unwrap();
            id += 1;
        }
    }
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pieces_without_a_clean_end_leave_nothing() {
    let arena = Arena::new(patient());
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session_as(&push_as(b"f")).await;
    let piece = |bytes: &[u8]| [&[0x25, bytes.len() as u8][..], bytes].concat();
    let end = |size| {
        let digest = *blake3::hash(b"hello").as_bytes();
        haul::internal::protocol::Trailer { digest, size }
            .to_bytes()
            .to_vec()
    };
    let pieces = Plan {
        encoding: 1,
        ..plan(0, &[])
    };
    let cases = [
        ("no end", pieces.clone(), piece(b"hello"), Code::Protocol),
        (
            "half a piece",
            pieces.clone(),
            piece(b"hello")[..4].to_vec(),
            Code::Protocol,
        ),
        (
            "no size",
            pieces.clone(),
            [piece(b"hello"), end(None)].concat(),
            Code::Protocol,
        ),
        (
            "less than it says",
            pieces.clone(),
            [piece(b"hello"), end(Some(6))].concat(),
            Code::Protocol,
        ),
        (
            "another content",
            pieces.clone(),
            [piece(b"hallo"), end(Some(5))].concat(),
            Code::Corrupt,
        ),
        (
            "more behind the end",
            pieces.clone(),
            [piece(b"hello"), end(Some(5)), piece(b"x")].concat(),
            Code::Protocol,
        ),
        (
            "an empty piece",
            pieces.clone(),
            [piece(b""), end(Some(5))].concat(),
            Code::Protocol,
        ),
        (
            "a large piece",
            pieces.clone(),
            vec![0x25, 0xbf, 0xff, 0xff, 0xff, 1],
            Code::Protocol,
        ),
        (
            "another message",
            pieces.clone(),
            vec![0x22, 1, 0xa0],
            Code::Protocol,
        ),
        (
            "ranges",
            plan(0, &[(0, 5)]),
            [b"hello", &end(None)[..]].concat(),
            Code::Protocol,
        ),
        (
            "holes",
            with_holes(pieces.clone(), &[(0, 5)]),
            end(Some(5)),
            Code::Protocol,
        ),
        (
            "another encoding",
            Plan {
                encoding: 2,
                ..pieces.clone()
            },
            piece(b"hello"),
            Code::Unsupported,
        ),
    ];
    write(&arena.served().join("f"), b"old");
    for (id, (what, plan, bytes, code)) in (0..).zip(cases) {
        let entry = Entry {
            size: None,
            ..file(id, "f", 0)
        };
        session.announce(&entry).await;
        assert!(
            matches!(session.verdict().await, Verdict::Want(wanted, held) if wanted == id && held.is_empty())
        );
        let (mut send, mut receipt) = session.transfer(&Plan { id, ..plan }, &bytes).await;
        // The stream may have been stopped by now.
        let _ = send.finish();
        let why: Reason = within(receipt.read::<Failed>())
            .await
            .expect(what)
            .why
            .into();
        assert_eq!(why.code, code, "{what}: {why}");
        assert_eq!(arena.names(), ["f"], "{what}: no partial");
        assert_eq!(
            std::fs::read(arena.served().join("f")).unwrap(),
            b"old",
            "{what}"
        );
    }
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalid_plan_is_refused_before_the_body_is_read() {
    let arena = Arena::new(impatient());
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    let plans: [&[(u64, u64)]; 5] = [
        &[(0, 10), (5, 10)],
        &[(10, 5), (0, 5)],
        &[(0, 0)],
        &[(u64::MAX, 2)],
        &[(1 << 63, 1)],
    ];
    let holes: [&[(u64, u64)]; 6] = [
        &[(0, 10)],
        &[(99, 1)],
        &[(200, 0)],
        &[(200, 20), (210, 20)],
        &[(300, 1), (200, 1)],
        &[(1 << 63, 1)],
    ];
    let plans = plans.map(|ranges| plan(0, ranges)).into_iter();
    let plans = plans.chain(holes.map(|holes| with_holes(plan(0, &[(0, 100)]), holes)));
    for (id, plan) in (0..).zip(plans) {
        session.wanted(id, "f", 600_000).await;
        let plan = Plan { id, ..plan };
        let (mut send, _receipt) = session.transfer(&plan, &[1; 100]).await;
        assert_eq!(stopped(&mut send).await, Code::Protocol, "{plan:?}");
    }
    arena.honest().await;
    // A file that is still wanted has a partial until the deadline.
    within(async {
        while !arena.names().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_that_never_sends_does_not_hold_the_only_permit() {
    let arena = Arena::new(Config {
        max_transfers: 1,
        ..impatient()
    });
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    session.wanted(0, "large", 1 << 20).await;
    session.announce(&file(1, "next", 1 << 20)).await;
    session.announce(&file(2, "small", 10)).await;
    arena.honest().await;
    assert!(!arena.served().join("large").exists());
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_stops_halfway_returns_its_permit_and_fails() {
    let arena = Arena::new(Config {
        max_transfers: 1,
        ..impatient()
    });
    for size in SIZES {
        let peer = Peer::connect(&arena.host).await;
        let mut session = peer.session().await;
        session.wanted(0, "half", size).await;
        let (_send, mut receipt) = session
            .transfer(&plan(0, &[(0, size)]), &content(1, size as usize / 2))
            .await;
        arena.honest().await;
        let why: Reason = within(receipt.read::<Failed>()).await.unwrap().why.into();
        assert_eq!(why.code, Code::TimedOut);
        assert!(!arena.served().join("half").exists());
    }
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_byte_now_and_then_does_not_hold_the_only_permit() {
    let arena = Arena::new(Config {
        max_transfers: 1,
        ..impatient()
    });
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    session.wanted(0, "drip", 1 << 20).await;
    let (mut send, _receipt) = session.transfer(&plan(0, &[(0, 1 << 20)]), b"x").await;
    let dripping = tokio::spawn(async move {
        let mut tick = tokio::time::interval(std::time::Duration::from_millis(50));
        loop {
            tick.tick().await;
            if send.write_all(b"x").await.is_err() {
                return;
            }
        }
    });
    arena.honest().await;
    assert!(!dripping.is_finished(), "it is slow, and no more than that");
    dripping.abort();
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_fails_one_file_and_keeps_its_partial() {
    let arena = Arena::new(Config {
        max_transfers: 1,
        ..impatient()
    });
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    for (id, code, kept) in [
        (0, Code::Cancelled, true),
        (1, Code::Changed, false),
        (2, Code::Other(99), true),
    ] {
        session.wanted(id, "reset", 3 << 20).await;
        let (mut send, mut receipt) = session
            .transfer(&plan(id, &[(0, 3 << 20)]), &content(1, 2 << 20))
            .await;
        // A reset overtakes data in flight, so the file must have grown first.
        within(async {
            while !arena
                .names()
                .iter()
                .any(|n| std::fs::metadata(arena.served().join(n)).is_ok_and(|m| m.len() > 1 << 20))
            {
                tokio::task::yield_now().await;
            }
        })
        .await;
        send.reset(haul::internal::net::stream::varint_of(code))
            .unwrap();
        let why: Reason = within(receipt.read::<Failed>()).await.unwrap().why.into();
        assert_eq!(why.code, code);
        let names = arena.names();
        assert_eq!(names.len(), usize::from(kept), "{names:?}");
        assert!(!names.contains(&"reset".to_owned()));
        for name in names {
            std::fs::remove_file(arena.served().join(name)).unwrap();
        }
    }
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_session_does_not_wait_for_a_sender_that_is_silent() {
    // Its deadline is longer than this test waits.
    let arena = Arena::new(Config {
        max_transfers: 1,
        ..Config::default()
    });
    let identity = haul::Identity::generate().unwrap();
    let dead = Peer::connect_as(&arena.host, &identity, |_| {}).await;
    let mut session = dead.session().await;
    session.wanted(0, "f", 1 << 20).await;
    let alive = Peer::connect_as(&arena.host, &identity, |_| {}).await;
    let mut session = alive.session().await;
    session.wanted(0, "f", 1 << 20).await;
    alive.connection.close(0_u8.into(), b"");
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_file_over_and_over_in_one_session_ends() {
    let arena = Arena::new(Config {
        max_transfers: 2,
        ..impatient()
    });
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    for id in 0..4 {
        session.announce(&file(id, "same", 1 << 20)).await;
    }
    arena.honest().await;
    for _ in 0..4 {
        // The files are wanted one after the other, as each earlier one is given up or taken over.
        assert!(matches!(
            session.verdict().await,
            Verdict::Want(..) | Verdict::Refuse(..)
        ));
    }
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_enormous_announced_size_reserves_nothing() {
    let arena = Arena::new(patient());
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    let size = i64::MAX as u64;
    session.wanted(0, "huge", size).await;
    let (mut send, mut receipt) = session
        .transfer(&plan(0, &[(0, size)]), &[1; 100_000])
        .await;
    send.finish().unwrap();
    let why: Reason = within(receipt.read::<Failed>()).await.unwrap().why.into();
    assert_eq!(why.code, Code::Protocol);
    assert!(file(0, "huge", size).to_bytes().len() < 100);
    assert_eq!(arena.names(), Vec::<String>::new());
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_replaces_only_when_the_new_content_is_whole() {
    let arena = Arena::new(Config {
        allow_delete: true,
        ..patient()
    });
    for size in [5, 400_000_u64] {
        write(&arena.served().join("m/big/kept"), b"kept");
        let peer = Peer::connect(&arena.host).await;
        let mut session = peer.session_as(&mirror_to(b"m")).await;
        session.announce(&entry(0, &[b"m"], Kind::Directory)).await;
        session.verdict().await;
        session
            .announce(&Entry {
                size: Some(size),
                ..entry(1, &[b"m", b"big"], Kind::File)
            })
            .await;
        assert_eq!(session.verdict().await, Verdict::Want(1, vec![]));
        let body = vec![1; size as usize];
        let all = [&body[..], &trailer(b"something else")].concat();
        let (mut send, mut receipt) = session.transfer(&plan(1, &[(0, size)]), &all).await;
        send.finish().unwrap();
        let failed = within(receipt.read::<Failed>()).await.unwrap();
        assert_eq!(Reason::from(failed.why).code, Code::Corrupt);
        assert_eq!(
            std::fs::read(arena.served().join("m/big/kept")).unwrap(),
            b"kept",
            "{size}"
        );
    }
    arena.unharmed().await;
}

/// A push that mirrors a directory.
fn mirror_to(name: &[u8]) -> Vec<u8> {
    Push {
        session: [3; 16],
        destination: components(&[name]),
        into: false,
        sources: 1,
        directory: true,
        durability: Durability::Visible,
        take: Some(ReceiveOptions {
            delete: Some(Delete::default()),
            ..ReceiveOptions::default()
        }),
        filter: None,
        origin: None,
    }
    .to_bytes()
    .to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_of_any_size_may_have_holes() {
    let arena = Arena::new(impatient());
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    let mut id = 0;
    for size in SIZES {
        let (start, end) = (1000, size - 2000);
        let cases: [&[(u64, u64)]; 4] = [
            &[(start, end - start)],
            &[(0, start), (end, size - end)],
            &[(0, size)],
            &[(start, 500), (start + 500, 500), (end, 1)],
        ];
        for holes in cases {
            let mut body = content(id, size as usize);
            let (mut ranges, mut sent, mut next) = (Vec::new(), Vec::new(), 0);
            for &(offset, length) in holes.iter().chain([&(size, 0)]) {
                if offset > next {
                    ranges.push((next, offset - next));
                    sent.extend_from_slice(&body[next as usize..offset as usize]);
                }
                next = offset + length;
            }
            for &(offset, length) in holes {
                body[offset as usize..(offset + length) as usize].fill(0);
            }
            let plan = with_holes(plan(id, &ranges), holes);
            let mut hasher = haul::internal::protocol::content_hasher(size, plan.holes());
            let digest = hasher.update(&sent).finalize().into();
            let trailer = haul::internal::protocol::Trailer { digest, size: None }.to_bytes();
            let name = format!("f{id}");
            session.wanted(id, &name, size).await;
            let all = [&sent[..], &trailer].concat();
            let (mut send, mut receipt) = session.transfer(&plan, &all).await;
            send.finish().unwrap();
            let committed = within(receipt.read::<Committed>()).await;
            assert_eq!(committed.expect("a receipt").bytes, size, "{holes:?}");
            let there = std::fs::read(arena.served().join(&name)).unwrap();
            assert!(there == body, "{holes:?} of {size}");
            id += 1;
        }
    }
    arena.unharmed().await;
}
