//! Faults other than those of the network: full disks, and sources that change during a transfer.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::support::slow::SlowStore;
use crate::support::{Host, LIMIT, content, listing, push, to, write};
use haul::{Code, Config, Event, LocalStore};
use rustix::io::Errno;
use tempfile::tempdir;

/// Runs `haul cp` with a HAUL_HOME of its own.
fn haul_cp(home: &Path, url: &str, key_id: &str, arguments: &[&str], sources: &[&Path]) -> Command {
    std::fs::set_permissions(home, PermissionsExt::from_mode(0o700)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
    command
        .args(["cp", "--pin", key_id])
        .args(arguments)
        .args(sources)
        .arg(url)
        .env("HAUL_HOME", home);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A `haul serve` on a disk of 8 MiB that no other process sees.
struct SmallDisk {
    child: Child,
    url: String,
    key_id: String,
    served: PathBuf,
    _places: [tempfile::TempDir; 2],
}

impl SmallDisk {
    /// Returns `None` where no disk can be mounted.
    fn serve() -> Option<Self> {
        let (home, mount) = (tempdir().unwrap(), tempdir().unwrap());
        std::fs::set_permissions(home.path(), PermissionsExt::from_mode(0o700)).unwrap();
        let script = "mount -t tmpfs -o size=8m tmpfs \"$1\" && exec \"$0\" serve \"$1\" --listen 127.0.0.1:0 --anyone write";
        let mut child = Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                script,
                env!("CARGO_BIN_EXE_haul"),
            ])
            .arg(mount.path())
            .env("HAUL_HOME", home.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut said = String::new();
        while !said.contains("Ctrl-C") {
            if output.read_line(&mut said).unwrap() == 0 {
                let _ = child.wait();
                println!("skipped: only root may mount a disk");
                return None;
            }
        }
        let word = |after: &str| {
            said.split(after)
                .nth(1)
                .unwrap()
                .split_whitespace()
                .next()
                .unwrap()
                .to_owned()
        };
        let served = Path::new("/proc").join(child.id().to_string()).join("root");
        let served = served.join(mount.path().strip_prefix("/").unwrap());
        Some(Self {
            url: word("  at "),
            key_id: word("key id "),
            child,
            served,
            _places: [home, mount],
        })
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_full_disk_fails_only_the_file_that_does_not_fit() {
    let Some(server) = SmallDisk::serve() else {
        return;
    };
    let (here, home) = (tempdir().unwrap(), tempdir().unwrap());
    write(&server.served.join("d/b"), b"old");
    for (name, length) in [("a", 500_000), ("b", 20 << 20), ("c", 500_000), ("d", 10)] {
        write(
            &here.path().join("d").join(name),
            &content(length as u64, length),
        );
    }
    // One after the other: at the same time all of them would find the disk full.
    let source = here.path().join("d");
    let cp = |arguments: &[&str]| {
        let url = format!("{}d", server.url);
        haul_cp(home.path(), &url, &server.key_id, arguments, &[&source])
            .output()
            .unwrap()
    };
    let output = cp(&["--parallel", "1", "-q"]);
    let text = said(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("d/b: no space left on the receiver's disk (an existing file is unchanged)"),
        "{text}"
    );
    assert!(
        text.contains("make room, then run the same command again"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1, "{text}");
    assert_eq!(std::fs::read(server.served.join("d/b")).unwrap(), b"old");
    for name in ["a", "c", "d"] {
        assert!(
            std::fs::read(server.served.join("d").join(name)).unwrap()
                == std::fs::read(source.join(name)).unwrap()
        );
    }
    assert_eq!(
        std::fs::read_dir(server.served.join("d")).unwrap().count(),
        4,
        "no partial takes what is left"
    );
    // A hole takes no space, however large it is.
    let hole = File::create(source.join("b")).unwrap();
    hole.set_len(1 << 30).unwrap();
    let output = cp(&["-q"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert_eq!(server.served.join("d/b").metadata().unwrap().len(), 1 << 30);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exceeded_quota_is_reported_as_such() {
    let (here, there) = (tempdir().unwrap(), tempdir().unwrap());
    write(&there.path().join("d/large"), b"old");
    for (name, length) in [("d/large", 3 << 20), ("d/other", 1 << 20)] {
        write(&here.path().join(name), &content(1, length));
    }
    let store = SlowStore::around(LocalStore::open(there.path()).unwrap(), None)
        .full_after(2 << 20, Errno::DQUOT);
    let host = Host::serving(Arc::new(store), Config::default());
    let outcome = push(&host, &to(&[&here.path().join("d")], "d"))
        .await
        .unwrap();
    let (path, why) = &outcome.sent.failures[0];
    assert_eq!(
        (path.to_string().as_str(), why.code, outcome.sent.failed),
        ("d/large", Code::NoSpace, 1)
    );
    assert!(
        why.text
            .contains("d/large: the quota on the receiver's disk is used up"),
        "{why}"
    );
    assert_eq!(std::fs::read(there.path().join("d/large")).unwrap(), b"old");
    assert_eq!(
        std::fs::read(there.path().join("d/other")).unwrap().len(),
        1 << 20
    );
    assert_eq!(
        std::fs::read_dir(there.path().join("d")).unwrap().count(),
        2,
        "no partial is left"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changing_sources_are_reported_and_the_rest_arrives() {
    const LENGTH: usize = 2 << 20;
    let (here, there, home) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
    let source = here.path().join("d");
    let changing = [
        "grows",
        "hole",
        "replaced",
        "rewritten",
        "shrinks",
        "vanishes",
    ];
    for name in changing.into_iter().chain(["calm"]) {
        write(&source.join(name), &content(1, LENGTH));
        write(&there.path().join("d").join(name), b"old");
    }
    File::options()
        .write(true)
        .open(source.join("hole"))
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let host = Host::directory(there.path());
    // Slow enough that the files change during the transfer.
    let url = format!("haul://{}/d", host.address);
    let cp = haul_cp(
        home.path(),
        &url,
        &host.key_id.to_string(),
        &["--limit", "3MiB/s"],
        &[&source],
    )
    .spawn()
    .unwrap();
    let partials = || {
        let all = std::fs::read_dir(there.path().join("d"))
            .unwrap()
            .map(|entry| entry.unwrap());
        let begun = |entry: &std::fs::DirEntry| {
            entry.metadata().is_ok_and(|metadata| metadata.blocks() > 0)
        };
        all.filter(|entry| {
            entry.file_name().as_encoded_bytes().ends_with(b".partial") && begun(entry)
        })
        .count()
    };
    let begun = async {
        while partials() < 7 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(LIMIT, begun)
        .await
        .expect("all of them are under way");
    let open = |name| File::options().write(true).open(source.join(name)).unwrap();
    open("grows").write_all_at(b"more", LENGTH as u64).unwrap();
    open("hole")
        .write_all_at(b"no hole any more", 32 << 20)
        .unwrap();
    open("shrinks").set_len(LENGTH as u64 / 2).unwrap();
    std::fs::remove_file(source.join("vanishes")).unwrap();
    write(&source.join("another"), &content(2, LENGTH));
    std::fs::rename(source.join("another"), source.join("replaced")).unwrap();
    // Same size and, afterwards, same time.
    let time = source
        .join("rewritten")
        .metadata()
        .unwrap()
        .modified()
        .unwrap();
    let rewritten = open("rewritten");
    rewritten.write_all_at(b"x", LENGTH as u64 - 1).unwrap();
    rewritten.set_modified(time).unwrap();

    let output = tokio::task::spawn_blocking(move || cp.wait_with_output().unwrap())
        .await
        .unwrap();
    let text = said(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    for name in changing {
        let why = if name == "vanishes" {
            "removed while it was being sent"
        } else {
            "changed while it was being sent"
        };
        assert!(
            text.lines()
                .any(|line| line.contains(&format!("d/{name}: {why}"))),
            "{name}: {text}"
        );
        assert_eq!(
            std::fs::read(there.path().join("d").join(name)).unwrap(),
            b"old",
            "{name}"
        );
    }
    assert!(std::fs::read(there.path().join("d/calm")).unwrap() == content(1, LENGTH));
    assert_eq!(
        std::fs::read_dir(there.path().join("d")).unwrap().count(),
        7,
        "no partial is left"
    );

    // Once the sources no longer change, everything is sent.
    std::fs::remove_file(there.path().join("d/vanishes")).unwrap();
    let again = push(&host, &to(&[&source], "d")).await.unwrap();
    assert_eq!((again.sent.failed, again.sent.files), (0, 5));
    assert_eq!(listing(there.path()), listing(here.path()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vanished_sources_are_reported_and_the_rest_arrives() {
    let (here, there) = (tempdir().unwrap(), tempdir().unwrap());
    let source = here.path().join("d");
    for name in ["a", "b", "c", "sub/d"] {
        write(&source.join(name), &content(1, 1 << 20));
    }
    let store = SlowStore::around(LocalStore::open(there.path()).unwrap(), None);
    let host = Host::serving(Arc::new(store.clone()), Config::default());
    let config = Config {
        parallel: 1,
        ..Config::default()
    };
    let client = host
        .connect_as(&haul::Identity::generate().unwrap(), &config)
        .await
        .unwrap();
    let held = store.hold();
    let options = to(&[&source], "d");
    let (observer, events) = crate::support::recorder();
    let push = client.push(&options, observer);
    tokio::pin!(push);
    let first = async {
        loop {
            let begun = events.lock().unwrap().iter().find_map(|event| match event {
                Event::Started { path, .. } => Some(path.to_string()),
                _ => None,
            });
            match begun {
                Some(begun) => break begun,
                None => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    };
    let first = tokio::select! {
        ended = &mut push => panic!("{ended:?}"),
        first = first => first,
    };
    // One after the other: all but the first wait for their turn.
    let mut gone = vec!["d/a", "d/b", "d/c", "d/sub/d"];
    gone.retain(|name| *name != first);
    let stays = gone.remove(0);
    gone.iter()
        .for_each(|name| std::fs::remove_file(here.path().join(name)).unwrap());
    drop(held);
    let outcome = tokio::time::timeout(LIMIT, push)
        .await
        .expect("it ends")
        .unwrap();
    let mut vanished: Vec<_> = outcome
        .sent
        .omitted
        .iter()
        .map(|(path, why)| (path.to_string(), why.code))
        .collect();
    vanished.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(
        vanished,
        gone.iter()
            .map(|name| (name.to_string(), Code::Vanished))
            .collect::<Vec<_>>(),
        "{outcome:?}"
    );
    assert_eq!(outcome.sent.files, 2);
    for name in [&first, stays] {
        assert!(
            std::fs::read(there.path().join(name)).unwrap() == content(1, 1 << 20),
            "{name}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partials_held_by_a_dying_server_are_waited_for() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    write(&source.path().join("t/large"), &content(1, 1 << 20));
    write(&source.path().join("t/small"), &content(2, 1_000));
    let store = SlowStore::around(LocalStore::open(served.path()).unwrap(), None).busy(5);
    let host = Host::serving(Arc::new(store), Config::default());
    let outcome = push(&host, &to(&[&source.path().join("t")], "t"))
        .await
        .unwrap();
    assert_eq!(
        (outcome.sent.files, outcome.sent.failed),
        (2, 0),
        "{:?}",
        outcome.sent.failures
    );
    assert_eq!(
        listing(&served.path().join("t")),
        listing(&source.path().join("t"))
    );
}
