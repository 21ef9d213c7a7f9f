//! The account of a session: files, bytes, skips and failures.
//!
//! [`TransferStats`] is what a session reports to its user, over all its connections. A receiver counts its results with
//! [`SessionStats`], which also holds the counts of the present connection.

mod session;

pub use session::SessionStats;
pub(crate) use session::{Brought, ConnectionCounts, EntryResult};

use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::protocol::{Kind, MetadataWarning};
use crate::transfer::events::{Event, Observer, Settled};

/// Failures that are kept by name in [`TransferStats`]. The events name all of them.
pub const MAX_FAILURES: usize = 1000;

/// Bytes of the paths and reasons in each list of failures. A peer may choose both, and may make each 4 KiB long.
const MAX_FAILURE_BYTES: usize = 256 << 10;

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
    /// The first [`MAX_FAILURES`] failures, up to 256 KiB of names and reasons.
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

    /// Counts the result of an entry. `size` is its bytes of content.
    pub fn count(&mut self, path: &RelativePath, kind: Kind, size: u64, result: &Settled) {
        match result {
            Settled::Failed(why) => {
                self.failed += 1;
                keep(&mut self.failures, path, why);
            }
            Settled::Omitted(why) => {
                match why.code {
                    Code::Special => self.specials += 1,
                    _ => self.vanished += 1,
                }
                keep(&mut self.omitted, path, why);
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

/// Adds a failure to a list, unless the list is full.
fn keep(list: &mut Vec<(RelativePath, Reason)>, path: &RelativePath, why: &Reason) {
    let bytes = |path: &RelativePath, why: &Reason| path.as_bytes().len() + why.text.raw().len();
    if list.len() < MAX_FAILURES {
        let kept: usize = list.iter().map(|(path, why)| bytes(path, why)).sum();
        if kept + bytes(path, why) <= MAX_FAILURE_BYTES {
            list.push((path.clone(), why.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_with_long_names_are_kept_up_to_a_limit() {
        let path = RelativePath::from_components(vec!["d".repeat(255); 15]).unwrap();
        let mut stats = TransferStats::default();
        for _ in 0..1_000 {
            let why = Reason::new(Code::Unreadable, "r".repeat(2_000));
            stats.count(&path, Kind::File, 0, &Settled::Failed(why));
        }
        assert_eq!(stats.failed, 1_000);
        assert!(stats.failures.len() < 60 && stats.failures.len() > 40);
    }
}
