//! The credit for unanswered entries, as the receiver counts it.

use std::collections::HashMap;
use std::sync::Mutex;

use crate::error::lock::lock;
use crate::error::{Error, Result};
use crate::protocol::{MAX_UNANSWERED, MAX_UNANSWERED_BYTES};

/// Unanswered entries, checked against the advertised limits.
#[derive(Default)]
pub(super) struct EntryCredit {
    state: Mutex<EntryCreditState>,
    changed: tokio::sync::Notify,
}

#[derive(Default)]
struct EntryCreditState {
    lengths: HashMap<u64, usize>,
    bytes: usize,
    ended: bool,
}

impl EntryCredit {
    pub(super) fn add(&self, id: u64, length: usize) -> Result<()> {
        let mut state = lock(&self.state);
        state.lengths.insert(id, length);
        state.bytes += length;
        if state.lengths.len() > MAX_UNANSWERED as usize
            || state.bytes > MAX_UNANSWERED_BYTES as usize
        {
            return Err(Error::Protocol(
                "the sender exceeded the limit of unanswered entries".into(),
            ));
        }
        Ok(())
    }

    pub(super) fn remove(&self, ids: &[u64]) {
        let mut state = lock(&self.state);
        for id in ids {
            state.bytes -= state.lengths.remove(id).unwrap_or(0);
        }
        drop(state);
        self.changed.notify_waiters();
    }

    pub(super) fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_waiters();
    }

    /// Waits until the manifest has ended and all its entries are answered.
    pub(super) async fn ended(&self) {
        loop {
            let changed = self.changed.notified();
            {
                let state = lock(&self.state);
                if state.ended && state.lengths.is_empty() {
                    return;
                }
            }
            changed.await;
        }
    }
}
