//! The main task over real sockets: trees are sent from clients to a server, whole, verified and unchanged.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use crate::support::{Host, content, listing, path, push, recorder, to, write};
use haul::{Code, Config, Durability, Error, Event, LocalStore, MemoryStore, Settled, Store};
use tempfile::tempdir;

/// Makes a tree with every kind of entry that is transferred.
fn tree(root: &Path) {
    write(&root.join("empty"), b"");
    write(&root.join("small"), b"hello");
    write(&root.join("just small"), &content(1, 256 << 10));
    write(&root.join("just large"), &content(2, (256 << 10) + 1));
    write(&root.join("deep/er/large"), &content(3, 5_000_000));
    write(&root.join("deep/er/ä?#% \n"), b"odd name");
    std::fs::create_dir_all(root.join("nothing in it")).unwrap();
    symlink("deep/er/large", root.join("link")).unwrap();
    symlink("/nowhere", root.join("dangling")).unwrap();
    for i in 0..300 {
        write(
            &root.join(format!("many/{i}")),
            &content(i, i as usize * 37),
        );
    }
    std::fs::set_permissions(root.join("small"), PermissionsExt::from_mode(0o751)).unwrap();
    std::fs::set_permissions(root.join("nothing in it"), PermissionsExt::from_mode(0o555)).unwrap();
    let old = std::fs::File::open(root.join("small")).unwrap();
    old.set_modified(UNIX_EPOCH - Duration::from_millis(1500))
        .unwrap();
    std::fs::File::open(root.join("deep"))
        .unwrap()
        .set_modified(UNIX_EPOCH + Duration::from_secs(1_000_000))
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_arrives_unchanged_and_a_rerun_sends_nothing() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let tree_at = source.path().join("tree");
    tree(&tree_at);
    let host = Host::directory(served.path());

    let outcome = push(&host, &to(&[&tree_at], "a/b")).await.unwrap();
    assert_eq!(
        (outcome.sent.failed, outcome.sent.skipped),
        (0, 0),
        "{:?}",
        outcome.sent.failures
    );
    assert_eq!(outcome.sent.files, outcome.summary.committed);
    assert_eq!(listing(&served.path().join("a/b")), listing(&tree_at));

    let before = listing(served.path());
    let again = push(&host, &to(&[&tree_at], "a/b")).await.unwrap();
    assert_eq!(
        (again.sent.files, again.sent.failed),
        (0, 0),
        "{:?}",
        again.sent.failures
    );
    assert_eq!(again.sent.skipped, outcome.sent.files);
    assert_eq!(listing(served.path()), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_changed_files_are_sent_again() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let tree_at = source.path().join("tree");
    tree(&tree_at);
    let host = Host::directory(served.path());
    push(&host, &to(&[&tree_at], "t")).await.unwrap();

    write(&tree_at.join("deep/er/large"), &content(9, 4_000_000));
    std::fs::remove_file(tree_at.join("link")).unwrap();
    symlink("elsewhere", tree_at.join("link")).unwrap();
    std::fs::set_permissions(tree_at.join("empty"), PermissionsExt::from_mode(0o600)).unwrap();
    let outcome = push(&host, &to(&[&tree_at], "t")).await.unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.bytes), (2, 4_000_000));
    assert_eq!(
        listing(&served.path().join("t")),
        listing(&tree_at),
        "also the mode of what was not sent"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_sources_go_into_the_destination_each_under_its_name() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    write(&source.path().join("a/x"), b"1");
    write(&source.path().join("b"), b"2");
    let host = Host::directory(served.path());
    push(
        &host,
        &to(&[&source.path().join("a"), &source.path().join("b")], "d"),
    )
    .await
    .unwrap();
    assert_eq!(std::fs::read(served.path().join("d/a/x")).unwrap(), b"1");
    assert_eq!(std::fs::read(served.path().join("d/b")).unwrap(), b"2");
    // One file: it becomes the named path, or goes into the existing directory.
    push(&host, &to(&[&source.path().join("b")], "new"))
        .await
        .unwrap();
    push(&host, &to(&[&source.path().join("b")], "d/a"))
        .await
        .unwrap();
    assert_eq!(std::fs::read(served.path().join("new")).unwrap(), b"2");
    assert_eq!(std::fs::read(served.path().join("d/a/b")).unwrap(), b"2");
    let twice = to(
        &[
            &source.path().join("b"),
            &source.path().join("../").join("b"),
        ],
        "d",
    );
    assert!(
        push(&host, &twice).await.is_ok(),
        "a source that is missing does not keep the others back"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_files_are_reported_and_the_rest_goes_on() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let tree_at = source.path().join("tree");
    write(&tree_at.join("good"), b"good");
    write(&tree_at.join("taken"), b"file where a directory stands");
    write(&tree_at.join("barred/x"), b"directory where a file stands");
    let fifo = std::ffi::CString::new(tree_at.join("fifo").as_os_str().as_encoded_bytes()).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    std::fs::create_dir_all(served.path().join("t/taken/full")).unwrap();
    write(&served.path().join("t/barred"), b"stays");
    let host = Host::directory(served.path());

    let missing = source.path().join("missing");
    let mut options = to(&[&tree_at, &missing], "");
    options.destination = path("");
    std::fs::rename(served.path().join("t"), served.path().join("tree")).unwrap();
    let client = host.connect().await.unwrap();
    let (observer, events) = recorder();
    let outcome = client.push(&options, observer).await.unwrap();
    let mut failed: Vec<_> = outcome
        .sent
        .failures
        .iter()
        .map(|(p, w)| (p.to_string(), w.code))
        .collect();
    failed.sort_by(|a, b| a.0.cmp(&b.0));
    let name = |p: &Path| {
        p.components()
            .skip(1)
            .collect::<std::path::PathBuf>()
            .display()
            .to_string()
    };
    let mut expected = vec![
        (name(&missing), Code::NotFound),
        ("tree/barred".into(), Code::NotDirectory),
        ("tree/barred/x".into(), Code::NotDirectory),
        ("tree/taken".into(), Code::IsDirectory),
    ];
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(failed, expected);
    let omitted = outcome.sent.omitted.iter();
    let omitted: Vec<_> = omitted.map(|(p, w)| (p.to_string(), w.code)).collect();
    assert_eq!(omitted, [("tree/fifo".into(), Code::Special)]);
    assert_eq!(
        std::fs::read(served.path().join("tree/good")).unwrap(),
        b"good"
    );
    assert_eq!(
        std::fs::read(served.path().join("tree/barred")).unwrap(),
        b"stays"
    );
    let named = events
        .lock()
        .unwrap()
        .iter()
        .filter(|e| {
            matches!(
                e,
                Event::Settled {
                    result: Settled::Failed(_),
                    ..
                }
            )
        })
        .count();
    assert_eq!(named, expected.len(), "each failure is an event too");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_keeps_the_old_file_and_other_files_go_on() {
    let source = tempdir().unwrap();
    write(&source.path().join("t/a"), &content(1, 3 << 20));
    write(&source.path().join("t/b"), b"small");
    let store = Arc::new(MemoryStore::with_capacity(1 << 20));
    let old = haul::PartialKey {
        owner: [0; 32],
        size: 3,
        modified: None,
    };
    let mut upload = store.create(&path("t/a"), &old).unwrap();
    upload.write_at(b"old", 0).unwrap();
    upload
        .commit(&Default::default(), Durability::Visible)
        .unwrap();
    let host = Host::serving(store.clone(), Config::default());
    let outcome = push(&host, &to(&[&source.path().join("t")], "t"))
        .await
        .unwrap();
    assert_eq!(outcome.sent.failures.len(), 1);
    assert_eq!(outcome.sent.failures[0].1.code, Code::NoSpace);
    let mut back = [0; 3];
    store
        .open(&path("t/a"))
        .unwrap()
        .read_at(&mut back, 0)
        .unwrap();
    assert_eq!(&back, b"old");
    assert!(store.stat(&path("t/b")).unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_files_go_through_one_permit_and_a_mebibyte() {
    let source = tempdir().unwrap();
    for i in 0..1000u64 {
        let size = [10, 5_000, 70_000, 300_000][i as usize % 4];
        write(&source.path().join(format!("t/{i}")), &content(i, size));
    }
    let store = Arc::new(MemoryStore::new());
    let config = Config {
        max_transfers: 1,
        memory: 1 << 20,
        ..Config::default()
    };
    let host = Host::serving(store.clone(), config);
    let outcome = push(&host, &to(&[&source.path().join("t")], "t"))
        .await
        .unwrap();
    assert_eq!(
        (outcome.sent.files, outcome.sent.failed),
        (1000, 0),
        "{:?}",
        outcome.sent.failures
    );
    assert_eq!(store.peak_writes(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_connections_share_the_permits_and_none_starves() {
    let peak = share_permits(
        100,
        Config {
            max_transfers: 10,
            ..Config::default()
        },
    )
    .await;
    assert!((2..=10).contains(&peak), "{peak} wrote at the same time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a minute in a debug build; see tests/README.md"]
async fn a_thousand_connections_share_the_default_permits() {
    haul::internal::storage::open_files::raise_open_files();
    let peak = share_permits(1000, Config::default()).await;
    println!("{peak} transfers wrote at the same time");
    assert!((2..=100).contains(&peak), "{peak} wrote at the same time");
}

/// Opens this many connections before the first one sends, and sends ten files of 64 KiB over each. Returns the peak of
/// writers.
async fn share_permits(connections: usize, config: Config) -> usize {
    let source = tempdir().unwrap();
    for i in 0..10 {
        write(&source.path().join(format!("t/{i}")), &content(i, 64 << 10));
    }
    let store = Arc::new(MemoryStore::new().with_write_delay(Duration::from_millis(1)));
    let host = Arc::new(Host::serving(store.clone(), config));
    let all_up = Arc::new(tokio::sync::Barrier::new(connections));
    let mut clients = tokio::task::JoinSet::new();
    for i in 0..connections {
        let (host, all_up, from) = (host.clone(), all_up.clone(), source.path().join("t"));
        clients.spawn(async move {
            let config = Config {
                first_reply: crate::support::LIMIT,
                handshake: crate::support::LIMIT,
                ..Config::default()
            };
            let client = host
                .connect_as(&haul::Identity::generate().unwrap(), &config)
                .await
                .unwrap();
            all_up.wait().await;
            let outcome = client
                .push(&to(&[&from], &format!("{i}")), haul::ignore())
                .await;
            client.close().await;
            outcome
        });
    }
    while let Some(outcome) = clients.join_next().await {
        let sent = outcome.unwrap().unwrap().sent;
        assert_eq!((sent.files, sent.failed), (10, 0), "{:?}", sent.failures);
    }
    store.peak_writes()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_a_server_stops_it_and_leaves_no_files_behind() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    write(&source.path().join("big"), &content(1, 64 << 20));
    let mut host = Host::directory(served.path());
    let client = host.connect_once().await.unwrap();
    let (moved, moving) = tokio::sync::oneshot::channel::<()>();
    let moved = std::sync::Mutex::new(Some(moved));
    let observer: haul::Observer = Arc::new(move |event| {
        if let Event::Moved { .. } = event {
            drop(moved.lock().unwrap().take());
        }
    });
    let options = to(&[&source.path().join("big")], "big");
    let pushing = tokio::spawn(async move { client.push(&options, observer).await });
    let _ = moving.await;
    host.running.take().unwrap().abort();
    let ended = tokio::time::timeout(crate::support::LIMIT, pushing)
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(ended, Err(Error::Stopping)), "{ended:?}");
    assert!(!served.path().join("big").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_carries_both_directions_at_once() {
    let (source, served, back) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
    let (up, down) = (source.path().join("up"), served.path().join("down"));
    tree(&up);
    tree(&down);
    let store = Arc::new(LocalStore::open(served.path()).unwrap());
    let host = Host::serving(
        store,
        Config {
            max_transfers: 1,
            memory: 1 << 20,
            ..Config::default()
        },
    );
    let client = host.connect().await.unwrap();
    let (up_options, down_options) = (
        to(&[&up], "up"),
        crate::support::from(&["down"], &back.path().join("down")),
    );
    let pushing = client.push(&up_options, haul::ignore());
    let pulling = client.pull(&down_options, haul::ignore());
    let (pushed, pulled) = tokio::time::timeout(crate::support::LIMIT, async {
        tokio::join!(pushing, pulling)
    })
    .await
    .expect("no deadlock");
    assert_eq!(pushed.unwrap().sent.failed, 0);
    assert_eq!(pulled.unwrap().sent.failed, 0);
    assert_eq!(listing(&served.path().join("up")), listing(&up));
    assert_eq!(listing(&back.path().join("down")), listing(&down));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_server_finishes_transfers_under_way() {
    let source = tempdir().unwrap();
    for i in 0..200 {
        write(&source.path().join(format!("t/{i}")), &content(i, 300_000));
    }
    let store = Arc::new(MemoryStore::new().with_write_delay(Duration::from_millis(5)));
    let mut host = Host::serving(
        store.clone(),
        Config {
            max_transfers: 2,
            ..Config::default()
        },
    );
    let client = host.connect_once().await.unwrap();
    let (first, begun) = tokio::sync::oneshot::channel::<()>();
    let first = std::sync::Mutex::new(Some(first));
    let observer: haul::Observer = Arc::new(move |event| {
        if let Event::Settled { .. } = event {
            drop(first.lock().unwrap().take());
        }
    });
    let options = to(&[&source.path().join("t")], "t");
    let pushing = tokio::spawn(async move { client.push(&options, observer).await });
    let _ = begun.await;
    host.stop();
    let outcome = tokio::time::timeout(crate::support::LIMIT, pushing)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(outcome.sent.interrupted.is_some(), "the client is told");
    assert_eq!(
        outcome.sent.failed, 0,
        "what was not sent did not fail: {:?}",
        outcome.sent.failures
    );
    assert!(outcome.sent.files > 0 && outcome.sent.files < 200);
    assert_eq!(
        outcome.sent.files, outcome.summary.committed,
        "what was under way was committed"
    );
    host.stopped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_stops_at_once_and_informs_the_client() {
    let source = tempdir().unwrap();
    write(&source.path().join("big"), &content(1, 20 << 20));
    let store = Arc::new(MemoryStore::new().with_write_delay(Duration::from_millis(100)));
    let mut host = Host::serving(store, Config::default());
    let client = host.connect_once().await.unwrap();
    let (moved, moving) = tokio::sync::oneshot::channel::<()>();
    let moved = std::sync::Mutex::new(Some(moved));
    let observer: haul::Observer = Arc::new(move |event| {
        if let Event::Moved { .. } = event {
            drop(moved.lock().unwrap().take());
        }
    });
    let options = to(&[&source.path().join("big")], "big");
    let pushing = tokio::spawn(async move { client.push(&options, observer).await });
    let _ = moving.await;
    host.stop();
    host.stop_now();
    host.stopped().await;
    let ended = tokio::time::timeout(crate::support::LIMIT, pushing)
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(ended, Err(Error::Stopping)), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rerun_takes_over_from_a_dead_session() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let big = source.path().join("big");
    write(&big, &content(1, 8 << 20));
    let host = Host::serving(
        Arc::new(LocalStore::open(served.path()).unwrap()),
        Config {
            max_transfers: 1,
            ..Config::default()
        },
    );
    let identity = haul::Identity::generate().unwrap();
    let config = Config {
        keep_alive: Duration::from_secs(1),
        ..Config::default()
    };
    let first = host.connect_as(&identity, &config).await.unwrap();
    let (moved, moving) = tokio::sync::oneshot::channel::<()>();
    let moved = std::sync::Mutex::new(Some(moved));
    let observer: haul::Observer = Arc::new(move |event| {
        if let Event::Moved { .. } = event
            && let Some(moved) = moved.lock().unwrap().take()
        {
            // The sender pauses from here on, and holds the permit and the partial.
            drop(moved);
            std::thread::sleep(Duration::from_secs(3600));
        }
    });
    let options = to(&[&big], "big");
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let _ = runtime.block_on(first.push(&options, observer));
    });
    let _ = moving.await;
    let second = host
        .connect_as(&identity, &Config::default())
        .await
        .unwrap();
    let outcome = second
        .push(&to(&[&big], "big"), haul::ignore())
        .await
        .unwrap();
    assert_eq!(
        (outcome.sent.files, outcome.sent.failed),
        (1, 0),
        "{:?}",
        outcome.sent.failures
    );
    assert_eq!(
        std::fs::read(served.path().join("big")).unwrap(),
        std::fs::read(&big).unwrap()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resumed_transfer_does_not_resend_what_arrived() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let big = source.path().join("big");
    write(&big, &content(1, 32 << 20));
    let host = Host::directory(served.path());
    let identity = haul::Identity::generate().unwrap();
    let first = host
        .connect_as(&identity, &Config::default())
        .await
        .unwrap();
    let (moved, moving) = tokio::sync::oneshot::channel::<()>();
    let state = std::sync::Mutex::new((0, Some(moved)));
    let observer: haul::Observer = Arc::new(move |event| {
        if let Event::Moved { bytes, .. } = event {
            let mut state = state.lock().unwrap();
            state.0 += bytes;
            if state.0 > 20 << 20 {
                drop(state.1.take());
            }
        }
    });
    let options = to(&[&big], "big");
    let pushing = async { first.push(&options, observer).await };
    tokio::select! {
        _ = pushing => panic!("it should have been cut short"),
        _ = moving => {}
    }
    drop(first);
    assert_eq!(
        listing(served.path()).len(),
        1,
        "one partial, and nothing under the final name"
    );
    assert!(!served.path().join("big").exists());

    let second = host
        .connect_as(&identity, &Config::default())
        .await
        .unwrap();
    let (observer, events) = recorder();
    let outcome = second.push(&to(&[&big], "big"), observer).await.unwrap();
    assert_eq!(outcome.sent.failed, 0, "{:?}", outcome.sent.failures);
    let held = events.lock().unwrap().iter().find_map(|e| match e {
        Event::Started { held, .. } => Some(*held),
        _ => None,
    });
    assert!(
        held.unwrap() >= 1 << 20,
        "{held:?} bytes were there already"
    );
    assert_eq!(listing(served.path()).len(), 1);
    assert_eq!(
        std::fs::read(served.path().join("big")).unwrap(),
        std::fs::read(&big).unwrap()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_vanishes_before_it_is_sent_delays_nothing() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    for name in ["small", "large"] {
        write(
            &source.path().join("t").join(name),
            &content(1, if name == "small" { 10 } else { 1 << 20 }),
        );
    }
    write(&source.path().join("t/stays"), b"stays");
    // Neither end gives up by itself during this test.
    let config = Config {
        deadline: Duration::from_secs(3600),
        ..Config::default()
    };
    let host = Host::serving(
        Arc::new(LocalStore::open(served.path()).unwrap()),
        config.clone(),
    );
    let client = host
        .connect_as(&haul::Identity::generate().unwrap(), &config)
        .await
        .unwrap();
    let tree_at = source.path().join("t");
    let gone = tree_at.clone();
    let observer: haul::Observer = Arc::new(move |event| {
        // Everything is announced, and nothing new is sent yet: verdicts arrive later than this.
        if let Event::Found { files: 3, .. } = event {
            let _ = std::fs::remove_file(gone.join("small"));
            let _ = std::fs::remove_file(gone.join("large"));
        }
    });
    let options = to(&[&tree_at], "t");
    let pushing = client.push(&options, observer);
    let outcome = tokio::time::timeout(crate::support::LIMIT, pushing)
        .await
        .expect("nobody waits")
        .unwrap();
    let mut gone: Vec<_> = outcome
        .sent
        .omitted
        .iter()
        .map(|(p, w)| (p.to_string(), w.code))
        .collect();
    gone.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(
        gone,
        [
            ("t/large".into(), Code::Vanished),
            ("t/small".into(), Code::Vanished)
        ]
    );
    assert_eq!((outcome.sent.vanished, outcome.sent.failed), (2, 0));
    assert_eq!(outcome.summary.failed, 0, "the receiver knows as well");
    assert_eq!(
        listing(served.path()).len(),
        2,
        "t and t/stays: {:?}",
        listing(served.path())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_changes_while_it_is_sent_fails_as_changed() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let big = source.path().join("big");
    write(&big, &content(1, 16 << 20));
    let host = Host::directory(served.path());
    let client = host.connect().await.unwrap();
    for change in ["grow", "shrink", "replace", "touch"] {
        let (file, once) = (big.clone(), std::sync::Once::new());
        let observer: haul::Observer = Arc::new(move |event| {
            if let Event::Moved { .. } = event {
                once.call_once(|| match change {
                    "grow" => {
                        use std::io::Write;
                        std::fs::OpenOptions::new()
                            .append(true)
                            .open(&file)
                            .unwrap()
                            .write_all(b"more")
                            .unwrap();
                    }
                    "shrink" => std::fs::OpenOptions::new()
                        .write(true)
                        .open(&file)
                        .unwrap()
                        .set_len(100)
                        .unwrap(),
                    "replace" => {
                        std::fs::write(file.with_extension("new"), content(2, 16 << 20)).unwrap();
                        std::fs::rename(file.with_extension("new"), &file).unwrap();
                    }
                    _ => std::fs::write(&file, content(3, 16 << 20)).unwrap(),
                });
            }
        });
        let outcome = client.push(&to(&[&big], change), observer).await.unwrap();
        assert_eq!(outcome.sent.failures.len(), 1, "{change}");
        assert_eq!(
            outcome.sent.failures[0].1.code,
            Code::Changed,
            "{change}: {:?}",
            outcome.sent.failures
        );
        assert!(!served.path().join(change).exists());
        write(&big, &content(1, 16 << 20));
    }
    assert!(
        listing(served.path()).is_empty(),
        "nothing is kept of what is no version of the file"
    );
}

fn limited(bytes: u64) -> Config {
    Config {
        limit: haul::Rate::from_bytes(bytes),
        ..Config::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rate_limit_holds_for_large_and_small_files() {
    let source = tempdir().unwrap();
    write(&source.path().join("t/large"), &content(1, 500_000));
    for i in 0..50 {
        write(&source.path().join(format!("t/{i}")), &content(i, 10_000));
    }
    let store = Arc::new(MemoryStore::new());
    let host = Host::serving(store, Config::default());
    let client = host
        .connect_as(&haul::Identity::generate().unwrap(), &limited(500_000))
        .await
        .unwrap();
    let begun = std::time::Instant::now();
    let outcome = client
        .push(&to(&[&source.path().join("t")], "t"), haul::ignore())
        .await
        .unwrap();
    assert_eq!(
        (outcome.sent.files, outcome.sent.failed),
        (51, 0),
        "{:?}",
        outcome.sent.failures
    );
    // A megabyte: it cannot be faster than the limit, however slow the machine.
    assert!(
        begun.elapsed() >= Duration::from_millis(1_950),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_obeys_the_lower_of_both_rate_limits() {
    for (own, asked) in [
        (None, Some(500_000)),
        (Some(500_000), None),
        (Some(500_000), Some(50_000_000)),
    ] {
        let served = tempdir().unwrap();
        write(&served.path().join("f"), &content(1, 1_000_000));
        let config = |limit: Option<u64>| limit.map_or_else(Config::default, limited);
        let host = Host::serving(
            Arc::new(LocalStore::open(served.path()).unwrap()),
            config(own),
        );
        let client = host
            .connect_as(&haul::Identity::generate().unwrap(), &config(asked))
            .await
            .unwrap();
        let into = tempdir().unwrap();
        let begun = std::time::Instant::now();
        let pulled = client
            .pull(&crate::support::from(&["f"], into.path()), haul::ignore())
            .await
            .unwrap();
        assert_eq!(
            (pulled.sent.bytes, pulled.summary.bytes),
            (1_000_000, 1_000_000)
        );
        assert!(
            begun.elapsed() >= Duration::from_millis(1_950),
            "{own:?} {asked:?}: {:?}",
            begun.elapsed()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_for_a_rate_limit_is_not_a_timeout() {
    let source = tempdir().unwrap();
    for i in 0..300 {
        write(&source.path().join(format!("t/{i}")), &content(i, 300));
    }
    // Each of the 300 waits for its turn longer than the deadline, which must be over the 5 s between two Workings.
    let config = Config {
        deadline: Duration::from_secs(6),
        ..limited(8_000)
    };
    let host = Host::serving(
        Arc::new(MemoryStore::new()),
        Config {
            limit: None,
            ..config.clone()
        },
    );
    let client = host
        .connect_as(&haul::Identity::generate().unwrap(), &config)
        .await
        .unwrap();
    let outcome = client
        .push(&to(&[&source.path().join("t")], "t"), haul::ignore())
        .await
        .unwrap();
    assert_eq!(
        (outcome.sent.files, outcome.sent.failed),
        (300, 0),
        "{:?}",
        outcome.sent.failures
    );
}

/// Pushes one file of two mebibytes over a connection with these settings.
async fn verdict(store: MemoryStore, config: Config) -> haul::Outcome {
    let source = tempdir().unwrap();
    write(&source.path().join("f"), &content(1, 2 << 20));
    let host = Host::serving(
        Arc::new(store),
        Config {
            memory: 1 << 20,
            ..Config::default()
        },
    );
    let client = host
        .connect_as(&haul::Identity::generate().unwrap(), &config)
        .await
        .unwrap();
    let outcome = client
        .push(&to(&[&source.path().join("f")], "f"), haul::ignore())
        .await
        .unwrap();
    assert_eq!(outcome.sent.failed, 0, "{:?}", outcome.sent.failures);
    outcome
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_receiving_disk_is_reported_as_the_bottleneck() {
    let store = MemoryStore::new().with_write_delay(Duration::from_millis(300));
    let outcome = verdict(store, Config::default()).await;
    assert_eq!(
        outcome.bottleneck,
        haul::Bottleneck::ReceiverStore,
        "{:?}",
        outcome.time_breakdown
    );
    assert!(
        outcome.summary.held_up.unwrap() > 0,
        "the receiver says so itself"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_low_rate_limit_is_reported_as_the_bottleneck() {
    let outcome = verdict(MemoryStore::new(), limited(1_000_000)).await;
    assert_eq!(
        outcome.bottleneck,
        haul::Bottleneck::Limit,
        "{:?}",
        outcome.time_breakdown
    );
    let path = outcome.path;
    assert!(
        path.sent_bytes > 2 << 20 && path.sent_packets > 300 && path.received_bytes > 0,
        "{path:?}"
    );
    assert!(
        path.rate > 0 && path.mtu >= 1_200 && path.rtt >= path.min_rtt && !path.rtt.is_zero(),
        "{path:?}"
    );
}
