//! A reserved directory is neither read nor changed, by any name.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Mounted, listing, partial_key, path, put};
use crate::error::{Code, Error, Reason};
use crate::protocol::Durability;
use crate::protocol::path::RelativePath;
use crate::storage::{Attributes, LocalStore, Store};

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
