//! Settles a batch of entries: examines each, decides, and carries the decision out.

use super::apply::{Applied, apply};
use super::decide::Rules;
use super::examine::examine;
use super::placement::{Placement, RequestedNames};
use super::session::{Session, SettledEntry};
use super::wanted::{EntryLabel, WantedFile};
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Entry, Verdict};

/// Answers the entries that the manifest alone settles, and returns the wanted files. Blocks.
pub(super) fn settle_batch(session: &Session, batch: Vec<Entry>) -> Vec<WantedFile> {
    let rules = Rules {
        options: session.policy.options,
        requested: matches!(session.target.requested, RequestedNames::Only { .. }),
        into: matches!(session.target.placement, Placement::Into(_)),
    };
    let mut wanted = Vec::new();
    let mut unsynced = Vec::new();
    for entry in batch {
        if session.context.stopping.is_cancelled() {
            session.answer(Verdict::Refuse(entry.id, Code::Stopping.into()));
            continue;
        }
        let label = EntryLabel {
            id: entry.id,
            // An entry with an invalid name is reported under an empty name.
            name: RelativePath::from_components(&entry.path.0).unwrap_or_default(),
            kind: entry.kind,
            size: entry.size.unwrap_or(0),
        };
        let applied = examine(session, entry)
            .and_then(|candidate| apply(session, &rules, candidate))
            .and_then(|applied| check_quota(session, applied));
        match applied {
            Ok(Applied::Wanted(file)) => wanted.push(*file),
            Ok(Applied::Skipped) => session.settle(SettledEntry { label, made: false }),
            Ok(Applied::Changed) => unsynced.push(SettledEntry { label, made: false }),
            Ok(Applied::Made) => unsynced.push(SettledEntry { label, made: true }),
            Err(reason) => session.refuse(label, reason),
        }
    }
    if !unsynced.is_empty() {
        session.settle_when_durable(unsynced);
    }
    session.tables.times.end_probe();
    wanted
}

/// Counts a wanted file against the accepted quota.
fn check_quota(session: &Session, applied: Applied) -> Result<Applied, Reason> {
    match &applied {
        // A compared file may already exist, and then replaces one of the same size.
        Applied::Wanted(file) if file.compare.is_none() => {
            session.tables.quota.want(file.known_size())?;
        }
        _ => {}
    }
    Ok(applied)
}
