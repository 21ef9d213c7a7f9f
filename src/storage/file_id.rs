//! What identifies a file on one machine, and one version of its content.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::protocol::Time;

/// A file that was modified less than this ago may change again without a new mtime: the coarsest clock of a file
/// system (2 s on FAT).
const SETTLE_TIME: Duration = Duration::from_secs(2);
/// The coarsest resolution of ctime: the tick of Linux, at 100 a second.
const CHANGE_SETTLE_TIME: Duration = Duration::from_millis(10);

/// Identifies a file on this machine, by all of its names, for as long as it exists.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    /// The number of the device, that is, of the mounted file system.
    pub device: u64,
    /// The number of the inode on that device.
    pub inode: u64,
}

/// Identifies one version of a file; see [`Metadata::version`](crate::storage::Metadata::version).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Version {
    /// Device and inode.
    pub file: FileId,
    /// Bytes of content.
    pub size: u64,
    /// Time of last modification.
    pub modified: Time,
    /// Time of last change of content or metadata (ctime). No program can set it.
    pub changed: Time,
}

impl Version {
    /// The key of this file in the [`Index`](crate::storage::digest_index::Index).
    pub fn key(&self) -> FileKey {
        FileKey {
            file: self.file,
            size: self.size,
            modified: self.modified,
        }
    }
}

/// Identifies a file and its content by metadata, as rsync's quick check does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileKey {
    /// Device and inode.
    pub file: FileId,
    /// Bytes of content.
    pub size: u64,
    /// Time of last modification.
    pub modified: Time,
}

impl FileKey {
    /// Whether a change from now on would change the file's times; `changed` is its time of change.
    pub fn is_settled(&self, changed: Time) -> bool {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let tick = now.saturating_sub(CHANGE_SETTLE_TIME);
        let tick = (tick.as_secs() as i64, tick.subsec_nanos());
        self.modified.seconds < (now.saturating_sub(SETTLE_TIME)).as_secs() as i64
            && (changed.seconds, changed.nanoseconds) < tick
    }
}
