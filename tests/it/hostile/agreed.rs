//! A sender that sends more than its receiver has accepted.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use haul::internal::net::stream::MessageReader;
use haul::internal::protocol::Verdict;
use haul::internal::protocol::{
    Committed, Complete, End, Entry, Failed, Hello, Message, Pull, Ready, Working,
};
use haul::{
    AcceptedQuota, Client, Code, Config, Identity, Kind, Outcome, PullOptions, Result, ServerTrust,
    Summary,
};
use quinn::Endpoint;
use tempfile::{TempDir, tempdir};
use tokio::task::JoinHandle;

use crate::hostile::peer::*;
use crate::support::from;

/// The sender, and a receiver that has accepted this much.
struct Agreed {
    endpoint: Endpoint,
    here: TempDir,
    receiver: JoinHandle<Result<Outcome>>,
}

impl Agreed {
    fn to(entries: u64, bytes: u64) -> Self {
        watch_panics();
        let identity = Identity::generate().unwrap();
        let server =
            haul::internal::net::endpoint::server_config(&identity, &Config::default()).unwrap();
        let endpoint = haul::internal::net::endpoint::bind(
            SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            Some(server),
        )
        .unwrap();
        let port = endpoint.local_addr().unwrap().port();
        let trust = ServerTrust {
            pin: Some(identity.key_id()),
            ..ServerTrust::default()
        };
        let here = tempdir().unwrap();
        let most = Some(AcceptedQuota {
            entries,
            bytes: Some(bytes),
        });
        let options = PullOptions {
            quota: most,
            ..from(&["t"], &here.path().join("into/"))
        };
        let config = Config {
            retry_for: Duration::from_secs(60),
            ..Config::default()
        };
        let receiver = tokio::spawn(async move {
            let client =
                Client::connect(&Identity::generate()?, &trust, "127.0.0.1", port, &config).await?;
            client.pull(&options, haul::ignore()).await
        });
        Self {
            endpoint,
            here,
            receiver,
        }
    }

    /// The next connection of the receiver, ready for a manifest.
    async fn session(&self) -> Session {
        let connection = within(async { self.endpoint.accept().await.unwrap().await })
            .await
            .unwrap();
        let (mut control, requests) = within(connection.accept_bi()).await.unwrap();
        let handle = quinn::VarInt::from(control.id()).into_inner();
        let mut answers = MessageReader::new(requests);
        within(answers.byte()).await.unwrap();
        within(answers.read::<Hello>()).await.unwrap();
        within(answers.read::<Pull>()).await.unwrap();
        within(control.write_all(&[&hello()[..], &Ready::default().to_bytes()].concat()))
            .await
            .unwrap();
        let (mut manifest, verdicts) = within(connection.open_bi()).await.unwrap();
        within(manifest.write_all(&head(2, handle))).await.unwrap();
        Session {
            connection,
            handle,
            control,
            answers,
            manifest,
            verdicts: MessageReader::new(verdicts),
        }
    }

    /// The names that exist at the receiver, without partials.
    fn names(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.here.path().join("into/t")) else {
            return Vec::new();
        };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| !name.starts_with('.')).collect();
        names.sort();
        names
    }
}

fn file(id: u64, name: &str, size: Option<u64>) -> Entry {
    Entry {
        size,
        ..entry(id, &[b"t", name.as_bytes()], Kind::File)
    }
}

async fn refused(session: &mut Session, entry: Entry, text: &str) {
    session.announce(&entry).await;
    match session.verdict().await {
        Verdict::Refuse(id, why) => {
            assert_eq!((id, why.code), (entry.id, Code::NotWanted));
            assert!(why.text.contains(text), "{why}");
        }
        other => panic!("{other:?} to {entry:?}"),
    }
}

/// Waits for the summary; on a busy machine the receiver sends `Working` before it.
async fn summary(session: &mut Session) {
    loop {
        let frame = within(session.answers.frame(Summary::LIMIT))
            .await
            .unwrap()
            .unwrap();
        match frame.kind {
            Working::TYPE => {}
            _ => return drop(frame.decode::<Summary>().unwrap()),
        }
    }
}

/// Announces a file, waits until it is wanted, and sends it whole.
async fn sent(session: &mut Session, id: u64, name: &str, content: &[u8]) {
    let size = content.len() as u64;
    session.announce(&file(id, name, Some(size))).await;
    assert_eq!(session.verdict().await, Verdict::Want(id, vec![]));
    let body = [content, &trailer(content)].concat();
    let (mut stream, mut receipt) = session.transfer(&plan(id, &[(0, size)]), &body).await;
    stream.finish().unwrap();
    within(receipt.read::<Committed>()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_files_end_at_the_quota_and_complete_ones_stay() {
    let agreed = Agreed::to(3, 1_000);
    let mut session = agreed.session().await;
    sent(&mut session, 0, "a", b"content").await;
    for id in 1..3 {
        session.announce(&file(id, &format!("{id}"), Some(0))).await;
        assert_eq!(session.verdict().await, Verdict::Done(id));
    }
    for id in 3..3_000 {
        refused(
            &mut session,
            file(id, &format!("{id}"), Some(0)),
            "4 entries, at most 3 were accepted",
        )
        .await;
    }
    for (id, kind) in [(3_000, Kind::Directory), (3_001, Kind::Symlink)] {
        refused(
            &mut session,
            entry(id, &[b"t", b"other"], kind),
            "4 entries, at most 3 were accepted",
        )
        .await;
    }
    assert_eq!(agreed.names(), ["1", "2", "a"]);
    within(session.manifest.write_all(&Complete {}.to_bytes()))
        .await
        .unwrap();
    session.manifest.finish().unwrap();
    within(
        session.control.write_all(
            &End {
                entries: 3_002,
                ..End::default()
            }
            .to_bytes(),
        ),
    )
    .await
    .unwrap();
    summary(&mut session).await;
    let outcome = within(agreed.receiver).await.unwrap().unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.failed), (3, 2_999));
    no_panics();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn false_large_or_missing_sizes_do_not_exceed_the_quota() {
    let agreed = Agreed::to(100, 1_000);
    let mut session = agreed.session().await;
    for (id, size) in [(0, 1_001), (1, i64::MAX as u64), (2, i64::MAX as u64)] {
        refused(
            &mut session,
            file(id, "large", Some(size)),
            "bytes, at most 1000 were accepted",
        )
        .await;
    }
    refused(
        &mut session,
        file(3, "unknown", None),
        "unknown size was not offered",
    )
    .await;
    // Refused entries do not count; wanted entries count, whether they arrive or not.
    session.announce(&file(4, "lies", Some(600))).await;
    assert_eq!(session.verdict().await, Verdict::Want(4, vec![]));
    refused(
        &mut session,
        file(5, "b", Some(401)),
        "1001 bytes, at most 1000 were accepted",
    )
    .await;
    let content = vec![7; 2_000];
    let body = [&content[..], &trailer(&content)].concat();
    let (_stream, mut receipt) = session.transfer(&plan(4, &[(0, 2_000)]), &body).await;
    let failed: Failed = within(receipt.read()).await.unwrap();
    assert_eq!(haul::Reason::from(failed.why).code, Code::Protocol);
    assert!(agreed.names().is_empty());
    agreed.receiver.abort();
    no_panics();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_quota_counts_over_all_connections() {
    let agreed = Agreed::to(100, 1_000);
    let mut first = agreed.session().await;
    sent(&mut first, 0, "a", &[1; 800]).await;
    first
        .connection
        .close(haul::internal::net::stream::varint_of(Code::Stopping), b"");
    for round in 0..2 {
        let mut session = agreed.session().await;
        refused(
            &mut session,
            file(0, "b", Some(800)),
            &format!("{} bytes, at most 1000 were accepted", 1_600 + 100 * round),
        )
        .await;
        // The rest still fits.
        sent(&mut session, 1, &format!("rest{round}"), &[2; 100]).await;
        session
            .connection
            .close(haul::internal::net::stream::varint_of(Code::Stopping), b"");
    }
    let mut last = agreed.session().await;
    refused(
        &mut last,
        file(0, "c", Some(1)),
        "1001 bytes, at most 1000 were accepted",
    )
    .await;
    assert_eq!(agreed.names(), ["a", "rest0", "rest1"]);
    agreed.receiver.abort();
    no_panics();
}
