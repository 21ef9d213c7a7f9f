//! A wanted file.

use super::file_locks::CommittedSource;
use crate::protocol::path::RelativePath;
use crate::protocol::{Durability, Kind};
use crate::storage::{Attributes, PartialKey};
use crate::transfer::events::Settled;
use crate::transfer::stats::EntryResult;

/// A file whose content is wanted, perhaps after a comparison.
pub(super) struct WantedFile {
    pub(super) id: u64,
    /// The sender's name for it.
    pub(super) name: RelativePath,
    /// Its path in the store.
    pub(super) path: RelativePath,
    /// Bytes of content, if known to the sender.
    pub(super) size: Option<u64>,
    pub(super) attributes: Attributes,
    pub(super) partial_key: PartialKey,
    /// The entry's hard link field: the id of the first name.
    pub(super) hard_link: Option<u64>,
    /// The digest in the entry.
    pub(super) digest: Option<[u8; 32]>,
    /// The comparison that comes first, if the content may already exist.
    pub(super) compare: Option<Compare>,
}

/// The digest to compare an existing file with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Compare {
    pub(super) digest: [u8; 32],
    /// The existing metadata equals the announced one.
    pub(super) same_metadata: bool,
}

/// What an entry is reported with.
pub(super) struct EntryLabel {
    pub(super) id: u64,
    /// The sender's name for it.
    pub(super) name: RelativePath,
    pub(super) kind: Kind,
    pub(super) size: u64,
}

impl WantedFile {
    /// Returns the announced size in bytes; 0 if unknown.
    pub(super) fn known_size(&self) -> u64 {
        self.size.unwrap_or(0)
    }

    pub(super) fn label(&self) -> EntryLabel {
        EntryLabel {
            id: self.id,
            name: self.name.clone(),
            kind: Kind::File,
            size: self.known_size(),
        }
    }

    /// Describes the committed source for other sessions that wait for the file.
    pub(super) fn committed_source(&self, durability: Durability) -> CommittedSource {
        CommittedSource {
            key: self.partial_key.clone(),
            digest: self.digest,
            durability,
        }
    }
}

impl EntryLabel {
    /// Returns the result of the entry. `committed` is the content that a commit brought, in bytes; `None` if nothing
    /// was made.
    pub(super) fn with(self, result: Settled, committed: Option<u64>) -> EntryResult {
        EntryResult {
            id: Some(self.id),
            path: self.name,
            kind: self.kind,
            size: self.size,
            committed,
            result,
        }
    }
}
