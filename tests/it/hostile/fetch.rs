//! Peers that break every rule, where files are fetched and listed.

use haul::internal::net::stream::MessageReader;
use haul::internal::protocol::Verdict;
use haul::internal::protocol::{
    Committed, Complete, Components, End, Entry, Hello, List, Message, Pull, Ready, Refused,
    Unsendable,
};
use haul::{Client, Code, Error, Kind, ListItem, Listed, Outcome, Result, Summary};
use quinn::Connection;
use tempfile::{TempDir, tempdir};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::hostile::peer::*;
use crate::hostile::rogue::{connect, connect_over_path};
use crate::support::{from, path};

/// A server that was asked for something, and the honest client that waits for it.
async fn asked(
    sources: &[&str],
    destination: &str,
    ready: Ready,
) -> (Session, TempDir, JoinHandle<Result<Outcome>>) {
    let connected = connect(|_| {}).await;
    let options = (sources, destination);
    asked_of(connected, options, ready, ()).await
}

/// The same with this server and this client, which closes its connection as soon as it may. `ended` is dropped when
/// the pull is over.
async fn asked_of(
    (connection, client): (Connection, JoinHandle<Result<Client>>),
    (sources, destination): (&[&str], &str),
    ready: Ready,
    ended: impl Send + 'static,
) -> (Session, TempDir, JoinHandle<Result<Outcome>>) {
    let here = tempdir().unwrap();
    let options = from(sources, &here.path().join(destination));
    let pulling = tokio::spawn(async move {
        let client = client.await.unwrap()?;
        let outcome = client.pull(&options, haul::ignore()).await;
        drop(ended);
        client.close().await;
        outcome
    });
    let (mut control, requests) = within(connection.accept_bi()).await.unwrap();
    let handle = quinn::VarInt::from(control.id()).into_inner();
    let mut answers = MessageReader::new(requests);
    within(answers.byte()).await.unwrap();
    within(answers.read::<Hello>()).await.unwrap();
    within(answers.read::<Pull>()).await.unwrap();
    within(control.write_all(&[&hello()[..], &ready.to_bytes()].concat()))
        .await
        .unwrap();
    let (manifest, verdicts) = within(connection.open_bi()).await.unwrap();
    let verdicts = MessageReader::new(verdicts);
    let mut session = Session {
        connection,
        handle,
        control,
        answers,
        manifest,
        verdicts,
    };
    within(session.manifest.write_all(&head(2, handle)))
        .await
        .unwrap();
    (session, here, pulling)
}

fn names(of: &TempDir) -> Vec<std::ffi::OsString> {
    let mut names: Vec<_> = std::fs::read_dir(of.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_that_do_not_match_the_pattern_are_refused() {
    let (mut session, here, pulling) = asked(&["logs/*.gz"], "into/", Ready::default()).await;
    let empty = |id, name: &[u8]| Entry {
        size: Some(0),
        ..entry(id, &[name], Kind::File)
    };
    for (id, name) in [".profile", ".a.gz", "a.gz.sh", "*", "logs"]
        .into_iter()
        .enumerate()
    {
        session.announce(&empty(id as u64, name.as_bytes())).await;
        let verdict = session.verdict().await;
        assert!(
            matches!(&verdict, Verdict::Refuse(_, why) if why.code == Code::NotWanted),
            "{verdict:?} to {name}"
        );
    }
    session.announce(&empty(10, b"a.gz")).await;
    assert_eq!(session.verdict().await, Verdict::Done(10));
    assert_eq!(names(&here), ["into"]);
    assert_eq!(
        std::fs::read_dir(here.path().join("into")).unwrap().count(),
        1
    );
    session.connection.close(0_u8.into(), b"");
    assert!(within(pulling).await.unwrap().is_err());
    no_panics();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pattern_reported_as_one_directory_admits_no_other_names() {
    let ready = Ready {
        only: Some(Kind::Directory),
        ..Ready::default()
    };
    let (mut session, here, pulling) = asked(&["*"], "got", ready).await;
    session
        .announce(&entry(0, &[b"anything", b"x"], Kind::Symlink))
        .await;
    assert!(
        matches!(session.verdict().await, Verdict::Refuse(0, why) if why.code == Code::NotWanted)
    );
    assert!(names(&here).is_empty());
    session.connection.close(0_u8.into(), b"");
    assert!(within(pulling).await.unwrap().is_err());
    no_panics();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_failures_take_no_memory_and_control_no_terminal() {
    const MANY: u64 = 3_000;
    let (mut session, _here, pulling) = asked(&["t"], "into/", Ready::default()).await;
    let unsendable = |i: u64| {
        let why = haul::Reason::new(Code::Unreadable, "\x1b[2Jno").into();
        Unsendable {
            path: components(&[b"t", format!("{i}\x1b").as_bytes()]),
            why,
            omitted: None,
        }
        .to_bytes()
    };
    for i in 0..MANY {
        within(session.manifest.write_all(&unsendable(i)))
            .await
            .unwrap();
    }
    within(session.manifest.write_all(&Complete {}.to_bytes()))
        .await
        .unwrap();
    session.manifest.finish().unwrap();
    within(
        session.control.write_all(
            &End {
                entries: 0,
                failed: MANY,
                interrupted: None,
                ..End::default()
            }
            .to_bytes(),
        ),
    )
    .await
    .unwrap();
    within(session.answers.read::<Summary>()).await.unwrap();
    let outcome = within(pulling).await.unwrap().unwrap();
    assert_eq!(outcome.sent.failed, MANY);
    assert_eq!(
        outcome.sent.failures.len(),
        haul::internal::transfer::stats::MAX_FAILURES
    );
    let (name, why) = &outcome.sent.failures[0];
    assert!(!format!("{name}{why}").contains('\x1b'));
    no_panics();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_closes_after_the_server_has_its_last_messages() {
    let (connection, client, path) = connect_over_path().await;
    let connected = (connection, client);
    let (ending, ended) = oneshot::channel::<()>();
    let options = (&["t"][..], "into/");
    let (mut session, _here, pulling) =
        asked_of(connected, options, Ready::default(), ending).await;
    session.wanted(0, "t", 5).await;
    // Everything that the client sends from here on is lost, and the client can exit before it can send it again.
    path.up.set(|up| up.blackout = true);
    let body = [b"12345", &trailer(b"12345")[..]].concat();
    let (mut transfer, mut receipt) = session.transfer(&plan(0, &[(0, 5)]), &body).await;
    transfer.finish().unwrap();
    within(session.manifest.write_all(&Complete {}.to_bytes()))
        .await
        .unwrap();
    session.manifest.finish().unwrap();
    let end = End {
        entries: 1,
        ..End::default()
    };
    within(session.control.write_all(&end.to_bytes()))
        .await
        .unwrap();
    within(ended).await.unwrap_err();
    path.up.set(|up| up.blackout = false);
    let summary: Summary = within(session.answers.read()).await.unwrap();
    assert_eq!(summary.committed, 1);
    let receipt: Committed = within(receipt.read()).await.unwrap();
    assert_eq!(receipt.bytes, 5);
    assert_eq!(within(pulling).await.unwrap().unwrap().sent.files, 1);
    no_panics();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_with_an_invalid_name_breaks_the_protocol() {
    let (mut session, _here, pulling) = asked(&["t"], "into/", Ready::default()).await;
    let bad = Unsendable {
        path: components(&[b".."]),
        why: haul::Reason::from(Code::Unreadable).into(),
        omitted: None,
    };
    within(session.manifest.write_all(&bad.to_bytes()))
        .await
        .unwrap();
    assert!(matches!(
        within(pulling).await.unwrap(),
        Err(Error::Protocol(_))
    ));
    no_panics();
}

/// Returns what an honest client makes of a listing that a server answers with these bytes.
async fn listed(bytes: Vec<u8>) -> Result<Vec<ListItem>> {
    let (connection, client) = connect(|_| {}).await;
    let listing = tokio::spawn(async move {
        let client = client.await.unwrap()?;
        let mut listing = client.list(&path("d"), true).await?;
        let mut all = Vec::new();
        while let Some(found) = listing.next().await? {
            all.push(found);
        }
        Ok(all)
    });
    let (mut control, requests) = within(connection.accept_bi()).await.unwrap();
    let mut requests = MessageReader::new(requests);
    within(requests.byte()).await.unwrap();
    within(requests.read::<Hello>()).await.unwrap();
    within(requests.read::<List>()).await.unwrap();
    let _ =
        within(control.write_all(&[&hello()[..], &Ready::default().to_bytes(), &bytes].concat()))
            .await;
    let _ = control.finish();
    within(listing).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_listing_is_an_error() {
    let of = |names: &[&[u8]]| {
        let path = components(names);
        Listed {
            path,
            kind: None,
            size: None,
            modified: None,
            mode: None,
            target: None,
        }
        .to_bytes()
        .to_vec()
    };
    let end = End::default().to_bytes().to_vec();
    assert_eq!(
        listed([of(&[b"a"]), end.clone()].concat())
            .await
            .unwrap()
            .len(),
        1
    );
    let names: [&[&[u8]]; 5] = [&[b".."], &[b"/etc"], &[b"a", b"", b"b"], &[b"a\0"], &[]];
    for name in names {
        let error = listed([of(name), end.clone()].concat()).await.unwrap_err();
        assert!(matches!(error, Error::Protocol(_)), "{name:?}: {error:?}");
    }
    let no_end = of(&[b"a"]);
    let other = Summary::default().to_bytes().to_vec();
    for bytes in [no_end, other, Noise::new(9).bytes(500), Vec::new()] {
        assert!(matches!(listed(bytes).await, Err(Error::Protocol(_))));
    }
    no_panics();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_for_endless_work_do_not_block_others() {
    let arena = Arena::new(impatient());
    let deep = "*a".repeat(120);
    let several: [&[u8]; 3] = [deep.as_bytes(), b"*", b"[!x]*"];
    let many = [&several[..]; 200];
    let list = |names: &[&[u8]]| List {
        session: [7; 16],
        path: Components(names.iter().map(|n| n.to_vec()).collect()),
        recursive: true,
    };
    let requests = [
        pull_of(&many, 10),
        pull_of(&[&[b"[", b"*"]], 10),
        list(&[deep.as_bytes()]).to_bytes().to_vec(),
        list(&[b"..", b"outside"]).to_bytes().to_vec(),
        list(&[b"nowhere"]).to_bytes().to_vec(),
    ];
    for request in requests {
        let peer = Peer::connect(&arena.host).await;
        let (_, _control, mut answers) = peer.ask(&request).await;
        within(answers.read::<Hello>()).await.unwrap();
        let frame = within(answers.frame(Refused::LIMIT))
            .await
            .unwrap()
            .expect("an answer");
        // With several sources each is reported separately.
        assert!(
            matches!(frame.kind, Refused::TYPE | Ready::TYPE),
            "{frame:?}"
        );
    }
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_client_that_reads_no_listing_is_given_up() {
    let arena = Arena::new(impatient());
    for i in 0..300 {
        std::fs::write(
            arena.served().join(format!("{i:04}{}", "x".repeat(200))),
            b"",
        )
        .unwrap();
    }
    let identity = haul::Identity::generate().unwrap();
    let small = |t: &mut quinn::TransportConfig| {
        t.stream_receive_window(2_000_u32.into());
    };
    let peer = Peer::connect_as(&arena.host, &identity, small).await;
    let list = List {
        session: [7; 16],
        path: Components::default(),
        recursive: false,
    };
    let (_, control, _answers) = peer.ask(&list.to_bytes()).await;
    // The server releases its half as well.
    let _ = within(control.stopped()).await;
    arena.unharmed().await;
}
