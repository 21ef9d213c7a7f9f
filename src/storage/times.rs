//! Which times of last modification a file system keeps: FAT keeps only even seconds, NTFS units of 100 ns, and many
//! have a first and a last year.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, Stat, fstat, openat};

use super::partial::{remove, temporary_name, time_of};
use super::root::{Directory, Root, device};
use super::{TimeProbe, read_only};
use crate::protocol::Time;
use crate::protocol::path::RelativePath;

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
        let on_root = device(&fstat(&directory).ok()?) == device(&fstat(root.directory()).ok()?);
        on_root
            .then(|| Self::make(root, &root.directory(), RelativePath::root()))
            .flatten()
            .or_else(|| Self::make(root, &directory, parent))
    }

    fn make(root: &Arc<Root>, directory: &Directory<'_>, path: RelativePath) -> Option<Self> {
        let before = fstat(directory).ok()?;
        let name = temporary_name();
        let how = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let private = Mode::RUSR | Mode::WUSR;
        let made = root.change(directory, || openat(directory, &name, how, private));
        Some(Self {
            file: File::from(made.ok()?),
            root: Arc::clone(root),
            directory: path,
            before,
            name,
        })
    }
}

impl TimeProbe for LocalTimeProbe {
    #[allow(
        clippy::unnecessary_cast,
        reason = "the fields of stat have other types on other systems"
    )]
    fn kept(&mut self, time: Time) -> Option<Time> {
        let there = fstat(&self.file).ok()?;
        read_only::set_time(&self.file, &there, time).ok()?;
        let there = fstat(&self.file).ok()?;
        Some(time_of(there.st_mtime as i64, there.st_mtime_nsec as u32))
    }
}

impl Drop for LocalTimeProbe {
    #[allow(
        clippy::unnecessary_cast,
        reason = "the fields of stat have other types on other systems"
    )]
    fn drop(&mut self) {
        let Ok(Some(directory)) = self.root.find(&self.directory) else {
            return;
        };
        let _ = remove(&self.root, &directory, self.name.as_bytes());
        // The directory may already count as unchanged, so restore its time.
        if !self.directory.is_root() {
            let before = &self.before;
            let modified = time_of(before.st_mtime as i64, before.st_mtime_nsec as u32);
            let _ = read_only::set_time(&directory, before, modified);
        }
    }
}
