//! Permits for the transfers that write at the same time.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Code, Reason, Result};

/// Permits of the shared semaphore that bounds the transfers which write at the same time. Each connection waits for
/// one permit at a time, so that waiting is fair between connections.
#[derive(Debug)]
pub struct Permits {
    all: Arc<Semaphore>,
    turn: tokio::sync::Mutex<()>,
}

impl Permits {
    /// Returns a connection's access to the shared semaphore.
    pub fn new(all: Arc<Semaphore>) -> Self {
        Self {
            all,
            turn: tokio::sync::Mutex::new(()),
        }
    }

    /// Waits for a permit. The caller holds it until the disk work ends.
    pub async fn acquire(&self) -> Result<OwnedSemaphorePermit, Reason> {
        let _turn = self.turn.lock().await;
        // The semaphore is closed only when the process ends.
        self.all
            .clone()
            .acquire_owned()
            .await
            .map_err(|_| Reason::from(Code::Stopping))
    }
}
