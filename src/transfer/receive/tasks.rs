//! Disk work on the threads for blocking tasks, and locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Code, Reason, Result};

/// Runs disk work on the threads for blocking tasks.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Reason> + Send + 'static,
) -> Result<T, Reason> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| {
        Err(Reason::new(
            Code::Internal,
            "cannot write: a fault inside haul; please report it",
        ))
    })
}

/// Locks a mutex. A poisoned lock means that another task panicked; the tables stay consistent.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
