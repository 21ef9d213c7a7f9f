//! A hostile server against the command: no text from the server, wherever it is sent, can control the terminal.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};

use bytes::BytesMut;
use haul::internal::net::stream::MessageReader;
use haul::internal::protocol::{
    Complete, Components, Done, End, Entry, Failed, Frame, GoAway, Hello, Message, Plan, Push,
    Ready, Refuse, Refused, Removed, Unsendable, Want, WireReason,
};
use haul::{Code, Config, Identity, Kind, Listed, MetadataWarning, Reason, Summary};
use quinn::{Connection, SendStream};
use tempfile::tempdir;

use crate::hostile::peer::{components, head, hello, within};
use crate::support::command::private;
use crate::support::write;

/// Sets the clipboard (OSC 52), clears the screen (CSI, also as one C1 character), forges a line and reverses the
/// direction of text.
const EVIL: &str = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\u{9b}2J\r\nFORGED\u{202e}\u{2066}\u{200b}";

fn evil() -> WireReason {
    Reason::new(Code::NoSpace, EVIL).into()
}

/// A message of a type that is written without its usual check.
fn bytes(message: &impl Message) -> Vec<u8> {
    message.to_bytes().to_vec()
}

/// Asserts that nothing that reaches the terminal can control it, and that something was printed.
#[track_caller]
fn harmless(what: &str, said: &str) {
    assert!(
        said.contains("FORGED"),
        "{what}: the text is shown: {said:?}"
    );
    let steers =
        |c: char| c != '\n' && c.is_control() || matches!(c, '\u{202e}' | '\u{2066}' | '\u{200b}');
    assert!(!said.contains(steers), "{what}: {said:?}");
    assert!(
        !said.lines().any(|line| line.starts_with("FORGED")),
        "{what}: a forged line: {said:?}"
    );
}

/// The server's end of a control stream.
struct Control {
    connection: Connection,
    handle: u64,
    send: SendStream,
    requests: MessageReader,
}

impl Control {
    /// Accepts the stream, and reads the client's request up to its hello.
    async fn accept(connection: Connection) -> Self {
        let (send, requests) = within(connection.accept_bi()).await.unwrap();
        let handle = quinn::VarInt::from(send.id()).into_inner();
        let mut requests = MessageReader::new(requests);
        assert_eq!(within(requests.byte()).await.unwrap(), 1);
        within(requests.read::<Hello>()).await.unwrap();
        Self {
            connection,
            handle,
            send,
            requests,
        }
    }

    async fn say(&mut self, parts: &[Vec<u8>]) {
        within(self.send.write_all(&parts.concat())).await.unwrap();
    }

    /// Answers that it is ready for a push. Returns the stream of verdicts and the first entry that is a file.
    async fn first_file(&mut self) -> (SendStream, MessageReader, Entry) {
        within(self.requests.read::<Push>()).await.unwrap();
        let ready = Ready {
            entries: 100,
            entry_bytes: 1 << 20,
            ..Ready::default()
        };
        self.say(&[hello(), bytes(&ready)]).await;
        let (verdicts, manifest) = within(self.connection.accept_bi()).await.unwrap();
        let mut manifest = MessageReader::new(manifest);
        assert_eq!(within(manifest.byte()).await.unwrap(), 2);
        within(manifest.varint()).await.unwrap();
        loop {
            let entry: Frame = within(manifest.frame(Entry::LIMIT)).await.unwrap().unwrap();
            let entry: Entry = entry.decode().unwrap();
            if entry.kind == Kind::File {
                return (verdicts, manifest, entry);
            }
        }
    }

    /// Ends a push with a summary, whatever the client has announced meanwhile.
    async fn summarise(
        &mut self,
        mut verdicts: SendStream,
        mut manifest: MessageReader,
        last: &Summary,
    ) {
        while let Ok(Some(frame)) = within(manifest.frame(Entry::LIMIT)).await {
            if frame.kind == Entry::TYPE {
                let entry: Entry = frame.decode().unwrap();
                within(verdicts.write_all(&bytes(&Done { id: entry.id })))
                    .await
                    .unwrap();
            }
        }
        verdicts.finish().unwrap();
        within(self.requests.read::<End>()).await.unwrap();
        self.say(&[bytes(last)]).await;
    }
}

/// Runs the command against a server with this script, which returns what must stay open. Returns everything that the
/// command printed.
async fn said<T>(arguments: &[&str], server: impl AsyncFnOnce(Connection) -> T) -> String {
    let identity = Identity::generate().unwrap();
    let config =
        haul::internal::net::endpoint::server_config(&identity, &Config::default()).unwrap();
    let endpoint = haul::internal::net::endpoint::bind(
        SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        Some(config),
    )
    .unwrap();
    let url = format!("haul://{}/", endpoint.local_addr().unwrap());
    let (home, files) = (private(), tempdir().unwrap());
    write(&files.path().join("t/file"), b"content");
    let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
    command
        .args(&arguments[..1])
        .args(["--pin", &identity.key_id().to_string()])
        .args(
            arguments[1..]
                .iter()
                .map(|argument| argument.replace("URL/", &url)),
        )
        .current_dir(files.path())
        .env("HAUL_HOME", home.path())
        .env("HAUL_LOG", "debug")
        .stdin(Stdio::null());
    let mut running = tokio::task::spawn_blocking(move || command.output().unwrap());
    let connection = tokio::select! {
        incoming = endpoint.accept() => {
            within(async { incoming.unwrap().await }).await.unwrap()
        }
        output = &mut running => panic!("it never connects: {output:?}"),
    };
    // Streams stay open until the command has read everything that it needs.
    let _open = server(connection.clone()).await;
    let output = within(running).await.unwrap();
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8(said).expect("what is printed is text")
}

const PUSH: &[&str] = &["cp", "-v", "--retry-for", "0", "t", "URL/into"];
const MIRROR: &[&str] = &["sync", "-v", "--retry-for", "0", "t", "URL/into"];
const PULL: &[&str] = &["cp", "-v", "--retry-for", "0", "URL/t", "got"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_of_the_session_cannot_control_a_terminal() {
    for arguments in [PUSH, PULL, &["ls", "URL/"]] {
        let shown = said(arguments, async |connection| {
            let mut control = Control::accept(connection).await;
            control
                .say(&[hello(), bytes(&Refused { why: evil() })])
                .await;
            control
        })
        .await;
        harmless("Refused", &shown);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reason_of_a_close_cannot_control_a_terminal() {
    // Protocol, Busy, NotAdmitted, and codes that end nothing else.
    for code in [0x01_u8, 0x02, 0x07, 0x08, 0x17, 0x3f] {
        let shown = said(PUSH, async |connection| {
            let _control = Control::accept(connection.clone()).await;
            connection.close(code.into(), EVIL.as_bytes());
        })
        .await;
        harmless(&format!("a close with {code:#x}"), &shown);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verdicts_cannot_control_a_terminal() {
    let shown = said(PUSH, async |connection| {
        let mut control = Control::accept(connection).await;
        let (mut verdicts, manifest, file) = control.first_file().await;
        let refuse = Refuse {
            id: file.id,
            why: evil(),
        };
        within(verdicts.write_all(&bytes(&refuse))).await.unwrap();
        control
            .summarise(verdicts, manifest, &Summary::default())
            .await;
        control
    })
    .await;
    harmless("Refuse", &shown);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn receipts_cannot_control_a_terminal() {
    let shown = said(PUSH, async |connection| {
        let mut control = Control::accept(connection.clone()).await;
        let (mut verdicts, manifest, file) = control.first_file().await;
        let want = Want {
            id: file.id,
            held: None,
        };
        within(verdicts.write_all(&bytes(&want))).await.unwrap();
        let (mut receipt, body) = within(connection.accept_bi()).await.unwrap();
        let mut body = MessageReader::new(body);
        within(body.byte()).await.unwrap();
        within(body.varint()).await.unwrap();
        within(body.read::<Plan>()).await.unwrap();
        within(receipt.write_all(&bytes(&Failed { why: evil() })))
            .await
            .unwrap();
        receipt.finish().unwrap();
        control
            .summarise(verdicts, manifest, &Summary::default())
            .await;
        (control, body)
    })
    .await;
    harmless("Failed", &shown);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_summary_cannot_control_a_terminal() {
    let summary = Summary {
        unkept: Some(vec![MetadataWarning {
            aspect: 3,
            count: 1,
            first: EVIL.into(),
        }]),
        ..Summary::default()
    };
    let unremoved = Summary {
        removed: Some(0),
        unremoved: Some(evil()),
        ..Summary::default()
    };
    let removed = Removed {
        path: components(&[EVIL.as_bytes()]),
    };
    let cases = [
        ("Unkept", PUSH, vec![], summary),
        ("unremoved", MIRROR, vec![], unremoved),
        ("Removed", MIRROR, bytes(&removed), Summary::default()),
        (
            "GoAway",
            PUSH,
            bytes(&GoAway { why: evil() }),
            Summary::default(),
        ),
    ];
    for (what, arguments, before, summary) in cases {
        let shown = said(arguments, async |connection| {
            let mut control = Control::accept(connection).await;
            let (mut verdicts, manifest, file) = control.first_file().await;
            control.say(&[before]).await;
            within(verdicts.write_all(&bytes(&Done { id: file.id })))
                .await
                .unwrap();
            control.summarise(verdicts, manifest, &summary).await;
            control
        })
        .await;
        harmless(what, &shown);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pulled_entries_cannot_control_a_terminal() {
    let unsendable = Unsendable {
        omitted: None,
        path: components(&[b"t", EVIL.as_bytes()]),
        why: evil(),
    };
    let named = Entry {
        path: components(&[b"t", EVIL.as_bytes()]),
        size: Some(0),
        ..Entry::default()
    };
    let unkept = MetadataWarning {
        aspect: 0,
        count: 2,
        first: EVIL.into(),
    };
    let plain = End::default();
    let interrupted = End {
        interrupted: Some(evil()),
        ..End::default()
    };
    let lossy = End {
        unkept: Some(vec![unkept]),
        ..End::default()
    };
    let one = End {
        entries: 1,
        ..End::default()
    };
    let failed = End {
        failed: 1,
        ..plain.clone()
    };
    let cases = [
        ("Unsendable", bytes(&unsendable), failed),
        ("a name", bytes(&named), one),
        ("End.interrupted", vec![], interrupted),
        ("End.unkept", vec![], lossy),
    ];
    for (what, manifest, end) in cases {
        let shown = said(PULL, async |connection| {
            let mut control = Control::accept(connection.clone()).await;
            let ready = Ready {
                only: Some(Kind::Directory),
                ..Ready::default()
            };
            control.say(&[hello(), bytes(&ready)]).await;
            let (mut entries, verdicts) = within(connection.open_bi()).await.unwrap();
            let all = [head(2, control.handle), manifest, bytes(&Complete {})].concat();
            within(entries.write_all(&all)).await.unwrap();
            entries.finish().unwrap();
            control.say(&[bytes(&end)]).await;
            (control, entries, verdicts)
        })
        .await;
        harmless(what, &shown);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listing_cannot_control_a_terminal() {
    let listed = Listed {
        path: components(&[EVIL.as_bytes()]),
        kind: Some(Kind::Symlink),
        size: None,
        modified: None,
        mode: None,
        target: Some(EVIL.as_bytes().to_vec()),
    };
    let unsendable = Unsendable {
        omitted: None,
        path: Components(vec![EVIL.as_bytes().to_vec()]),
        why: evil(),
    };
    for arguments in [&["ls", "-l", "URL/"][..], &["ls", "--json", "URL/"]] {
        for (what, message) in [
            ("Listed", bytes(&listed)),
            ("Unsendable", bytes(&unsendable)),
        ] {
            let shown = said(arguments, async |connection| {
                let mut control = Control::accept(connection).await;
                let ready = bytes(&Ready::default());
                control
                    .say(&[hello(), ready, message, bytes(&End::default())])
                    .await;
                let _ = control.send.finish();
                control
            })
            .await;
            harmless(what, &shown);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_messages_cannot_control_a_terminal() {
    let mut noise = BytesMut::from(&hello()[..]);
    noise.extend_from_slice(EVIL.as_bytes());
    for garbage in [EVIL.as_bytes().to_vec(), noise.to_vec()] {
        let shown = said(PUSH, async |connection| {
            let mut control = Control::accept(connection).await;
            control.say(&[garbage]).await;
            control
        })
        .await;
        assert!(
            !shown.contains(|c: char| c != '\n' && c.is_control()),
            "{shown:?}"
        );
    }
}
