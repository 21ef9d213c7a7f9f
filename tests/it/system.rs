//! What other tools take for granted of a system: locks, owners, descriptors, and that a directory stays where it is.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::support::command::{is_root, private};
use crate::support::{Host, content, from, listing, path, pull, push, to, write};
use haul::{Attributes, Code, Durability, Error, LocalStore, PartialKey, RelativePath, Store};
use tempfile::{TempDir, tempdir};

/// A `haul serve` run by another program, until it is dropped.
struct Below {
    child: Child,
    url: String,
    key_id: String,
    served: TempDir,
    _home: TempDir,
}

impl Below {
    /// `program` runs the command after its arguments, as the same process.
    fn serve(home: TempDir, program: &str, arguments: &[&str]) -> Option<Self> {
        let served = tempdir().unwrap();
        let mut child = Command::new(program)
            .args(arguments)
            .args([env!("CARGO_BIN_EXE_haul"), "serve"])
            .arg(served.path())
            .args(["--listen", "127.0.0.1:0", "--anyone", "both"])
            .env("HAUL_HOME", home.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .inspect_err(|error| println!("skipped: {program}: {error}"))
            .ok()?;
        let mut said = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        while !said.contains("Ctrl-C") {
            if output.read_line(&mut said).unwrap() == 0 {
                println!("skipped: {program} does not run here");
                let _ = child.wait();
                return None;
            }
        }
        let word = |after: &str| {
            let rest = said.split(after).nth(1).unwrap();
            rest.split_whitespace().next().unwrap().to_owned()
        };
        Some(Self {
            url: word("  at "),
            key_id: word("  key id "),
            child,
            served,
            _home: home,
        })
    }

    /// Runs `haul cp` to it.
    fn cp(&self, from: &Path, source: &str) -> Output {
        let home = private();
        Command::new(env!("CARGO_BIN_EXE_haul"))
            .args([
                "cp",
                "--retry-for",
                "0s",
                "--pin",
                &self.key_id,
                source,
                &self.url,
            ])
            .current_dir(from)
            .env("HAUL_HOME", home.path())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A `haul serve` whose every `flock` fails with this error.
fn without_flock(home: TempDir, error: &str) -> Option<Below> {
    let inject = format!("inject=flock:error={error}");
    // -D: the server is our child, and strace is a process beside it.
    let arguments = [
        "-D",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=flock",
        "-e",
        &inject,
    ];
    Below::serve(home, "strace", &arguments)
}

fn tree() -> TempDir {
    let here = tempdir().unwrap();
    write(&here.path().join("t/small"), b"content");
    write(&here.path().join("t/large"), &content(1, 3_000_000));
    here
}

#[test]
fn a_filesystem_without_flock_takes_files() {
    // The file system of HAUL_HOME has no flock either.
    let Some(server) = without_flock(private(), "ENOSYS") else {
        return;
    };
    let here = tree();
    let sent = server.cp(here.path(), "t");
    let said = String::from_utf8_lossy(&sent.stderr);
    assert_eq!(sent.status.code(), Some(0), "{said}");
    assert_eq!(listing(server.served.path()), listing(here.path()));
}

#[test]
fn a_partial_that_cannot_be_locked_is_not_left_behind() {
    let home = private();
    // The key is made before, since that takes a lock too.
    let made = Command::new(env!("CARGO_BIN_EXE_haul"))
        .arg("id")
        .env("HAUL_HOME", home.path())
        .stdout(Stdio::null())
        .status();
    assert!(made.unwrap().success());
    let Some(server) = without_flock(home, "EIO") else {
        return;
    };
    let here = tree();
    let sent = server.cp(here.path(), "t");
    let said = String::from_utf8_lossy(&sent.stderr);
    assert_eq!(sent.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot lock its partial"), "{said}");
    let left = std::fs::read_dir(server.served.path().join("t")).unwrap();
    assert_eq!(left.count(), 0);
}

/// An NTFS on which all files appear to belong to user 1000, until it is dropped.
struct Ntfs(TempDir);

impl Ntfs {
    fn mount() -> Option<Self> {
        let place = tempdir().unwrap();
        let (image, mount) = (place.path().join("image"), place.path().join("m"));
        std::fs::create_dir(&mount).unwrap();
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(64 << 20).unwrap();
        let run = |command: &mut Command| {
            let command = command.stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        let mounted = is_root()
            && run(Command::new("mkfs.ntfs").args(["-q", "-F"]).arg(&image))
            && run(Command::new("ntfs-3g")
                .args(["-o", "uid=1000,gid=1000,umask=022"])
                .args([&image, &mount]));
        if !mounted {
            println!("skipped: it takes root and ntfs-3g");
        }
        mounted.then_some(Self(place))
    }

    fn directory(&self) -> std::path::PathBuf {
        self.0.path().join("m")
    }
}

impl Drop for Ntfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.directory()).status();
    }
}

#[test]
fn a_partial_is_resumed_where_all_files_have_another_owner() {
    let Some(ntfs) = Ntfs::mount() else { return };
    let store = LocalStore::open(&ntfs.directory()).unwrap();
    let claim = PartialKey {
        owner: [7; 32],
        size: 4,
        modified: None,
    };
    let mut upload = store.create(&path("d/f"), &claim).unwrap();
    upload.write_at(b"dat", 0).unwrap();
    drop(upload);
    let mut upload = store.create(&path("d/f"), &claim).unwrap();
    assert_eq!(upload.held().unwrap().first(), Some(&(0..3)));
    upload.write_at(b"a", 3).unwrap();
    upload
        .commit(&Attributes::default(), Durability::Synced)
        .unwrap();
    assert_eq!(
        std::fs::read(ntfs.directory().join("d/f")).unwrap(),
        b"data"
    );
    assert_eq!(listing(&ntfs.directory().join("d")).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_session_begins_after_the_served_directory_was_moved() {
    let (here, above) = (tree(), tempdir().unwrap());
    let (served, away) = (above.path().join("served"), above.path().join("away"));
    write(&served.join("old"), b"old");
    let host = Host::directory(&served);
    std::fs::rename(&served, &away).unwrap();
    std::fs::create_dir(&served).unwrap();
    let refused = |error: Error| match error {
        Error::Refused(why) => {
            assert_eq!(why.code, Code::Io);
            assert!(why.text.contains("restart haul there"), "{why}");
            assert!(!why.text.contains(above.path().to_str().unwrap()), "{why}");
        }
        other => panic!("{other}"),
    };
    refused(
        push(&host, &to(&[&here.path().join("t")], ""))
            .await
            .unwrap_err(),
    );
    refused(pull(&host, &from(&["old"], here.path())).await.unwrap_err());
    let client = host.connect().await.unwrap();
    let list = client.list(&RelativePath::root(), false).await;
    refused(list.err().unwrap());
    assert_eq!(std::fs::read_dir(&served).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(&away).unwrap().count(), 1);
}

#[test]
fn many_sources_are_sent_with_few_open_files() {
    let (server, here) = (
        Below::serve(private(), "env", &[]).unwrap(),
        tempdir().unwrap(),
    );
    for i in 0..200 {
        write(&here.path().join(format!("one/{i}")), b"one");
        write(&here.path().join(format!("many/{i}/in {i}")), b"many");
    }
    let home = private();
    let script = "ulimit -n 64 && exec \"$0\" cp -q --pin \"$1\" one/* many/*/* \"$2\"";
    let sent = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_haul")])
        .args([&server.key_id, &server.url])
        .current_dir(here.path())
        .env("HAUL_HOME", home.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&sent.stderr);
    assert_eq!(sent.status.code(), Some(0), "{said}");
    for i in 0..200 {
        let read = |name: String| std::fs::read(server.served.path().join(name)).unwrap();
        assert_eq!(read(format!("{i}")), b"one");
        assert_eq!(read(format!("in {i}")), b"many");
    }
}
