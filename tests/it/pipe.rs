//! Content from a pipe, of unknown length and committed only at a clean end; and content to a pipe, in order.

use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use crate::support::{Host, LIMIT, content, listing, path, recorder, write};
use haul::{Code, Config, Durability, Error, Event, LocalStore, MemoryStore, PushOptions, Store};
use tempfile::tempdir;

/// An input that yields what is sent to it. It ends when the sender is dropped, or with a failure.
struct Fed(mpsc::Receiver<io::Result<Vec<u8>>>);

impl Read for Fed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Ok(next) = self.0.recv() else {
            return Ok(0);
        };
        let next = next?;
        buffer[..next.len()].copy_from_slice(&next);
        Ok(next.len())
    }
}

fn fed() -> (mpsc::Sender<io::Result<Vec<u8>>>, Fed) {
    let (feed, input) = mpsc::channel();
    (feed, Fed(input))
}

fn named(name: &str) -> PushOptions {
    PushOptions {
        destination: path(name),
        durability: Durability::Visible,
        ..PushOptions::default()
    }
}

/// Runs `haul cp - haul://HOST/DESTINATION`; its input is not ended.
fn haul_cp(host: &Host, home: &Path, destination: &str) -> Child {
    std::fs::set_permissions(home, PermissionsExt::from_mode(0o700)).unwrap();
    Command::new(env!("CARGO_BIN_EXE_haul"))
        .args([
            "cp",
            "-",
            &format!("haul://{}/{destination}", host.address),
            "--pin",
            &host.key_id.to_string(),
        ])
        .env("HAUL_HOME", home)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits until the served directory is as expected; the test's own limit bounds the wait.
async fn until(mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait)
        .await
        .expect("it comes about");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn piped_input_becomes_a_file_only_at_its_end() {
    let (there, home) = (tempdir().unwrap(), tempdir().unwrap());
    write(&there.path().join("d.tar"), b"old");
    let host = Host::directory(there.path());
    let mut haul = haul_cp(&host, home.path(), "d.tar");
    let bytes = content(1, 5_000_000);
    let mut input = haul.stdin.take().unwrap();
    let (first, rest) = bytes.split_at(3_000_000);
    input.write_all(first).unwrap();
    // Everything has arrived except what the pipe still holds, under no name that a user looks for.
    until(|| {
        std::fs::read_dir(there.path())
            .unwrap()
            .any(|e| e.unwrap().metadata().unwrap().len() > 1_000_000)
    })
    .await;
    assert_eq!(std::fs::read(there.path().join("d.tar")).unwrap(), b"old");
    input.write_all(rest).unwrap();
    drop(input);
    let ended = haul.wait_with_output().unwrap();
    assert_eq!(
        ended.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&ended.stderr)
    );
    assert!(
        String::from_utf8_lossy(&ended.stderr).contains("1 file, 4.77 MiB"),
        "{ended:?}"
    );
    assert!(std::fs::read(there.path().join("d.tar")).unwrap() == bytes);
    assert_eq!(listing(there.path()).len(), 1, "no partial is left");

    let mut haul = haul_cp(&host, home.path(), "new/empty");
    drop(haul.stdin.take());
    assert_eq!(haul.wait_with_output().unwrap().status.code(), Some(0));
    assert_eq!(std::fs::read(there.path().join("new/empty")).unwrap(), b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn piped_input_needs_a_name() {
    let (there, home) = (tempdir().unwrap(), tempdir().unwrap());
    std::fs::create_dir(there.path().join("dir")).unwrap();
    let host = Host::directory(there.path());
    for (destination, code, says) in [
        (
            "",
            2,
            "cannot send standard input without a name: write haul://127.0.0.1:",
        ),
        ("dir/", 2, "/dir/name.tar"),
        (
            "dir",
            1,
            "dir/dir: cannot write data of a pipe: the destination is a directory; give a full file name",
        ),
    ] {
        // Its input does not end, and that delays nothing.
        let mut haul = haul_cp(&host, home.path(), destination);
        let input = haul.stdin.take();
        let ended = tokio::task::spawn_blocking(move || haul.wait_with_output().unwrap())
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(
            ended.status.code() == Some(code) && said.contains(says),
            "{destination}: {said}"
        );
        drop(input);
    }
    assert_eq!(listing(there.path()).len(), 1, "nothing was made");
    let client = host.connect().await.unwrap();
    let into = PushOptions {
        into: true,
        ..named("dir")
    };
    let refused = client.push_from(io::empty(), &into, haul::ignore()).await;
    assert!(matches!(refused, Err(Error::Usage(_))), "{refused:?}");
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_input_that_fails_commits_nothing() {
    let there = tempdir().unwrap();
    write(&there.path().join("f"), b"old");
    let host = Host::directory(there.path());
    let client = host.connect().await.unwrap();
    for broken in [true, false] {
        let (feed, input) = fed();
        let (observer, events) = recorder();
        feed.send(Ok(content(1, 60_000))).unwrap();
        let options = named("f");
        let push = client.push_from(input, &options, observer);
        tokio::pin!(push);
        let moved = || {
            events
                .lock()
                .unwrap()
                .iter()
                .any(|event| matches!(event, Event::Moved { .. }))
        };
        tokio::select! {
            ended = &mut push => panic!("{ended:?}"),
            () = until(moved) => {}
        }
        if broken {
            feed.send(Err(io::Error::other("the tape broke"))).unwrap();
            let outcome = push.await.unwrap();
            let (failed, why) = &outcome.sent.failures[0];
            assert_eq!(
                (failed.to_string().as_str(), why.code),
                ("f", Code::Unreadable)
            );
            assert!(why.text.contains("the tape broke"), "{why}");
            assert_eq!(outcome.summary.failed, 1);
        }
        // Otherwise it is dropped here, as Ctrl-C does it.
    }
    client.close().await;
    until(|| listing(there.path()).len() == 1).await;
    assert_eq!(std::fs::read(there.path().join("f")).unwrap(), b"old");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_client_commits_no_input_and_a_rerun_starts_over() {
    let (there, home) = (tempdir().unwrap(), tempdir().unwrap());
    let config = Config {
        idle_timeout: Duration::from_secs(2),
        ..Config::default()
    };
    let host = Host::serving(Arc::new(LocalStore::open(there.path()).unwrap()), config);
    let mut haul = haul_cp(&host, home.path(), "f");
    haul.stdin
        .as_mut()
        .unwrap()
        .write_all(&content(1, 3_000_000))
        .unwrap();
    until(|| {
        std::fs::read_dir(there.path())
            .unwrap()
            .any(|e| e.unwrap().metadata().unwrap().len() > 1_000_000)
    })
    .await;
    haul.kill().unwrap();
    haul.wait().unwrap();
    assert!(!there.path().join("f").exists());
    // Less than before: none of the old content may remain.
    let mut haul = haul_cp(&host, home.path(), "f");
    haul.stdin.take().unwrap().write_all(b"short").unwrap();
    assert_eq!(haul.wait_with_output().unwrap().status.code(), Some(0));
    assert_eq!(std::fs::read(there.path().join("f")).unwrap(), b"short");
    until(|| listing(there.path()).len() == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endless_input_ends_when_the_disk_is_full() {
    let store = MemoryStore::with_capacity(4 << 20);
    let host = Host::serving(Arc::new(store.clone()), Config::default());
    let client = host.connect().await.unwrap();
    let options = named("f");
    let outcome = tokio::time::timeout(
        LIMIT,
        client.push_from(io::repeat(7), &options, haul::ignore()),
    );
    let outcome = outcome.await.expect("it ends").unwrap();
    assert_eq!(outcome.sent.failures[0].1.code, Code::NoSpace);
    assert!(store.stat(&path("f")).unwrap().is_none());
    assert_eq!(
        store.sweep(Duration::ZERO).unwrap(),
        0,
        "its space is given back"
    );
    // An input that yields nothing more is not waited for either.
    let (feed, input) = fed();
    (0..100).for_each(|_| feed.send(Ok(vec![1; 50_000])).unwrap());
    let options = named("g");
    let outcome = tokio::time::timeout(LIMIT, client.push_from(input, &options, haul::ignore()));
    assert_eq!(
        outcome.await.expect("it ends").unwrap().sent.failures[0]
            .1
            .code,
        Code::NoSpace
    );
    drop(feed);
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_connection_reports_that_the_input_is_lost() {
    let there = tempdir().unwrap();
    let mut host = Host::directory(there.path());
    let client = host.connect().await.unwrap();
    let (feed, input) = fed();
    let (observer, events) = recorder();
    feed.send(Ok(content(1, 60_000))).unwrap();
    let options = named("f");
    let push = client.push_from(input, &options, observer);
    tokio::pin!(push);
    let moved = || {
        events
            .lock()
            .unwrap()
            .iter()
            .any(|event| matches!(event, Event::Moved { .. }))
    };
    tokio::select! {
        ended = &mut push => panic!("{ended:?}"),
        () = until(moved) => {}
    }
    host.stop();
    host.stop_now();
    let lost = tokio::time::timeout(LIMIT, push)
        .await
        .expect("it ends")
        .unwrap_err();
    assert!(
        matches!(&lost, Error::Lost(why) if why.contains("the input was read already")),
        "{lost:?}"
    );
    assert!(
        !events
            .lock()
            .unwrap()
            .iter()
            .any(|event| matches!(event, Event::Reconnecting { .. }))
    );
    host.stopped().await;
    assert_eq!(listing(there.path()), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_input_may_be_silent_for_longer_than_any_deadline() {
    let there = tempdir().unwrap();
    // For an input that yields nothing, `Working` is sent every 5 s.
    let config = Config {
        deadline: Duration::from_secs(6),
        ..Config::default()
    };
    let host = Host::serving(
        Arc::new(LocalStore::open(there.path()).unwrap()),
        config.clone(),
    );
    let client = host
        .connect_as(&haul::Identity::generate().unwrap(), &config)
        .await
        .unwrap();
    let (feed, input) = fed();
    feed.send(Ok(b"before ".to_vec())).unwrap();
    let options = named("f");
    let push = client.push_from(input, &options, haul::ignore());
    let feeding = async {
        tokio::time::sleep(Duration::from_secs(14)).await;
        feed.send(Ok(b"after".to_vec())).unwrap();
        drop(feed);
    };
    let (outcome, ()) = tokio::join!(push, feeding);
    assert_eq!(outcome.unwrap().sent.failed, 0);
    assert_eq!(
        std::fs::read(there.path().join("f")).unwrap(),
        b"before after"
    );
    client.close().await;
}

/// Runs `haul cp haul://HOST/SOURCE -`. Returns its output.
fn haul_out(host: &Host, home: &Path, arguments: &[&str], source: &str) -> std::process::Output {
    std::fs::set_permissions(home, PermissionsExt::from_mode(0o700)).unwrap();
    Command::new(env!("CARGO_BIN_EXE_haul"))
        .args([
            "cp",
            "--pin",
            &host.key_id.to_string(),
            &format!("haul://{}/{source}", host.address),
            "-",
        ])
        .args(arguments)
        .env("HAUL_HOME", home)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_written_unchanged_to_a_pipe() {
    let (served, home) = (tempdir().unwrap(), tempdir().unwrap());
    let large = content(1, 5 << 20);
    write(&served.path().join("d/large"), &large);
    write(&served.path().join("small"), b"small");
    write(&served.path().join("empty"), b"");
    let sparse = std::fs::File::create(served.path().join("sparse")).unwrap();
    sparse.set_len(3 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"in the middle", 1 << 20).unwrap();
    let host = Host::directory(served.path());
    for source in ["d/large", "small", "empty", "sparse"] {
        let output = haul_out(&host, home.path(), &[], source);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{source}: {said}");
        assert!(
            output.stdout == std::fs::read(served.path().join(source)).unwrap(),
            "{source}"
        );
        assert!(said.contains("1 file, "), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_incomplete_output_is_reported_and_exits_with_1() {
    let (served, home) = (tempdir().unwrap(), tempdir().unwrap());
    write(&served.path().join("d/f"), b"inside");
    write(&served.path().join("f"), &content(1, 3 << 20));
    let host = Host::directory(served.path());
    for (arguments, source, code, says) in [
        (&[][..], "missing", 1, "missing"),
        (&[], "d", 1, "cannot write d to a pipe: it is a directory"),
        (&[], "", 2, "several sources to -: it takes one file"),
        (
            &["--json"],
            "f",
            2,
            "cannot use --json and - together: both write to standard output",
        ),
    ] {
        let output = haul_out(&host, home.path(), arguments, source);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(code) && said.contains(says),
            "{source}: {said}"
        );
        assert!(
            code == 2 || said.contains("the output is incomplete"),
            "{source}: {said}"
        );
        assert!(code == 2 || output.stdout.is_empty(), "{source}");
    }
    // The reader does not read to the end.
    let mut haul = Command::new(env!("CARGO_BIN_EXE_haul"))
        .args([
            "cp",
            "--pin",
            &host.key_id.to_string(),
            &format!("haul://{}/f", host.address),
            "-",
        ])
        .env("HAUL_HOME", home.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut begin = [0; 10];
    haul.stdout.take().unwrap().read_exact(&mut begin).unwrap();
    assert_eq!(begin, content(1, 3 << 20)[..10]);
    let ended = haul.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(
        said.contains("f: cannot write it: Broken pipe")
            && said.contains("the output is incomplete"),
        "{said}"
    );
}

/// A writer that accepts nothing until the test lets it.
struct Gate(mpsc::Receiver<()>, Arc<std::sync::Mutex<Vec<u8>>>);

impl Write for Gate {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        // Once the sender is dropped, the gate stays open.
        let _ = self.0.recv();
        self.1.lock().unwrap().extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_holds_back_the_sender_and_loses_nothing() {
    let served = tempdir().unwrap();
    let bytes = content(1, 40 << 20);
    write(&served.path().join("f"), &bytes);
    let host = Host::directory(served.path());
    let config = Config {
        memory: 4 << 20,
        ..Config::default()
    };
    let client = host
        .connect_as(&haul::Identity::generate().unwrap(), &config)
        .await
        .unwrap();
    let (open, gate) = mpsc::channel();
    let out = Arc::new(std::sync::Mutex::new(Vec::new()));
    let options = haul::PullOptions {
        sources: vec![path("f")],
        ..haul::PullOptions::default()
    };
    let pull = client.pull_to(Gate(gate, out.clone()), &options, haul::ignore());
    let waiting = async {
        let received = || client.connection().stats().udp_rx.bytes;
        // The transfer pauses far from the end; only acknowledgements continue.
        let mut before = 0;
        while before == 0 || received() > before + (64 << 10) {
            before = received();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert!(before < 20 << 20, "{before} bytes wait here");
        drop(open);
    };
    let (outcome, ()) = tokio::time::timeout(LIMIT, async { tokio::join!(pull, waiting) })
        .await
        .expect("it ends");
    assert_eq!(outcome.unwrap().sent.failed, 0);
    assert!(*out.lock().unwrap() == bytes);
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_reconnect_after_output_has_begun() {
    let served = tempdir().unwrap();
    write(&served.path().join("f"), &content(1, 40 << 20));
    let mut host = Host::directory(served.path());
    let client = host.connect().await.unwrap();
    let (open, gate) = mpsc::channel();
    let out = Arc::new(std::sync::Mutex::new(Vec::new()));
    let options = haul::PullOptions {
        sources: vec![path("f")],
        ..haul::PullOptions::default()
    };
    let (observer, events) = recorder();
    let pull = client.pull_to(Gate(gate, out.clone()), &options, observer);
    tokio::pin!(pull);
    open.send(()).unwrap();
    tokio::select! {
        ended = &mut pull => panic!("{ended:?}"),
        () = until(|| !out.lock().unwrap().is_empty()) => {}
    }
    host.stop();
    host.stop_now();
    host.stopped().await;
    drop(open);
    let lost = tokio::time::timeout(LIMIT, pull)
        .await
        .expect("it ends")
        .unwrap_err();
    assert!(
        matches!(&lost, Error::Lost(why) if why.contains("the output was written already and cannot be taken back")),
        "{lost:?}"
    );
    assert!(
        !events
            .lock()
            .unwrap()
            .iter()
            .any(|event| matches!(event, Event::Reconnecting { .. }))
    );
}
