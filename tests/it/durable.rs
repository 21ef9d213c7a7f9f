//! Entries reported as committed are on the disk by then, and `--no-fsync` syncs everything once at the end.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;

use crate::support::slow::SlowStore;
use crate::support::{Host, LIMIT, to, write};
use haul::{
    Code, Config, Durability, Event, MemoryStore, Observer, PushOptions, Settled, TransferStats,
};
use tempfile::tempdir;

/// Entries that the manifest alone settles: directories, an empty file and a hard link to it, a symbolic link.
fn tree(root: &Path) {
    write(&root.join("d/empty"), b"");
    std::fs::hard_link(root.join("d/empty"), root.join("d/name")).unwrap();
    symlink("empty", root.join("d/link")).unwrap();
    write(&root.join("small"), b"content");
}

/// Adds a line to the log of a store for each entry that is reported as settled.
fn told(store: &SlowStore, by: &'static str) -> Observer {
    let store = store.clone();
    Arc::new(move |event| {
        if let Event::Settled { path, result, .. } = event {
            let how = match result {
                Settled::Committed => "committed",
                Settled::Skipped => "skipped",
                Settled::Omitted(_) => "omitted",
                Settled::Failed(_) => "failed",
            };
            store.note(format!("{by} {how} {path}"));
        }
    })
}

async fn push(
    store: &SlowStore,
    source: &Path,
    durability: Durability,
) -> haul::Result<TransferStats> {
    let host = Host::observed(
        Arc::new(store.clone()),
        Config::default(),
        told(store, "server"),
    );
    let options = PushOptions {
        durability,
        ..to(&[source], "t")
    };
    let client = host.connect().await?;
    let pushed = client.push(&options, told(store, "client"));
    let outcome = tokio::time::timeout(LIMIT, pushed).await.expect("it ends");
    client.close().await;
    Ok(outcome?.sent)
}

/// The index of the first occurrence of a line in a log.
fn at(log: &[String], line: &str) -> usize {
    log.iter()
        .position(|logged| logged == line)
        .unwrap_or_else(|| panic!("no {line} in {log:#?}"))
}

/// Whether a sync began after the first line and ended before the second.
fn synced_between(log: &[String], done: &str, told: &str) -> bool {
    let between = &log[at(log, done)..at(log, told)];
    let mut lines = between.iter().skip_while(|line| *line != "sync");
    lines.any(|line| line == "synced")
}

fn count(log: &[String], line: &str) -> usize {
    log.iter().filter(|logged| *logged == line).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn manifest_entries_are_synced_before_they_are_reported() {
    let source = tempdir().unwrap();
    let root = source.path().join("t");
    tree(&root);
    let store = SlowStore::around(MemoryStore::new(), None);
    let sent = push(&store, &root, Durability::Synced).await.unwrap();
    assert_eq!((sent.files, sent.failed), (4, 0), "{:?}", sent.failures);
    let log = store.log();
    for path in ["t", "t/d", "t/d/empty", "t/d/name", "t/d/link"] {
        for by in ["server", "client"] {
            let told = format!("{by} committed {path}");
            assert!(
                synced_between(&log, &format!("made {path}"), &told),
                "{told} in {log:#?}"
            );
        }
    }

    // The metadata of entries that exist already.
    for name in ["d/empty", "small", "d"] {
        std::fs::set_permissions(root.join(name), PermissionsExt::from_mode(0o700)).unwrap();
    }
    store.note("again".into());
    push(&store, &root, Durability::Synced).await.unwrap();
    let log = store.log();
    let log = &log[at(&log, "again")..];
    for (path, how) in [
        ("t/small", "skipped"),
        ("t/d/empty", "skipped"),
        ("t/d", "committed"),
    ] {
        let told = format!("server {how} {path}");
        assert!(
            synced_between(log, &format!("set {path}"), &told),
            "{told} in {log:#?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compared_files_are_synced_before_they_are_reported() {
    let source = tempdir().unwrap();
    let root = source.path().join("t");
    tree(&root);
    let store = SlowStore::around(MemoryStore::new(), None);
    push(&store, &root, Durability::Synced).await.unwrap();
    std::fs::set_permissions(root.join("small"), PermissionsExt::from_mode(0o700)).unwrap();
    let host = Host::observed(
        Arc::new(store.clone()),
        Config::default(),
        told(&store, "server"),
    );
    let mut options = PushOptions {
        durability: Durability::Synced,
        ..to(&[&root], "t")
    };
    (options.take.checksum, options.walk.checksum) = (true, true);
    store.note("again".into());
    crate::support::push(&host, &options).await.unwrap();
    let log = store.log();
    let log = &log[at(&log, "again")..];
    assert!(
        synced_between(log, "set t/small", "server skipped t/small"),
        "{log:#?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_sync_fails_the_entries_that_wait_for_it() {
    let source = tempdir().unwrap();
    let root = source.path().join("t");
    write(&root.join("empty"), b"");
    let store = SlowStore::around(MemoryStore::new(), None).failing_syncs(1);
    let sent = push(&store, &root, Durability::Synced).await.unwrap();
    assert_eq!((sent.files, sent.failed), (0, 1));
    let (path, why) = &sent.failures[0];
    assert_eq!((path.to_string(), why.code), ("t/empty".into(), Code::Io));
    assert!(why.text.contains("may not survive a crash"), "{why}");
    assert_eq!(count(&store.log(), "server committed t/empty"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_that_arrive_during_a_sync_share_the_next() {
    const FILES: usize = 2000;
    let source = tempdir().unwrap();
    let root = source.path().join("t");
    for at in 0..FILES {
        write(&root.join(format!("{at}")), b"");
    }
    let store = SlowStore::around(MemoryStore::new(), None);
    let held = store.hold_syncs();
    let all_made = async {
        let made = || {
            let log = store.log();
            log.iter().filter(|line| line.starts_with("made")).count()
        };
        while made() < FILES {
            tokio::task::yield_now().await;
        }
        assert_eq!(count(&store.log(), "sync"), 1);
        drop(held);
    };
    let (sent, ()) = tokio::join!(push(&store, &root, Durability::Synced), all_made);
    assert_eq!(sent.unwrap().files, FILES as u64);
    let syncs = count(&store.log(), "sync");
    // One sync each for the first entry, the rest, the directory and the end; a few more if the entries arrived in many
    // parts.
    assert!(syncs <= 12, "{syncs} syncs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_without_fsync_ends_with_one_sync() {
    let source = tempdir().unwrap();
    let root = source.path().join("t");
    tree(&root);
    let store = SlowStore::around(MemoryStore::new(), None);
    push(&store, &root, Durability::Visible).await.unwrap();
    let log = store.log();
    let last = log.iter().rposition(|line| line.starts_with("made"));
    assert_eq!(count(&log, "sync"), 1, "{log:#?}");
    assert!(last < Some(at(&log, "sync")), "{log:#?}");

    // Nothing is written, so no sync can fail.
    push(&store, &root, Durability::Visible).await.unwrap();
    assert_eq!(count(&store.log(), "sync"), 1, "{:#?}", store.log());
}
