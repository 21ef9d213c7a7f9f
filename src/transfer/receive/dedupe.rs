//! Content that is there already: a large file whose digest was announced is made from one of the same content that
//! stands elsewhere in the store, and need not travel.
//!
//! Only for keys that may read: to others it would tell what the store holds, if only by the time that it takes. So their
//! sessions have no index, and neither has who pulls. And only by content: whatever the index says, what was copied is
//! hashed before it counts, and anything that goes wrong ends in a `Want`.

use std::io;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::{FileLock, Receiver, WantedFile, blocking};
use crate::error::{Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Durability, Kind, Plan, Trailer};
use crate::storage::digest_index::{Index, LARGE_FILE};
use crate::storage::{Attributes, MetadataWarnings, PartialKey, Source, Store, Upload};

/// Bytes copied and hashed at a time.
const COPY_BLOCK: usize = 1 << 20;

/// A file to be made of what is there.
struct ContentCopy {
    store: Arc<dyn Store>,
    index: Index,
    digest: [u8; 32],
    size: u64,
    path: RelativePath,
    claim: PartialKey,
    attributes: Attributes,
    durability: Durability,
    /// Cancelled when the copy is to end.
    cancelled: CancellationToken,
}

impl Receiver {
    /// Makes a file of what stands elsewhere; false when it has to be sent. A permit is held meanwhile.
    pub(super) async fn copy_existing_content(
        self: &Arc<Self>,
        file: &WantedFile,
        claim: &FileLock,
    ) -> bool {
        let (Some(index), Some(digest), Some(size)) =
            (self.session.index.clone(), file.digest, file.size)
        else {
            return false;
        };
        let cancelled = self.session.stopping.child_token();
        let copy = ContentCopy {
            store: self.session.store.clone(),
            index,
            digest,
            size,
            path: file.path.clone(),
            claim: file.claim.clone(),
            attributes: file.attributes.clone(),
            durability: self.session.durability,
            cancelled: cancelled.clone(),
        };
        let receiver = self.clone();
        let made = blocking(move || Ok(copy.make(|path| receiver.make_room(path, Kind::File))));
        tokio::pin!(made);
        let made = tokio::select! {
            made = &mut made => made,
            () = claim.superseded() => {
                cancelled.cancel();
                // The disk comes to rest before the file goes on to somebody else.
                made.await
            }
        };
        let Ok(Some(lapses)) = made else { return false };
        self.unkept.count(&file.path, lapses);
        self.stands(file.id, file.hard_link, &file.path);
        true
    }

    /// Remembers where a file stands that was sent. A digest that speaks of holes is none of its content alone.
    pub(super) async fn remember(&self, file: &WantedFile, plan: &Plan, trailer: Option<Trailer>) {
        let (Some(index), Some(trailer)) = (self.session.index.clone(), trailer) else {
            return;
        };
        if file.known_size() < LARGE_FILE || !plan.holes().is_empty() {
            return;
        }
        let store = self.session.store.clone();
        let path = file.path.clone();
        let _ = blocking(move || {
            remember(&*store, &index, &trailer.digest, &path);
            Ok(())
        })
        .await;
    }
}

fn remember(store: &dyn Store, index: &Index, digest: &[u8; 32], path: &RelativePath) {
    if let (Some(root), Ok(Some(there))) = (identity(store), store.stat(path)) {
        index.stands(root, digest, &there.version.key(), path);
    }
}

/// Device and inode of a store's root.
fn identity(store: &dyn Store) -> Option<(u64, u64)> {
    Some(store.stat(&RelativePath::root()).ok()??.version.file)
}

impl ContentCopy {
    /// Makes the file, once there is room for it; `None` when it cannot be made so. Blocks.
    fn make(
        self,
        make_room: impl FnOnce(&RelativePath) -> Result<(), Reason>,
    ) -> Option<MetadataWarnings> {
        let root = identity(&*self.store)?;
        let (key, place) = self.index.place(root, &self.digest)?;
        let source = self.store.open(&place).ok();
        let seen = source.as_ref().and_then(|source| source.metadata().ok());
        let source = source.filter(|_| {
            seen.is_some_and(|seen| seen.version.key() == key && key.size == self.size)
        });
        let Some(source) = source else {
            self.index.forget(root, &self.digest);
            return None;
        };
        // Copied, holes would become zeros on the disk.
        if source.data_from(0).ok()? != Some(0..self.size) {
            return None;
        }
        let mut upload = self.store.create(&self.path, &self.claim).ok()?;
        // What an earlier attempt left is gone on with.
        if !upload.held().ok()?.is_empty() {
            return None;
        }
        match self.fill(&*source, &mut *upload) {
            Ok(digest) if digest == self.digest => {}
            wrong => {
                upload.discard();
                if wrong.is_ok() {
                    self.index.forget(root, &self.digest);
                }
                return None;
            }
        }
        make_room(&self.path).ok()?;
        let lapses = upload.commit(&self.attributes, self.durability).ok()?;
        remember(&*self.store, &self.index, &self.digest, &self.path);
        Some(lapses)
    }

    /// Copies what a source holds, and tells the digest of the copy.
    fn fill(&self, source: &dyn Source, upload: &mut dyn Upload) -> io::Result<[u8; 32]> {
        let shared = upload.share(source).unwrap_or(false);
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; COPY_BLOCK];
        let mut at = 0;
        while at < self.size {
            if self.cancelled.is_cancelled() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let part = &mut buffer[..COPY_BLOCK.min((self.size - at) as usize)];
            let read = if shared {
                upload.read_at(part, at)?
            } else {
                source.read_at(part, at)?
            };
            if read < part.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if !shared {
                upload.write_at(part, at)?;
            }
            hasher.update(part);
            at += read as u64;
        }
        Ok(hasher.finalize().into())
    }
}
