//! Admits wanted files: reserves memory for a small one, takes a permit for a large one, and only then sends `Want`.
//!
//! Entries wait in two queues, so that a waiting large file delays no small one. An entry that waits holds nothing that
//! another one needs.

use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::Instrument;

use super::download::{receive_large, receive_small};
use super::file_locks::FileLock;
use super::session::{Session, SettledEntry};
use super::turn::{is_committed_by_other, take_lock};
use super::wanted::WantedFile;
use crate::error::{Reason, Result};
use crate::protocol::Verdict;
use crate::transfer::permits::Slot;

/// Largest file that may be received whole into memory before it takes a permit, in bytes.
const SMALL_BODY_LIMIT: u64 = 256 << 10;
/// Memory for a small file beyond its content, in bytes, so that empty files count too.
const SMALL_OVERHEAD: usize = 1 << 10;

/// The ends of both queues at which files arrive. The queues end when all of its clones are dropped.
#[derive(Clone)]
pub(super) struct Admission {
    small: mpsc::UnboundedSender<WantedFile>,
    large: mpsc::UnboundedSender<WantedFile>,
}

/// The two queues of files that wait for admission.
pub(super) struct AdmissionQueues {
    /// Files that wait for memory.
    pub(super) small: mpsc::UnboundedReceiver<WantedFile>,
    /// Files that wait for a permit.
    pub(super) large: mpsc::UnboundedReceiver<WantedFile>,
}

impl Admission {
    pub(super) fn new() -> (Self, AdmissionQueues) {
        let (small_to, small) = mpsc::unbounded_channel();
        let (large_to, large) = mpsc::unbounded_channel();
        let admission = Self {
            small: small_to,
            large: large_to,
        };
        (admission, AdmissionQueues { small, large })
    }

    /// Puts a file into its queue.
    pub(super) fn add(&self, file: WantedFile) {
        let queue = if file.size.is_some_and(|size| size <= SMALL_BODY_LIMIT) {
            &self.small
        } else {
            &self.large
        };
        // Fails only when the session is over.
        let _ = queue.send(file);
    }
}

/// Admits small files: reserves memory, then sends `Want`.
pub(super) async fn admit_small(
    session: &Arc<Session>,
    mut queue: mpsc::UnboundedReceiver<WantedFile>,
) -> Result<()> {
    while let Some(file) = queue.recv().await {
        let bytes = file.known_size() as usize + SMALL_OVERHEAD;
        let reserved = session
            .or_stopping(async { Ok(session.context.flow_control.reserve(bytes).await) })
            .await;
        match reserved {
            Err(reason) => session.refuse(file.label(), reason),
            Ok(Some(memory)) => {
                let stream = session.streams.expect(file.id);
                session.answer(Verdict::Want(file.id, Vec::new()));
                let received = receive_small(session.clone(), file, stream, memory);
                session.transfers.spawn(received.in_current_span());
            }
            // The connection's memory share cannot hold the whole file.
            Ok(None) => admit_large_file(session, file).await,
        }
    }
    Ok(())
}

/// Admits large files: takes a permit, then sends `Want`.
pub(super) async fn admit_large(
    session: &Arc<Session>,
    mut queue: mpsc::UnboundedReceiver<WantedFile>,
) -> Result<()> {
    while let Some(file) = queue.recv().await {
        admit_large_file(session, file).await;
    }
    Ok(())
}

async fn admit_large_file(session: &Arc<Session>, file: WantedFile) {
    match lock_and_permit(session, &file).await {
        Ok(Some((lock, slot))) => {
            let received = receive_large(session.clone(), file, slot, lock);
            session.transfers.spawn(received.in_current_span());
        }
        Ok(None) => session.settle(SettledEntry {
            label: file.label(),
            made: false,
        }),
        Err(reason) => session.refuse(file.label(), reason),
    }
}

/// Waits for the lock and a permit, or returns `None` if another session has committed the file.
async fn lock_and_permit(
    session: &Arc<Session>,
    file: &WantedFile,
) -> Result<Option<(FileLock, Slot)>, Reason> {
    // An older connection of this session, or another session of this key, must first release the file and its permit.
    let lock = session.or_stopping(take_lock(session, file)).await?;
    if is_committed_by_other(session, file, &lock).await? {
        return Ok(None);
    }
    let slot = lock.or_superseded(async { Ok(session.context.permits.large.open().await) });
    let slot = session.or_stopping(slot).await?;
    Ok(Some((lock, slot)))
}
