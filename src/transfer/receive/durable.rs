//! Reports entries that the manifest alone settles, after they are on the disk.
//!
//! Directories, links, empty files and changed metadata have no transfer, so no commit syncs each of them. One sync
//! serves a group: all batches that were decided while the previous sync ran. A slow disk thus makes larger groups,
//! and a fast one delays an answer by one short sync.

use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::Instrument;

use super::entry_credit::EntryCredit;
use super::session::{Session, SettledEntry};
use crate::error::{Reason, Result};
use crate::transfer::blocking::blocking;

/// Batches that one sync serves.
const MAX_GROUP: usize = 64;

/// Syncs groups and reports their entries, until all entries are answered.
pub(super) async fn sync_groups(
    session: &Arc<Session>,
    mut queue: mpsc::UnboundedReceiver<Vec<SettledEntry>>,
    credit: Arc<EntryCredit>,
) -> Result<()> {
    let mut groups = Vec::new();
    loop {
        tokio::select! {
            biased;
            _ = queue.recv_many(&mut groups, MAX_GROUP) => {}
            () = credit.ended() => return Ok(()),
        }
        let group: Vec<SettledEntry> = groups.drain(..).flatten().collect();
        // Runs as a separate task, so that made entries count even if the connection is lost meanwhile.
        let settled = sync_and_settle(session.clone(), group).in_current_span();
        let _ = session.transfers.spawn(settled).await;
    }
}

async fn sync_and_settle(session: Arc<Session>, group: Vec<SettledEntry>) {
    let store = session.target.store.clone();
    match blocking("write", move || store.sync()).await {
        Ok(()) => group.into_iter().for_each(|entry| session.settle(entry)),
        Err(reason) => {
            let text = format!("written, but may not survive a crash: {}", reason.text);
            let reason = Reason::new(reason.code, text);
            for entry in group {
                session.refuse(entry.label, reason.clone());
            }
        }
    }
}
