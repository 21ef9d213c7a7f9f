//! A mirror's last step: what stands at the destination and was not announced is removed.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::name_collisions::NameCollisions;
use super::{Placement, Receiver, lock};
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Delete, Kind, ReceiveOptions, Time};
use crate::storage::filter::Filter;
use crate::storage::walk::gitignore::{Scope, excludes};
use crate::storage::{Attributes, Store};

/// Entries that are remembered, at most: some 32 bytes each. A larger mirror removes nothing.
const MAX_ANNOUNCED: usize = 4 << 20;

/// Paths that are remembered to tell of them; what has gone beyond is counted only.
const MAX_TOLD: usize = 1 << 14;

/// What was announced, by digest: a path takes ten times that.
#[derive(Debug, Default)]
pub(super) struct Announced {
    entries: Mutex<HashSet<[u8; 16]>>,
    /// Where the source has a FIFO, socket or device, which is never sent, or had something that has vanished: what stands
    /// there is left as it is.
    omitted: Mutex<HashSet<[u8; 16]>>,
    /// How many entries have failed, and so may not be there.
    failed: AtomicU64,
}

impl Announced {
    /// Remembers where an entry comes to stand.
    pub(super) fn insert(&self, path: &RelativePath) {
        remember(&self.entries, path);
    }

    /// Remembers where the source has what is not sent. It counts for nothing: a source of only such is empty.
    pub(super) fn insert_omitted(&self, path: &RelativePath) {
        remember(&self.omitted, path);
    }

    /// Remembers that one of the entries has failed.
    pub(super) fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    fn contains(&self, path: &RelativePath) -> bool {
        lock(&self.entries).contains(&short(path))
    }

    fn is_omitted(&self, path: &RelativePath) -> bool {
        lock(&self.omitted).contains(&short(path))
    }

    fn count(&self) -> usize {
        lock(&self.entries).len()
    }

    /// Whether there was more than is remembered.
    fn overflows(&self) -> bool {
        self.count() > MAX_ANNOUNCED || lock(&self.omitted).len() > MAX_ANNOUNCED
    }
}

fn remember(all: &Mutex<HashSet<[u8; 16]>>, path: &RelativePath) {
    let mut all = lock(all);
    if all.len() <= MAX_ANNOUNCED {
        all.insert(short(path));
    }
}

/// Half of BLAKE3: nobody finds two paths of the same, on purpose or by chance.
fn short(path: &RelativePath) -> [u8; 16] {
    let mut digest = [0; 16];
    digest.copy_from_slice(&blake3::hash(path.as_bytes()).as_bytes()[..16]);
    digest
}

/// What has gone before the end, from directories that stood where files and links were to come.
#[derive(Debug, Default)]
pub(super) struct Cleared(Mutex<(u64, Vec<RelativePath>)>);

/// What is removed, and how.
pub(super) struct Mirror<'a> {
    pub(super) store: &'a dyn Store,
    /// Everything is below this.
    pub(super) place: &'a RelativePath,
    pub(super) announced: &'a Announced,
    /// Names that are the same at the destination.
    pub(super) cases: &'a NameCollisions,
    /// What stays though it was not announced.
    pub(super) spared: &'a Filter,
    pub(super) cleared: &'a Cleared,
    pub(super) delete: Delete,
    pub(super) dry_run: bool,
}

impl Receiver {
    /// What this session mirrors, if it does.
    pub(super) fn mirror_plan(&self) -> Option<Mirror<'_>> {
        let (Placement::Into(place) | Placement::As(place)) = &self.session.place;
        let ReceiveOptions {
            delete, dry_run, ..
        } = self.session.take;
        let store = &*self.session.store;
        let spared = &self.session.spared;
        let announced = &self.announced;
        let cleared = &self.cleared;
        let cases = &self.cases;
        delete.map(|delete| Mirror {
            store,
            place,
            announced,
            cases,
            spared,
            cleared,
            delete,
            dry_run,
        })
    }

    /// A mirror that replaces what is of another kind. Nothing else does that.
    fn replacing_mirror(&self) -> Option<Mirror<'_>> {
        self.mirror_plan()
            .filter(|_| self.replaces() && !self.session.take.dry_run)
    }

    /// Removes what stands where a mirror's entry of another kind comes: to be called when its content is whole, right
    /// before it is committed. Blocks.
    pub(super) fn make_room(&self, path: &RelativePath, kind: Kind) -> Result<(), Reason> {
        self.clear_path_above(path)?;
        match self.replacing_mirror() {
            Some(mirror) if kind == Kind::Directory => mirror.make_way(path),
            Some(mirror) => mirror.clear(path),
            None => Ok(()),
        }
    }

    /// Removes what stands in the place of the directories above a mirror's entry, so that its partial can be made. Blocks.
    pub(super) fn clear_path_above(&self, path: &RelativePath) -> Result<(), Reason> {
        let Some(mirror) = self.replacing_mirror() else {
            return Ok(());
        };
        let mut above = RelativePath::default();
        for (depth, name) in path.components().enumerate() {
            if depth > mirror.place.components().count() {
                mirror.make_way(&above)?;
            }
            above = above.join(name)?;
        }
        Ok(())
    }
}

impl Mirror<'_> {
    /// Removes all that was not announced, or nothing if not all of the source `is_whole`; tells of each thing, as long as
    /// somebody listens. Returns how much went, and why not all of it. Directories keep their time. Blocks.
    pub(super) fn remove(
        &self,
        is_whole: bool,
        mut tell: impl FnMut(RelativePath) -> bool,
    ) -> (u64, Option<Reason>) {
        let (cleared, paths) = std::mem::take(&mut *lock(&self.cleared.0));
        let heard = paths.into_iter().all(&mut tell);
        let whole = match (is_whole, heard) {
            (true, true) => Ok(()),
            (true, false) => Err(Code::Cancelled.into()),
            (false, _) => Err(Reason::new(
                Code::Cancelled,
                "not everything was there to compare with, or has arrived",
            )),
        };
        match whole
            .and_then(|()| self.check(cleared))
            .and_then(|()| self.remove_all(cleared, tell))
        {
            Ok((removed, why)) => (cleared + removed, why),
            Err(why) => (cleared, Some(why)),
        }
    }

    /// Whether anything may be removed at all, after so many.
    fn check(&self, cleared: u64) -> Result<(), Reason> {
        if self.announced.overflows() {
            return Err(Reason::new(
                Code::TooMany,
                format!("over {MAX_ANNOUNCED} entries were announced"),
            ));
        }
        // The directory itself is one of them.
        if self.announced.count() <= 1 && self.delete.most.is_none() {
            let text = "the source is empty, so all would go; if that is meant, say --max-delete";
            return Err(Reason::new(Code::TooMany, text));
        }
        if self.cases.overflows() {
            let text = "more names were announced than can be told apart on its filesystem";
            return Err(Reason::new(Code::TooMany, text));
        }
        let (count, found) = self.count(self.place, false)?;
        self.check_found(found)?;
        self.may_go(cleared + count)
    }

    /// Whether all that was announced is among what was found. Where it is not, the file system may keep it under names that
    /// nobody can foresee, and what seems to be left over may be it.
    fn check_found(&self, found: u64) -> Result<(), Reason> {
        let failed = self.announced.failed.load(Ordering::Relaxed);
        let missing = (self.announced.count() as u64).saturating_sub(failed + found);
        if missing == 0 || self.dry_run {
            return Ok(());
        }
        let text = format!(
            "{missing} of the entries that have arrived are not found there under their names"
        );
        Err(Reason::new(Code::Cancelled, text))
    }

    /// Whether what is found by a path was announced, by this name or by one that is the same there.
    fn is_announced(&self, path: &RelativePath) -> bool {
        self.announced.contains(path) || self.cases.is_other_name(path)
    }

    /// Whether so many may go in all.
    fn may_go(&self, count: u64) -> Result<(), Reason> {
        match self.delete.most {
            Some(most) if count > most => Err(Reason::new(
                Code::TooMany,
                format!("{count} would go, and {most} may"),
            )),
            _ => Ok(()),
        }
    }

    /// How many would go, and how many of the announced are there.
    fn count(&self, root: &RelativePath, doomed: bool) -> Result<(u64, u64), Reason> {
        let mut count = 0;
        let found = self.walk(root, doomed, |path| {
            count += u64::from(path != root);
            Ok(true)
        })?;
        Ok((count, found))
    }

    fn remove_all(
        &self,
        cleared: u64,
        mut tell: impl FnMut(RelativePath) -> bool,
    ) -> Result<(u64, Option<Reason>), Reason> {
        let mut removed = 0;
        let mut failed = None;
        self.walk(self.place, false, |path| {
            // Something may have come since it was counted.
            if let Err(why) = self.may_go(cleared + removed + 1) {
                failed.get_or_insert(why);
                return Ok(false);
            }
            let gone = if self.dry_run {
                Ok(())
            } else {
                self.store.remove(path)
            };
            match gone {
                Ok(()) => {
                    removed += 1;
                    if tell(self.below(path)?) {
                        Ok(true)
                    } else {
                        Err(Code::Cancelled.into())
                    }
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

    fn below(&self, path: &RelativePath) -> Result<RelativePath, Reason> {
        Ok(RelativePath::from_components(
            path.components().skip(self.place.components().count()),
        )?)
    }

    /// Removes what stands in the place of a directory.
    fn make_way(&self, path: &RelativePath) -> Result<(), Reason> {
        let stands = || {
            Ok::<_, Reason>(
                self.store
                    .stat(path)?
                    .is_some_and(|there| there.kind != Some(Kind::Directory)),
            )
        };
        if !stands()? {
            return Ok(());
        }
        // One at a time, so that none removes what another has made there meanwhile.
        let _cleared = lock(&self.cleared.0);
        if stands()? {
            self.store.remove(path)
        } else {
            Ok(())
        }
    }

    /// Removes a directory, with all that is in it, if one stands there: all of it, or nothing if any of it is spared or it
    /// is too much. What is in it counts among what has gone.
    fn clear(&self, path: &RelativePath) -> Result<(), Reason> {
        let is_directory = || {
            Ok::<_, Reason>(
                self.store
                    .stat(path)?
                    .is_some_and(|there| there.kind == Some(Kind::Directory)),
            )
        };
        // One at a time, so that together they stay within the maximum.
        let mut cleared = lock(&self.cleared.0);
        if !is_directory()? {
            return Ok(());
        }
        let mut count = 0;
        let mut all = false;
        self.walk(path, true, |gone| {
            // It comes last, and not if anything in it stays.
            all |= gone == path;
            count += u64::from(gone != path);
            Ok(true)
        })?;
        let spared = || {
            Reason::new(
                Code::IsDirectory,
                format!("{path} is a directory there with something that is spared"),
            )
        };
        if !all {
            return Err(spared());
        }
        let within = |count| {
            let too_many =
                |why: Reason| Reason::new(why.code, format!("{path} is a directory there: {why}"));
            self.may_go(count).map_err(too_many)
        };
        within(cleared.0 + count)?;
        self.walk(path, true, |gone| {
            if gone == path {
                return self.store.remove(gone).map(|()| true);
            }
            // Something may have come since it was counted.
            within(cleared.0 + 1)?;
            self.store.remove(gone)?;
            cleared.0 += 1;
            if cleared.1.len() < MAX_TOLD {
                cleared.1.push(self.below(gone)?);
            }
            Ok(true)
        })?;
        if is_directory()? {
            Err(spared())
        } else {
            Ok(())
        }
    }

    /// Walks what was not announced, what is in a directory before the directory itself, without following links. `visit`
    /// says whether it is gone: a directory in which something stays is left out. Returns how many of the announced are there.
    fn walk(
        &self,
        root: &RelativePath,
        doomed: bool,
        mut visit: impl FnMut(&RelativePath) -> Result<bool, Reason>,
    ) -> Result<u64, Reason> {
        let top = self.store.stat(root)?.map(|there| there.modified);
        let mut found = u64::from(top.is_some() && self.is_announced(root));
        let mut open = vec![self.level(root.clone(), top, doomed, self.scope_above(root)?)?];
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
            if self.announced.is_omitted(&path) {
                level.stays = true;
                continue;
            }
            let Some(there) = self.store.stat(&path)? else {
                continue;
            };
            let announced = self.is_announced(&path);
            found += u64::from(announced);
            let doomed = level.doomed || !announced;
            let directory = there.kind == Some(Kind::Directory);
            if doomed
                && excludes(
                    self.spared,
                    level.scope.as_deref(),
                    self.place,
                    &path,
                    directory,
                )
            {
                level.stays = true;
                continue;
            }
            match there.kind {
                Some(Kind::Directory) => {
                    let scope = level.scope.clone();
                    open.push(self.level(path, Some(there.modified), doomed, scope)?);
                }
                _ if doomed => {
                    let gone = visit(&path)?;
                    level.stays |= !gone;
                    level.changed |= gone;
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// The rules of .gitignore files that hold around a directory. They stand there as they do at the source.
    fn scope_above(&self, directory: &RelativePath) -> Result<Option<Arc<Scope>>, Reason> {
        let mut scope = None;
        let mut above = RelativePath::default();
        for (depth, name) in directory.components().enumerate() {
            if self.spared.gitignore && depth >= self.place.components().count() {
                scope = Scope::of(self.store, &above, &above, scope)?;
            }
            above = above.join(name)?;
        }
        Ok(scope)
    }

    fn level(
        &self,
        path: RelativePath,
        modified: Option<Time>,
        doomed: bool,
        above: Option<Arc<Scope>>,
    ) -> Result<Level, Reason> {
        let scope = if self.spared.gitignore {
            Scope::of(self.store, &path, &path, above)?
        } else {
            None
        };
        let mut names = match self.store.names(&path) {
            Err(why) if why.code == Code::NotFound => Vec::new(),
            names => names?,
        };
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(Level {
            path,
            names,
            modified,
            doomed,
            scope,
            stays: false,
            changed: false,
        })
    }

    /// Gives a directory the time back that it had before something in it went. It is no loss if it cannot be.
    fn restore(&self, level: &Level) {
        if level.changed && !self.dry_run && !level.path.is_root() {
            let attributes = Attributes {
                modified: level.modified,
                ..Attributes::default()
            };
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
    scope: Option<Arc<Scope>>,
    /// Something in it stays that was not announced either.
    stays: bool,
    /// Something in it is gone.
    changed: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Durability;
    use crate::storage::{MemoryStore, PartialKey};

    fn path(name: &str) -> RelativePath {
        RelativePath::from_components(name.split('/').filter(|c| !c.is_empty())).unwrap()
    }

    fn store(names: &[&str]) -> MemoryStore {
        let store = MemoryStore::new();
        for name in names {
            let claim = PartialKey {
                owner: [0; 32],
                size: 0,
                modified: None,
            };
            store
                .create(&path(name), &claim)
                .unwrap()
                .commit(&Attributes::default(), Durability::Visible)
                .unwrap();
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
        let place = path("m");
        let spared = Filter::default();
        let cleared = Cleared::default();
        let cases = NameCollisions::default();
        let delete = Delete { most };
        let announced = &all;
        let mirror = Mirror {
            store,
            place: &place,
            announced,
            cases: &cases,
            spared: &spared,
            cleared: &cleared,
            delete,
            dry_run,
        };
        let (removed, why) = mirror.remove(true, |path| {
            told.push(path.to_string());
            true
        });
        (removed, why.map(|why| why.to_string()), told)
    }

    #[test]
    fn what_was_not_announced_goes_children_first_and_nothing_beside_it() {
        let store = store(&[
            "m/a",
            "m/old/x/y",
            "m/old/z",
            "m/sub/b",
            "m/sub/c",
            "other/d",
        ]);
        store
            .make_symlink(&path("m/out"), b"../other", &Attributes::default())
            .unwrap();
        let announced = ["m", "m/a", "m/sub", "m/sub/b"];
        let expected = ["old/x/y", "old/x", "old/z", "old", "out", "sub/c"]
            .map(String::from)
            .to_vec();
        assert_eq!(
            remove(&store, &announced, None, true),
            (6, None, expected.clone())
        );
        assert!(
            store.stat(&path("m/old/x/y")).unwrap().is_some(),
            "a dry run removes nothing"
        );
        let before = store.stat(&path("m/sub")).unwrap().unwrap().modified;
        assert_eq!(
            remove(&store, &announced, Some(6), false),
            (6, None, expected)
        );
        assert_eq!(
            store.stat(&path("m/sub")).unwrap().unwrap().modified,
            before,
            "it keeps its time"
        );
        let mut left = store.names(&path("m")).unwrap();
        left.sort();
        assert_eq!(left, [b"a".to_vec(), b"sub".to_vec()]);
        assert!(
            store.stat(&path("other/d")).unwrap().is_some(),
            "what a link points to stays"
        );
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
    fn nothing_goes_where_what_arrived_has_another_name() {
        let store = store(&["m/a", "m/stored-otherwise"]);
        let (removed, why, _) = remove(&store, &["m", "m/a", "m/sent"], None, false);
        assert_eq!(removed, 0);
        assert!(why.unwrap().starts_with("1 of the entries"));
        assert_eq!(remove(&store, &["m", "m/a", "m/sent"], None, true).0, 1);
    }

    #[test]
    fn an_empty_source_empties_nothing_unless_it_is_said() {
        let store = store(&["m/a"]);
        assert!(
            remove(&store, &["m"], None, false)
                .1
                .unwrap()
                .contains("--max-delete")
        );
        assert_eq!(remove(&store, &["m"], Some(10), false).0, 1);
    }

    #[test]
    fn a_directory_with_a_partial_in_it_stays_and_is_no_loss_of_the_rest() {
        let store = store(&["m/a", "m/old/b"]);
        let claim = PartialKey {
            owner: [0; 32],
            size: 5,
            modified: None,
        };
        let mut upload = store.create(&path("m/old/c"), &claim).unwrap();
        upload.write_at(b"12", 0).unwrap();
        drop(upload);
        let (removed, why, told) = remove(&store, &["m", "m/a"], None, false);
        assert_eq!((removed, told), (1, vec!["old/b".to_owned()]));
        assert!(why.unwrap().starts_with("m/old: "), "it says which");
    }

    #[test]
    fn directories_cleared_at_once_stay_within_the_maximum_together() {
        // A race: once is not enough to see it lost.
        for _ in 0..20 {
            let names: Vec<_> = (0..8)
                .flat_map(|n| ["a", "b", "c"].map(|name| format!("m/{n}/{name}")))
                .collect();
            let store = store(&names.iter().map(String::as_str).collect::<Vec<_>>());
            let place = path("m");
            let spared = Filter::default();
            let cleared = Cleared::default();
            let announced = Announced::default();
            let delete = Delete { most: Some(7) };
            let cases = NameCollisions::default();
            let mirror = Mirror {
                store: &store,
                place: &place,
                announced: &announced,
                cases: &cases,
                spared: &spared,
                cleared: &cleared,
                delete,
                dry_run: false,
            };
            let begin = std::sync::Barrier::new(8);
            std::thread::scope(|scope| {
                for n in 0..8 {
                    let mirror = &mirror;
                    let begin = &begin;
                    scope.spawn(move || {
                        begin.wait();
                        mirror.clear(&path(&format!("m/{n}")))
                    });
                }
            });
            let left = (0..8)
                .filter(|n| store.stat(&path(&format!("m/{n}"))).unwrap().is_some())
                .count();
            assert_eq!(
                left, 6,
                "two of three things each may go, and a third of its own not"
            );
        }
    }
}
