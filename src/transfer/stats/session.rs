//! The results of entries as the receiver sees them, over all connections of a session.
//!
//! A sender that reconnects walks its sources again. Entries that were counted before return as skipped, so a number
//! of them is enough. Nothing is kept for each file.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard};

use super::TransferStats;
use crate::error::lock::lock;
use crate::protocol::path::RelativePath;
use crate::protocol::{End, HELD_BLOCK, Kind, MetadataWarning};
use crate::storage::MetadataWarnings;
use crate::transfer::events::{Event, Settled};

/// The statistics of a session, for the user of the receiver and for the summary of each connection.
#[derive(Debug, Default)]
pub struct SessionStats(Mutex<StatsState>);

#[derive(Debug, Default)]
struct StatsState {
    total: TransferStats,
    /// Counts of the present connection, or of the last one.
    connection: ConnectionCounts,
    /// Files found on this connection, and the maximum over all connections.
    found: FoundFiles,
    most_found: FoundFiles,
    /// The sender has ended its search.
    complete: bool,
    /// Files that an earlier connection settled and this one has not skipped yet.
    unrepeated: u64,
    /// Entries that failed or were omitted on earlier connections, as far as their names are kept.
    failed_before: HashSet<RelativePath>,
    settled: u64,
    /// Bytes of content received.
    received: u64,
    /// Directories made.
    directories: u64,
}

#[derive(Debug, Default, Clone, Copy)]
struct FoundFiles {
    files: u64,
    bytes: u64,
}

/// What one connection has done, for its [`Summary`](crate::protocol::Summary).
#[derive(Debug, Default, Clone)]
pub(crate) struct ConnectionCounts {
    /// The first connection has number 1.
    number: u64,
    /// The session continues without this connection.
    given_up: bool,
    /// Files committed, links and empty files included.
    pub(crate) committed: u64,
    /// Bytes of content committed.
    pub(crate) bytes: u64,
    /// Entries that existed already.
    pub(crate) skipped: u64,
    /// Entries refused or failed.
    pub(crate) failed: u64,
    /// Failures that the sender counted.
    unsent: u64,
    /// Vanished sources, FIFOs, sockets and devices: the sender counts them among its failures, and they are none.
    omitted: u64,
    /// Announced entries that failed or vanished, and may be missing at the destination.
    pub(crate) missing: u64,
    /// Metadata that could not be kept.
    pub(crate) warnings: Vec<MetadataWarning>,
}

/// The result of one entry.
#[derive(Debug)]
pub(crate) struct EntryResult {
    /// `None` for a source that never became an entry; the sender counts it.
    pub(crate) id: Option<u64>,
    pub(crate) path: RelativePath,
    pub(crate) kind: Kind,
    /// The announced size in bytes, or the size of the committed file.
    pub(crate) size: u64,
    /// Bytes of content that the commit brought, 0 for links and empty files; `None` if nothing was made.
    pub(crate) committed: Option<u64>,
    pub(crate) result: Settled,
}

impl From<EntryResult> for Event {
    fn from(entry: EntryResult) -> Self {
        Self::Settled {
            id: entry.id,
            path: entry.path,
            kind: entry.kind,
            size: entry.size,
            result: entry.result,
        }
    }
}

/// What a session has made, as its accepted quota counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Brought {
    /// Files, directories and links.
    pub(crate) entries: u64,
    /// Bytes of files.
    pub(crate) bytes: u64,
}

impl ConnectionCounts {
    fn count(&mut self, entry: &EntryResult) {
        match (&entry.result, entry.committed) {
            (Settled::Committed, Some(bytes)) if entry.kind != Kind::Directory => {
                self.committed += 1;
                self.bytes += bytes;
            }
            (Settled::Committed, _) => {}
            (Settled::Skipped, _) => self.skipped += 1,
            (Settled::Omitted(_), _) => {
                self.omitted += 1;
                self.missing += u64::from(entry.id.is_some());
            }
            (Settled::Failed(_), _) if entry.id.is_some() => {
                self.failed += 1;
                self.missing += 1;
            }
            // Among the failures that the sender reports in the end.
            (Settled::Failed(_), _) => {}
        }
    }
}

impl SessionStats {
    fn state(&self) -> MutexGuard<'_, StatsState> {
        lock(&self.0)
    }

    /// Starts another connection, which announces all entries again. Returns its number.
    pub(crate) fn start_connection(&self) -> u64 {
        let mut state = self.state();
        state.unrepeated = state.total.files + state.total.skipped;
        state.failed_before = state
            .total
            .failures
            .iter()
            .chain(&state.total.omitted)
            .map(|(path, _)| path.clone())
            .collect();
        state.found = FoundFiles::default();
        state.complete = false;
        state.total.interrupted = None;
        let number = state.connection.number + 1;
        state.connection = ConnectionCounts {
            number,
            ..ConnectionCounts::default()
        };
        number
    }

    /// Records that the session continues without a connection, or has ended. Later failures on it do not count.
    pub(crate) fn give_up(&self, connection: u64) {
        let mut state = self.state();
        if state.connection.number == connection {
            state.connection.given_up = true;
        }
    }

    /// Counts an entry.
    pub(crate) fn found(&self, kind: Kind, size: u64) {
        let mut state = self.state();
        state.total.entries += 1;
        if kind != Kind::Directory {
            state.found.files += 1;
            state.found.bytes = state.found.bytes.saturating_add(size);
        }
        state.most_found.files = state.most_found.files.max(state.found.files);
        state.most_found.bytes = state.most_found.bytes.max(state.found.bytes);
    }

    /// Records that the sender has found everything.
    pub(crate) fn complete(&self) {
        self.state().complete = true;
    }

    /// Returns an event with the totals found so far.
    pub(crate) fn found_event(&self) -> Event {
        let state = self.state();
        Event::Found {
            files: state.most_found.files,
            bytes: state.most_found.bytes,
            complete: state.complete,
        }
    }

    /// Counts a result. `is_lost` says that the connection is closed. Returns false if it is not to be reported: it
    /// repeats the result of an earlier connection, or follows from the loss of the connection.
    pub(crate) fn count(&self, connection: u64, entry: &EntryResult, is_lost: bool) -> bool {
        let mut state = self.state();
        let is_late = state.connection.number != connection || state.connection.given_up;
        if !is_late {
            state.connection.count(entry);
        }
        let is_directory = entry.kind == Kind::Directory;
        match &entry.result {
            // After a connection loss, the loss is the cause, not the file.
            Settled::Failed(_) | Settled::Omitted(_) if is_lost || is_late => return false,
            Settled::Failed(_) | Settled::Omitted(_)
                if state.failed_before.contains(&entry.path) =>
            {
                return false;
            }
            Settled::Failed(_) | Settled::Omitted(_) => {}
            // The next connection skips the file again. Repeated directories are not counted as skipped.
            _ if is_late => state.unrepeated += u64::from(!is_directory),
            Settled::Skipped if !is_directory && state.unrepeated > 0 => {
                state.unrepeated -= 1;
                return false;
            }
            _ => state.settled += 1,
        }
        if is_directory && entry.result == Settled::Committed {
            state.directories += 1;
        }
        state
            .total
            .count(&entry.path, entry.kind, entry.size, &entry.result);
        true
    }

    /// Counts metadata of a file that could not be kept.
    pub(crate) fn warn(&self, connection: u64, path: &RelativePath, warnings: MetadataWarnings) {
        let mut state = self.state();
        if state.connection.number != connection {
            return;
        }
        for (attribute, reason) in warnings {
            let first = || format!("{path}: {reason}");
            MetadataWarning::count_one(&mut state.connection.warnings, attribute, first);
        }
    }

    /// Counts received bytes of content.
    pub(crate) fn received(&self, bytes: u64) {
        self.state().received += bytes;
    }

    /// Records the sender's last message: its own failures and metadata warnings, and whether it announced everything.
    pub(crate) fn sender_ended(&self, end: End) {
        let mut state = self.state();
        state.connection.unsent += end.failed;
        MetadataWarning::join(
            &mut state.total.unkept,
            end.unkept.as_deref().unwrap_or_default(),
        );
        if let Some(reason) = end.interrupted {
            state.total.interrupted = Some(reason.into());
        }
    }

    /// Returns whether everything was found and announced, and nothing has failed.
    pub(crate) fn is_whole(&self) -> bool {
        let state = self.state();
        let here = &state.connection;
        here.failed + here.unsent == here.omitted
            && state.complete
            && state.total.failed == 0
            && state.total.interrupted.is_none()
    }

    /// Returns the counts of the present connection.
    pub(crate) fn connection(&self) -> ConnectionCounts {
        self.state().connection.clone()
    }

    /// Returns what the session has made.
    pub(crate) fn brought(&self) -> Brought {
        let state = self.state();
        Brought {
            entries: state.total.files + state.directories,
            bytes: state.total.bytes,
        }
    }

    /// Returns the statistics so far.
    pub fn sent(&self) -> TransferStats {
        self.state().total.clone()
    }

    /// Returns a value that grows with progress: a settled entry, or another block of content.
    pub(crate) fn progress(&self) -> u64 {
        let state = self.state();
        state.settled + state.received / HELD_BLOCK
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn result(name: &str, committed: Option<u64>, result: Settled) -> EntryResult {
        EntryResult {
            id: Some(0),
            path: RelativePath::from_components([name]).unwrap(),
            kind: Kind::File,
            size: 5,
            committed,
            result,
        }
    }

    fn committed(name: &str) -> EntryResult {
        result(name, Some(5), Settled::Committed)
    }

    fn skipped(name: &str) -> EntryResult {
        result(name, None, Settled::Skipped)
    }

    fn failed(name: &str) -> EntryResult {
        result(name, None, Settled::Failed(Code::Unreadable.into()))
    }

    #[test]
    fn entries_repeated_on_another_connection_count_once() {
        let stats = SessionStats::default();
        let first = stats.start_connection();
        for entry in [committed("a"), skipped("b"), failed("c")] {
            assert!(stats.count(first, &entry, false));
        }
        let before = stats.progress();
        let second = stats.start_connection();
        assert!(stats.count(first, &committed("d"), false), "a late result");
        for again in ["a", "b", "d"] {
            assert!(!stats.count(second, &skipped(again), false));
        }
        assert!(!stats.count(second, &failed("c"), false));
        assert_eq!(stats.progress(), before, "the session made no progress");
        for entry in [committed("e"), skipped("f"), failed("g")] {
            assert!(stats.count(second, &entry, false));
        }
        let TransferStats {
            files,
            bytes,
            skipped,
            failed,
            ..
        } = stats.sent();
        assert_eq!((files, bytes, skipped, failed), (3, 15, 2, 2));
        let ConnectionCounts {
            committed,
            bytes,
            skipped,
            failed,
            ..
        } = stats.connection();
        assert_eq!(
            (committed, bytes, skipped, failed),
            (1, 5, 4, 2),
            "the summary counts one connection"
        );
    }

    #[test]
    fn failures_after_the_loss_of_a_connection_do_not_count() {
        let stats = SessionStats::default();
        let connection = stats.start_connection();
        assert!(!stats.count(connection, &failed("a"), true));
        assert!(stats.count(connection, &committed("b"), true));
        stats.give_up(connection);
        assert!(!stats.count(connection, &failed("c"), false));
        assert!(stats.count(connection, &committed("d"), false));
        let total = stats.sent();
        assert_eq!((total.files, total.failed), (2, 0));
    }
}
