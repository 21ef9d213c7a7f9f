use std::net::SocketAddr;
use std::time::{Duration, UNIX_EPOCH};

use super::*;
use proptest::prelude::*;

fn entry(path: Vec<Vec<u8>>, size: u64, seconds: i64) -> Entry {
    Entry {
        id: 7,
        path: Components(path),
        kind: Kind::File,
        size: Some(size),
        modified: Some(Time {
            seconds,
            nanoseconds: 5,
        }),
        mode: Some(0o644),
        ..Entry::default()
    }
}

fn take(mut bytes: &[u8]) -> Result<Option<Frame>, Malformed> {
    let mut buffer = BytesMut::new();
    buffer.put(&mut bytes);
    Frame::take(&mut buffer, 65536)
}

#[test]
fn a_length_over_the_limit_is_refused_at_once() {
    let mut header = BytesMut::new();
    header.put_u8(Hello::TYPE);
    put_varint(&mut header, 1 << 40);
    assert!(matches!(take(&header), Err(Malformed::TooLong { length, .. }) if length == 1 << 40));
}

#[test]
fn fields_of_a_newer_peer_are_ignored() {
    let mut payload = Vec::new();
    let mut e = minicbor::Encoder::new(&mut payload);
    e.map(2)
        .unwrap()
        .u32(0)
        .unwrap()
        .u64(9)
        .unwrap()
        .u32(77)
        .unwrap()
        .str("new")
        .unwrap();
    let frame = Frame {
        kind: Skip::TYPE,
        payload: payload.into(),
    };
    assert_eq!(frame.decode::<Skip>(), Ok(Skip { id: 9 }));
}

#[test]
fn overlapping_or_endless_ranges_are_refused() {
    let plan = |ranges: &[(u64, u64)]| {
        let ranges = ranges
            .iter()
            .map(|&(offset, length)| Range { offset, length })
            .collect();
        take(
            &Plan {
                id: 1,
                encoding: 0,
                ranges,
                holes: None,
            }
            .to_bytes(),
        )
        .unwrap()
        .unwrap()
        .decode::<Plan>()
    };
    assert!(plan(&[(0, 10), (10, 5), (20, 1)]).is_ok());
    assert!(plan(&[(0, 10), (9, 5)]).is_err());
    assert!(plan(&[(0, 0)]).is_err());
    assert!(plan(&[(u64::MAX, 2)]).is_err());
    assert!(plan(&[(i64::MAX as u64, 1)]).is_err());
}

#[test]
fn holes_that_overlap_anything_are_refused() {
    let plan = |holes: &[(u64, u64)]| {
        let holes = Some(
            holes
                .iter()
                .map(|&(offset, length)| Range { offset, length })
                .collect(),
        );
        let ranges = vec![Range {
            offset: 10,
            length: 10,
        }];
        take(
            &Plan {
                id: 1,
                encoding: 0,
                ranges,
                holes,
            }
            .to_bytes(),
        )
        .unwrap()
        .unwrap()
        .decode::<Plan>()
    };
    assert!(plan(&[(0, 10), (20, 5)]).is_ok());
    for bad in [
        &[(0, 11)][..],
        &[(19, 5)],
        &[(10, 10)],
        &[(12, 1)],
        &[(0, 0)],
        &[(0, 5), (4, 3)],
        &[(20, u64::MAX)],
    ] {
        assert!(plan(bad).is_err(), "{bad:?}");
    }
    let many: Vec<_> = (0..=MAX_HOLES as u64).map(|i| (100 + 2 * i, 1)).collect();
    assert!(plan(&many).is_err());
}

#[test]
fn the_fields_of_an_entry_must_fit_its_kind() {
    let check = |e: Entry| take(&e.to_bytes()).unwrap().unwrap().decode::<Entry>();
    let good = entry(vec![b"a".to_vec()], 1, 0);
    assert!(check(good.clone()).is_ok());
    assert!(
        check(Entry {
            kind: Kind::Symlink,
            ..good.clone()
        })
        .is_err()
    );
    assert!(
        check(Entry {
            target: Some(b"x".to_vec()),
            ..good.clone()
        })
        .is_err()
    );
    assert!(
        check(Entry {
            path: Components::default(),
            ..good.clone()
        })
        .is_err()
    );
    assert!(
        check(Entry {
            size: Some(u64::MAX),
            ..good
        })
        .is_err()
    );
}

#[test]
fn the_longest_messages_fit_their_limits() {
    let held = (0..MAX_HELD as u64)
        .map(|i| Held {
            range: Range {
                offset: i64::MAX as u64 / 2 + 2 * i,
                length: 1,
            },
            digest: [0xff; 32],
        })
        .collect();
    assert!(
        Want {
            id: u64::MAX,
            held: Some(held)
        }
        .to_bytes()
        .len()
            <= Want::LIMIT
    );
    let range = |i| Range {
        offset: i64::MAX as u64 / 2 + (i << 40),
        length: 1 << 39,
    };
    let ranges = (0..MAX_PLAN_RANGES as u64).map(|i| range(2 * i)).collect();
    let holes = Some((0..MAX_HOLES as u64).map(|i| range(2 * i + 1)).collect());
    assert!(
        Plan {
            id: u64::MAX,
            encoding: u32::MAX,
            ranges,
            holes
        }
        .fits()
    );
    let long = Entry {
        target: Some(vec![b'x'; MAX_SYMLINK]),
        kind: Kind::Symlink,
        size: None,
        ..entry(vec![b"a".to_vec(); 2048], 0, i64::MIN)
    };
    assert!(long.to_bytes().len() <= Entry::LIMIT);
}

#[test]
fn entries_with_the_most_metadata_fit_their_limit() {
    let xattr = |at: u8, value| Xattr {
        name: vec![b'x', at],
        value: vec![at; value],
    };
    let name = Some(vec![b'x'; MAX_OWNER_NAME]);
    let owner = Owner {
        user: u32::MAX - 1,
        group: u32::MAX - 1,
        user_name: name.clone(),
        group_name: name,
    };
    let entry = Entry {
        owner: Some(owner),
        ..entry(vec![b"a".to_vec(); 2048], 1 << 62, i64::MIN)
    };
    let many = MAX_XATTR_BYTES / (2 + XATTR_OVERHEAD);
    for xattrs in [
        vec![xattr(1, MAX_XATTR_BYTES - 2 - XATTR_OVERHEAD)],
        (1..=many.min(255) as u8).map(|at| xattr(at, 14)).collect(),
    ] {
        let long = Entry {
            xattrs: Some(xattrs),
            hard_link: Some(1),
            ..entry.clone()
        };
        assert!(long.fits() && long.check().is_ok(), "{:?}", long.check());
        assert!(take(&long.to_bytes()).unwrap().is_some());
    }
    let two = |first, second| Entry {
        xattrs: Some(vec![xattr(first, 1), xattr(second, 1)]),
        ..entry.clone()
    };
    assert!(two(1, 2).check().is_ok() && two(1, 1).check().is_err() && two(2, 1).check().is_err());
    assert!(
        Entry {
            xattrs: Some(vec![xattr(1, MAX_XATTR_BYTES)]),
            ..entry.clone()
        }
        .check()
        .is_err()
    );
    assert!(
        Entry {
            owner: Some(Owner {
                user: u32::MAX,
                ..Owner::default()
            }),
            ..entry
        }
        .check()
        .is_err()
    );
}

#[test]
fn times_before_1970_keep_their_nanoseconds() {
    let time = UNIX_EPOCH - Duration::new(1, 250_000_000);
    assert_eq!(
        Time::from(time),
        Time {
            seconds: -2,
            nanoseconds: 750_000_000
        }
    );
    assert_eq!(
        Time::from(UNIX_EPOCH - Duration::from_secs(3)),
        Time {
            seconds: -3,
            nanoseconds: 0
        }
    );
}

proptest! {
    #[test]
    fn varints_read_back(value in 0u64..1 << 62) {
        let mut out = BytesMut::new();
        put_varint(&mut out, value);
        prop_assert_eq!(peek_varint(&out), Some((value, out.len())));
        prop_assert_eq!(peek_varint(&out[..out.len() - 1]), None);
    }

    #[test]
    fn an_entry_cut_anywhere_reads_back(
        path in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 1..8),
        size in 0u64..1 << 63, seconds: i64, cut in 0usize..64,
    ) {
        let entry = entry(path, size, seconds);
        let bytes = entry.to_bytes();
        let cut = cut.min(bytes.len() - 1);
        let mut buffer = BytesMut::from(&bytes[..cut]);
        prop_assert_eq!(Frame::take(&mut buffer, Entry::LIMIT), Ok(None));
        buffer.extend_from_slice(&bytes[cut..]);
        let frame = Frame::take(&mut buffer, Entry::LIMIT).unwrap().unwrap();
        prop_assert_eq!(frame.decode::<Entry>(), Ok(entry));
        prop_assert!(buffer.is_empty());
    }

    #[test]
    fn the_largest_relay_messages_read_back(
        claim: [u8; 16], number: u32, token in ".{0,64}", ip: std::net::IpAddr, port: u16, forward: bool, bound: [u8; 32],
    ) {
        fn survives<M: Message + PartialEq + std::fmt::Debug>(message: M) {
            let frame = take(&message.to_bytes()).unwrap().unwrap();
            assert!(message.fits());
            assert_eq!(frame.decode::<M>(), Ok(message));
        }
        let seen = Address(SocketAddr::new(ip, port));
        let token = Some(token);
        let addresses = vec![seen; MAX_ADDRESSES];
        survives(Place { claim, number: Some(number), token: token.clone().map(Into::into), addresses: addresses.clone() });
        survives(Placed { number, seen });
        survives(Seek { number, token: token.map(Into::into), addresses: addresses.clone(), forward });
        let forward = Some(Forward { port, token: bound });
        survives(Found { addresses: [&addresses[..], &[seen]].concat(), forward });
        prop_assert!(minicbor::decode::<Address>(&minicbor::to_vec(minicbor::bytes::ByteVec::from(bound.to_vec())).unwrap()).is_err());
    }

    #[test]
    fn the_largest_measurement_messages_read_back(id: u64, packets_sent: u64, packets_lost: u64, rtt: u64, milliseconds: u32) {
        fn survives<M: Message>(message: M) -> bool {
            let bytes = message.to_bytes();
            let frame = take(&bytes).unwrap().unwrap();
            message.fits() && frame.decode::<M>().unwrap().to_bytes() == bytes
        }
        let mut all = vec![
            survives(Ping { id }),
            survives(Pong { id, packets_sent, packets_lost, rtt }),
            survives(Received { bytes: packets_sent, microseconds: rtt }),
        ];
        all.extend([Probe::Echo, Probe::Up, Probe::Down].map(|probe| survives(Measure { probe, milliseconds })));
        prop_assert_eq!(all, [true; 6]);
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(kind: u8, payload in proptest::collection::vec(any::<u8>(), 0..400)) {
        let frame = Frame { kind, payload: payload.clone().into() };
        macro_rules! try_all { ($($m:ident)*) => { $( let _ = Frame { kind: $m::TYPE, ..frame.clone() }.decode::<$m>(); )* } }
        try_all!(Hello Push Pull List Ready Refused End Summary GoAway Working Entry Skip Done Want Refuse Plan Trailer Committed Failed Withdraw Measure Ping Pong Received);
        try_all!(Removed Unsendable Complete Listed Introduce Introduced Confirm Offer Accept Place Placed Seek Found);
        let _ = take(&payload);
    }
}
