//! Names that would lead outside.

use std::os::unix::fs::symlink;

use haul::internal::protocol::Verdict;
use haul::internal::protocol::{Components, Entry, Hello, Message, Ready, Refused};
use haul::{Code, Kind};

use crate::hostile::peer::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_that_lead_outside_are_refused_for_every_kind() {
    let arena = Arena::new(patient());
    let (long, deep) = ([b'x'; 256], [[b'y'; 250]; 20]);
    let deep: Vec<&[u8]> = deep.iter().map(|c| &c[..]).collect();
    let names: [&[&[u8]]; 12] = [
        &[b".."],
        &[b"."],
        &[b"a", b"..", b"b"],
        &[b"a/../b"],
        &[b"/etc/x"],
        &[b"", b"etc", b"x"],
        &[b"a", b"", b"b"],
        &[b"a\0b"],
        &[&long],
        &deep,
        &[b".HAUL-0123456789ABCDEF0123456789ABCDEF.PARTIAL"],
        &[
            b"a",
            b".haul-0123456789abcdef0123456789abcdef.partial",
            b"b",
        ],
    ];
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    let mut id = 0;
    for name in names {
        for kind in [Kind::File, Kind::Directory, Kind::Symlink] {
            session.announce(&entry(id, name, kind)).await;
            let verdict = session.verdict().await;
            assert!(
                matches!(&verdict, Verdict::Refuse(i, why) if *i == id && why.code == Code::BadName),
                "{verdict:?}"
            );
            id += 1;
        }
        let empty = Entry {
            size: Some(0),
            ..entry(id, name, Kind::File)
        };
        session.announce(&empty).await;
        assert!(
            matches!(session.verdict().await, Verdict::Refuse(_, why) if why.code == Code::BadName)
        );
        id += 1;
    }
    assert_eq!(arena.names(), Vec::<String>::new());
    // The name was refused, not repaired, and the session continues.
    session.wanted(id, "good", 5).await;
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_written_through_a_link_of_the_same_session() {
    let arena = Arena::new(patient());
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    let outside = arena.outside().into_os_string().into_encoded_bytes();
    session
        .announce(&Entry {
            target: Some(outside),
            ..entry(0, &[b"out"], Kind::Symlink)
        })
        .await;
    assert_eq!(session.verdict().await, Verdict::Done(0));
    let through = [
        entry(1, &[b"out", b"secret"], Kind::File),
        entry(2, &[b"out", b"new"], Kind::File),
        Entry {
            size: Some(0),
            ..entry(3, &[b"out", b"empty"], Kind::File)
        },
        Entry {
            size: Some(1 << 20),
            ..entry(4, &[b"out", b"large"], Kind::File)
        },
        entry(5, &[b"out", b"directory"], Kind::Directory),
        entry(6, &[b"out", b"link"], Kind::Symlink),
        Entry {
            mode: Some(0o777),
            ..entry(7, &[b"out"], Kind::Directory)
        },
        entry(8, &[b"out", b"a", b"b", b"c"], Kind::File),
    ];
    for entry in through {
        session.announce(&entry).await;
        // A small file is examined before it is wanted; a new one may be detected only at its commit.
        match session.verdict().await {
            Verdict::Refuse(id, _) => assert_eq!(id, entry.id),
            Verdict::Want(id, _) => {
                let (mut send, mut receipt) =
                    session.transfer(&plan(id, &[(0, 5)]), b"12345").await;
                within(send.write_all(&trailer(b"12345"))).await.unwrap();
                send.finish().unwrap();
                within(receipt.read::<haul::internal::protocol::Failed>())
                    .await
                    .expect("it fails");
            }
            other => panic!("{other:?} to {entry:?}"),
        }
    }
    assert_eq!(arena.names(), ["out"]);
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destinations_and_pull_sources_cannot_lead_outside() {
    let arena = Arena::new(patient());
    symlink(arena.outside(), arena.served().join("out")).unwrap();
    let peer = Peer::connect(&arena.host).await;
    let requests = [
        push_into(&[b".."]),
        push_into(&[b"a/../../outside"]),
        push_into(&[b"out", b"x"]),
        push_into(&[b"out"]),
        pull_of(&[&[b"..", b"outside", b"secret"]], 10),
        pull_of(&[&[b"../outside/secret"]], 10),
        pull_of(&[&[b"out", b"secret"]], 10),
        pull_of(&[&[b"nowhere"]], 10),
    ];
    for request in requests {
        let (_, _control, mut answers) = peer.ask(&request).await;
        within(answers.read::<Hello>()).await.unwrap();
        within(answers.read::<Refused>())
            .await
            .expect("it is refused");
    }
    assert_eq!(arena.names(), ["out"]);
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_of_maximum_length_is_answered() {
    let arena = Arena::new(patient());
    let peer = Peer::connect(&arena.host).await;
    let short: Vec<&[u8]> = vec![b"a"; 2048];
    let long = [[b'x'; 255]; 15];
    let long: Vec<&[u8]> = long.iter().map(|c| &c[..]).collect();
    for destination in [short, long] {
        let (_, _control, mut answers) = peer.ask(&push_into(&destination)).await;
        within(answers.read::<Hello>()).await.unwrap();
        within(answers.read::<Ready>())
            .await
            .expect("ready, or at least an answer");
    }
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_without_a_name_breaks_the_protocol() {
    let arena = Arena::new(patient());
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    let nameless = Entry {
        path: Components::default(),
        ..entry(0, &[b"a"], Kind::File)
    };
    assert!(nameless.to_bytes().len() < Entry::LIMIT);
    session.announce(&nameless).await;
    peer.closed_with(Code::Protocol, "").await;
    arena.unharmed().await;
}
