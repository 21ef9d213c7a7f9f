//! What stat(2) reports, in haul's own types, and times in the form that sets them. The fields of stat have other types
//! on other systems; only this file converts them.

#![allow(
    clippy::unnecessary_cast,
    reason = "the fields of stat have other types on other systems"
)]

use rustix::fs::{FileType, Stat, Timespec, Timestamps, UTIME_NOW};

use crate::protocol::{Kind, Time};
use crate::storage::file_id::{FileId, Version};
use crate::storage::metadata::{ALL_PERMISSIONS, Metadata, OwnerIds};

/// Nanoseconds in a second.
const NANOSECONDS: u32 = 1_000_000_000;

/// The current time, as an access time.
pub(super) const JUST_NOW: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: UTIME_NOW,
};

/// The number of the file system.
pub(super) fn device_of(stat: &Stat) -> u64 {
    stat.st_dev as u64
}

/// Device and inode.
pub(super) fn file_id(stat: &Stat) -> FileId {
    FileId {
        device: device_of(stat),
        inode: stat.st_ino as u64,
    }
}

/// The type of the file.
pub(super) fn type_of(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// All mode bits, without the type of the file.
pub(super) fn mode_of(stat: &Stat) -> u32 {
    stat.st_mode as u32 & ALL_PERMISSIONS
}

/// User id and group id.
pub(super) fn owner_of(stat: &Stat) -> OwnerIds {
    OwnerIds {
        user: stat.st_uid as u32,
        group: stat.st_gid as u32,
    }
}

/// Time of last modification.
pub(super) fn modified(stat: &Stat) -> Time {
    time_of(stat.st_mtime as i64, stat.st_mtime_nsec as u32)
}

/// Time of last change of content or metadata.
pub(super) fn changed(stat: &Stat) -> Time {
    time_of(stat.st_ctime as i64, stat.st_ctime_nsec as u32)
}

/// The access time, in the form that sets it again.
pub(super) fn accessed(stat: &Stat) -> Timespec {
    let time = time_of(stat.st_atime as i64, stat.st_atime_nsec as u32);
    Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    }
}

/// Converts a time of stat. For times before 1970 some file systems return negative nanoseconds, which arrive as large
/// numbers.
fn time_of(seconds: i64, nanoseconds: u32) -> Time {
    let nanoseconds = i64::from(nanoseconds as i32);
    let second = i64::from(NANOSECONDS);
    Time {
        seconds: seconds.saturating_add(nanoseconds.div_euclid(second)),
        nanoseconds: nanoseconds.rem_euclid(second) as u32,
    }
}

/// Returns the argument of futimens. It sets both times: many FUSE file systems (libfuse 2) ignore a time that is set
/// alone.
pub(super) fn timestamps(modified: Time, accessed: Timespec) -> Timestamps {
    // Larger values have special meanings, such as "now".
    let tv_nsec = modified.nanoseconds.min(NANOSECONDS - 1).into();
    Timestamps {
        last_access: accessed,
        last_modification: Timespec {
            tv_sec: modified.seconds,
            tv_nsec,
        },
    }
}

/// The metadata that a store reports.
pub(super) fn metadata(stat: &Stat) -> Metadata {
    let kind = match type_of(stat) {
        FileType::RegularFile => Some(Kind::File),
        FileType::Directory => Some(Kind::Directory),
        FileType::Symlink => Some(Kind::Symlink),
        _ => None,
    };
    let is_file = kind == Some(Kind::File);
    let size = if is_file { stat.st_size as u64 } else { 0 };
    let modified = modified(stat);
    Metadata {
        kind,
        size,
        modified,
        mode: mode_of(stat),
        owner: owner_of(stat),
        links: if is_file { stat.st_nlink as u64 } else { 1 },
        version: Version {
            file: file_id(stat),
            size,
            modified,
            changed: changed(stat),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negative_nanoseconds_borrow_from_the_seconds() {
        // A FUSE file system may return this for -1.5 s.
        let time = time_of(-1, -500_000_000_i32 as u32);
        assert_eq!((time.seconds, time.nanoseconds), (-2, 500_000_000));
        let time = time_of(-1, 999_999_999);
        assert_eq!((time.seconds, time.nanoseconds), (-1, 999_999_999));
    }
}
