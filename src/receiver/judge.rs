//! Entries held against what stands in the store.

use std::sync::atomic::Ordering;

use super::compare::Compare;
use super::{Place, Receiver, Wanted};
use crate::error::{Code, Result, Why};
use crate::manifest::Verdict;
use crate::path::RelativePath;
use crate::progress::Settled;
use crate::store::Claim;
use crate::store::fault::refusal;
use crate::wire::{Durability, Entry, Existing, Kind, Time};

pub(super) enum Judged {
    Skip,
    Done,
    /// Also what is compared first.
    Want(Box<Wanted>),
}

impl Receiver {
    /// Answers what the manifest settles, and returns the files that are wanted. Blocks.
    pub(super) fn judge(&self, batch: Vec<Entry>) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        for entry in batch {
            let (id, kind, size) = (entry.id, entry.kind, entry.size.unwrap_or(0));
            if self.session.stopping.is_cancelled() {
                self.answer(Verdict::Refuse(id, Code::Stopping.into()));
                continue;
            }
            // One whose name is none cannot be named.
            let name = RelativePath::from_components(&entry.path.0).unwrap_or_default();
            let result = match self.judge_one(entry) {
                Ok(Judged::Want(file)) => {
                    wanted.push(*file);
                    continue;
                }
                Ok(Judged::Skip) => {
                    self.skipped.fetch_add(1, Ordering::Relaxed);
                    self.answer(Verdict::Skip(id));
                    Settled::Skipped
                }
                Ok(Judged::Done) => {
                    self.answer(Verdict::Done(id));
                    Settled::Committed
                }
                Err(why) => {
                    self.failed.fetch_add(1, Ordering::Relaxed);
                    self.answer(Verdict::Refuse(id, why.clone()));
                    Settled::Failed(why)
                }
            };
            self.report(Some(id), name, kind, size, result);
        }
        wanted
    }

    fn judge_one(&self, entry: Entry) -> Result<Judged, Why> {
        let store = &*self.session.store;
        let name = self.session.asked.check(&entry)?;
        let path = self.session.place.of(&name)?;
        self.check_case(&path)?;
        let attributes = self.attributes(&entry, &path);
        let there = store.stat(&path)?;
        let there = there.as_ref();
        let same_time = there.is_some_and(|m| entry.modified.is_none_or(|modified| is_kept(modified, m.modified)));
        let stands_so = || there.is_some_and(|there| self.stands_so(&attributes, &path, there));
        let kind = there.map(|m| m.kind);
        let take = self.session.take;
        if take.delete.is_some() {
            self.announced.insert(&path);
        }
        if entry.kind != Kind::Directory && take.existing == Existing::Skip && there.is_some() {
            if take.delete.is_some() && kind == Some(Some(Kind::Directory)) {
                // A mirror would take what is in it for left over.
                return Err(refusal(Code::IsDirectory, &path));
            }
            self.stands(entry.id, entry.hard_link, &path);
            return Ok(Judged::Skip);
        }
        // Whether what is the same may stay, and whether what is not must.
        let (stays, guarded) =
            (take.existing != Existing::Overwrite, take.existing == Existing::Fail && there.is_some());
        match entry.kind {
            Kind::Directory => match kind {
                Some(Some(Kind::Directory)) if same_time && stands_so() => Ok(Judged::Skip),
                // The served directory itself belongs to whoever serves it.
                Some(Some(Kind::Directory)) if path.is_root() => Ok(Judged::Skip),
                Some(Some(Kind::Directory)) | None if take.dry_run => Ok(Judged::Done),
                Some(Some(Kind::Directory)) | None => {
                    store.make_directory(&path)?;
                    self.unkept.count(&path, store.set_attributes(&path, &attributes)?);
                    Ok(Judged::Done)
                }
                Some(_) => Err(refusal(Code::NotDirectory, &path)),
            },
            Kind::Symlink => {
                let target = entry.target.unwrap_or_default();
                match kind {
                    Some(Some(Kind::Symlink))
                        if stays && same_time && stands_so() && store.read_link(&path)? == target =>
                    {
                        Ok(Judged::Skip)
                    }
                    Some(Some(Kind::Directory)) => Err(refusal(Code::IsDirectory, &path)),
                    _ if guarded => Err(refusal(Code::Exists, &path)),
                    _ if take.dry_run => Ok(Judged::Done),
                    _ => {
                        self.unkept.count(&path, store.make_symlink(&path, &target, &attributes)?);
                        self.committed.fetch_add(1, Ordering::Relaxed);
                        Ok(Judged::Done)
                    }
                }
            }
            Kind::File => {
                let size = entry.size;
                if size.is_none() && matches!(self.session.place, Place::Into(_)) {
                    let text =
                        format!("{path}: what comes out of a pipe needs a full name, and a directory stands there");
                    return Err(Why::new(Code::IsDirectory, text));
                }
                if take.dry_run && !guarded && entry.hard_link.is_some_and(|first| first != entry.id) {
                    return Ok(if stays && there.is_some_and(|m| m.links > 1) { Judged::Skip } else { Judged::Done });
                }
                if !guarded && let Some(judged) = self.judge_name(&entry, &path, there) {
                    return Ok(judged);
                }
                match kind {
                    Some(Some(Kind::Directory)) => return Err(refusal(Code::IsDirectory, &path)),
                    Some(None) => {
                        let text = format!("{path} is a FIFO, socket or device there; remove it first");
                        return Err(Why::new(Code::Special, text));
                    }
                    Some(Some(Kind::File))
                        if stays
                            && !take.checksum
                            && same_time
                            && there.is_some_and(|m| Some(m.size) == size)
                            && entry.modified.is_some() =>
                    {
                        if !take.dry_run && !stands_so() {
                            self.unkept.count(&path, store.set_attributes(&path, &attributes)?);
                        }
                        self.stands(entry.id, entry.hard_link, &path);
                        return Ok(Judged::Skip);
                    }
                    _ => {}
                }
                let same_size = there.is_some_and(|m| m.kind == Some(Kind::File) && Some(m.size) == size);
                let compare = entry.digest.filter(|_| take.checksum && stays && same_size);
                let compare = compare.map(|digest| Compare { digest, same_attributes: same_time && stands_so() });
                if compare.is_none() && guarded {
                    return Err(refusal(Code::Exists, &path));
                }
                if compare.is_none() && take.dry_run {
                    return Ok(Judged::Done);
                }
                let known = size.unwrap_or(Claim::UNKNOWN_SIZE);
                let claim = Claim { owner: self.session.owner, size: known, modified: entry.modified };
                if size == Some(0) && compare.is_none() {
                    let lapses = store.create(&path, &claim)?.commit(&attributes, Durability::Visible)?;
                    self.unkept.count(&path, lapses);
                    self.stands(entry.id, entry.hard_link, &path);
                    self.committed.fetch_add(1, Ordering::Relaxed);
                    return Ok(Judged::Done);
                }
                let (id, hard_link, digest) = (entry.id, entry.hard_link, entry.digest);
                let wanted = Wanted { id, name, path, size, attributes, claim, hard_link, digest, compare };
                Ok(Judged::Want(Box::new(wanted)))
            }
        }
    }
}

/// Whether a time stands there as it was set; a filesystem may keep whole seconds only.
fn is_kept(modified: Time, there: Time) -> bool {
    modified == there || (there.nanoseconds == 0 && modified.seconds == there.seconds)
}
