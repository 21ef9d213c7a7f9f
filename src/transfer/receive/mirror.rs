//! A mirror: the destination loses what the source does not have.
//!
//! An entry of another kind in the place of an announced one is removed before the new one is made. All other unannounced
//! paths are removed in the last step, and only if everything else succeeded.

mod announced;
mod obstacles;
mod removal;
#[cfg(test)]
mod tests;
mod walk;

pub(super) use announced::Announced;
pub(super) use removal::{Announcement, Removal};
pub(super) use walk::{ClearedPaths, Mirror};

use super::{Placement, Receiver};
use crate::error::{Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Kind, ReceiveOptions};

impl Receiver {
    /// Returns the mirror of this session, if it is one.
    pub(super) fn mirror_plan(&self) -> Option<Mirror<'_>> {
        let (Placement::Into(place) | Placement::As(place)) = &self.session.place;
        let ReceiveOptions {
            delete, dry_run, ..
        } = self.session.take;
        delete.map(|delete| Mirror {
            store: &*self.session.store,
            place,
            announced: &self.announced,
            collisions: &self.cases,
            protected: &self.session.spared,
            cleared: &self.cleared,
            delete,
            dry_run,
        })
    }

    /// Returns the mirror if it replaces entries of another kind. Nothing else does that.
    fn replacing_mirror(&self) -> Option<Mirror<'_>> {
        self.mirror_plan()
            .filter(|_| self.replaces() && !self.session.take.dry_run)
    }

    /// Removes an entry of another kind in the place of a mirror's entry. Call it when the new content is complete,
    /// directly before the commit. Blocks.
    pub(super) fn make_room(&self, path: &RelativePath, kind: Kind) -> Result<(), Reason> {
        match self.replacing_mirror() {
            Some(mirror) => mirror.make_room(path, kind),
            None => Ok(()),
        }
    }

    /// Removes files and links in the place of parent directories of a mirror's entry, so that its partial can be
    /// made. Blocks.
    pub(super) fn clear_path_above(&self, path: &RelativePath) -> Result<(), Reason> {
        match self.replacing_mirror() {
            Some(mirror) => mirror.clear_path_above(path),
            None => Ok(()),
        }
    }
}
