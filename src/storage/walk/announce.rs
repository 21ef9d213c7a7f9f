//! An entry to announce, with what the sender needs to send it.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::tree::Tree;
use crate::error::Reason;
use crate::protocol::path::RelativePath;
use crate::protocol::{Components, Entry, Kind, Owner, Time, Xattr};
use crate::storage::file_id::Version;
use crate::storage::kept_memory::Held;
use crate::storage::memory::MemoryStore;
use crate::storage::metadata::{
    ALL_PERMISSIONS, Metadata, MetadataWarnings, OwnerIds, PERMISSIONS,
};
use crate::storage::pipe::Pipe;

/// A directory that is being sent. It is announced when the last of its children drops it, because its final mode and
/// time must be set after its content is complete.
pub struct PendingDirectory {
    /// `None` for a served directory as a whole, which is no entry.
    announce: Option<Announce>,
    to: mpsc::UnboundedSender<Announce>,
}

impl PendingDirectory {
    pub(super) fn new(announce: Option<Announce>, to: mpsc::UnboundedSender<Announce>) -> Self {
        Self { announce, to }
    }
}

impl Drop for PendingDirectory {
    fn drop(&mut self) {
        if let Some(announce) = self.announce.take() {
            // Fails only when the session is over.
            let _ = self.to.send(announce);
        }
    }
}

/// An entry to announce, with everything that the sender needs to send it.
#[derive(Clone)]
pub struct Announce {
    /// The tree it belongs to.
    pub tree: Arc<Tree>,
    /// Its path in the tree's store.
    pub source: RelativePath,
    /// Its path on the wire.
    pub path: RelativePath,
    /// The metadata that the walk read.
    pub metadata: Metadata,
    /// Its kind.
    pub kind: Kind,
    /// The target of a symbolic link.
    pub target: Option<Vec<u8>>,
    /// The digest of a file's content, if known.
    pub digest: Option<[u8; 32]>,
    /// Delays the announcement of its directory until this entry is settled.
    pub parent: Option<Arc<PendingDirectory>>,
    /// The source of content of unknown size: an input, or a file in the tree's store that reports size 0.
    pub pipe: Option<Arc<Pipe>>,
    /// Metadata that is announced on request only.
    pub extra: Option<Box<Extra>>,
    /// Counts its memory.
    pub held: Option<Arc<Held>>,
}

/// Metadata that is announced on request only.
#[derive(Debug, Clone, Default)]
pub struct Extra {
    /// Owner and group, if they are to be kept.
    pub owner: Option<Owner>,
    /// Extended attributes, if they are to be kept.
    pub xattrs: Option<Vec<Xattr>>,
    /// Warnings for extended attributes that cannot be announced.
    pub warnings: MetadataWarnings,
}

impl Announce {
    /// Creates an entry for a file of this name with the content of a pipe.
    pub fn of_pipe(name: &[u8], pipe: Arc<Pipe>) -> Result<Self, Reason> {
        let path = RelativePath::from_components([name])?;
        // It is in no store, so an empty one is never read.
        let store = Arc::new(MemoryStore::new());
        let tree = Tree {
            store,
            path: path.clone(),
            name: name.to_vec(),
            directory: false,
        };
        let kind = Kind::File;
        let metadata = Metadata {
            kind: Some(kind),
            size: 0,
            modified: Time::default(),
            mode: 0,
            owner: OwnerIds::default(),
            links: 1,
            version: Version::default(),
        };
        Ok(Self {
            tree: Arc::new(tree),
            source: path.clone(),
            path,
            metadata,
            kind,
            target: None,
            digest: None,
            parent: None,
            pipe: Some(pipe),
            extra: None,
            held: None,
        })
    }

    /// Returns the entry for the wire.
    pub fn entry(&self, id: u64) -> Entry {
        let sized = self.pipe.is_none();
        // An input has no metadata.
        let known = self.pipe.as_ref().is_none_or(|pipe| pipe.is_file());
        let (owner, xattrs) = self
            .extra
            .as_ref()
            .map(|extra| (extra.owner.clone(), extra.xattrs.clone()))
            .unwrap_or_default();
        let special = owner.is_some() && self.kind == Kind::File;
        let bits = if special {
            ALL_PERMISSIONS
        } else {
            PERMISSIONS
        };
        Entry {
            id,
            path: Components::from(&self.path),
            kind: self.kind,
            size: (self.kind == Kind::File && sized).then_some(self.metadata.size),
            modified: known.then_some(self.metadata.modified),
            mode: (self.kind != Kind::Symlink && known).then_some(self.metadata.mode & bits),
            target: self.target.clone(),
            digest: self.digest,
            owner,
            xattrs,
            ..Entry::default()
        }
    }
}
