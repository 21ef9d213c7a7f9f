//! Decides what happens to each entry, by comparing it with the store.

use super::compare::Compare;
use super::durable::Settling;
use super::partial::open_partial;
use super::{Placement, Receiver, RequestedNames, WantedFile};
use crate::error::{Code, Reason, Result};
use crate::protocol::Verdict;
use crate::protocol::path::RelativePath;
use crate::protocol::{Durability, Entry, Existing, Kind};
use crate::storage::io_errors::{check_target, refusal};
use crate::storage::{Attributes, Metadata, PartialKey};
use crate::transfer::events::Settled;
use crate::transfer::stats::EntryResult;

pub(super) enum Decision {
    Skip,
    /// The entry existed, and its metadata was updated.
    Changed,
    Done,
    /// The content is wanted, perhaps after a comparison by digest.
    Want(Box<WantedFile>),
}

impl Receiver {
    /// Answers the entries that the manifest alone settles, and returns the wanted files. Blocks.
    pub(super) fn judge(&self, batch: Vec<Entry>) -> Vec<WantedFile> {
        let mut wanted = Vec::new();
        let mut settling = Vec::new();
        for entry in batch {
            let id = entry.id;
            let kind = entry.kind;
            let size = entry.size.unwrap_or(0);
            if self.session.stopping.is_cancelled() {
                self.answer(Verdict::Refuse(id, Code::Stopping.into()));
                continue;
            }
            // An entry with an invalid name is reported under an empty name.
            let name = RelativePath::from_components(&entry.path.0).unwrap_or_default();
            let settled = |name, made| Settling {
                id,
                name,
                kind,
                size,
                made,
            };
            let refused = match self.decide_one(entry) {
                Ok(Decision::Want(file)) => match self.check_wanted(&file) {
                    Ok(()) => {
                        wanted.push(*file);
                        continue;
                    }
                    Err(why) => why,
                },
                Ok(Decision::Skip) => {
                    self.tell(settled(name, false));
                    continue;
                }
                Ok(Decision::Changed) => {
                    settling.push(settled(name, false));
                    continue;
                }
                Ok(Decision::Done) => {
                    settling.push(settled(name, true));
                    continue;
                }
                Err(why) => why,
            };
            self.refused(settled(name, false), refused);
        }
        if !settling.is_empty() {
            self.tell_when_durable(settling);
        }
        self.end_time_probe();
        wanted
    }

    /// Refuses an entry: answers the sender, counts the entry, and reports it to the observer.
    pub(super) fn refused(&self, entry: Settling, why: Reason) {
        self.answer(Verdict::Refuse(entry.id, why.clone()));
        self.report(EntryResult {
            id: Some(entry.id),
            path: entry.name,
            kind: entry.kind,
            size: entry.size,
            committed: None,
            result: Settled::Failed(why),
        });
    }

    fn decide_one(&self, entry: Entry) -> Result<Decision, Reason> {
        let name = self.session.asked.check(&entry)?;
        self.check_quota(&entry)?;
        let path = self.session.place.of(&name)?;
        let folding = self.check_case(&path)?;
        let existing = match self.session.store.stat(&path) {
            // A mirror also replaces a file or link that is in the place of a parent directory.
            Err(why)
                if matches!(why.code, Code::NotDirectory | Code::Symlink) && self.replaces() =>
            {
                None
            }
            existing => existing?,
        };
        if existing.is_some() {
            self.respell(&path, folding);
        }
        let attributes = self.attributes(&entry, &path);
        let same_time = existing.as_ref().is_some_and(|existing| {
            // If the size differs, the time does not matter.
            let same_size = entry.kind != Kind::File || entry.size == Some(existing.size);
            let has_time = |modified| same_size && self.has_time(modified, existing, &path);
            entry.modified.is_none_or(has_time)
        });
        let candidate = Candidate {
            attributes,
            existing,
            same_time,
            name,
            path,
            entry,
        };
        let take = self.session.take;
        if take.delete.is_some() {
            self.announced.insert(&candidate.path);
        }
        if candidate.entry.kind != Kind::Directory
            && take.existing == Existing::Skip
            && candidate.existing.is_some()
        {
            if take.delete.is_some() && candidate.is(Kind::Directory) {
                // A mirror would remove the content of the directory as unannounced.
                return Err(refusal(Code::IsDirectory, &candidate.path));
            }
            // The existing file may differ from the source, so further names must not be linked to it.
            if candidate.has_same_size_and_time() && !take.checksum {
                self.stands(
                    candidate.entry.id,
                    candidate.entry.hard_link,
                    &candidate.path,
                );
            } else {
                self.is_left(candidate.entry.id, candidate.entry.hard_link);
            }
            return Ok(Decision::Skip);
        }
        match candidate.entry.kind {
            Kind::Directory => self.decide_directory(&candidate),
            Kind::Symlink => self.decide_symlink(&candidate),
            Kind::File => self.decide_file(candidate),
        }
    }

    fn decide_directory(&self, candidate: &Candidate) -> Result<Decision, Reason> {
        let Candidate {
            path, attributes, ..
        } = candidate;
        let store = &*self.session.store;
        let dry_run = self.session.take.dry_run;
        if candidate.is(Kind::Directory) {
            // The administrator of the server owns the served directory itself.
            if path.is_root() || candidate.same_time && self.has_wanted_attributes(candidate) {
                return Ok(Decision::Skip);
            }
        } else if candidate.existing.is_some() && !self.replaces() {
            return Err(refusal(Code::NotDirectory, path));
        }
        if !dry_run {
            self.make_room(path, Kind::Directory)?;
            store.make_directory(path)?;
            if candidate.existing.is_none() {
                self.made_directory(path);
            }
            self.warn(path, store.set_attributes(path, attributes)?);
        }
        Ok(Decision::Done)
    }

    fn decide_symlink(&self, candidate: &Candidate) -> Result<Decision, Reason> {
        let Candidate {
            path, attributes, ..
        } = candidate;
        let store = &*self.session.store;
        let target = candidate.entry.target.as_deref().unwrap_or_default();
        let same = candidate.is(Kind::Symlink)
            && candidate.same_time
            && self.may_skip()
            && self.has_wanted_attributes(candidate);
        if same && store.read_link(path)? == target {
            return Ok(Decision::Skip);
        }
        if candidate.is(Kind::Directory) && !self.replaces() {
            return Err(refusal(Code::IsDirectory, path));
        }
        if self.guards(candidate) {
            return Err(refusal(Code::Exists, path));
        }
        if !self.session.take.dry_run {
            // Check the target first, so that an invalid link does not replace an existing file.
            check_target(path, target)?;
            self.make_room(path, candidate.entry.kind)?;
            self.warn(path, store.make_symlink(path, target, attributes)?);
        }
        Ok(Decision::Done)
    }

    fn decide_file(&self, candidate: Candidate) -> Result<Decision, Reason> {
        let store = &*self.session.store;
        let take = self.session.take;
        let stays = self.may_skip();
        let guarded = self.guards(&candidate);
        let Candidate { entry, path, .. } = &candidate;
        let size = entry.size;
        let existing = candidate.existing.as_ref();
        // A pull chose the name itself, and a file of unknown size with a modification time has its own name.
        let named_here =
            matches!(self.session.asked, RequestedNames::Only { .. }) || entry.modified.is_some();
        if size.is_none() && !named_here && matches!(self.session.place, Placement::Into(_)) {
            let text = format!(
                "{path}: cannot write data of a pipe: the destination is a directory; give a full file name"
            );
            return Err(Reason::new(Code::IsDirectory, text));
        }
        if take.dry_run && !guarded && entry.hard_link.is_some_and(|first| first != entry.id) {
            return Ok(if stays && existing.is_some_and(|m| m.links > 1) {
                Decision::Skip
            } else {
                Decision::Done
            });
        }
        if !guarded && let Some(decided) = self.decide_hard_link(entry, path, existing)? {
            return Ok(decided);
        }
        match existing.map(|m| m.kind) {
            _ if self.replaces() => {}
            Some(Some(Kind::Directory)) => return Err(refusal(Code::IsDirectory, path)),
            Some(None) => {
                let text = format!(
                    "cannot replace {path}: it is a FIFO, socket or device; remove it first"
                );
                return Err(Reason::new(Code::Special, text));
            }
            _ => {}
        }
        let same_size = candidate.is(Kind::File) && existing.is_some_and(|m| Some(m.size) == size);
        let may_be_same = stays && same_size;
        if stays && !take.checksum && candidate.has_same_size_and_time() {
            let changes = !take.dry_run && !self.has_wanted_attributes(&candidate);
            if changes {
                self.warn(path, store.set_attributes(path, &candidate.attributes)?);
            }
            self.stands(entry.id, entry.hard_link, path);
            return Ok(if changes {
                Decision::Changed
            } else {
                Decision::Skip
            });
        }
        let compare = entry.digest.filter(|_| take.checksum && may_be_same);
        let compare = compare.map(|digest| Compare {
            digest,
            same_attributes: candidate.same_time && self.has_wanted_attributes(&candidate),
        });
        if compare.is_none() && guarded {
            return Err(refusal(Code::Exists, path));
        }
        if compare.is_none() && take.dry_run {
            return Ok(Decision::Done);
        }
        let known = size.unwrap_or(PartialKey::UNKNOWN_SIZE);
        let claim = PartialKey {
            owner: self.session.owner,
            size: known,
            modified: entry.modified,
        };
        if size == Some(0) && compare.is_none() {
            self.clear_path_above(path)?;
            let upload = open_partial(store, path, &claim)?;
            self.make_room(path, candidate.entry.kind)?;
            let warnings = upload.commit(&candidate.attributes, Durability::Visible)?;
            self.warn(path, warnings);
            self.stands(entry.id, entry.hard_link, path);
            return Ok(Decision::Done);
        }
        let id = entry.id;
        let hard_link = entry.hard_link;
        let digest = entry.digest;
        let Candidate {
            name,
            path,
            attributes,
            ..
        } = candidate;
        let wanted = WantedFile {
            id,
            name,
            path,
            size,
            attributes,
            claim,
            hard_link,
            digest,
            compare,
        };
        Ok(Decision::Want(Box::new(wanted)))
    }

    /// Returns whether an unchanged entry is skipped.
    fn may_skip(&self) -> bool {
        self.session.take.existing != Existing::Overwrite
    }

    /// Returns whether an existing entry must not be replaced.
    fn guards(&self, candidate: &Candidate) -> bool {
        self.session.take.existing == Existing::Fail && candidate.existing.is_some()
    }

    /// Returns whether an entry of another kind is replaced, with all its content. Only a mirror does that.
    pub(super) fn replaces(&self) -> bool {
        let take = self.session.take;
        take.delete.is_some() && matches!(take.existing, Existing::Update | Existing::Overwrite)
    }

    fn has_wanted_attributes(&self, candidate: &Candidate) -> bool {
        candidate.existing.as_ref().is_some_and(|existing| {
            self.attributes_match(&candidate.attributes, &candidate.path, existing)
        })
    }
}

/// An entry, and the metadata of the existing file in its place.
struct Candidate {
    entry: Entry,
    /// The sender's name for it.
    name: RelativePath,
    path: RelativePath,
    attributes: Attributes,
    existing: Option<Metadata>,
    same_time: bool,
}

impl Candidate {
    /// Returns whether the existing entry has this kind.
    fn is(&self, kind: Kind) -> bool {
        self.existing
            .as_ref()
            .is_some_and(|existing| existing.kind == Some(kind))
    }

    /// Returns whether the existing file has the same size and time.
    fn has_same_size_and_time(&self) -> bool {
        let same_size = self
            .existing
            .as_ref()
            .is_some_and(|existing| Some(existing.size) == self.entry.size);
        let files = self.entry.kind == Kind::File && self.is(Kind::File);
        files && same_size && self.same_time && self.entry.modified.is_some()
    }
}
