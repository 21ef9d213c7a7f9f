//! The last step of a mirror: removes all paths that were not announced, or none.

use super::announced::MAX_ANNOUNCED;
use super::walk::Mirror;
use crate::error::lock::lock;
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;

/// What a mirror removed.
#[derive(Debug, Default)]
pub(in crate::transfer::receive) struct Removal {
    /// Number of removed paths.
    pub(in crate::transfer::receive) removed: u64,
    /// The reason if some paths stayed.
    pub(in crate::transfer::receive) incomplete: Option<Reason>,
}

/// What the session says about its entries before a mirror removes anything.
#[derive(Debug, Clone, Copy)]
pub(in crate::transfer::receive) struct Announcement {
    /// Everything was announced and arrived.
    pub(in crate::transfer::receive) is_whole: bool,
    /// Announced entries that failed or vanished, and may be missing at the destination.
    pub(in crate::transfer::receive) missing: u64,
}

impl Mirror<'_> {
    /// Removes all unannounced paths, or none if the announcement is not whole. Reports each path to `report` and stops
    /// when that returns `false`. Directories keep their time. Blocks.
    pub(in crate::transfer::receive) fn remove(
        &self,
        announcement: Announcement,
        mut report: impl FnMut(RelativePath) -> bool,
    ) -> Removal {
        let cleared = std::mem::take(&mut *lock(self.cleared));
        let all_reported = cleared.named.into_iter().all(&mut report);
        let permitted = match (announcement.is_whole, all_reported) {
            (true, true) => self.check(cleared.count, announcement.missing),
            (true, false) => Err(Code::Cancelled.into()),
            (false, _) => Err(Reason::new(
                Code::Cancelled,
                "some entries failed or did not arrive",
            )),
        };
        match permitted.and_then(|()| self.remove_all(cleared.count, report)) {
            Ok(removal) => Removal {
                removed: cleared.count + removal.removed,
                incomplete: removal.incomplete,
            },
            Err(reason) => Removal {
                removed: cleared.count,
                incomplete: Some(reason),
            },
        }
    }

    /// Checks that removal is safe, given the number of paths removed so far and of entries that may be missing.
    fn check(&self, cleared: u64, missing: u64) -> Result<(), Reason> {
        if self.announced.overflows() {
            return Err(Reason::new(
                Code::TooMany,
                format!(
                    "a mirror of so many entries removes nothing; the most are {MAX_ANNOUNCED}, or what fits in --session-memory at the server"
                ),
            ));
        }
        // The directory itself counts as one entry.
        if self.announced.count() <= 1 && self.delete.most.is_none() {
            let text = "the source is empty and everything would be removed; to allow it, use --max-delete";
            return Err(Reason::new(Code::TooMany, text));
        }
        if self.collisions.overflows() {
            let text = "too many names for a file system that treats different names as equal";
            return Err(Reason::new(Code::TooMany, text));
        }
        let mut count = 0;
        let found = self.walk(self.place, false, |path| {
            count += u64::from(path != self.place);
            Ok(true)
        })?;
        self.check_found(found, missing)?;
        self.check_maximum(cleared + count)
    }

    /// Checks that all announced entries exist. If some are missing, the file system may store them under other names,
    /// and a seemingly unannounced path may be one of them.
    fn check_found(&self, found: u64, missing: u64) -> Result<(), Reason> {
        let unexplained = (self.announced.count() as u64).saturating_sub(missing + found);
        if unexplained == 0 || self.dry_run {
            return Ok(());
        }
        let text =
            format!("{unexplained} of the received entries cannot be found under their names");
        Err(Reason::new(Code::Cancelled, text))
    }

    fn remove_all(
        &self,
        cleared: u64,
        mut report: impl FnMut(RelativePath) -> bool,
    ) -> Result<Removal, Reason> {
        let mut removal = Removal::default();
        self.walk(self.place, false, |path| {
            // New files may have appeared since the count.
            if let Err(too_many) = self.check_maximum(cleared + removal.removed + 1) {
                removal.incomplete.get_or_insert(too_many);
                return Ok(false);
            }
            let gone = if self.dry_run {
                Ok(())
            } else {
                self.store.remove(path)
            };
            match gone {
                Ok(()) => {
                    removal.removed += 1;
                    if report(self.below(path)?) {
                        Ok(true)
                    } else {
                        Err(Code::Cancelled.into())
                    }
                }
                // Another process removed it first.
                Err(reason) if reason.code == Code::NotFound => Ok(true),
                Err(reason) => {
                    removal.incomplete.get_or_insert(reason);
                    Ok(false)
                }
            }
        })?;
        Ok(removal)
    }
}
