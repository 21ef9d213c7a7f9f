//! Which times of last modification a file system keeps: FAT keeps only even seconds, NTFS units of 100 ns, and many
//! have a first and a last year.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{Stat, fstat};

use super::descriptor::set_time;
use super::directory::Directory;
use super::names::{PRIVATE_FILE, create_new, remove, temporary_name};
use super::root::Root;
use super::stat::{device_of, modified};
use crate::protocol::Time;
use crate::protocol::path::RelativePath;
use crate::storage::store::TimeProbe;

/// An empty file to set times on. It is removed when the probe is dropped.
pub(super) struct LocalTimeProbe {
    root: Arc<Root>,
    directory: RelativePath,
    /// The directory's metadata before the file was created.
    before: Stat,
    name: String,
    file: File,
}

impl LocalTimeProbe {
    /// Creates the file on the file system that holds `beside`. Uses the root of the store if that is on the same one,
    /// because the root's own time is never compared, and otherwise the directory of `beside`.
    pub(super) fn new(root: &Arc<Root>, beside: &RelativePath) -> Option<Self> {
        let parent = beside.parent()?;
        let directory = root.find(&parent).ok()??;
        let on_root =
            device_of(&fstat(&directory).ok()?) == device_of(&fstat(root.directory()).ok()?);
        on_root
            .then(|| Self::make(root, &root.directory(), RelativePath::root()))
            .flatten()
            .or_else(|| Self::make(root, &directory, parent))
    }

    fn make(root: &Arc<Root>, directory: &Directory<'_>, path: RelativePath) -> Option<Self> {
        let before = fstat(directory).ok()?;
        let name = temporary_name();
        let file = create_new(root, directory, name.as_bytes(), PRIVATE_FILE).ok()?;
        Some(Self {
            file,
            root: Arc::clone(root),
            directory: path,
            before,
            name,
        })
    }
}

impl TimeProbe for LocalTimeProbe {
    fn kept(&mut self, time: Time) -> Option<Time> {
        let there = fstat(&self.file).ok()?;
        set_time(&self.file, &there, time).ok()?;
        Some(modified(&fstat(&self.file).ok()?))
    }
}

impl Drop for LocalTimeProbe {
    fn drop(&mut self) {
        let Ok(Some(directory)) = self.root.find(&self.directory) else {
            return;
        };
        let _ = remove(&self.root, &directory, self.name.as_bytes());
        // The directory may already count as unchanged, so restore its time.
        if !self.directory.is_root() {
            let _ = set_time(&directory, &self.before, modified(&self.before));
        }
    }
}
