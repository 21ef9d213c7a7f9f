//! Hard links that an attacker wants to lead elsewhere.

use std::os::unix::fs::{MetadataExt, symlink};

use haul::internal::protocol::Verdict;
use haul::internal::protocol::{Committed, Entry};
use haul::{Code, Config, Kind};

use crate::hostile::peer::*;
use crate::support::write;

/// A file of one byte that claims to be a hard link to another entry.
fn name(id: u64, name: &str, of: u64) -> Entry {
    Entry {
        hard_link: Some(of),
        ..file(id, name, 1)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hard_links_only_lead_to_files_of_this_session() {
    let arena = Arena::new(Config::default());
    write(&arena.served().join("private"), b"x");
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    // The first exists and says that further names may follow; the second exists and says nothing; the third never
    // arrives.
    for (id, marked) in [(10, true), (11, false)] {
        let entry = Entry {
            hard_link: marked.then_some(id),
            ..file(id, &format!("f{id}"), 1)
        };
        session.announce(&entry).await;
        assert_eq!(session.verdict().await, Verdict::Want(id, vec![]));
        let all = [b"x", &trailer(b"x")[..]].concat();
        let (mut send, mut receipt) = session.transfer(&plan(id, &[(0, 1)]), &all).await;
        send.finish().unwrap();
        within(receipt.read::<Committed>()).await.unwrap();
    }
    session.announce(&name(12, "f12", 12)).await;
    assert_eq!(session.verdict().await, Verdict::Want(12, vec![]));
    // An entry that was never announced, one that did not allow further names, and one that does not exist: each
    // becomes a separate file.
    for (id, of) in [(20, 3), (21, 11), (22, 12)] {
        session.announce(&name(id, &format!("n{id}"), of)).await;
        assert_eq!(session.verdict().await, Verdict::Want(id, vec![]), "{of}");
    }
    // Links to files unknown to the session are not made either, and names cannot lead elsewhere.
    session
        .announce(&Entry {
            path: components(&[b"..", b"outside", b"n"]),
            ..name(30, "n", 10)
        })
        .await;
    assert!(
        matches!(session.verdict().await, Verdict::Refuse(30, why) if why.code == Code::BadName)
    );
    symlink(arena.outside(), arena.served().join("out")).unwrap();
    session
        .announce(&Entry {
            path: components(&[b"out", b"n"]),
            ..name(31, "n", 10)
        })
        .await;
    assert!(
        matches!(session.verdict().await, Verdict::Refuse(31, why) if why.code == Code::Symlink)
    );

    session.announce(&name(40, "n40", 10)).await;
    assert_eq!(
        session.verdict().await,
        Verdict::Done(40),
        "an honest one all the same"
    );
    let inode = |name: &str| std::fs::metadata(arena.served().join(name)).unwrap().ino();
    assert_eq!(inode("n40"), inode("f10"));
    assert_eq!(
        std::fs::metadata(arena.served().join("private"))
            .unwrap()
            .nlink(),
        1
    );
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_replaced_the_first_name_is_not_linked_to() {
    let arena = Arena::new(Config::default());
    let peer = Peer::connect(&arena.host).await;
    let mut session = peer.session().await;
    session
        .announce(&Entry {
            size: Some(0),
            path: components(&[b"d", b"f"]),
            ..name(0, "f", 0)
        })
        .await;
    assert_eq!(session.verdict().await, Verdict::Done(0));
    let (served, secret) = (arena.served(), arena.outside().join("secret"));
    std::fs::remove_file(served.join("d/f")).unwrap();
    symlink(&secret, served.join("d/f")).unwrap();
    session.announce(&name(1, "n1", 0)).await;
    assert_eq!(session.verdict().await, Verdict::Want(1, vec![]));
    std::fs::remove_dir_all(served.join("d")).unwrap();
    std::fs::create_dir(arena.outside().join("d")).unwrap();
    write(&arena.outside().join("d/f"), b"x");
    symlink(arena.outside().join("d"), served.join("d")).unwrap();
    session.announce(&name(2, "n2", 0)).await;
    assert!(matches!(session.verdict().await, Verdict::Want(2, _)));
    std::fs::remove_file(served.join("d")).unwrap();
    std::fs::create_dir_all(served.join("d/f")).unwrap();
    session.announce(&name(3, "n3", 0)).await;
    assert_eq!(session.verdict().await, Verdict::Want(3, vec![]));
    assert_eq!(
        std::fs::metadata(arena.outside().join("d/f"))
            .unwrap()
            .nlink(),
        1
    );
    assert_eq!(std::fs::metadata(&secret).unwrap().nlink(), 1);
    std::fs::remove_dir_all(arena.outside().join("d")).unwrap();
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalid_hard_link_breaks_the_protocol() {
    let odd = [
        name(1, "f", 2),
        Entry {
            hard_link: Some(1),
            ..entry(1, &[b"l"], Kind::Symlink)
        },
        Entry {
            hard_link: Some(1),
            ..entry(1, &[b"d"], Kind::Directory)
        },
    ];
    let arena = Arena::new(Config::default());
    for entry in odd {
        let peer = Peer::connect(&arena.host).await;
        let mut session = peer.session().await;
        session.announce(&entry).await;
        peer.closed_with(Code::Protocol, &format!("{entry:?}"))
            .await;
    }
    arena.unharmed().await;
}
