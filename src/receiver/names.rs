//! Files with several names (hard links): a further name is made only of what this very session brought or found to be
//! there already. The sender names it by the id of its entry, and never by a path.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use super::judge::Judged;
use super::{Receiver, lock};
use crate::path::RelativePath;
use crate::store::Metadata;
use crate::wire::{Aspect, Entry, Kind};

/// Bytes of places that a session may have remembered; further names of what was not are sent as files of their own.
const MAX_BYTES: usize = 16 << 20;
/// What one costs beside its path, in bytes.
const OVERHEAD: usize = 64;

/// The places of files that others may come to be further names of, by the ids of their entries.
#[derive(Default)]
pub(super) struct Names {
    places: HashMap<u64, RelativePath>,
    bytes: usize,
}

impl Receiver {
    /// Remembers that an entry stands, if it announced that it has further names.
    pub(super) fn stands(&self, id: u64, hard_link: Option<u64>, path: &RelativePath) {
        if hard_link != Some(id) {
            return;
        }
        let mut names = lock(&self.names);
        names.bytes += path.as_bytes().len() + OVERHEAD;
        if names.bytes <= MAX_BYTES {
            names.places.insert(id, path.clone());
        }
    }

    /// Makes an entry a further name of what it refers to. `None` when it is to be taken as a file of its own: because it
    /// is one, or because a link cannot be made.
    pub(super) fn judge_name(
        &self,
        entry: &Entry,
        path: &RelativePath,
        there: Option<&Metadata>,
    ) -> Option<Judged> {
        let first = entry.hard_link.filter(|&first| first != entry.id)?;
        // What is neither is refused as for any file.
        if there.is_some_and(|there| !matches!(there.kind, Some(Kind::File | Kind::Symlink))) {
            return None;
        }
        let place = lock(&self.names).places.get(&first).cloned();
        let Some(place) = place else {
            self.unkept.count(
                path,
                vec![(
                    Aspect::HardLink,
                    "the receiver remembers no more of them".into(),
                )],
            );
            return None;
        };
        let store = &*self.session.store;
        let file = store
            .stat(&place)
            .ok()
            .flatten()
            .map(|metadata| metadata.version.file);
        if there.is_some_and(|there| Some(there.version.file) == file) {
            return Some(Judged::Skip);
        }
        match store.link(&place, path) {
            Ok(()) => {
                self.committed.fetch_add(1, Ordering::Relaxed);
                Some(Judged::Done)
            }
            Err(why) => {
                let why = why.text.into_raw();
                let why = why
                    .strip_prefix(&format!("{path}: "))
                    .unwrap_or(&why)
                    .to_owned();
                self.unkept.count(path, vec![(Aspect::HardLink, why)]);
                None
            }
        }
    }
}
