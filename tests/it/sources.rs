//! Sources that are not files at rest: sizes that are not reported, names like those of partials, and files that
//! vanish, have no content, or grow.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use haul::{
    Attributes, Client, Code, Config, Delete, Durability, Event, MemoryStore, Metadata,
    MetadataWarnings, Observer, Outcome, PartialKey, Reason, ReceiveOptions, RelativePath, Source,
    Store, Upload, WalkOptions,
};
use serde_json::Value;
use tempfile::tempdir;

use crate::support::command::{Serving, haul};
use crate::support::{Host, LIMIT, content, from, listing, path, pull, push, to, write};

fn put(store: &dyn Store, name: &str, data: &[u8]) {
    let claim = PartialKey {
        owner: [7; 32],
        size: data.len() as u64,
        modified: None,
    };
    let mut upload = store.create(&path(name), &claim).unwrap();
    upload.write_at(data, 0).unwrap();
    let attributes = Attributes::default();
    upload.commit(&attributes, Durability::Visible).unwrap();
}

fn codes(all: &[(RelativePath, Reason)]) -> Vec<(String, Code)> {
    let mut codes: Vec<_> = all
        .iter()
        .map(|(path, why)| (path.to_string(), why.code))
        .collect();
    codes.sort_by(|a, b| a.0.cmp(&b.0));
    codes
}

fn fifo(at: &Path) {
    rustix::fs::mkfifoat(rustix::fs::CWD, at, rustix::fs::Mode::RUSR).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_reports_size_zero_is_sent_to_its_end() {
    let (store, here) = (MemoryStore::new().hiding_sizes(), tempdir().unwrap());
    let large = content(1, 3 << 20);
    put(&store, "t/small", b"five!");
    put(&store, "t/below/large", &large);
    put(&store, "t/empty", b"");
    let host = Host::serving(Arc::new(store), Config::default());
    // With other sources, and alone.
    for _ in 0..2 {
        let outcome = pull(&host, &from(&["t"], &here.path().join("t"))).await;
        let sent = outcome.unwrap().sent;
        assert_eq!(sent.failed, 0, "{:?}", sent.failures);
        assert_eq!(sent.files + sent.skipped, 3);
        assert_eq!(
            std::fs::read(here.path().join("t/small")).unwrap(),
            b"five!"
        );
        assert!(std::fs::read(here.path().join("t/below/large")).unwrap() == large);
        assert_eq!(std::fs::read(here.path().join("t/empty")).unwrap(), b"");
    }
    let into = format!("{}/", here.path().display());
    pull(&host, &from(&["t/small"], Path::new(&into)))
        .await
        .unwrap();
    assert_eq!(std::fs::read(here.path().join("small")).unwrap(), b"five!");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_of_proc_are_sent_with_their_content() {
    if !Path::new("/proc/version").exists() {
        return eprintln!("skipped: there is no /proc");
    }
    let (served, version) = (tempdir().unwrap(), std::fs::read("/proc/version").unwrap());
    let host = Host::directory(served.path());
    // Alone under another name, into a directory, and with its directory.
    for (source, destination, there) in [
        ("/proc/version", "v", "v"),
        ("/proc/version", "d/", "d/version"),
        ("/proc/sys/kernel/random", "r", "r/boot_id"),
    ] {
        let outcome = push(&host, &to(&[Path::new(source)], destination)).await;
        let sent = outcome.unwrap().sent;
        assert_eq!((sent.failed, sent.omitted), (0, vec![]), "{source}");
        assert!(!std::fs::read(served.path().join(there)).unwrap().is_empty());
    }
    assert_eq!(std::fs::read(served.path().join("v")).unwrap(), version);
    let (host, here) = (
        Host::directory(Path::new("/proc/sys/kernel")),
        tempdir().unwrap(),
    );
    pull(&host, &from(&["random/boot_id"], &here.path().join("id")))
        .await
        .unwrap();
    assert_eq!(
        std::fs::read(here.path().join("id")).unwrap(),
        std::fs::read("/proc/sys/kernel/random/boot_id").unwrap()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn user_names_that_resemble_partials_are_ordinary_names() {
    let (source, served, here) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
    let digits = "0123456789abcdef".repeat(2);
    for name in [".haul-notes.partial", ".haul-x.partial/in it"] {
        write(&source.path().join("t").join(name), b"mine");
    }
    let host = Host::directory(served.path());
    let outcome = push(&host, &to(&[&source.path().join("t")], "t")).await;
    assert_eq!(outcome.unwrap().sent.files, 2);
    assert_eq!(listing(served.path()), listing(source.path()));
    pull(&host, &from(&["t"], &here.path().join("t")))
        .await
        .unwrap();
    assert_eq!(listing(here.path()), listing(source.path()));
    // A real partial is never sent, and a name in capitals is reported.
    let capitals = format!(".HAUL-{}.PARTIAL", digits.to_uppercase());
    write(
        &source.path().join(format!("t/.haul-{digits}.partial")),
        b"",
    );
    write(&source.path().join("t").join(&capitals), b"");
    let outcome = push(&host, &to(&[&source.path().join("t")], "t"))
        .await
        .unwrap();
    assert_eq!(codes(&outcome.sent.failures), [("t".into(), Code::BadName)]);
    assert!(outcome.sent.failures[0].1.text.contains(&capitals));
    assert_eq!(
        listing(served.path()).len(),
        4,
        "{:?}",
        listing(served.path())
    );
}

/// A store in which some names are listed, and are gone when they are examined or opened.
struct Vanishing {
    inner: MemoryStore,
    looked_at: &'static [&'static str],
    opened: &'static [&'static str],
    /// A directory that cannot be read because of a fault in the program.
    broken: Option<&'static str>,
}

impl Vanishing {
    fn gone(&self, names: &[&str], path: &RelativePath) -> Option<Reason> {
        names
            .contains(&&*path.to_string())
            .then(|| Code::NotFound.into())
    }
}

impl Store for Vanishing {
    fn stat(&self, path: &RelativePath) -> Result<Option<Metadata>, Reason> {
        match self.gone(self.looked_at, path) {
            Some(_) => Ok(None),
            None => self.inner.stat(path),
        }
    }
    fn names(&self, directory: &RelativePath) -> Result<Vec<Vec<u8>>, Reason> {
        assert_ne!(Some(&*directory.to_string()), self.broken, "on purpose");
        self.gone(self.opened, directory)
            .map_or_else(|| self.inner.names(directory), Err)
    }
    fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Reason> {
        self.inner.read_link(path)
    }
    fn open(&self, path: &RelativePath) -> Result<Box<dyn Source>, Reason> {
        self.gone(self.opened, path)
            .map_or_else(|| self.inner.open(path), Err)
    }
    fn has_unsized_content(&self, _: &RelativePath, _: &Metadata) -> Result<bool, Reason> {
        Ok(false)
    }
    fn create(&self, path: &RelativePath, claim: &PartialKey) -> Result<Box<dyn Upload>, Reason> {
        self.inner.create(path, claim)
    }
    fn make_directory(&self, path: &RelativePath) -> Result<(), Reason> {
        self.inner.make_directory(path)
    }
    fn set_attributes(
        &self,
        path: &RelativePath,
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        self.inner.set_attributes(path, attributes)
    }
    fn make_symlink(
        &self,
        path: &RelativePath,
        target: &[u8],
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        self.inner.make_symlink(path, target, attributes)
    }
    fn link(&self, existing: &RelativePath, new: &RelativePath) -> Result<(), Reason> {
        self.inner.link(existing, new)
    }
    fn remove(&self, path: &RelativePath) -> Result<(), Reason> {
        self.inner.remove(path)
    }
    fn sync(&self) -> Result<(), Reason> {
        self.inner.sync()
    }
    fn sweep(&self, age: Duration) -> Result<u64, Reason> {
        self.inner.sweep(age)
    }
}

/// Serves a tree in which a file and a directory vanish when they are examined, and one of each later.
fn vanishing() -> Host {
    let inner = MemoryStore::new();
    for name in ["stays", "file", "late", "large", "dir/x", "late dir/x"] {
        let size = if name == "large" { 1 << 20 } else { 7 };
        put(&inner, &format!("t/{name}"), &content(1, size));
    }
    let store = Vanishing {
        inner,
        looked_at: &["t/file", "t/dir"],
        opened: &["t/late", "t/large", "t/late dir"],
        broken: None,
    };
    Host::serving(Arc::new(store), Config::default())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vanished_files_do_not_keep_a_mirror_from_removing() {
    let (host, here) = (vanishing(), tempdir().unwrap());
    let t = here.path().join("t");
    // Besides surplus files there is an earlier state of the files that vanish: it stays for now.
    for name in ["over", "old/over", "file", "late", "dir/x", "late dir/x"] {
        write(&t.join(name), b"earlier");
    }
    let mut options = from(&["t"], &t);
    options.take.delete = Some(Delete::default());
    let outcome = pull(&host, &options).await.unwrap();
    let sent = &outcome.sent;
    let gone = ["t/dir", "t/file", "t/large", "t/late", "t/late dir"];
    assert_eq!(
        codes(&sent.omitted),
        gone.map(|name| (name.to_owned(), Code::Vanished))
    );
    assert_eq!((sent.files, sent.failed, sent.vanished), (1, 0, 5));
    let summary = &outcome.summary;
    assert_eq!(
        (summary.failed, summary.removed),
        (0, Some(3)),
        "{summary:?}"
    );
    assert!(summary.unremoved.is_none(), "{summary:?}");
    assert!(!t.join("over").exists() && !t.join("old").exists());
    for name in ["file", "late", "dir/x", "late dir/x"] {
        assert_eq!(std::fs::read(t.join(name)).unwrap(), b"earlier", "{name}");
    }
    assert!(!t.join("large").exists() && t.join("stays").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_walk_that_panics_fails_and_removes_nothing() {
    let inner = MemoryStore::new();
    for name in ["a", "broken/x", "z"] {
        put(&inner, &format!("t/{name}"), &content(1, 7));
    }
    let store = Vanishing {
        inner,
        looked_at: &[],
        opened: &[],
        broken: Some("t/broken"),
    };
    let host = Host::serving(Arc::new(store), Config::default());
    let here = tempdir().unwrap();
    let t = here.path().join("t");
    write(&t.join("broken/x"), b"earlier");
    write(&t.join("z"), b"earlier");
    let mut options = from(&["t"], &t);
    options.take.delete = Some(Delete::default());
    let outcome = pull(&host, &options).await.unwrap();
    assert_eq!(outcome.sent.failures[0].1.code, Code::Internal);
    assert_eq!(outcome.summary.removed, Some(0), "{:?}", outcome.summary);
    assert_eq!(std::fs::read(t.join("broken/x")).unwrap(), b"earlier");
    assert!(t.join("z").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pushed_file_that_vanishes_keeps_no_mirror_from_removing() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let t = source.path().join("t");
    for name in ["small", "large"] {
        let size = if name == "small" { 10 } else { 1 << 20 };
        write(&t.join(name), &content(1, size));
    }
    write(&t.join("stays"), b"stays");
    write(&served.path().join("t/over"), b"over");
    let config = Config {
        allow_delete: true,
        ..Config::default()
    };
    let store = haul::LocalStore::open(served.path()).unwrap();
    let host = Host::serving(Arc::new(store), config);
    let client = host.connect().await.unwrap();
    let gone = t.clone();
    let observer: Observer = Arc::new(move |event| {
        // Everything is announced, and verdicts arrive later than this.
        if let Event::Found { files: 3, .. } = event {
            let _ = std::fs::remove_file(gone.join("small"));
            let _ = std::fs::remove_file(gone.join("large"));
        }
    });
    let mut options = to(&[&t], "t");
    options.take.delete = Some(Delete::default());
    let outcome = tokio::time::timeout(LIMIT, client.push(&options, observer))
        .await
        .expect("it ends")
        .unwrap();
    assert_eq!((outcome.sent.vanished, outcome.sent.failed), (2, 0));
    assert_eq!(outcome.summary.removed, Some(1), "{:?}", outcome.summary);
    assert_eq!(
        std::fs::read_dir(served.path().join("t")).unwrap().count(),
        1
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_named_source_that_is_gone_is_a_failure() {
    let (host, here) = (vanishing(), tempdir().unwrap());
    for named in ["t/file", "t/late dir"] {
        let ended = pull(&host, &from(&[named, "t/stays"], here.path())).await;
        let sent = ended.unwrap().sent;
        let codes = codes(&sent.failures);
        assert_eq!((sent.failed, sent.vanished), (1, 0), "{codes:?}");
        assert_eq!(codes[0].1, Code::NotFound);
    }
}

/// Returns the lines of JSON of a `haul` that exits with this code.
fn json(from: &Path, code: i32, arguments: &[&str]) -> Vec<Value> {
    let output = haul(from, arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    let lines = String::from_utf8(output.stdout).unwrap();
    let parse = |line: &str| serde_json::from_str(line).unwrap();
    lines.lines().map(parse).collect()
}

/// Returns the result for a path, with its code.
fn became(lines: &[Value], path: &str) -> (Value, Value) {
    let line = lines.iter().find(|line| line["path"] == path);
    let line = line.unwrap_or_else(|| panic!("{path} in {lines:?}"));
    (line["result"].clone(), line["code"].clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vanished_files_alone_are_reported_and_exit_with_24() {
    let (host, here) = (vanishing(), tempdir().unwrap());
    let (url, pin) = (
        format!("haul://{}/t", host.address),
        host.key_id.to_string(),
    );
    let place = here.path().to_owned();
    let told = tokio::task::spawn_blocking(move || {
        let quiet = ["cp", "-q", "--pin", &pin, &url, "quiet"];
        let output = haul(&place, &quiet);
        let dry = haul(&place, &["cp", "-n", "--pin", &pin, &url, "dry"]);
        let lines = json(&place, 24, &["cp", "--json", "--pin", &pin, &url, "json"]);
        (output, dry, lines)
    });
    let (quiet, dry, lines) = told.await.unwrap();
    let said = String::from_utf8(quiet.stderr).unwrap();
    assert_eq!(quiet.status.code(), Some(24), "{said}");
    assert_eq!(said.lines().count(), 5, "{said}");
    assert!(
        said.contains("t/late: gone before it could be sent"),
        "{said}"
    );
    // A dry run opens only directories.
    let said = String::from_utf8(dry.stderr).unwrap();
    assert_eq!(dry.status.code(), Some(24), "{said}");
    assert!(said.contains("; 3 vanished"), "{said}");
    assert_eq!(
        became(&lines, "t/late"),
        ("omitted".into(), "Vanished".into())
    );
    let done = lines.last().unwrap();
    assert_eq!(
        (&done["failed"], &done["vanished"], &done["specials"]),
        (&0.into(), &5.into(), &0.into())
    );
}

#[test]
fn special_files_are_reported_and_fail_only_on_demand() {
    let (serving, source) = (Serving::start(&["--allow-delete"]), tempdir().unwrap());
    let pin = serving.key_id.to_string();
    let url = |path: &str| format!("{}{path}", serving.url);
    write(&source.path().join("t/f"), b"f");
    fifo(&source.path().join("t/fifo"));
    let lines = json(
        source.path(),
        0,
        &["cp", "--json", "--pin", &pin, "t", &url("t")],
    );
    assert_eq!(
        became(&lines, "t/fifo"),
        ("omitted".into(), "Special".into())
    );
    assert_eq!(lines.last().unwrap()["specials"], 1);
    let said = haul(source.path(), &["cp", "--pin", &pin, "t", &url("t")]).stderr;
    let said = String::from_utf8(said).unwrap();
    assert!(
        said.contains("t/fifo: a FIFO, socket or device; skipped"),
        "{said}"
    );
    assert!(
        said.contains("1 file unchanged, 1 special file skipped"),
        "{said}"
    );
    // On demand it is a failure like any other, so that a mirror removes nothing; in both directions.
    let strict = ["--json", "--specials", "fail", "--pin", &pin];
    let served = serving.served.path();
    write(&served.join("t/over"), b"over");
    let there = url("t");
    let push = [&["sync"], &strict[..], &["t", &there]].concat();
    let lines = json(source.path(), 1, &push);
    assert_eq!(
        became(&lines, "t/fifo"),
        ("failed".into(), "Special".into())
    );
    assert!(served.join("t/over").exists());
    fifo(&served.join("t/fifo"));
    write(&source.path().join("t/mine"), b"mine");
    let pull = [&["sync"], &strict[..], &[&there, "t"]].concat();
    let lines = json(source.path(), 1, &pull);
    assert_eq!(lines.last().unwrap()["failed"], 1, "{lines:?}");
    assert!(source.path().join("t/mine").exists());
    let pull = ["sync", "--pin", &pin, &url("t"), "t"];
    json(source.path(), 0, &pull);
    assert!(!source.path().join("t/mine").exists());
    // The user named it, and so meant it to be sent.
    json(source.path(), 1, &["cp", "--pin", &pin, "t/fifo", &url("")]);
    json(
        source.path(),
        1,
        &["cp", "--pin", &pin, &url("t/fifo"), "x"],
    );
}

/// Appends to a file, or changes it in another way, once some of it has moved.
fn once_moved(act: impl Fn() + Send + std::marker::Sync + 'static) -> Observer {
    let once = std::sync::Once::new();
    Arc::new(move |event| {
        if let Event::Moved { .. } = event {
            once.call_once(&act);
        }
    })
}

fn append(file: &Path) {
    let mut file = std::fs::File::options().append(true).open(file).unwrap();
    file.write_all(b"one more line\n").unwrap();
}

fn growing() -> WalkOptions {
    WalkOptions {
        allow_growing: true,
        ..WalkOptions::default()
    }
}

const LENGTH: usize = 16 << 20;

async fn pushed(client: &Client, file: &Path, walk: WalkOptions, act: fn(&Path)) -> Outcome {
    let mut options = to(&[file], "log");
    options.walk = walk;
    options.take = ReceiveOptions::default();
    let acted = file.to_owned();
    let observer = once_moved(move || act(&acted));
    tokio::time::timeout(LIMIT, client.push(&options, observer))
        .await
        .expect("it ends")
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_only_grows_is_sent_as_it_was_at_the_start() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let log = source.path().join("log");
    write(&log, &content(1, LENGTH));
    let time = log.metadata().unwrap().modified().unwrap();
    let host = Host::directory(served.path());
    let client = host.connect().await.unwrap();
    let sent = pushed(&client, &log, WalkOptions::default(), append)
        .await
        .sent;
    let (_, why) = &sent.failures[0];
    assert!(
        why.code == Code::Changed && why.text.contains("--allow-growing"),
        "{why}"
    );
    write(&log, &content(1, LENGTH));
    log_time(&log, time);
    let sent = pushed(&client, &log, growing(), append).await.sent;
    assert_eq!((sent.files, sent.failed), (1, 0), "{:?}", sent.failures);
    let there = served.path().join("log");
    assert!(std::fs::read(&there).unwrap() == content(1, LENGTH));
    assert_eq!(there.metadata().unwrap().modified().unwrap(), time);
    // The appended part is sent in the next run.
    let sent = push(&host, &to(&[&log], "log")).await.unwrap().sent;
    assert_eq!((sent.files, sent.skipped), (1, 0));
    assert!(std::fs::read(&there).unwrap() == std::fs::read(&log).unwrap());
}

fn log_time(file: &Path, time: std::time::SystemTime) {
    let file = std::fs::File::options().write(true).open(file).unwrap();
    file.set_modified(time).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn allow_growing_permits_no_other_change() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let log = source.path().join("log");
    let host = Host::directory(served.path());
    let client = host.connect().await.unwrap();
    let changes: [fn(&Path); 3] = [
        |file| {
            let file = std::fs::File::options().write(true).open(file).unwrap();
            file.set_len(100).unwrap();
        },
        |file| {
            std::fs::write(file.with_extension("new"), content(2, LENGTH + 1)).unwrap();
            std::fs::rename(file.with_extension("new"), file).unwrap();
        },
        |file| std::fs::write(file, content(3, LENGTH)).unwrap(),
    ];
    for change in changes {
        write(&log, &content(1, LENGTH));
        let sent = pushed(&client, &log, growing(), change).await.sent;
        assert_eq!(codes(&sent.failures), [("log".into(), Code::Changed)]);
        assert!(listing(served.path()).is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_asks_for_files_that_grow() {
    let (served, here) = (tempdir().unwrap(), tempdir().unwrap());
    let log = served.path().join("log");
    let host = Host::directory(served.path());
    // Slow enough that it grows before the server has read all of it.
    let config = Config {
        limit: haul::Rate::from_bytes(8 << 20),
        ..Config::default()
    };
    let identity = haul::Identity::generate().unwrap();
    let client = host.connect_as(&identity, &config).await.unwrap();
    for walk in [WalkOptions::default(), growing()] {
        write(&log, &content(1, LENGTH));
        let allowed = walk.allow_growing;
        let mut options = from(&["log"], &here.path().join("log"));
        options.walk = walk;
        let grown = log.clone();
        let observer = once_moved(move || append(&grown));
        let outcome = tokio::time::timeout(LIMIT, client.pull(&options, observer))
            .await
            .expect("it ends")
            .unwrap();
        assert_eq!(outcome.sent.failed, u64::from(!allowed));
        assert_eq!(here.path().join("log").exists(), allowed);
    }
    assert!(std::fs::read(here.path().join("log")).unwrap() == content(1, LENGTH));
}
