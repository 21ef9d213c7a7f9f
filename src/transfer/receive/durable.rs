//! Reports entries that the manifest alone settles, after they are on the disk.
//!
//! Directories, links, empty files and changed metadata have no transfer, so no commit syncs each of them. One sync
//! serves a group: all batches that were decided while the previous sync ran. A slow disk thus makes larger groups,
//! and a fast one delays an answer by one short sync.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;
use tracing::Instrument;

use super::Receiver;
use super::entry_credit::EntryCredit;
use super::tasks::blocking;
use crate::error::{Error, Reason};
use crate::protocol::Verdict;
use crate::protocol::path::RelativePath;
use crate::protocol::{Durability, Kind};
use crate::transfer::events::Settled;
use crate::transfer::stats::EntryResult;

/// Batches that one sync serves.
const MAX_GROUP: usize = 64;

/// A settled entry that is not yet reported.
pub(super) struct Settling {
    pub(super) id: u64,
    /// The sender's name for it.
    pub(super) name: RelativePath,
    pub(super) kind: Kind,
    pub(super) size: u64,
    /// Whether the entry was made or replaced; otherwise it existed, and only its metadata may have changed.
    pub(super) made: bool,
}

impl Receiver {
    /// Reports entries that were made or changed: at once if they need not reach the disk, otherwise after the next
    /// sync.
    pub(super) fn tell_when_durable(&self, group: Vec<Settling>) {
        if self.session.take.dry_run {
            return group.into_iter().for_each(|entry| self.tell(entry));
        }
        self.wrote.store(true, Ordering::Relaxed);
        if self.session.durability != Durability::Synced {
            return group.into_iter().for_each(|entry| self.tell(entry));
        }
        // Fails only if the session has ended.
        let _ = self.settling.send(group);
    }

    /// Syncs groups and reports their entries, until all entries are answered.
    pub(super) async fn sync_groups(
        self: &Arc<Self>,
        mut queue: mpsc::UnboundedReceiver<Vec<Settling>>,
        unanswered: Arc<EntryCredit>,
    ) -> Result<(), Error> {
        let mut groups = Vec::new();
        loop {
            tokio::select! {
                biased;
                _ = queue.recv_many(&mut groups, MAX_GROUP) => {}
                () = unanswered.ended() => return Ok(()),
            }
            let group: Vec<Settling> = groups.drain(..).flatten().collect();
            let receiver = self.clone();
            // Runs as a separate task, so that made entries count even if the connection is lost meanwhile.
            let told = async move { receiver.sync_and_tell(group).await };
            let _ = self.transfers.spawn(told.in_current_span()).await;
        }
    }

    async fn sync_and_tell(self: &Arc<Self>, group: Vec<Settling>) {
        let store = self.session.store.clone();
        match blocking(move || store.sync()).await {
            Ok(()) => group.into_iter().for_each(|entry| self.tell(entry)),
            Err(why) => {
                let text = format!("written, but may not survive a crash: {}", why.text);
                let why = Reason::new(why.code, text);
                for entry in group {
                    self.refused(entry, why.clone());
                }
            }
        }
    }

    /// Answers the sender, counts the entry, and reports it to the observer.
    pub(super) fn tell(&self, entry: Settling) {
        let mut committed = None;
        let result = if entry.made {
            committed = (!self.session.take.dry_run).then_some(0);
            self.answer(Verdict::Done(entry.id));
            Settled::Committed
        } else {
            self.answer(Verdict::Skip(entry.id));
            Settled::Skipped
        };
        self.report(EntryResult {
            id: Some(entry.id),
            path: entry.name,
            kind: entry.kind,
            size: entry.size,
            committed,
            result,
        });
    }
}
