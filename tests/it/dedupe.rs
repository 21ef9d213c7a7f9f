//! Content that the receiver already has: a large renamed file is not sent again, and no peer learns more from that
//! than it may read.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::support::{LIMIT, content, listing, recorder, to, write};
use haul::internal::storage::digest_index::LARGE_FILE;
use haul::{
    Admission, Anyone, Client, Code, Config, Error, Event, Identity, Index, LocalStore,
    PushOptions, ReceiveOptions, Server, ServerOptions, ServerTrust, Store,
};
use tempfile::{TempDir, tempdir};

const SIZE: usize = LARGE_FILE as usize;

/// A server and a client, each with an index of its own.
struct Pair {
    from: TempDir,
    served: TempDir,
    home: TempDir,
    client: Client,
    /// Those of the server and of the client.
    indexes: [Index; 2],
}

impl Pair {
    async fn new() -> Self {
        Self::with(
            tempdir().unwrap(),
            Anyone {
                read: true,
                write: true,
            },
            true,
        )
        .await
    }

    async fn with(home: TempDir, anyone: Anyone, server_has_index: bool) -> Self {
        let (from, served) = (tempdir().unwrap(), tempdir().unwrap());
        let indexes = ["server", "client"].map(|name| Index::new(home.path().join(name)));
        let config = |index: &Index, has: bool| {
            let index = has.then(|| index.clone());
            Config {
                index,
                retry_for: Duration::ZERO,
                ..Config::default()
            }
        };
        let identity = Identity::generate().unwrap();
        let trust = ServerTrust {
            pin: Some(identity.key_id()),
            ..ServerTrust::default()
        };
        let server = Server::bind(ServerOptions {
            listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))],
            identity,
            admission: Admission {
                anyone,
                ..Admission::default()
            },
            store: Arc::new(LocalStore::open(served.path()).unwrap()),
            config: config(&indexes[0], server_has_index),
            observer: haul::ignore(),
        })
        .unwrap();
        let port = server.local_addresses()[0].port();
        tokio::spawn(server.run(std::future::pending(), std::future::pending()));
        let config = config(&indexes[1], true);
        let identity = Identity::generate().unwrap();
        let client = Client::connect(&identity, &trust, "127.0.0.1", port, &config)
            .await
            .unwrap();
        Self {
            from,
            served,
            home,
            client,
            indexes,
        }
    }

    /// A large file in the source, last modified some time ago.
    fn write(&self, name: &str, seed: u64) {
        let path = self.from.path().join("src").join(name);
        write(&path, &content(seed, SIZE));
        age(&path);
    }

    fn rename(&self, old: &str, new: &str) {
        let source = self.from.path().join("src");
        std::fs::rename(source.join(old), source.join(new)).unwrap();
    }

    /// Pushes the source, which must succeed. Returns the names of the files whose content was sent.
    async fn push_with(&self, options: PushOptions) -> Vec<String> {
        let (observer, events) = recorder();
        let outcome = tokio::time::timeout(LIMIT, self.client.push(&options, observer))
            .await
            .expect("it ends")
            .unwrap();
        assert_eq!(outcome.sent.failed, 0, "{:?}", outcome.sent.failures);
        let events = events.lock().unwrap();
        let started = events.iter().filter_map(|event| match event {
            Event::Started { path, .. } => Some(path.to_string()),
            _ => None,
        });
        started.collect()
    }

    async fn push(&self) -> Vec<String> {
        let started = self
            .push_with(to(&[&self.from.path().join("src")], "src"))
            .await;
        // Nothing is removed at the destination: it must have everything that is here.
        let there = listing(&self.served.path().join("src"));
        for line in listing(&self.from.path().join("src")) {
            assert!(there.contains(&line), "{line}\n{there:#?}");
        }
        started
    }
}

fn age(path: &Path) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(3600))
        .unwrap();
    settle(&file);
}

/// Waits until the clock is past a file's last change, so that another change would be visible.
fn settle(file: &std::fs::File) {
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let metadata = file.metadata().unwrap();
    let changed = Duration::new(metadata.ctime() as u64, metadata.ctime_nsec() as u32);
    while now().unwrap() < changed + Duration::from_millis(20) {
        std::thread::yield_now();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renamed_file_is_made_from_existing_content() {
    let pair = Pair::new().await;
    pair.write("a", 1);
    assert_eq!(pair.push().await, ["src/a"]);
    pair.rename("a", "b");
    assert_eq!(pair.push().await, [""; 0]);
    // Repeats it for the copy as well as for the first file.
    std::fs::remove_file(pair.served.path().join("src/a")).unwrap();
    pair.rename("b", "c");
    assert_eq!(pair.push().await, [""; 0]);
    assert_eq!(listing(&pair.served.path().join("src")).len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_changed_behind_the_index_is_detected_by_content() {
    let pair = Pair::new().await;
    pair.write("a", 1);
    pair.push().await;
    // A file of the same size and time, in the same place.
    let there = pair.served.path().join("src/a");
    let time = there.metadata().unwrap().modified().unwrap();
    let file = std::fs::File::options().write(true).open(&there).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", SIZE as u64 / 2).unwrap();
    file.set_modified(time).unwrap();
    pair.rename("a", "b");
    assert_eq!(pair.push().await, ["src/b"]);
    // A file whose time has changed is not even read.
    age(&pair.served.path().join("src/b"));
    pair.rename("b", "c");
    assert_eq!(pair.push().await, ["src/c"]);
    std::fs::remove_file(pair.served.path().join("src/c")).unwrap();
    pair.rename("c", "d");
    assert_eq!(pair.push().await, ["src/d"]);
    assert!(
        listing(&pair.served.path().join("src"))
            .iter()
            .all(|line| !line.contains("partial"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_changed_with_size_and_time_kept_is_sent() {
    let pair = Pair::new().await;
    pair.write("a", 1);
    pair.push().await;
    // Changed in place, as by a database, or by an image editor that restores the old time.
    let here = pair.from.path().join("src/a");
    let time = here.metadata().unwrap().modified().unwrap();
    let file = std::fs::File::options().write(true).open(&here).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"changed", SIZE as u64 / 2).unwrap();
    file.set_modified(time).unwrap();
    settle(&file);
    pair.rename("a", "b");
    assert_eq!(pair.push().await, ["src/b"], "with its new content");
    // A change of metadata alone, such as a hard link, costs a read of the content and no transfer.
    let b = pair.from.path().join("src/b");
    std::fs::hard_link(&b, pair.from.path().join("src/c")).unwrap();
    std::fs::remove_file(&b).unwrap();
    assert_eq!(pair.push().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_index_entry_makes_no_file() {
    let pair = Pair::new().await;
    pair.write("a", 1);
    pair.push().await;
    pair.write("b", 2);
    let digest = blake3::hash(&content(2, SIZE));
    let key = |directory: &Path, name: &str| {
        let there = LocalStore::open(directory)
            .unwrap()
            .stat(&crate::support::path(name))
            .unwrap()
            .unwrap();
        there.version.key()
    };
    let (served, from) = (pair.served.path(), pair.from.path());
    pair.indexes[0].record_location(
        key(served, "").file,
        digest.as_bytes(),
        &key(served, "src/a"),
        &crate::support::path("src/a"),
    );
    let b = LocalStore::open(from)
        .unwrap()
        .stat(&crate::support::path("src/b"))
        .unwrap()
        .unwrap();
    pair.indexes[1].remember(&b.version.key(), b.version.changed, digest.as_bytes());
    assert_eq!(pair.push().await, ["src/b"]);
    // By now the index is repaired.
    pair.rename("b", "c");
    assert_eq!(pair.push().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_index_costs_time_and_nothing_else() {
    let home = tempdir().unwrap();
    for name in ["server", "client"] {
        std::fs::write(home.path().join(name), content(9, 100_000)).unwrap();
    }
    let pair = Pair::with(
        home,
        Anyone {
            read: true,
            write: true,
        },
        true,
    )
    .await;
    pair.write("a", 1);
    assert_eq!(pair.push().await, ["src/a"]);
    // After a fresh start the index works again.
    pair.rename("a", "b");
    assert_eq!(pair.push().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_may_not_read_learns_nothing_of_existing_files() {
    let pair = Pair::with(
        tempdir().unwrap(),
        Anyone {
            read: false,
            write: true,
        },
        true,
    )
    .await;
    pair.write("a", 1);
    assert_eq!(pair.push().await, ["src/a"]);
    pair.rename("a", "b");
    assert_eq!(pair.push().await, ["src/b"]);
    // The index is not even opened for that.
    assert!(!pair.home.path().join("server").exists());
    assert!(pair.home.path().join("client").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_may_not_read_cannot_probe_by_checksum() {
    let pair = Pair::with(
        tempdir().unwrap(),
        Anyone {
            read: false,
            write: true,
        },
        true,
    )
    .await;
    pair.write("a", 1);
    let mut options = to(&[&pair.from.path().join("src")], "src");
    (options.walk.checksum, options.take.checksum) = (true, true);
    match tokio::time::timeout(LIMIT, pair.client.push(&options, haul::ignore()))
        .await
        .expect("it ends")
    {
        Err(Error::Refused(why)) => assert_eq!(why.code, Code::NotAllowed),
        other => panic!("{other:?}"),
    }
    assert!(
        listing(pair.served.path()).is_empty(),
        "it is said before anything is written"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_end_can_disable_deduplication() {
    let pair = Pair::with(
        tempdir().unwrap(),
        Anyone {
            read: true,
            write: true,
        },
        false,
    )
    .await;
    pair.write("a", 1);
    pair.push().await;
    pair.rename("a", "b");
    assert_eq!(pair.push().await, ["src/b"]);

    let pair = Pair::new().await;
    pair.write("a", 1);
    pair.push().await;
    pair.rename("a", "b");
    let mut options = to(&[&pair.from.path().join("src")], "src");
    options.take = ReceiveOptions {
        no_dedupe: true,
        ..ReceiveOptions::default()
    };
    // The digest is announced for another reason.
    options.walk.checksum = true;
    assert_eq!(pair.push_with(options).await, ["src/b"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_written_a_moment_ago_is_not_known_by_its_time() {
    let pair = Pair::new().await;
    let written = pair.from.path().join("src/a");
    write(&written, &content(1, SIZE));
    // However long it takes until the file is examined, it counts as written a moment ago.
    let file = std::fs::File::options().write(true).open(&written).unwrap();
    file.set_modified(SystemTime::now() + LIMIT).unwrap();
    assert_eq!(pair.push().await, ["src/a"]);
    pair.rename("a", "b");
    assert_eq!(pair.push().await, ["src/b"]);
    // A small file is not looked up either.
    write(&pair.from.path().join("src/small"), &content(2, SIZE - 1));
    age(&pair.from.path().join("src/small"));
    pair.push().await;
    pair.rename("small", "other");
    assert_eq!(pair.push().await, ["src/other"]);
}
