//! Deduplication: a large file whose digest was announced is copied from a file of the same content in the store, and
//! is not sent.
//!
//! Only keys that may read use it. For others it would reveal what the store holds, if only by timing, so their
//! sessions have no index. Pulls have none either. The index is not trusted: copied content is hashed before it
//! counts, and any failure ends in a `Want`.

use std::io;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::commit::{CompleteFile, commit};
use super::file_locks::FileLock;
use super::session::Session;
use super::wanted::WantedFile;
use crate::error::Reason;
use crate::protocol::path::RelativePath;
use crate::protocol::{Plan, Trailer};
use crate::storage::digest_index::{Index, LARGE_FILE};
use crate::storage::{Attributes, FileId, PartialKey, Source, Store, Upload};
use crate::transfer::blocking::blocking;

/// Bytes copied and hashed at a time.
const COPY_BLOCK: usize = 1 << 20;

/// A file to make from existing content.
struct ContentCopy {
    session: Arc<Session>,
    index: Index,
    digest: [u8; 32],
    size: u64,
    path: RelativePath,
    partial_key: PartialKey,
    attributes: Attributes,
    /// Cancelled to end the copy early.
    cancelled: CancellationToken,
}

/// Makes a file from existing content. Returns false if it must be sent. The caller holds a permit.
pub(super) async fn copy_existing_content(
    session: &Arc<Session>,
    file: &WantedFile,
    lock: &FileLock,
) -> bool {
    let (Some(index), Some(digest), Some(size)) =
        (session.policy.index.clone(), file.digest, file.size)
    else {
        return false;
    };
    let cancelled = session.context.stopping.child_token();
    let copy = ContentCopy {
        session: session.clone(),
        index,
        digest,
        size,
        path: file.path.clone(),
        partial_key: file.partial_key.clone(),
        attributes: file.attributes.clone(),
        cancelled: cancelled.clone(),
    };
    let made = blocking::<_, Reason>("write", move || Ok(copy.make().is_some()));
    tokio::pin!(made);
    let made = tokio::select! {
        made = &mut made => made,
        () = lock.superseded() => {
            cancelled.cancel();
            // The disk work ends before the file passes to another transfer.
            made.await
        }
    };
    let is_made = made.unwrap_or(false);
    if is_made {
        let first_names = &session.tables.first_names;
        first_names.insert(file.id, file.hard_link, &file.path);
    }
    is_made
}

/// Adds a received file to the index. A digest that covers holes is not the digest of the content alone, so sparse
/// files are not added.
pub(super) async fn index_received(
    session: &Arc<Session>,
    file: &WantedFile,
    plan: &Plan,
    trailer: Option<Trailer>,
) {
    let (Some(index), Some(trailer)) = (session.policy.index.clone(), trailer) else {
        return;
    };
    if file.known_size() < LARGE_FILE || !plan.holes().is_empty() {
        return;
    }
    let store = session.target.store.clone();
    let path = file.path.clone();
    let _ = blocking::<_, Reason>("record a digest", move || {
        remember(&*store, &index, &trailer.digest, &path);
        Ok(())
    })
    .await;
}

fn remember(store: &dyn Store, index: &Index, digest: &[u8; 32], path: &RelativePath) {
    if let (Some(root), Ok(Some(there))) = (identity(store), store.stat(path)) {
        index.record_location(root, digest, &there.version.key(), path);
    }
}

/// Returns the device and inode of a store's root.
fn identity(store: &dyn Store) -> Option<FileId> {
    Some(store.stat(&RelativePath::root()).ok()??.version.file)
}

impl ContentCopy {
    /// Makes the file. Returns `None` if it cannot be copied. Blocks.
    fn make(self) -> Option<()> {
        let store = self.session.store();
        let root = identity(store)?;
        let (key, place) = self.index.location(root, &self.digest)?;
        let source = store.open(&place).ok();
        let seen = source.as_ref().and_then(|source| source.metadata().ok());
        let source = source.filter(|_| {
            seen.is_some_and(|seen| seen.version.key() == key && key.size == self.size)
        });
        let Some(source) = source else {
            self.index.forget_location(root, &self.digest);
            return None;
        };
        // A copy would write the holes as zeros to the disk.
        if source.data_from(0).ok()? != Some(0..self.size) {
            return None;
        }
        let mut upload = store.create(&self.path, &self.partial_key).ok()?;
        // A partial of an earlier attempt is resumed instead.
        if !upload.held().ok()?.is_empty() {
            return None;
        }
        match self.fill(&*source, &mut *upload) {
            Ok(digest) if digest == self.digest => {}
            wrong => {
                upload.discard();
                if wrong.is_ok() {
                    self.index.forget_location(root, &self.digest);
                }
                return None;
            }
        }
        let file = CompleteFile {
            upload,
            path: &self.path,
            attributes: &self.attributes,
            durability: self.session.policy.durability,
            resumable: true,
        };
        commit(&self.session, file).ok()?;
        remember(store, &self.index, &self.digest, &self.path);
        Some(())
    }

    /// Copies a source, and returns the digest of the copy.
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
