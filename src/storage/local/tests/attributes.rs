//! Modes, times and access control lists of committed files.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use super::{Place, path, put};
use crate::protocol::Time;
use crate::storage::{Attributes, Store};

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
        modified: Some(Time {
            seconds: 7,
            nanoseconds: 8,
        }),
        ..Attributes::default()
    };
    place.store.set_attributes(&path("f"), &attributes).unwrap();
    let there = fs::metadata(&file).unwrap();
    assert_eq!((there.mtime(), there.mtime_nsec()), (7, 8));
    assert_eq!(there.accessed().unwrap(), accessed);
}
