//! Changes in directories that their own owner may not write to, such as 0555.
//!
//! A directory gets its final mode last, and a later session finds it read-only. haul makes it writable for its owner
//! only during one change to its names, and restores the mode in any case: a session that fails or is killed leaves
//! nothing to repair. Root never needs this, because its access is not denied.

use crate::error::lock::lock;
use std::sync::{Mutex, MutexGuard};

use rustix::fs::fstat;
use rustix::io::Errno;

use super::descriptor::set_mode;
use super::directory::Directory;
use super::stat::mode_of;

/// The bits that the owner needs to change the names in a directory: write and search.
const WRITE_AND_SEARCH: u32 = 0o300;

/// The modes of the directories in a store. The lock is held while a directory temporarily has another mode, or is
/// given one.
#[derive(Default)]
pub(super) struct DirectoryModes(Mutex<()>);

impl DirectoryModes {
    /// Changes the names in a directory. If access is denied and the directory is ours, makes it writable meanwhile.
    /// The root of the store is excepted: its mode belongs to the user who serves it.
    pub(super) fn change_names<T>(
        &self,
        directory: &Directory<'_>,
        change: impl Fn() -> rustix::io::Result<T>,
    ) -> rustix::io::Result<T> {
        match change() {
            Err(Errno::ACCESS) if matches!(directory, Directory::Below(_)) => {}
            other => return other,
        }
        let _modes = self.lock();
        let stat = fstat(directory)?;
        let mode = mode_of(&stat);
        let ours = stat.st_uid == rustix::process::geteuid().as_raw();
        if !ours
            || mode & WRITE_AND_SEARCH == WRITE_AND_SEARCH
            || set_mode(directory, mode | WRITE_AND_SEARCH).is_err()
        {
            return change();
        }
        let changed = change();
        if let Err(error) = set_mode(directory, mode) {
            tracing::warn!(%error, mode, "cannot restore the mode of a directory");
        }
        changed
    }

    /// Locks the modes of directories against other threads.
    pub(super) fn lock(&self) -> MutexGuard<'_, ()> {
        lock(&self.0)
    }
}
