//! The metadata of files, directories and links: as a store reports it, and as a commit sets it.

use std::sync::Arc;

use super::file_id::Version;
use crate::protocol::{Attribute, Kind, Time, Xattr};

/// The permission bits that `haul` transfers: read, write and execute (0777).
pub const PERMISSIONS: u32 = 0o777;

/// All mode bits, with set-user-ID, set-group-ID and sticky (07777).
pub const ALL_PERMISSIONS: u32 = 0o7777;

/// The user and the group that own a file, as numbers of this machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OwnerIds {
    /// The user id.
    pub user: u32,
    /// The group id.
    pub group: u32,
}

/// Metadata of a name in a store, read without the content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Kind of entry; `None` for a device, FIFO, socket and the like.
    pub kind: Option<Kind>,
    /// Bytes of content; 0 unless it is a regular file.
    pub size: u64,
    /// Time of last modification of the content.
    pub modified: Time,
    /// Permission bits (07777).
    pub mode: u32,
    /// User id and group id.
    pub owner: OwnerIds,
    /// Number of hard links; 1 unless it is a regular file.
    pub links: u64,
    /// Identifies this version of this file: device, inode, size, mtime and ctime. Two equal versions have the same
    /// content, as far as the system reports.
    pub version: Version,
}

/// Final metadata of a committed file, directory or link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits. `None` keeps those of a replaced file, and gives a new file the store's default. Only the bits
    /// in [`PERMISSIONS`] count; on a file with an owner all bits count.
    pub mode: Option<u32>,
    /// Time of last modification; `None` keeps the time of the commit.
    pub modified: Option<Time>,
    /// User id and group id; `None` leaves them unchanged.
    pub owner: Option<OwnerIds>,
    /// Extended attributes by name; all other transferable ones are removed. `None` leaves them unchanged. Attributes
    /// of the system's administration count only with an owner.
    pub xattrs: Option<Arc<Vec<Xattr>>>,
    /// Replaces nothing: the commit fails if the name exists by then ([`Code::Exists`](crate::error::Code)).
    pub exclusive: bool,
}

impl Attributes {
    /// The mode bits that count: on a file, or on another kind.
    pub fn mode_bits(&self, file: bool) -> u32 {
        if file && self.owner.is_some() {
            ALL_PERMISSIONS
        } else {
            PERMISSIONS
        }
    }
}

/// Metadata that could not be kept although the file itself is whole: the attribute, and the system's error.
pub type MetadataWarnings = Vec<(Attribute, String)>;
