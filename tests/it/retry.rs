//! A push whose connection is lost in the middle: it continues over another one by itself, and its counts add up.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use crate::support::{Host, LIMIT, content, listing, own_port, recorder, to, write};
use haul::internal::net::stream::{lost_connection, varint_of};
use haul::{
    Admission, Anyone, Client, Code, Config, Error, Event, Identity, KeyId, LocalStore, Observer,
    Outcome, PushOptions, Result, Server, ServerOptions, ServerTrust, Settled, Store,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::{TempDir, tempdir};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, block_in_place};

/// The serving machine, with a `haul serve` that can be killed and restarted on the same port and directory.
struct Machine {
    home: TempDir,
    served: TempDir,
    port: u16,
    key_id: Option<KeyId>,
    child: Option<Child>,
}

impl Machine {
    fn new() -> Self {
        let mut machine = Self {
            home: private(),
            served: tempdir().unwrap(),
            port: own_port(),
            key_id: None,
            child: None,
        };
        machine.start(&["--anyone", "write"]);
        machine
    }

    fn start(&mut self, arguments: &[&str]) {
        // Another program may have the port for a moment.
        let (child, said) = std::iter::repeat_with(|| self.try_to_start(arguments))
            .flatten()
            .next()
            .unwrap();
        let word = |after: &str| {
            said.split(after)
                .nth(1)
                .unwrap()
                .split_whitespace()
                .next()
                .unwrap()
                .to_owned()
        };
        self.port = word("haul://")
            .trim_end_matches('/')
            .rsplit(':')
            .next()
            .unwrap()
            .parse()
            .unwrap();
        self.key_id = Some(word("key id ").parse().unwrap());
        self.child = Some(child);
    }

    fn try_to_start(&self, arguments: &[&str]) -> Option<(Child, String)> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
        command
            .arg("serve")
            .arg(self.served.path())
            .arg(format!("--listen=127.0.0.1:{}", self.port))
            .args(arguments);
        command
            .env("HAUL_HOME", self.home.path())
            .env_remove("HAUL_LOG")
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut said = String::new();
        while !said.contains("Ctrl-C") {
            if output.read_line(&mut said).unwrap() == 0 {
                child.wait().unwrap();
                return None;
            }
        }
        Some((child, said))
    }

    /// Ends the server as the system ends a process: no connection is closed.
    fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Ends the server as Ctrl-C twice: transfers under way are cut short, and connections are closed.
    fn stop(&mut self) {
        let mut child = self.child.take().unwrap();
        while child.try_wait().unwrap().is_none() {
            let _ = kill_process(Pid::from_child(&child), Signal::INT);
            std::thread::yield_now();
        }
    }

    fn trust(&self) -> ServerTrust {
        ServerTrust {
            pin: self.key_id,
            ..ServerTrust::default()
        }
    }

    async fn connect(&self, config: &Config) -> Client {
        let identity = Identity::generate().unwrap();
        Client::connect(&identity, &self.trust(), "127.0.0.1", self.port, config)
            .await
            .unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}

/// A new directory that others cannot read, as HAUL_HOME requires.
fn private() -> TempDir {
    let directory = tempdir().unwrap();
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o700)).unwrap();
    directory
}

/// Observes a push, and pauses it where a test needs to act.
#[derive(Default)]
struct Halt {
    events: Mutex<Vec<Event>>,
    reached: Notify,
}

/// Lets a paused push continue; so does dropping it.
type GoOn = mpsc::Sender<()>;

impl Halt {
    /// Makes an observer that pauses at each event for which `at` is true, until the test continues.
    fn when(
        at: impl Fn(&Event, &[Event]) -> bool + Send + Sync + 'static,
    ) -> (Arc<Self>, GoOn, Observer) {
        let halt = Arc::new(Self::default());
        let (go_on, wait) = mpsc::channel();
        let wait = Mutex::new(wait);
        let this = halt.clone();
        let observer: Observer = Arc::new(move |event| {
            block_in_place(|| {
                let halts = {
                    let mut events = this.events.lock().unwrap();
                    events.push(event.clone());
                    at(&event, &events)
                };
                if halts {
                    this.reached.notify_one();
                    // The test no longer answers once it has seen enough.
                    let _ = wait.lock().unwrap().recv();
                }
            });
        });
        (halt, go_on, observer)
    }

    async fn reached(&self) {
        tokio::time::timeout(LIMIT, self.reached.notified())
            .await
            .expect("it gets there");
    }

    fn count(&self, what: impl Fn(&Event) -> bool) -> usize {
        self.events
            .lock()
            .unwrap()
            .iter()
            .filter(|event| what(event))
            .count()
    }
}

fn moved(events: &[Event]) -> u64 {
    events
        .iter()
        .map(|event| {
            if let Event::Moved { bytes, .. } = event {
                *bytes
            } else {
                0
            }
        })
        .sum()
}

fn is_lost(event: &Event) -> bool {
    matches!(event, Event::Lost { .. })
}

fn is_reconnected(event: &Event) -> bool {
    matches!(event, Event::Reconnected { .. })
}

/// Whether this much has been given to the connection while the file is not at its end.
fn in_the_middle(event: &Event, events: &[Event]) -> bool {
    const MIDDLE: u64 = 24 << 20;
    let Event::Moved { bytes, .. } = event else {
        return false;
    };
    let now = moved(events);
    now >= MIDDLE && now - bytes < MIDDLE
}

fn pushing(
    client: Client,
    options: PushOptions,
    observer: Observer,
) -> JoinHandle<Result<Outcome>> {
    tokio::spawn(async move { client.push(&options, observer).await })
}

async fn ended(pushing: JoinHandle<Result<Outcome>>) -> Result<Outcome> {
    tokio::time::timeout(LIMIT, pushing)
        .await
        .expect("it ends")
        .unwrap()
}

/// Waits until the server's disk has some of the file in transfer.
async fn some_is_on_the_disk(machine: &Machine) {
    let some = || {
        std::fs::read_dir(machine.served.path())
            .unwrap()
            .flatten()
            .any(|entry| {
                use std::os::unix::fs::MetadataExt;
                entry
                    .metadata()
                    .is_ok_and(|metadata| metadata.blocks() * 512 >= 8 << 20)
            })
    };
    tokio::time::timeout(LIMIT, async {
        while !some() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("what is sent reaches the disk");
}

fn big(source: &Path) -> std::path::PathBuf {
    let big = source.join("big");
    write(&big, &content(1, 64 << 20));
    big
}

/// Returns what the push reported of the loss.
async fn a_large_file_goes_on(abruptly: bool) -> String {
    let (source, mut machine) = (tempdir().unwrap(), Machine::new());
    let big = big(source.path());
    let (halt, go_on, observer) = Halt::when(in_the_middle);
    let pushing = pushing(
        machine.connect(&Config::default()).await,
        to(&[&big], "big"),
        observer,
    );
    halt.reached().await;
    some_is_on_the_disk(&machine).await;
    if abruptly {
        machine.kill();
    } else {
        machine.stop();
    }
    machine.start(&["--anyone", "write"]);
    drop(go_on);
    let outcome = ended(pushing).await.unwrap();

    assert_eq!(
        (outcome.sent.entries, outcome.sent.files, outcome.sent.bytes),
        (1, 1, 64 << 20)
    );
    assert_eq!(
        (outcome.sent.skipped, outcome.sent.failed),
        (0, 0),
        "{:?}",
        outcome.sent.failures
    );
    assert!(outcome.sent.interrupted.is_none());
    assert_eq!(
        std::fs::read(machine.served.path().join("big")).unwrap(),
        std::fs::read(&big).unwrap()
    );
    assert_eq!(
        listing(machine.served.path()).len(),
        1,
        "no partial is left"
    );
    let events = halt.events.lock().unwrap();
    let held: Vec<_> = events
        .iter()
        .filter_map(|event| {
            if let Event::Started { id, held, .. } = event {
                Some((*id, *held))
            } else {
                None
            }
        })
        .collect();
    assert_eq!(held[0], (0, 0));
    assert!(
        held.len() >= 2 && held.iter().all(|(id, _)| *id == 0),
        "the same entry: {held:?}"
    );
    assert!(
        held.last().unwrap().1 > 0,
        "it goes on where it was: {held:?}"
    );
    let found: Vec<_> = events
        .iter()
        .filter(|e| matches!(e, Event::Found { files: 2.., .. }))
        .collect();
    assert!(found.is_empty(), "found once: {found:?}");
    assert_eq!(
        events
            .iter()
            .filter(|e| matches!(e, Event::Settled { .. }))
            .count(),
        1
    );
    assert_eq!(
        events
            .iter()
            .filter(|e| matches!(e, Event::Connected { .. }))
            .count(),
        1
    );
    said_of_the_loss(&events)
}

fn said_of_the_loss(events: &[Event]) -> String {
    let said = events.iter().find_map(|event| {
        if let Event::Lost { reason: why, .. } = event {
            Some(why.clone())
        } else {
            None
        }
    });
    said.expect("it was lost").to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_restarted_server_is_not_sent_what_it_already_holds() {
    assert_eq!(a_large_file_goes_on(false).await, "the server is stopping");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_killed_and_restarted_server_sends_a_stateless_reset() {
    // Nothing else would show it before the idle timeout.
    assert_eq!(a_large_file_goes_on(true).await, "the peer has restarted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_vanished_server_is_detected_before_the_idle_timeout() {
    let (source, mut machine) = (tempdir().unwrap(), Machine::new());
    let big = big(source.path());
    let config = Config {
        keep_alive: Duration::from_millis(200),
        idle_timeout: Duration::from_secs(3600),
        ..Config::default()
    };
    let (halt, go_on, observer) =
        Halt::when(|event, events| is_lost(event) || in_the_middle(event, events));
    let pushing = pushing(machine.connect(&config).await, to(&[&big], "big"), observer);
    halt.reached().await;
    some_is_on_the_disk(&machine).await;
    machine.kill();
    go_on.send(()).unwrap();
    halt.reached().await;
    assert_eq!(
        said_of_the_loss(&halt.events.lock().unwrap()),
        "no process has the server's port any more"
    );
    machine.start(&["--anyone", "write"]);
    drop(go_on);
    let outcome = ended(pushing).await.unwrap();
    assert_eq!(
        (outcome.sent.files, outcome.sent.failed),
        (1, 0),
        "{:?}",
        outcome.sent.failures
    );
    assert_eq!(
        std::fs::read(machine.served.path().join("big")).unwrap(),
        std::fs::read(&big).unwrap()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_small_files_and_several_restarts_add_up() {
    const FILES: usize = 600;
    let (source, mut machine) = (tempdir().unwrap(), Machine::new());
    let tree = source.path().join("t");
    let mut bytes = 0;
    for i in 0..FILES {
        let size = 1 + i * 97 % 30_000;
        bytes += size as u64;
        write(
            &tree.join(format!("{}/{i}", i % 7)),
            &content(i as u64, size),
        );
    }
    // It existed before, so it is skipped; it counts once, however often it is requested.
    write(&machine.served.path().join("t/0/0"), &content(0, 1));
    let time = tree.join("0/0").metadata().unwrap().modified().unwrap();
    std::fs::File::open(machine.served.path().join("t/0/0"))
        .unwrap()
        .set_modified(time)
        .unwrap();
    // It cannot be sent at all, and fails once.
    let missing = source.path().join("missing");

    let settled = |events: &[Event]| {
        events
            .iter()
            .filter(|e| matches!(e, Event::Settled { .. }))
            .count()
    };
    let (halt, go_on, observer) = Halt::when(move |event, events| {
        matches!(event, Event::Settled { .. })
            && settled(events) % 150 == 0
            && settled(events) < 600
    });
    let client = machine
        .connect(&Config {
            parallel: 16,
            ..Config::default()
        })
        .await;
    let pushing = pushing(client, to(&[&tree, &missing], ""), observer);
    for restart in 0..3 {
        halt.reached().await;
        if restart % 2 == 0 {
            machine.kill();
        } else {
            machine.stop();
        }
        machine.start(&["--anyone", "write"]);
        go_on.send(()).unwrap();
    }
    let outcome = ended(pushing).await.unwrap();
    let sent = &outcome.sent;
    assert_eq!((sent.skipped, sent.failed), (1, 1), "{:?}", sent.failures);
    assert_eq!((sent.files, sent.bytes), (FILES as u64 - 1, bytes - 1));
    assert!(halt.count(is_reconnected) >= 1);
    let mut seen: Vec<_> = halt
        .events
        .lock()
        .unwrap()
        .iter()
        .filter_map(|event| {
            if let Event::Settled { path, .. } = event {
                Some(path.to_string())
            } else {
                None
            }
        })
        .collect();
    // Files, seven directories and their parent, and the missing source.
    assert_eq!(seen.len(), FILES + 8 + 1);
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), FILES + 8 + 1, "each is settled once");
    assert_eq!(listing(&machine.served.path().join("t")), listing(&tree));
}

/// A store on whose commits a test waits.
mod gate {
    use std::ops::Range;

    use haul::Durability;
    use haul::Reason;
    use haul::RelativePath;
    use haul::{Attributes, Metadata, MetadataWarnings, PartialKey, Source, Upload};

    use super::*;

    pub(crate) struct Gate {
        pub(crate) store: LocalStore,
        pub(crate) committed: Arc<Notify>,
        pub(crate) go_on: Arc<Mutex<mpsc::Receiver<()>>>,
    }

    struct Gated(Box<dyn Upload>, Arc<Notify>, Arc<Mutex<mpsc::Receiver<()>>>);

    impl Store for Gate {
        fn stat(&self, path: &RelativePath) -> Result<Option<Metadata>, Reason> {
            self.store.stat(path)
        }
        fn names(&self, directory: &RelativePath) -> Result<Vec<Vec<u8>>, Reason> {
            self.store.names(directory)
        }
        fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Reason> {
            self.store.read_link(path)
        }
        fn open(&self, path: &RelativePath) -> Result<Box<dyn Source>, Reason> {
            self.store.open(path)
        }
        fn create(
            &self,
            path: &RelativePath,
            claim: &PartialKey,
        ) -> Result<Box<dyn Upload>, Reason> {
            Ok(Box::new(Gated(
                self.store.create(path, claim)?,
                self.committed.clone(),
                self.go_on.clone(),
            )))
        }
        fn make_directory(&self, path: &RelativePath) -> Result<(), Reason> {
            self.store.make_directory(path)
        }
        fn set_attributes(
            &self,
            path: &RelativePath,
            attributes: &Attributes,
        ) -> Result<MetadataWarnings, Reason> {
            self.store.set_attributes(path, attributes)
        }
        fn make_symlink(
            &self,
            path: &RelativePath,
            target: &[u8],
            attributes: &Attributes,
        ) -> Result<MetadataWarnings, Reason> {
            self.store.make_symlink(path, target, attributes)
        }
        fn link(&self, existing: &RelativePath, new: &RelativePath) -> Result<(), Reason> {
            self.store.link(existing, new)
        }
        fn remove(&self, path: &RelativePath) -> Result<(), Reason> {
            self.store.remove(path)
        }
        fn sync(&self) -> Result<(), Reason> {
            self.store.sync()
        }
        fn sweep(&self, age: Duration) -> Result<u64, Reason> {
            self.store.sweep(age)
        }
    }

    impl Upload for Gated {
        fn held(&self) -> std::io::Result<Vec<Range<u64>>> {
            self.0.held()
        }
        fn write_at(&mut self, data: &[u8], offset: u64) -> std::io::Result<()> {
            self.0.write_at(data, offset)
        }
        fn make_hole(&mut self, part: Range<u64>) -> std::io::Result<()> {
            self.0.make_hole(part)
        }
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
            self.0.read_at(buffer, offset)
        }
        fn commit(
            self: Box<Self>,
            attributes: &Attributes,
            durability: Durability,
        ) -> Result<MetadataWarnings, Reason> {
            let Self(upload, committed, go_on) = *self;
            let lapses = upload.commit(attributes, durability)?;
            committed.notify_one();
            let _ = go_on.lock().unwrap().recv();
            Ok(lapses)
        }
        fn discard(self: Box<Self>) {
            self.0.discard();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_file_whose_receipt_is_lost_counts_as_committed() {
    for size in [10_000, 3_000_000] {
        let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
        let (committed, (go_on, wait)) = (Arc::new(Notify::new()), mpsc::channel());
        let store = LocalStore::open(served.path()).unwrap();
        let store = gate::Gate {
            store,
            committed: committed.clone(),
            go_on: Arc::new(Mutex::new(wait)),
        };
        let identity = Identity::generate().unwrap();
        let serve = |port, store: Arc<dyn Store>| {
            let admission = Admission {
                anyone: Anyone {
                    read: false,
                    write: true,
                },
                ..Admission::default()
            };
            let listen = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, port))];
            let (config, observer) = (Config::default(), haul::ignore());
            Server::bind(ServerOptions {
                listen,
                identity: identity.clone(),
                admission,
                store,
                config,
                observer,
            })
        };
        let server = serve(own_port(), Arc::new(store)).unwrap();
        let port = server.local_addresses()[0].port();
        let running = tokio::spawn(server.run(std::future::pending(), std::future::pending()));
        let trust = ServerTrust {
            pin: Some(identity.key_id()),
            ..ServerTrust::default()
        };
        let own = Identity::generate().unwrap();
        let client = Client::connect(&own, &trust, "127.0.0.1", port, &Config::default())
            .await
            .unwrap();
        let file = source.path().join("f");
        write(&file, &content(1, size));
        let (observer, events) = recorder();
        let pushing = pushing(client, to(&[&file], "f"), observer);
        tokio::time::timeout(LIMIT, committed.notified())
            .await
            .expect("it is committed");
        // The file has its final name, and the connection ends before the receipt can be sent.
        running.abort();
        assert!(running.await.unwrap_err().is_cancelled());
        drop(go_on);
        let anew = tokio::time::timeout(LIMIT, async {
            loop {
                match serve(port, Arc::new(LocalStore::open(served.path()).unwrap())) {
                    Ok(server) => return server,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        });
        let anew = anew.await.expect("the port is free again");
        let anew = tokio::spawn(anew.run(std::future::pending(), std::future::pending()));
        let sent = ended(pushing).await.unwrap().sent;
        anew.abort();
        assert_eq!(
            (sent.files, sent.bytes, sent.skipped, sent.failed),
            (1, size as u64, 0, 0),
            "{:?}",
            sent.failures
        );
        let events = events.lock().unwrap();
        assert_eq!(events.iter().filter(|e| is_lost(e)).count(), 1);
        let settled: Vec<_> = events
            .iter()
            .filter_map(|event| {
                if let Event::Settled { result, .. } = event {
                    Some(result.clone())
                } else {
                    None
                }
            })
            .collect();
        assert_eq!(settled, [Settled::Committed]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn when_retrying_ends_the_loss_is_reported_and_partials_stay() {
    let (source, mut machine) = (tempdir().unwrap(), Machine::new());
    let big = big(source.path());
    let (halt, go_on, observer) = Halt::when(in_the_middle);
    let (seconds, moment) = (Duration::from_secs(2), Duration::from_millis(500));
    let config = Config {
        retry_for: seconds,
        first_reply: moment,
        ..Config::default()
    };
    let pushing = pushing(machine.connect(&config).await, to(&[&big], "big"), observer);
    halt.reached().await;
    some_is_on_the_disk(&machine).await;
    machine.stop();
    // No other socket gets the port and answers.
    let _silent = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, machine.port));
    drop(go_on);
    let error = ended(pushing).await.unwrap_err();
    let said = error.to_string();
    assert!(matches!(error, Error::Lost(_)), "{error:?}");
    for part in [
        "connection was lost",
        "the server is stopping",
        "cannot reconnect within 2 s",
        "haul serve",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(halt.count(|event| matches!(event, Event::Reconnecting { .. })) >= 1);
    assert_eq!(halt.count(is_lost), 1);
    assert_eq!(halt.count(is_reconnected), 0);
    assert_eq!(listing(machine.served.path()).len(), 1, "the partial");
    assert!(!machine.served.path().join("big").exists());
}

/// Runs a push that loses its server in the middle; another server takes its place. Returns the error and the observer.
async fn comes_back_as(
    config: Config,
    anyone: &[&str],
    change: impl FnOnce(&mut Machine),
) -> (Error, Arc<Halt>) {
    let (source, mut machine) = (tempdir().unwrap(), Machine::new());
    let big = big(source.path());
    let (halt, go_on, observer) = Halt::when(in_the_middle);
    let pushing = pushing(machine.connect(&config).await, to(&[&big], "big"), observer);
    halt.reached().await;
    machine.stop();
    change(&mut machine);
    machine.start(anyone);
    drop(go_on);
    (ended(pushing).await.unwrap_err(), halt)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn without_retries_a_loss_is_reported_at_once() {
    let config = Config {
        retry_for: Duration::ZERO,
        ..Config::default()
    };
    let (error, halt) = comes_back_as(config, &["--anyone", "write"], |_| {}).await;
    assert!(matches!(error, Error::Stopping), "{error:?}");
    assert_eq!(
        halt.count(|e| is_lost(e) || matches!(e, Event::Reconnecting { .. })),
        0
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_no_longer_admits_the_key_ends_the_push() {
    let (error, halt) = comes_back_as(Config::default(), &[], |_| {}).await;
    assert!(matches!(error, Error::NotAdmitted(_)), "{error:?}");
    assert_eq!(halt.count(is_reconnected), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn another_server_at_the_same_address_gets_nothing() {
    let change = |machine: &mut Machine| machine.home = private();
    let (error, halt) = comes_back_as(Config::default(), &["--anyone", "write"], change).await;
    assert!(matches!(error, Error::WrongPin { .. }), "{error:?}");
    assert_eq!(halt.count(is_reconnected), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_first_connection_is_not_retried() {
    let (source, mut machine) = (tempdir().unwrap(), Machine::new());
    write(&source.path().join("f"), b"f");
    let client = machine.connect(&Config::default()).await;
    machine.stop();
    client.connection().closed().await;
    let (observer, events) = recorder();
    let ended = ended(pushing(
        client,
        to(&[&source.path().join("f")], "f"),
        observer,
    ))
    .await;
    assert!(matches!(ended, Err(Error::Stopping)), "{ended:?}");
    assert!(!events.lock().unwrap().iter().any(is_lost));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_client_that_connects_during_a_stop_gets_the_reason() {
    for _ in 0..24 {
        let directory = tempdir().unwrap();
        let mut host = Host::directory(directory.path());
        let client = host.connect().await.unwrap();
        host.stop();
        let why = tokio::time::timeout(LIMIT, client.connection().closed())
            .await
            .expect("it says goodbye");
        // quinn forgets a close that it has just read if a stateless reset follows at once.
        assert!(
            matches!(lost_connection(&why), Error::Stopping)
                || why == quinn::ConnectionError::Reset,
            "{why:?}"
        );
        host.stopped().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_client_returns_to_a_server_that_stopped_before_answering() {
    let (source, identity) = (tempdir().unwrap(), Identity::generate().unwrap());
    write(&source.path().join("f"), b"f");
    let config =
        haul::internal::net::endpoint::server_config(&identity, &Config::default()).unwrap();
    let server = haul::internal::net::endpoint::bind(
        SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        Some(config),
    )
    .unwrap();
    let port = server.local_addr().unwrap().port();
    let trust = ServerTrust {
        pin: Some(identity.key_id()),
        ..ServerTrust::default()
    };
    let (observer, events) = recorder();
    let pushing = tokio::spawn(async move {
        let client =
            Client::connect(&identity, &trust, "127.0.0.1", port, &Config::default()).await?;
        client
            .push(&to(&[&source.path().join("f")], "f"), observer)
            .await
    });
    let asked = async || {
        let connection = server.accept().await.unwrap().await.unwrap();
        let request = connection.accept_bi().await.unwrap();
        (connection, request)
    };
    let (connection, _request) = tokio::time::timeout(LIMIT, asked()).await.unwrap();
    connection.close(varint_of(Code::Stopping), b"the server is stopping");
    let _again = tokio::time::timeout(LIMIT, asked())
        .await
        .expect("it comes back");
    assert_eq!(
        events
            .lock()
            .unwrap()
            .iter()
            .filter(|event| is_lost(event))
            .count(),
        1
    );
    pushing.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn dropping_a_push_that_waits_to_reconnect_ends_it() {
    let (source, mut machine) = (tempdir().unwrap(), Machine::new());
    let big = big(source.path());
    let (halt, go_on, observer) = Halt::when(|event, events| match event {
        Event::Reconnecting { .. } => true,
        _ => in_the_middle(event, events),
    });
    let alive = Arc::downgrade(&halt);
    let pushing = pushing(
        machine.connect(&Config::default()).await,
        to(&[&big], "big"),
        observer,
    );
    halt.reached().await;
    machine.stop();
    go_on.send(()).unwrap();
    halt.reached().await;
    pushing.abort();
    drop((go_on, halt));
    assert!(pushing.await.unwrap_err().is_cancelled());
    // Every task that could still send holds the observer.
    let gone = async {
        while alive.strong_count() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, gone)
        .await
        .expect("nothing of it goes on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_new_client_port_costs_no_reconnect() {
    let (source, machine) = (tempdir().unwrap(), Machine::new());
    let big = big(source.path());
    let (halt, go_on, observer) = Halt::when(|event, events| {
        matches!(event, Event::Moved { .. })
            && [8, 24, 40].iter().any(|mib| moved(events) == mib << 20)
    });
    let client = Arc::new(machine.connect(&Config::default()).await);
    let options = to(&[&big], "big");
    let pushing = {
        let client = client.clone();
        tokio::spawn(async move { client.push(&options, observer).await })
    };
    for _ in 0..3 {
        halt.reached().await;
        client.rebind().unwrap();
        go_on.send(()).unwrap();
    }
    let outcome = ended(pushing).await.unwrap();
    assert_eq!(
        (outcome.sent.files, outcome.sent.failed),
        (1, 0),
        "{:?}",
        outcome.sent.failures
    );
    assert_eq!(halt.count(is_lost), 0);
    assert_eq!(
        std::fs::read(machine.served.path().join("big")).unwrap(),
        std::fs::read(&big).unwrap()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn hard_links_survive_a_reconnect() {
    use std::os::unix::fs::MetadataExt;
    let (source, mut machine) = (tempdir().unwrap(), Machine::new());
    let tree = source.path().join("t");
    write(&tree.join("first"), &content(1, 400_000));
    for name in ["second", "then/third"] {
        std::fs::create_dir_all(tree.join("then")).unwrap();
        std::fs::hard_link(tree.join("first"), tree.join(name)).unwrap();
    }
    // The first is committed, and the others are not announced before it is settled.
    let first = |event: &Event| {
        matches!(
            event,
            Event::Settled {
                result: Settled::Committed,
                ..
            }
        )
    };
    let (halt, go_on, observer) = Halt::when(move |event, events| {
        first(event) && events.iter().filter(|e| first(e)).count() == 1
    });
    let pushing = pushing(
        machine.connect(&Config::default()).await,
        to(&[&tree], "t"),
        observer,
    );
    halt.reached().await;
    machine.kill();
    machine.start(&["--anyone", "write"]);
    drop(go_on);
    let outcome = ended(pushing).await.unwrap();
    assert_eq!(halt.count(is_reconnected), 1);
    assert_eq!(
        (outcome.sent.files, outcome.sent.bytes, outcome.sent.failed),
        (3, 400_000, 0)
    );
    assert_eq!(
        outcome.sent.skipped, 0,
        "what is announced once more does not count twice"
    );
    let arrived = machine.served.path().join("t");
    assert_eq!(listing(&arrived), listing(&tree));
    let inode = |name: &str| std::fs::metadata(arrived.join(name)).unwrap().ino();
    assert_eq!(
        (inode("first"), inode("first")),
        (inode("second"), inode("then/third"))
    );
}

/// Fetches a tree from a server that is killed and restarted in the middle. Returns the counts and the events.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pull_resumes_as_a_push_does() {
    let (here, mut machine) = (tempdir().unwrap(), Machine::new());
    machine.stop();
    let tree = machine.served.path().join("t");
    let mut bytes = 64 << 20;
    write(&tree.join("big"), &content(1, 64 << 20));
    for i in 0..200 {
        bytes += i * 100;
        write(
            &tree.join(format!("d{}/{i}", i % 7)),
            &content(i, i as usize * 100),
        );
    }
    // It existed before, so it is skipped, once.
    let (there, unchanged) = (tree.join("d1/1"), here.path().join("t/d1/1"));
    write(&unchanged, &content(1, 100));
    std::fs::File::open(&unchanged)
        .unwrap()
        .set_modified(there.metadata().unwrap().modified().unwrap())
        .unwrap();
    machine.start(&["--anyone", "read"]);

    let (halt, go_on, observer) = Halt::when(in_the_middle);
    let client = machine.connect(&Config::default()).await;
    let options = crate::support::from(&["t", "missing"], here.path());
    let pulling = tokio::spawn(async move { client.pull(&options, observer).await });
    halt.reached().await;
    machine.kill();
    machine.start(&["--anyone", "read"]);
    drop(go_on);
    let outcome = ended(pulling).await.unwrap();

    assert_eq!(listing(&here.path().join("t")), listing(&tree));
    assert!(halt.count(is_lost) >= 1 && halt.count(is_reconnected) >= 1);
    let sent = &outcome.sent;
    assert_eq!(
        (sent.files, sent.bytes, sent.skipped, sent.failed),
        (200, bytes - 100, 1, 1),
        "{sent:?}"
    );
    let is_file = |e: &Event| {
        matches!(
            e,
            Event::Settled {
                kind: haul::Kind::File,
                ..
            }
        )
    };
    assert_eq!(halt.count(is_file), 202, "each file is told once");
    let events = halt.events.lock().unwrap();
    assert!(
        moved(&events) < bytes * 5 / 4,
        "what was there did not travel again: {}",
        moved(&events)
    );
    let last = events.iter().rev().find_map(|e| match e {
        Event::Found {
            files,
            bytes,
            complete,
        } => Some((*files, *bytes, *complete)),
        _ => None,
    });
    assert_eq!(last, Some((201, bytes, true)));
}
