//! What becomes of each entry as the receiver sees it, over all connections of a session.
//!
//! A sender that comes back over another connection walks anew. What is counted already comes again as skipped, so it is
//! enough to know how many: nothing is kept for each of a million files.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard};

use super::lock;
use crate::error::Reason;
use crate::protocol::path::RelativePath;
use crate::protocol::{HELD_BLOCK, Kind, MetadataWarning};
use crate::transfer::events::{Event, Settled};
use crate::transfer::send::TransferStats;

/// A session's account, for the receiver's user.
#[derive(Debug, Default)]
pub struct SessionStats(Mutex<StatsState>);

#[derive(Debug, Default)]
struct StatsState {
    sent: TransferStats,
    /// Files found on this connection and their bytes, and the most on any.
    found: (u64, u64),
    most_found: (u64, u64),
    /// The sender has found all there is.
    complete: bool,
    /// Files that an earlier connection settled, and that this one has not skipped yet.
    again: u64,
    /// What failed or was omitted on earlier connections, as far as names are kept.
    failed_before: HashSet<RelativePath>,
    settled: u64,
    moved: u64,
    /// Directories that were made.
    directories: u64,
}

impl SessionStats {
    fn state(&self) -> MutexGuard<'_, StatsState> {
        lock(&self.0)
    }

    /// Another connection, over which all entries come again.
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
    pub(super) fn found(&self, kind: Kind, size: u64) {
        let mut state = self.state();
        state.sent.entries += 1;
        if kind != Kind::Directory {
            state.found = (state.found.0 + 1, state.found.1.saturating_add(size));
        }
        let found = state.found;
        let most = state.most_found;
        state.most_found = (most.0.max(found.0), most.1.max(found.1));
    }

    /// Notes that all is found.
    pub(super) fn complete(&self) {
        self.state().complete = true;
    }

    /// What is found so far.
    pub(super) fn tell_found(&self) -> Event {
        let state = self.state();
        let (files, bytes) = state.most_found;
        Event::Found {
            files,
            bytes,
            complete: state.complete,
        }
    }

    /// Counts a result; false when it is none of its own, but an earlier one that comes again.
    pub(super) fn settled(
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

    /// Counts a result that an earlier connection still brought.
    pub(super) fn settled_late(
        &self,
        path: &RelativePath,
        kind: Kind,
        size: u64,
        result: &Settled,
    ) {
        let mut state = self.state();
        // Directories that come again are not counted as skipped.
        if kind != Kind::Directory {
            state.again += 1;
        } else if *result == Settled::Committed {
            state.directories += 1;
        }
        state.sent.count(path, kind, size, result);
    }

    pub(super) fn moved(&self, bytes: u64) {
        self.state().moved += bytes;
    }

    /// Notes that the sender did not announce all it was asked for.
    pub(crate) fn interrupted(&self, why: Reason) {
        self.state().sent.interrupted = Some(why);
    }

    /// Notes what the sender could not tell of what it sent.
    pub(super) fn unkept(&self, unkept: &[MetadataWarning]) {
        MetadataWarning::join(&mut self.state().sent.unkept, unkept);
    }

    /// Whether all is found and announced, and nothing has failed.
    pub(super) fn is_whole(&self) -> bool {
        let state = self.state();
        state.complete && state.sent.failed == 0 && state.sent.interrupted.is_none()
    }

    /// Entries that the session has made here so far, and the bytes of its files.
    pub(super) fn brought(&self) -> (u64, u64) {
        let state = self.state();
        (state.sent.files + state.directories, state.sent.bytes)
    }

    /// The account so far.
    pub fn sent(&self) -> TransferStats {
        self.state().sent.clone()
    }

    /// Grows whenever the session comes further: an entry is settled, or another block of content is there.
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
    fn what_comes_again_over_another_connection_counts_once() {
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
        assert_eq!(ledger.progress(), before, "the session came no further");
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
