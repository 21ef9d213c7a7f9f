//! An open directory of a store. Names are resolved from its descriptor, one component at a time.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, Stat, openat, statat};
use rustix::io::Errno;

/// Flags for a directory that is only passed through: `O_PATH` needs no read permission.
#[cfg(target_os = "linux")]
pub(super) const PASS_THROUGH: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
#[cfg(not(target_os = "linux"))]
pub(super) const PASS_THROUGH: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// An open directory of a store.
pub(super) enum Directory<'r> {
    Root(BorrowedFd<'r>),
    Below(OwnedFd),
}

impl AsFd for Directory<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Root(descriptor) => *descriptor,
            Self::Below(descriptor) => descriptor.as_fd(),
        }
    }
}

impl Directory<'_> {
    /// Opens it again, to read its names and for fsync, which `O_PATH` does not allow.
    pub(super) fn readable(&self) -> rustix::io::Result<OwnedFd> {
        openat(
            self,
            c".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
    }

    /// Returns the stat of a name in it; `None` if the name does not exist.
    pub(super) fn stat(&self, name: &[u8]) -> rustix::io::Result<Option<Stat>> {
        match statat(self, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(None),
            other => other.map(Some),
        }
    }
}
