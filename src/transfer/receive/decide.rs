//! Decides what becomes of an entry. A decision is a function of values: [`examine`](super::examine) gathers them, and
//! [`apply`](super::apply) carries the decision out.

#[cfg(test)]
mod tests;

use super::options::replaces_other_kinds;
use super::wanted::Compare;
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Entry, Existing, Kind, ReceiveOptions};
use crate::storage::io_errors::refusal;
use crate::storage::{Attributes, Metadata};

/// What a session decides by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub(super) options: ReceiveOptions,
    /// This end has requested the names.
    pub(super) requested: bool,
    /// Sources keep their names, in a directory.
    pub(super) into: bool,
}

/// An entry, and what was found in its place.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) entry: Entry,
    /// The sender's name for it.
    pub(super) name: RelativePath,
    /// Its path in the store.
    pub(super) path: RelativePath,
    /// The attributes to set.
    pub(super) attributes: Attributes,
    pub(super) existing: Option<ExistingEntry>,
    pub(super) link: Link,
}

/// What exists under the path of an entry.
#[derive(Debug, Clone)]
pub(super) struct ExistingEntry {
    pub(super) metadata: Metadata,
    /// The time is the announced one, as far as the file system keeps it, or none was announced.
    pub(super) same_time: bool,
    /// The time and all attributes are the announced ones. Set only where [`needs_attributes`] says so.
    pub(super) same_metadata: bool,
    /// A symbolic link with the announced metadata has the announced target.
    pub(super) same_target: bool,
}

/// What an entry that is a further name of a file refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Link {
    /// The entry is the first or only name of its file.
    None,
    /// There is no file to link to.
    Impossible(&'static str),
    /// The path of the first name.
    To(RelativePath),
    /// The existing file is this file already.
    Exists,
}

/// What becomes of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    /// It exists as announced.
    Skip,
    /// A file exists as announced, and further names may be linked to it.
    Unchanged,
    /// Another file has the name and stays. Nothing is linked to it.
    Leave,
    /// A dry run would make it.
    WouldMake,
    /// Only the metadata of a file changes.
    SetAttributes,
    MakeDirectory,
    MakeSymlink,
    MakeEmptyFile,
    /// It becomes a hard link. If the link cannot be made, decide again without it.
    Link(RelativePath),
    /// It cannot be a hard link, for this reason. Decide again without it.
    NotLinked(&'static str),
    /// Its content is wanted, perhaps after a comparison.
    Receive(Option<Compare>),
}

/// Decides what becomes of an entry. An error refuses it.
pub(super) fn decide(candidate: &Candidate, rules: &Rules) -> Result<Decision, Reason> {
    let options = &rules.options;
    let is_directory = candidate.entry.kind == Kind::Directory;
    if !is_directory && options.existing == Existing::Skip && candidate.existing.is_some() {
        if options.delete.is_some() && candidate.is(Kind::Directory) {
            // A mirror would remove the content of the directory as unannounced.
            return Err(refusal(Code::IsDirectory, &candidate.path));
        }
        // The existing file may differ from the source, so further names must not be linked to it.
        let is_same = candidate.has_same_size_and_time() && !options.checksum;
        return Ok(if is_same {
            Decision::Unchanged
        } else {
            Decision::Leave
        });
    }
    let decision = match candidate.entry.kind {
        Kind::Directory => decide_directory(candidate, rules),
        Kind::Symlink => decide_symlink(candidate, rules),
        Kind::File => decide_file(candidate, rules),
    }?;
    Ok(match decision {
        Decision::MakeDirectory
        | Decision::MakeSymlink
        | Decision::MakeEmptyFile
        | Decision::Receive(None)
            if options.dry_run =>
        {
            Decision::WouldMake
        }
        Decision::SetAttributes if options.dry_run => Decision::Unchanged,
        decision => decision,
    })
}

fn decide_directory(candidate: &Candidate, rules: &Rules) -> Result<Decision, Reason> {
    let path = &candidate.path;
    if candidate.is(Kind::Directory) {
        // The administrator of the server owns the served directory itself.
        if path.is_root() || candidate.has_same_metadata() {
            return Ok(Decision::Skip);
        }
    } else if candidate.existing.is_some() && !replaces_other_kinds(&rules.options) {
        return Err(refusal(Code::NotDirectory, path));
    }
    Ok(Decision::MakeDirectory)
}

fn decide_symlink(candidate: &Candidate, rules: &Rules) -> Result<Decision, Reason> {
    let path = &candidate.path;
    let has_target = |existing: &ExistingEntry| existing.same_metadata && existing.same_target;
    if candidate.is(Kind::Symlink)
        && rules.may_skip()
        && candidate.existing.as_ref().is_some_and(has_target)
    {
        return Ok(Decision::Skip);
    }
    if candidate.is(Kind::Directory) && !replaces_other_kinds(&rules.options) {
        return Err(refusal(Code::IsDirectory, path));
    }
    if rules.guards(candidate) {
        return Err(refusal(Code::Exists, path));
    }
    Ok(Decision::MakeSymlink)
}

fn decide_file(candidate: &Candidate, rules: &Rules) -> Result<Decision, Reason> {
    let options = &rules.options;
    let Candidate { entry, path, .. } = candidate;
    // A file of unknown size with a modification time has its own name, and a pull chose the name itself.
    let is_named = entry.modified.is_some() || rules.requested;
    if entry.size.is_none() && !is_named && rules.into {
        let text = format!(
            "{path}: cannot write data of a pipe: the destination is a directory; give a full file name"
        );
        return Err(Reason::new(Code::IsDirectory, text));
    }
    let guarded = rules.guards(candidate);
    if !guarded && let Some(decision) = decide_link(candidate, rules) {
        return Ok(decision);
    }
    check_replaceable(candidate, rules)?;
    if rules.may_skip() && !options.checksum && candidate.has_same_size_and_time() {
        return Ok(if candidate.has_same_metadata() {
            Decision::Unchanged
        } else {
            Decision::SetAttributes
        });
    }
    let may_be_same = rules.may_skip() && options.checksum && candidate.has_same_size();
    let digest = entry.digest.filter(|_| may_be_same);
    if let Some(digest) = digest {
        let same_metadata = candidate.has_same_metadata();
        return Ok(Decision::Receive(Some(Compare {
            digest,
            same_metadata,
        })));
    }
    if guarded {
        return Err(refusal(Code::Exists, path));
    }
    Ok(if entry.size == Some(0) {
        Decision::MakeEmptyFile
    } else {
        Decision::Receive(None)
    })
}

/// Decides about a further name of a file. Returns `None` if it is handled as a file of its own.
fn decide_link(candidate: &Candidate, rules: &Rules) -> Option<Decision> {
    let existing = candidate.existing.as_ref();
    if candidate.link == Link::None {
        return None;
    }
    if rules.options.dry_run {
        let is_linked = existing.is_some_and(|existing| existing.metadata.links > 1);
        return Some(if rules.may_skip() && is_linked {
            Decision::Skip
        } else {
            Decision::WouldMake
        });
    }
    // Other kinds are refused as for any file, unless a mirror replaces them.
    let is_other = existing.is_some_and(|existing| {
        !matches!(existing.metadata.kind, Some(Kind::File | Kind::Symlink))
    });
    if is_other && !replaces_other_kinds(&rules.options) {
        return None;
    }
    match &candidate.link {
        Link::None => None,
        Link::Impossible(reason) => Some(Decision::NotLinked(reason)),
        Link::To(first) => Some(Decision::Link(first.clone())),
        Link::Exists => Some(Decision::Skip),
    }
}

/// Refuses a file in the place of something that no file may replace.
fn check_replaceable(candidate: &Candidate, rules: &Rules) -> Result<(), Reason> {
    let path = &candidate.path;
    if replaces_other_kinds(&rules.options) {
        return Ok(());
    }
    match candidate
        .existing
        .as_ref()
        .map(|existing| existing.metadata.kind)
    {
        Some(Some(Kind::Directory)) => Err(refusal(Code::IsDirectory, path)),
        Some(None) => {
            let text =
                format!("cannot replace {path}: it is a FIFO, socket or device; remove it first");
            Err(Reason::new(Code::Special, text))
        }
        _ => Ok(()),
    }
}

/// Returns whether a decision depends on the attributes of an existing entry with the announced time. Listing them may
/// cost several calls to the system.
pub(super) fn needs_attributes(kind: Kind, existing: Existing) -> bool {
    kind == Kind::Directory || matches!(existing, Existing::Update | Existing::Fail)
}

impl Rules {
    /// Returns whether an unchanged entry is skipped.
    fn may_skip(&self) -> bool {
        self.options.existing != Existing::Overwrite
    }

    /// Returns whether an existing entry must not be replaced.
    fn guards(&self, candidate: &Candidate) -> bool {
        self.options.existing == Existing::Fail && candidate.existing.is_some()
    }
}

impl Candidate {
    /// Returns whether the existing entry has this kind.
    fn is(&self, kind: Kind) -> bool {
        self.existing
            .as_ref()
            .is_some_and(|existing| existing.metadata.kind == Some(kind))
    }

    /// Returns whether a file with the announced size exists.
    fn has_same_size(&self) -> bool {
        let existing = self.existing.as_ref();
        let same_size =
            existing.is_some_and(|existing| Some(existing.metadata.size) == self.entry.size);
        self.is(Kind::File) && same_size
    }

    /// Returns whether a file with the announced size and time exists.
    fn has_same_size_and_time(&self) -> bool {
        let same_time = self
            .existing
            .as_ref()
            .is_some_and(|existing| existing.same_time);
        let has_time = self.entry.modified.is_some();
        self.entry.kind == Kind::File && self.has_same_size() && same_time && has_time
    }

    fn has_same_metadata(&self) -> bool {
        self.existing
            .as_ref()
            .is_some_and(|existing| existing.same_metadata)
    }
}
