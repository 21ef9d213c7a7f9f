//! Sets metadata through an open descriptor, also one that was opened with `O_PATH`: a file that its owner may not read
//! can only be opened so.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Stat, Uid};
use rustix::fs::{chownat, fchmod, fchown, futimens, openat, utimensat};
use rustix::io::Errno;

use super::directory::Directory;
use super::stat::{accessed, timestamps};
use crate::protocol::Time;
use crate::storage::metadata::OwnerIds;

/// Opens a name just enough for its owner to change mode and time, whatever its mode; follows no link.
pub(super) fn open_for_changes(directory: &Directory<'_>, name: &[u8]) -> rustix::io::Result<File> {
    #[cfg(target_os = "linux")]
    let how = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    #[cfg(not(target_os = "linux"))]
    let how = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(directory, name, how, Mode::empty()).map(File::from)
}

/// Sets the mode of an open file.
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

/// Sets the time of last modification of an open file. `there` is its stat from before; its access time is kept.
pub(super) fn set_time(file: impl AsFd, there: &Stat, modified: Time) -> rustix::io::Result<()> {
    let times = timestamps(modified, accessed(there));
    match futimens(&file, &times) {
        Err(Errno::BADF) if cfg!(target_os = "linux") => {
            utimensat(CWD, descriptor_path(file), &times, AtFlags::empty())
        }
        other => other,
    }
}

/// Sets the owner and group of an open file.
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

/// The path of an open file in /proc.
pub(super) fn descriptor_path(file: impl AsFd) -> String {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())
}
