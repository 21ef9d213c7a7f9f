//! What the integration tests share: a server and clients over real sockets on loopback, and trees to send.

pub(crate) mod command;
pub(crate) mod link;
pub(crate) mod netns;
pub(crate) mod path;
pub(crate) mod slow;

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use haul::{
    Admission, Anyone, Client, Config, Durability, Event, Identity, KeyId, LocalStore, Observer,
    Outcome, PullOptions, PushOptions, RelativePath, Result, Server, ServerOptions, ServerTrust,
    Store,
};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// No step of a test takes this long on any machine; a test that waits longer has failed.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// The lowest port that [`own_port`] returns. Many services have the ports below.
const LOWEST_OWN_PORT: u16 = 10_000;

/// A free UDP port that the system gives to no other socket on its own, since it is below the ports that it chooses for
/// port 0. A server that stops and starts again there needs one, and so does a test that nothing listens: the system
/// soon gives a free port of its own range to another test.
pub(crate) fn own_port() -> u16 {
    static USED: AtomicU16 = AtomicU16::new(0);
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let first_of_system = range
        .ok()
        .and_then(|range| range.split_whitespace().next()?.parse().ok())
        .unwrap_or(32_768)
        .max(LOWEST_OWN_PORT + 1);
    let count = u32::from(first_of_system - LOWEST_OWN_PORT);
    // Processes that run at the same time begin at different ports.
    let start = std::process::id().wrapping_mul(977) % count;
    std::iter::repeat_with(|| USED.fetch_add(1, Ordering::Relaxed))
        .take(count as usize)
        .map(|used| LOWEST_OWN_PORT + ((start + u32::from(used)) % count) as u16)
        .find(|&port| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok())
        .expect("a port is free")
}

/// A server on a free loopback port that admits every key.
pub(crate) struct Host {
    pub address: SocketAddr,
    pub key_id: KeyId,
    stop: Option<oneshot::Sender<()>>,
    now: Option<oneshot::Sender<()>>,
    pub running: Option<JoinHandle<()>>,
}

impl Host {
    pub(crate) fn serving(store: Arc<dyn Store>, config: Config) -> Self {
        Self::observed(store, config, haul::ignore())
    }

    pub(crate) fn observed(store: Arc<dyn Store>, config: Config, observer: Observer) -> Self {
        let identity = Identity::generate().unwrap();
        let key_id = identity.key_id();
        let admission = Admission {
            anyone: Anyone {
                read: true,
                write: true,
            },
            ..Admission::default()
        };
        let listen = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))];
        let server = Server::bind(ServerOptions {
            listen,
            identity,
            admission,
            store,
            config,
            observer,
        })
        .unwrap();
        let address = server.local_addresses()[0];
        let ((stop, stopped), (now, at_once)) =
            (oneshot::channel::<()>(), oneshot::channel::<()>());
        let run = server.run(async { drop(stopped.await) }, async { drop(at_once.await) });
        Self {
            address,
            key_id,
            stop: Some(stop),
            now: Some(now),
            running: Some(tokio::spawn(run)),
        }
    }

    pub(crate) fn directory(path: &Path) -> Self {
        Self::serving(Arc::new(LocalStore::open(path).unwrap()), Config::default())
    }

    /// Stops it as the first Ctrl-C does.
    pub(crate) fn stop(&mut self) {
        self.stop = None;
    }

    /// Stops it as the second Ctrl-C does.
    pub(crate) fn stop_now(&mut self) {
        self.now = None;
    }

    pub(crate) async fn stopped(&mut self) {
        tokio::time::timeout(LIMIT, self.running.take().unwrap())
            .await
            .expect("it stops")
            .unwrap();
    }

    pub(crate) async fn connect(&self) -> Result<Client> {
        self.connect_as(&Identity::generate()?, &Config::default())
            .await
    }

    /// A client that does not retry when the connection is lost.
    pub(crate) async fn connect_once(&self) -> Result<Client> {
        let config = Config {
            retry_for: Duration::ZERO,
            ..Config::default()
        };
        self.connect_as(&Identity::generate()?, &config).await
    }

    pub(crate) async fn connect_as(&self, identity: &Identity, config: &Config) -> Result<Client> {
        let trust = ServerTrust {
            pin: Some(self.key_id),
            ..ServerTrust::default()
        };
        Client::connect(identity, &trust, "127.0.0.1", self.address.port(), config).await
    }
}

/// Options of a push such as `haul cp SOURCE... haul://HOST/DESTINATION`.
pub(crate) fn to(sources: &[&Path], destination: &str) -> PushOptions {
    PushOptions {
        sources: sources.iter().map(|s| s.to_path_buf()).collect(),
        destination: path(destination),
        into: destination.is_empty() || destination.ends_with('/'),
        durability: Durability::Visible,
        ..PushOptions::default()
    }
}

/// Options of a pull such as `haul cp haul://HOST/SOURCE... DESTINATION`.
pub(crate) fn from(sources: &[&str], destination: &Path) -> PullOptions {
    PullOptions {
        sources: sources.iter().map(|source| path(source)).collect(),
        destination: destination.to_path_buf(),
        into: destination.as_os_str().as_encoded_bytes().ends_with(b"/"),
        durability: Durability::Visible,
        ..PullOptions::default()
    }
}

/// Pulls over a connection of its own.
pub(crate) async fn pull(host: &Host, options: &PullOptions) -> Result<Outcome> {
    let client = host.connect().await?;
    let outcome = tokio::time::timeout(LIMIT, client.pull(options, haul::ignore()))
        .await
        .expect("it ends");
    client.close().await;
    outcome
}

/// Pushes over a connection of its own.
pub(crate) async fn push(host: &Host, options: &PushOptions) -> Result<Outcome> {
    let client = host.connect().await?;
    let outcome = tokio::time::timeout(LIMIT, client.push(options, haul::ignore()))
        .await
        .expect("it ends");
    client.close().await;
    outcome
}

pub(crate) fn path(path: &str) -> RelativePath {
    RelativePath::from_components(path.split('/').filter(|c| !c.is_empty())).unwrap()
}

/// An observer that keeps every event, and the events so far.
pub(crate) fn recorder() -> (Observer, Arc<Mutex<Vec<Event>>>) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let kept = events.clone();
    (
        Arc::new(move |event| kept.lock().unwrap().push(event)),
        events,
    )
}

/// Content that differs between files and between blocks.
pub(crate) fn content(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

/// Writes a file, and makes its directories.
pub(crate) fn write(path: &Path, content: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

/// Every path below a directory with its kind, mode, time and content. Partials would appear here.
pub(crate) fn listing(root: &Path) -> Vec<String> {
    let mut all = Vec::new();
    list_into(root, root, &mut all);
    all.sort();
    all
}

fn list_into(root: &Path, directory: &Path, all: &mut Vec<String>) {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let metadata = path.symlink_metadata().unwrap();
        let name = path.strip_prefix(root).unwrap().to_path_buf();
        let (mode, time) = (
            metadata.permissions().mode() & 0o777,
            (metadata.mtime(), metadata.mtime_nsec()),
        );
        let line = match () {
            () if metadata.is_dir() => {
                list_into(root, &path, all);
                format!("{name:?} directory {mode:o} {time:?}")
            }
            () if metadata.is_symlink() => {
                format!("{name:?} link {:?}", std::fs::read_link(&path).unwrap())
            }
            () if metadata.is_file() => {
                format!(
                    "{name:?} file {mode:o} {time:?} {}",
                    blake3::hash(&std::fs::read(&path).unwrap())
                )
            }
            () => format!("{name:?} special"),
        };
        all.push(line);
    }
}
