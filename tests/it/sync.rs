//! Mirrors: what the source no longer has is removed at the destination, and nothing else.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Output;
use std::sync::Arc;

use crate::support::command::{Serving, haul, is_root};
use crate::support::{Host, listing, push, to, write};
use haul::{
    Attribute, Code, Config, Delete, Error, Kind, LocalStore, MemoryStore, PushOptions,
    ReceiveOptions, Store,
};
use tempfile::tempdir;

fn tree(root: &Path, names: &[&str]) {
    for name in names {
        write(&root.join(name), name.as_bytes());
    }
}

fn sync(
    serving: &Serving,
    arguments: &[&str],
    from: &Path,
    way: [&str; 2],
) -> (Option<i32>, String) {
    let pin = serving.key_id.to_string();
    let place = |name: &str| {
        name.strip_prefix("haul:")
            .map_or(name.to_owned(), |below| format!("{}{below}", serving.url))
    };
    let way = way.map(place);
    let all: Vec<&str> = ["sync", "--pin", &pin]
        .into_iter()
        .chain(arguments.iter().copied())
        .chain([&*way[0], &*way[1]])
        .collect();
    let Output { status, stderr, .. } = haul(from, &all);
    (status.code(), String::from_utf8(stderr).unwrap())
}

#[test]
fn a_mirror_changes_nothing_beside_its_destination() {
    let source = tempdir().unwrap();
    tree(source.path(), &["t/a", "t/sub/b"]);
    let serving = Serving::start(&["--allow-delete"]);
    let there = serving.served.path();
    tree(there, &["t/a", "t/old/x/y", "t/sub/c", "other/d"]);
    symlink("../other", there.join("t/out")).unwrap();
    let before = listing(there);
    let (code, said) = sync(&serving, &["--dry-run"], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(0), "{said}");
    for line in [
        "would remove old/x/y",
        "would remove old",
        "would remove out",
        "would remove sub/c",
    ] {
        assert!(said.lines().any(|l| l == line), "{line} in {said}");
    }
    assert!(said.contains("would remove 5 at the destination"), "{said}");
    assert_eq!(listing(there), before);

    let (code, said) = sync(&serving, &[], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("removed 5 at the destination"), "{said}");
    assert_eq!(listing(&there.join("t")), listing(&source.path().join("t")));
    assert_eq!(fs::read(there.join("other/d")).unwrap(), b"other/d");
    // A second run has nothing to do. With a slash the result is the same.
    let (code, said) = sync(&serving, &[], source.path(), ["t/", "haul:t/"]);
    assert_eq!((code, said.contains("removed")), (Some(0), false), "{said}");

    // In the other direction this machine needs no permission.
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
    assert_eq!(
        listing(serving.served.path()),
        listing(&source.path().join("t"))
    );
    tree(source.path(), &["t/mine"]);
    let (code, said) = sync(&serving, &[], source.path(), ["haul:", "t"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(
        listing(serving.served.path()),
        listing(&source.path().join("t"))
    );
}

#[test]
fn a_server_without_the_option_permits_no_removal() {
    let source = tempdir().unwrap();
    tree(source.path(), &["t/a"]);
    let serving = Serving::start(&[]);
    tree(serving.served.path(), &["t/old"]);
    let (code, said) = sync(&serving, &[], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("--allow-delete"), "{said}");
    assert!(
        !serving.served.path().join("t/a").exists(),
        "it is said before anything is sent"
    );
    assert!(serving.served.path().join("t/old").exists());
}

#[test]
fn an_empty_source_or_too_much_to_remove_removes_nothing() {
    let source = tempdir().unwrap();
    fs::create_dir(source.path().join("t")).unwrap();
    let serving = Serving::start(&["--allow-delete"]);
    let there = serving.served.path();
    tree(there, &["t/a", "t/b"]);
    let (code, said) = sync(&serving, &[], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("nothing was removed: the source is empty"),
        "{said}"
    );
    let (code, said) = sync(
        &serving,
        &["--max-delete", "1"],
        source.path(),
        ["t", "haul:t"],
    );
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("nothing was removed: 2 to remove, and --max-delete allows 1"),
        "{said}"
    );
    assert!(there.join("t/a").exists() && there.join("t/b").exists());
    let (code, said) = sync(
        &serving,
        &["--max-delete", "2"],
        source.path(),
        ["t", "haul:t"],
    );
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(fs::read_dir(there.join("t")).unwrap().count(), 0);
}

#[test]
fn one_failure_is_enough_to_remove_nothing() {
    let source = tempdir().unwrap();
    tree(source.path(), &["t/a", "t/becomes"]);
    let serving = Serving::start(&["--allow-delete"]);
    let there = serving.served.path();
    // A directory exists where a file should be put.
    tree(there, &["t/old", "t/becomes/x"]);
    for how in ["skip", "fail"] {
        let (code, said) = sync(
            &serving,
            &["--existing", how],
            source.path(),
            ["t", "haul:t"],
        );
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("nothing was removed: "), "{said}");
    }
    assert!(
        there.join("t/old").exists()
            && there.join("t/becomes/x").exists()
            && there.join("t/a").exists()
    );
}

#[test]
fn a_directory_that_cannot_be_read_removes_nothing() {
    if is_root() {
        println!("skipped: root reads every directory");
        return;
    }
    let source = tempdir().unwrap();
    tree(source.path(), &["t/a", "t/closed/b"]);
    fs::set_permissions(
        source.path().join("t/closed"),
        PermissionsExt::from_mode(0o0),
    )
    .unwrap();
    let serving = Serving::start(&["--allow-delete"]);
    tree(serving.served.path(), &["t/closed/b", "t/old"]);
    let (code, said) = sync(&serving, &[], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        serving.served.path().join("t/closed/b").exists()
            && serving.served.path().join("t/old").exists()
    );
}

#[test]
fn only_a_single_directory_is_mirrored() {
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
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_refuses_a_mirror_that_it_does_not_permit() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    tree(source.path(), &["t/a"]);
    tree(served.path(), &["t/old"]);
    let host = Host::directory(served.path());
    let take = ReceiveOptions {
        delete: Some(Delete::default()),
        ..ReceiveOptions::default()
    };
    let options = PushOptions {
        take,
        ..to(&[&source.path().join("t")], "t")
    };
    match push(&host, &options).await {
        Err(Error::Refused(why)) => assert_eq!(why.code, Code::NotAllowed),
        other => panic!("{other:?}"),
    }
    assert!(served.path().join("t/old").exists());
}

/// Makes entries of one kind in the source and of another kind at the destination.
fn of_other_kinds(source: &Path, there: &Path) {
    tree(source, &["t/file", "t/directory/in", "t/through/in"]);
    write(&source.join("t/empty"), b"");
    write(&source.join("t/big"), &vec![7; 400_000]);
    symlink("nowhere", source.join("t/link")).unwrap();
    tree(
        there,
        &[
            "t/file/a",
            "t/file/sub/b",
            "t/empty/a",
            "t/big/a",
            "t/link/a",
            "t/directory",
            "other/in",
        ],
    );
    symlink("../other", there.join("t/through")).unwrap();
}

#[test]
fn a_mirror_replaces_entries_of_another_kind_but_no_link_target() {
    let (source, back) = (tempdir().unwrap(), tempdir().unwrap());
    let serving = Serving::start(&["--allow-delete"]);
    let there = serving.served.path();
    of_other_kinds(source.path(), there);
    let (code, said) = sync(&serving, &["--dry-run"], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.lines().any(|line| line == "would remove file/sub/b"),
        "{said}"
    );
    assert!(said.contains("would remove 6 at the destination"), "{said}");
    let (code, said) = sync(
        &serving,
        &["--existing", "fail"],
        source.path(),
        ["t", "haul:t"],
    );
    assert_eq!(code, Some(1), "{said}");
    let (code, said) = sync(
        &serving,
        &["--max-delete", "0"],
        source.path(),
        ["t", "haul:t"],
    );
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("2 to remove, and --max-delete allows 0")
            || said.contains("3 to remove, and --max-delete allows 0"),
        "{said}"
    );
    assert!(there.join("t/file/sub/b").exists() && there.join("t/link/a").exists());
    fs::remove_dir_all(there.join("t")).unwrap();
    fs::remove_dir_all(source.path().join("t")).unwrap();
    fs::remove_dir_all(there.join("other")).unwrap();
    of_other_kinds(source.path(), there);

    let (code, said) = sync(&serving, &["-v"], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.lines().any(|line| line == "removed file/sub/b"),
        "{said}"
    );
    assert!(said.contains("removed 6 at the destination"), "{said}");
    assert_eq!(listing(&there.join("t")), listing(&source.path().join("t")));
    assert_eq!(fs::read(there.join("other/in")).unwrap(), b"other/in");

    // The other direction, by a pull.
    of_other_kinds(back.path(), back.path().join("x").as_path());
    fs::rename(back.path().join("x/t"), back.path().join("y")).unwrap();
    let (code, said) = sync(&serving, &[], back.path(), ["haul:t", "y"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(listing(&there.join("t")), listing(&back.path().join("y")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_mirror_a_hard_link_replaces_entries_of_another_kind() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let root = source.path().join("t");
    tree(&root, &["a"]);
    fs::create_dir(root.join("d")).unwrap();
    for name in ["b", "c", "d/e"] {
        fs::hard_link(root.join("a"), root.join(name)).unwrap();
    }
    let there = served.path().join("t");
    tree(&there, &["b/x/y", "d"]);
    symlink("nowhere", there.join("c")).unwrap();
    let config = Config {
        allow_delete: true,
        ..Config::default()
    };
    let host = Host::serving(Arc::new(LocalStore::open(served.path()).unwrap()), config);
    let mut options = to(&[&root], "t");
    options.take.delete = Some(Delete::default());
    let outcome = push(&host, &options).await.unwrap();
    assert_eq!(outcome.sent.failed, 0, "{:?}", outcome.sent.failures);
    assert_eq!(outcome.summary.unkept, None);
    assert_eq!(listing(&there), listing(&root));
    assert_eq!(fs::metadata(there.join("a")).unwrap().nlink(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_hard_links_a_mirror_warns_and_still_replaces() {
    let source = tempdir().unwrap();
    let root = source.path().join("t");
    tree(&root, &["a"]);
    fs::hard_link(root.join("a"), root.join("b")).unwrap();
    let store = MemoryStore::new().like_fat();
    store
        .make_directory(&crate::support::path("t/b/x"))
        .unwrap();
    let config = Config {
        allow_delete: true,
        ..Config::default()
    };
    let host = Host::serving(Arc::new(store.clone()), config);
    let mut options = to(&[&root], "t");
    options.take.delete = Some(Delete::default());
    let outcome = push(&host, &options).await.unwrap();
    assert_eq!(outcome.sent.failed, 0, "{:?}", outcome.sent.failures);
    let unkept = outcome.summary.unkept.unwrap_or_default();
    assert!(
        unkept
            .iter()
            .any(|unkept| unkept.aspect == Attribute::HardLink as u32)
    );
    let there = store.stat(&crate::support::path("t/b")).unwrap().unwrap();
    assert_eq!((there.kind, there.size), (Some(Kind::File), 1));
}

#[test]
fn without_delete_nothing_of_another_kind_is_replaced() {
    let source = tempdir().unwrap();
    let serving = Serving::start(&["--allow-delete"]);
    of_other_kinds(source.path(), serving.served.path());
    let before = listing(&serving.served.path().join("t/file"));
    let pin = serving.key_id.to_string();
    let Output { status, stderr, .. } =
        haul(source.path(), &["cp", "--pin", &pin, "t", &serving.url]);
    let said = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("t/file: a directory has this name"), "{said}");
    assert_eq!(listing(&serving.served.path().join("t/file")), before);
}

/// Names that exist at both ends, at the source only and at the destination only.
fn with_left_outs(source: &Path, there: &Path) {
    tree(source, &["t/a", "t/a.o", "t/sub/b", "t/build/new"]);
    tree(
        there,
        &[
            "t/a",
            "t/a.o",
            "t/old",
            "t/sub/c.o",
            "t/sub/d",
            "t/build/x",
            "t/gone/e",
            "t/gone/f.o",
        ],
    );
}

#[test]
fn a_mirror_keeps_excluded_files_as_rsync_does() {
    let serving = Serving::start(&["--allow-delete"]);
    let there = serving.served.path();
    let source = tempdir().unwrap();
    with_left_outs(source.path(), there);
    let expected = tempdir().unwrap();
    with_left_outs(source.path(), expected.path());
    let from = format!("{}/", source.path().join("t").display());
    let rsync = std::process::Command::new("rsync")
        .args([
            "-a",
            "--delete",
            "--exclude=*.o",
            "--exclude=/build/",
            &from,
        ])
        .arg(expected.path().join("t"))
        .output();
    let arguments = ["-v", "--exclude", "*.o", "--exclude", "/build/"];
    let (code, said) = sync(&serving, &arguments, source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(0), "{said}");
    let mut left = names(&there.join("t"));
    assert_eq!(
        left,
        ["a", "a.o", "build/x", "gone/f.o", "sub/b", "sub/c.o"],
        "{said}"
    );
    match rsync {
        Ok(output) if output.status.success() => {
            assert_eq!(
                left,
                names(&expected.path().join("t")),
                "as rsync leaves it"
            )
        }
        _ => eprintln!("skipped: no rsync to compare with"),
    }
    // In a pull the rules are those of this machine.
    tree(source.path(), &["t/mine", "t/mine.o"]);
    let (code, said) = sync(&serving, &arguments, source.path(), ["haul:t", "t"]);
    assert_eq!(code, Some(0), "{said}");
    left = names(&source.path().join("t"));
    assert_eq!(left, ["a", "a.o", "build/new", "mine.o", "sub/b"], "{said}");
}

#[test]
fn a_mirror_keeps_files_that_gitignore_excludes() {
    let serving = Serving::start(&["--allow-delete"]);
    let there = serving.served.path();
    let source = tempdir().unwrap();
    tree(source.path(), &["t/a", "t/sub/b", "t/sub/x.tmp"]);
    write(&source.path().join("t/.gitignore"), b"*.log\n!keep.log\n");
    write(&source.path().join("t/sub/.gitignore"), b"*.tmp\n");
    tree(
        there,
        &[
            "t/a.log",
            "t/keep.log",
            "t/sub/y.tmp",
            "t/z.tmp",
            "t/sub/deep/u.tmp",
            "t/sub/deep/v",
        ],
    );
    for _ in 0..2 {
        let (code, said) = sync(&serving, &["--gitignore"], source.path(), ["t", "haul:t"]);
        assert_eq!(code, Some(0), "{said}");
        let left = names(&there.join("t"));
        assert_eq!(
            left,
            [
                ".gitignore",
                "a",
                "a.log",
                "sub/.gitignore",
                "sub/b",
                "sub/deep/u.tmp",
                "sub/y.tmp"
            ],
            "{said}"
        );
    }
}

#[test]
fn a_list_of_names_cannot_be_mirrored() {
    let source = tempdir().unwrap();
    tree(source.path(), &["t/a", "list"]);
    let serving = Serving::start(&["--allow-delete"]);
    tree(serving.served.path(), &["t/old"]);
    let (code, said) = sync(
        &serving,
        &["--files-from", "list"],
        source.path(),
        ["t", "haul:t"],
    );
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("cannot mirror a list of names"), "{said}");
    assert!(serving.served.path().join("t/old").exists());
}

/// Paths of files and links below a directory, sorted.
fn names(root: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => open.push(entry.path()),
                false => names.push(
                    entry
                        .path()
                        .strip_prefix(root)
                        .unwrap()
                        .to_str()
                        .unwrap()
                        .to_owned(),
                ),
            }
        }
    }
    names.sort();
    names
}

#[test]
fn a_destination_inside_the_source_is_refused_before_writing() {
    let serving = Serving::start(&["--allow-delete"]);
    let here = serving.served.path();
    tree(here, &["d/a", "d/sub/b", "e/c"]);
    let before = listing(here);
    let cp = |way: [&str; 2]| {
        let way = way.map(|name| {
            name.strip_prefix("haul:")
                .map_or(name.to_owned(), |n| format!("{}{n}", serving.url))
        });
        let output = haul(
            here,
            &["cp", "--pin", &serving.key_id.to_string(), &way[0], &way[1]],
        );
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    for way in [
        ["d", "haul:d/"],
        ["d", "haul:d/sub"],
        ["d", "haul:d/new/new"],
        ["haul:d", "d/"],
        ["haul:d", "d/sub/"],
    ] {
        let (code, said) = cp(way);
        assert_eq!(code, Some(1), "{way:?}: {said}");
        assert!(
            said.contains("the destination is inside a source"),
            "{way:?}: {said}"
        );
    }
    assert_eq!(listing(here), before);
    for way in [["d", "haul:d"], ["haul:d", "d"], ["d", "haul:"]] {
        let (code, said) = cp(way);
        assert_eq!(code, Some(0), "{way:?}: {said}");
    }
    assert_eq!(listing(here), before, "on itself it changes nothing");
    assert_eq!(cp(["d", "haul:e/"]).0, Some(0));
    assert_eq!(listing(&here.join("e/d")), listing(&here.join("d")));
}

#[test]
fn a_mirror_never_removes_its_own_source() {
    let serving = Serving::start(&["--allow-delete"]);
    let here = serving.served.path();
    tree(here, &["d/a", "d/sub/b", "d/sub/deep/c"]);
    let before = listing(here);
    for way in [
        ["d/sub", "haul:d"],
        ["d/sub/deep", "haul:"],
        ["haul:d/sub", "d"],
        ["haul:d/sub/deep", "."],
    ] {
        let (code, said) = sync(&serving, &[], here, way);
        assert_eq!(code, Some(1), "{way:?}: {said}");
        assert!(
            said.contains("the source is inside the destination"),
            "{way:?}: {said}"
        );
        assert_eq!(listing(here), before, "{way:?}");
    }
    let (code, said) = sync(&serving, &[], here, ["d", "haul:d"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(listing(here), before);
}

#[test]
fn a_fifo_in_the_source_prevents_no_removal() {
    let (source, serving) = (tempdir().unwrap(), Serving::start(&["--allow-delete"]));
    tree(source.path(), &["t/a", "t/sub/b"]);
    let make = |path: &Path| {
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    };
    make(&source.path().join("t/sub/fifo"));
    let there = serving.served.path();
    tree(there, &["t/old", "t/sub/fifo", "back/old"]);
    let (code, said) = sync(&serving, &[], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("sub/fifo: ") && said.contains("removed 1 at the destination"),
        "{said}"
    );
    assert!(
        !there.join("t/old").exists() && there.join("t/sub/fifo").exists(),
        "what it would replace is left"
    );
    // By a pull.
    fs::remove_file(there.join("t/sub/fifo")).unwrap();
    make(&there.join("t/sub/fifo"));
    tree(source.path(), &["back/old"]);
    let (code, said) = sync(&serving, &[], source.path(), ["haul:t", "back"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("removed 1 at the destination"), "{said}");
    assert!(!source.path().join("back/old").exists() && source.path().join("back/sub/b").exists());
}

#[test]
fn a_fifo_in_the_source_keeps_a_directory_of_its_name() {
    let (source, serving) = (tempdir().unwrap(), Serving::start(&["--allow-delete"]));
    tree(source.path(), &["t/a"]);
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let fifo = source.path().join("t/pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let there = serving.served.path();
    tree(there, &["t/old", "t/pipe/kept", "t/pipe/sub/kept"]);
    let (code, said) = sync(&serving, &[], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(
        names(&there.join("t")),
        ["a", "pipe/kept", "pipe/sub/kept"],
        "{said}"
    );
}

#[test]
fn a_source_with_only_a_fifo_counts_as_empty() {
    let (source, serving) = (tempdir().unwrap(), Serving::start(&["--allow-delete"]));
    fs::create_dir(source.path().join("t")).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let fifo = source.path().join("t/pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let there = serving.served.path();
    tree(there, &["t/old"]);
    let (code, said) = sync(&serving, &[], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        there.join("t/old").exists() && said.contains("--max-delete"),
        "{said}"
    );
}

#[test]
fn a_source_deep_inside_the_destination_is_not_removed() {
    let serving = Serving::start(&["--allow-delete"]);
    let here = serving.served.path();
    // Deeper than the number of marks in an origin.
    let deep = vec!["d"; 80].join("/");
    tree(here, &[&format!("{deep}/a"), "beside"]);
    let before = listing(here);
    for way in [[&*deep, "haul:"], [&format!("haul:{deep}"), "."]] {
        let (code, said) = sync(&serving, &[], here, way);
        assert_eq!(code, Some(1), "{said}");
        assert_eq!(listing(here), before, "{said}");
    }
}

#[test]
fn a_key_that_may_only_write_may_not_mirror() {
    let source = tempdir().unwrap();
    tree(source.path(), &["t/a"]);
    let serving = Serving::start(&["--allow-delete", "--anyone", "write"]);
    tree(serving.served.path(), &["t/old"]);
    let (code, said) = sync(&serving, &[], source.path(), ["t", "haul:t"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(
        said.contains("this key may not read on this server, so it can neither compare"),
        "{said}"
    );
    assert!(
        serving.served.path().join("t/old").exists() && !serving.served.path().join("t/a").exists()
    );
}

#[test]
fn removals_are_reported_in_every_run() {
    // A race between the summary and the reports before it: a loss does not show in a single run.
    let source = tempdir().unwrap();
    tree(source.path(), &["t/a"]);
    let serving = Serving::start(&["--allow-delete"]);
    for _ in 0..20 {
        tree(serving.served.path(), &["t/old/x", "t/old/y"]);
        tree(source.path(), &["back/a", "back/old/x", "back/old/y"]);
        for way in [["t", "haul:t"], ["haul:t", "back"]] {
            let (code, said) = sync(&serving, &["-v"], source.path(), way);
            assert_eq!(code, Some(0), "{said}");
            let told = said
                .lines()
                .filter(|line| line.starts_with("removed old"))
                .count();
            assert!(
                told == 3 && said.contains("removed 3 at the destination"),
                "{way:?}: {said}"
            );
        }
    }
}
