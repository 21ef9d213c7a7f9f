//! Entries held against what stands in the store.

use std::sync::atomic::Ordering;

use super::{Place, Receiver, Wanted};
use crate::error::{Code, Result, Why};
use crate::manifest::Verdict;
use crate::path::RelativePath;
use crate::progress::Settled;
use crate::store::Claim;
use crate::store::fault::refusal;
use crate::wire::{Durability, Entry, Kind, Time};

#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
pub(super) enum Judged {
    Skip,
    Done,
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
        match entry.kind {
            Kind::Directory => match kind {
                Some(Some(Kind::Directory)) if same_time && stands_so() => Ok(Judged::Skip),
                // The served directory itself belongs to whoever serves it.
                Some(Some(Kind::Directory)) if path.is_root() => Ok(Judged::Skip),
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
                    Some(Some(Kind::Symlink)) if same_time && stands_so() && store.read_link(&path)? == target => {
                        Ok(Judged::Skip)
                    }
                    Some(Some(Kind::Directory)) => Err(refusal(Code::IsDirectory, &path)),
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
                if let Some(judged) = self.judge_name(&entry, &path, there) {
                    return Ok(judged);
                }
                match kind {
                    Some(Some(Kind::Directory)) => return Err(refusal(Code::IsDirectory, &path)),
                    Some(None) => {
                        let text = format!("{path} is a FIFO, socket or device there; remove it first");
                        return Err(Why::new(Code::Special, text));
                    }
                    Some(Some(Kind::File))
                        if same_time && there.is_some_and(|m| Some(m.size) == size) && entry.modified.is_some() =>
                    {
                        if !stands_so() {
                            self.unkept.count(&path, store.set_attributes(&path, &attributes)?);
                        }
                        self.stands(entry.id, entry.hard_link, &path);
                        return Ok(Judged::Skip);
                    }
                    _ => {}
                }
                let known = size.unwrap_or(Claim::UNKNOWN_SIZE);
                let claim = Claim { owner: self.session.owner, size: known, modified: entry.modified };
                if size == Some(0) {
                    let lapses = store.create(&path, &claim)?.commit(&attributes, Durability::Visible)?;
                    self.unkept.count(&path, lapses);
                    self.stands(entry.id, entry.hard_link, &path);
                    self.committed.fetch_add(1, Ordering::Relaxed);
                    return Ok(Judged::Done);
                }
                let (hard_link, digest) = (entry.hard_link, entry.digest);
                let id = entry.id;
                Ok(Judged::Want(Box::new(Wanted { id, name, path, size, attributes, claim, hard_link, digest })))
            }
        }
    }
}

/// Whether a time stands there as it was set; a filesystem may keep whole seconds only.
fn is_kept(modified: Time, there: Time) -> bool {
    modified == there || (there.nanoseconds == 0 && modified.seconds == there.seconds)
}
