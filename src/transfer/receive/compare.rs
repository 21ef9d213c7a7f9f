//! Compares files by content before they are wanted or skipped (`--checksum`).

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::durable::Settling;
use super::tasks::blocking;
use super::{Receiver, WantedFile};
use crate::error::{Code, Reason, Result};
use crate::protocol::Verdict;
use crate::protocol::{Existing, Kind};
use crate::storage::digest;
use crate::storage::io_errors::{fault, refusal};
use crate::transfer::events::Settled;
use crate::transfer::stats::EntryResult;

/// Files that are read in parallel. The sender reads as many.
const PARALLEL_COMPARISONS: usize = 4;

/// The digest to compare an existing file with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Compare {
    pub(super) digest: [u8; 32],
    /// The existing mode and time equal the announced ones.
    pub(super) same_attributes: bool,
}

impl Receiver {
    /// Compares files with existing content, and passes those that differ to `admit`.
    pub(super) async fn compare(
        self: &Arc<Self>,
        mut queue: mpsc::UnboundedReceiver<WantedFile>,
        admit: impl Fn(WantedFile),
    ) -> Result<(), crate::error::Error> {
        let mut comparing = JoinSet::new();
        let mut open = true;
        loop {
            tokio::select! {
                next = queue.recv(), if open && comparing.len() < PARALLEL_COMPARISONS => match next {
                    Some(file) => {
                        let receiver = self.clone();
                        comparing.spawn(async move {
                            let (same, file) = receiver.is_same(file).await;
                            receiver.decide_compared(same, file)
                        });
                    }
                    None => open = false,
                },
                Some(wanted) = comparing.join_next() => {
                    if let Ok(Some(file)) = wanted {
                        admit(file);
                    }
                }
                else => return Ok(()),
            }
        }
    }

    async fn is_same(self: &Arc<Self>, file: WantedFile) -> (Result<bool, Reason>, WantedFile) {
        let receiver = self.clone();
        let path = file.path.clone();
        let size = file.size.unwrap_or(0);
        let compare = file.compare;
        let attributes = file.attributes.clone();
        let same = blocking(move || {
            let Some(compare) = compare else {
                return Ok(false);
            };
            let store = &*receiver.session.store;
            let found =
                digest(&*store.open(&path)?, size).map_err(|e| fault(&path, "read it", e))?;
            let same = found == compare.digest;
            if same && !compare.same_attributes && !receiver.session.take.dry_run {
                receiver.warn(&path, store.set_attributes(&path, &attributes)?);
            }
            Ok(same)
        });
        (same.await, file)
    }

    /// Answers a compared file, or returns it as wanted. Unreadable files are replaced.
    fn decide_compared(&self, same: Result<bool, Reason>, file: WantedFile) -> Option<WantedFile> {
        let size = file.size.unwrap_or(0);
        let name = file.name.clone();
        let result = match same {
            Ok(true) => {
                self.stands(file.id, file.hard_link, &file.path);
                let same = Settling {
                    id: file.id,
                    name,
                    kind: Kind::File,
                    size,
                    made: false,
                };
                if file.compare.is_some_and(|compare| compare.same_attributes) {
                    self.tell(same);
                } else {
                    self.tell_when_durable(vec![same]);
                }
                return None;
            }
            _ if self.session.take.existing == Existing::Fail => {
                self.refuse(&file, refusal(Code::Exists, &file.path));
                return None;
            }
            _ if self.session.take.dry_run => {
                self.answer(Verdict::Done(file.id));
                Settled::Committed
            }
            _ => return Some(file),
        };
        let committed = None;
        self.report(EntryResult {
            id: Some(file.id),
            path: name,
            kind: Kind::File,
            size,
            committed,
            result,
        });
        None
    }
}
