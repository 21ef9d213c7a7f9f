//! A mirror's last step: what stands at the destination and was not announced is removed.

use std::collections::HashSet;
use std::sync::Mutex;

use super::lock;
use crate::error::{Code, Result, Why};
use crate::path::RelativePath;
use crate::store::{Attributes, Store};
use crate::wire::{Delete, Kind, Time};

/// Entries that are remembered, at most: some 32 bytes each. A larger mirror removes nothing.
const MAX_ANNOUNCED: usize = 4 << 20;

/// What was announced, by digest: a path takes ten times that.
#[derive(Debug, Default)]
pub(super) struct Announced(Mutex<HashSet<[u8; 16]>>);

impl Announced {
    /// Remembers where an entry comes to stand.
    pub(super) fn insert(&self, path: &RelativePath) {
        let mut all = lock(&self.0);
        if all.len() <= MAX_ANNOUNCED {
            all.insert(short(path));
        }
    }

    fn contains(&self, path: &RelativePath) -> bool {
        lock(&self.0).contains(&short(path))
    }

    fn count(&self) -> usize {
        lock(&self.0).len()
    }
}

/// Half of BLAKE3: nobody finds two paths of the same, on purpose or by chance.
fn short(path: &RelativePath) -> [u8; 16] {
    let mut digest = [0; 16];
    digest.copy_from_slice(&blake3::hash(path.as_bytes()).as_bytes()[..16]);
    digest
}

/// What is removed, and how.
pub(super) struct Mirror<'a> {
    pub(super) store: &'a dyn Store,
    /// Everything is below this.
    pub(super) place: &'a RelativePath,
    pub(super) announced: &'a Announced,
    pub(super) delete: Delete,
    pub(super) dry_run: bool,
}

impl Mirror<'_> {
    /// Removes all that was not announced, or nothing; tells of each thing, as long as somebody listens. Returns how much went,
    /// and why not all of it. Directories keep their time. Blocks.
    pub(super) fn remove(&self, tell: impl FnMut(RelativePath) -> bool) -> (u64, Option<Why>) {
        match self.check().and_then(|()| self.remove_all(tell)) {
            Ok(removed) => removed,
            Err(why) => (0, Some(why)),
        }
    }

    /// Whether anything may be removed at all.
    fn check(&self) -> Result<(), Why> {
        if self.announced.count() > MAX_ANNOUNCED {
            return Err(Why::new(Code::TooMany, format!("over {MAX_ANNOUNCED} entries were announced")));
        }
        // The directory itself is one of them.
        if self.announced.count() <= 1 && self.delete.most.is_none() {
            let text = "the source is empty, so all would go; if that is meant, say --max-delete";
            return Err(Why::new(Code::TooMany, text));
        }
        let mut doomed = 0;
        self.walk(|_| {
            doomed += 1;
            Ok(true)
        })?;
        match self.delete.most {
            Some(most) if doomed > most => Err(Why::new(Code::TooMany, format!("{doomed} would go, and {most} may"))),
            _ => Ok(()),
        }
    }

    fn remove_all(&self, mut tell: impl FnMut(RelativePath) -> bool) -> Result<(u64, Option<Why>), Why> {
        let (mut removed, mut failed) = (0, None);
        let depth = self.place.components().count();
        self.walk(|path| {
            let gone = if self.dry_run { Ok(()) } else { self.store.remove(path) };
            match gone {
                Ok(()) => {
                    removed += 1;
                    let below = RelativePath::from_components(path.components().skip(depth))?;
                    if tell(below) { Ok(true) } else { Err(Code::Cancelled.into()) }
                }
                // Somebody else was faster.
                Err(why) if why.code == Code::NotFound => Ok(true),
                Err(why) => {
                    failed.get_or_insert(why);
                    Ok(false)
                }
            }
        })?;
        Ok((removed, failed))
    }

    /// Walks what was not announced, what is in a directory before the directory itself, without following links. `visit`
    /// says whether it is gone: a directory in which something stays is left out.
    fn walk(&self, mut visit: impl FnMut(&RelativePath) -> Result<bool, Why>) -> Result<(), Why> {
        let top = self.store.stat(self.place)?.map(|there| there.modified);
        let mut open = vec![self.level(self.place.clone(), top, false)?];
        while let Some(level) = open.last_mut() {
            let Some(name) = level.names.pop() else {
                let Some(level) = open.pop() else { break };
                let gone = level.doomed && !level.stays && visit(&level.path)?;
                if let Some(above) = open.last_mut().filter(|_| level.doomed) {
                    above.stays |= !gone;
                    above.changed |= gone;
                }
                if !gone {
                    self.restore(&level);
                }
                continue;
            };
            // A name that haul cannot have brought is not haul's to remove.
            let Ok(path) = level.path.join(&name) else {
                level.stays = true;
                continue;
            };
            let Some(there) = self.store.stat(&path)? else { continue };
            let doomed = level.doomed || !self.announced.contains(&path);
            match there.kind {
                Some(Kind::Directory) => open.push(self.level(path, Some(there.modified), doomed)?),
                _ if doomed => {
                    let gone = visit(&path)?;
                    level.stays |= !gone;
                    level.changed |= gone;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn level(&self, path: RelativePath, modified: Option<Time>, doomed: bool) -> Result<Level, Why> {
        let mut names = match self.store.names(&path) {
            Err(why) if why.code == Code::NotFound => Vec::new(),
            names => names?,
        };
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(Level { path, names, modified, doomed, stays: false, changed: false })
    }

    /// Gives a directory the time back that it had before something in it went. It is no loss if it cannot be.
    fn restore(&self, level: &Level) {
        if level.changed && !self.dry_run && !level.path.is_root() {
            let attributes = Attributes { modified: level.modified, ..Attributes::default() };
            if let Err(why) = self.store.set_attributes(&level.path, &attributes) {
                tracing::debug!(%why, "a directory has another time now");
            }
        }
    }
}

/// A directory that is being walked: what is left of its names, last first.
struct Level {
    path: RelativePath,
    names: Vec<Vec<u8>>,
    modified: Option<Time>,
    /// It was not announced itself.
    doomed: bool,
    /// Something in it stays that was not announced either.
    stays: bool,
    /// Something in it is gone.
    changed: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Claim, MemoryStore};
    use crate::wire::Durability;

    fn path(name: &str) -> RelativePath {
        RelativePath::from_components(name.split('/').filter(|c| !c.is_empty())).unwrap()
    }

    fn store(names: &[&str]) -> MemoryStore {
        let store = MemoryStore::new();
        for name in names {
            let claim = Claim { owner: [0; 32], size: 0, modified: None };
            store.create(&path(name), &claim).unwrap().commit(&Attributes::default(), Durability::Visible).unwrap();
        }
        store
    }

    fn remove(
        store: &MemoryStore,
        announced: &[&str],
        most: Option<u64>,
        dry_run: bool,
    ) -> (u64, Option<String>, Vec<String>) {
        let all = Announced::default();
        announced.iter().for_each(|name| all.insert(&path(name)));
        let mut told = Vec::new();
        let mirror = Mirror { store, place: &path("m"), announced: &all, delete: Delete { most }, dry_run };
        let (removed, why) = mirror.remove(|path| {
            told.push(path.to_string());
            true
        });
        (removed, why.map(|why| why.text), told)
    }

    #[test]
    fn what_was_not_announced_goes_children_first_and_nothing_beside_it() {
        let store = store(&["m/a", "m/old/x/y", "m/old/z", "m/sub/b", "m/sub/c", "other/d"]);
        store.make_symlink(&path("m/out"), b"../other", &Attributes::default()).unwrap();
        let announced = ["m", "m/a", "m/sub", "m/sub/b"];
        let expected = ["old/x/y", "old/x", "old/z", "old", "out", "sub/c"].map(String::from).to_vec();
        assert_eq!(remove(&store, &announced, None, true), (6, None, expected.clone()));
        assert!(store.stat(&path("m/old/x/y")).unwrap().is_some(), "a dry run removes nothing");
        let before = store.stat(&path("m/sub")).unwrap().unwrap().modified;
        assert_eq!(remove(&store, &announced, Some(6), false), (6, None, expected));
        assert_eq!(store.stat(&path("m/sub")).unwrap().unwrap().modified, before, "it keeps its time");
        let mut left = store.names(&path("m")).unwrap();
        left.sort();
        assert_eq!(left, [b"a".to_vec(), b"sub".to_vec()]);
        assert!(store.stat(&path("other/d")).unwrap().is_some(), "what a link points to stays");
        assert_eq!(remove(&store, &announced, None, false), (0, None, vec![]));
    }

    #[test]
    fn more_than_may_go_means_that_nothing_goes() {
        let store = store(&["m/a", "m/b", "m/c"]);
        let refused = (0, Some("2 would go, and 1 may".into()), vec![]);
        assert_eq!(remove(&store, &["m", "m/a"], Some(1), false), refused);
        assert_eq!(store.names(&path("m")).unwrap().len(), 3);
        assert_eq!(remove(&store, &["m", "m/a"], Some(2), false).0, 2);
    }

    #[test]
    fn an_empty_source_empties_nothing_unless_it_is_said() {
        let store = store(&["m/a"]);
        assert!(remove(&store, &["m"], None, false).1.unwrap().contains("--max-delete"));
        assert_eq!(remove(&store, &["m"], Some(10), false).0, 1);
    }

    #[test]
    fn a_directory_with_a_partial_in_it_stays_and_is_no_loss_of_the_rest() {
        let store = store(&["m/a", "m/old/b"]);
        let claim = Claim { owner: [0; 32], size: 5, modified: None };
        let mut upload = store.create(&path("m/old/c"), &claim).unwrap();
        upload.write_at(b"12", 0).unwrap();
        drop(upload);
        let (removed, why, told) = remove(&store, &["m", "m/a"], None, false);
        assert_eq!((removed, told), (1, vec!["old/b".to_owned()]));
        assert!(why.unwrap().starts_with("m/old: "), "it says which");
    }
}
