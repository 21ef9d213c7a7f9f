//! Malformed messages.

use bytes::{BufMut, BytesMut};
use haul::internal::protocol::{Entry, HELD_BLOCK, List, Message, Plan, put_varint};
use haul::{Code, Kind};

use crate::hostile::peer::*;

/// A message's header, followed by any payload.
fn message(kind: u8, length: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    bytes.put_u8(kind);
    put_varint(&mut bytes, length);
    bytes.extend_from_slice(payload);
    bytes.to_vec()
}

/// Payloads that are not the map of the expected message. Some claim to be far longer than they are.
fn garbage() -> Vec<Vec<u8>> {
    vec![
        vec![],
        vec![0xff],
        vec![0x00],
        vec![0xa1],
        vec![0xbf, 0xff],
        vec![0xbb, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        // Field 0, 1 and 2 as an array, a text and bytes of 2^60 items.
        vec![0xa1, 0x00, 0x9b, 0x10, 0, 0, 0, 0, 0, 0, 0],
        vec![0xa2, 0x00, 0x00, 0x01, 0x9b, 0x10, 0, 0, 0, 0, 0, 0, 0],
        vec![
            0xa3, 0x00, 0x00, 0x01, 0x00, 0x02, 0x9b, 0x10, 0, 0, 0, 0, 0, 0, 0,
        ],
        vec![0xa2, 0x00, 0x00, 0x01, 0x7b, 0x10, 0, 0, 0, 0, 0, 0, 0],
        vec![0xa2, 0x00, 0x00, 0x01, 0x5b, 0x10, 0, 0, 0, 0, 0, 0, 0],
        // An unknown field with arrays in arrays in arrays.
        [&[0xa1, 0x18, 0x63][..], &[0x81; 3000]].concat(),
        [&[0xa1, 0x18, 0x63][..], &[0x9f; 3000]].concat(),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_control_message_closes_the_connection() {
    let arena = Arena::new(patient());
    let good = hello();
    let too_long = |kind, limit: usize| message(kind, limit as u64 + 1, &[]);
    let mut bad = vec![
        message(1, 1 << 60, &[]),
        message(0xff, 1 << 60, &[]),
        too_long(1, 4096),
        [&good[..], &message(2, 1 << 60, &[])].concat(),
        [&good[..], &too_long(3, 65_536)].concat(),
        [
            &good[..],
            &message(4, List::LIMIT as u64 + 1, &vec![0; List::LIMIT + 1]),
        ]
        .concat(),
        push_into(&[]),
    ];
    for payload in garbage() {
        let kinds = [1, 2, 3];
        bad.extend(kinds.map(|kind| {
            let message = message(kind, payload.len() as u64, &payload);
            if kind == 1 {
                message
            } else {
                [&good[..], &message].concat()
            }
        }));
    }
    for bytes in bad {
        let peer = Peer::connect(&arena.host).await;
        let _control = peer.open(&[&[1], &bytes[..]].concat()).await;
        peer.closed_with(
            Code::Protocol,
            &format!("{:?}", &bytes[..bytes.len().min(60)]),
        )
        .await;
    }
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_manifest_message_closes_the_connection() {
    let arena = Arena::new(patient());
    let target = vec![b'x'; 1_000_000];
    let link = Entry {
        target: Some(target),
        ..entry(0, &[b"l"], Kind::Symlink)
    };
    let mut payload = Vec::new();
    minicbor::encode(&link, &mut payload).unwrap();
    let mut bad = vec![
        message(Entry::TYPE, 1 << 60, &[]),
        message(Entry::TYPE, Entry::LIMIT as u64 + 1, &[]),
        message(Entry::TYPE, payload.len() as u64, &payload),
        message(0x20, 4, &[0xa1, 0, 0, 0]),
        Entry {
            kind: Kind::Symlink,
            ..file(0, "a", 5)
        }
        .to_bytes()
        .to_vec(),
        Entry {
            target: Some(b"x".to_vec()),
            ..file(0, "a", 5)
        }
        .to_bytes()
        .to_vec(),
        Entry {
            target: Some(vec![]),
            ..entry(0, &[b"l"], Kind::Symlink)
        }
        .to_bytes()
        .to_vec(),
        Entry {
            target: Some(b"a\0b".to_vec()),
            ..entry(0, &[b"l"], Kind::Symlink)
        }
        .to_bytes()
        .to_vec(),
        Entry {
            target: Some(vec![b'x'; 4096]),
            ..entry(0, &[b"l"], Kind::Symlink)
        }
        .to_bytes()
        .to_vec(),
        file(0, "a", u64::MAX).to_bytes().to_vec(),
    ];
    bad.extend(
        garbage()
            .iter()
            .map(|payload| message(Entry::TYPE, payload.len() as u64, payload)),
    );
    for bytes in bad {
        let peer = Peer::connect(&arena.host).await;
        let mut session = peer.session().await;
        // A server that has read enough closes before everything is written.
        let _ = within(session.manifest.write_all(&bytes)).await;
        peer.closed_with(
            Code::Protocol,
            &format!("{:?}", &bytes[..bytes.len().min(60)]),
        )
        .await;
    }
    assert_eq!(arena.names(), Vec::<String>::new());
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_plan_ends_only_its_own_stream() {
    let arena = Arena::new(patient());
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    session.wanted(0, "a", 5).await;
    let mut bad = vec![
        message(Plan::TYPE, 1 << 60, &[]),
        message(Plan::TYPE, Plan::LIMIT as u64 + 1, &[]),
        plan(0, &vec![(HELD_BLOCK, 1); 1026]).to_bytes().to_vec(),
    ];
    bad.extend(
        garbage()
            .iter()
            .map(|payload| message(Plan::TYPE, payload.len() as u64, payload)),
    );
    for bytes in bad {
        let (mut send, _receive) = peer
            .open(&[&head(3, session.handle)[..], &bytes].concat())
            .await;
        assert_eq!(
            stopped(&mut send).await,
            Code::Protocol,
            "{:?}",
            &bytes[..bytes.len().min(60)]
        );
    }
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unanswered_entries_are_bounded_and_the_largest_is_accepted() {
    let arena = Arena::new(patient());
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    let mut all = BytesMut::new();
    for id in 0..20_000 {
        // Large entries, so that most have to wait; their names need not differ for that.
        file(id, "f", 1 << 40).put(&mut all);
    }
    let _ = within(session.manifest.write_all(&all)).await;
    peer.closed_with(Code::Protocol, "").await;
    arena.honest().await;

    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    let mut big = entry(0, &[b"a"], Kind::File);
    // A field of a newer peer fills the message up to the limit.
    let mut payload = Vec::new();
    minicbor::encode(&big, &mut payload).unwrap();
    payload[0] += 1;
    let fill = Entry::LIMIT - payload.len() - 5;
    payload.extend([0x18, 0x63, 0x59]);
    payload.extend((fill as u16).to_be_bytes());
    payload.resize(Entry::LIMIT, 0);
    within(
        session
            .manifest
            .write_all(&message(Entry::TYPE, payload.len() as u64, &payload)),
    )
    .await
    .unwrap();
    assert!(matches!(
        session.verdict().await,
        haul::internal::protocol::Verdict::Want(0, _)
    ));
    big.id = 1;
    payload.push(0);
    let _ = within(session.manifest.write_all(&message(
        Entry::TYPE,
        payload.len() as u64,
        &payload,
    )))
    .await;
    peer.closed_with(Code::Protocol, "").await;
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_bytes_on_any_stream_do_not_disturb_others() {
    let arena = Arena::new(patient());
    let mut noise = Noise::new(42);
    for round in 0..40 {
        let peer = Peer::connect(&arena.host).await;
        let mut session = peer.session().await;
        if round % 2 == 0 {
            session.wanted(0, "f", [5, 600_000][round / 2 % 2]).await;
        }
        let mut streams = Vec::new();
        for _ in 0..6 {
            let start = match noise.below(8) {
                0 => vec![],
                1 => vec![1],
                2 => [&[1], &hello()[..]].concat(),
                3 => vec![2],
                4 => head(3, session.handle),
                5 => [
                    &head(3, session.handle)[..],
                    &plan(0, &[(0, 5)]).to_bytes()[..],
                ]
                .concat(),
                6 => [&head(3, session.handle)[..], &[Plan::TYPE]].concat(),
                _ => [&[1], &hello()[..], &[2 + noise.below(3) as u8]].concat(),
            };
            let length = noise.below(3000);
            let bytes = [start, noise.bytes(length)].concat();
            let Ok((mut send, receive)) = within(peer.connection.open_bi()).await else {
                break;
            };
            let _ = within(send.write_all(&bytes)).await;
            if noise.below(2) == 0 {
                let _ = send.finish();
            }
            streams.push((send, receive));
        }
        let bytes = match noise.below(3) {
            0 => noise.bytes(200),
            1 => message(Entry::TYPE, 50, &noise.bytes(50)),
            _ => {
                // An entry with a few bits turned.
                let mut bytes = file(1, "g", 5).to_bytes().to_vec();
                let at = noise.below(bytes.len());
                bytes[at] ^= 1 << noise.below(8);
                bytes
            }
        };
        let _ = within(session.manifest.write_all(&bytes)).await;
        if noise.below(2) == 0 {
            let _ = session.manifest.finish();
        }
        // By the time that another stream is answered, or the connection is closed, the server has read everything that
        // it is going to read.
        if let Ok((mut probe, _receive)) = within(peer.connection.open_bi()).await {
            let _ = within(probe.write_all(&[9])).await;
            let _ = within(probe.stopped()).await;
        }
        peer.connection.close(0_u8.into(), b"");
        if round % 10 == 0 {
            arena.honest().await;
        }
    }
    arena.unharmed().await;
}
