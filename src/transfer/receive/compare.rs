//! Compares files by content before they are wanted or skipped (`--checksum`).

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::admit::Admission;
use super::session::{Session, SettledEntry};
use super::wanted::{Compare, WantedFile};
use crate::error::{Code, Reason, Result};
use crate::protocol::Existing;
use crate::protocol::path::RelativePath;
use crate::storage::io_errors::{fault, refusal};
use crate::storage::{Attributes, digest};
use crate::transfer::blocking::blocking;

/// Files that are read in parallel. The sender reads as many.
const PARALLEL_COMPARISONS: usize = 4;

/// Compares files with existing content, and admits those that differ.
pub(super) async fn compare_files(
    session: &Arc<Session>,
    mut queue: mpsc::UnboundedReceiver<WantedFile>,
    admission: Admission,
) -> Result<()> {
    let mut comparing = JoinSet::new();
    let mut open = true;
    loop {
        tokio::select! {
            next = queue.recv(), if open && comparing.len() < PARALLEL_COMPARISONS => match next {
                Some(file) => drop(comparing.spawn(compare_file(session.clone(), file))),
                None => open = false,
            },
            Some(compared) = comparing.join_next() => {
                if let Ok(Some(file)) = compared {
                    admission.add(file);
                }
            }
            else => return Ok(()),
        }
    }
}

/// Compares a file and answers it, or returns it if it is wanted. Unreadable files are replaced.
async fn compare_file(session: Arc<Session>, file: WantedFile) -> Option<WantedFile> {
    let Some(compare) = file.compare else {
        return Some(file);
    };
    let shared = session.clone();
    let path = file.path.clone();
    let size = file.known_size();
    let attributes = file.attributes.clone();
    let has_same_content = blocking("write", move || {
        has_same_content(&shared, &path, size, &attributes, &compare)
    });
    let options = &session.policy.options;
    match has_same_content.await {
        Ok(true) => {
            let first_names = &session.tables.first_names;
            first_names.insert(file.id, file.hard_link, &file.path);
            let entry = SettledEntry {
                label: file.label(),
                made: false,
            };
            if compare.same_metadata {
                session.settle(entry);
            } else {
                session.settle_when_durable(vec![entry]);
            }
            None
        }
        _ if options.existing == Existing::Fail => {
            session.refuse(file.label(), refusal(Code::Exists, &file.path));
            None
        }
        _ if options.dry_run => {
            session.settle(SettledEntry {
                label: file.label(),
                made: true,
            });
            None
        }
        _ => Some(file),
    }
}

/// Compares the content of an existing file. If it is the same, sets the attributes where they differ. Blocks.
fn has_same_content(
    session: &Session,
    path: &RelativePath,
    size: u64,
    attributes: &Attributes,
    compare: &Compare,
) -> Result<bool, Reason> {
    let store = session.store();
    let found = digest(&*store.open(path)?, size).map_err(|e| fault(path, "read it", e))?;
    let is_same = found == compare.digest;
    if is_same && !compare.same_metadata && !session.policy.options.dry_run {
        session.warn(path, store.set_attributes(path, attributes)?);
    }
    Ok(is_same)
}
