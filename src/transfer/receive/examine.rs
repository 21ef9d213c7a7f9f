//! Gathers what the decision about an entry needs: checks its name, and looks at what exists in its place.

use super::attributes::{attributes_match, kept_attributes};
use super::decide::{Candidate, ExistingEntry, Link, needs_attributes};
use super::hard_links::FirstName;
use super::options::replaces_other_kinds;
use super::session::Session;
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Attribute, Entry, Kind};
use crate::storage::{Attributes, Metadata};

/// Examines an entry. An error refuses it. Blocks.
pub(super) fn examine(session: &Session, entry: Entry) -> Result<Candidate, Reason> {
    let store = session.store();
    let target = &session.target;
    let tables = &session.tables;
    let options = &session.policy.options;
    let name = target.requested.check(&entry)?;
    tables.quota.announce(&entry, || session.brought())?;
    let path = target.placement.of(&name)?;
    let folding = tables.collisions.check(store, &path, options.dry_run)?;
    let metadata = stat(session, &path)?;
    if metadata.is_some() {
        let destination = target.placement.directory();
        tables
            .collisions
            .respell(store, &path, folding, destination, options);
    }
    let keep = &session.policy.keep;
    let attributes = kept_attributes(&entry, keep, options.existing, &tables.owners);
    if entry.owner.is_some() && !keep.owner {
        let reason = "the server does not keep owners; start it with --allow-owner";
        session.warn(&path, vec![(Attribute::Owner, reason.into())]);
    }
    let same_time = metadata
        .as_ref()
        .is_some_and(|metadata| has_same_time(session, &entry, &path, metadata));
    if options.delete.is_some() {
        tables.announced.insert(&path);
    }
    let link = find_link(session, &entry, metadata.as_ref());
    let existing = match metadata {
        Some(metadata) => Some(compare_metadata(
            session,
            &entry,
            &path,
            &attributes,
            metadata,
            same_time,
        )?),
        None => None,
    };
    Ok(Candidate {
        entry,
        name,
        path,
        attributes,
        existing,
        link,
    })
}

/// Returns the metadata of what exists under a path.
fn stat(session: &Session, path: &RelativePath) -> Result<Option<Metadata>, Reason> {
    match session.store().stat(path) {
        // A mirror also replaces a file or link that is in the place of a parent directory.
        Err(reason)
            if matches!(reason.code, Code::NotDirectory | Code::Symlink)
                && replaces_other_kinds(&session.policy.options) =>
        {
            Ok(None)
        }
        metadata => metadata,
    }
}

/// Returns whether an existing entry has the announced time. If the sizes of files differ, the time does not matter.
fn has_same_time(
    session: &Session,
    entry: &Entry,
    path: &RelativePath,
    metadata: &Metadata,
) -> bool {
    let options = &session.policy.options;
    let times = &session.tables.times;
    entry.modified.is_none_or(|modified| {
        has_announced_size(entry, metadata)
            && times.are_same(session.store(), path, modified, metadata, options)
    })
}

fn has_announced_size(entry: &Entry, metadata: &Metadata) -> bool {
    entry.kind != Kind::File || entry.size == Some(metadata.size)
}

/// Compares existing metadata with the announced one, as far as the decision needs it.
fn compare_metadata(
    session: &Session,
    entry: &Entry,
    path: &RelativePath,
    attributes: &Attributes,
    metadata: Metadata,
    same_time: bool,
) -> Result<ExistingEntry, Reason> {
    let store = session.store();
    let same_metadata = same_time
        && metadata.kind == Some(entry.kind)
        && has_announced_size(entry, &metadata)
        && needs_attributes(entry.kind, session.policy.options.existing)
        && attributes_match(store, path, attributes, &metadata);
    let target = entry.target.as_deref().unwrap_or_default();
    let same_target =
        same_metadata && entry.kind == Kind::Symlink && store.read_link(path)? == target;
    Ok(ExistingEntry {
        metadata,
        same_time,
        same_metadata,
        same_target,
    })
}

/// Looks up the first name of an entry that is a further name of a file.
fn find_link(session: &Session, entry: &Entry, metadata: Option<&Metadata>) -> Link {
    let first = entry.hard_link.filter(|&first| first != entry.id);
    let Some(first) = first.filter(|_| entry.kind == Kind::File) else {
        return Link::None;
    };
    let first = match session.tables.first_names.get(first) {
        Some(FirstName::At(path)) => path,
        Some(FirstName::Taken) => {
            return Link::Impossible("another file has its first name and is kept");
        }
        None => return Link::Impossible("the receiver remembers no more names"),
    };
    let linked = session.store().stat(&first).ok().flatten();
    let file = linked.map(|metadata| metadata.version.file);
    if metadata.is_some_and(|metadata| Some(metadata.version.file) == file) {
        Link::Exists
    } else {
        Link::To(first)
    }
}
