//! Partials: found again, locked, swept, and never written to when they are not ours.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::fs::{CWD, Mode, mkfifoat};

use super::super::names::partial_name_of;
use super::{Place, begin, listing, partial_key, path, put, sweep};
use crate::error::Code;
use crate::protocol::Durability;
use crate::storage::{Attributes, LocalStore, Store};

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
