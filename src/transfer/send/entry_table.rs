//! The state of each entry, over all connections of a session.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::BytesMut;

use super::hard_links::{HardLinks, LinkRole};
use crate::error::{Code, Error, Reason, Result};
use crate::protocol::Verdict;
use crate::protocol::path::RelativePath;
use crate::protocol::{Entry, Kind, Message, MetadataWarning};
use crate::storage::walk::Announce;
use crate::transfer::events::{Event, Observer, Settled};

/// Most ranges that a receiver may offer as held in all open `Want`s. A receiver that exceeds it is not honest.
const MAX_OPEN_HELD: usize = 64 << 10;
/// Failures that are kept by name in [`TransferStats`]. The events name all of them.
pub const MAX_FAILURES: usize = 1000;

/// The statistics of a session, as the sender saw it.
#[derive(Debug, Clone, Default)]
pub struct TransferStats {
    /// Entries announced.
    pub entries: u64,
    /// Files committed, links and empty files included.
    pub files: u64,
    /// Bytes of content committed.
    pub bytes: u64,
    /// Files and links that the receiver already had.
    pub skipped: u64,
    /// Failed entries, and sources that could not be sent.
    pub failed: u64,
    /// The first [`MAX_FAILURES`] failures.
    pub failures: Vec<(RelativePath, Reason)>,
    /// Files that vanished between the walk and their turn; not failures.
    pub vanished: u64,
    /// FIFOs, sockets and devices in directories, unless they count as failures.
    pub specials: u64,
    /// The first [`MAX_FAILURES`] vanished and special files.
    pub omitted: Vec<(RelativePath, Reason)>,
    /// Metadata warnings: each kind once, with a count.
    pub unkept: Vec<MetadataWarning>,
    /// Files, links and directories that the filter excluded. The content of an excluded directory is not counted.
    pub excluded: u64,
    /// The reason if the receiver ended the session early. Entries that were not announced or answered by then were
    /// not sent.
    pub interrupted: Option<Reason>,
}

impl TransferStats {
    /// Returns the statistics of a session that never started, because no source could be opened.
    pub(crate) fn of_failures(failures: Vec<(RelativePath, Reason)>, observer: &Observer) -> Self {
        let mut sent = Self::default();
        for (path, why) in failures {
            sent.count(&path, Kind::File, 0, &Settled::Failed(why.clone()));
            (observer)(Event::Settled {
                id: None,
                path,
                kind: Kind::File,
                size: 0,
                result: Settled::Failed(why),
            });
        }
        sent
    }

    pub(crate) fn count(&mut self, path: &RelativePath, kind: Kind, size: u64, result: &Settled) {
        match result {
            Settled::Failed(why) => {
                self.failed += 1;
                if self.failures.len() < MAX_FAILURES {
                    self.failures.push((path.clone(), why.clone()));
                }
            }
            Settled::Omitted(why) => {
                match why.code {
                    Code::Special => self.specials += 1,
                    _ => self.vanished += 1,
                }
                if self.omitted.len() < MAX_FAILURES {
                    self.omitted.push((path.clone(), why.clone()));
                }
            }
            _ if kind == Kind::Directory => {}
            Settled::Skipped => self.skipped += 1,
            Settled::Committed => {
                self.files += 1;
                self.bytes += size;
            }
        }
    }
}

/// The entries of a session over all its connections.
#[derive(Default)]
pub(super) struct EntryTable {
    /// Entries announced on this connection.
    pub(super) unsettled: HashMap<u64, Pending>,
    /// Entries to announce again: announced on an earlier connection, or refused because the receiver goes away.
    to_reannounce: BTreeMap<u64, Pending>,
    pub(super) unanswered: u32,
    pub(super) unanswered_bytes: u32,
    open_held: usize,
    /// Wanted entries on this connection that are not completely sent.
    to_send: usize,
    next_id: u64,
    pub(super) names: HardLinks,
    found_files: u64,
    found_bytes: u64,
    /// Whether the walk has ended.
    pub(super) all_found: bool,
    /// Whether everything was found and announced.
    pub(super) complete: bool,
    /// The reason why the receiver goes away on this connection.
    pub(super) gone: Option<Reason>,
    pub(super) progress: u64,
    stats: TransferStats,
}

/// An unsettled entry.
pub(super) struct Pending {
    pub(super) announce: Arc<Announce>,
    pub(super) role: LinkRole,
    /// Bytes of the entry while it is unanswered.
    unanswered: Option<u32>,
    /// Number of ranges that the receiver offered as held.
    held: usize,
    /// Bytes in the held ranges of the last `Want`.
    held_bytes: Option<u64>,
    /// Whether it was completely sent, so that it may be committed without a receipt.
    sent: bool,
    /// Whether it is wanted on this connection and not completely sent.
    to_send: bool,
}

impl EntryTable {
    /// Starts a connection: entries that the last connection left are announced again.
    pub(super) fn start_connection(&mut self) {
        for (id, pending) in self.unsettled.drain() {
            if !self.names.reannounce(&pending.announce, pending.role) {
                self.to_reannounce.insert(id, pending);
            }
        }
        self.names.start_connection();
        self.unanswered = 0;
        self.unanswered_bytes = 0;
        self.open_held = 0;
        self.to_send = 0;
        self.complete = false;
        self.gone = None;
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
        self.found_files += u64::from(announce.kind != Kind::Directory);
        for (aspect, why) in announce.extra.iter().flat_map(|extra| &extra.warnings) {
            MetadataWarning::count_one(&mut self.stats.unkept, *aspect, || {
                format!("{}: {why}", announce.path)
            });
        }
        if let Some((announce, role)) = self.names.found(Arc::new(announce), &mut self.stats.unkept)
        {
            self.put_with_new_id(announce, role, buffer);
        }
    }

    /// Announces a name that waited for the first name of its file; false if there is none.
    pub(super) fn put_waiting(&mut self, buffer: &mut BytesMut) -> bool {
        let Some((announce, role)) = self.names.next() else {
            return false;
        };
        self.put_with_new_id(announce, role, buffer);
        true
    }

    fn put_with_new_id(&mut self, announce: Arc<Announce>, role: LinkRole, buffer: &mut BytesMut) {
        let id = self.next_id;
        self.next_id += 1;
        let pending = Pending {
            announce,
            role,
            unanswered: None,
            held: 0,
            held_bytes: None,
            sent: false,
            to_send: false,
        };
        self.found_bytes += pending.size();
        self.put(id, pending, buffer);
    }

    fn put(&mut self, id: u64, mut pending: Pending, buffer: &mut BytesMut) {
        let before = buffer.len();
        pending.entry(id).put(buffer);
        let length = (buffer.len() - before) as u32;
        pending.unanswered = Some(length);
        pending.held = 0;
        pending.to_send = false;
        self.unanswered += 1;
        self.unanswered_bytes += length;
        self.unsettled.insert(id, pending);
    }

    /// Adds bytes that were read from a pipe.
    pub(super) fn found_more(&mut self, bytes: u64) {
        self.found_bytes += bytes;
    }

    /// Returns the files found so far, their bytes, and whether the walk has ended.
    pub(super) fn found(&self) -> (u64, u64, bool) {
        (self.found_files, self.found_bytes, self.all_found)
    }

    /// Records the answer to an entry. Returns the entry, and whether it was completely sent before. Fails on a second
    /// answer or an unknown entry, which are protocol errors of the receiver.
    pub(super) fn answered(&mut self, id: u64, verdict: &Verdict) -> Result<(Arc<Announce>, bool)> {
        let pending = self.unsettled.get_mut(&id);
        let Some((pending, bytes)) =
            pending.and_then(|p| p.unanswered.take().map(|bytes| (p, bytes)))
        else {
            return Err(Error::Protocol(
                format!("the receiver answered entry {id}, which waits for no answer").into(),
            ));
        };
        self.unanswered -= 1;
        self.unanswered_bytes -= bytes;
        if let Verdict::Want(_, held) = verdict {
            if let LinkRole::Name(..) = pending.role {
                // The receiver cannot link it, so it becomes a file of its own.
                self.names.settled(id, pending.role, true);
                pending.role = LinkRole::Alone;
                self.found_bytes += pending.size();
            }
            pending.to_send = true;
            self.to_send += 1;
            pending.held = held.len();
            self.open_held += held.len();
            let held_bytes = held
                .iter()
                .map(|held| held.range.length)
                .fold(0, u64::saturating_add);
            self.progress +=
                u64::from(pending.held_bytes.is_some_and(|before| held_bytes > before));
            pending.held_bytes = pending.held_bytes.max(Some(held_bytes));
        }
        if self.open_held > MAX_OPEN_HELD {
            return Err(Error::Protocol(
                "the receiver offers too many held ranges".into(),
            ));
        }
        Ok((pending.announce.clone(), pending.sent))
    }

    /// Records that a file was completely sent.
    pub(super) fn sent_whole(&mut self, id: u64) {
        if let Some(pending) = self.unsettled.get_mut(&id) {
            pending.sent = true;
            self.to_send -= usize::from(std::mem::take(&mut pending.to_send));
        }
    }

    /// Returns whether every entry is answered, and every wanted file is completely sent.
    pub(super) fn all_sent(&self) -> bool {
        self.unanswered == 0 && self.to_send == 0
    }

    /// Removes an entry from the unsettled ones. If the receiver is `stopping`, the entry is announced again on
    /// another connection.
    pub(super) fn settled(&mut self, id: u64, stands: bool, stopping: bool) {
        let Some(mut pending) = self.unsettled.remove(&id) else {
            return;
        };
        self.open_held -= pending.held;
        self.to_send -= usize::from(std::mem::take(&mut pending.to_send));
        if stopping {
            self.gone.get_or_insert(Code::Stopping.into());
            if !self.names.reannounce(&pending.announce, pending.role) {
                self.to_reannounce.insert(id, pending);
            }
        } else {
            self.names.settled(id, pending.role, stands);
            self.progress += 1;
        }
    }

    /// Counts entries that the filter excluded.
    pub(super) fn exclude(&mut self, count: u64) {
        self.stats.excluded += count;
    }

    pub(super) fn count(&mut self, path: &RelativePath, kind: Kind, size: u64, result: &Settled) {
        self.stats.count(path, kind, size, result);
    }

    /// Returns the statistics so far. They are marked interrupted if entries are left and the receiver has gone away.
    pub(super) fn sent(&self) -> TransferStats {
        let mut sent = self.stats.clone();
        sent.interrupted = self.gone.clone().filter(|_| !self.is_settled());
        sent
    }

    /// Returns whether everything is announced and settled.
    pub(super) fn is_settled(&self) -> bool {
        self.complete
            && self.to_reannounce.is_empty()
            && self.unsettled.is_empty()
            && self.names.pending() == 0
    }
}

impl Pending {
    /// Returns the bytes of content of the entry.
    pub(super) fn size(&self) -> u64 {
        match (&self.announce.pipe, self.role) {
            (Some(pipe), _) => pipe.bytes(),
            (None, LinkRole::Alone | LinkRole::First(_)) if self.announce.kind == Kind::File => {
                self.announce.metadata.size
            }
            _ => 0,
        }
    }

    fn entry(&self, id: u64) -> Entry {
        let hard_link = match self.role {
            LinkRole::Alone => None,
            LinkRole::First(_) | LinkRole::Reannounced(_) => Some(id),
            LinkRole::Name(_, first) => Some(first),
        };
        Entry {
            hard_link,
            ..self.announce.entry(id)
        }
    }
}
