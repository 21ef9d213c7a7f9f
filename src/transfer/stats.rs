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

    /// Counts the result of an entry. `size` is its bytes of content.
    pub fn count(&mut self, path: &RelativePath, kind: Kind, size: u64, result: &Settled) {
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
