//! Listings of a store: complete, and with each directory sorted.

use std::sync::Arc;

use super::expand::{Effort, Expanded, expand};
use super::io_errors::refusal;
use super::kept_memory::{Held, KeptShare};
use super::sorted_names::SortedNames;
use super::store::Store;
use crate::error::text::printable;
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Components, Kind, Listed};

/// Memory for an open directory beside its path, in bytes.
const LEVEL_OVERHEAD: usize = 256;

/// A listed entry, or an entry that could not be read.
pub(crate) type ListingItem = Result<Listed, (RelativePath, Reason)>;

/// Lists depth first. It is an iterator, so that it occupies no thread between steps; each step blocks.
pub(crate) struct ListingWalk {
    store: Arc<dyn Store>,
    /// Paths that are still to be listed themselves.
    paths: std::vec::IntoIter<RelativePath>,
    recursive: bool,
    /// How many leading components of a path are hidden, because all paths share them.
    hidden: usize,
    /// A stack instead of recursion: a tree may be deeper than a thread's stack.
    open: Vec<Level>,
    memory: KeptShare,
    /// Counts the memory of matches.
    _matches: Held,
}

/// A directory that is being listed.
struct Level {
    path: RelativePath,
    names: SortedNames,
    /// Counts the path; `None` if it does not fit, which is an error of the directory.
    held: Option<Held>,
}

impl ListingWalk {
    /// Starts a listing. A directory is listed by its content; every other entry, and every match of a pattern, by
    /// itself. Blocks.
    ///
    /// # Errors
    /// An error when the path does not exist or cannot be read.
    pub(crate) fn begin(
        store: Arc<dyn Store>,
        path: &RelativePath,
        recursive: bool,
        memory: KeptShare,
    ) -> Result<Self, Reason> {
        let mut effort = Effort::within(&memory);
        let Expanded { paths, by_pattern } = expand(&*store, path, &mut effort)?;
        let mut walk = Self {
            store,
            paths: Vec::new().into_iter(),
            recursive,
            hidden: 0,
            open: Vec::new(),
            memory,
            _matches: effort.into_held(),
        };
        match paths.first() {
            Some(only) if !by_pattern => {
                let there = walk
                    .store
                    .stat(only)?
                    .ok_or_else(|| refusal(Code::NotFound, only))?;
                if there.kind == Some(Kind::Directory) {
                    walk.hidden = only.components().count();
                    // So that an unreadable directory is an error, and not an empty listing.
                    walk.enter(only.clone());
                    if let Some(level) = walk.open.last_mut() {
                        level.names.begin(&*walk.store, only)?;
                    }
                    return Ok(walk);
                }
            }
            _ => {}
        }
        walk.paths = paths.into_iter();
        Ok(walk)
    }

    fn enter(&mut self, path: RelativePath) {
        let outer = self.open.iter_mut().map(|level| &mut level.names);
        SortedNames::make_room(outer, &self.memory);
        let outer = self.open.iter().filter_map(|level| level.held.as_ref());
        let cost = LEVEL_OVERHEAD + path.as_bytes().len();
        let held = self.memory.hold_level(cost, outer);
        self.open.push(Level {
            names: SortedNames::unread(&self.memory),
            held,
            path,
        });
    }

    /// Takes the next name of the innermost directory.
    fn next_name(&mut self) -> Result<Option<Box<[u8]>>, Reason> {
        let Some(level) = self.open.last_mut() else {
            return Ok(None);
        };
        if level.held.is_none() {
            let text = "it is not listed, because this connection keeps too much memory; list fewer at the same time";
            return Err(Reason::new(Code::Busy, format!("{}: {text}", level.path)));
        }
        level.names.next(&*self.store, &level.path)
    }

    /// Reads an entry; `None` if it no longer exists.
    fn read_entry(&mut self, path: RelativePath) -> Option<ListingItem> {
        let shown = path.components().skip(self.hidden);
        let shown = Components(shown.map(<[u8]>::to_vec).collect());
        let metadata = match self.store.stat(&path) {
            Ok(Some(metadata)) => metadata,
            Ok(None) => return None,
            Err(why) => return Some(Err((path, why))),
        };
        let target = match metadata.kind {
            Some(Kind::Symlink) => match self.store.read_link(&path) {
                Ok(target) => Some(target),
                Err(why) => return Some(Err((path, why))),
            },
            _ => None,
        };
        if self.recursive && metadata.kind == Some(Kind::Directory) {
            self.enter(path);
        }
        let modified = Some(metadata.modified);
        let mode = Some(metadata.mode);
        let size = (metadata.kind == Some(Kind::File)).then_some(metadata.size);
        Some(Ok(Listed {
            path: shown,
            kind: metadata.kind,
            size,
            modified,
            mode,
            target,
        }))
    }
}

impl Iterator for ListingWalk {
    type Item = ListingItem;

    fn next(&mut self) -> Option<ListingItem> {
        loop {
            let Some(level) = self.open.last() else {
                let path = self.paths.next()?;
                match self.read_entry(path) {
                    None => continue,
                    found => return found,
                }
            };
            let directory = level.path.clone();
            match self.next_name() {
                Ok(Some(name)) => {
                    let path = match directory.join(&name) {
                        Ok(path) => path,
                        Err(bad) => {
                            let why =
                                Reason::new(Code::BadName, format!("{}: {bad}", printable(&name)));
                            return Some(Err((directory, why)));
                        }
                    };
                    if let found @ Some(_) = self.read_entry(path) {
                        return found;
                    }
                }
                Ok(None) => {
                    self.open.pop();
                }
                Err(why) => {
                    self.open.pop();
                    return Some(Err((directory, why)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::LocalStore;

    fn listed(walk: ListingWalk) -> Vec<String> {
        let shown = |listed: Listed| String::from_utf8(listed.path.0.join(&b"/"[..])).unwrap();
        walk.map(|found| shown(found.unwrap())).collect()
    }

    #[test]
    fn listings_are_sorted_and_complete_with_little_memory() {
        let root = tempfile::tempdir().unwrap();
        let mut names = Vec::new();
        // More than fits into the minimum memory of a directory.
        for i in 0..2_000 {
            let directory = format!("{}", i * 7 % 3);
            std::fs::create_dir_all(root.path().join(&directory)).unwrap();
            let name = format!("{directory}/{:04}", i * 31 % 2_000);
            std::fs::write(root.path().join(&name), b"").unwrap();
            names.extend([directory, name]);
        }
        names.sort();
        names.dedup();
        let store: Arc<dyn Store> = Arc::new(LocalStore::open(root.path()).unwrap());
        for memory in [4 << 20, 200_000, 1_000] {
            let root = RelativePath::root();
            let share = KeptShare::whole(memory);
            let walk = ListingWalk::begin(store.clone(), &root, true, share.clone()).unwrap();
            assert_eq!(listed(walk), names, "{memory}");
            assert_eq!(share.free(), memory);
        }
    }

    #[test]
    fn a_directory_beyond_the_memory_is_an_error_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        let deep = "d/".repeat(200);
        std::fs::create_dir_all(root.path().join(&deep)).unwrap();
        std::fs::write(root.path().join("e"), b"").unwrap();
        let store: Arc<dyn Store> = Arc::new(LocalStore::open(root.path()).unwrap());
        let share = KeptShare::whole(10_000);
        let walk = ListingWalk::begin(store, &RelativePath::root(), true, share).unwrap();
        let found: Vec<_> = walk.collect();
        let failed: Vec<_> = found
            .iter()
            .filter_map(|item| item.as_ref().err())
            .collect();
        assert_eq!(failed.len(), 1);
        assert!(
            failed[0].1.text.contains("too much memory"),
            "{}",
            failed[0].1
        );
        let last = found.last().unwrap().as_ref().unwrap();
        assert_eq!(last.path.0, [b"e"], "the rest is listed");
    }
}
