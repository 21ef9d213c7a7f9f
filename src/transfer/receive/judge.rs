//! Entries held against what stands in the store.

use std::sync::atomic::Ordering;

use super::compare::Compare;
use super::disk::create;
use super::durable::Settling;
use super::{Asked, Place, Receiver, Wanted};
use crate::error::{Code, Result, Why};
use crate::protocol::path::RelativePath;
use crate::protocol::{Durability, Entry, Existing, Kind};
use crate::storage::fault::{check_target, refusal};
use crate::storage::walk::Verdict;
use crate::storage::{Attributes, Claim, Metadata};
use crate::transfer::events::Settled;

pub(super) enum Judged {
    Skip,
    /// It was there, and its metadata was set.
    Changed,
    Done,
    /// Also what is compared first.
    Want(Box<Wanted>),
}

impl Receiver {
    /// Answers what the manifest settles, and returns the files that are wanted. Blocks.
    pub(super) fn judge(&self, batch: Vec<Entry>) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        let mut settling = Vec::new();
        for entry in batch {
            let (id, kind, size) = (entry.id, entry.kind, entry.size.unwrap_or(0));
            if self.session.stopping.is_cancelled() {
                self.answer(Verdict::Refuse(id, Code::Stopping.into()));
                continue;
            }
            // One whose name is none cannot be named.
            let name = RelativePath::from_components(&entry.path.0).unwrap_or_default();
            let settled = |name, made| Settling {
                id,
                name,
                kind,
                size,
                made,
            };
            let refused = match self.judge_one(entry) {
                Ok(Judged::Want(file)) => match self.check_wanted(&file) {
                    Ok(()) => {
                        wanted.push(*file);
                        continue;
                    }
                    Err(why) => why,
                },
                Ok(Judged::Skip) => {
                    self.tell(settled(name, false));
                    continue;
                }
                Ok(Judged::Changed) => {
                    settling.push(settled(name, false));
                    continue;
                }
                Ok(Judged::Done) => {
                    settling.push(settled(name, true));
                    continue;
                }
                Err(why) => why,
            };
            let result = self.refused(id, refused);
            self.report(Some(id), name, kind, size, result);
        }
        if !settling.is_empty() {
            self.tell_when_durable(settling);
        }
        self.end_time_probe();
        wanted
    }

    pub(super) fn refused(&self, id: u64, why: Why) -> Settled {
        self.failed.fetch_add(1, Ordering::Relaxed);
        self.answer(Verdict::Refuse(id, why.clone()));
        Settled::Failed(why)
    }

    fn judge_one(&self, entry: Entry) -> Result<Judged, Why> {
        let name = self.session.asked.check(&entry)?;
        self.check_most(&entry)?;
        let path = self.session.place.of(&name)?;
        let folding = self.check_case(&path)?;
        let there = match self.session.store.stat(&path) {
            // What stands in the place of a directory above goes as well.
            Err(why)
                if matches!(why.code, Code::NotDirectory | Code::Symlink) && self.replaces() =>
            {
                None
            }
            there => there?,
        };
        if there.is_some() {
            self.respell(&path, folding);
        }
        let attributes = self.attributes(&entry, &path);
        let same_time = there.as_ref().is_some_and(|there| {
            // Of what has another size, the time does not matter.
            let same_size = entry.kind != Kind::File || entry.size == Some(there.size);
            let has_time = |modified| same_size && self.has_time(modified, there, &path);
            entry.modified.is_none_or(has_time)
        });
        let case = Case {
            attributes,
            there,
            same_time,
            name,
            path,
            entry,
        };
        let take = self.session.take;
        if take.delete.is_some() {
            self.announced.insert(&case.path);
        }
        if case.entry.kind != Kind::Directory
            && take.existing == Existing::Skip
            && case.there.is_some()
        {
            if take.delete.is_some() && case.is(Kind::Directory) {
                // A mirror would take what is in it for left over.
                return Err(refusal(Code::IsDirectory, &case.path));
            }
            // What is left may be another file than the source: further names must not be linked to it.
            if case.has_same_size_and_time() && !take.checksum {
                self.stands(case.entry.id, case.entry.hard_link, &case.path);
            } else {
                self.is_left(case.entry.id, case.entry.hard_link);
            }
            return Ok(Judged::Skip);
        }
        match case.entry.kind {
            Kind::Directory => self.judge_directory(&case),
            Kind::Symlink => self.judge_symlink(&case),
            Kind::File => self.judge_file(case),
        }
    }

    fn judge_directory(&self, case: &Case) -> Result<Judged, Why> {
        let Case {
            path, attributes, ..
        } = case;
        let (store, dry_run) = (&*self.session.store, self.session.take.dry_run);
        if case.is(Kind::Directory) {
            // The served directory itself belongs to whoever serves it.
            if path.is_root() || case.same_time && self.stands_so(case) {
                return Ok(Judged::Skip);
            }
        } else if case.there.is_some() && !self.replaces() {
            return Err(refusal(Code::NotDirectory, path));
        }
        if !dry_run {
            self.make_room(path, Kind::Directory)?;
            store.make_directory(path)?;
            if case.there.is_none() {
                self.made_directory(path);
            }
            self.unkept
                .count(path, store.set_attributes(path, attributes)?);
        }
        Ok(Judged::Done)
    }

    fn judge_symlink(&self, case: &Case) -> Result<Judged, Why> {
        let Case {
            path, attributes, ..
        } = case;
        let store = &*self.session.store;
        let target = case.entry.target.as_deref().unwrap_or_default();
        let same =
            case.is(Kind::Symlink) && case.same_time && self.may_stay() && self.stands_so(case);
        if same && store.read_link(path)? == target {
            return Ok(Judged::Skip);
        }
        if case.is(Kind::Directory) && !self.replaces() {
            return Err(refusal(Code::IsDirectory, path));
        }
        if self.guards(case) {
            return Err(refusal(Code::Exists, path));
        }
        if !self.session.take.dry_run {
            // What it replaces is not to be lost to one that cannot be made.
            check_target(path, target)?;
            self.make_room(path, case.entry.kind)?;
            self.unkept
                .count(path, store.make_symlink(path, target, attributes)?);
        }
        Ok(Judged::Done)
    }

    fn judge_file(&self, case: Case) -> Result<Judged, Why> {
        let (store, take, stays, guarded) = (
            &*self.session.store,
            self.session.take,
            self.may_stay(),
            self.guards(&case),
        );
        let Case { entry, path, .. } = &case;
        let (size, there) = (entry.size, case.there.as_ref());
        // A pull has asked for its name, and a file of unknown size has its own.
        let named_here =
            matches!(self.session.asked, Asked::Only { .. }) || entry.modified.is_some();
        if size.is_none() && !named_here && matches!(self.session.place, Place::Into(_)) {
            let text = format!(
                "{path}: what comes out of a pipe needs a full name, and a directory stands there"
            );
            return Err(Why::new(Code::IsDirectory, text));
        }
        if take.dry_run && !guarded && entry.hard_link.is_some_and(|first| first != entry.id) {
            return Ok(if stays && there.is_some_and(|m| m.links > 1) {
                Judged::Skip
            } else {
                Judged::Done
            });
        }
        if !guarded && let Some(judged) = self.judge_name(entry, path, there)? {
            return Ok(judged);
        }
        match there.map(|m| m.kind) {
            _ if self.replaces() => {}
            Some(Some(Kind::Directory)) => return Err(refusal(Code::IsDirectory, path)),
            Some(None) => {
                let text = format!("{path} is a FIFO, socket or device there; remove it first");
                return Err(Why::new(Code::Special, text));
            }
            _ => {}
        }
        let same_size = case.is(Kind::File) && there.is_some_and(|m| Some(m.size) == size);
        let may_be_same = stays && same_size;
        if stays && !take.checksum && case.has_same_size_and_time() {
            let changes = !take.dry_run && !self.stands_so(&case);
            if changes {
                self.unkept
                    .count(path, store.set_attributes(path, &case.attributes)?);
            }
            self.stands(entry.id, entry.hard_link, path);
            return Ok(if changes {
                Judged::Changed
            } else {
                Judged::Skip
            });
        }
        let compare = entry.digest.filter(|_| take.checksum && may_be_same);
        let compare = compare.map(|digest| Compare {
            digest,
            same_attributes: case.same_time && self.stands_so(&case),
        });
        if compare.is_none() && guarded {
            return Err(refusal(Code::Exists, path));
        }
        if compare.is_none() && take.dry_run {
            return Ok(Judged::Done);
        }
        let known = size.unwrap_or(Claim::UNKNOWN_SIZE);
        let claim = Claim {
            owner: self.session.owner,
            size: known,
            modified: entry.modified,
        };
        if size == Some(0) && compare.is_none() {
            self.make_way_above(path)?;
            let upload = create(store, path, &claim)?;
            self.make_room(path, case.entry.kind)?;
            let lapses = upload.commit(&case.attributes, Durability::Visible)?;
            self.unkept.count(path, lapses);
            self.stands(entry.id, entry.hard_link, path);
            return Ok(Judged::Done);
        }
        let (id, hard_link, digest) = (entry.id, entry.hard_link, entry.digest);
        let Case {
            name,
            path,
            attributes,
            ..
        } = case;
        let wanted = Wanted {
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
        Ok(Judged::Want(Box::new(wanted)))
    }

    /// Whether what is the same may stay.
    fn may_stay(&self) -> bool {
        self.session.take.existing != Existing::Overwrite
    }

    /// Whether what is there and differs must stay.
    fn guards(&self, case: &Case) -> bool {
        self.session.take.existing == Existing::Fail && case.there.is_some()
    }

    /// Whether a thing of another kind goes, with all that is in it: only a mirror does that.
    pub(super) fn replaces(&self) -> bool {
        let take = self.session.take;
        take.delete.is_some() && matches!(take.existing, Existing::Update | Existing::Overwrite)
    }

    fn stands_so(&self, case: &Case) -> bool {
        case.there
            .as_ref()
            .is_some_and(|there| self.has_attributes(&case.attributes, &case.path, there))
    }
}

/// An entry, and what stands where it is to come.
struct Case {
    entry: Entry,
    /// As the sender named it.
    name: RelativePath,
    path: RelativePath,
    attributes: Attributes,
    there: Option<Metadata>,
    same_time: bool,
}

impl Case {
    /// Whether what stands there is one.
    fn is(&self, kind: Kind) -> bool {
        self.there
            .as_ref()
            .is_some_and(|there| there.kind == Some(kind))
    }

    /// Whether a file stands there that counts as the same by size and time.
    fn has_same_size_and_time(&self) -> bool {
        let same_size = self
            .there
            .as_ref()
            .is_some_and(|there| Some(there.size) == self.entry.size);
        let files = self.entry.kind == Kind::File && self.is(Kind::File);
        files && same_size && self.same_time && self.entry.modified.is_some()
    }
}
