//! Peers that break every rule: raw quinn, with haul's messages or any other bytes.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use haul::internal::net::stream::{MessageReader, code_of};
use haul::internal::protocol::Verdict;
use haul::internal::protocol::{
    Components, Entry, Hello, Message, Plan, Pull, Push, Range, Ready, Trailer, put_varint,
};
use haul::{Code, Config, Durability, Identity, KeyId, Kind, LocalStore, MemoryStore, ServerTrust};
use quinn::{Connection, ConnectionError, Endpoint, SendStream, TransportConfig};
use tempfile::TempDir;

use crate::support::slow::SlowStore;
use crate::support::{Host, content, push, to, write};

/// A configuration for what a deadline ends: short, so that such a test is soon over. No test depends on the exact
/// values.
pub(crate) fn impatient() -> Config {
    let (stall, deadline) = (Duration::from_millis(300), Duration::from_millis(600));
    Config {
        stall,
        deadline,
        retry_for: Duration::ZERO,
        ..Config::default()
    }
}

/// A configuration for everything else: no deadline passes before the test ends, however busy the machine is.
pub(crate) fn patient() -> Config {
    Config {
        retry_for: Duration::ZERO,
        ..Config::default()
    }
}

/// Many times the duration of any step here.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for an event that must happen; a test that hangs has failed.
pub(crate) async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what)
        .await
        .expect("it hangs")
}

/// Panics in the tasks of the honest side, which tokio would swallow.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Records every later panic outside of the tests themselves.
pub(crate) fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // A panic in tests/ is a test that fails.
            if info
                .location()
                .is_some_and(|at| !at.file().starts_with("tests/"))
            {
                PANICS
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(info.to_string());
            }
            usual(info);
        }));
    });
}

pub(crate) fn no_panics() {
    let panics = PANICS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    assert_eq!(panics, Vec::<String>::new(), "the honest side has panicked");
}

/// A server under attack, its served directory, and a directory outside of it that must not change.
pub(crate) struct Arena {
    pub host: Host,
    pub directory: TempDir,
}

impl Arena {
    pub(crate) fn new(config: Config) -> Self {
        watch_panics();
        let directory = tempfile::tempdir().unwrap();
        write(&directory.path().join("outside/secret"), b"secret");
        std::fs::create_dir(directory.path().join("served")).unwrap();
        let store = LocalStore::open(&directory.path().join("served")).unwrap();
        Self {
            host: Host::serving(Arc::new(store), config),
            directory,
        }
    }

    /// A server whose disk can be paused.
    pub(crate) fn with_slow_disk(config: Config) -> (Self, SlowStore) {
        watch_panics();
        let directory = tempfile::tempdir().unwrap();
        let store = SlowStore::around(MemoryStore::default(), None);
        (
            Self {
                host: Host::serving(Arc::new(store.clone()), config),
                directory,
            },
            store,
        )
    }

    pub(crate) fn served(&self) -> std::path::PathBuf {
        self.directory.path().join("served")
    }

    pub(crate) fn outside(&self) -> std::path::PathBuf {
        self.directory.path().join("outside")
    }

    /// The names of served files, without those that honest clients sent.
    pub(crate) fn names(&self) -> Vec<String> {
        fn walk(root: &Path, at: &Path, names: &mut Vec<String>) {
            for entry in std::fs::read_dir(at).unwrap() {
                let path = entry.unwrap().path();
                names.push(path.strip_prefix(root).unwrap().display().to_string());
                // A partial may disappear during the walk.
                if path
                    .symlink_metadata()
                    .is_ok_and(|metadata| metadata.is_dir())
                {
                    walk(root, &path, names);
                }
            }
        }
        let mut names = Vec::new();
        walk(&self.served(), &self.served(), &mut names);
        names.retain(|name| !name.starts_with("honest"));
        names.sort();
        names
    }

    /// Checks that another client can work, whatever happens beside it.
    pub(crate) async fn honest(&self) {
        let source = tempfile::tempdir().unwrap();
        let tree = source.path().join("t");
        write(&tree.join("empty"), b"");
        write(&tree.join("small"), &content(1, 10_000));
        write(&tree.join("large"), &content(2, 700_000));
        static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let name = format!(
            "honest{}",
            NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
        );
        // On a loaded machine this client may itself miss deadlines as short as these; then it retries as a user would.
        // A client that is starved waits, and the timeout detects that.
        for attempt in 1.. {
            match within(push(&self.host, &to(&[&tree], &name))).await {
                Ok(outcome) if outcome.sent.failed == 0 => break,
                late => assert!(attempt < 5, "an honest client is served: {late:?}"),
            }
        }
        assert_eq!(
            std::fs::read(self.served().join(name).join("large")).unwrap(),
            content(2, 700_000)
        );
    }

    /// Checks that the server still works, and has neither panicked nor written outside of its directory.
    pub(crate) async fn unharmed(&self) {
        self.honest().await;
        let outside: Vec<_> = std::fs::read_dir(self.outside())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(outside, ["secret"]);
        assert_eq!(
            std::fs::read(self.outside().join("secret")).unwrap(),
            b"secret"
        );
        no_panics();
    }
}

/// A client that holds a key and follows no other rule.
pub(crate) struct Peer {
    _endpoint: Endpoint,
    pub connection: Connection,
}

impl Peer {
    pub(crate) async fn connect(host: &Host) -> Self {
        Self::connect_as(host, &Identity::generate().unwrap(), |_| {}).await
    }

    /// A client with its own transport, such as one that grants no credit.
    pub(crate) async fn connect_as(
        host: &Host,
        identity: &Identity,
        tune: impl FnOnce(&mut TransportConfig),
    ) -> Self {
        Self::connect_to(host.address, host.key_id, identity, tune).await
    }

    /// A client of a server in a process of its own.
    pub(crate) async fn connect_to(
        address: SocketAddr,
        key_id: KeyId,
        identity: &Identity,
        tune: impl FnOnce(&mut TransportConfig),
    ) -> Self {
        let connecting = Self::connecting(address, key_id, identity, tune);
        let (endpoint, connection) = within(connecting).await;
        Self {
            _endpoint: endpoint,
            connection: connection.unwrap(),
        }
    }

    /// A client by a connection that is already up.
    pub(crate) fn of(endpoint: Endpoint, connection: Connection) -> Self {
        Self {
            _endpoint: endpoint,
            connection,
        }
    }

    pub(crate) async fn connecting(
        address: SocketAddr,
        key_id: KeyId,
        identity: &Identity,
        tune: impl FnOnce(&mut TransportConfig),
    ) -> (Endpoint, Result<Connection, ConnectionError>) {
        let trust = ServerTrust {
            pin: Some(key_id),
            ..ServerTrust::default()
        };
        let verifier = trust.verifier("127.0.0.1", address.port()).unwrap();
        let mut config =
            haul::internal::net::endpoint::client_config(identity, verifier, &Config::default())
                .unwrap();
        let mut transport = TransportConfig::default();
        transport
            .keep_alive_interval(Some(Duration::from_secs(1)))
            .max_concurrent_bidi_streams(2_000_u32.into());
        tune(&mut transport);
        config.transport_config(Arc::new(transport));
        let endpoint =
            haul::internal::net::endpoint::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), None)
                .unwrap();
        let connection = endpoint
            .connect_with(config, address, "127.0.0.1")
            .unwrap()
            .await;
        (endpoint, connection)
    }

    /// A stream that begins with these bytes.
    pub(crate) async fn open(&self, bytes: &[u8]) -> (SendStream, MessageReader) {
        let (mut send, receive) = within(self.connection.open_bi()).await.unwrap();
        within(send.write_all(bytes)).await.unwrap();
        (send, MessageReader::new(receive))
    }

    /// Opens a control stream and sends hello and a request; the answer is not read yet.
    pub(crate) async fn ask(&self, request: &[u8]) -> (u64, SendStream, MessageReader) {
        let (send, answers) = self.open(&[&[1], &hello()[..], request].concat()).await;
        (quinn::VarInt::from(send.id()).into_inner(), send, answers)
    }

    /// Opens a push into the served directory, with its manifest.
    pub(crate) async fn session(&self) -> Session {
        self.session_as(&push_into(&[])).await
    }

    /// Opens the push of this request.
    pub(crate) async fn session_as(&self, push: &[u8]) -> Session {
        let (handle, control, mut answers) = self.ask(push).await;
        within(answers.read::<Hello>()).await.unwrap();
        within(answers.read::<Ready>()).await.unwrap();
        let (manifest, verdicts) = self.open(&head(2, handle)).await;
        Session {
            connection: self.connection.clone(),
            handle,
            control,
            answers,
            manifest,
            verdicts,
        }
    }

    /// Waits until the server has closed the connection with this code.
    pub(crate) async fn closed_with(&self, code: Code, what: &str) {
        match within(self.connection.closed()).await {
            ConnectionError::ApplicationClosed(close) => {
                assert_eq!(code_of(close.error_code), code, "{what}")
            }
            // quinn forgets a close that it has just read if a stateless reset follows at once.
            ConnectionError::Reset => {}
            other => panic!("{what}: {other}"),
        }
    }
}

/// The code with which a stream was stopped.
pub(crate) async fn stopped(stream: &mut SendStream) -> Code {
    code_of(
        within(stream.stopped())
            .await
            .unwrap()
            .expect("stopped, and not taken"),
    )
}

/// A push that is under way.
pub(crate) struct Session {
    pub connection: Connection,
    pub handle: u64,
    pub control: SendStream,
    pub answers: MessageReader,
    pub manifest: SendStream,
    pub verdicts: MessageReader,
}

impl Session {
    pub(crate) async fn announce(&mut self, entry: &Entry) {
        within(self.manifest.write_all(&entry.to_bytes()))
            .await
            .unwrap();
    }

    pub(crate) async fn verdict(&mut self) -> Verdict {
        within(self.verdicts.verdict())
            .await
            .unwrap()
            .expect("a verdict")
    }

    /// Announces a file and waits for its admission.
    pub(crate) async fn wanted(&mut self, id: u64, name: &str, size: u64) {
        self.announce(&file(id, name, size)).await;
        let verdict = self.verdict().await;
        assert_eq!(verdict, Verdict::Want(id, vec![]));
    }

    /// Opens a transfer stream that begins with a plan.
    pub(crate) async fn transfer(&self, plan: &Plan, body: &[u8]) -> (SendStream, MessageReader) {
        let (mut send, receive) = within(self.connection.open_bi()).await.unwrap();
        let mut bytes = BytesMut::from(&head(3, self.handle)[..]);
        plan.put(&mut bytes);
        bytes.extend_from_slice(body);
        // A server that has read enough stops the stream.
        let _ = within(send.write_all(&bytes)).await;
        (send, MessageReader::new(receive))
    }
}

pub(crate) fn hello() -> Vec<u8> {
    Hello {
        features: vec![],
        agent: "hostile".into(),
    }
    .to_bytes()
    .to_vec()
}

/// A push of several sources, so that each goes into the destination under its own name; each call makes another
/// session.
pub(crate) fn push_into(destination: &[&[u8]]) -> Vec<u8> {
    static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let mut session = [7; 16];
    session[..8].copy_from_slice(
        &NUMBER
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed)
            .to_le_bytes(),
    );
    let destination = components(destination);
    request(session, destination, (true, 2))
}

/// A push of one file that becomes exactly the named path.
pub(crate) fn push_as(name: &[u8]) -> Vec<u8> {
    request([9; 16], components(&[name]), (false, 1))
}

fn request(session: [u8; 16], destination: Components, (into, sources): (bool, u32)) -> Vec<u8> {
    let (directory, durability) = (false, Durability::Visible);
    let push = Push {
        session,
        destination,
        into,
        sources,
        directory,
        durability,
        take: None,
        filter: None,
        origin: None,
    };
    push.to_bytes().to_vec()
}

pub(crate) fn pull_of(sources: &[&[&[u8]]], entries: u32) -> Vec<u8> {
    let sources = sources.iter().map(|s| components(s)).collect();
    Pull {
        session: [7; 16],
        sources,
        entries,
        entry_bytes: 1 << 20,
        limit: None,
        checksum: None,
        follow: None,
        filter: None,
        xattrs: None,
        owner: None,
        growing: None,
    }
    .to_bytes()
    .to_vec()
}

pub(crate) fn components(names: &[&[u8]]) -> Components {
    Components(names.iter().map(|n| n.to_vec()).collect())
}

/// The head of a stream of a session.
pub(crate) fn head(kind: u8, handle: u64) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    bytes.put_u8(kind);
    put_varint(&mut bytes, handle);
    bytes.to_vec()
}

pub(crate) fn entry(id: u64, path: &[&[u8]], kind: Kind) -> Entry {
    let size = (kind == Kind::File).then_some(5);
    let target = (kind == Kind::Symlink).then(|| b"somewhere".to_vec());
    Entry {
        id,
        path: components(path),
        kind,
        size,
        target,
        ..Entry::default()
    }
}

pub(crate) fn file(id: u64, name: &str, size: u64) -> Entry {
    Entry {
        size: Some(size),
        ..entry(id, &[name.as_bytes()], Kind::File)
    }
}

pub(crate) fn plan(id: u64, ranges: &[(u64, u64)]) -> Plan {
    let ranges = ranges
        .iter()
        .map(|&(offset, length)| Range { offset, length })
        .collect();
    Plan {
        id,
        encoding: 0,
        ranges,
        holes: None,
    }
}

pub(crate) fn with_holes(plan: Plan, holes: &[(u64, u64)]) -> Plan {
    let holes = holes
        .iter()
        .map(|&(offset, length)| Range { offset, length })
        .collect();
    Plan {
        holes: Some(holes),
        ..plan
    }
}

pub(crate) fn trailer(content: &[u8]) -> Vec<u8> {
    Trailer {
        digest: *blake3::hash(content).as_bytes(),
        size: None,
    }
    .to_bytes()
    .to_vec()
}

/// Bytes that look random and are the same in each run.
pub(crate) struct Noise(blake3::OutputReader);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(
            blake3::Hasher::new()
                .update(&seed.to_le_bytes())
                .finalize_xof(),
        )
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        (u64::from_le_bytes(bytes) % limit as u64) as usize
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.fill(&mut bytes);
        bytes
    }
}
