//! Tests of what only a real directory can do; `tests/it/store.rs` tests the rules of every store.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, RenameFlags, mkfifoat, renameat_with};

use super::super::partial::partial_name_of;
use super::*;
use crate::protocol::{Durability, Time};

/// A served directory, and one beside it that must stay out of reach.
struct Place {
    store: LocalStore,
    inside: PathBuf,
    outside: PathBuf,
    above: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let above = tempfile::tempdir().unwrap();
        let [inside, outside] = ["inside", "outside"].map(|name| above.path().join(name));
        fs::create_dir(&inside).unwrap();
        fs::create_dir(&outside).unwrap();
        Self {
            store: LocalStore::open(&inside).unwrap(),
            inside,
            outside,
            above,
        }
    }

    fn without_openat2() -> Self {
        let place = Self::new();
        place.store.root.openat2.store(false, Ordering::Relaxed);
        place
    }

    /// Checks that an error starts with `path` and does not show where the store is.
    fn refused<T>(&self, result: Result<T, Reason>, path: &str) -> Code {
        let why = result.err().expect("this must be refused");
        assert!(
            why.text.raw().starts_with(&format!("{path}: ")),
            "{:?} does not begin with {path:?}",
            why.text
        );
        assert!(
            !why.text.contains(self.above.path().to_str().unwrap()),
            "{:?} shows the server's disk",
            why.text
        );
        why.code
    }
}

fn path(text: &str) -> RelativePath {
    RelativePath::from_components(text.split('/')).unwrap()
}

fn partial_key(size: u64) -> PartialKey {
    PartialKey {
        owner: [7; 32],
        size,
        modified: None,
    }
}

fn begin(store: &LocalStore, name: &str, data: &[u8]) -> Result<Box<dyn Upload>, Reason> {
    let mut upload = store.create(&path(name), &partial_key(data.len() as u64))?;
    upload.write_at(data, 0).map_err(|e| Reason::from_io(&e))?;
    Ok(upload)
}

fn put(store: &LocalStore, name: &str, data: &[u8]) -> Result<(), Reason> {
    begin(store, name, data)?
        .commit(&Attributes::default(), Durability::Synced)
        .map(drop)
}

/// All names in a directory, including partials.
fn listing(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Sweeps, and checks how many partials were removed.
fn sweep(store: &dyn Store, age: Duration, expected: u64) {
    assert_eq!(store.sweep(age).unwrap(), expected);
}

#[test]
fn no_link_is_followed() {
    for place in [Place::new(), Place::without_openat2()] {
        let Place {
            store,
            inside,
            outside,
            ..
        } = &place;
        fs::create_dir_all(inside.join("real/below")).unwrap();
        symlink(outside, inside.join("absolute")).unwrap();
        symlink("../outside", inside.join("real/up")).unwrap();
        symlink("below", inside.join("real/within")).unwrap();
        symlink("nowhere", inside.join("dangling")).unwrap();
        symlink("loop", inside.join("loop")).unwrap();
        fs::write(outside.join("f"), "secret").unwrap();
        for link in ["absolute", "real/up", "real/within", "dangling", "loop"] {
            for below in ["f", "new/f"] {
                let name = path(&format!("{link}/{below}"));
                assert_eq!(
                    place.refused(store.create(&name, &partial_key(1)), link),
                    Code::Symlink
                );
                assert_eq!(place.refused(store.open(&name), link), Code::Symlink);
                assert_eq!(place.refused(store.stat(&name), link), Code::Symlink);
                assert_eq!(
                    place.refused(store.make_directory(&name), link),
                    Code::Symlink
                );
                assert_eq!(
                    place.refused(
                        store.make_symlink(&name, b"x", &Attributes::default()),
                        link
                    ),
                    Code::Symlink
                );
                assert_eq!(
                    place.refused(store.set_attributes(&name, &Attributes::default()), link),
                    Code::Symlink
                );
            }
            assert_eq!(place.refused(store.names(&path(link)), link), Code::Symlink);
        }
        assert_eq!(store.sweep(Duration::ZERO), Ok(0));
        assert_eq!(listing(outside), ["f"]);
        assert_eq!(listing(&inside.join("real/below")), [""; 0]);
        assert_eq!(fs::read(outside.join("f")).unwrap(), b"secret");
    }
}

#[test]
fn openat2_and_the_walk_resolve_alike() {
    for place in [Place::new(), Place::without_openat2()] {
        put(&place.store, "a/b/c/f", b"data").unwrap();
        assert_eq!(fs::read(place.inside.join("a/b/c/f")).unwrap(), b"data");
        assert_eq!(place.store.stat(&path("a/x/f")), Ok(None));
        assert_eq!(
            place.refused(
                place.store.create(&path("a/b/c/f/g/h"), &partial_key(1)),
                "a/b/c/f"
            ),
            Code::NotDirectory
        );
        assert_eq!(
            place.refused(place.store.stat(&path("a/b/c/f/g")), "a/b/c/f"),
            Code::NotDirectory
        );
    }
}

#[test]
fn the_last_component_is_never_followed() {
    let place = Place::new();
    let Place {
        store,
        inside,
        outside,
        ..
    } = &place;
    let secret = outside.join("secret");
    fs::write(&secret, "secret").unwrap();
    let before = fs::metadata(&secret).unwrap();
    symlink(&secret, inside.join("f")).unwrap();
    symlink(outside, inside.join("d")).unwrap();

    let attributes = Attributes {
        mode: Some(0o777),
        modified: Some(Time::default()),
        ..Attributes::default()
    };
    assert_eq!(place.refused(store.open(&path("f")), "f"), Code::Symlink);
    assert_eq!(
        place.refused(store.set_attributes(&path("f"), &attributes), "f"),
        Code::Symlink
    );
    assert_eq!(
        place.refused(store.set_attributes(&path("d"), &attributes), "d"),
        Code::Symlink
    );
    put(store, "f", b"new").unwrap();
    put(store, "d", b"new").unwrap();
    store.make_symlink(&path("d"), b"x", &attributes).unwrap();

    let after = fs::metadata(&secret).unwrap();
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
    assert_eq!(
        (before.mode(), before.mtime(), before.ino()),
        (after.mode(), after.mtime(), after.ino())
    );
    assert!(fs::symlink_metadata(inside.join("f")).unwrap().is_file());
    assert_eq!(listing(outside), ["secret"]);
    assert_eq!(listing(inside), ["d", "f"]);
}

#[test]
fn concurrent_swaps_never_lead_outside() {
    for place in [Place::new(), Place::without_openat2()] {
        let dir = place.inside.join("dir");
        let link = place.inside.join("link");
        fs::create_dir(&dir).unwrap();
        symlink(&place.outside, &link).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    renameat_with(CWD, &dir, CWD, &link, RenameFlags::EXCHANGE).unwrap();
                }
            });
            let mut committed = 0;
            let mut refused = 0;
            for i in 0..20_000 {
                match begin(&place.store, &format!("dir/f{}", i % 50), b"data")
                    .and_then(|upload| upload.commit(&Attributes::default(), Durability::Visible))
                {
                    Ok(_) => committed += 1,
                    Err(_) => refused += 1,
                }
                if committed > 200 && refused > 200 {
                    break;
                }
            }
            done.store(true, Ordering::Relaxed);
            assert!(
                committed > 0 && refused > 0,
                "{committed} committed, {refused} refused: nothing was tried"
            );
        });
        assert_eq!(listing(&place.outside), [""; 0]);
    }
}

#[test]
fn fifos_and_sockets_are_refused_without_blocking() {
    let place = Place::new();
    mkfifoat(CWD, place.inside.join("fifo"), Mode::RWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(place.inside.join("socket")).unwrap();
    for name in ["fifo", "socket"] {
        assert_eq!(
            place.refused(place.store.open(&path(name)), name),
            Code::Special
        );
        assert_eq!(
            place.refused(
                place
                    .store
                    .set_attributes(&path(name), &Attributes::default()),
                name
            ),
            Code::Special
        );
        assert_eq!(place.store.stat(&path(name)).unwrap().unwrap().kind, None);
    }
}

#[test]
fn files_planted_as_a_partial_are_not_written_to() {
    let place = Place::new();
    let partial = place
        .inside
        .join(partial_name_of(&path("f"), &partial_key(4)));
    let victim = place.outside.join("victim");
    fs::write(&victim, "untouched").unwrap();
    let plants: [&dyn Fn(); 4] = [
        &|| symlink(&victim, &partial).unwrap(),
        &|| symlink(place.outside.join("new"), &partial).unwrap(),
        &|| fs::hard_link(&victim, &partial).unwrap(),
        &|| mkfifoat(CWD, &partial, Mode::RWXU).unwrap(),
    ];
    for plant in plants {
        plant();
        let upload = begin(&place.store, "f", b"data").unwrap();
        assert_eq!(
            fs::symlink_metadata(&partial).unwrap().mode() & 0o7777,
            0o600
        );
        upload
            .commit(&Attributes::default(), Durability::Synced)
            .unwrap();
        assert_eq!(fs::read(place.inside.join("f")).unwrap(), b"data");
        assert_eq!(fs::read(&victim).unwrap(), b"untouched");
        assert_eq!(listing(&place.outside), ["victim"]);
        assert_eq!(listing(&place.inside), ["f"]);
    }
}

#[test]
fn a_partial_replaced_while_it_is_written_is_not_committed() {
    let place = Place::new();
    let partial = place
        .inside
        .join(partial_name_of(&path("f"), &partial_key(4)));
    let upload = begin(&place.store, "f", b"data").unwrap();
    fs::remove_file(&partial).unwrap();
    fs::write(&partial, "evil").unwrap();
    let result = upload.commit(&Attributes::default(), Durability::Synced);
    assert_eq!(place.refused(result, "f"), Code::NotFound);
    assert!(!place.inside.join("f").exists());
}

#[test]
fn another_process_finds_the_partial_again() {
    let place = Place::new();
    let upload = begin(&place.store, "d/f", b"data").unwrap();
    let other = LocalStore::open(&place.inside).unwrap();
    assert_eq!(
        place.refused(other.create(&path("d/f"), &partial_key(4)), "d/f"),
        Code::Busy
    );
    assert_eq!(other.sweep(Duration::ZERO), Ok(0), "it is locked");
    drop(upload);
    let upload = other.create(&path("d/f"), &partial_key(4)).unwrap();
    let mut data = [0; 4];
    upload.read_at(&mut data, 0).unwrap();
    assert_eq!(&data, b"data");
    upload.discard();
    assert_eq!(listing(&place.inside.join("d")), [""; 0]);
}

#[test]
fn without_flock_partials_are_locked_within_the_process() {
    let place = Place::new();
    let other = LocalStore::open(&place.inside).unwrap();
    for store in [&place.store, &other] {
        store.root.flock.store(false, Ordering::Relaxed);
    }
    let upload = begin(&place.store, "d/f", b"data").unwrap();
    let refused = place.refused(other.create(&path("d/f"), &partial_key(4)), "d/f");
    assert_eq!(refused, Code::Busy);
    assert_eq!(other.sweep(Duration::ZERO), Ok(0), "it is locked");
    drop(upload);
    let upload = other.create(&path("d/f"), &partial_key(4)).unwrap();
    assert_eq!(upload.held().unwrap().first(), Some(&(0..4)));
    upload
        .commit(&Attributes::default(), Durability::Synced)
        .unwrap();
    // The lock ended with the upload, although the name stayed.
    put(&place.store, "d/f", b"more").unwrap();
    drop(begin(&place.store, "d/g", b"data").unwrap());
    sweep(&other, Duration::ZERO, 1);
    assert_eq!(listing(&place.inside.join("d")), ["f"]);
}

#[test]
fn a_partial_of_another_user_is_not_resumed() {
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: only root gives files away");
    }
    let place = Place::new();
    drop(begin(&place.store, "f", b"data").unwrap());
    let partial = place
        .inside
        .join(partial_name_of(&path("f"), &partial_key(4)));
    std::os::unix::fs::chown(&partial, Some(65_534), Some(65_534)).unwrap();
    let before = fs::metadata(&partial).unwrap().ino();
    let foreign = fs::File::open(&partial).unwrap();
    let upload = place.store.create(&path("f"), &partial_key(4)).unwrap();
    assert_eq!(upload.held().unwrap(), []);
    assert_ne!(fs::metadata(&partial).unwrap().ino(), before);
    drop((upload, foreign));
    assert_eq!(listing(&place.inside), [""; 0], "the probe is gone too");
}

#[test]
fn nothing_is_written_after_the_root_moved() {
    let place = Place::new();
    let store = &place.store;
    put(store, "f", b"data").unwrap();
    let upload = begin(store, "g", b"data").unwrap();
    let away = place.above.path().join("away");
    fs::rename(&place.inside, &away).unwrap();
    for replaced in [false, true] {
        if replaced {
            fs::create_dir(&place.inside).unwrap();
        }
        *store.root.named.lock().unwrap() = None;
        let attributes = Attributes::default();
        let refused = |result| assert_eq!(place.refused(result, "new"), Code::Io);
        refused(store.create(&path("new"), &partial_key(4)).map(drop));
        refused(store.make_directory(&path("new")));
        refused(
            store
                .make_symlink(&path("new"), b"f", &attributes)
                .map(drop),
        );
        refused(store.link(&path("f"), &path("new")));
        refused(store.set_attributes(&path("new"), &attributes).map(drop));
        refused(store.remove(&path("new")));
        assert_eq!(store.check_root().unwrap_err().code, Code::Io);
        assert_eq!(store.sync().unwrap_err().code, Code::Io);
    }
    let partial = partial_name_of(&path("g"), &partial_key(4));
    assert_eq!(listing(&away), [&partial, "f"]);
    let committed = upload.commit(&Attributes::default(), Durability::Synced);
    assert_eq!(place.refused(committed, "g"), Code::Io);
    assert_eq!(listing(&place.inside), [""; 0]);
    // After the directory is moved back, the store works again.
    fs::remove_dir(&place.inside).unwrap();
    fs::rename(&away, &place.inside).unwrap();
    store.check_root().unwrap();
    put(store, "g", b"data").unwrap();
}

#[test]
fn an_interrupted_commit_is_resumed() {
    let place = Place::new();
    drop(begin(&place.store, "f", b"data").unwrap());
    let partial = place
        .inside
        .join(partial_name_of(&path("f"), &partial_key(4)));
    fs::set_permissions(&partial, fs::Permissions::from_mode(0o444)).unwrap();
    let mut upload = place.store.create(&path("f"), &partial_key(4)).unwrap();
    assert_eq!(upload.held().unwrap().len(), 1);
    upload.write_at(b"D", 0).unwrap();
    upload
        .commit(&Attributes::default(), Durability::Visible)
        .unwrap();
    assert_eq!(fs::read(place.inside.join("f")).unwrap(), b"Data");
}

#[test]
fn a_moved_parent_directory_fails_the_commit() {
    let place = Place::new();
    let upload = begin(&place.store, "d/f", b"data").unwrap();
    fs::rename(place.inside.join("d"), place.inside.join("e")).unwrap();
    let result = upload.commit(&Attributes::default(), Durability::Synced);
    assert_eq!(place.refused(result, "d/f"), Code::NotFound);
    assert_eq!(place.store.names(&path("e")), Ok(vec![]));
    sweep(&place.store, Duration::ZERO, 1);
}

#[test]
fn only_names_of_partials_are_swept() {
    let place = Place::new();
    for name in [
        ".haul-notes.partial",
        ".haul-.partial",
        &format!(".haul-{}.partial", "F".repeat(32)),
    ] {
        fs::write(place.inside.join(name), "mine").unwrap();
    }
    fs::create_dir(
        place
            .inside
            .join(format!(".haul-{}.partial", "0".repeat(32))),
    )
    .unwrap();
    let before = listing(&place.inside);
    symlink(
        "x",
        place
            .inside
            .join(format!(".haul-{}.partial", "1".repeat(32))),
    )
    .unwrap();
    drop(begin(&place.store, "f", b"data").unwrap());
    sweep(&place.store, Duration::ZERO, 2);
    assert_eq!(listing(&place.inside), before);
}

#[test]
fn only_old_partials_are_swept() {
    let place = Place::new();
    drop(begin(&place.store, "old", b"data").unwrap());
    drop(begin(&place.store, "young", b"data").unwrap());
    let old = fs::File::open(
        place
            .inside
            .join(partial_name_of(&path("old"), &partial_key(4))),
    )
    .unwrap();
    old.set_modified(std::time::SystemTime::now() - Duration::from_secs(7200))
        .unwrap();
    sweep(&place.store, Duration::from_secs(3600), 1);
    assert_eq!(
        listing(&place.inside),
        [partial_name_of(&path("young"), &partial_key(4))]
    );
}

#[test]
fn a_file_without_a_mode_gets_the_default_mode() {
    let place = Place::new();
    put(&place.store, "ours", b"data").unwrap();
    fs::write(place.inside.join("theirs"), "data").unwrap();
    let [ours, theirs] =
        ["ours", "theirs"].map(|name| fs::metadata(place.inside.join(name)).unwrap().mode());
    assert_eq!(ours, theirs);
}

#[test]
fn the_set_group_id_of_a_directory_is_kept() {
    let place = Place::new();
    let shared = place.inside.join("shared");
    fs::create_dir(&shared).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o2775)).unwrap();
    place
        .store
        .set_attributes(
            &path("shared"),
            &Attributes {
                mode: Some(0o750),
                modified: None,
                ..Attributes::default()
            },
        )
        .unwrap();
    assert_eq!(fs::metadata(&shared).unwrap().mode() & 0o7777, 0o2750);
}

#[test]
fn store_errors_name_the_directory() {
    let place = Place::new();
    let missing = place.above.path().join("missing");
    assert!(
        LocalStore::open(&missing)
            .err()
            .unwrap()
            .to_string()
            .contains(missing.to_str().unwrap())
    );
    fs::write(&missing, "a file").unwrap();
    assert!(LocalStore::open(&missing).is_err());

    place.store.check_writable().unwrap();
    assert_eq!(listing(&place.inside), [""; 0]);
    fs::remove_dir(&place.inside).unwrap();
    let error = place.store.check_writable().unwrap_err().to_string();
    assert!(error.contains(place.inside.to_str().unwrap()), "{error}");
}

/// Runs a program of the package `acl` on a file; `None` if it is missing, or if the file system has no access control
/// lists.
fn acl(program: &str, arguments: &[&str], file: &Path) -> Option<String> {
    let ran = std::process::Command::new(program)
        .args(arguments)
        .arg(file)
        .output();
    match ran {
        Ok(ran) if ran.status.success() => Some(String::from_utf8(ran.stdout).unwrap()),
        _ => {
            println!("skipped: {program} does nothing here");
            None
        }
    }
}

#[test]
fn a_default_acl_applies_to_new_files_and_directories() {
    let place = Place::new();
    let rules = "u::rwx,g::r-x,o::---,u:1234:rw,m::rwx";
    if acl("setfacl", &["-d", "-m", rules], &place.inside).is_none() {
        return;
    }
    put(&place.store, "way/ours", b"data").unwrap();
    fs::create_dir(place.inside.join("their-way")).unwrap();
    fs::write(place.inside.join("their-way/theirs"), "data").unwrap();
    for [ours, theirs] in [["way", "their-way"], ["way/ours", "their-way/theirs"]] {
        let list = |name| acl("getfacl", &["-cpn"], &place.inside.join(name)).unwrap();
        assert_eq!(list(ours), list(theirs), "{ours}");
    }
}

#[test]
fn a_replacement_keeps_the_access_control_list() {
    let place = Place::new();
    put(&place.store, "f", b"data").unwrap();
    // The group bits are the mask here: without the list, they would let the group in.
    let rules = "u::rw,g::---,o::---,u:1234:rw,m::rw";
    if acl("setfacl", &["-m", rules], &place.inside.join("f")).is_none() {
        return;
    }
    let list = |name| acl("getfacl", &["-cpn"], &place.inside.join(name)).unwrap();
    let before = list("f");
    put(&place.store, "f", b"new").unwrap();
    assert_eq!(list("f"), before);
    // A default ACL adds nothing to a file that had no list.
    fs::write(place.inside.join("private"), "data").unwrap();
    fs::set_permissions(
        place.inside.join("private"),
        PermissionsExt::from_mode(0o660),
    )
    .unwrap();
    acl("setfacl", &["-d", "-m", rules], &place.inside).unwrap();
    let before = list("private");
    put(&place.store, "private", b"new").unwrap();
    assert_eq!(list("private"), before);
}

#[test]
fn setting_the_mtime_keeps_the_atime() {
    let place = Place::new();
    put(&place.store, "f", b"data").unwrap();
    let file = place.inside.join("f");
    let accessed = std::time::SystemTime::UNIX_EPOCH + Duration::from_millis(1_500);
    let times = fs::FileTimes::new().set_accessed(accessed);
    fs::File::open(&file).unwrap().set_times(times).unwrap();
    let attributes = Attributes {
        modified: Some(time_of(7, 8)),
        ..Attributes::default()
    };
    place.store.set_attributes(&path("f"), &attributes).unwrap();
    let there = fs::metadata(&file).unwrap();
    assert_eq!((there.mtime(), there.mtime_nsec()), (7, 8));
    assert_eq!(there.accessed().unwrap(), accessed);
}

#[test]
fn negative_nanoseconds_borrow_from_the_seconds() {
    // A FUSE file system may return this for -1.5 s.
    let time = time_of(-1, -500_000_000_i32 as u32);
    assert_eq!((time.seconds, time.nanoseconds), (-2, 500_000_000));
    let time = time_of(-1, 999_999_999);
    assert_eq!((time.seconds, time.nanoseconds), (-1, 999_999_999));
}

/// A home directory with HAUL_HOME in it.
struct Keys {
    above: tempfile::TempDir,
    keys: PathBuf,
}

impl Keys {
    fn new() -> Self {
        let above = tempfile::tempdir().unwrap();
        let keys = above.path().join(".config/haul");
        fs::create_dir_all(keys.join("old")).unwrap();
        fs::create_dir(above.path().join("dotfiles")).unwrap();
        for name in ["key.pem", "old/key.pem"] {
            fs::write(keys.join(name), "secret").unwrap();
        }
        Self { above, keys }
    }

    fn home(&self) -> &Path {
        self.above.path()
    }

    fn stores(&self) -> [LocalStore; 2] {
        let [a, b] = [(); 2].map(|()| LocalStore::open_reserving(self.home(), &self.keys).unwrap());
        b.root.openat2.store(false, Ordering::Relaxed);
        [a, b]
    }
}

/// Tries every operation of a peer on a name.
fn refuses_all(store: &LocalStore, name: &str) {
    let name = &path(name);
    let other = path("other");
    let attributes = Attributes {
        mode: Some(0o777),
        ..Attributes::default()
    };
    let results = [
        ("stat", store.stat(name).err()),
        ("open", store.open(name).err()),
        ("xattrs", store.xattrs(name, false).err()),
        ("read_link", store.read_link(name).err()),
        (
            "set_attributes",
            store.set_attributes(name, &attributes).err(),
        ),
        (
            "make_symlink",
            store.make_symlink(name, b"x", &attributes).err(),
        ),
        ("link to", store.link(name, &path("stolen")).err()),
        ("link as", store.link(&other, name).err()),
        ("remove", store.remove(name).err()),
        ("create", put_at(store, name).err()),
    ];
    for (what, why) in results {
        let why = why.unwrap_or_else(|| panic!("{what} of {name} is not refused"));
        assert!(
            matches!(
                why.code,
                Code::NotAllowed | Code::IsDirectory | Code::NotDirectory
            ),
            "{what} of {name}: {why:?}"
        );
    }
}

fn put_at(store: &LocalStore, name: &RelativePath) -> Result<(), Reason> {
    let mut upload = store.create(name, &partial_key(4))?;
    upload.write_at(b"evil", 0).unwrap();
    let committed = upload.commit(&Attributes::default(), Durability::Visible);
    committed.map(drop)
}

#[test]
fn a_reserved_directory_is_neither_read_nor_changed() {
    let keys = Keys::new();
    let partial = format!(".haul-{}.partial", "0f".repeat(16));
    fs::write(keys.keys.join(&partial), "x").unwrap();
    fs::write(keys.home().join("other"), "x").unwrap();
    for store in keys.stores() {
        assert_eq!(
            store.names(&path(".config")).unwrap(),
            Vec::<Vec<u8>>::new()
        );
        assert_eq!(
            store.names(&path(".config/haul")).unwrap_err().code,
            Code::NotAllowed
        );
        for name in [
            "key.pem",
            "authorized_keys",
            "old",
            "old/key.pem",
            "new/deep/file",
        ] {
            refuses_all(&store, &format!(".config/haul/{name}"));
        }
        let code = |result: Result<(), Reason>| result.unwrap_err().code;
        assert_eq!(
            code(store.make_directory(&path(".config/haul/new"))),
            Code::NotAllowed
        );
        assert_eq!(
            code(store.make_directory(&path(".config/haul"))),
            Code::NotAllowed
        );
        assert_eq!(code(store.remove(&path(".config/haul"))), Code::NotAllowed);
        assert!(put_at(&store, &path(".config/haul")).is_err());
        assert!(store.stat(&path(".config/haul")).is_err());
        store.sweep(Duration::ZERO).unwrap();
        // Everything else works.
        put(&store, ".config/other/file", b"data").unwrap();
        assert!(store.open(&path(".config/other/file")).is_ok());
        assert!(store.names(&path(".config/other")).is_ok());
        fs::remove_dir_all(keys.home().join(".config/other")).unwrap();
    }
    assert_eq!(listing(&keys.keys), [&partial[..], "key.pem", "old"]);
    assert_eq!(listing(keys.home()), [".config", "dotfiles", "other"]);
}

#[test]
fn links_to_and_from_a_reserved_directory_are_reserved() {
    let keys = Keys::new();
    let dotfiles = keys.home().join("dotfiles");
    fs::write(dotfiles.join("authorized"), "mine").unwrap();
    fs::write(dotfiles.join("harmless"), "x").unwrap();
    fs::write(keys.home().join("other"), "x").unwrap();
    symlink(
        "../../dotfiles/authorized",
        keys.keys.join("authorized_keys"),
    )
    .unwrap();
    symlink(dotfiles.join("later"), keys.keys.join("known_hosts")).unwrap();
    fs::hard_link(keys.keys.join("key.pem"), dotfiles.join("backup")).unwrap();
    // The directory itself is reached through a link.
    fs::rename(keys.home().join(".config"), dotfiles.join("config")).unwrap();
    symlink("dotfiles/config", keys.home().join(".config")).unwrap();
    fs::create_dir(dotfiles.join("config/dotfiles")).unwrap();
    symlink("../../authorized", dotfiles.join("config/haul/peers")).unwrap();
    for store in keys.stores() {
        refuses_all(&store, "dotfiles/config/haul/key.pem");
        refuses_all(&store, "dotfiles/authorized");
        assert_eq!(
            put_at(&store, &path("dotfiles/later")).unwrap_err().code,
            Code::NotAllowed
        );
        // A peer may replace the hard link, which leaves the key unchanged, but may not read the key through it.
        assert_eq!(
            store.open(&path("dotfiles/backup")).err().unwrap().code,
            Code::NotAllowed
        );
        assert!(
            store
                .link(&path("dotfiles/backup"), &path("stolen"))
                .is_err()
        );
        for result in [
            put_at(&store, &path(".config")),
            store.remove(&path(".config")),
            store
                .make_symlink(&path(".config"), b"elsewhere", &Attributes::default())
                .map(drop),
            store.make_directory(&path(".config")),
        ] {
            assert!(result.is_err());
        }
        let mut names = store.names(&path("dotfiles")).unwrap();
        names.sort();
        assert_eq!(names, [&b"config"[..], b"harmless"]);
        put(&store, "dotfiles/harmless", b"new").unwrap();
    }
    assert_eq!(fs::read(dotfiles.join("authorized")).unwrap(), b"mine");
    assert!(
        fs::symlink_metadata(keys.home().join(".config"))
            .unwrap()
            .is_symlink()
    );
}

#[test]
fn a_store_cannot_be_in_a_reserved_directory() {
    let keys = Keys::new();
    for inside in [keys.keys.clone(), keys.keys.join("old")] {
        let refused = LocalStore::open_reserving(&inside, &keys.keys);
        assert!(
            matches!(refused, Err(Error::Usage(_))),
            "{}",
            inside.display()
        );
    }
    assert!(LocalStore::open_reserving(keys.home(), &keys.home().join("nowhere")).is_err());
}

/// A bind mount that is undone on drop; `None` if this user may not mount.
struct Mounted(PathBuf);

impl Mounted {
    fn bind(from: &Path, on: &Path) -> Option<Self> {
        let done = std::process::Command::new("mount")
            .arg("--bind")
            .args([from, on])
            .output();
        if !done.is_ok_and(|output| output.status.success()) {
            println!("skipped: this user cannot mount");
            return None;
        }
        Some(Self(on.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_second_mount_does_not_bypass_a_reserved_directory() {
    let keys = Keys::new();
    let mounted = keys.home().join("mounted");
    fs::create_dir(&mounted).unwrap();
    fs::write(keys.home().join("other"), "x").unwrap();
    let Some(_mount) = Mounted::bind(&keys.home().join(".config"), &mounted) else {
        return;
    };
    for store in keys.stores() {
        refuses_all(&store, "mounted/haul/key.pem");
        refuses_all(&store, "mounted/haul/old/key.pem");
        assert_eq!(
            store.names(&path("mounted")).unwrap(),
            Vec::<Vec<u8>>::new()
        );
    }
}

#[test]
fn the_error_for_a_mount_point_names_it() {
    let place = Place::new();
    for name in ["inside/f", "outside/f"] {
        fs::write(place.above.path().join(name), "old").unwrap();
    }
    let Some(_mount) = Mounted::bind(&place.outside.join("f"), &place.inside.join("f")) else {
        return;
    };
    let why = put(&place.store, "f", b"new").unwrap_err();
    assert!(why.text.contains("mount point"), "{why}");
    assert_eq!(fs::read(place.inside.join("f")).unwrap(), b"old");
}
