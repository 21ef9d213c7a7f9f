//! Properties of a tree besides its content: modes, times and links, also in closed directories.

use std::collections::BTreeMap;
use std::fs::hard_link;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::{Arc, Mutex};

use crate::support::command::{Serving, is_root};
use crate::support::{Host, LIMIT, content, listing, to, write};
use haul::{Attribute, Code, Config, Event, MemoryStore, Observer, Outcome, Store};
use tempfile::tempdir;

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

/// Pushes over a connection of its own; every entry must succeed.
async fn push(server: &Serving, from: &Path, into: &str) -> Outcome {
    let client = server.connect().await;
    let options = to(&[from], into);
    let pushing = client.push(&options, haul::ignore());
    let outcome = tokio::time::timeout(LIMIT, pushing)
        .await
        .expect("it ends")
        .unwrap();
    client.close().await;
    assert_eq!(outcome.sent.failed, 0, "{:?}", outcome.sent.failures);
    outcome
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_root_fills_a_closed_directory_again() {
    let (source, server) = (tempdir().unwrap(), Serving::start_as_nobody(&[]));
    let (tree, arrived) = (source.path().join("t"), server.served.path().join("t"));
    write(&tree.join("closed/below/changes"), &content(1, 1000));
    write(&tree.join("closed/changes"), &content(2, 300_000));
    mode(&tree.join("closed/below"), 0o500);
    mode(&tree.join("closed"), 0o555);
    push(&server, &tree, "t").await;
    assert_eq!(listing(&arrived), listing(&tree));

    for directory in ["closed", "closed/below"] {
        let directory = tree.join(directory);
        mode(&directory, 0o755);
        write(&directory.join("changes"), &content(3, 400_000));
        write(&directory.join("new/small"), &content(4, 10));
        write(&directory.join("new/large"), &content(5, 2 << 20));
        write(&directory.join("empty"), b"");
        symlink("nowhere", directory.join("link")).unwrap();
        // The server may change files that it may not read. Only root can send and compare them.
        if is_root() {
            write(&directory.join("unreadable"), b"x");
            mode(&directory.join("unreadable"), 0o000);
            mode(&directory.join("new"), 0o111);
        }
    }
    mode(&tree.join("closed/below"), 0o500);
    mode(&tree.join("closed"), 0o555);
    push(&server, &tree, "t").await;
    assert_eq!(listing(&arrived), listing(&tree));
    if is_root() {
        mode(&tree.join("closed/unreadable"), 0o200);
        mode(&tree.join("closed/new"), 0o311);
    }
    assert_eq!(push(&server, &tree, "t").await.sent.files, 0);
    assert_eq!(
        listing(&arrived),
        listing(&tree),
        "also the modes of what cannot be opened"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_directory_is_closed_again_after_a_kill() {
    let (source, server) = (tempdir().unwrap(), Serving::start_as_nobody(&[]));
    let tree = source.path().join("t");
    write(&tree.join("closed/small"), b"1");
    mode(&tree.join("closed"), 0o555);
    push(&server, &tree, "t").await;
    mode(&tree.join("closed"), 0o755);
    write(&tree.join("closed/large"), &content(1, 16 << 20));
    mode(&tree.join("closed"), 0o555);

    let client = server.connect().await;
    let server = Arc::new(Mutex::new(Some(server)));
    let killed = server.clone();
    let observer: Observer = Arc::new(move |event| {
        if let Event::Moved { .. } = event {
            killed.lock().unwrap().iter_mut().for_each(Serving::kill);
        }
    });
    let options = to(&[&tree], "t");
    let pushing = client.push(&options, observer);
    tokio::time::timeout(LIMIT, pushing)
        .await
        .expect("it ends")
        .unwrap_err();
    drop(client);
    let server = server.lock().unwrap().take().unwrap();
    let arrived = server.served.path().join("t");
    let closed = std::fs::metadata(arrived.join("closed"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(closed & 0o777, 0o555);
    assert!(!arrived.join("closed/large").exists());

    let server = server.restart(&[]);
    push(&server, &tree, "t").await;
    assert_eq!(listing(&arrived), listing(&tree));
}

/// The names of each file that has several.
fn names_of_files(root: &Path) -> Vec<Vec<String>> {
    fn find(root: &Path, directory: &Path, all: &mut BTreeMap<u64, Vec<String>>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            if metadata.is_dir() {
                find(root, &path, all);
            } else {
                all.entry(metadata.ino())
                    .or_default()
                    .push(path.strip_prefix(root).unwrap().display().to_string());
            }
        }
    }
    let mut all = BTreeMap::new();
    find(root, root, &mut all);
    let mut several: Vec<_> = all.into_values().filter(|names| names.len() > 1).collect();
    several.iter_mut().for_each(|names| names.sort());
    several.sort();
    several
}

/// Makes a tree in which files have several names, within one directory and across directories.
fn linked_tree(tree: &Path) {
    for (name, size) in [("empty", 0), ("small", 1000), ("large", 3 << 20)] {
        let first = tree.join("a").join(name);
        write(&first, &content(size as u64, size));
        for other in ["a/then", "b/c", "b"] {
            std::fs::create_dir_all(tree.join(other)).unwrap();
            hard_link(&first, tree.join(other).join(format!("also {name}"))).unwrap();
        }
        hard_link(&first, tree.join(format!("outside of {name}"))).unwrap();
    }
    write(&tree.join("b/alone"), b"x");
    hard_link(tree.join("b/alone"), tree.with_extension("elsewhere")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hard_links_stay_hard_links() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let (tree, arrived) = (source.path().join("t"), served.path().join("t"));
    linked_tree(&tree);
    let host = Host::directory(served.path());
    let outcome = crate::support::push(&host, &to(&[&tree], "t"))
        .await
        .unwrap();
    assert_eq!(outcome.sent.failed, 0, "{:?}", outcome.sent.failures);
    assert_eq!(
        (outcome.sent.files, outcome.sent.bytes),
        (16, 1000 + (3 << 20) + 1),
        "content goes once"
    );
    assert_eq!(outcome.summary.committed, 16);
    assert_eq!(listing(&arrived), listing(&tree));
    assert_eq!(names_of_files(&arrived), names_of_files(&tree));
    assert_eq!(names_of_files(&tree).len(), 3);

    let again = crate::support::push(&host, &to(&[&tree], "t"))
        .await
        .unwrap();
    assert_eq!((again.sent.files, again.sent.skipped), (0, 16));

    // Two equal files at the destination become one again, and a changed one is sent once.
    std::fs::remove_file(arrived.join("b/also large")).unwrap();
    std::fs::copy(arrived.join("a/large"), arrived.join("b/also large")).unwrap();
    let large = std::fs::File::open(arrived.join("b/also large")).unwrap();
    large
        .set_modified(
            std::fs::metadata(tree.join("a/large"))
                .unwrap()
                .modified()
                .unwrap(),
        )
        .unwrap();
    write(&tree.join("a/small"), &content(9, 500));
    let third = crate::support::push(&host, &to(&[&tree], "t"))
        .await
        .unwrap();
    assert_eq!(
        (third.sent.files, third.sent.bytes, third.sent.failed),
        (6, 500, 0)
    );
    assert_eq!(listing(&arrived), listing(&tree));
    assert_eq!(names_of_files(&arrived), names_of_files(&tree));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sources_that_are_hard_links_stay_hard_links() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let names = ["one", "other"].map(|name| source.path().join(name));
    write(&names[0], &content(1, 3 << 20));
    hard_link(&names[0], &names[1]).unwrap();
    let host = Host::directory(served.path());
    let outcome = crate::support::push(&host, &to(&[&names[0], &names[1]], ""))
        .await
        .unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.bytes), (2, 3 << 20));
    assert_eq!(names_of_files(served.path()), names_of_files(source.path()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_first_hard_link_fails_the_next_replaces_it() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let tree = source.path().join("t");
    for (name, size) in [("small", 1000), ("large", 3 << 20)] {
        write(&tree.join("1").join(name), &content(size as u64, size));
        hard_link(tree.join("1").join(name), tree.join(format!("2 {name}"))).unwrap();
        hard_link(tree.join("1").join(name), tree.join(format!("3 {name}"))).unwrap();
        std::fs::create_dir_all(served.path().join("t/1").join(name)).unwrap();
    }
    let host = Host::directory(served.path());
    let outcome = crate::support::push(&host, &to(&[&tree], "t"))
        .await
        .unwrap();
    let failed: Vec<_> = outcome
        .sent
        .failures
        .iter()
        .map(|(_, why)| why.code)
        .collect();
    assert_eq!(failed, [Code::IsDirectory, Code::IsDirectory]);
    assert_eq!(
        (outcome.sent.files, outcome.sent.bytes),
        (4, 1000 + (3 << 20))
    );
    assert_eq!(
        names_of_files(&served.path().join("t")),
        [["2 large", "3 large"], ["2 small", "3 small"]]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_attributes_are_reported_once_for_each_kind() {
    let source = tempdir().unwrap();
    let tree = source.path().join("t");
    linked_tree(&tree);
    mode(&tree.join("a/small"), 0o750);
    mode(&tree.join("b/alone"), 0o600);
    let store = Arc::new(MemoryStore::new().like_fat());
    let host = Host::serving(store.clone(), Config::default());
    let outcome = crate::support::push(&host, &to(&[&tree], "t"))
        .await
        .unwrap();
    assert_eq!(
        (outcome.sent.files, outcome.sent.failed),
        (16, 0),
        "{:?}",
        outcome.sent.failures
    );
    let unkept = outcome.summary.unkept.unwrap();
    let count = |aspect: Attribute| {
        unkept
            .iter()
            .find(|unkept| unkept.aspect == aspect as u32)
            .map(|unkept| unkept.count)
    };
    assert_eq!(count(Attribute::HardLink), Some(12));
    // a/small under each of its names, b/alone, and five directories.
    assert_eq!(count(Attribute::Mode), Some(5 + 1 + 5));
    assert_eq!(unkept.len(), 2);
    let links = unkept
        .iter()
        .find(|unkept| unkept.aspect == Attribute::HardLink as u32)
        .unwrap()
        .to_string();
    assert!(
        links.starts_with("12 hard links could not be kept (first: t/"),
        "{links}"
    );
    // Each is a separate file, and a second run sends nothing although times lost their nanoseconds.
    let size = |name: &str| {
        store
            .stat(&crate::support::path(name))
            .unwrap()
            .unwrap()
            .size
    };
    assert_eq!(
        (size("t/b/also large"), size("t/outside of large")),
        (3 << 20, 3 << 20)
    );
    let again = crate::support::push(&host, &to(&[&tree], "t"))
        .await
        .unwrap();
    assert_eq!(
        (again.sent.files, again.sent.skipped, again.sent.failed),
        (0, 16, 0)
    );
}

/// Makes files with these times, in seconds and nanoseconds.
fn files_of_times(tree: &Path, times: &[(i64, u32)]) {
    for (index, &(seconds, nanoseconds)) in times.iter().enumerate() {
        let file = tree.join(index.to_string());
        write(&file, &content(index as u64, 1000));
        let time = rustix::fs::Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds.into(),
        };
        let times = rustix::fs::Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(rustix::fs::CWD, &file, &times, rustix::fs::AtFlags::empty())
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_that_a_file_system_rounds_are_sent_once() {
    let source = tempdir().unwrap();
    let tree = source.path().join("t");
    // Odd seconds, and times before 1970, before 1980 and after 2107, which FAT cannot represent.
    let times = [
        (1_700_000_001, 999_999_999),
        (1_700_000_003, 0),
        (-2, 500_000_000),
        (7, 7),
        (4_500_000_001, 1),
    ];
    files_of_times(&tree, &times);
    let store = Arc::new(MemoryStore::new().like_fat());
    let host = Host::serving(store, Config::default());
    let options = to(&[&tree], "t");
    let first = crate::support::push(&host, &options).await.unwrap();
    assert_eq!((first.sent.files, first.sent.failed), (5, 0));
    let mut dry = to(&[&tree], "t");
    dry.take.dry_run = true;
    for options in [&options, &dry] {
        let again = crate::support::push(&host, options).await.unwrap();
        assert_eq!((again.sent.files, again.sent.skipped), (0, 5));
    }
    // Files that really changed are sent.
    files_of_times(&tree, &[(1_700_000_004, 0)]);
    let changed = crate::support::push(&host, &options).await.unwrap();
    assert_eq!((changed.sent.files, changed.sent.skipped), (1, 4));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_within_the_modify_window_are_equal() {
    let source = tempdir().unwrap();
    let tree = source.path().join("t");
    files_of_times(&tree, &[(1_700_000_000, 5), (1_700_000_000, 5)]);
    let served = tempdir().unwrap();
    let host = Host::directory(served.path());
    let mut options = to(&[&tree], "t");
    crate::support::push(&host, &options).await.unwrap();
    files_of_times(&tree, &[(1_700_000_003, 5), (1_700_000_003, 6)]);
    options.take.modify_window = Some(3);
    let again = crate::support::push(&host, &options).await.unwrap();
    assert_eq!((again.sent.files, again.sent.skipped), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_that_differ_only_in_case_stay_apart() {
    let source = tempdir().unwrap();
    let tree = source.path().join("t");
    for (name, size) in [
        ("README", 10),
        ("readme", 3 << 20),
        ("ReadMe", 0),
        ("\u{c4}", 1),
        ("\u{e4}", 2),
        ("other", 3),
    ] {
        write(&tree.join(name), &content(size as u64, size));
    }
    write(&tree.join("D/x"), b"1");
    write(&tree.join("d/y"), b"2");
    let store = Arc::new(MemoryStore::new().like_fat());
    let host = Host::serving(store.clone(), Config::default());
    for (sent, skipped) in [(4, 0), (0, 4)] {
        let outcome = crate::support::push(&host, &to(&[&tree], "t"))
            .await
            .unwrap();
        let mut failed: Vec<_> = outcome
            .sent
            .failures
            .iter()
            .map(|(path, why)| (path.to_string(), why.code))
            .collect();
        failed.sort_by(|a, b| a.0.cmp(&b.0));
        let refused = ["t/ReadMe", "t/d", "t/d/y", "t/readme", "t/\u{e4}"]
            .map(|name| (name.to_owned(), Code::BadName));
        assert_eq!(failed, refused);
        assert_eq!((outcome.sent.files, outcome.sent.skipped), (sent, skipped));
        let size = |name: &str| {
            store
                .stat(&crate::support::path(name))
                .unwrap()
                .map(|metadata| metadata.size)
        };
        assert_eq!(
            (size("t/README"), size("t/D/x"), size("t/d/y")),
            (Some(10), Some(1), None)
        );
    }
    // Where case matters, all of them exist.
    let served = tempdir().unwrap();
    let outcome = crate::support::push(&Host::directory(served.path()), &to(&[&tree], "t"))
        .await
        .unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.failed), (8, 0));
    assert_eq!(listing(&served.path().join("t")), listing(&tree));
}
