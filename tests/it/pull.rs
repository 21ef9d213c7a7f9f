//! Files and directories fetched from a server: where they are put, what fails, and what a lost connection leaves.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::support::command::{Serving, haul, is_root};
use crate::support::{Host, LIMIT, content, from, listing, pull, recorder, write};
use haul::{
    AcceptedQuota, Code, Config, Error, Event, Identity, LocalStore, Observer, PullOptions, Reason,
    Settled,
};
use tempfile::tempdir;

/// Every kind of entry that this version transfers.
fn tree(root: &Path) {
    write(&root.join("empty"), b"");
    write(&root.join("small"), &content(1, 1000));
    write(&root.join("d/large"), &content(2, 3 << 20));
    write(&root.join("d/-n\n\x1b[2J"), b"odd name");
    symlink("../nowhere", root.join("d/link")).unwrap();
    std::fs::create_dir_all(root.join("hollow")).unwrap();
    std::fs::set_permissions(root.join("small"), PermissionsExt::from_mode(0o640)).unwrap();
    std::fs::set_permissions(root.join("hollow"), PermissionsExt::from_mode(0o751)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_arrives_whole_and_a_rerun_fetches_nothing() {
    let (served, here) = (tempdir().unwrap(), tempdir().unwrap());
    tree(&served.path().join("t"));
    let host = Host::directory(served.path());
    let options = from(&["t"], &here.path().join("got"));
    let outcome = pull(&host, &options).await.unwrap();
    assert_eq!(
        (
            outcome.sent.files,
            outcome.sent.skipped,
            outcome.sent.failed
        ),
        (5, 0, 0)
    );
    assert_eq!(outcome.sent.bytes, 1000 + (3 << 20) + 8);
    assert_eq!(
        listing(&here.path().join("got")),
        listing(&served.path().join("t"))
    );
    let again = pull(&host, &options).await.unwrap();
    assert_eq!(
        (
            again.sent.files,
            again.sent.bytes,
            again.sent.skipped,
            again.sent.failed
        ),
        (0, 0, 5, 0)
    );
    assert!(
        again.path.received_bytes > 0,
        "the path is known from this end too"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_takes_no_more_than_was_accepted() {
    let (served, here) = (tempdir().unwrap(), tempdir().unwrap());
    for number in 0..20 {
        write(
            &served.path().join(format!("t/{number:02}")),
            &content(number, 1000),
        );
    }
    let host = Host::directory(served.path());
    for (most, files) in [
        // The last entry is the directory itself.
        (
            AcceptedQuota {
                entries: 21,
                bytes: Some(20_000),
            },
            20,
        ),
        (
            AcceptedQuota {
                entries: 5,
                bytes: Some(20_000),
            },
            5,
        ),
        (
            AcceptedQuota {
                entries: 21,
                bytes: Some(7_999),
            },
            7,
        ),
        (
            AcceptedQuota {
                entries: 21,
                bytes: None,
            },
            20,
        ),
    ] {
        let here = here.path().join(format!("{most:?}"));
        let outcome = pull(
            &host,
            &PullOptions {
                quota: Some(most),
                ..from(&["t"], &here)
            },
        )
        .await
        .unwrap();
        assert_eq!(outcome.sent.files, files, "{most:?}");
        assert_eq!(std::fs::read_dir(&here).unwrap().count() as u64, files);
        let refused = |(_, why): &(_, Reason)| {
            why.code == Code::NotWanted && why.text.contains("than was offered")
        };
        assert_eq!(outcome.sent.failed > 0, files < 20);
        assert!(
            outcome.sent.failures.iter().all(refused),
            "{:?}",
            outcome.sent.failures
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_puts_files_where_a_push_would() {
    let served = tempdir().unwrap();
    write(&served.path().join("a/f"), b"f");
    write(&served.path().join("b/g"), b"g");
    let host = Host::directory(served.path());
    let cases: [(&[&str], &str, &[&str]); 10] = [
        (&["a"], "new", &["new", "new/f"]),
        (&["a"], "there", &["there", "there/f"]),
        (&["a"], "new/", &["new", "new/a", "new/a/f"]),
        (
            &["a"],
            "deep/er/",
            &["deep", "deep/er", "deep/er/a", "deep/er/a/f"],
        ),
        (&["a/f"], "x", &["x"]),
        (&["a/f"], "there", &["there", "there/f"]),
        (&["a/f"], "deep/x", &["deep", "deep/x"]),
        (&["a", "b/g"], "new", &["new", "new/a", "new/a/f", "new/g"]),
        (
            &[""],
            "new",
            &["new", "new/a", "new/a/f", "new/b", "new/b/g"],
        ),
        (&["a"], "there/.", &["there", "there/a", "there/a/f"]),
    ];
    for (sources, destination, expected) in cases {
        let here = tempdir().unwrap();
        if destination.starts_with("there") {
            std::fs::create_dir(here.path().join("there")).unwrap();
        }
        let outcome = pull(&host, &from(sources, &here.path().join(destination)))
            .await
            .unwrap();
        assert_eq!(outcome.sent.failed, 0, "{sources:?} {destination}");
        assert_eq!(names(here.path()), expected, "{sources:?} {destination}");
    }
}

/// Every path below a directory, sorted.
fn names(root: &Path) -> Vec<String> {
    fn walk(root: &Path, at: &Path, all: &mut Vec<String>) {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            all.push(
                path.strip_prefix(root)
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_owned(),
            );
            if path.symlink_metadata().unwrap().is_dir() {
                walk(root, &path, all);
            }
        }
    }
    let mut all = Vec::new();
    walk(root, root, &mut all);
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_are_followed_to_a_destination_but_not_inside_it() {
    let (served, here, elsewhere) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
    write(&served.path().join("a/d/f"), b"new");
    write(&elsewhere.path().join("f"), b"untouched");
    symlink(elsewhere.path(), here.path().join("inbox")).unwrap();
    std::fs::create_dir(elsewhere.path().join("a")).unwrap();
    symlink("..", elsewhere.path().join("a/d")).unwrap();
    let host = Host::directory(served.path());
    let outcome = pull(&host, &from(&["a"], &here.path().join("inbox/")))
        .await
        .unwrap();
    assert!(
        outcome.sent.failed > 0,
        "a link stands where a directory should be"
    );
    assert_eq!(
        std::fs::read(elsewhere.path().join("f")).unwrap(),
        b"untouched"
    );
    assert!(here.path().join("inbox").is_symlink());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_pull_creates_nothing() {
    let (served, here) = (tempdir().unwrap(), tempdir().unwrap());
    write(&served.path().join("a/f"), b"f");
    write(&here.path().join("file"), b"mine");
    let host = Host::directory(served.path());
    for destination in ["file", "file/", "file/below"] {
        let error = pull(&host, &from(&["a"], &here.path().join(destination)))
            .await
            .unwrap_err();
        assert!(
            matches!(&error, Error::Refused(_) | Error::Io { .. }),
            "{error:?}"
        );
        assert!(error.to_string().contains("file"), "{error}");
    }
    let error = pull(&host, &from(&["nowhere"], &here.path().join("new/er")))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Refused(why) if why.code == Code::NotFound),
        "{error:?}"
    );
    assert!(
        error.to_string().starts_with("nowhere: no such file"),
        "{error}"
    );
    assert_eq!(names(here.path()), ["file"]);
    assert_eq!(std::fs::read(here.path().join("file")).unwrap(), b"mine");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unsendable_files_are_reported_and_the_rest_arrives() {
    let server = Serving::start_as_nobody(&[]);
    let here = tempdir().unwrap();
    let t = server.served.path().join("t");
    write(&t.join("fine"), &content(1, 400_000));
    write(&t.join("closed"), &content(2, 400_000));
    write(&t.join("private/x"), b"x");
    std::fs::set_permissions(t.join("closed"), PermissionsExt::from_mode(0o000)).unwrap();
    std::fs::set_permissions(t.join("private"), PermissionsExt::from_mode(0o700)).unwrap();
    if !is_root() {
        // The test's own user serves, and can read its own files.
        std::fs::set_permissions(t.join("private"), PermissionsExt::from_mode(0o000)).unwrap();
    }
    rustix::fs::mkfifoat(rustix::fs::CWD, t.join("fifo"), rustix::fs::Mode::RUSR).unwrap();
    let client = server.connect().await;
    let (observer, events) = recorder();
    let options = from(&["t", "missing"], here.path());
    let outcome = tokio::time::timeout(LIMIT, client.pull(&options, observer))
        .await
        .unwrap()
        .unwrap();
    client.close().await;
    let mut failed: Vec<_> = outcome
        .sent
        .failures
        .iter()
        .map(|(path, why)| (path.to_string(), why.code))
        .collect();
    failed.sort_by(|a, b| a.0.cmp(&b.0));
    let expected = [
        ("missing", Code::NotFound),
        ("t/closed", Code::PermissionDenied),
        ("t/private", Code::PermissionDenied),
    ];
    assert_eq!(failed, expected.map(|(path, code)| (path.to_owned(), code)));
    assert_eq!((outcome.sent.files, outcome.sent.failed), (1, 3));
    assert_eq!(outcome.sent.specials, 1);
    let is_failure = |event: &&Event| {
        matches!(
            event,
            Event::Settled {
                result: Settled::Failed(_),
                ..
            }
        )
    };
    assert_eq!(
        events.lock().unwrap().iter().filter(is_failure).count(),
        3,
        "each is told once"
    );
    assert_eq!(
        std::fs::read(here.path().join("t/fine")).unwrap(),
        content(1, 400_000)
    );
    std::fs::set_permissions(t.join("private"), PermissionsExt::from_mode(0o700)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_of_a_pull_is_reported_as_in_a_push() {
    let (served, here) = (tempdir().unwrap(), tempdir().unwrap());
    tree(&served.path().join("t"));
    let host = Host::directory(served.path());
    let client = host.connect().await.unwrap();
    let (observer, events) = recorder();
    client
        .pull(&from(&["t"], here.path()), observer)
        .await
        .unwrap();
    let events = events.lock().unwrap();
    let total = 1000 + (3 << 20) + 8;
    let complete = |e: &Event| matches!(e, Event::Found { files: 5, bytes, complete: true } if *bytes == total);
    assert!(events.iter().any(complete), "{events:?}");
    let moved: u64 = events
        .iter()
        .map(|e| {
            if let Event::Moved { bytes, .. } = e {
                *bytes
            } else {
                0
            }
        })
        .sum();
    assert_eq!(moved, total);
    assert!(matches!(events[0], Event::Connected { .. }));
}

/// Notifies once this many bytes have moved.
fn once_moved(
    many: u64,
) -> (
    Observer,
    tokio::sync::oneshot::Receiver<()>,
    Arc<Mutex<Vec<Event>>>,
) {
    let (to, reached) = tokio::sync::oneshot::channel();
    let (record, events) = recorder();
    let (to, moved) = (Mutex::new(Some(to)), AtomicU64::new(0));
    let observer: Observer = Arc::new(move |event| {
        if let Event::Moved { bytes, .. } = &event
            && moved.fetch_add(*bytes, Ordering::SeqCst) + bytes >= many
            && let Some(to) = to.lock().unwrap().take()
        {
            let _ = to.send(());
        }
        record(event);
    });
    (observer, reached, events)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_pull_resumes_from_partials() {
    let (served, here) = (tempdir().unwrap(), tempdir().unwrap());
    write(&served.path().join("big"), &content(1, 48 << 20));
    let host = Host::directory(served.path());
    let client = host.connect_once().await.unwrap();
    let (observer, reached, _) = once_moved(24 << 20);
    let options = from(&["big"], &here.path().join("big"));
    {
        let pulling = client.pull(&options, observer);
        tokio::pin!(pulling);
        tokio::select! {
            _ = &mut pulling => panic!("it was too fast"),
            _ = reached => {}
        }
    }
    client.close().await;
    assert!(!here.path().join("big").exists(), "never half a file");
    let (observer, events) = recorder();
    let client = host.connect().await.unwrap();
    let outcome = client.pull(&options, observer).await.unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.failed), (1, 0));
    let held = events.lock().unwrap().iter().find_map(|e| {
        if let Event::Started { held, .. } = e {
            Some(*held)
        } else {
            None
        }
    });
    assert!(held.unwrap() >= 16 << 20, "{held:?}");
    assert_eq!(listing(here.path()), listing(served.path()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_server_reports_an_incomplete_manifest() {
    // More than a sender announces before anything is settled.
    const FILES: u64 = 12_000;
    let (served, here) = (tempdir().unwrap(), tempdir().unwrap());
    for i in 0..FILES {
        write(&served.path().join(format!("t/{i}")), &content(i, 200));
    }
    let mut host = Host::serving(
        Arc::new(LocalStore::open(served.path()).unwrap()),
        Config::default(),
    );
    let identity = Identity::generate().unwrap();
    let config = Config {
        retry_for: std::time::Duration::ZERO,
        limit: "40M".parse().ok(),
        ..Config::default()
    };
    let client = host.connect_as(&identity, &config).await.unwrap();
    let (observer, reached, _) = once_moved(100_000);
    let options = from(&["t"], here.path());
    let pulling = tokio::spawn(async move { client.pull(&options, observer).await });
    reached.await.unwrap();
    host.stop();
    let outcome = tokio::time::timeout(LIMIT, pulling)
        .await
        .expect("it ends")
        .unwrap()
        .unwrap();
    assert!(outcome.sent.interrupted.is_some(), "{:?}", outcome.sent);
    assert!(
        outcome.sent.files < FILES && outcome.sent.failed == 0,
        "{:?}",
        outcome.sent
    );
    host.stopped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sources_that_would_overwrite_each_other_are_refused() {
    let (served, here) = (tempdir().unwrap(), tempdir().unwrap());
    write(&served.path().join("a/x"), b"1");
    write(&served.path().join("b/x"), b"2");
    let host = Host::directory(served.path());
    let error = pull(&host, &from(&["a/x", "b/x"], here.path()))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Usage(why) if why.contains("two sources named x")),
        "{error:?}"
    );
    assert_eq!(names(here.path()), Vec::<String>::new());
}

/// `haul cp ARGUMENTS`, with `@` for the server.
fn cp(server: &Serving, here: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let (pin, url) = (server.key_id.to_string(), server.url.trim_end_matches('/'));
    let arguments: Vec<String> = arguments.iter().map(|a| a.replace('@', url)).collect();
    let all: Vec<&str> = ["cp", "--pin", &pin]
        .into_iter()
        .chain(arguments.iter().map(String::as_str))
        .collect();
    let output = haul(here, &all);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[test]
fn the_command_fetches_as_scp_does() {
    let (server, here) = (Serving::start(&[]), tempdir().unwrap());
    tree(&server.served.path().join("t"));
    let (code, said, told) = cp(&server, here.path(), &["-r", "@/t", "."]);
    assert_eq!((code, &said[..]), (Some(0), ""), "{told}");
    assert!(told.starts_with("5 files, 3.00 MiB in "), "{told}");
    assert_eq!(
        listing(&here.path().join("t")),
        listing(&server.served.path().join("t"))
    );
    let (code, _, told) = cp(&server, here.path(), &["@/t", "."]);
    assert_eq!(code, Some(0));
    assert!(
        told.starts_with("nothing to do in ") && told.contains("5 files unchanged"),
        "{told}"
    );

    let (code, said, _) = cp(
        &server,
        here.path(),
        &["--json", "@/t/small", "@/t/d", "two"],
    );
    assert_eq!(code, Some(0));
    let done = said.lines().last().unwrap();
    assert!(
        done.contains(r#""type":"done""#) && done.contains(r#""files":4"#),
        "{done}"
    );
    assert!(said.contains(r#""path":"small""#), "{said}");
    assert_eq!(
        std::fs::read(here.path().join("two/small")).unwrap(),
        content(1, 1000)
    );

    let (code, _, told) = cp(&server, here.path(), &["-v", "@/t/small", "again"]);
    assert_eq!(code, Some(0));
    assert!(
        told.lines().any(|line| line == "small") && told.contains("  path "),
        "{told}"
    );
    let (code, _, told) = cp(
        &server,
        here.path(),
        &["-q", "@/t/small", "@/nowhere", "quiet"],
    );
    assert_eq!(
        (code, &told[..]),
        (
            Some(1),
            "haul: nowhere: no such file or directory; check the name\n"
        )
    );
}

#[test]
fn impossible_copies_are_refused_with_an_explanation() {
    let (server, here) = (Serving::start(&[]), tempdir().unwrap());
    let refused = |arguments: &[&str]| {
        let (code, _, told) = cp(&server, here.path(), arguments);
        assert_eq!((code, told.lines().count()), (Some(2), 1), "{told}");
        told
    };
    assert!(refused(&["@/a", "haul://other/b"]).contains("server to server"));
    assert!(refused(&["@/a", "haul://other/b", "."]).contains("two servers"));
    assert!(refused(&["@/a", "b", "."]).contains("cannot copy b: it is local"));
    assert!(refused(&["a", "b"]).contains("not a server"));
    let (code, _, told) = cp(&server, here.path(), &["@/nowhere", "."]);
    assert_eq!(
        (code, &told[..]),
        (
            Some(1),
            "haul: nowhere: no such file or directory; check the name\n"
        )
    );
    assert_eq!(names(here.path()), Vec::<String>::new());
}
