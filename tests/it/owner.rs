//! Attributes that are kept only on demand: extended attributes, owners, and the mode bits that give rights.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;

use crate::support::command::{Serving, is_root};
use crate::support::{Host, listing, push, to, write};
use haul::{Attribute, Config, LocalStore, MetadataWarning, PushOptions, WalkOptions};
use rustix::fs::{XattrFlags, getxattr, listxattr, setxattr};
use tempfile::tempdir;

fn set(path: &Path, name: &str, value: &[u8]) {
    setxattr(path, name, value, XattrFlags::empty()).unwrap();
}

/// The extended attributes of a file, by name.
fn xattrs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut list = [0; 4096];
    let length = listxattr(path, &mut list[..]).unwrap();
    let names = list[..length]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty());
    let mut all: Vec<_> = names
        .map(|name| {
            let mut value = vec![0; 65_536];
            let length = getxattr(path, name, &mut value[..]).unwrap();
            value.truncate(length);
            (String::from_utf8_lossy(name).into_owned(), value)
        })
        .collect();
    all.sort();
    all
}

/// Whether this test can run here; prints the reason if not.
fn possible(what: &str, possible: bool) -> bool {
    if !possible {
        println!("skipped: {what}");
    }
    possible
}

fn has_xattrs(path: &Path) -> bool {
    possible(
        "this filesystem has no extended attributes",
        setxattr(path, "user.test", b"", XattrFlags::empty()).is_ok(),
    )
}

fn with(options: PushOptions, owner: bool, xattrs: bool) -> PushOptions {
    PushOptions {
        walk: WalkOptions {
            owner,
            xattrs,
            ..options.walk.clone()
        },
        ..options
    }
}

fn count(unkept: Option<&[MetadataWarning]>, aspect: Attribute) -> u64 {
    unkept
        .unwrap_or_default()
        .iter()
        .find(|unkept| unkept.aspect == aspect as u32)
        .map_or(0, |unkept| unkept.count)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn extended_attributes_are_kept_on_demand() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    if !has_xattrs(source.path()) || !has_xattrs(served.path()) {
        return;
    }
    let (tree, arrived) = (source.path().join("t"), served.path().join("t"));
    for (name, size) in [("empty", 0), ("small", 100), ("d/large", 3 << 20)] {
        write(&tree.join(name), &crate::support::content(7, size));
        set(&tree.join(name), "user.note", name.as_bytes());
        set(&tree.join(name), "user.\u{e4} b", b"");
    }
    set(&tree.join("d"), "user.of directory", &[0, 255, 10, 27]);
    // user::rw-, user:65534:r--, group::r--, mask::r--, other::---
    let acl = [2, 0, 0, 0]
        .into_iter()
        .chain(
            [
                (1, 6, u32::MAX),
                (2, 4, 65_534),
                (4, 4, u32::MAX),
                (16, 4, u32::MAX),
                (32, 0, u32::MAX),
            ]
            .into_iter()
            .flat_map(|(tag, permissions, id): (u16, u16, u32)| {
                [
                    &tag.to_le_bytes()[..],
                    &permissions.to_le_bytes(),
                    &id.to_le_bytes(),
                ]
                .concat()
            }),
        )
        .collect::<Vec<u8>>();
    set(&tree.join("small"), "system.posix_acl_access", &acl);
    std::fs::set_permissions(tree.join("empty"), PermissionsExt::from_mode(0o444)).unwrap();

    let host = Host::directory(served.path());
    push(&host, &to(&[&tree], "t")).await.unwrap();
    assert_eq!(xattrs(&arrived.join("small")), [], "only on demand");
    let on_demand = with(to(&[&tree], "t"), false, true);
    let all = ["empty", "small", "d/large", "d", ""];
    for _ in 0..2 {
        let outcome = push(&host, &on_demand).await.unwrap();
        assert_eq!(
            (outcome.sent.files, outcome.sent.failed),
            (0, 0),
            "content is not sent for it"
        );
        assert_eq!(outcome.summary.unkept, None);
        for name in all {
            assert_eq!(
                xattrs(&arrived.join(name)),
                xattrs(&tree.join(name)),
                "{name:?}"
            );
        }
        assert_eq!(listing(&arrived), listing(&tree));
    }
    assert_eq!(xattrs(&arrived.join("small")).len(), 3);
    // Attributes that the source no longer has are removed.
    rustix::fs::removexattr(tree.join("empty"), "user.note").unwrap();
    set(&tree.join("d/large"), "user.note", b"another");
    rustix::fs::removexattr(tree.join("small"), "system.posix_acl_access").unwrap();
    push(&host, &on_demand).await.unwrap();
    // New files get all of them too.
    push(
        &host,
        &PushOptions {
            destination: crate::support::path("new"),
            ..on_demand
        },
    )
    .await
    .unwrap();
    for name in all {
        assert_eq!(
            xattrs(&arrived.join(name)),
            xattrs(&tree.join(name)),
            "{name:?}"
        );
        assert_eq!(
            xattrs(&served.path().join("new").join(name)),
            xattrs(&tree.join(name)),
            "{name:?}"
        );
    }
    assert_eq!(listing(&arrived), listing(&tree));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn xattrs_of_read_only_files_are_set_without_root() {
    let (source, server) = (tempdir().unwrap(), Serving::start_as_nobody(&[]));
    if !has_xattrs(source.path()) {
        return;
    }
    let (tree, arrived) = (source.path().join("t"), server.served.path().join("t"));
    write(&tree.join("f"), b"data");
    write(&tree.join("d/f"), b"data");
    for (name, mode) in [("f", 0o444), ("d", 0o555)] {
        std::fs::set_permissions(tree.join(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    let client = server.connect().await;
    client
        .push(&to(&[&tree], "t"), haul::ignore())
        .await
        .unwrap();
    for name in ["f", "d"] {
        set(&tree.join(name), "user.note", b"kept");
    }
    let options = with(to(&[&tree], "t"), true, true);
    let outcome = client.push(&options, haul::ignore()).await.unwrap();
    assert_eq!(
        (outcome.sent.files, outcome.sent.failed),
        (0, 0),
        "{:?}",
        outcome.sent.failures
    );
    for name in ["f", "d"] {
        assert_eq!(xattrs(&arrived.join(name)), xattrs(&tree.join(name)));
    }
    assert_eq!(listing(&arrived), listing(&tree));
    let unkept = outcome.summary.unkept.unwrap();
    assert_eq!(
        count(Some(&unkept), Attribute::Owner),
        4,
        "it was not told to keep owners"
    );
    assert!(
        unkept[0].to_string().contains("--allow-owner"),
        "{unkept:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn xattrs_that_do_not_fit_are_counted_where_they_are_lost() {
    let (source, store) = (tempdir().unwrap(), haul::MemoryStore::new());
    if !has_xattrs(source.path()) {
        return;
    }
    let tree = source.path().join("t");
    write(&tree.join("f"), b"data");
    set(&tree.join("f"), "user.fits", b"1");
    // Only some file systems accept it at all.
    let too_long = setxattr(tree.join("f"), "user.long", &[0; 9000], XattrFlags::empty()).is_ok();
    let host = Host::serving(std::sync::Arc::new(store), Config::default());
    let outcome = push(&host, &with(to(&[&tree], "t"), false, true))
        .await
        .unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.failed), (1, 0));
    assert_eq!(
        count(Some(&outcome.sent.unkept), Attribute::Xattr),
        u64::from(too_long)
    );
    assert_eq!(
        count(outcome.summary.unkept.as_deref(), Attribute::Xattr),
        1,
        "memory has none"
    );
}

/// Makes a tree of other users' files, with a program that runs as its owner.
fn owned_tree(tree: &Path) {
    write(&tree.join("d/f"), b"data");
    write(&tree.join("empty"), b"");
    write(&tree.join("program"), &crate::support::content(1, 3 << 20));
    symlink("f", tree.join("d/link")).unwrap();
    chown(tree.join("d/f"), Some(4_000_001), Some(4_000_002)).unwrap();
    chown(tree.join("d"), Some(65_534), Some(1)).unwrap();
    chown(tree.join("program"), Some(65_534), Some(65_534)).unwrap();
    lchown(tree.join("d/link"), Some(7), Some(8)).unwrap();
    std::fs::set_permissions(tree.join("program"), PermissionsExt::from_mode(0o6755)).unwrap();
    std::fs::set_permissions(tree.join("empty"), PermissionsExt::from_mode(0o1644)).unwrap();
}

fn owners(tree: &Path) -> Vec<(u32, u32, u32)> {
    ["", "d", "d/f", "d/link", "empty", "program"]
        .map(|name| tree.join(name).symlink_metadata().unwrap())
        .map(|metadata| (metadata.uid(), metadata.gid(), metadata.mode()))
        .to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn owners_and_setuid_bits_are_kept_if_the_server_allows_it() {
    if !possible("only root gives files away", is_root()) {
        return;
    }
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let (tree, arrived) = (source.path().join("t"), served.path().join("t"));
    owned_tree(&tree);
    let store = std::sync::Arc::new(LocalStore::open(served.path()).unwrap());
    let host = Host::serving(
        store,
        Config {
            allow_owner: true,
            ..Config::default()
        },
    );
    push(&host, &to(&[&tree], "t")).await.unwrap();
    assert!(
        owners(&arrived)
            .iter()
            .all(|&(user, group, mode)| (user, group, mode & 0o7000) == (0, 0, 0))
    );
    let on_demand = with(to(&[&tree], "t"), true, false);
    for sent in [1, 0] {
        let outcome = push(&host, &on_demand).await.unwrap();
        assert_eq!(
            (outcome.sent.files, outcome.sent.bytes, outcome.sent.failed),
            (sent, 0, 0),
            "only the link is made anew"
        );
        assert_eq!(
            (owners(&arrived), outcome.summary.unkept),
            (owners(&tree), None)
        );
        assert_eq!(listing(&arrived), listing(&tree));
    }
    push(
        &host,
        &PushOptions {
            destination: crate::support::path("new"),
            ..on_demand.clone()
        },
    )
    .await
    .unwrap();
    assert_eq!(owners(&served.path().join("new")), owners(&tree));
    // Without the option existing attributes are not changed.
    push(&host, &to(&[&tree], "t")).await.unwrap();
    assert_eq!(owners(&arrived), owners(&tree));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_option_a_server_sets_no_setuid_bits() {
    if !possible("only root gives files away", is_root()) {
        return;
    }
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let (tree, arrived) = (source.path().join("t"), served.path().join("t"));
    owned_tree(&tree);
    // cap_setuid=ep
    let capability = [
        1, 0, 0, 2, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    set(&tree.join("d/f"), "security.capability", &capability);
    set(&tree.join("d/f"), "user.note", b"1");
    let host = Host::directory(served.path());
    let outcome = push(&host, &with(to(&[&tree], "t"), true, true))
        .await
        .unwrap();
    assert_eq!(outcome.sent.failed, 0);
    assert!(
        owners(&arrived)
            .iter()
            .all(|&(user, group, mode)| (user, group, mode & 0o7000) == (0, 0, 0))
    );
    assert_eq!(
        xattrs(&arrived.join("d/f")),
        [("user.note".to_owned(), b"1".to_vec())]
    );
    let unkept = outcome.summary.unkept.unwrap();
    assert_eq!(
        (
            count(Some(&unkept), Attribute::Owner),
            count(Some(&unkept), Attribute::Xattr)
        ),
        (6, 1)
    );

    let told = Host::serving(
        std::sync::Arc::new(LocalStore::open(served.path()).unwrap()),
        Config {
            allow_owner: true,
            ..Config::default()
        },
    );
    let outcome = push(&told, &with(to(&[&tree], "t"), true, true))
        .await
        .unwrap();
    assert_eq!(outcome.summary.unkept, None);
    assert_eq!(xattrs(&arrived.join("d/f")), xattrs(&tree.join("d/f")));
}

#[test]
fn lost_attributes_are_one_line_of_the_summary() {
    let (source, server) = (tempdir().unwrap(), Serving::start(&[]));
    write(&source.path().join("t/f"), b"data");
    write(&source.path().join("t/g\x1b"), b"data");
    let sent = server.cp(source.path(), &["--owner", "t"], "t");
    let said = String::from_utf8(sent.stderr).unwrap();
    assert_eq!(sent.status.code(), Some(0), "{said}");
    let lines: Vec<_> = said
        .lines()
        .filter(|line| line.contains("could not be kept"))
        .collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(
        lines[0].starts_with("haul: 3 owners could not be kept (first: "),
        "{said}"
    );
    let sent = server.cp(source.path(), &["--json", "--owner", "t"], "t");
    let done = String::from_utf8(sent.stdout).unwrap();
    assert!(
        done.contains(r#""what":"owners""#) && done.contains(r#""count":3"#),
        "{done}"
    );
}
