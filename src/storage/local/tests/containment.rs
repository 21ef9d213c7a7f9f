//! No name leads out of the store, or to a file that is not a file.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{CWD, Mode, RenameFlags, mkfifoat, renameat_with};

use super::super::names::partial_name_of;
use super::{Mounted, Place, begin, listing, partial_key, path, put};
use crate::error::Code;
use crate::protocol::{Durability, Time};
use crate::storage::{Attributes, LocalStore, Store};

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
        *store.root.last_found.lock().unwrap() = None;
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
