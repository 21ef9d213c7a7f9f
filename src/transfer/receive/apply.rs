//! Carries out what was decided about an entry.

use super::commit::{CompleteFile, commit, open};
use super::decide::{Candidate, Decision, Link, Rules, decide};
use super::options::replaces_other_kinds;
use super::session::Session;
use super::wanted::{Compare, WantedFile};
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Attribute, Durability, Kind};
use crate::storage::PartialKey;
use crate::storage::io_errors::check_target;

/// What was done about an entry.
pub(super) enum Applied {
    /// It existed.
    Skipped,
    /// It existed, and its metadata was updated.
    Changed,
    /// It was made, or would be in a dry run.
    Made,
    /// Its content is wanted.
    Wanted(Box<WantedFile>),
}

/// Decides about an entry and carries the decision out. An error refuses the entry. Blocks.
pub(super) fn apply(
    session: &Session,
    rules: &Rules,
    mut candidate: Candidate,
) -> Result<Applied, Reason> {
    let mut decision = decide(&candidate, rules)?;
    let not_linked = match &decision {
        Decision::NotLinked(reason) => Some((*reason).to_owned()),
        Decision::Link(first) => match make_link(session, first, &candidate.path)? {
            Ok(()) => return Ok(Applied::Made),
            Err(reason) => Some(reason),
        },
        _ => None,
    };
    if let Some(reason) = not_linked {
        session.warn(&candidate.path, vec![(Attribute::HardLink, reason)]);
        candidate.link = Link::None;
        decision = decide(&candidate, rules)?;
    }
    let store = session.store();
    let id = candidate.entry.id;
    let hard_link = candidate.entry.hard_link;
    let path = &candidate.path;
    let first_names = &session.tables.first_names;
    match decision {
        Decision::Skip => Ok(Applied::Skipped),
        Decision::Unchanged => {
            first_names.insert(id, hard_link, path);
            Ok(Applied::Skipped)
        }
        Decision::Leave => {
            first_names.insert_taken(id, hard_link);
            Ok(Applied::Skipped)
        }
        Decision::WouldMake => Ok(Applied::Made),
        Decision::SetAttributes => {
            session.warn(path, store.set_attributes(path, &candidate.attributes)?);
            first_names.insert(id, hard_link, path);
            Ok(Applied::Changed)
        }
        Decision::MakeDirectory => {
            make_directory(session, &candidate)?;
            Ok(Applied::Made)
        }
        Decision::MakeSymlink => {
            make_symlink(session, &candidate)?;
            Ok(Applied::Made)
        }
        Decision::MakeEmptyFile => {
            make_empty_file(session, &candidate)?;
            first_names.insert(id, hard_link, path);
            Ok(Applied::Made)
        }
        Decision::Receive(compare) => {
            let file = wanted_file(session, candidate, compare);
            Ok(Applied::Wanted(Box::new(file)))
        }
        // Decided again above, without a link.
        Decision::Link(_) | Decision::NotLinked(_) => Err(Code::Internal.into()),
    }
}

fn make_directory(session: &Session, candidate: &Candidate) -> Result<(), Reason> {
    let store = session.store();
    let Candidate {
        path, attributes, ..
    } = candidate;
    session.make_room(path, Kind::Directory)?;
    store.make_directory(path)?;
    if candidate.existing.is_none() {
        session.tables.collisions.made_directory(path);
    }
    session.warn(path, store.set_attributes(path, attributes)?);
    Ok(())
}

fn make_symlink(session: &Session, candidate: &Candidate) -> Result<(), Reason> {
    let Candidate {
        path, attributes, ..
    } = candidate;
    let target = candidate.entry.target.as_deref().unwrap_or_default();
    // Check the target first, so that an invalid link does not replace an existing file.
    check_target(path, target)?;
    session.make_room(path, Kind::Symlink)?;
    let warnings = session.store().make_symlink(path, target, attributes)?;
    session.warn(path, warnings);
    Ok(())
}

fn make_empty_file(session: &Session, candidate: &Candidate) -> Result<(), Reason> {
    let path = &candidate.path;
    let upload = open(session, path, &partial_key(session, candidate))?;
    let file = CompleteFile {
        upload,
        path,
        attributes: &candidate.attributes,
        // One sync serves a group of entries before they are reported.
        durability: Durability::Visible,
        resumable: true,
    };
    commit(session, file)
}

/// Makes a hard link. The inner error says why there can be no link; the outer error refuses the entry.
fn make_link(
    session: &Session,
    first: &RelativePath,
    path: &RelativePath,
) -> Result<Result<(), String>, Reason> {
    let store = session.store();
    let linked = match store.link(first, path) {
        // A mirror removes the obstacle only now: on a file system without hard links, the first attempt fails for
        // that reason.
        Err(reason)
            if replaces_other_kinds(&session.policy.options)
                && matches!(
                    reason.code,
                    Code::IsDirectory | Code::NotDirectory | Code::Symlink
                ) =>
        {
            session.make_room(path, Kind::File)?;
            store.link(first, path)
        }
        linked => linked,
    };
    Ok(linked.map_err(|reason| {
        let text = reason.text.into_raw();
        // The warning begins with the path.
        let prefix = format!("{path}: ");
        text.strip_prefix(&prefix).unwrap_or(&text).to_owned()
    }))
}

fn partial_key(session: &Session, candidate: &Candidate) -> PartialKey {
    PartialKey {
        owner: session.sender,
        size: candidate.entry.size.unwrap_or(PartialKey::UNKNOWN_SIZE),
        modified: candidate.entry.modified,
    }
}

fn wanted_file(session: &Session, candidate: Candidate, compare: Option<Compare>) -> WantedFile {
    let partial_key = partial_key(session, &candidate);
    let Candidate {
        entry,
        name,
        path,
        attributes,
        ..
    } = candidate;
    WantedFile {
        id: entry.id,
        name,
        path,
        size: entry.size,
        attributes,
        partial_key,
        hard_link: entry.hard_link,
        digest: entry.digest,
        compare,
    }
}
