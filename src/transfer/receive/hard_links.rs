//! Files with several names (hard links): a further name is made only of what this very session brought or found to be
//! there already. The sender names it by the id of its entry, and never by a path.

use std::collections::HashMap;

use super::decide::Decision;
use super::{Receiver, lock};
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::protocol::{Attribute, Entry, Kind};
use crate::storage::Metadata;

/// Bytes of places that a session may have remembered; further names of what was not are sent as files of their own.
const MAX_BYTES: usize = 16 << 20;
/// What one costs beside its path, in bytes.
const ENTRY_OVERHEAD: usize = 64;

/// The places of files that others may come to be further names of, by the ids of their entries.
#[derive(Default)]
pub(super) struct HardLinks {
    /// `None` where something else stands under the name of that entry, and is left.
    places: HashMap<u64, Option<RelativePath>>,
    bytes: usize,
}

impl Receiver {
    /// Remembers that an entry stands, if it announced that it has further names.
    pub(super) fn stands(&self, id: u64, hard_link: Option<u64>, path: &RelativePath) {
        if hard_link == Some(id) {
            lock(&self.names).insert(id, Some(path.clone()));
        }
    }

    /// Remembers that something else was left under the name of an entry that has further names: none is linked to it.
    pub(super) fn is_left(&self, id: u64, hard_link: Option<u64>) {
        if hard_link == Some(id) {
            lock(&self.names).insert(id, None);
        }
    }

    /// Makes an entry a further name of what it refers to. `None` when it is to be taken as a file of its own: because it
    /// is one, or because a link cannot be made.
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
        let not_linked = |why: String| self.unkept.count(path, vec![(Attribute::HardLink, why)]);
        let Some(place) = place else {
            not_linked("the receiver remembers no more of them".into());
            return Ok(None);
        };
        let Some(place) = place else {
            not_linked("another file stands under its first name, and is left there".into());
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

    /// Makes another name of a file. The inner error says why there can be no link; the outer one refuses the entry.
    fn link(
        &self,
        place: &RelativePath,
        path: &RelativePath,
    ) -> Result<Result<(), Reason>, Reason> {
        let store = &*self.session.store;
        match store.link(place, path) {
            // A mirror clears the way only now: where the file system has no hard links, the first attempt says so.
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
