//! PROTOCOL.md and the code agree.

use bytes::BytesMut;
use haul::Code;
use haul::internal::protocol::*;

const DOCUMENT: &str = include_str!("../../PROTOCOL.md");

fn rows() -> impl Iterator<Item = Vec<&'static str>> {
    DOCUMENT
        .lines()
        .filter(|line| line.starts_with("| "))
        .map(|line| line.split('|').map(str::trim).collect())
}

#[test]
fn the_table_lists_every_message_with_type_and_limit() {
    let mut documented: Vec<_> = rows()
        .filter(|row| row.len() == 6 && row[2].starts_with("0x") && row[3].parse::<usize>().is_ok())
        .map(|row| {
            (
                row[1],
                u8::from_str_radix(&row[2][2..], 16).unwrap(),
                row[3].parse().unwrap(),
            )
        })
        .collect();
    documented.sort_by_key(|&(_, kind, _)| kind);
    assert_eq!(documented, MESSAGES);
}

#[test]
fn the_table_lists_every_code() {
    let documented: Vec<_> = rows()
        .filter(|row| row.len() == 5 && row[1].starts_with("0x"))
        .map(|row| (u32::from_str_radix(&row[1][2..], 16).unwrap(), row[2]))
        .collect();
    let known: Vec<_> = Code::ALL
        .iter()
        .map(|code| (code.number(), code.name()))
        .collect();
    assert_eq!(documented, known);
}

#[test]
fn the_table_lists_every_stream_type() {
    for (byte, name) in [
        (0x01, "control"),
        (0x02, "manifest"),
        (0x03, "transfer"),
        (0x04, "measurement"),
        (0x05, "introduction"),
    ] {
        assert!(StreamType::from_byte(byte).is_some());
        assert!(DOCUMENT.contains(&format!("| {byte:#04x} | {name} |")));
    }
    assert_eq!(StreamType::from_byte(0x06), None);
}

/// The vectors: name and bytes. Checks that decoding and encoding again gives the same bytes.
fn vectors() -> Vec<(&'static str, Vec<u8>)> {
    let session = *b"0123456789abcdef";
    let components = |names: &[&[u8]]| Components(names.iter().map(|n| n.to_vec()).collect());
    let why = || haul::Reason::new(Code::NoSpace, "full").into();
    let address = |version| {
        Address(
            if version == 4 {
                "192.0.2.7:4433"
            } else {
                "[2001:db8::7]:4433"
            }
            .parse()
            .unwrap(),
        )
    };
    let range = Range {
        offset: 1 << 20,
        length: 5,
    };
    fn all<M: Message>(message: &M) -> (&'static str, Vec<u8>) {
        let bytes = message.to_bytes();
        let frame = Frame::take(&mut BytesMut::from(&bytes[..]), M::LIMIT)
            .unwrap()
            .unwrap();
        assert_eq!(
            frame.decode::<M>().unwrap().to_bytes(),
            bytes,
            "{} does not survive",
            M::NAME
        );
        (M::NAME, bytes.to_vec())
    }
    vec![
        all(&Hello {
            features: vec![],
            agent: "haul".into(),
        }),
        all(&Push {
            session,
            destination: components(&[b"in", b"\xff"]),
            into: true,
            sources: 2,
            directory: false,
            durability: Durability::Synced,
            take: None,
            filter: None,
            origin: None,
        }),
        all(&Push {
            session,
            destination: components(&[b"in"]),
            into: false,
            sources: 1,
            directory: true,
            durability: Durability::Synced,
            take: Some(ReceiveOptions {
                checksum: true,
                delete: Some(Delete { most: Some(100) }),
                modify_window: Some(2),
                ..ReceiveOptions::default()
            }),
            filter: Some(WireFilter {
                rules: vec![b"*.o".to_vec().into()],
                gitignore: false,
            }),
            origin: Some(Origin {
                sources: vec![[1; 16].into()],
                above: vec![[2; 16].into()],
            }),
        }),
        all(&Pull {
            session,
            sources: vec![components(&[b"a"])],
            entries: 10_000,
            entry_bytes: 1 << 20,
            limit: None,
            checksum: None,
            follow: None,
            filter: None,
            xattrs: None,
            owner: None,
            growing: None,
        }),
        all(&Pull {
            session,
            sources: vec![components(&[b"a"])],
            entries: 10_000,
            entry_bytes: 1 << 20,
            limit: Some(2_500_000),
            checksum: None,
            follow: Some(true),
            filter: Some(WireFilter {
                rules: vec![b"*.o".to_vec().into(), b"!\xff".to_vec().into()],
                gitignore: true,
            }),
            xattrs: Some(true),
            owner: Some(true),
            growing: Some(true),
        }),
        all(&List {
            session,
            path: components(&[b"a"]),
            recursive: true,
        }),
        all(&Ready {
            entries: 10_000,
            entry_bytes: 1 << 20,
            ..Ready::default()
        }),
        all(&Ready {
            only: Some(Kind::Directory),
            ..Ready::default()
        }),
        all(&Refused { why: why() }),
        all(&End {
            entries: 3,
            failed: 1,
            ..End::default()
        }),
        all(&End {
            entries: 3,
            failed: 0,
            interrupted: Some(why()),
            ..End::default()
        }),
        all(&End {
            entries: 3,
            spent: Some(SenderTime {
                network: 1500,
                rtt: 100_000,
                sent_packets: 7,
                mtu: 1452,
                ..SenderTime::default()
            }),
            unkept: Some(vec![MetadataWarning {
                aspect: 3,
                count: 1,
                first: "a".into(),
            }]),
            ..End::default()
        }),
        all(&Summary {
            committed: 2,
            bytes: 300,
            skipped: 1,
            failed: 0,
            durability: Durability::Synced,
            ..Summary::default()
        }),
        all(&Summary {
            committed: 2,
            bytes: 300,
            skipped: 1,
            failed: 0,
            durability: Durability::Synced,
            held_up: Some(1500),
            unkept: Some(vec![MetadataWarning {
                aspect: Attribute::Xattr as u32,
                count: 12,
                first: "a/b: not supported".into(),
            }]),
            removed: None,
            unremoved: None,
        }),
        all(&Summary {
            durability: Durability::Synced,
            removed: Some(3),
            unremoved: Some(why()),
            ..Summary::default()
        }),
        all(&GoAway { why: why() }),
        all(&Working {}),
        all(&Removed {
            path: components(&[b"old", b"a"]),
        }),
        all(&Entry {
            id: 7,
            path: components(&[b"a", b"b.txt"]),
            kind: Kind::File,
            size: Some(300),
            modified: Some(Time {
                seconds: -1,
                nanoseconds: 500_000_000,
            }),
            mode: Some(0o644),
            ..Entry::default()
        }),
        all(&Entry {
            id: 8,
            path: components(&[b"a", b"link"]),
            kind: Kind::Symlink,
            size: None,
            modified: None,
            mode: None,
            target: Some(b"b.txt".to_vec()),
            ..Entry::default()
        }),
        all(&Entry {
            id: 9,
            path: components(&[b"a", b"c.txt"]),
            kind: Kind::File,
            size: Some(300),
            hard_link: Some(7),
            ..Entry::default()
        }),
        all(&Entry {
            id: 9,
            path: components(&[b"a", b"c.txt"]),
            kind: Kind::File,
            size: Some(300),
            digest: Some([5; 32]),
            ..Entry::default()
        }),
        all(&Entry {
            id: 9,
            path: components(&[b"a", b"d"]),
            kind: Kind::Directory,
            mode: Some(0o755),
            owner: Some(Owner {
                user: 1000,
                group: 100,
                user_name: Some(b"bob".to_vec()),
                group_name: None,
            }),
            xattrs: Some(vec![Xattr {
                name: b"user.note".to_vec(),
                value: b"\x00\xff".to_vec(),
            }]),
            ..Entry::default()
        }),
        all(&Entry {
            id: 9,
            path: components(&[b"d.tar"]),
            kind: Kind::File,
            size: None,
            modified: None,
            mode: None,
            ..Entry::default()
        }),
        all(&Skip { id: 7 }),
        all(&Done { id: 8 }),
        all(&Want { id: 9, held: None }),
        all(&Want {
            id: 9,
            held: Some(vec![Held {
                range,
                digest: [0xab; 32],
            }]),
        }),
        all(&Refuse { id: 9, why: why() }),
        all(&Unsendable {
            path: components(&[b"a", b"b.txt"]),
            why: why(),
            omitted: None,
        }),
        all(&Unsendable {
            path: components(&[b"a", b"b"]),
            why: haul::Reason::from(Code::Vanished).into(),
            omitted: Some(true),
        }),
        all(&Unsendable {
            path: components(&[b"a", b"c"]),
            why: haul::Reason::from(Code::Special).into(),
            omitted: Some(false),
        }),
        all(&Complete {}),
        all(&Plan {
            id: 9,
            encoding: 0,
            ranges: vec![range],
            holes: None,
        }),
        all(&Plan {
            id: 9,
            encoding: 0,
            ranges: vec![range],
            holes: Some(vec![Range {
                offset: 0,
                length: 1 << 20,
            }]),
        }),
        all(&Plan {
            id: 9,
            encoding: ENCODING_PIECES,
            ranges: vec![],
            holes: None,
        }),
        all(&Trailer {
            digest: [0xcd; 32],
            size: None,
        }),
        all(&Trailer {
            digest: [0xcd; 32],
            size: Some(300),
        }),
        all(&Committed {
            bytes: 300,
            durability: Durability::Visible,
        }),
        all(&Failed { why: why() }),
        all(&Withdraw { id: 9, why: why() }),
        all(&Measure {
            probe: Probe::Down,
            milliseconds: 5000,
        }),
        all(&Ping { id: 3 }),
        all(&Pong {
            id: 3,
            packets_sent: 1000,
            packets_lost: 10,
            rtt: 100_000,
        }),
        all(&Received {
            bytes: 1 << 20,
            microseconds: 100_000,
        }),
        all(&Listed {
            path: components(&[b"a", b"link"]),
            kind: Some(Kind::Symlink),
            size: None,
            modified: Some(Time {
                seconds: -1,
                nanoseconds: 500_000_000,
            }),
            mode: Some(0o777),
            target: Some(b"b.txt".to_vec()),
        }),
        all(&Introduce {
            number: 417,
            exchange: [0x42; 33],
        }),
        all(&Introduced {
            exchange: [0x41; 33],
        }),
        all(&Confirm { tag: [0xef; 32] }),
        all(&Offer {
            from: "alice".into(),
            names: components(&[b"holiday"]),
            directory: true,
            files: 1204,
            bytes: 3 << 30,
            others: Some(17),
            ..Offer::default()
        }),
        all(&Offer {
            from: "alice".into(),
            names: components(&[b"d.tar"]),
            files: 1,
            piped: Some(true),
            ..Offer::default()
        }),
        all(&Offer {
            from: "alice".into(),
            pair: Some(12_345_678),
            ..Offer::default()
        }),
        all(&Offer {
            from: "alice".into(),
            text: Some("under the mat".into()),
            ..Offer::default()
        }),
        all(&Accept::default()),
        all(&Accept {
            pair: Some(87_654_321),
            addresses: None,
        }),
        all(&Place {
            claim: session,
            number: Some(4170),
            token: Some("t".into()),
            addresses: vec![address(4)],
        }),
        all(&Placed {
            number: 4170,
            seen: address(4),
        }),
        all(&Seek {
            number: 4170,
            token: None,
            addresses: vec![address(6)],
            forward: true,
        }),
        all(&Found {
            addresses: vec![address(4), address(6)],
            forward: None,
        }),
        all(&Found {
            addresses: vec![],
            forward: Some(Forward {
                port: 4441,
                token: [0xbb; 32],
            }),
        }),
    ]
}

#[test]
fn the_vectors_match_the_code() {
    let code: String = vectors()
        .iter()
        .map(|(name, bytes)| {
            let hex: Vec<_> = bytes.iter().map(|b| format!("{b:02x}")).collect();
            format!("{name} {}\n", hex.join(""))
        })
        .collect();
    let document = DOCUMENT
        .split("```vectors\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .unwrap_or_default();
    assert_eq!(
        document, code,
        "PROTOCOL.md should have these vectors:\n{code}"
    );
}
