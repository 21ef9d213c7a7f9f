//! Listings of a store: complete, and with each directory sorted.
//!
//! If the names of a directory do not fit in memory, the first of them in order are kept, then the next ones. The
//! directory is read once for each such part.

use std::collections::BinaryHeap;
use std::sync::Arc;

use super::expand::{Expanded, expand};
use super::io_errors::refusal;
use super::store::Store;
use crate::error::text::printable;
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Components, Kind, Listed};

/// Memory for names, over all directories that a listing has open, in bytes. A directory of a million names is read
/// some 15 times.
const MEMORY_LIMIT: usize = 4 << 20;
/// Memory that a directory gets in any case, in bytes, at any depth.
const MIN_MEMORY: usize = 16 << 10;
/// Memory for a name beside its bytes.
const NAME_OVERHEAD: usize = 48;

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
    memory: usize,
}

/// A directory that is being listed.
struct Level {
    path: RelativePath,
    /// The next names, last first.
    names: Vec<Box<[u8]>>,
    /// The last name that was kept.
    after: Option<Box<[u8]>>,
    /// Whether more names may follow.
    more: bool,
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
    ) -> Result<Self, Reason> {
        let Expanded { paths, by_pattern } = expand(&*store, path, &mut Default::default())?;
        let mut walk = Self {
            store,
            paths: Vec::new().into_iter(),
            recursive,
            hidden: 0,
            open: Vec::new(),
            memory: MEMORY_LIMIT,
        };
        match paths.first() {
            Some(only) if !by_pattern => {
                let there = walk
                    .store
                    .stat(only)?
                    .ok_or_else(|| refusal(Code::NotFound, only))?;
                if there.kind == Some(Kind::Directory) {
                    walk.hidden = only.components().count();
                    walk.enter(only.clone());
                    // So that an unreadable directory is an error, and not an empty listing.
                    walk.read_names().map_err(|(_, why)| why)?;
                    return Ok(walk);
                }
            }
            _ => {}
        }
        walk.paths = paths.into_iter();
        Ok(walk)
    }

    fn enter(&mut self, path: RelativePath) {
        self.open.push(Level {
            path,
            names: Vec::new(),
            after: None,
            more: true,
        });
    }

    /// Reads the next names of the innermost directory, as many as fit in memory.
    fn read_names(&mut self) -> Result<(), (RelativePath, Reason)> {
        let Some(level) = self.open.last_mut() else {
            return Ok(());
        };
        let room = (self.memory / 2).max(MIN_MEMORY);
        let mut first = BinaryHeap::<Box<[u8]>>::new();
        let mut bytes = 0;
        let mut more = false;
        let read = self.store.visit(&level.path, &mut |name| {
            if level.after.as_deref().is_some_and(|after| name <= after) {
                return true;
            }
            if bytes + memory_cost(name) > room
                && first.peek().is_some_and(|greatest| **greatest < *name)
            {
                more = true;
                return true;
            }
            bytes += memory_cost(name);
            first.push(name.into());
            while bytes > room && first.len() > 1 {
                bytes -= first.pop().map_or(0, |greatest| memory_cost(&greatest));
                more = true;
            }
            true
        });
        let path = level.path.clone();
        level.names = first.into_sorted_vec();
        level.names.reverse();
        level.after = level.names.first().cloned();
        level.more = more;
        self.memory = self.memory.saturating_sub(bytes);
        read.map_err(|why| (path, why))
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

fn memory_cost(name: &[u8]) -> usize {
    name.len() + NAME_OVERHEAD
}

impl Iterator for ListingWalk {
    type Item = ListingItem;

    fn next(&mut self) -> Option<ListingItem> {
        loop {
            let Some(level) = self.open.last_mut() else {
                let path = self.paths.next()?;
                match self.read_entry(path) {
                    None => continue,
                    found => return found,
                }
            };
            match level.names.pop() {
                Some(name) => {
                    self.memory = (self.memory + memory_cost(&name)).min(MEMORY_LIMIT);
                    let path = match level.path.join(&name) {
                        Ok(path) => path,
                        Err(bad) => {
                            let why =
                                Reason::new(Code::BadName, format!("{}: {bad}", printable(&name)));
                            return Some(Err((level.path.clone(), why)));
                        }
                    };
                    if let found @ Some(_) = self.read_entry(path) {
                        return found;
                    }
                }
                None if level.more => {
                    if let Err(failed) = self.read_names() {
                        if let Some(level) = self.open.last_mut() {
                            level.more = false;
                        }
                        return Some(Err(failed));
                    }
                }
                None => drop(self.open.pop()),
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
        for memory in [MEMORY_LIMIT, 50_000, 0] {
            let mut walk = ListingWalk::begin(store.clone(), &RelativePath::root(), true).unwrap();
            walk.memory = memory;
            // Drops the names that were read with full memory.
            walk.open.clear();
            walk.enter(RelativePath::root());
            assert_eq!(listed(walk), names, "{memory}");
        }
    }
}
