//! Entries that the manifest settles are told to the sender and to observers once they are on the disk.
//!
//! Directories, links, empty files and changed metadata have no transfer, so there is no commit that brings each of them to
//! the disk. One sync does it for a group: all entries of a batch, and all batches that were judged while the sync before
//! was running. A slow disk thus makes the groups larger, and a fast one delays an answer by one short sync.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;
use tracing::Instrument;

use super::entry_credit::EntryCredit;
use super::{Receiver, blocking};
use crate::error::{Error, Reason};
use crate::protocol::Verdict;
use crate::protocol::path::RelativePath;
use crate::protocol::{Durability, Kind};
use crate::transfer::events::Settled;

/// Batches that one sync may bring to the disk.
const MAX_GROUP: usize = 64;

/// An entry that is settled, and not told yet.
pub(super) struct Settling {
    pub(super) id: u64,
    /// As the sender named it.
    pub(super) name: RelativePath,
    pub(super) kind: Kind,
    pub(super) size: u64,
    /// It was made or replaced; otherwise it was there, though its metadata may have been set.
    pub(super) made: bool,
}

impl Receiver {
    /// Tells of entries that were made or changed: at once where they need not reach the disk, otherwise after the next sync.
    pub(super) fn tell_when_durable(&self, group: Vec<Settling>) {
        if self.session.take.dry_run {
            return group.into_iter().for_each(|entry| self.tell(entry));
        }
        self.wrote.store(true, Ordering::Relaxed);
        if self.session.durability != Durability::Synced {
            return group.into_iter().for_each(|entry| self.tell(entry));
        }
        // Fails only when the session is over.
        let _ = self.settling.send(group);
    }

    /// Syncs group after group and tells of its entries, until all entries are answered.
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
            // A task of its own: what is made is counted even if the connection is lost meanwhile.
            let told = async move { receiver.sync_and_tell(group).await };
            let _ = self.transfers.spawn(told.in_current_span()).await;
        }
    }

    async fn sync_and_tell(self: &Arc<Self>, group: Vec<Settling>) {
        let store = self.session.store.clone();
        match blocking(move || store.sync()).await {
            Ok(()) => group.into_iter().for_each(|entry| self.tell(entry)),
            Err(why) => {
                let text = format!("it is there, but may not outlast a crash: {}", why.text);
                let why = Reason::new(why.code, text);
                for entry in group {
                    let result = self.refused(entry.id, why.clone());
                    self.report(Some(entry.id), entry.name, entry.kind, entry.size, result);
                }
            }
        }
    }

    /// Answers the sender, counts, and tells the observer.
    pub(super) fn tell(&self, entry: Settling) {
        let Settling { id, kind, .. } = entry;
        let result = if entry.made {
            if kind != Kind::Directory && !self.session.take.dry_run {
                self.committed.fetch_add(1, Ordering::Relaxed);
            }
            self.answer(Verdict::Done(id));
            Settled::Committed
        } else {
            self.skipped.fetch_add(1, Ordering::Relaxed);
            self.answer(Verdict::Skip(id));
            Settled::Skipped
        };
        self.report(Some(id), entry.name, kind, entry.size, result);
    }
}
