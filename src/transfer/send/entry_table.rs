//! The state of each entry, over all connections of a session: announced, answered, sent, settled.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::BytesMut;

use super::entry_credit::{Unanswered, UnansweredLimit};
use super::hard_links::{HardLinks, LinkRole};
use super::pending::Pending;
use crate::error::{Code, Error, Reason, Result};
use crate::protocol::Verdict;
use crate::protocol::path::RelativePath;
use crate::protocol::{Kind, Message, MetadataWarning};
use crate::storage::KeptShare;
use crate::storage::walk::Announce;
use crate::transfer::events::Settled;
use crate::transfer::stats::TransferStats;

/// Most unsettled entries, including running transfers; limits the memory of the sender.
const MAX_UNSETTLED: usize = 10_000;
/// Unsettled entries that are possible whatever memory is free, so that every session goes on.
const MIN_UNSETTLED: usize = 32;
/// Free memory in bytes that more unsettled entries need: several of the largest.
const ENTRY_ROOM: usize = 64 << 10;
/// Most ranges that a receiver may offer as held in all open `Want`s. More than this breaks the protocol.
const MAX_OPEN_HELD: usize = 64 << 10;

/// The entries of a session over all its connections.
#[derive(Default)]
pub(super) struct EntryTable {
    /// Entries announced on this connection.
    unsettled: HashMap<u64, Pending>,
    /// Entries to announce again: announced on an earlier connection, or refused because the receiver goes away.
    to_reannounce: BTreeMap<u64, Pending>,
    next_id: u64,
    hard_links: HardLinks,
    memory: KeptShare,
    connection: ConnectionState,
    found: FoundTotals,
    /// Grows with each settled entry, and when the receiver holds more of a file than before.
    progress: u64,
    stats: TransferStats,
}

/// State that ends with a connection.
#[derive(Default)]
struct ConnectionState {
    unanswered: Unanswered,
    /// Ranges that are offered as held in open `Want`s.
    held_ranges: usize,
    /// Wanted entries that are not completely sent.
    to_send: usize,
    /// Whether everything was found and announced.
    complete: bool,
    /// The reason why the receiver goes away.
    leaving: Option<Reason>,
}

/// What the walk has found so far.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct FoundTotals {
    pub(super) files: u64,
    pub(super) bytes: u64,
    /// Whether the walk has ended.
    pub(super) complete: bool,
}

/// What is known of an entry when its verdict arrives.
pub(super) struct Answered {
    pub(super) announce: Arc<Announce>,
    /// Whether it was completely sent before, on this connection or an earlier one.
    pub(super) sent: bool,
}

/// What is reported of an entry when it is settled.
pub(super) struct Settling {
    pub(super) announce: Arc<Announce>,
    pub(super) size: u64,
    pub(super) role: LinkRole,
}

impl EntryTable {
    /// Creates the table of a session. `reconnects` says whether it may continue over another connection.
    pub(super) fn new(memory: KeptShare, reconnects: bool) -> Self {
        Self {
            hard_links: HardLinks::new(&memory, reconnects),
            memory,
            ..Self::default()
        }
    }

    /// Starts a connection: entries that the last connection left are announced again.
    pub(super) fn start_connection(&mut self) {
        for (id, pending) in self.unsettled.drain() {
            if !self.hard_links.reannounce(&pending.announce, pending.role) {
                self.to_reannounce.insert(id, pending);
            }
        }
        self.hard_links.start_connection();
        self.connection = ConnectionState::default();
    }

    /// Returns whether one more entry may be announced.
    pub(super) fn has_room(&self, limit: UnansweredLimit) -> bool {
        let unsettled = self.unsettled.len();
        self.connection.unanswered.has_room(limit)
            && unsettled < MAX_UNSETTLED
            && (unsettled < MIN_UNSETTLED || self.memory.free() >= ENTRY_ROOM)
    }

    /// Announces the first of the entries that are announced again; false if there is none.
    pub(super) fn put_reannounced(&mut self, buffer: &mut BytesMut) -> bool {
        let Some((id, pending)) = self.to_reannounce.pop_first() else {
            return false;
        };
        self.put(id, pending, buffer);
        true
    }

    /// Announces an entry for the first time, or keeps it until its first name is settled.
    pub(super) fn put_found(&mut self, announce: Announce, buffer: &mut BytesMut) {
        self.stats.entries += 1;
        self.found.files += u64::from(announce.kind != Kind::Directory);
        for (aspect, why) in announce.extra.iter().flat_map(|extra| &extra.warnings) {
            MetadataWarning::count_one(&mut self.stats.unkept, *aspect, || {
                format!("{}: {why}", announce.path)
            });
        }
        let announce = Arc::new(announce);
        let placed = self.hard_links.found(announce, &mut self.stats.unkept);
        if let Some((announce, role)) = placed {
            self.put_with_new_id(announce, role, buffer);
        }
    }

    /// Announces a name that waited for the first name of its file; false if there is none.
    pub(super) fn put_waiting(&mut self, buffer: &mut BytesMut) -> bool {
        let Some((announce, role)) = self.hard_links.next() else {
            return false;
        };
        self.put_with_new_id(announce, role, buffer);
        true
    }

    /// Returns the number of found names that are not announced, because the first name of their file is not settled.
    pub(super) fn waiting_names(&self) -> usize {
        self.hard_links.pending()
    }

    fn put_with_new_id(&mut self, announce: Arc<Announce>, role: LinkRole, buffer: &mut BytesMut) {
        let id = self.next_id;
        self.next_id += 1;
        let pending = Pending::new(announce, role);
        self.found.bytes += pending.size();
        self.put(id, pending, buffer);
    }

    fn put(&mut self, id: u64, mut pending: Pending, buffer: &mut BytesMut) {
        let before = buffer.len();
        pending.entry(id).put(buffer);
        let length = (buffer.len() - before) as u32;
        pending.announced(length);
        self.connection.unanswered.add(length);
        self.unsettled.insert(id, pending);
    }

    /// Records that the walk has ended.
    pub(super) fn end_walk(&mut self) {
        self.found.complete = true;
    }

    /// Records that everything was found and announced on this connection.
    pub(super) fn complete(&mut self) {
        self.connection.complete = true;
    }

    /// Adds bytes that were read from a pipe.
    pub(super) fn add_found_bytes(&mut self, bytes: u64) {
        self.found.bytes += bytes;
    }

    /// Returns what the walk has found so far.
    pub(super) fn found(&self) -> FoundTotals {
        self.found
    }

    /// Records the answer to an entry. Fails on a second answer or an unknown entry, which are protocol errors of the
    /// receiver.
    pub(super) fn answered(&mut self, id: u64, verdict: &Verdict) -> Result<Answered> {
        let pending = self.unsettled.get_mut(&id);
        let Some((pending, length)) =
            pending.and_then(|p| p.unanswered.take().map(|length| (p, length)))
        else {
            return Err(Error::Protocol(
                format!("the receiver answered entry {id}, which waits for no answer").into(),
            ));
        };
        let connection = &mut self.connection;
        connection.unanswered.remove(length);
        if let Verdict::Want(_, held) = verdict {
            if let LinkRole::Name(..) = pending.role {
                // The receiver cannot link it, so it becomes a file of its own.
                self.hard_links.settled(id, pending.role, true);
                pending.role = LinkRole::Alone;
                self.found.bytes += pending.size();
            }
            self.progress += u64::from(pending.wanted(held));
            connection.to_send += 1;
            connection.held_ranges += held.len();
        }
        if connection.held_ranges > MAX_OPEN_HELD {
            return Err(Error::Protocol(
                "the receiver offers too many held ranges".into(),
            ));
        }
        Ok(Answered {
            announce: pending.announce.clone(),
            sent: pending.sent,
        })
    }

    /// Records that a file was completely sent.
    pub(super) fn sent_whole(&mut self, id: u64) {
        if let Some(pending) = self.unsettled.get_mut(&id) {
            pending.sent = true;
            self.connection.to_send -= usize::from(std::mem::take(&mut pending.to_send));
        }
    }

    /// Returns whether every entry is answered, and every wanted file is completely sent.
    pub(super) fn all_sent(&self) -> bool {
        self.connection.unanswered.is_empty() && self.connection.to_send == 0
    }

    /// Returns an unsettled entry that has its result; `None` if it is settled already.
    pub(super) fn settling(&self, id: u64) -> Option<Settling> {
        self.unsettled.get(&id).map(|pending| Settling {
            announce: pending.announce.clone(),
            size: pending.size(),
            role: pending.role,
        })
    }

    /// Removes an entry from the unsettled ones. `is_committed` says whether the receiver has it now.
    pub(super) fn settled(&mut self, id: u64, is_committed: bool) {
        if let Some(pending) = self.remove(id) {
            self.hard_links.settled(id, pending.role, is_committed);
            self.progress += 1;
        }
    }

    /// Removes an entry that the receiver left because it is stopping. It is announced again on another connection.
    pub(super) fn left(&mut self, id: u64) {
        let Some(pending) = self.remove(id) else {
            return;
        };
        self.stop(Code::Stopping.into());
        if !self.hard_links.reannounce(&pending.announce, pending.role) {
            self.to_reannounce.insert(id, pending);
        }
    }

    fn remove(&mut self, id: u64) -> Option<Pending> {
        let mut pending = self.unsettled.remove(&id)?;
        self.connection.held_ranges -= pending.held_ranges;
        self.connection.to_send -= usize::from(std::mem::take(&mut pending.to_send));
        Some(pending)
    }

    /// Returns whether all announced entries are settled.
    pub(super) fn is_empty(&self) -> bool {
        self.unsettled.is_empty()
    }

    /// Records that the receiver goes away, for the reason it gave.
    pub(super) fn receiver_leaves(&mut self, reason: Reason) {
        self.connection.leaving = Some(reason);
    }

    /// Records that the session stops on this connection, unless the receiver gave a reason before.
    pub(super) fn stop(&mut self, reason: Reason) {
        self.connection.leaving.get_or_insert(reason);
    }

    /// Counts entries that the filter excluded.
    pub(super) fn exclude(&mut self, count: u64) {
        self.stats.excluded += count;
    }

    pub(super) fn count(&mut self, path: &RelativePath, kind: Kind, size: u64, result: &Settled) {
        self.stats.count(path, kind, size, result);
    }

    /// Returns the statistics so far. They are marked interrupted if entries are left and the receiver has gone away.
    pub(super) fn stats(&self) -> TransferStats {
        let mut stats = self.stats.clone();
        stats.interrupted = self
            .connection
            .leaving
            .clone()
            .filter(|_| !self.is_settled());
        stats
    }

    /// Returns a value that grows with progress at the receiver.
    pub(super) fn progress(&self) -> u64 {
        self.progress
    }

    /// Returns whether everything is announced and settled.
    pub(super) fn is_settled(&self) -> bool {
        self.connection.complete
            && self.to_reannounce.is_empty()
            && self.unsettled.is_empty()
            && self.hard_links.pending() == 0
    }
}

#[cfg(test)]
mod tests;
