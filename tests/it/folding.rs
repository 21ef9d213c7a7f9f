//! Destinations that treat different names as the same, or store a name other than the one sent. They fold case,
//! Unicode forms, and dots at the end of names.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crate::support::command::{Serving, haul, is_root};
use crate::support::{Host, path, push, to, write};
use haul::{
    Code, Config, Delete, Existing, MemoryStore, Outcome, PushOptions, ReceiveOptions,
    RelativePath, Store,
};
use tempfile::tempdir;

/// A server on a store that folds names; keys that may write may also remove.
fn folding() -> (Arc<MemoryStore>, Host) {
    let store = Arc::new(MemoryStore::new().like_fat());
    let config = Config {
        allow_delete: true,
        ..Config::default()
    };
    (store.clone(), Host::serving(store, config))
}

/// `haul sync TREE haul://HOST/m`.
async fn mirror(host: &Host, tree: &Path, existing: Existing) -> Outcome {
    let take = ReceiveOptions {
        existing,
        delete: Some(Delete::default()),
        ..ReceiveOptions::default()
    };
    let options = PushOptions {
        take,
        ..to(&[tree], "m")
    };
    push(host, &options).await.unwrap()
}

/// The paths below a directory, as they are stored.
fn stored(store: &dyn Store, below: &str) -> Vec<String> {
    fn find(store: &dyn Store, directory: &RelativePath, all: &mut Vec<String>) {
        for name in store.names(directory).unwrap() {
            let path = directory.join(&name).unwrap();
            all.push(path.to_string());
            if store.names(&path).is_ok() {
                find(store, &path, all);
            }
        }
    }
    let mut all = Vec::new();
    find(store, &path(below), &mut all);
    all.sort();
    all
}

fn tree(root: &Path, names: &[&str]) {
    for name in names {
        write(&root.join(name), b"content");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_carries_out_a_change_of_case_and_removes_the_rest() {
    let source = tempdir().unwrap();
    let t = source.path().join("t");
    tree(&t, &["Foo", "Dir/Sub/a", "Dir/B", "old", "same"]);
    let (store, host) = folding();
    let first = mirror(&host, &t, Existing::Update).await;
    assert_eq!((first.sent.files, first.summary.removed), (5, Some(0)));

    for [from, to] in [["Foo", "foO"], ["Dir/Sub", "Dir/SUB"], ["Dir", "dir"]] {
        fs::rename(t.join(from), t.join(to)).unwrap();
    }
    fs::remove_file(t.join("old")).unwrap();
    let second = mirror(&host, &t, Existing::Update).await;
    assert_eq!((second.sent.files, second.sent.failed), (0, 0));
    assert_eq!(
        (second.summary.removed, second.summary.unremoved),
        (Some(1), None)
    );
    let renamed = [
        "m/dir",
        "m/dir/B",
        "m/dir/SUB",
        "m/dir/SUB/a",
        "m/foO",
        "m/same",
    ];
    assert_eq!(stored(&*store, "m"), renamed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_keeps_files_stored_under_another_form_of_a_name() {
    let source = tempdir().unwrap();
    let t = source.path().join("t");
    tree(&t, &["Mr./name..", "e\u{301}te\u{301}/a", "plain", "old"]);
    let (store, host) = folding();
    mirror(&host, &t, Existing::Update).await;
    // The same name in another Unicode form, and with --existing skip, which keeps the old name.
    fs::rename(t.join("e\u{301}te\u{301}"), t.join("\u{e9}t\u{e9}")).unwrap();
    fs::rename(t.join("plain"), t.join("PLAIN")).unwrap();
    fs::remove_file(t.join("old")).unwrap();
    for (existing, removed) in [(Existing::Skip, 1), (Existing::Update, 0)] {
        let outcome = mirror(&host, &t, existing).await;
        assert_eq!((outcome.sent.files, outcome.sent.failed), (0, 0));
        assert_eq!(
            (outcome.summary.removed, outcome.summary.unremoved),
            (Some(removed), None)
        );
        let plain = ["m/plain", "m/PLAIN"][usize::from(existing == Existing::Update)];
        let all = stored(&*store, "m");
        assert!(all.iter().any(|name| name == "m/Mr/name"), "{all:?}");
        assert!(all.iter().any(|name| name == plain), "{all:?}");
        assert_eq!(all.len(), 5, "{all:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_names_that_collide_the_first_stays_whole() {
    let source = tempdir().unwrap();
    let t = source.path().join("t");
    let names = ["name", "name.", "\u{e9}", "e\u{301}", "Sub/x", "Sub./x"];
    tree(&t, &names);
    let (store, host) = folding();
    for sent in [3, 0] {
        let outcome = push(&host, &to(&[&t], "t")).await.unwrap();
        assert_eq!((outcome.sent.files, outcome.sent.failed), (sent, 4));
        let refused = |(_, why): &(RelativePath, haul::Reason)| why.code == Code::BadName;
        assert!(outcome.sent.failures.iter().all(refused));
        assert_eq!(stored(&*store, "t").len(), 4);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partial_is_not_served_under_another_case_of_its_name() {
    let source = tempdir().unwrap();
    let t = source.path().join("t");
    let digits = "0".repeat(32);
    let capitals = format!(".HAUL-{digits}.PARTIAL");
    let dotted = format!(".haul-{digits}.partial.");
    tree(&t, &["a", &capitals, &dotted]);
    let (_, host) = folding();
    let outcome = push(&host, &to(&[&t], "t")).await.unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.failed), (1, 2));
    assert_eq!(outcome.sent.failures[0].1.code, Code::BadName);
}

/// NTFS as a file system that folds case, in an image file; unmounted when dropped.
struct Ntfs<'a>(&'a Path);

impl<'a> Ntfs<'a> {
    /// Returns `None`, and prints the reason, if lowntfs-3g (Debian's ntfs-3g) is missing or cannot be mounted.
    fn mounted(image: &Path, on: &'a Path) -> Option<Self> {
        let run = |program: &str, arguments: &[&str]| {
            let ran = Command::new(program).args(arguments).output();
            ran.is_ok_and(|ran| ran.status.success())
        };
        fs::File::create(image).unwrap().set_len(16 << 20).unwrap();
        let [image, place] = [image, on].map(|path| path.to_str().unwrap());
        let made = is_root() && run("mkfs.ntfs", &["-q", "-F", image]);
        if !made || !run("lowntfs-3g", &[image, place, "-o", "ignore_case"]) {
            println!("skipped: no lowntfs-3g (Debian's ntfs-3g) that mounts here");
            return None;
        }
        Some(Self(on))
    }
}

impl Drop for Ntfs<'_> {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()));
    }
}

#[test]
fn a_case_folding_mount_below_the_store_is_detected() {
    let (source, disk) = (tempdir().unwrap(), tempdir().unwrap());
    let serving = Serving::start_with(&["--allow-delete"], |served| {
        fs::create_dir(served.join("below")).unwrap();
    });
    let below = serving.served.path().join("below");
    let Some(_mounted) = Ntfs::mounted(&disk.path().join("image"), &below) else {
        return;
    };
    let t = source.path().join("t");
    tree(&t, &["Foo", "Dir/a", "README", "readme"]);
    let run = |command: &str| {
        let url = format!("{}below/t", serving.url);
        let pin = serving.key_id.to_string();
        let ran = haul(source.path(), &[command, "--pin", &pin, "t", &url]);
        let said = String::from_utf8(ran.stderr).unwrap();
        (ran.status.code(), said)
    };
    let (code, said) = run("cp");
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("t/readme: the receiver's file system"),
        "{said}"
    );
    assert_eq!(fs::read_dir(below.join("t")).unwrap().count(), 3);

    fs::remove_file(t.join("readme")).unwrap();
    fs::rename(t.join("Foo"), t.join("foo")).unwrap();
    fs::rename(t.join("Dir"), t.join("DIR")).unwrap();
    fs::remove_file(t.join("README")).unwrap();
    let (code, said) = run("sync");
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("nothing to do"), "{said}");
    let mut names: Vec<_> = fs::read_dir(below.join("t"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    // lowntfs-3g shows all names in lower case, so a stored name equals a sent one only by chance.
    assert_eq!(names, ["dir", "foo"]);
}
