//! A tree with every kind of entry survives a push and a pull, as judged by independent tools: rsync and find.

use std::ffi::OsStr;
use std::fs::hard_link;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::support::command::{Serving, is_root};
use crate::support::{Host, LIMIT, content, from, listing, pull, push, to, write};
use haul::{Code, Config, LocalStore, PullOptions, PushOptions, WalkOptions};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags, setxattr, utimensat};
use tempfile::tempdir;

/// Levels of the deep directory.
const DEEP: usize = 200;

/// Sets the modification time, also of a symbolic link.
fn time(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

/// Makes every kind of entry that is transferred. Entries that only root can make or read are made for root only.
fn tree(root: &Path) {
    for size in [0, 1, 255, 256 << 10, 1 << 20, (3 << 20) + 1] {
        write(
            &root.join(format!("sizes/{size}")),
            &content(size as u64, size),
        );
    }
    let sparse = std::fs::File::create(root.join("sizes/sparse")).unwrap();
    sparse.set_len(32 << 20).unwrap();
    std::os::unix::fs::FileExt::write_at(&sparse, &content(9, 100_000), 20 << 20).unwrap();

    for bits in [0o400, 0o444, 0o600, 0o755, 0o777, 0o604] {
        write(&root.join(format!("modes/{bits:o}")), b"mode");
        mode(&root.join(format!("modes/{bits:o}")), bits);
    }
    write(&root.join("closed/below/f"), b"in a closed directory");

    let names: [&[u8]; 9] = [
        b"new\nline",
        b"\x1b[2J\x1b]0;title\x07",
        b"\xff\xfe no text",
        "\u{e4} \u{20ac} \u{202e}gpj.exe".as_bytes(),
        b"-rf *",
        b" ",
        b"...",
        &[b'x'; 255],
        b"?#%41\\",
    ];
    for name in names {
        write(&root.join("names").join(OsStr::from_bytes(name)), name);
    }

    std::fs::create_dir_all(root.join("links/to")).unwrap();
    for (name, target) in [
        ("dangling", "nowhere/at all"),
        ("itself", "itself"),
        ("one", "other"),
        ("other", "one"),
        ("absolute", "/etc/passwd"),
        ("up", "../../../.."),
        ("to/parent", ".."),
        ("directory", "to"),
        ("file", "../sizes/1"),
    ] {
        symlink(target, root.join("links").join(name)).unwrap();
    }
    symlink(OsStr::from_bytes(b"\xff\n"), root.join("links/odd")).unwrap();
    symlink("x".repeat(4095), root.join("links/long")).unwrap();
    time(&root.join("links/dangling"), -100, 5);

    for (file, size) in [("empty", 0), ("small", 1000), ("large", 2 << 20)] {
        write(&root.join("names of one/a").join(file), &content(77, size));
        for other in ["names of one", "names of one/z", "again"] {
            std::fs::create_dir_all(root.join(other)).unwrap();
            hard_link(
                root.join("names of one/a").join(file),
                root.join(other).join(format!("also {file}")),
            )
            .unwrap();
        }
    }

    let deep = root.join(["d"; DEEP].join("/"));
    write(&deep.join("bottom"), b"deep");
    std::fs::create_dir_all(root.join("hollow/hollow")).unwrap();

    for (name, seconds, nanoseconds) in [
        ("before 1970", -1, 999_999_999),
        ("1906", -2_000_000_000, 1),
        ("1970", 0, 0),
        ("after 2038", 2_147_483_648, 123_456_789),
        ("after 2106", 5_000_000_000, 7),
        ("now", 1_700_000_000, 123_456_789),
    ] {
        write(&root.join("times").join(name), b"time");
        time(&root.join("times").join(name), seconds, nanoseconds);
        std::fs::create_dir(root.join(format!("times/in {name}"))).unwrap();
        time(&root.join(format!("times/in {name}")), seconds, nanoseconds);
    }

    let has_xattrs = setxattr(root, "user.haul", b"of the root", XattrFlags::empty()).is_ok();
    if has_xattrs {
        for (path, value) in [
            ("sizes/0", &b""[..]),
            ("sizes/3145729", &[0, 255, 10]),
            ("hollow", b"directory"),
        ] {
            setxattr(root.join(path), "user.haul", value, XattrFlags::empty()).unwrap();
        }
    } else {
        println!("without extended attributes: this filesystem has none");
    }
    if is_root() {
        write(&root.join("modes/0"), b"nobody");
        mode(&root.join("modes/0"), 0);
        write(&root.join("modes/6711"), b"a program");
        chown(root.join("modes/6711"), Some(65_534), Some(65_534)).unwrap();
        mode(&root.join("modes/6711"), 0o6711);
        chown(root.join("hollow/hollow"), Some(4_000_001), Some(4_000_002)).unwrap();
    } else {
        println!("without owners and modes that only root can make and read");
    }
    mode(&root.join("closed/below"), 0o500);
    mode(&root.join("closed"), 0o555);
    // Set last, since adding an entry to a directory changes its time.
    time(&root.join("closed"), 1_000_000_000, 1);
    time(&deep, -5, 5);
}

/// The output of find for everything below a directory: names, kinds, modes, owners, sizes, times, link counts,
/// targets.
fn found(root: &Path) -> Vec<String> {
    let mut all = Vec::new();
    // The size of a directory depends on the file system.
    for (kind, format) in [
        ("d", r"%P %y %m %U:%G %T@\0"),
        ("f,l", r"%P %y %m %U:%G %s %T@ %n %l\0"),
    ] {
        let found = Command::new("find")
            .arg(root)
            .args(["-mindepth", "1", "-type", kind, "-printf", format])
            .output();
        let found = found.expect("find is there");
        assert!(
            found.status.success(),
            "{}",
            String::from_utf8_lossy(&found.stderr)
        );
        all.extend(found.stdout.split(|&byte| byte == 0).map(haul::printable));
    }
    all.sort();
    all
}

/// Asserts that two trees are the same to find, to rsync if it is installed, and by their bytes.
fn assert_same(one: &Path, other: &Path, times: &str) {
    assert_eq!(found(one), found(other), "{times}");
    assert_eq!(listing(one), listing(other), "{times}");
    let with_slash = |path: &Path| PathBuf::from(format!("{}/", path.display()));
    let compared = Command::new("rsync")
        .args(["-anicAXH", "--delete", "--numeric-ids"])
        .args([with_slash(one), with_slash(other)])
        .output();
    match compared {
        Ok(compared) => {
            let said = [compared.stdout, compared.stderr].concat();
            assert!(
                compared.status.success() && said.is_empty(),
                "{times}: {}",
                String::from_utf8_lossy(&said)
            );
        }
        Err(why) => println!("compared without rsync: {why}"),
    }
}

/// Options that keep everything that can be kept.
fn all() -> WalkOptions {
    WalkOptions {
        owner: true,
        xattrs: true,
        ..WalkOptions::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_entry_survives_a_push_and_a_pull() {
    let (source, served, back) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
    let (original, pushed, pulled) = (
        source.path().join("t"),
        served.path().join("t"),
        back.path().join("t"),
    );
    tree(&original);
    let store = Arc::new(LocalStore::open(served.path()).unwrap());
    let host = Host::serving(
        store,
        Config {
            allow_owner: true,
            ..Config::default()
        },
    );

    let options = PushOptions {
        walk: all(),
        ..to(&[&original], "t")
    };
    let outcome = push(&host, &options).await.unwrap();
    assert_eq!(
        (outcome.sent.failed, outcome.sent.skipped),
        (0, 0),
        "{:?}",
        outcome.sent.failures
    );
    assert_eq!(outcome.summary.unkept, None);
    assert_same(&original, &pushed, "pushed");
    let again = push(&host, &options).await.unwrap();
    assert_eq!(
        (again.sent.files, again.sent.bytes, again.sent.skipped),
        (0, 0, outcome.sent.files)
    );
    assert_same(&original, &pushed, "pushed twice");

    let options = PullOptions {
        walk: all(),
        ..from(&["t"], &pulled)
    };
    let outcome = pull(&host, &options).await.unwrap();
    assert_eq!(
        (outcome.sent.failed, outcome.sent.skipped),
        (0, 0),
        "{:?}",
        outcome.sent.failures
    );
    assert_eq!(outcome.summary.unkept, None);
    assert_same(&original, &pulled, "pulled");
    let again = pull(&host, &options).await.unwrap();
    assert_eq!(
        (again.sent.files, again.sent.bytes, again.sent.skipped),
        (0, 0, outcome.sent.files)
    );
    assert_same(&original, &pulled, "pulled twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rerun_sends_only_what_was_added_to_the_tree() {
    let (source, server) = (tempdir().unwrap(), Serving::start_as_nobody(&[]));
    let (original, arrived) = (source.path().join("t"), server.served.path().join("t"));
    tree(&original);
    let client = server.connect().await;
    let options = to(&[&original], "t");
    let push = async || {
        let pushing = client.push(&options, haul::ignore());
        tokio::time::timeout(LIMIT, pushing)
            .await
            .expect("it ends")
            .unwrap()
    };
    assert_eq!(push().await.sent.failed, 0);
    // Adds entries to directories that are closed, deep, and old.
    for directory in [
        "closed/below",
        "hollow/hollow",
        "times/in 1906",
        &["d"; DEEP].join("/"),
    ] {
        let closed = original.join("closed/below");
        mode(&closed, 0o700);
        write(
            &original.join(directory).join("added"),
            &content(5, 400_000),
        );
        mode(&closed, 0o500);
    }
    let outcome = push().await;
    assert_eq!(
        (outcome.sent.files, outcome.sent.bytes, outcome.sent.failed),
        (4, 1_600_000, 0)
    );
    assert_eq!(listing(&arrived), listing(&original));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreadable_directory_is_reported_and_others_are_sent() {
    if !is_root() {
        println!("skipped: nothing is closed to the owner of all");
        return;
    }
    let (server, here) = (Serving::start_as_nobody(&[]), tempdir().unwrap());
    let tree = server.served.path().join("t");
    for i in 0..20 {
        write(&tree.join(format!("{i:02}/f")), b"data");
    }
    mode(&tree.join("07"), 0o700);
    write(&tree.join("11/secret"), b"secret");
    mode(&tree.join("11/secret"), 0o600);
    let client = server.connect().await;
    let options = from(&["t"], &here.path().join("t"));
    let pulling = client.pull(&options, haul::ignore());
    let outcome = tokio::time::timeout(LIMIT, pulling)
        .await
        .expect("it ends")
        .unwrap();
    for i in (0..20).filter(|&i| i != 7) {
        assert_eq!(
            std::fs::read(here.path().join(format!("t/{i:02}/f"))).unwrap(),
            b"data"
        );
    }
    let mut failed: Vec<_> = outcome
        .sent
        .failures
        .iter()
        .map(|(path, why)| (path.to_string(), why.code))
        .collect();
    failed.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(
        failed,
        ["t/07", "t/11/secret"].map(|name| (name.to_owned(), Code::PermissionDenied))
    );
    assert!(!here.path().join("t/07/f").exists());
}

async fn many_empty_files(count: usize) {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let tree = source.path().join("t");
    std::fs::create_dir(&tree).unwrap();
    for i in 0..count {
        std::fs::File::create(tree.join(format!("{i}"))).unwrap();
    }
    let host = Host::directory(served.path());
    for (sent, skipped) in [(count as u64, 0), (0, count as u64)] {
        let client = host.connect().await.unwrap();
        let outcome = client
            .push(&to(&[&tree], "t"), haul::ignore())
            .await
            .unwrap();
        assert_eq!(
            (
                outcome.sent.files,
                outcome.sent.skipped,
                outcome.sent.failed
            ),
            (sent, skipped, 0)
        );
        client.close().await;
    }
    assert_eq!(
        std::fs::read_dir(served.path().join("t")).unwrap().count(),
        count
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_of_twenty_thousand_empty_files_arrives() {
    many_empty_files(20_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "makes 2,000,000 files: some minutes and 3 GB of disk; see tests/README.md"]
async fn a_directory_of_a_million_empty_files() {
    many_empty_files(1_000_000).await;
}
