//! Mirrors: what the source no longer has goes at the destination, and only then and only there.

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Output;

use haul::client::PushOptions;
use haul::error::{Code, Error};
use haul::wire::{Delete, Take};
use support::command::{Serving, haul, is_root};
use support::{Host, listing, push, to, write};
use tempfile::tempdir;

fn tree(root: &Path, names: &[&str]) {
    for name in names {
        write(&root.join(name), name.as_bytes());
    }
}

fn sync(serving: &Serving, arguments: &[&str], from: &Path, way: [&str; 2]) -> (Option<i32>, String) {
    let pin = serving.key_id.to_string();
    let place =
        |name: &str| name.strip_prefix("haul:").map_or(name.to_owned(), |below| format!("{}{below}", serving.url));
    let way = way.map(place);
    let all: Vec<&str> =
        ["sync", "--pin", &pin].into_iter().chain(arguments.iter().copied()).chain([&*way[0], &*way[1]]).collect();
    let Output { status, stderr, .. } = haul(from, &all);
    (status.code(), String::from_utf8(stderr).unwrap())
}

#[test]
fn the_destination_becomes_the_same_and_nothing_beside_it_is_touched() {
    let source = tempdir().unwrap();
    tree(source.path(), &["t/a", "t/sub/b"]);
    let serving = Serving::start(&["--allow-delete"]);
    let there = serving.served.path();
    tree(there, &["t/a", "t/old/x/y", "t/sub/c", "other/d"]);
    symlink("../other", there.join("t/out")).unwrap();
    let before = listing(there);
    let (code, said) = sync(&serving, &["--dry-run"], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(0), "{said}");
    for line in ["would remove old/x/y", "would remove old", "would remove out", "would remove sub/c"] {
        assert!(said.lines().any(|l| l == line), "{line} in {said}");
    }
    assert!(said.contains("would remove 5 at the destination"), "{said}");
    assert_eq!(listing(there), before);

    let (code, said) = sync(&serving, &[], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("removed 5 at the destination"), "{said}");
    assert_eq!(listing(&there.join("t")), listing(&source.path().join("t")));
    assert_eq!(fs::read(there.join("other/d")).unwrap(), b"other/d");
    // Again: nothing to do. With a slash it is the same.
    let (code, said) = sync(&serving, &[], source.path(), ["t/", "haul:t/"]);
    assert_eq!((code, said.contains("removed")), (Some(0), false), "{said}");

    // The other way: this machine needs nobody's leave.
    tree(source.path(), &["t/mine", "t/sub/deep/mine"]);
    let (code, said) = sync(&serving, &["-v"], source.path(), ["haul:t", "t"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.lines().any(|l| l == "removed sub/deep/mine"), "{said}");
    assert_eq!(listing(&there.join("t")), listing(&source.path().join("t")));
}

#[test]
fn all_of_a_server_can_be_mirrored_both_ways() {
    let source = tempdir().unwrap();
    tree(source.path(), &["t/a", "t/sub/b"]);
    let serving = Serving::start(&["--allow-delete"]);
    tree(serving.served.path(), &["old", "sub/c"]);
    let (code, said) = sync(&serving, &[], source.path(), ["t", "haul:"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(listing(serving.served.path()), listing(&source.path().join("t")));
    tree(source.path(), &["t/mine"]);
    let (code, said) = sync(&serving, &[], source.path(), ["haul:", "t"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(listing(serving.served.path()), listing(&source.path().join("t")));
}

#[test]
fn a_server_that_did_not_say_so_lets_nobody_remove() {
    let source = tempdir().unwrap();
    tree(source.path(), &["t/a"]);
    let serving = Serving::start(&[]);
    tree(serving.served.path(), &["t/old"]);
    let (code, said) = sync(&serving, &[], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("--allow-delete"), "{said}");
    assert!(!serving.served.path().join("t/a").exists(), "it is said before anything is sent");
    assert!(serving.served.path().join("t/old").exists());
}

#[test]
fn an_empty_source_and_too_much_to_remove_remove_nothing() {
    let source = tempdir().unwrap();
    fs::create_dir(source.path().join("t")).unwrap();
    let serving = Serving::start(&["--allow-delete"]);
    let there = serving.served.path();
    tree(there, &["t/a", "t/b"]);
    let (code, said) = sync(&serving, &[], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("nothing was removed: the source is empty"), "{said}");
    let (code, said) = sync(&serving, &["--max-delete", "1"], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("nothing was removed: 2 would go, and 1 may"), "{said}");
    assert!(there.join("t/a").exists() && there.join("t/b").exists());
    let (code, said) = sync(&serving, &["--max-delete", "2"], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(fs::read_dir(there.join("t")).unwrap().count(), 0);
}

#[test]
fn one_failure_is_enough_to_remove_nothing() {
    let source = tempdir().unwrap();
    tree(source.path(), &["t/a", "t/becomes"]);
    let serving = Serving::start(&["--allow-delete"]);
    let there = serving.served.path();
    // A directory stands where a file should come.
    tree(there, &["t/old", "t/becomes/x"]);
    for how in [&[][..], &["--existing", "skip"], &["--existing", "overwrite"]] {
        let (code, said) = sync(&serving, how, source.path(), ["t", "haul:t"]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("nothing was removed: "), "{said}");
    }
    assert!(there.join("t/old").exists() && there.join("t/becomes/x").exists() && there.join("t/a").exists());
}

#[test]
fn a_directory_that_cannot_be_read_removes_nothing() {
    if is_root() {
        println!("skipped: root reads every directory");
        return;
    }
    let source = tempdir().unwrap();
    tree(source.path(), &["t/a", "t/closed/b"]);
    fs::set_permissions(source.path().join("t/closed"), PermissionsExt::from_mode(0o0)).unwrap();
    let serving = Serving::start(&["--allow-delete"]);
    tree(serving.served.path(), &["t/closed/b", "t/old"]);
    let (code, said) = sync(&serving, &[], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(serving.served.path().join("t/closed/b").exists() && serving.served.path().join("t/old").exists());
}

#[test]
fn what_is_no_single_directory_is_not_mirrored() {
    let source = tempdir().unwrap();
    tree(source.path(), &["f"]);
    let serving = Serving::start(&["--allow-delete"]);
    tree(serving.served.path(), &["t/a", "f"]);
    let (code, said) = sync(&serving, &[], source.path(), ["f", "haul:t"]);
    assert_ne!(code, Some(0), "{said}");
    assert!(serving.served.path().join("t/a").exists());
    tree(source.path(), &["d/a"]);
    let (code, said) = sync(&serving, &[], source.path(), ["haul:f", "d"]);
    assert_ne!(code, Some(0), "{said}");
    assert!(source.path().join("d/a").exists());
    let (code, said) = sync(&serving, &["--exclude", "x"], source.path(), ["d", "haul:t"]);
    assert_eq!(code, Some(2), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_cannot_ask_for_it_past_the_command_line_either() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    tree(source.path(), &["t/a"]);
    tree(served.path(), &["t/old"]);
    let host = Host::directory(served.path());
    let take = Take { delete: Some(Delete::default()), ..Take::default() };
    let options = PushOptions { take, ..to(&[&source.path().join("t")], "t") };
    match push(&host, &options).await {
        Err(Error::Refused(why)) => assert_eq!(why.code, Code::NotAllowed),
        other => panic!("{other:?}"),
    }
    assert!(served.path().join("t/old").exists());
}
