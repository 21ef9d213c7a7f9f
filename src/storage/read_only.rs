//! Changes in directories that their own owner may not write to, such as 0555, and in files with restrictive modes.
//!
//! A directory gets its final mode last, and a later session finds it read-only. haul makes it writable for its owner
//! only during one change to its names, and restores the mode in any case: a session that fails or is killed leaves
//! nothing to repair. Root never needs this, because its access is not denied.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{MutexGuard, PoisonError};

use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Stat, Uid};
use rustix::fs::{chownat, fchmod, fchown, fstat, futimens, openat, utimensat};
use rustix::io::Errno;

use super::OwnerIds;
use super::partial::{accessed, timestamps};
use super::root::{Directory, Root};
use crate::protocol::Time;

/// The bits that the owner needs to change the names in a directory: write and search.
const WRITE_AND_SEARCH: u32 = 0o300;
/// All bits of a mode, without the file type.
const MODE_BITS: u32 = 0o7777;

impl Root {
    /// Changes the names in a directory. If access is denied and the directory is ours, makes it writable meanwhile.
    /// The root of the store is excepted: its mode belongs to the user who serves it.
    pub(super) fn change<T>(
        &self,
        directory: &Directory<'_>,
        change: impl Fn() -> rustix::io::Result<T>,
    ) -> rustix::io::Result<T> {
        match change() {
            Err(Errno::ACCESS) if matches!(directory, Directory::Below(_)) => {}
            other => return other,
        }
        let _modes = self.modes();
        let stat = fstat(directory)?;
        let mode = stat.st_mode as u32 & MODE_BITS;
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
    pub(super) fn modes(&self) -> MutexGuard<'_, ()> {
        self.modes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sets the mode of an open file, also of an `O_PATH` descriptor.
pub(super) fn set_mode(file: impl AsFd, mode: u32) -> rustix::io::Result<()> {
    let mode = Mode::from_raw_mode(mode as _);
    match fchmod(&file, mode) {
        // As in glibc's fchmodat: the link in /proc leads to this very file, even if it was renamed.
        Err(Errno::BADF) if cfg!(target_os = "linux") => {
            rustix::fs::chmod(descriptor_path(file), mode)
        }
        other => other,
    }
}

/// Sets the time of last modification of an open file, also of an `O_PATH` descriptor. `there` is its stat from before;
/// its access time is kept.
pub(super) fn set_time(file: impl AsFd, there: &Stat, modified: Time) -> rustix::io::Result<()> {
    let times = timestamps(modified, accessed(there));
    match futimens(&file, &times) {
        Err(Errno::BADF) if cfg!(target_os = "linux") => {
            utimensat(CWD, descriptor_path(file), &times, AtFlags::empty())
        }
        other => other,
    }
}

/// Sets the owner and group of an open file, also of an `O_PATH` descriptor.
pub(super) fn set_owner(file: impl AsFd, owner: OwnerIds) -> rustix::io::Result<()> {
    let user = Some(Uid::from_raw(owner.user));
    let group = Some(Gid::from_raw(owner.group));
    match fchown(&file, user, group) {
        Err(Errno::BADF) if cfg!(target_os = "linux") => {
            chownat(CWD, descriptor_path(file), user, group, AtFlags::empty())
        }
        other => other,
    }
}

/// Opens a name just enough for its owner to change mode and time, whatever its mode; follows no link.
pub(super) fn open(directory: &Directory<'_>, name: &[u8]) -> rustix::io::Result<File> {
    #[cfg(target_os = "linux")]
    let how = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    #[cfg(not(target_os = "linux"))]
    let how = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(directory, name, how, Mode::empty()).map(File::from)
}

/// The path of an open file in /proc.
pub(super) fn descriptor_path(file: impl AsFd) -> String {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())
}
