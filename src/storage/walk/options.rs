//! What a walk follows, excludes and reads.

use crate::storage::digest_index::Index;
use crate::storage::filter::Filter;
use crate::storage::kept_memory::KeptShare;

/// Which symbolic links inside directories are followed instead of being sent as links.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Follow {
    /// None.
    #[default]
    Never,
    /// Links whose target is in the store; a link that leads out of it fails. For requests of a peer.
    Within,
    /// All links: the store is the whole file system.
    Anywhere,
}

/// Options of a walk.
#[derive(Debug, Clone, Default)]
pub struct WalkOptions {
    /// What is excluded.
    pub filter: Filter,
    /// Announces files with the digest of their content, which is read for it.
    pub checksum: bool,
    /// The index that may know the digests of large files.
    pub index: Option<Index>,
    /// Which symbolic links are followed. A link to one of its own parent directories fails, as does a dangling one.
    pub follow: Follow,
    /// Announces owners and groups, all mode bits, and the extended attributes that give rights.
    pub owner: bool,
    /// Announces owners only by number.
    pub numeric_ids: bool,
    /// Announces extended attributes of files and directories.
    pub xattrs: bool,
    /// Sends a file that only grows while it is sent, such as a log, with the length it had when it was found.
    pub allow_growing: bool,
    /// Reports a FIFO, socket or device in a directory as a failure, and not only as skipped.
    pub fail_specials: bool,
    /// Counts the memory of names, rules and entries.
    pub memory: KeptShare,
    /// The session ends with its connection, as at a server. Then no first name of a file is kept for another one.
    pub one_connection: bool,
}
