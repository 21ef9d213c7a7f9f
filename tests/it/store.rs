//! One suite for every store: what `Store` promises, tested on a real directory and in memory.

use std::time::Duration;

use haul::{
    Attributes, Code, Durability, Kind, LocalStore, MemoryStore, PartialKey, RelativePath, Store,
    Time, Upload,
};

/// Sweeps, and checks how many partials were removed.
fn sweep(store: &dyn Store, age: Duration, expected: u64) {
    assert_eq!(store.sweep(age).unwrap(), expected);
}

/// Runs each function on both stores.
macro_rules! conformance {
    ($($name:ident)*) => {
        mod local {
            use super::*;
            $(#[test] fn $name() {
                let directory = tempfile::tempdir().unwrap();
                super::$name(&LocalStore::open(directory.path()).unwrap());
            })*
        }
        mod memory {
            use super::*;
            $(#[test] fn $name() { super::$name(&MemoryStore::new()); })*
        }
    };
}

conformance! {
    a_file_appears_whole_at_its_commit
    the_old_file_stays_whole_until_the_commit
    a_reader_keeps_the_version_it_opened
    a_discarded_upload_leaves_nothing
    an_upload_that_wrote_nothing_leaves_nothing_to_resume
    a_dropped_upload_is_resumed_with_what_it_held
    a_partial_longer_than_its_source_is_cut
    holes_read_as_zeros_and_are_reported
    a_hole_replaces_content_of_an_earlier_attempt
    a_partial_of_holes_alone_is_not_kept
    a_partial_is_bound_to_key_path_size_and_time
    the_same_claim_twice_is_busy
    the_last_commit_wins_whole
    an_exclusive_commit_replaces_nothing
    names_are_bytes
    an_empty_file_is_a_file
    mode_and_time_are_set_before_the_name
    only_permission_bits_are_carried_over
    attributes_of_files_and_directories
    every_change_makes_another_version
    symbolic_links_are_made_replaced_and_read
    a_link_to_nothing_is_refused
    a_file_without_a_mode_keeps_the_mode_of_the_old_file
    a_directory_is_private_until_its_mode_is_set
    links_are_never_followed
    a_hard_link_is_the_same_file
    a_hard_link_replaces_a_file
    only_files_are_hard_linked
    a_removal_removes_nothing_else
    a_directory_in_the_way_of_a_file
    a_file_in_the_way_of_a_directory
    a_directory_in_the_way_at_the_commit_keeps_the_partial
    two_hundred_levels
    nothing_exists_below_a_missing_directory
    the_root_is_a_directory
    sweeping_takes_only_old_partials_that_are_closed
    many_uploads_at_once
}

fn path(text: &str) -> RelativePath {
    RelativePath::from_components(text.split('/')).unwrap()
}

fn claim(owner: u8, size: u64) -> PartialKey {
    PartialKey {
        owner: [owner; 32],
        size,
        modified: Some(Time {
            seconds: 1_700_000_000,
            nanoseconds: 5,
        }),
    }
}

fn begin(store: &dyn Store, name: &RelativePath, data: &[u8]) -> Box<dyn Upload> {
    let mut upload = store.create(name, &claim(1, data.len() as u64)).unwrap();
    upload.write_at(data, 0).unwrap();
    upload
}

fn put(store: &dyn Store, name: &str, data: &[u8]) {
    begin(store, &path(name), data)
        .commit(&Attributes::default(), Durability::Synced)
        .unwrap();
}

fn content(store: &dyn Store, name: &RelativePath) -> Vec<u8> {
    let source = store.open(name).unwrap();
    let mut data = vec![0; source.metadata().unwrap().size as usize + 1];
    let length = source.read_at(&mut data, 0).unwrap();
    data.truncate(length);
    data
}

fn names(store: &dyn Store, directory: &RelativePath) -> Vec<Vec<u8>> {
    let mut names = store.names(directory).unwrap();
    names.sort();
    names
}

/// The code of a failure, whose message must contain the path.
fn refused<T>(result: Result<T, haul::Reason>, named: &str) -> Code {
    let why = result.err().expect("this must be refused");
    assert!(
        why.text.contains(named),
        "{:?} does not name {named:?}",
        why.text
    );
    why.code
}

fn a_file_appears_whole_at_its_commit(store: &dyn Store) {
    let name = path("a/b");
    let mut upload = store.create(&name, &claim(1, 10)).unwrap();
    upload.write_at(b"world", 5).unwrap();
    upload.write_at(b"hello", 0).unwrap();
    let mut back = [0; 20];
    assert_eq!(upload.read_at(&mut back, 3).unwrap(), 7);
    assert_eq!(&back[..7], b"loworld");
    assert_eq!(store.stat(&name).unwrap(), None);
    assert_eq!(refused(store.open(&name), "a/b"), Code::NotFound);
    assert!(names(store, &path("a")).is_empty());

    upload
        .commit(&Attributes::default(), Durability::Synced)
        .unwrap();
    assert_eq!(content(store, &name), b"helloworld");
    assert_eq!(names(store, &path("a")), [b"b"]);
    assert_eq!(
        store.stat(&path("a")).unwrap().unwrap().mode,
        0o755,
        "directories made on the way are as mkdir -p makes them"
    );
    store.sync().unwrap();
}

fn the_old_file_stays_whole_until_the_commit(store: &dyn Store) {
    put(store, "f", b"old");
    let before = store.stat(&path("f")).unwrap().unwrap();
    let upload = begin(store, &path("f"), b"something new");
    assert_eq!(content(store, &path("f")), b"old");
    assert_eq!(store.stat(&path("f")).unwrap().unwrap(), before);
    upload
        .commit(&Attributes::default(), Durability::Visible)
        .unwrap();
    assert_eq!(content(store, &path("f")), b"something new");
    assert_eq!(names(store, &RelativePath::root()), [b"f"]);
}

fn a_reader_keeps_the_version_it_opened(store: &dyn Store) {
    put(store, "f", b"old");
    let source = store.open(&path("f")).unwrap();
    put(store, "f", b"newer");
    let mut data = [0; 10];
    assert_eq!(source.read_at(&mut data, 1).unwrap(), 2);
    assert_eq!(&data[..2], b"ld");
    assert_eq!(source.read_at(&mut data, 1 << 40).unwrap(), 0);
    assert_ne!(
        source.metadata().unwrap().version.file,
        store.stat(&path("f")).unwrap().unwrap().version.file
    );
}

fn a_discarded_upload_leaves_nothing(store: &dyn Store) {
    put(store, "f", b"old");
    begin(store, &path("f"), b"new").discard();
    assert_eq!(content(store, &path("f")), b"old");
    assert_eq!(store.sweep(Duration::ZERO).unwrap(), 0);
}

fn an_upload_that_wrote_nothing_leaves_nothing_to_resume(store: &dyn Store) {
    drop(store.create(&path("d/f"), &claim(1, 5)).unwrap());
    assert_eq!(store.sweep(Duration::ZERO).unwrap(), 0);
}

fn a_dropped_upload_is_resumed_with_what_it_held(store: &dyn Store) {
    const BLOCK: u64 = 1 << 20;
    let (name, claim) = (path("big"), claim(1, 8 * BLOCK));
    let mut upload = store.create(&name, &claim).unwrap();
    assert_eq!(upload.held().unwrap(), []);
    upload.write_at(&vec![1; BLOCK as usize], 0).unwrap();
    upload
        .write_at(&vec![2; BLOCK as usize], 4 * BLOCK)
        .unwrap();
    drop(upload);
    assert_eq!(store.stat(&name).unwrap(), None);

    let upload = store.create(&name, &claim).unwrap();
    let held = upload.held().unwrap();
    assert!(held.windows(2).all(|w| w[0].end < w[1].start), "{held:?}");
    for at in [0, 4 * BLOCK] {
        assert!(
            held.iter()
                .any(|range| range.start <= at && range.end >= at + BLOCK),
            "{at} is not in {held:?}"
        );
    }
    assert!(held.last().unwrap().end <= 5 * BLOCK);
    let mut data = vec![0; BLOCK as usize];
    assert_eq!(upload.read_at(&mut data, 4 * BLOCK).unwrap(), data.len());
    assert!(data.iter().all(|&byte| byte == 2));
}

fn a_partial_longer_than_its_source_is_cut(store: &dyn Store) {
    let mut upload = store.create(&path("f"), &claim(1, 5)).unwrap();
    upload.write_at(b"more than five", 0).unwrap();
    drop(upload);
    let upload = store.create(&path("f"), &claim(1, 5)).unwrap();
    assert_eq!(
        upload.held().unwrap(),
        std::iter::once(0..5).collect::<Vec<_>>()
    );
    upload
        .commit(&Attributes::default(), Durability::Visible)
        .unwrap();
    assert_eq!(content(store, &path("f")), b"more ");
}

/// A size at which every file system can store a block or leave a hole.
const BLOCK: usize = 64 << 10;

/// Returns the parts of a file outside of holes.
fn data(store: &dyn Store, name: &RelativePath) -> Vec<std::ops::Range<u64>> {
    let source = store.open(name).unwrap();
    let mut at = 0;
    std::iter::from_fn(|| {
        let data = source.data_from(at).unwrap()?;
        at = data.end;
        Some(data)
    })
    .collect()
}

fn holes_read_as_zeros_and_are_reported(store: &dyn Store) {
    let size = 5 * BLOCK as u64;
    let mut upload = store.create(&path("f"), &claim(1, size)).unwrap();
    upload.make_hole(0..BLOCK as u64).unwrap();
    upload.write_at(&[7; BLOCK], BLOCK as u64).unwrap();
    upload
        .make_hole(2 * BLOCK as u64..4 * BLOCK as u64)
        .unwrap();
    // Zeros that are written are not a hole.
    upload.write_at(&[0; BLOCK], 3 * BLOCK as u64).unwrap();
    upload.make_hole(4 * BLOCK as u64..size).unwrap();
    upload
        .commit(&Attributes::default(), Durability::Visible)
        .unwrap();
    let zeros = [0; BLOCK];
    assert!(
        content(store, &path("f")) == [&zeros[..], &[7; BLOCK], &zeros, &zeros, &zeros].concat()
    );
    let block = BLOCK as u64;
    assert_eq!(
        data(store, &path("f")),
        [block..2 * block, 3 * block..4 * block]
    );
    let source = store.open(&path("f")).unwrap();
    assert_eq!(
        source.data_from(block + 5).unwrap(),
        Some(block + 5..2 * block)
    );
    assert_eq!(source.data_from(4 * block).unwrap(), None);
    assert_eq!(source.data_from(1 << 40).unwrap(), None);
}

fn a_hole_replaces_content_of_an_earlier_attempt(store: &dyn Store) {
    let block = BLOCK as u64;
    let mut first = store.create(&path("f"), &claim(1, 4 * block)).unwrap();
    first.write_at(&[9; 3 * BLOCK], 0).unwrap();
    drop(first);
    let mut upload = store.create(&path("f"), &claim(1, 4 * block)).unwrap();
    // Its edges lie within existing content.
    upload.make_hole(block - 10..2 * block + 10).unwrap();
    upload.make_hole(3 * block..4 * block).unwrap();
    let mut expected = [9; 4 * BLOCK];
    expected[BLOCK - 10..2 * BLOCK + 10].fill(0);
    expected[3 * BLOCK..].fill(0);
    upload
        .commit(&Attributes::default(), Durability::Visible)
        .unwrap();
    assert!(content(store, &path("f")) == expected);
    assert!(
        data(store, &path("f"))
            .iter()
            .all(|data| data.end <= block || data.start >= 2 * block)
    );
}

fn a_partial_of_holes_alone_is_not_kept(store: &dyn Store) {
    let mut upload = store.create(&path("f"), &claim(1, 1 << 20)).unwrap();
    upload.make_hole(0..1 << 20).unwrap();
    drop(upload);
    assert_eq!(store.sweep(Duration::ZERO).unwrap(), 0);
}

fn a_partial_is_bound_to_key_path_size_and_time(store: &dyn Store) {
    let base = claim(1, 5);
    let upload = begin(store, &path("f"), b"12345");
    let others = [
        (path("g"), base.clone()),
        (
            path("f"),
            PartialKey {
                owner: [2; 32],
                ..base.clone()
            },
        ),
        (
            path("f"),
            PartialKey {
                size: 6,
                ..base.clone()
            },
        ),
        (
            path("f"),
            PartialKey {
                modified: None,
                ..base.clone()
            },
        ),
        (
            path("f"),
            PartialKey {
                modified: Some(Time {
                    seconds: 1_700_000_000,
                    nanoseconds: 6,
                }),
                ..base
            },
        ),
    ];
    for (name, claim) in &others {
        let other = store.create(name, claim).unwrap();
        assert_eq!(other.held().unwrap(), [], "{name} {claim:?}");
    }
    drop(upload);
}

fn the_same_claim_twice_is_busy(store: &dyn Store) {
    let upload = begin(store, &path("f"), b"12345");
    assert_eq!(
        refused(store.create(&path("f"), &claim(1, 5)), "f"),
        Code::Busy
    );
    drop(upload);
    let upload = store.create(&path("f"), &claim(1, 5)).unwrap();
    upload
        .commit(&Attributes::default(), Durability::Visible)
        .unwrap();
    let after = store.create(&path("f"), &claim(1, 5)).unwrap();
    assert_eq!(
        after.held().unwrap(),
        [],
        "what was committed is no partial any more"
    );
}

fn the_last_commit_wins_whole(store: &dyn Store) {
    let mut one = store.create(&path("f"), &claim(1, 4)).unwrap();
    let mut two = store.create(&path("f"), &claim(2, 4)).unwrap();
    one.write_at(b"11", 0).unwrap();
    two.write_at(b"2222", 0).unwrap();
    two.commit(&Attributes::default(), Durability::Visible)
        .unwrap();
    one.write_at(b"11", 2).unwrap();
    assert_eq!(content(store, &path("f")), b"2222");
    one.commit(&Attributes::default(), Durability::Visible)
        .unwrap();
    assert_eq!(content(store, &path("f")), b"1111");
}

fn names_are_bytes(store: &dyn Store) {
    let directory = RelativePath::from_components([b"\xff\xfe"]).unwrap();
    let long = [b'x'; 255];
    for last in [
        b"\xff".as_slice(),
        b"a\nb",
        "ä €".as_bytes(),
        b"...",
        b"-rf",
        b"%2e%2e",
        &long,
    ] {
        let name = directory.join(last).unwrap();
        begin(store, &name, last)
            .commit(&Attributes::default(), Durability::Visible)
            .unwrap();
        assert_eq!(content(store, &name), last);
        assert!(store.names(&directory).unwrap().iter().any(|n| n == last));
    }
    assert_eq!(names(store, &RelativePath::root()), [b"\xff\xfe"]);
}

fn an_empty_file_is_a_file(store: &dyn Store) {
    let upload = store.create(&path("empty"), &claim(1, 0)).unwrap();
    upload
        .commit(&Attributes::default(), Durability::Synced)
        .unwrap();
    let metadata = store.stat(&path("empty")).unwrap().unwrap();
    assert_eq!((metadata.kind, metadata.size), (Some(Kind::File), 0));
    assert_eq!(content(store, &path("empty")), b"");
}

fn mode_and_time_are_set_before_the_name(store: &dyn Store) {
    // Before 1901, before 1970, and after 2106, each with nanoseconds.
    for (seconds, mode) in [
        (-2_000_000_000, 0o640),
        (-1, 0o400),
        (0, 0o777),
        (1_700_000_000, 0),
        (5_000_000_000, 0o604),
    ] {
        let modified = Time {
            seconds,
            nanoseconds: 123_456_789,
        };
        let attributes = Attributes {
            mode: Some(mode),
            modified: Some(modified),
            ..Attributes::default()
        };
        begin(store, &path("f"), b"data")
            .commit(&attributes, Durability::Synced)
            .unwrap();
        let metadata = store.stat(&path("f")).unwrap().unwrap();
        assert_eq!((metadata.modified, metadata.mode), (modified, mode));
    }
}

fn only_permission_bits_are_carried_over(store: &dyn Store) {
    let attributes = Attributes {
        mode: Some(0o7755),
        modified: Some(Time {
            seconds: 1,
            nanoseconds: u32::MAX,
        }),
        ..Attributes::default()
    };
    begin(store, &path("f"), b"data")
        .commit(&attributes, Durability::Visible)
        .unwrap();
    assert_eq!(store.stat(&path("f")).unwrap().unwrap().mode, 0o755);
}

fn attributes_of_files_and_directories(store: &dyn Store) {
    put(store, "d/f", b"data");
    for name in ["d/f", "d"] {
        let modified = Time {
            seconds: -5,
            nanoseconds: 7,
        };
        store
            .set_attributes(
                &path(name),
                &Attributes {
                    mode: Some(0o555),
                    modified: Some(modified),
                    ..Attributes::default()
                },
            )
            .unwrap();
        let metadata = store.stat(&path(name)).unwrap().unwrap();
        assert_eq!((metadata.modified, metadata.mode), (modified, 0o555));
        store
            .set_attributes(
                &path(name),
                &Attributes {
                    mode: Some(0o755),
                    modified: None,
                    ..Attributes::default()
                },
            )
            .unwrap();
        let metadata = store.stat(&path(name)).unwrap().unwrap();
        assert_eq!((metadata.modified, metadata.mode), (modified, 0o755));
    }
    assert_eq!(
        refused(
            store.set_attributes(&path("d/none"), &Attributes::default()),
            "d/none"
        ),
        Code::NotFound
    );
    assert_eq!(content(store, &path("d/f")), b"data");
}

fn every_change_makes_another_version(store: &dyn Store) {
    let attributes = Attributes {
        mode: None,
        modified: Some(Time::default()),
        ..Attributes::default()
    };
    let version = || store.stat(&path("f")).unwrap().unwrap().version;
    begin(store, &path("f"), b"one")
        .commit(&attributes, Durability::Visible)
        .unwrap();
    let first = version();
    assert_eq!(
        store.open(&path("f")).unwrap().metadata().unwrap().version,
        first
    );
    assert_eq!(version(), first);
    begin(store, &path("f"), b"two")
        .commit(&attributes, Durability::Visible)
        .unwrap();
    assert_ne!(version(), first, "same size and time, another file");
}

fn symbolic_links_are_made_replaced_and_read(store: &dyn Store) {
    let link = path("d/link");
    let attributes = Attributes {
        mode: None,
        modified: Some(Time {
            seconds: -100,
            nanoseconds: 9,
        }),
        ..Attributes::default()
    };
    store
        .make_symlink(&link, b"../\xff/nowhere", &attributes)
        .unwrap();
    assert_eq!(store.read_link(&link).unwrap(), b"../\xff/nowhere");
    let metadata = store.stat(&link).unwrap().unwrap();
    assert_eq!(
        (metadata.kind, metadata.size, metadata.modified),
        (Some(Kind::Symlink), 0, attributes.modified.unwrap())
    );
    store
        .make_symlink(&link, b"/elsewhere", &Attributes::default())
        .unwrap();
    assert_eq!(store.read_link(&link).unwrap(), b"/elsewhere");
    assert_eq!(names(store, &path("d")), [b"link"]);

    put(store, "d/file", b"data");
    store
        .make_symlink(&path("d/file"), b"x", &Attributes::default())
        .unwrap();
    assert_eq!(store.read_link(&path("d/file")).unwrap(), b"x");
    assert_eq!(
        refused(
            store.make_symlink(&path("d"), b"x", &Attributes::default()),
            "d"
        ),
        Code::IsDirectory
    );
    assert_eq!(
        refused(
            store.make_symlink(&RelativePath::root(), b"x", &Attributes::default()),
            "."
        ),
        Code::IsDirectory
    );
    assert_eq!(
        store.sweep(Duration::ZERO).unwrap(),
        0,
        "a link that was refused leaves no litter"
    );
}

fn a_file_without_a_mode_keeps_the_mode_of_the_old_file(store: &dyn Store) {
    let commit = |mode| {
        let attributes = Attributes {
            mode,
            ..Attributes::default()
        };
        begin(store, &path("f"), b"data")
            .commit(&attributes, Durability::Visible)
            .unwrap();
        store.stat(&path("f")).unwrap().unwrap().mode
    };
    assert_eq!(commit(None), 0o644, "a new one is as any program makes it");
    for mode in [0o600, 0o666, 0o400] {
        assert_eq!(commit(Some(mode)), mode);
        assert_eq!(commit(None), mode);
    }
}

fn a_directory_is_private_until_its_mode_is_set(store: &dyn Store) {
    store.make_directory(&path("on/the/way/announced")).unwrap();
    let mode = |name| store.stat(&path(name)).unwrap().unwrap().mode;
    let modes = ["on", "on/the", "on/the/way", "on/the/way/announced"].map(mode);
    assert_eq!(modes, [0o755, 0o755, 0o755, 0o700]);
}

fn a_link_to_nothing_is_refused(store: &dyn Store) {
    for target in [b"".as_slice(), b"a\0b", &[b'x'; 5000]] {
        assert_eq!(
            refused(
                store.make_symlink(&path("l"), target, &Attributes::default()),
                "l"
            ),
            Code::BadName
        );
    }
    assert_eq!(store.stat(&path("l")).unwrap(), None);
}

fn a_hard_link_is_the_same_file(store: &dyn Store) {
    put(store, "f", b"data");
    store.link(&path("f"), &path("d/g")).unwrap();
    let both = || [path("f"), path("d/g")].map(|name| store.stat(&name).unwrap().unwrap());
    let [one, other] = both();
    assert_eq!(one, other);
    assert_eq!((one.kind, one.size, one.links), (Some(Kind::File), 4, 2));
    assert_eq!(content(store, &path("d/g")), b"data");
    let attributes = Attributes {
        mode: Some(0o604),
        modified: Some(Time {
            seconds: 5,
            nanoseconds: 6,
        }),
        ..Attributes::default()
    };
    store.set_attributes(&path("d/g"), &attributes).unwrap();
    let [one, other] = both();
    assert_eq!(
        (one.mode, one.modified),
        (
            0o604,
            Time {
                seconds: 5,
                nanoseconds: 6
            }
        )
    );
    assert_eq!(one, other);

    put(store, "f", b"another");
    assert_eq!(
        content(store, &path("d/g")),
        b"data",
        "what is put under one name leaves the other"
    );
    let [one, other] = both();
    assert_eq!((one.links, other.links), (1, 1));
}

fn a_hard_link_replaces_a_file(store: &dyn Store) {
    put(store, "f", b"data");
    put(store, "file", b"old");
    store
        .make_symlink(&path("link"), b"f", &Attributes::default())
        .unwrap();
    for name in ["file", "link", "file", "f"] {
        store.link(&path("f"), &path(name)).unwrap();
        assert_eq!(content(store, &path(name)), b"data");
    }
    assert_eq!(store.stat(&path("f")).unwrap().unwrap().links, 3);
    assert_eq!(
        names(store, &RelativePath::root()),
        [b"f".as_slice(), b"file", b"link"]
    );
    assert_eq!(
        store.sweep(Duration::ZERO).unwrap(),
        0,
        "nothing is left beside them"
    );
}

fn a_removal_removes_nothing_else(store: &dyn Store) {
    put(store, "d/f", b"data");
    store.link(&path("d/f"), &path("g")).unwrap();
    store
        .make_symlink(&path("to-d"), b"d", &Attributes::default())
        .unwrap();
    assert!(store.remove(&path("d")).is_err(), "it is not empty");
    assert_eq!(
        refused(store.remove(&path("to-d/f")), "to-d"),
        Code::Symlink
    );
    assert_eq!(refused(store.remove(&path("none")), "none"), Code::NotFound);
    assert_eq!(
        refused(store.remove(&RelativePath::root()), "."),
        Code::IsDirectory
    );
    store.remove(&path("to-d")).unwrap();
    assert_eq!(
        content(store, &path("d/f")),
        b"data",
        "a link went, and not what it points to"
    );
    store.remove(&path("d/f")).unwrap();
    assert_eq!(content(store, &path("g")), b"data", "the other name stays");
    store.remove(&path("d")).unwrap();
    assert_eq!(names(store, &RelativePath::root()), [b"g"]);

    let mut upload = begin(store, &path("e/f"), b"data");
    upload.write_at(b"data", 0).unwrap();
    drop(upload);
    assert!(store.remove(&path("e")).is_err(), "a partial is in it");
}

fn only_files_are_hard_linked(store: &dyn Store) {
    put(store, "d/f", b"data");
    store
        .make_symlink(&path("to-f"), b"d/f", &Attributes::default())
        .unwrap();
    store
        .make_symlink(&path("to-d"), b"d", &Attributes::default())
        .unwrap();
    assert_eq!(
        refused(store.link(&path("none"), &path("n")), "none"),
        Code::NotFound
    );
    assert_eq!(
        refused(store.link(&path("to-f"), &path("n")), "to-f"),
        Code::Symlink
    );
    assert_eq!(
        refused(store.link(&path("d"), &path("n")), "d"),
        Code::IsDirectory
    );
    assert_eq!(
        refused(store.link(&path("to-d/f"), &path("n")), "to-d"),
        Code::Symlink
    );
    assert_eq!(
        refused(store.link(&path("d/f"), &path("to-d/n")), "to-d"),
        Code::Symlink
    );
    assert_eq!(
        refused(store.link(&path("d/f"), &path("d")), "d"),
        Code::IsDirectory
    );
    assert_eq!(
        refused(store.link(&path("d/f"), &RelativePath::root()), "."),
        Code::IsDirectory
    );
    assert_eq!(
        refused(store.link(&path("d/f"), &path("d/f/n")), "d/f"),
        Code::NotDirectory
    );
    assert_eq!(
        names(store, &RelativePath::root()),
        [b"d".as_slice(), b"to-d", b"to-f"]
    );
    assert_eq!(names(store, &path("d")), [b"f"]);
    assert_eq!(
        store.sweep(Duration::ZERO).unwrap(),
        0,
        "what was refused leaves no litter"
    );
}

fn links_are_never_followed(store: &dyn Store) {
    put(store, "d/f", b"data");
    store
        .make_symlink(&path("to-d"), b"d", &Attributes::default())
        .unwrap();
    store
        .make_symlink(&path("to-f"), b"d/f", &Attributes::default())
        .unwrap();
    let below = path("to-d/f");
    assert_eq!(refused(store.stat(&below), "to-d"), Code::Symlink);
    assert_eq!(refused(store.open(&below), "to-d"), Code::Symlink);
    assert_eq!(refused(store.names(&path("to-d")), "to-d"), Code::Symlink);
    assert_eq!(
        refused(store.create(&below, &claim(1, 1)), "to-d"),
        Code::Symlink
    );
    assert_eq!(
        refused(store.make_directory(&path("to-d/new")), "to-d"),
        Code::Symlink
    );
    assert_eq!(
        refused(store.make_directory(&path("to-d")), "to-d"),
        Code::Symlink
    );
    assert_eq!(
        refused(
            store.make_symlink(&path("to-d/l"), b"x", &Attributes::default()),
            "to-d"
        ),
        Code::Symlink
    );
    assert_eq!(
        refused(store.set_attributes(&below, &Attributes::default()), "to-d"),
        Code::Symlink
    );
    assert_eq!(refused(store.read_link(&below), "to-d"), Code::Symlink);
    assert_eq!(refused(store.open(&path("to-f")), "to-f"), Code::Symlink);
    assert_eq!(
        refused(
            store.set_attributes(&path("to-f"), &Attributes::default()),
            "to-f"
        ),
        Code::Symlink
    );

    put(store, "to-f", b"a file now");
    assert_eq!(content(store, &path("to-f")), b"a file now");
    assert_eq!(
        content(store, &path("d/f")),
        b"data",
        "the link was replaced, not what it led to"
    );
    assert_eq!(names(store, &path("d")), [b"f"]);
}

fn a_directory_in_the_way_of_a_file(store: &dyn Store) {
    put(store, "d/f", b"data");
    // A mirror replaces it once the whole file has arrived. Until then it stays, and no other commit replaces it.
    let upload = store.create(&path("d"), &claim(0, 1)).unwrap();
    assert_eq!(
        refused(
            upload.commit(&Attributes::default(), Durability::Visible),
            "d"
        ),
        Code::IsDirectory
    );
    assert_eq!(refused(store.open(&path("d")), "d"), Code::IsDirectory);
    assert_eq!(
        refused(store.create(&RelativePath::root(), &claim(1, 1)), "."),
        Code::IsDirectory
    );
    assert_eq!(
        refused(store.open(&RelativePath::root()), "."),
        Code::IsDirectory
    );
    assert_eq!(content(store, &path("d/f")), b"data");
}

fn a_file_in_the_way_of_a_directory(store: &dyn Store) {
    put(store, "a/f", b"data");
    assert_eq!(
        refused(store.make_directory(&path("a/f")), "a/f"),
        Code::NotDirectory
    );
    assert_eq!(
        refused(store.create(&path("a/f/x/y"), &claim(1, 1)), "a/f"),
        Code::NotDirectory
    );
    assert_eq!(
        refused(store.names(&path("a/f")), "a/f"),
        Code::NotDirectory
    );
    assert_eq!(
        refused(store.stat(&path("a/f/x")), "a/f"),
        Code::NotDirectory
    );
    assert_eq!(content(store, &path("a/f")), b"data");
}

fn a_directory_in_the_way_at_the_commit_keeps_the_partial(store: &dyn Store) {
    let upload = begin(store, &path("f"), b"12345");
    store.make_directory(&path("f")).unwrap();
    let attributes = Attributes {
        mode: Some(0),
        modified: Some(Time {
            seconds: -1,
            nanoseconds: 0,
        }),
        ..Attributes::default()
    };
    assert_eq!(
        refused(upload.commit(&attributes, Durability::Visible), "f"),
        Code::IsDirectory
    );
    assert_eq!(names(store, &RelativePath::root()), [b"f"]);
    assert_eq!(
        store.sweep(Duration::from_secs(3600)).unwrap(),
        0,
        "the partial is as young as the failed commit"
    );
    sweep(store, Duration::ZERO, 1);
}

fn two_hundred_levels(store: &dyn Store) {
    let deep = RelativePath::from_components((0..200).map(|i| format!("level-{i}"))).unwrap();
    let file = deep.join(b"f").unwrap();
    begin(store, &file, b"deep")
        .commit(&Attributes::default(), Durability::Synced)
        .unwrap();
    assert_eq!(content(store, &file), b"deep");
    assert_eq!(names(store, &deep), [b"f"]);
    drop(begin(store, &deep.join(b"partial").unwrap(), b"x"));
    sweep(store, Duration::ZERO, 1);
}

fn nothing_exists_below_a_missing_directory(store: &dyn Store) {
    assert_eq!(store.stat(&path("a")).unwrap(), None);
    assert_eq!(store.stat(&path("a/b/c")).unwrap(), None);
    assert_eq!(refused(store.open(&path("a/b/c")), "a/b/c"), Code::NotFound);
    assert_eq!(refused(store.names(&path("a/b")), "a/b"), Code::NotFound);
    assert_eq!(
        refused(store.read_link(&path("a/b")), "a/b"),
        Code::NotFound
    );
    put(store, "f", b"data");
    assert_eq!(refused(store.read_link(&path("f")), "f"), Code::Unreadable);
}

fn the_root_is_a_directory(store: &dyn Store) {
    let root = RelativePath::root();
    assert_eq!(
        store.stat(&root).unwrap().unwrap().kind,
        Some(Kind::Directory)
    );
    assert!(names(store, &root).is_empty());
    store.make_directory(&root).unwrap();
    store.make_directory(&path("a/b")).unwrap();
    store.make_directory(&path("a/b")).unwrap();
    assert_eq!(names(store, &path("a")), [b"b"]);
    let attributes = Attributes {
        mode: Some(0o750),
        modified: Some(Time {
            seconds: 1,
            nanoseconds: 2,
        }),
        ..Attributes::default()
    };
    store.set_attributes(&root, &attributes).unwrap();
    let metadata = store.stat(&root).unwrap().unwrap();
    assert_eq!(
        (Some(metadata.mode), Some(metadata.modified)),
        (attributes.mode, attributes.modified)
    );
}

fn an_exclusive_commit_replaces_nothing(store: &dyn Store) {
    let exclusive = Attributes {
        exclusive: true,
        ..Attributes::default()
    };
    let upload = begin(store, &path("d/a"), b"mine");
    // Another process is faster.
    put(store, "d/a", b"theirs");
    assert_eq!(
        refused(upload.commit(&exclusive, Durability::Synced), "d/a"),
        Code::Exists
    );
    assert_eq!(content(store, &path("d/a")), b"theirs");
    store
        .make_symlink(&path("d/link"), b"a", &exclusive)
        .unwrap();
    assert_eq!(
        refused(
            store.make_symlink(&path("d/link"), b"b", &exclusive),
            "d/link"
        ),
        Code::Exists
    );
    assert_eq!(store.read_link(&path("d/link")).unwrap(), b"a");
    begin(store, &path("d/new"), b"new")
        .commit(&exclusive, Durability::Synced)
        .unwrap();
    assert_eq!(content(store, &path("d/new")), b"new");
    assert_eq!(names(store, &path("d")), [&b"a"[..], b"link", b"new"]);
}

fn sweeping_takes_only_old_partials_that_are_closed(store: &dyn Store) {
    put(store, "d/kept", b"data");
    let open = begin(store, &path("d/open"), b"1");
    drop(begin(store, &path("d/closed"), b"12"));
    drop(begin(store, &path("closed"), b"123"));
    assert_eq!(store.sweep(Duration::from_secs(3600)).unwrap(), 0);
    assert_eq!(store.sweep(Duration::MAX).unwrap(), 0);
    sweep(store, Duration::ZERO, 2);
    assert_eq!(store.sweep(Duration::ZERO).unwrap(), 0);
    open.commit(&Attributes::default(), Durability::Visible)
        .unwrap();
    assert_eq!(names(store, &path("d")), [b"kept".as_slice(), b"open"]);
}

fn many_uploads_at_once(store: &dyn Store) {
    std::thread::scope(|scope| {
        for worker in 0..4 {
            scope.spawn(move || {
                let name = |i| path(&format!("shared/{}/file-{worker}-{i}", i % 3));
                let uploads: Vec<_> = (0..8)
                    .map(|i| begin(store, &name(i), format!("{worker}/{i}").as_bytes()))
                    .collect();
                for upload in uploads {
                    upload
                        .commit(&Attributes::default(), Durability::Synced)
                        .unwrap();
                }
                for i in 0..8 {
                    assert_eq!(content(store, &name(i)), format!("{worker}/{i}").as_bytes());
                }
            });
        }
    });
    assert_eq!(names(store, &path("shared")), [b"0", b"1", b"2"]);
}

/// 32 uploads at once are the most in the suite; the rest is for the harness and for calls under way.
#[test]
fn the_whole_suite_passes_with_64_descriptors() {
    let this = std::env::current_exe().unwrap();
    let script = "ulimit -n 64 && exec \"$0\" store::local:: --test-threads=1";
    let output = std::process::Command::new("sh")
        .arg("-c")
        .arg(script)
        .arg(this)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("store::local::many_uploads_at_once ... ok"),
        "{text}"
    );
}

#[test]
fn a_full_store_reports_it_and_keeps_the_old_file() {
    let store = MemoryStore::with_capacity(10);
    put(&store, "f", b"12345");
    let mut upload = store.create(&path("f"), &claim(2, 8)).unwrap();
    upload.write_at(b"1234", 0).unwrap();
    let error = upload.write_at(b"56", 4).unwrap_err();
    assert_eq!(haul::Reason::from_io(&error).code, Code::NoSpace);
    assert_eq!(content(&store, &path("f")), b"12345");
    upload.write_at(b"5", 4).unwrap();
    upload.discard();
    put(&store, "g", b"12345");
}

#[test]
fn simultaneous_writers_are_counted() {
    let store = MemoryStore::new().with_write_delay(Duration::from_millis(1));
    put(&store, "one", b"1");
    put(&store, "two", b"2");
    assert_eq!(store.peak_writes(), 1);
    let barrier = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        for name in ["a", "b"] {
            let (store, barrier) = (&store, &barrier);
            scope.spawn(move || {
                let mut upload = store.create(&path(name), &claim(1, 1)).unwrap();
                // Until they meet: each write takes a millisecond, so this does not take long.
                while store.peak_writes() < 2 {
                    upload.write_at(b"x", 0).unwrap();
                }
                barrier.wait();
            });
        }
    });
    assert_eq!(store.peak_writes(), 2);
}
