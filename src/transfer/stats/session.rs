//! The results of entries as the receiver sees them, over all connections of a session.
//!
//! A sender that reconnects walks its sources again. Entries that were counted before return as skipped, so a number
//! of them is enough. Nothing is kept for each file.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::TransferStats;
use crate::error::Reason;
use crate::protocol::path::RelativePath;
use crate::protocol::{HELD_BLOCK, Kind, MetadataWarning};
use crate::transfer::events::{Event, Settled};

/// The statistics of a session, for the user of the receiver.
#[derive(Debug, Default)]
pub struct SessionStats(Mutex<StatsState>);

#[derive(Debug, Default)]
struct StatsState {
    sent: TransferStats,
    /// Files found on this connection and their bytes, and the maximum over all connections.
    found: (u64, u64),
    most_found: (u64, u64),
    /// The sender has ended its search.
    complete: bool,
    /// Files that an earlier connection settled and this one has not skipped yet.
    again: u64,
    /// Entries that failed or were omitted on earlier connections, as far as their names are kept.
    failed_before: HashSet<RelativePath>,
    settled: u64,
    moved: u64,
    /// Directories made.
    directories: u64,
}

impl SessionStats {
    fn state(&self) -> MutexGuard<'_, StatsState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts another connection, which announces all entries again.
    pub(crate) fn start_connection(&self) {
        let mut state = self.state();
        state.again = state.sent.files + state.sent.skipped;
        state.failed_before = state
            .sent
            .failures
            .iter()
            .chain(&state.sent.omitted)
            .map(|(path, _)| path.clone())
            .collect();
        state.found = (0, 0);
        state.complete = false;
        state.sent.interrupted = None;
    }

    /// Counts an entry.
    pub(crate) fn found(&self, kind: Kind, size: u64) {
        let mut state = self.state();
        state.sent.entries += 1;
        if kind != Kind::Directory {
            state.found = (state.found.0 + 1, state.found.1.saturating_add(size));
        }
        let found = state.found;
        let most = state.most_found;
        state.most_found = (most.0.max(found.0), most.1.max(found.1));
    }

    /// Records that the sender has found everything.
    pub(crate) fn complete(&self) {
        self.state().complete = true;
    }

    /// Returns an event with the totals found so far.
    pub(crate) fn tell_found(&self) -> Event {
        let state = self.state();
        let (files, bytes) = state.most_found;
        Event::Found {
            files,
            bytes,
            complete: state.complete,
        }
    }

    /// Counts a result. Returns false if it repeats the result of an earlier connection.
    pub(crate) fn settled(
        &self,
        path: &RelativePath,
        kind: Kind,
        size: u64,
        result: &Settled,
    ) -> bool {
        let mut state = self.state();
        match result {
            Settled::Skipped if kind != Kind::Directory && state.again > 0 => {
                state.again -= 1;
                return false;
            }
            Settled::Failed(_) | Settled::Omitted(_) if state.failed_before.contains(path) => {
                return false;
            }
            Settled::Failed(_) | Settled::Omitted(_) => {}
            _ => state.settled += 1,
        }
        if kind == Kind::Directory && *result == Settled::Committed {
            state.directories += 1;
        }
        state.sent.count(path, kind, size, result);
        true
    }

    /// Counts a result that completed on an earlier connection.
    pub(crate) fn settled_late(
        &self,
        path: &RelativePath,
        kind: Kind,
        size: u64,
        result: &Settled,
    ) {
        let mut state = self.state();
        // Repeated directories are not counted as skipped.
        if kind != Kind::Directory {
            state.again += 1;
        } else if *result == Settled::Committed {
            state.directories += 1;
        }
        state.sent.count(path, kind, size, result);
    }

    pub(crate) fn moved(&self, bytes: u64) {
        self.state().moved += bytes;
    }

    /// Records that the sender did not announce everything.
    pub(crate) fn interrupted(&self, why: Reason) {
        self.state().sent.interrupted = Some(why);
    }

    /// Adds the metadata warnings of the sender.
    pub(crate) fn unkept(&self, unkept: &[MetadataWarning]) {
        MetadataWarning::join(&mut self.state().sent.unkept, unkept);
    }

    /// Returns whether everything was found and announced, and nothing has failed.
    pub(crate) fn is_whole(&self) -> bool {
        let state = self.state();
        state.complete && state.sent.failed == 0 && state.sent.interrupted.is_none()
    }

    /// Returns the entries that the session has made, and the bytes of its files.
    pub(crate) fn brought(&self) -> (u64, u64) {
        let state = self.state();
        (state.sent.files + state.directories, state.sent.bytes)
    }

    /// Returns the statistics so far.
    pub fn sent(&self) -> TransferStats {
        self.state().sent.clone()
    }

    /// Returns a value that grows with progress: a settled entry, or another block of content.
    pub(crate) fn progress(&self) -> u64 {
        let state = self.state();
        state.settled + state.moved / HELD_BLOCK
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn path(name: &str) -> RelativePath {
        RelativePath::from_components([name]).unwrap()
    }

    #[test]
    fn entries_repeated_on_another_connection_count_once() {
        let ledger = SessionStats::default();
        let settled =
            |name: &str, result: Settled| ledger.settled(&path(name), Kind::File, 5, &result);
        let failed = || Settled::Failed(Code::Unreadable.into());
        assert!(
            settled("a", Settled::Committed)
                && settled("b", Settled::Skipped)
                && settled("c", failed())
        );
        let before = ledger.progress();
        ledger.start_connection();
        ledger.settled_late(&path("d"), Kind::File, 5, &Settled::Committed);
        for again in ["a", "b", "d"] {
            assert!(!settled(again, Settled::Skipped));
        }
        assert!(!settled("c", failed()));
        assert_eq!(ledger.progress(), before, "the session made no progress");
        assert!(
            settled("e", Settled::Committed)
                && settled("f", Settled::Skipped)
                && settled("g", failed())
        );
        let TransferStats {
            files,
            bytes,
            skipped,
            failed,
            ..
        } = ledger.sent();
        assert_eq!((files, bytes, skipped, failed), (3, 15, 2, 2));
    }
}
