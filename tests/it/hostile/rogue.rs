//! A hostile server against an honest client.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::BytesMut;
use haul::internal::net::stream::MessageReader;
use haul::internal::protocol::{
    Committed, Complete, Done, Entry, Failed, GoAway, HELD_BLOCK, Held, Hello, Message, Plan, Pull,
    Push, Range, Ready, Refuse, Refused, Skip, Trailer, Want, Working,
};
use haul::{
    Client, Code, Config, Durability, Error, Event, Identity, Kind, Observer, Outcome, Reason,
    Result, ServerTrust, Summary,
};
use quinn::{Connection, SendStream};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::hostile::peer::*;
use crate::support::path::{Path, Settings};
use crate::support::{content, from, to, write};

/// A server that holds a key and follows no other rule, and an honest client that pushes to it.
struct Rogue {
    connection: Connection,
    control: SendStream,
    requests: MessageReader,
    /// Entries as they arrive.
    entries: mpsc::UnboundedReceiver<Entry>,
    client: JoinHandle<Result<Outcome>>,
    source: TempDir,
    /// Bytes of content that the client has released.
    moved: Arc<AtomicUsize>,
}

const SMALL: &[u8] = b"small";
const LARGE: usize = 5 << 20;
/// Bytes that the client keeps until they are acknowledged, and that the server grants it at first.
const WINDOW: usize = 1 << 20;

impl Rogue {
    /// Accepts the push; nothing is answered yet.
    async fn begin() -> Self {
        Self::tuned(|_| {}).await
    }

    async fn tuned(tune: impl FnOnce(&mut quinn::TransportConfig)) -> Self {
        let source = tempfile::tempdir().unwrap();
        write(&source.path().join("t/1 small"), SMALL);
        write(&source.path().join("t/2 large"), &content(2, LARGE));
        std::os::unix::fs::symlink("nowhere", source.path().join("t/3 link")).unwrap();
        let options = to(&[&source.path().join("t")], "t");
        let (connection, client) = connect(tune).await;
        let moved = Arc::new(AtomicUsize::new(0));
        let counter = moved.clone();
        let observer: Observer = Arc::new(move |event| {
            if let Event::Moved { bytes, .. } = event {
                counter.fetch_add(bytes as usize, Ordering::SeqCst);
            }
        });
        let client = tokio::spawn(async move {
            let client = client.await.unwrap()?;
            let outcome = client.push(&options, observer).await;
            client.close().await;
            outcome
        });
        let (control, requests) = within(connection.accept_bi()).await.unwrap();
        let mut requests = MessageReader::new(requests);
        assert_eq!(within(requests.byte()).await.unwrap(), 1);
        within(requests.read::<Hello>()).await.unwrap();
        within(requests.read::<Push>()).await.unwrap();
        let (_, entries) = mpsc::unbounded_channel();
        Self {
            connection,
            control,
            requests,
            entries,
            client,
            source,
            moved,
        }
    }

    /// Answers correctly, and reads the manifest until this many entries have arrived.
    async fn ready(entries: usize) -> (Self, SendStream, Vec<Entry>) {
        let mut rogue = Self::begin().await;
        rogue
            .answer(&Ready {
                entries: 100,
                entry_bytes: 1 << 20,
                ..Ready::default()
            })
            .await;
        let (verdicts, manifest) = within(rogue.connection.accept_bi()).await.unwrap();
        let mut manifest = MessageReader::new(manifest);
        assert_eq!(within(manifest.byte()).await.unwrap(), 2);
        within(manifest.varint()).await.unwrap();
        let (to, come) = mpsc::unbounded_channel();
        rogue.entries = come;
        tokio::spawn(async move {
            while let Ok(Some(frame)) = manifest.frame(Entry::LIMIT).await {
                match frame.kind {
                    Complete::TYPE => {}
                    _ => drop(to.send(frame.decode().unwrap())),
                }
            }
        });
        let mut all = Vec::new();
        while all.len() < entries {
            all.push(rogue.entry().await);
        }
        (rogue, verdicts, all)
    }

    async fn entry(&mut self) -> Entry {
        within(self.entries.recv()).await.expect("another entry")
    }

    /// Answers the rest and ends the session correctly. The directory arrives once everything in it is settled.
    async fn end(mut self, mut verdicts: SendStream) -> Result<Outcome> {
        let directory = self.entry_while_alive().await;
        assert_eq!(directory.kind, Kind::Directory);
        write_to(&mut verdicts, &Done { id: directory.id }).await;
        verdicts.finish().unwrap();
        within(self.requests.read::<haul::internal::protocol::End>())
            .await
            .unwrap();
        self.say(&Summary::default()).await;
        self.outcome().await
    }

    /// Returns the next entry; meanwhile it sends `Working` to the client.
    async fn entry_while_alive(&mut self) -> Entry {
        let mut tick = tokio::time::interval(std::time::Duration::from_millis(100));
        loop {
            tokio::select! {
                entry = self.entries.recv() => return entry.expect("another entry"),
                _ = tick.tick() => drop(self.control.write_all(&Working {}.to_bytes()).await),
            }
        }
    }

    async fn answer(&mut self, message: &impl Message) {
        let bytes = [&hello()[..], &message.to_bytes()].concat();
        within(self.control.write_all(&bytes)).await.unwrap();
    }

    /// Writes a message, unless the client has already left for a reason received elsewhere: its outcome has that
    /// reason.
    async fn say(&mut self, message: &impl Message) {
        let _ = within(self.control.write_all(&message.to_bytes())).await;
    }

    /// Accepts a transfer that the client opens.
    async fn transfer(&self) -> (SendStream, MessageReader, Plan) {
        let (receipt, body) = within(self.connection.accept_bi()).await.unwrap();
        let mut body = MessageReader::new(body);
        assert_eq!(within(body.byte()).await.unwrap(), 3);
        within(body.varint()).await.unwrap();
        let plan = within(body.read::<Plan>()).await.unwrap();
        (receipt, body, plan)
    }

    /// Waits for the result of the push, and checks that the client's source files still exist.
    async fn outcome(self) -> Result<Outcome> {
        let outcome = within(self.client).await.unwrap();
        assert_eq!(
            std::fs::read(self.source.path().join("t/1 small")).unwrap(),
            SMALL
        );
        no_panics();
        outcome
    }

    async fn protocol(self, what: &str) {
        let outcome = self.outcome().await;
        assert!(
            matches!(outcome, Err(Error::Protocol(_))),
            "{what}: {outcome:?}"
        );
    }
}

/// A connection of an honest client, at the rogue's end; and the client.
pub(crate) async fn connect(
    tune: impl FnOnce(&mut quinn::TransportConfig),
) -> (Connection, JoinHandle<Result<Client>>) {
    let (endpoint, trust) = listen(tune);
    let address = endpoint.local_addr().unwrap();
    let client = honest_client(address, trust);
    (accept(&endpoint).await, client)
}

/// The same over a path that the test can change.
pub(crate) async fn connect_over_path() -> (Connection, JoinHandle<Result<Client>>, Path) {
    let (endpoint, trust) = listen(|_| {});
    let path = Path::to(endpoint.local_addr().unwrap(), 1, Settings::default()).await;
    let client = honest_client(path.address, trust);
    (accept(&endpoint).await, client, path)
}

/// A raw endpoint that accepts a connection, and the trust with which a client accepts it.
fn listen(tune: impl FnOnce(&mut quinn::TransportConfig)) -> (quinn::Endpoint, ServerTrust) {
    watch_panics();
    let identity = Identity::generate().unwrap();
    let mut config =
        haul::internal::net::endpoint::server_config(&identity, &Config::default()).unwrap();
    let mut transport = quinn::TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(1_100_u32.into())
        .receive_window((WINDOW as u32).into());
    tune(&mut transport);
    config.transport_config(Arc::new(transport));
    let endpoint = haul::internal::net::endpoint::bind(
        SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        Some(config),
    )
    .unwrap();
    let trust = ServerTrust {
        pin: Some(identity.key_id()),
        ..ServerTrust::default()
    };
    (endpoint, trust)
}

async fn accept(endpoint: &quinn::Endpoint) -> Connection {
    within(async { endpoint.accept().await.unwrap().await })
        .await
        .unwrap()
}

fn honest_client(address: SocketAddr, trust: ServerTrust) -> JoinHandle<Result<Client>> {
    // An honest client that is slow for a moment, as under load, must not look like one that gave up.
    let config = Config {
        deadline: std::time::Duration::from_millis(1_500),
        send_window: WINDOW,
        ..impatient()
    };
    tokio::spawn(async move {
        let identity = Identity::generate().unwrap();
        Client::connect(&identity, &trust, "127.0.0.1", address.port(), &config).await
    })
}

/// The id of the entry of this kind and size.
fn id_of(entries: &[Entry], kind: Kind, large: bool) -> u64 {
    entries
        .iter()
        .find(|e| e.kind == kind && (e.size > Some(1 << 20)) == large)
        .unwrap()
        .id
}

async fn write_bytes(stream: &mut SendStream, bytes: &[u8]) {
    // The client may have given up already.
    let _ = within(stream.write_all(bytes)).await;
}

pub(crate) async fn write_to(stream: &mut SendStream, message: &impl Message) {
    write_bytes(stream, &message.to_bytes()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_never_answers_is_given_up() {
    let silent = Rogue::begin().await;
    let outcome = silent.outcome().await;
    assert!(matches!(outcome, Err(Error::Lost(_))), "{outcome:?}");

    let mut half = Rogue::begin().await;
    within(half.control.write_all(&hello()[..3])).await.unwrap();
    assert!(matches!(half.outcome().await, Err(Error::Lost(_))));

    let mut only_hello = Rogue::begin().await;
    within(only_hello.control.write_all(&hello()))
        .await
        .unwrap();
    assert!(matches!(only_hello.outcome().await, Err(Error::Lost(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_grants_no_stream_or_credit_is_given_up() {
    for stream in [true, false] {
        let (connection, client) = connect(|t| {
            if stream {
                t.max_concurrent_bidi_streams(0_u8.into());
            } else {
                t.stream_receive_window(1_u8.into());
            }
        })
        .await;
        let source = tempfile::tempdir().unwrap();
        let client = within(client).await.unwrap().unwrap();
        let pushing = within(client.push(&to(&[source.path()], "t"), haul::ignore())).await;
        assert!(matches!(pushing, Err(Error::Lost(_))), "{pushing:?}");
        drop(connection);
    }
    no_panics();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_silent_after_ready_is_given_up() {
    let (rogue, _verdicts, _) = Rogue::ready(3).await;
    let outcome = rogue.outcome().await;
    assert!(matches!(outcome, Err(Error::Lost(_))), "{outcome:?}");
    // A server that does not even read.
    let mut rogue = Rogue::begin().await;
    rogue
        .answer(&Ready {
            entries: 100,
            entry_bytes: 1 << 20,
            ..Ready::default()
        })
        .await;
    let outcome = rogue.outcome().await;
    assert!(matches!(outcome, Err(Error::Lost(_))), "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verdicts_for_no_entry_break_the_protocol() {
    let held = |offset, length| Held {
        range: Range { offset, length },
        digest: [0; 32],
    };
    for case in 0..8 {
        let (rogue, mut verdicts, entries) = Rogue::ready(3).await;
        let (file, link) = (
            id_of(&entries, Kind::File, true),
            id_of(&entries, Kind::Symlink, false),
        );
        match case {
            0 => write_to(&mut verdicts, &Skip { id: 77 }).await,
            1 => {
                write_to(&mut verdicts, &Done { id: link }).await;
                write_to(&mut verdicts, &Done { id: link }).await;
            }
            2 => {
                write_to(
                    &mut verdicts,
                    &Want {
                        id: file,
                        held: None,
                    },
                )
                .await;
                write_to(
                    &mut verdicts,
                    &Want {
                        id: file,
                        held: None,
                    },
                )
                .await;
            }
            3 => {
                write_to(
                    &mut verdicts,
                    &Want {
                        id: link,
                        held: None,
                    },
                )
                .await
            }
            4 => {
                let mut bytes = BytesMut::new();
                let many = (0..1025).map(|i| held(i * HELD_BLOCK, 1)).collect();
                // More than a Want may hold, so it is put together by hand.
                let payload = minicbor::to_vec(Want {
                    id: file,
                    held: Some(many),
                })
                .unwrap();
                bytes.extend_from_slice(&[Want::TYPE]);
                haul::internal::protocol::put_varint(&mut bytes, payload.len() as u64);
                bytes.extend_from_slice(&payload);
                let _ = within(verdicts.write_all(&bytes)).await;
            }
            5 => {
                let overlapping = vec![held(0, HELD_BLOCK), held(HELD_BLOCK - 1, HELD_BLOCK)];
                write_to(
                    &mut verdicts,
                    &Want {
                        id: file,
                        held: Some(overlapping),
                    },
                )
                .await;
            }
            6 => write_to(&mut verdicts, &Working {}).await,
            _ => write_bytes(&mut verdicts, &Noise::new(1).bytes(1000)).await,
        }
        rogue.protocol(&format!("case {case}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_content_of_a_directory_cannot_be_wanted() {
    let (mut rogue, mut verdicts, entries) = Rogue::ready(3).await;
    for entry in &entries {
        write_to(&mut verdicts, &Skip { id: entry.id }).await;
    }
    let directory = rogue.entry().await;
    write_to(
        &mut verdicts,
        &Want {
            id: directory.id,
            held: None,
        },
    )
    .await;
    rogue.protocol("a directory").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_ranges_of_other_content_are_sent_anyway() {
    let (rogue, mut verdicts, entries) = Rogue::ready(3).await;
    let large = id_of(&entries, Kind::File, true);
    let content = content(2, LARGE);
    let block = HELD_BLOCK as usize;
    let held = |at: usize, digest: [u8; 32]| Held {
        range: Range {
            offset: at as u64,
            length: block as u64,
        },
        digest,
    };
    let truth = *blake3::hash(&content[3 * block..4 * block]).as_bytes();
    let beyond = held(1 << 40, truth);
    let lies = vec![
        held(0, [9; 32]),
        held(block, truth),
        held(3 * block, truth),
        beyond,
    ];
    for entry in &entries {
        match entry.id {
            id if id == large => {
                write_to(
                    &mut verdicts,
                    &Want {
                        id,
                        held: Some(lies.clone()),
                    },
                )
                .await
            }
            id => write_to(&mut verdicts, &Skip { id }).await,
        }
    }
    let (mut receipt, body, plan) = rogue.transfer().await;
    let ranges: Vec<_> = plan
        .ranges
        .iter()
        .map(|r| (r.offset as usize, r.length as usize))
        .collect();
    assert_eq!(
        ranges,
        [(0, 3 * block), (4 * block, block)],
        "only what is really held stays at home"
    );
    let (mut stream, begun, _) = body.into_parts();
    let rest = within(stream.read_to_end(LARGE)).await.unwrap();
    let got = [&begun[..], &rest].concat();
    let trailer = Trailer {
        digest: *blake3::hash(&content).as_bytes(),
        size: None,
    }
    .to_bytes();
    assert_eq!(
        got,
        [&content[..3 * block], &content[4 * block..], &trailer].concat()
    );
    write_to(
        &mut receipt,
        &Committed {
            bytes: LARGE as u64,
            durability: Durability::Visible,
        },
    )
    .await;
    let outcome = rogue.end(verdicts).await.unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.failed), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn false_early_and_missing_receipts_do_not_count() {
    let mut running = tokio::task::JoinSet::new();
    for case in [
        "size",
        "working",
        "early failure",
        "stop",
        "reset",
        "garbage",
        "end",
        "silence",
        "unread",
    ] {
        running.spawn(receipt_case(case, false));
        running.spawn(receipt_case(case, true));
    }
    while let Some(case) = running.join_next().await {
        case.unwrap();
    }
}

async fn receipt_case(case: &'static str, large: bool) {
    let (rogue, mut verdicts, entries) = Rogue::ready(3).await;
    let wanted = id_of(&entries, Kind::File, large);
    for entry in &entries {
        match entry.id {
            id if id == wanted => write_to(&mut verdicts, &Want { id, held: None }).await,
            id => write_to(&mut verdicts, &Skip { id }).await,
        }
    }
    let (mut receipt, body, _) = rogue.transfer().await;
    let (mut stream, ..) = body.into_parts();
    let drains = !matches!(case, "early failure" | "stop" | "unread");
    match case {
        "size" => {
            write_to(
                &mut receipt,
                &Committed {
                    bytes: 1,
                    durability: Durability::Synced,
                },
            )
            .await
        }
        "working" => write_to(&mut receipt, &Working {}).await,
        "early failure" => {
            let why = Reason::new(Code::NoSpace, "full\x1b[2J").into();
            write_to(&mut receipt, &Failed { why }).await;
            receipt.finish().unwrap();
            stream.stop(1_u8.into()).unwrap();
        }
        "stop" => stream.stop(0x17_u8.into()).unwrap(),
        "reset" => receipt.reset(0x19_u8.into()).unwrap(),
        "garbage" => write_bytes(&mut receipt, &Noise::new(3).bytes(400)).await,
        "end" => receipt.finish().unwrap(),
        _ => {}
    }
    let draining = tokio::spawn(async move {
        while drains && matches!(stream.read_chunk(1 << 20, true).await, Ok(Some(_))) {}
        // Neither stopped, nor finished by being dropped.
        std::future::pending::<()>().await;
        drop((stream, receipt));
    });
    let moved = rogue.moved.clone();
    // The file fails, and the session continues.
    let outcome = within(rogue.end(verdicts))
        .await
        .unwrap_or_else(|e| panic!("{case}: {e}"));
    draining.abort();
    assert_eq!((outcome.sent.files, outcome.sent.failed), (0, 1), "{case}");
    let (name, why) = &outcome.sent.failures[0];
    assert!(
        name.to_string()
            .contains(if large { "large" } else { "small" })
    );
    assert!(!why.to_string().contains('\x1b'), "{why}");
    if case == "unread" && large {
        assert_eq!(why.code, Code::TimedOut);
        let moved = moved.load(Ordering::SeqCst);
        assert!(
            moved <= 2 * WINDOW,
            "it read {moved} bytes for a server that takes none"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_out_of_place_break_the_protocol() {
    let noise = Noise::new(5).bytes(2000);
    let way_too_long = [
        &hello()[..],
        &[5, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
    ]
    .concat();
    let before_hello = Ready::default().to_bytes().to_vec();
    let no_answer = [&hello()[..], &Summary::default().to_bytes()].concat();
    for bytes in [noise, way_too_long, before_hello, no_answer] {
        let mut rogue = Rogue::begin().await;
        let _ = within(rogue.control.write_all(&bytes)).await;
        rogue.protocol("instead of an answer").await;
    }
    let mut ended = Rogue::begin().await;
    ended.control.finish().unwrap();
    ended.protocol("an end instead of an answer").await;

    for bytes in [
        Summary::default().to_bytes().to_vec(),
        Noise::new(6).bytes(300),
        hello(),
    ] {
        let (mut rogue, _verdicts, _) = Rogue::ready(3).await;
        let _ = within(rogue.control.write_all(&bytes)).await;
        rogue.protocol("a summary before the end").await;
    }
    let (mut rogue, mut verdicts, _) = Rogue::ready(3).await;
    verdicts.finish().unwrap();
    rogue.say(&Working {}).await;
    rogue.protocol("an end with entries unsettled").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_at_once_fails_no_file() {
    let mut rogue = Rogue::begin().await;
    rogue
        .answer(&Ready {
            entries: 100,
            entry_bytes: 1 << 20,
            ..Ready::default()
        })
        .await;
    rogue
        .say(&GoAway {
            why: Reason::new(Code::Stopping, "\x1b]0;gone\x07").into(),
        })
        .await;
    let (mut verdicts, manifest) = within(rogue.connection.accept_bi()).await.unwrap();
    let mut manifest = MessageReader::new(manifest);
    within(manifest.byte()).await.unwrap();
    within(manifest.varint()).await.unwrap();
    // The client may have announced entries before it received the message.
    while let Some(frame) = within(manifest.frame(1 << 16)).await.unwrap() {
        if frame.kind == Complete::TYPE {
            continue;
        }
        let id = frame.decode::<Entry>().unwrap().id;
        write_to(
            &mut verdicts,
            &Refuse {
                id,
                why: Reason::from(Code::Stopping).into(),
            },
        )
        .await;
    }
    verdicts.finish().unwrap();
    within(rogue.requests.read::<haul::internal::protocol::End>())
        .await
        .unwrap();
    rogue.say(&Summary::default()).await;
    let outcome = rogue.outcome().await.unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.failed), (0, 0));
    let why = outcome.sent.interrupted.expect("it says so").to_string();
    assert!(!why.contains('\x1b') && !why.contains('\x07'), "{why}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_from_a_server_cannot_control_a_terminal() {
    let evil = "\x1b[2J\x1b]0;owned\x07\u{202e}\r\n";
    let mut rogue = Rogue::begin().await;
    rogue
        .answer(&Refused {
            why: Reason::new(Code::NoSpace, evil).into(),
        })
        .await;
    let error = rogue.outcome().await.unwrap_err();
    assert!(
        matches!(&error, Error::Refused(why) if why.code == Code::NoSpace),
        "{error:?}"
    );
    assert!(
        !error.to_string().contains(['\x1b', '\x07', '\r', '\n']),
        "{error}"
    );

    for code in 0_u8..9 {
        let rogue = Rogue::begin().await;
        rogue.connection.close(code.into(), evil.as_bytes());
        let error = rogue.outcome().await.unwrap_err();
        assert!(
            !error.to_string().contains(['\x1b', '\x07', '\r', '\n']),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_refuses_streams_that_it_did_not_ask_for() {
    let (rogue, mut verdicts, entries) = Rogue::ready(3).await;
    let handle = quinn::VarInt::from(rogue.control.id()).into_inner();
    let unasked = [
        (head(2, handle), Code::NotWanted),
        (
            [&head(3, handle)[..], &plan(0, &[(0, 5)]).to_bytes()[..]].concat(),
            Code::NotWanted,
        ),
        (vec![0x55], Code::Unsupported),
        (
            [&[1], &hello()[..], &push_into(&[])[..]].concat(),
            Code::Done,
        ),
    ];
    for (bytes, code) in unasked {
        let (mut send, _receive) = within(rogue.connection.open_bi()).await.unwrap();
        within(send.write_all(&bytes)).await.unwrap();
        assert_eq!(stopped(&mut send).await, code);
    }
    // The push is not affected.
    for entry in &entries {
        write_to(&mut verdicts, &Skip { id: entry.id }).await;
    }
    let outcome = rogue.end(verdicts).await.unwrap();
    assert_eq!((outcome.sent.skipped, outcome.sent.failed), (3, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_accepts_only_requested_entries() {
    let (connection, client) = connect(|_| {}).await;
    let directory = tempfile::tempdir().unwrap();
    write(&directory.path().join("into/.profile"), b"mine");
    let options = from(&["some/notes"], &directory.path().join("into/"));
    let pulling = tokio::spawn(async move {
        let client = client.await.unwrap()?;
        client.pull(&options, haul::ignore()).await
    });
    let (mut control, requests) = within(connection.accept_bi()).await.unwrap();
    let handle = quinn::VarInt::from(control.id()).into_inner();
    let mut requests = MessageReader::new(requests);
    within(requests.byte()).await.unwrap();
    within(requests.read::<Hello>()).await.unwrap();
    within(requests.read::<Pull>()).await.unwrap();
    within(control.write_all(&[&hello()[..], &Ready::default().to_bytes()].concat()))
        .await
        .unwrap();
    let (manifest, verdicts) = within(connection.open_bi()).await.unwrap();
    let mut session = Session {
        connection: connection.clone(),
        handle,
        control,
        answers: requests,
        manifest,
        verdicts: MessageReader::new(verdicts),
    };
    within(session.manifest.write_all(&head(2, handle)))
        .await
        .unwrap();
    let unasked = [
        Entry {
            size: Some(0),
            ..entry(0, &[b".profile"], Kind::File)
        },
        file(1, ".profile", 5),
        entry(2, &[b".ssh", b"authorized_keys"], Kind::File),
        entry(3, &[b"some", b"notes"], Kind::File),
        entry(4, &[b"other"], Kind::Symlink),
        entry(5, &[b"other"], Kind::Directory),
        entry(6, &[b"..", b"x"], Kind::Directory),
    ];
    for entry in unasked {
        session.announce(&entry).await;
        let verdict = session.verdict().await;
        assert!(
            matches!(verdict, haul::internal::protocol::Verdict::Refuse(..)),
            "{verdict:?} to {entry:?}"
        );
    }
    session.wanted(7, "notes", 5).await;
    assert_eq!(
        std::fs::read(directory.path().join("into/.profile")).unwrap(),
        b"mine"
    );
    assert_eq!(
        std::fs::read_dir(directory.path().join("into"))
            .unwrap()
            .count(),
        1
    );
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    connection.close(0_u8.into(), b"");
    assert!(within(pulling).await.unwrap().is_err());
    no_panics();
}
