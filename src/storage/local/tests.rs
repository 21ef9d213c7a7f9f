//! Tests of what only a real directory can do; `tests/it/store.rs` tests the rules of every store.

mod attributes;
mod containment;
mod partials;
mod reserved;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::error::{Code, Reason};
use crate::protocol::Durability;
use crate::protocol::path::RelativePath;
use crate::storage::{Attributes, LocalStore, PartialKey, Store, Upload};

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
