//! The lock of an open partial: only its holder writes to the partial, renames it or removes it.
//!
//! It is a flock, which ends with the process. Some file systems have no flock (Lustre without its mount option, some
//! FUSE file systems, NFS without its lock service). There, partials are locked only within this process. If two
//! processes receive the same version of a file from the same key at the same time, both write to one partial, and the
//! commit of the later one fails.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};

use rustix::fs::{FlockOperation, flock, fstat};
use rustix::io::Errno;

use super::root::Root;
use super::stat::file_id;
use crate::error::knows_no_flock;
use crate::storage::file_id::FileId;

/// The partials that are locked without flock.
static LOCKED: Mutex<BTreeSet<FileId>> = Mutex::new(BTreeSet::new());

/// The lock of an open partial; it lasts while both this value and the file are alive.
#[derive(Debug)]
pub(super) struct Lock {
    /// The file, if it is locked only within this process.
    within_process: Option<FileId>,
}

/// Locks an open partial; `None` when another holder has the lock.
pub(super) fn lock(root: &Root, file: &File) -> rustix::io::Result<Option<Lock>> {
    let flocked = if root.flock.load(Ordering::Relaxed) {
        flock(file, FlockOperation::NonBlockingLockExclusive)
    } else {
        Err(Errno::NOSYS)
    };
    match flocked {
        Ok(()) => Ok(Some(Lock {
            within_process: None,
        })),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(e) if knows_no_flock(e) => {
            tracing::debug!(error = %e, "no flock on this file system; partials are locked only within this process");
            let id = file_id(&fstat(file)?);
            let new = locked().insert(id);
            // Created lazily: dropping a lock would release the other holder's.
            Ok(new.then(|| Lock {
                within_process: Some(id),
            }))
        }
        Err(e) => Err(e),
    }
}

/// Releases the lock of an open partial. Closing the file is not enough: a child that another thread has just forked
/// shares the open file, and with it the lock, until it calls exec.
pub(super) fn unlock(file: &File) {
    // Fails only where the file system has no flock.
    let _ = flock(file, FlockOperation::Unlock);
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some(id) = self.within_process {
            locked().remove(&id);
        }
    }
}

fn locked() -> MutexGuard<'static, BTreeSet<FileId>> {
    crate::error::lock::lock(&LOCKED)
}
