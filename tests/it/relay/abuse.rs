//! Clients that abuse a relay.

use haul::internal::protocol::{Address, Found, Message, Place, Refused, Seek, put_varint};
use haul::{Allowance, Code, Error, Reason};
use quinn::ConnectionError;

use crate::relay::stage::*;

fn closed_with(closed: &ConnectionError) -> Option<Code> {
    match closed {
        ConnectionError::ApplicationClosed(close) => {
            Some(haul::internal::net::stream::code_of(close.error_code))
        }
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_belongs_to_the_holder_of_its_claim() {
    let relay = Host::new();
    let (first, second) = (
        Guest::at(relay.address).await,
        Guest::at(relay.address).await,
    );
    let (placed, mut reader, _writer) = first.place(&place(1, None)).await.unwrap();
    assert_eq!(placed.seen.0.ip(), relay.address.ip());
    assert!(
        (100_000..1_000_000).contains(&placed.number),
        "six digits, so that guessing finds no one"
    );
    // Another client cannot take it, whatever number it claims to have had.
    let (other, _other_reader, _other_writer) =
        second.place(&place(2, Some(placed.number))).await.unwrap();
    assert_ne!(other.number, placed.number);
    let found = second.seek(&seek(placed.number, false)).await.unwrap();
    assert_eq!(
        addresses(&found)[0],
        canonical(first.endpoint.local_addr().unwrap())
    );
    answer::<Found>(&mut reader).await.unwrap();
    // Over another connection, as when the first is dead and the relay does not know it yet.
    let again = Guest::at(relay.address).await;
    let (kept, mut its, _its_writer) = again.place(&place(1, Some(placed.number))).await.unwrap();
    assert_eq!(kept.number, placed.number);
    assert!(
        within(reader.frame(4096)).await.is_err(),
        "the first is told nothing any more"
    );
    let found = second.seek(&seek(placed.number, false)).await.unwrap();
    assert_eq!(
        addresses(&found)[0],
        canonical(again.endpoint.local_addr().unwrap())
    );
    answer::<Found>(&mut its).await.unwrap();
    // Numbers that no relay gives cannot be claimed.
    for number in [0, 417, 999, u32::MAX] {
        let (placed, _reader, _writer) = second.place(&place(3, Some(number))).await.unwrap();
        assert_ne!(placed.number, number);
    }
}

fn canonical(address: std::net::SocketAddr) -> std::net::SocketAddr {
    std::net::SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_ends_with_its_stream_or_its_connection() {
    let relay = Host::new();
    let (owner, other) = (
        Guest::at(relay.address).await,
        Guest::at(relay.address).await,
    );
    let (first, _reader, writer) = owner.place(&place(1, None)).await.unwrap();
    let (second, mut its, _writer) = owner.place(&place(2, None)).await.unwrap();
    assert_ne!(first.number, second.number);
    writer.finish();
    while other.seek(&seek(first.number, false)).await.is_ok() {}
    other.seek(&seek(second.number, false)).await.unwrap();
    answer::<Found>(&mut its).await.unwrap();
    owner.connection.close(0_u8.into(), b"");
    while other.seek(&seek(second.number, false)).await.is_ok() {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_relay_refuses_until_there_is_room() {
    let relay = Host::with(|options| options.places = 1);
    let guest = Guest::at(relay.address).await;
    let (placed, _reader, writer) = guest.place(&place(1, None)).await.unwrap();
    assert_eq!(refusal(guest.place(&place(2, None)).await).code, Code::Busy);
    let (again, _its, its_writer) = guest.place(&place(1, Some(placed.number))).await.unwrap();
    assert_eq!(
        again.number, placed.number,
        "who has a place needs no other"
    );
    drop((writer, its_writer));
    while let Err(error) = guest.place(&place(2, None)).await {
        assert!(matches!(error, Error::Refused(why) if why.code == Code::Busy));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pairs_are_bounded_in_total_and_to_one_per_end_and_port() {
    for (ports, pairs, most) in [(2, 100, 2), (8, 3, 3)] {
        let relay = Host::with(|options| {
            (options.ports, options.allowance) = (
                ports,
                Allowance {
                    pairs,
                    ..Allowance::default()
                },
            );
        });
        let owner = Guest::at(relay.address).await;
        let (placed, mut reader, _writer) = owner.place(&place(1, None)).await.unwrap();
        let mut forwarded = Vec::new();
        for _ in 0..most + 2 {
            let found = Guest::at(relay.address)
                .await
                .seek(&seek(placed.number, true))
                .await
                .unwrap();
            let told: Found = answer(&mut reader).await.unwrap();
            assert_eq!(found.forward.is_some(), told.forward.is_some());
            forwarded.extend(found.forward.map(|forward| forward.port));
        }
        assert_eq!(
            forwarded.len(),
            most,
            "beyond that each hears of the other all the same"
        );
        forwarded.sort_unstable();
        forwarded.dedup();
        assert_eq!(forwarded.len(), most);
    }
}

/// A receiver seeks for each of its connections, and again for each lost one: a dozen people of one office would
/// otherwise use up the limit of their address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_ends_that_seek_each_other_again_take_no_more_room() {
    let relay = Host::with(|options| options.allowance.pairs = 1);
    let (owner, guest) = (
        Guest::at(relay.address).await,
        Guest::at(relay.address).await,
    );
    let (placed, mut reader, _writer) = owner.place(&place(1, None)).await.unwrap();
    let mut forwards = Vec::new();
    for _ in 0..3 {
        let found = guest.seek(&seek(placed.number, true)).await.unwrap();
        let told: Found = answer(&mut reader).await.unwrap();
        forwards.push([told, found].map(|found| found.forward.expect("room").token));
    }
    assert!(forwards.iter().all(|same| *same == forwards[0]) && forwards[0][0] != forwards[0][1]);
    let another = Guest::at(relay.address)
        .await
        .seek(&seek(placed.number, true))
        .await
        .unwrap();
    assert!(another.forward.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_message_ends_only_its_own_connection() {
    let relay = Host::new();
    let honest = Guest::at(relay.address).await;
    let (placed, mut reader, _writer) = honest.place(&place(1, None)).await.unwrap();
    let raw = |kind: u8, payload: &[u8]| {
        let mut bytes = bytes::BytesMut::from(&[kind][..]);
        put_varint(&mut bytes, payload.len() as u64);
        bytes.extend_from_slice(payload);
        bytes.to_vec()
    };
    let many = vec![Address(relay.address); 17];
    let long = Place {
        token: Some("x".repeat(257).into()),
        ..place(1, None)
    };
    for bytes in [
        raw(Place::TYPE, b"\xff\xff"),
        raw(Seek::TYPE, &[]),
        raw(0x01, b"\xa0"),
        raw(0x7f, b""),
        raw(Found::TYPE, b"\xa0"),
        // An address of five bytes, and lists of any length.
        raw(
            Seek::TYPE,
            b"\xa3\x00\x19\x03\xe8\x02\x81\x45\x7f\x00\x00\x01\x00\x03\xf4",
        ),
        raw(
            Seek::TYPE,
            b"\xa3\x00\x19\x03\xe8\x02\x9b\xff\xff\xff\xff\xff\xff\xff\xff\x03\xf4",
        ),
        Place {
            addresses: many.clone(),
            ..place(1, None)
        }
        .to_bytes()
        .to_vec(),
        Seek {
            addresses: many,
            ..seek(placed.number, true)
        }
        .to_bytes()
        .to_vec(),
        long.to_bytes().to_vec(),
        // Lengths alone.
        vec![Place::TYPE, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        vec![Seek::TYPE, 0x44, 0x01],
    ] {
        let guest = Guest::at(relay.address).await;
        let _streams = guest.ask(&bytes).await;
        let closed = within(guest.connection.closed()).await;
        assert_eq!(
            closed_with(&closed),
            Some(Code::Protocol),
            "{bytes:02x?}: {closed}"
        );
    }
    let found = Guest::at(relay.address)
        .await
        .seek(&seek(placed.number, false))
        .await
        .unwrap();
    assert_eq!(addresses(&found).len(), 1);
    answer::<Found>(&mut reader).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_has_sixteen_streams_and_no_more() {
    let relay = Host::new();
    let (flood, honest) = (
        Guest::at(relay.address).await,
        Guest::at(relay.address).await,
    );
    // Streams that were begun and never finished: the relay waits 10 s for these.
    let mut held = Vec::new();
    for _ in 0..16 {
        held.push(flood.ask(&[Place::TYPE]).await);
    }
    let request = place(1, None);
    let more = async { flood.connection.open_bi().await };
    let mut more = std::pin::pin!(more);
    tokio::select! {
        biased;
        opened = &mut more => panic!("a seventeenth stream: {opened:?}"),
        placed = honest.place(&request) => drop(placed.unwrap()),
    }
    // Those that end make room for others; QUIC says so once an eighth has ended.
    held.truncate(8);
    within(more).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_from_one_address_are_bounded() {
    let relay = Host::new();
    let mut guests = Vec::new();
    let refused = loop {
        match Guest::try_at(relay.address).await {
            Ok(guest) => guests.push(guest),
            Err(error) => break error,
        }
        assert!(guests.len() <= 64);
    };
    assert_eq!(guests.len(), 64);
    assert!(
        matches!(&refused, ConnectionError::ConnectionClosed(close) if close.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED),
        "{refused:?}"
    );
    guests.pop().unwrap().connection.close(0_u8.into(), b"");
    // Once the relay has noticed the close.
    while Guest::try_at(relay.address).await.is_err() {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_that_does_not_read_its_stream_is_not_found() {
    let relay = Host::new();
    let (owner, guest) = (
        Guest::at(relay.address).await,
        Guest::at(relay.address).await,
    );
    let (placed, _reader, _writer) = owner.place(&place(1, None)).await.unwrap();
    // The requests that fill its window are far more than an address may make in a minute; nothing is queued for it.
    let mut last = None;
    for _ in 0..30 {
        last = guest.seek(&seek(placed.number, false)).await.err();
    }
    assert!(matches!(
        last,
        Some(Error::Refused(Reason {
            code: Code::Busy,
            ..
        }))
    ));
    let (mut reader, _writer) = guest.ask(&seek(placed.number, false).to_bytes()).await;
    assert!(
        matches!(within(reader.frame(4096)).await, Ok(Some(frame)) if frame.kind == Refused::TYPE)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_address_takes_all_the_forwarding_capacity() {
    let relay = Host::with(|options| options.ports = 64);
    let owner = Guest::at(relay.address).await;
    let (placed, mut reader, _writer) = owner.place(&place(1, None)).await.unwrap();
    let mut forwarded = 0;
    while let Ok(found) = Guest::at(relay.address)
        .await
        .seek(&seek(placed.number, true))
        .await
    {
        answer::<Found>(&mut reader).await.unwrap();
        forwarded += u32::from(found.forward.is_some());
    }
    assert_eq!(forwarded, 16, "of an address, before its tries are used up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_exact_token_admits() {
    let relay = Host::with(|options| options.token = Some("swordfish".into()));
    let guest = Guest::at(relay.address).await;
    for wrong in [
        None,
        Some(""),
        Some("swordfis"),
        Some("swordfish "),
        Some("Swordfish"),
    ] {
        let token = wrong.map(String::from);
        assert_eq!(
            refusal(
                guest
                    .place(&Place {
                        token: token.clone().map(Into::into),
                        ..place(1, None)
                    })
                    .await
            )
            .code,
            Code::NotAdmitted
        );
        assert_eq!(
            refusal(
                guest
                    .seek(&Seek {
                        token: token.map(Into::into),
                        ..seek(1_000, true)
                    })
                    .await
            )
            .code,
            Code::NotAdmitted
        );
    }
    let right = Place {
        token: Some("swordfish".into()),
        ..place(1, None)
    };
    assert!(guest.place(&right).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_thousand_lookups_from_one_address_few_succeed() {
    let relay = Host::new();
    let mut tried = 0;
    for _ in 0..20 {
        let guest = Guest::at(relay.address).await;
        for number in 1_000..1_050 {
            tried +=
                u32::from(refusal(guest.seek(&seek(number, false)).await).code == Code::NotFound);
        }
    }
    // Each further minute allows 20 more.
    assert!((20..=60).contains(&tried), "{tried}");
}
