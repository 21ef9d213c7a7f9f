//! Messages that arrive early: entries before the answer, and the end before the receipts.

use std::time::Duration;

use haul::internal::net::stream::MessageReader;
use haul::internal::protocol::{
    Committed, Complete, End, Entry, Hello, Message, Push, Ready, Skip, Want,
};
use haul::internal::protocol::{EARLY_UNANSWERED, EARLY_UNANSWERED_BYTES, Verdict};
use haul::{Code, Durability, Summary};

use crate::hostile::peer::{
    Peer, Session, file, head, hello, impatient, push_into, stopped, within,
};
use crate::hostile::rogue::{connect, write_to};
use crate::support::{to, write};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_manifest_waits_for_its_request_until_the_deadline() {
    let arena = crate::hostile::peer::Arena::new(impatient());
    let peer = Peer::connect(&arena.host).await;
    let (mut control, mut answers) = peer.open(&[&[1], &hello()[..]].concat()).await;
    let handle = quinn::VarInt::from(control.id()).into_inner();
    let (manifest, verdicts) = peer
        .open(&[&head(2, handle)[..], &file(0, "a", 0).to_bytes()].concat())
        .await;
    within(control.write_all(&push_into(&[]))).await.unwrap();
    within(answers.read::<Hello>()).await.unwrap();
    within(answers.read::<Ready>()).await.unwrap();
    let mut session = Session {
        connection: peer.connection.clone(),
        handle,
        control,
        answers,
        manifest,
        verdicts,
    };
    assert_eq!(session.verdict().await, Verdict::Done(0));

    let (never_asked, _answers) = peer.open(&[1]).await;
    let handle = quinn::VarInt::from(never_asked.id()).into_inner();
    let (mut manifest, _verdicts) = peer.open(&head(2, handle)).await;
    assert_eq!(stopped(&mut manifest).await, Code::TimedOut);
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn early_announcements_are_bounded_and_the_end_is_not_delayed() {
    const FILES: usize = 3 * EARLY_UNANSWERED as usize;
    let source = tempfile::tempdir().unwrap();
    let names: Vec<_> = (0..FILES)
        .map(|i| source.path().join(format!("{i:04}")))
        .collect();
    names.iter().for_each(|name| write(name, b"12345"));
    let options = to(
        &names.iter().map(|name| name.as_path()).collect::<Vec<_>>(),
        "",
    );
    let (connection, client) = connect(|_| {}).await;
    let client =
        tokio::spawn(async move { client.await.unwrap()?.push(&options, haul::ignore()).await });
    let (mut control, requests) = within(connection.accept_bi()).await.unwrap();
    let mut requests = MessageReader::new(requests);
    within(requests.byte()).await.unwrap();
    within(requests.read::<Hello>()).await.unwrap();
    within(requests.read::<Push>()).await.unwrap();
    let (mut verdicts, manifest) = within(connection.accept_bi()).await.unwrap();
    let mut manifest = MessageReader::new(manifest);
    within(manifest.byte()).await.unwrap();
    within(manifest.varint()).await.unwrap();
    let (mut early, mut bytes) = (Vec::new(), 0);
    while let Ok(entry) =
        tokio::time::timeout(Duration::from_millis(300), manifest.read::<Entry>()).await
    {
        let entry = entry.unwrap();
        bytes += entry.to_bytes().len();
        early.push(entry.id);
    }
    assert!(!early.is_empty(), "nothing came with the request");
    assert!(
        early.len() <= EARLY_UNANSWERED as usize && bytes <= EARLY_UNANSWERED_BYTES as usize,
        "{}",
        early.len()
    );

    let ready = Ready {
        entries: 1000,
        entry_bytes: 1 << 20,
        ..Ready::default()
    };
    within(control.write_all(&[&hello()[..], &ready.to_bytes()].concat()))
        .await
        .unwrap();
    while early.len() < FILES {
        early.push(within(manifest.read::<Entry>()).await.unwrap().id);
    }
    let (wanted, others) = early.split_last().unwrap();
    for &id in others {
        write_to(&mut verdicts, &Skip { id }).await;
    }
    write_to(
        &mut verdicts,
        &Want {
            id: *wanted,
            held: None,
        },
    )
    .await;
    let (mut receipt, _body) = within(connection.accept_bi()).await.unwrap();
    within(requests.read::<End>()).await.unwrap();
    within(manifest.read::<Complete>()).await.unwrap();
    assert!(
        within(manifest.frame(Entry::LIMIT))
            .await
            .unwrap()
            .is_none(),
        "the manifest has ended"
    );
    within(control.write_all(&Summary::default().to_bytes()))
        .await
        .unwrap();
    write_to(
        &mut receipt,
        &Committed {
            bytes: 5,
            durability: Durability::Visible,
        },
    )
    .await;
    let sent = within(client).await.unwrap().unwrap().sent;
    assert_eq!(
        (sent.files, sent.skipped, sent.failed),
        (1, FILES as u64 - 1, 0)
    );
}
