//! Makes hard links. A link is made only to a file that this session brought or found unchanged. The sender refers to
//! the file by the id of its entry, never by a path.

use std::collections::HashMap;

use super::Receiver;
use super::decide::Decision;
use super::tasks::lock;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::protocol::{Attribute, Entry, Kind};
use crate::storage::Metadata;

/// Memory for the paths that a session remembers, in bytes. Further names of other files are sent as separate files.
const MAX_BYTES: usize = 16 << 20;
/// Memory for a remembered path beyond its length, in bytes.
const ENTRY_OVERHEAD: usize = 64;

/// Paths of files that may get further names, by the ids of their entries.
#[derive(Default)]
pub(super) struct HardLinks {
    /// `None` if another file has the name of that entry and stays.
    places: HashMap<u64, Option<RelativePath>>,
    bytes: usize,
}

impl Receiver {
    /// Records the path of an entry that announced further names.
    pub(super) fn stands(&self, id: u64, hard_link: Option<u64>, path: &RelativePath) {
        if hard_link == Some(id) {
            lock(&self.names).insert(id, Some(path.clone()));
        }
    }

    /// Records that another file keeps the name of an entry with further names. Nothing is linked to it.
    pub(super) fn is_left(&self, id: u64, hard_link: Option<u64>) {
        if hard_link == Some(id) {
            lock(&self.names).insert(id, None);
        }
    }

    /// Makes an entry a hard link to the file it refers to. Returns `None` if the entry must be handled as a file of
    /// its own: it is not a link, or the link cannot be made.
    pub(super) fn decide_hard_link(
        &self,
        entry: &Entry,
        path: &RelativePath,
        there: Option<&Metadata>,
    ) -> Result<Option<Decision>, Reason> {
        let Some(first) = entry.hard_link.filter(|&first| first != entry.id) else {
            return Ok(None);
        };
        // Other kinds are refused as for any file, unless a mirror replaces them.
        let is_other =
            there.is_some_and(|there| !matches!(there.kind, Some(Kind::File | Kind::Symlink)));
        if is_other && !self.replaces() {
            return Ok(None);
        }
        let place = lock(&self.names).places.get(&first).cloned();
        let not_linked = |why: String| self.warn(path, vec![(Attribute::HardLink, why)]);
        let Some(place) = place else {
            not_linked("the receiver remembers no more names".into());
            return Ok(None);
        };
        let Some(place) = place else {
            not_linked("another file has its first name and is kept".into());
            return Ok(None);
        };
        let store = &*self.session.store;
        let file = store
            .stat(&place)
            .ok()
            .flatten()
            .map(|metadata| metadata.version.file);
        if there.is_some_and(|there| Some(there.version.file) == file) {
            return Ok(Some(Decision::Skip));
        }
        match self.link(&place, path)? {
            Ok(()) => Ok(Some(Decision::Done)),
            Err(why) => {
                let why = why.text.into_raw();
                let why = why
                    .strip_prefix(&format!("{path}: "))
                    .unwrap_or(&why)
                    .to_owned();
                not_linked(why);
                Ok(None)
            }
        }
    }

    /// Makes a hard link. The inner error says why there can be no link; the outer error refuses the entry.
    fn link(
        &self,
        place: &RelativePath,
        path: &RelativePath,
    ) -> Result<Result<(), Reason>, Reason> {
        let store = &*self.session.store;
        match store.link(place, path) {
            // A mirror removes the obstacle only now: on a file system without hard links, the first attempt fails for
            // that reason.
            Err(why)
                if self.replaces()
                    && matches!(
                        why.code,
                        Code::IsDirectory | Code::NotDirectory | Code::Symlink
                    ) =>
            {
                self.make_room(path, Kind::File)?;
                Ok(store.link(place, path))
            }
            linked => Ok(linked),
        }
    }
}

impl HardLinks {
    fn insert(&mut self, id: u64, place: Option<RelativePath>) {
        self.bytes += ENTRY_OVERHEAD + place.as_ref().map_or(0, |path| path.as_bytes().len());
        if self.bytes <= MAX_BYTES {
            self.places.insert(id, place);
        }
    }
}
