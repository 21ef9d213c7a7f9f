//! What becomes of each entry, over all connections of a session.

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

/// Ranges that a receiver may have offered as held in all its open Wants; over it, it is not honest.
const MAX_OPEN_HELD: usize = 64 << 10;
/// Failures kept by name in [`TransferStats`]; the events name them all.
pub const MAX_FAILURES: usize = 1000;

/// What became of a session, as the sender saw it.
#[derive(Debug, Clone, Default)]
pub struct TransferStats {
    /// Entries announced.
    pub entries: u64,
    /// Files committed, links and empty files included.
    pub files: u64,
    /// Bytes of content committed.
    pub bytes: u64,
    /// Files and links that were there already.
    pub skipped: u64,
    /// Entries that failed, and what could not be sent at all.
    pub failed: u64,
    /// The first [`MAX_FAILURES`] of them.
    pub failures: Vec<(RelativePath, Reason)>,
    /// What was there when it was looked for, and gone before its turn; no failure.
    pub vanished: u64,
    /// FIFOs, sockets and devices come upon in directories, unless those are to fail.
    pub specials: u64,
    /// The first [`MAX_FAILURES`] of both.
    pub omitted: Vec<(RelativePath, Reason)>,
    /// What was not sent of files that were: each kind of thing once.
    pub unkept: Vec<MetadataWarning>,
    /// Files, links and directories that the filter left out; what is in such a directory was not looked at.
    pub excluded: u64,
    /// Why the receiver ended the session early, if it did; what was not announced or answered by then was not sent.
    pub interrupted: Option<Reason>,
}

impl TransferStats {
    /// The account of a session that never was, since none of its sources could be looked at.
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

/// A session's entries, over all its connections.
#[derive(Default)]
pub(super) struct EntryTable {
    /// Announced on this connection.
    pub(super) unsettled: HashMap<u64, Pending>,
    /// Announced on an earlier connection, or refused since the receiver goes away: to be announced anew.
    left: BTreeMap<u64, Pending>,
    pub(super) unanswered: u32,
    pub(super) unanswered_bytes: u32,
    open_held: usize,
    /// Entries that are wanted on this connection and not sent to their end.
    to_send: usize,
    next_id: u64,
    pub(super) names: HardLinks,
    found_files: u64,
    found_bytes: u64,
    /// The walk is over.
    pub(super) all_found: bool,
    /// All was found and announced.
    pub(super) complete: bool,
    /// Why the receiver goes away, on this connection.
    pub(super) gone: Option<Reason>,
    pub(super) progress: u64,
    stats: TransferStats,
}

/// An entry that is not settled.
pub(super) struct Pending {
    pub(super) announce: Arc<Announce>,
    pub(super) role: LinkRole,
    /// Bytes of the entry while it stands unanswered.
    unanswered: Option<u32>,
    /// Ranges that the receiver offered as held.
    held: usize,
    /// Bytes in them, at the last time that it was wanted.
    held_bytes: Option<u64>,
    /// It was sent to its end, so it may be committed though no receipt came.
    sent: bool,
    /// It is wanted on this connection, and not sent to its end.
    to_send: bool,
}

impl EntryTable {
    /// What the last connection left comes again.
    pub(super) fn start_connection(&mut self) {
        for (id, pending) in self.unsettled.drain() {
            if !self.names.reannounce(&pending.announce, pending.role) {
                self.left.insert(id, pending);
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

    /// Announces the first entry of those that come again; false when there is none.
    pub(super) fn put_reannounced(&mut self, buffer: &mut BytesMut) -> bool {
        let Some((id, pending)) = self.left.pop_first() else {
            return false;
        };
        self.put(id, pending, buffer);
        true
    }

    /// Announces an entry for the first time, or keeps it until it may be.
    pub(super) fn put_found(&mut self, announce: Announce, buffer: &mut BytesMut) {
        self.stats.entries += 1;
        self.found_files += u64::from(announce.kind != Kind::Directory);
        for (aspect, why) in announce.extra.iter().flat_map(|extra| &extra.lapses) {
            MetadataWarning::count_one(&mut self.stats.unkept, *aspect, || {
                format!("{}: {why}", announce.path)
            });
        }
        if let Some((announce, role)) = self.names.found(Arc::new(announce), &mut self.stats.unkept)
        {
            self.put_new(announce, role, buffer);
        }
    }

    /// Announces a name that had to wait for another of its file; false when there is none.
    pub(super) fn put_waiting(&mut self, buffer: &mut BytesMut) -> bool {
        let Some((announce, role)) = self.names.next() else {
            return false;
        };
        self.put_new(announce, role, buffer);
        true
    }

    fn put_new(&mut self, announce: Arc<Announce>, role: LinkRole, buffer: &mut BytesMut) {
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

    /// Notes that a pipe had more in it.
    pub(super) fn found_more(&mut self, bytes: u64) {
        self.found_bytes += bytes;
    }

    /// Files found so far, their bytes, and whether that is all.
    pub(super) fn found(&self) -> (u64, u64, bool) {
        (self.found_files, self.found_bytes, self.all_found)
    }

    /// Takes an entry off the unanswered ones; returns it, and whether all of it was sent before. A second answer, or one
    /// to no question, is the receiver's fault.
    pub(super) fn answered(&mut self, id: u64, verdict: &Verdict) -> Result<(Arc<Announce>, bool)> {
        let pending = self.unsettled.get_mut(&id);
        let Some((pending, bytes)) =
            pending.and_then(|p| p.unanswered.take().map(|bytes| (p, bytes)))
        else {
            return Err(Error::Protocol(
                format!("it answered entry {id}, which stands for no answer").into(),
            ));
        };
        self.unanswered -= 1;
        self.unanswered_bytes -= bytes;
        if let Verdict::Want(_, held) = verdict {
            if let LinkRole::Name(..) = pending.role {
                // The receiver cannot make it another name: it is a file of its own.
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
                "it holds more ranges than can be compared".into(),
            ));
        }
        Ok((pending.announce.clone(), pending.sent))
    }

    /// Notes that a file was sent to its end.
    pub(super) fn sent_whole(&mut self, id: u64) {
        if let Some(pending) = self.unsettled.get_mut(&id) {
            pending.sent = true;
            self.to_send -= usize::from(std::mem::take(&mut pending.to_send));
        }
    }

    /// Whether every entry is answered, and nothing of what is wanted is left to send.
    pub(super) fn all_sent(&self) -> bool {
        self.unanswered == 0 && self.to_send == 0
    }

    /// Takes an entry off the unsettled ones; one that met a receiver that is `stopping` comes again.
    pub(super) fn settled(&mut self, id: u64, stands: bool, stopping: bool) {
        let Some(mut pending) = self.unsettled.remove(&id) else {
            return;
        };
        self.open_held -= pending.held;
        self.to_send -= usize::from(std::mem::take(&mut pending.to_send));
        if stopping {
            self.gone.get_or_insert(Code::Stopping.into());
            if !self.names.reannounce(&pending.announce, pending.role) {
                self.left.insert(id, pending);
            }
        } else {
            self.names.settled(id, pending.role, stands);
            self.progress += 1;
        }
    }

    /// Counts what the filter left out.
    pub(super) fn exclude(&mut self, count: u64) {
        self.stats.excluded += count;
    }

    pub(super) fn count(&mut self, path: &RelativePath, kind: Kind, size: u64, result: &Settled) {
        self.stats.count(path, kind, size, result);
    }

    /// The account so far, interrupted when something is left and the receiver has gone away.
    pub(super) fn sent(&self) -> TransferStats {
        let mut sent = self.stats.clone();
        sent.interrupted = self.gone.clone().filter(|_| !self.is_settled());
        sent
    }

    /// Whether all is announced and settled.
    pub(super) fn is_settled(&self) -> bool {
        self.complete
            && self.left.is_empty()
            && self.unsettled.is_empty()
            && self.names.pending() == 0
    }
}

impl Pending {
    /// Bytes of content that the entry stands for.
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
