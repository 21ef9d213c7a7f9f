//! The last step of a mirror: removes the paths at the destination that were not announced.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::name_collisions::NameCollisions;
use super::tasks::lock;
use super::{Placement, Receiver};
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Delete, Kind, ReceiveOptions, Time};
use crate::storage::filter::Filter;
use crate::storage::walk::gitignore::{Scope, excludes};
use crate::storage::{Attributes, Store};

/// Most announced entries that are remembered, at 32 bytes each. A larger mirror removes nothing.
const MAX_ANNOUNCED: usize = 4 << 20;

/// Most cleared paths that are reported by name. Others are only counted.
const MAX_TOLD: usize = 1 << 14;

/// Digests of the announced paths. The paths themselves would take ten times the memory.
#[derive(Debug, Default)]
pub(super) struct Announced {
    entries: Mutex<HashSet<[u8; 16]>>,
    /// Paths of omitted sources: FIFOs, sockets and devices, which are never sent, and files that vanished. Existing
    /// files with these paths stay.
    omitted: Mutex<HashSet<[u8; 16]>>,
    /// The number of failed entries, which may be missing at the destination.
    failed: AtomicU64,
}

impl Announced {
    /// Records the destination path of an entry.
    pub(super) fn insert(&self, path: &RelativePath) {
        remember(&self.entries, path);
    }

    /// Records the path of an omitted source. It does not count as an entry: a source with only omitted files is
    /// empty.
    pub(super) fn insert_omitted(&self, path: &RelativePath) {
        remember(&self.omitted, path);
    }

    /// Counts a failed entry.
    pub(super) fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    fn contains(&self, path: &RelativePath) -> bool {
        lock(&self.entries).contains(&path_digest(path))
    }

    fn is_omitted(&self, path: &RelativePath) -> bool {
        lock(&self.omitted).contains(&path_digest(path))
    }

    fn count(&self) -> usize {
        lock(&self.entries).len()
    }

    /// Returns whether more was announced than can be remembered.
    fn overflows(&self) -> bool {
        self.count() > MAX_ANNOUNCED || lock(&self.omitted).len() > MAX_ANNOUNCED
    }
}

fn remember(all: &Mutex<HashSet<[u8; 16]>>, path: &RelativePath) {
    let mut all = lock(all);
    if all.len() <= MAX_ANNOUNCED {
        all.insert(path_digest(path));
    }
}

/// Returns the first half of a BLAKE3 digest. Collisions are infeasible.
fn path_digest(path: &RelativePath) -> [u8; 16] {
    let mut digest = [0; 16];
    digest.copy_from_slice(&blake3::hash(path.as_bytes()).as_bytes()[..16]);
    digest
}

/// Paths removed before the last step, from directories in the place of announced files and links: their number and
/// names.
#[derive(Debug, Default)]
pub(super) struct Cleared(Mutex<(u64, Vec<RelativePath>)>);

/// A mirror: the rules of what it removes.
pub(super) struct Mirror<'a> {
    pub(super) store: &'a dyn Store,
    /// The destination; nothing outside of it is removed.
    pub(super) place: &'a RelativePath,
    pub(super) announced: &'a Announced,
    /// Detects other spellings of announced names.
    pub(super) cases: &'a NameCollisions,
    /// Rules for paths that stay though they were not announced.
    pub(super) spared: &'a Filter,
    pub(super) cleared: &'a Cleared,
    pub(super) delete: Delete,
    pub(super) dry_run: bool,
}

impl Receiver {
    /// Returns the mirror of this session, if it is one.
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

    /// Returns the mirror if it replaces entries of another kind. Nothing else does that.
    fn replacing_mirror(&self) -> Option<Mirror<'_>> {
        self.mirror_plan()
            .filter(|_| self.replaces() && !self.session.take.dry_run)
    }

    /// Removes an entry of another kind in the place of a mirror's entry. Call it when the new content is complete,
    /// directly before the commit. Blocks.
    pub(super) fn make_room(&self, path: &RelativePath, kind: Kind) -> Result<(), Reason> {
        self.clear_path_above(path)?;
        match self.replacing_mirror() {
            Some(mirror) if kind == Kind::Directory => mirror.clear_non_directory(path),
            Some(mirror) => mirror.clear_directory(path),
            None => Ok(()),
        }
    }

    /// Removes files and links in the place of parent directories of a mirror's entry, so that its partial can be
    /// made. Blocks.
    pub(super) fn clear_path_above(&self, path: &RelativePath) -> Result<(), Reason> {
        let Some(mirror) = self.replacing_mirror() else {
            return Ok(());
        };
        let mut above = RelativePath::default();
        for (depth, name) in path.components().enumerate() {
            if depth > mirror.place.components().count() {
                mirror.clear_non_directory(&above)?;
            }
            above = above.join(name)?;
        }
        Ok(())
    }
}

impl Mirror<'_> {
    /// Removes all unannounced paths, or none if `is_whole` is false. Reports each path to `tell` and stops when that
    /// returns `false`. Returns the number of removed paths, and the reason if some stayed. Directories keep their
    /// time. Blocks.
    pub(super) fn remove(
        &self,
        is_whole: bool,
        mut tell: impl FnMut(RelativePath) -> bool,
    ) -> (u64, Option<Reason>) {
        let (cleared, paths) = std::mem::take(&mut *lock(&self.cleared.0));
        let all_reported = paths.into_iter().all(&mut tell);
        let whole = match (is_whole, all_reported) {
            (true, true) => Ok(()),
            (true, false) => Err(Code::Cancelled.into()),
            (false, _) => Err(Reason::new(
                Code::Cancelled,
                "some entries failed or did not arrive",
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

    /// Checks that removal is safe, given the number of paths removed so far.
    fn check(&self, cleared: u64) -> Result<(), Reason> {
        if self.announced.overflows() {
            return Err(Reason::new(
                Code::TooMany,
                format!("a mirror of over {MAX_ANNOUNCED} entries removes nothing"),
            ));
        }
        // The directory itself counts as one entry.
        if self.announced.count() <= 1 && self.delete.most.is_none() {
            let text = "the source is empty and everything would be removed; to allow it, use --max-delete";
            return Err(Reason::new(Code::TooMany, text));
        }
        if self.cases.overflows() {
            let text = "too many names for a file system that treats different names as equal";
            return Err(Reason::new(Code::TooMany, text));
        }
        let (count, found) = self.count(self.place, false)?;
        self.check_found(found)?;
        self.check_maximum(cleared + count)
    }

    /// Checks that all announced entries exist. If some are missing, the file system may store them under other names,
    /// and a seemingly unannounced path may be one of them.
    fn check_found(&self, found: u64) -> Result<(), Reason> {
        let failed = self.announced.failed.load(Ordering::Relaxed);
        let missing = (self.announced.count() as u64).saturating_sub(failed + found);
        if missing == 0 || self.dry_run {
            return Ok(());
        }
        let text = format!("{missing} of the received entries cannot be found under their names");
        Err(Reason::new(Code::Cancelled, text))
    }

    /// Returns whether a path was announced, under this name or an equal one.
    fn is_announced(&self, path: &RelativePath) -> bool {
        self.announced.contains(path) || self.cases.is_other_name(path)
    }

    /// Checks a number of removals against `--max-delete`.
    fn check_maximum(&self, count: u64) -> Result<(), Reason> {
        match self.delete.most {
            Some(most) if count > most => Err(Reason::new(
                Code::TooMany,
                format!("{count} to remove, and --max-delete allows {most}"),
            )),
            _ => Ok(()),
        }
    }

    /// Counts the paths to remove and the announced paths that exist.
    fn count(&self, root: &RelativePath, unannounced: bool) -> Result<(u64, u64), Reason> {
        let mut count = 0;
        let found = self.walk(root, unannounced, |path| {
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
            // New files may have appeared since the count.
            if let Err(why) = self.check_maximum(cleared + removed + 1) {
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
                // Another process removed it first.
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

    /// Removes a file or link in the place of a directory.
    fn clear_non_directory(&self, path: &RelativePath) -> Result<(), Reason> {
        let is_obstructed = || {
            Ok::<_, Reason>(
                self.store
                    .stat(path)?
                    .is_some_and(|there| there.kind != Some(Kind::Directory)),
            )
        };
        if !is_obstructed()? {
            return Ok(());
        }
        // One at a time, so that one task does not remove what another has just made.
        let _cleared = lock(&self.cleared.0);
        if is_obstructed()? {
            self.store.remove(path)
        } else {
            Ok(())
        }
    }

    /// Removes an existing directory and its content, or nothing if a part is spared or the limit is exceeded. Its
    /// content counts as removed.
    fn clear_directory(&self, path: &RelativePath) -> Result<(), Reason> {
        let is_directory = || {
            Ok::<_, Reason>(
                self.store
                    .stat(path)?
                    .is_some_and(|there| there.kind == Some(Kind::Directory)),
            )
        };
        // One at a time, so that all together stay within the maximum.
        let mut cleared = lock(&self.cleared.0);
        if !is_directory()? {
            return Ok(());
        }
        let mut count = 0;
        let mut all = false;
        self.walk(path, true, |gone| {
            // The directory is visited last, and only if all its content can be removed.
            all |= gone == path;
            count += u64::from(gone != path);
            Ok(true)
        })?;
        let spared = || {
            Reason::new(
                Code::IsDirectory,
                format!("cannot replace directory {path}: it holds files that must stay"),
            )
        };
        if !all {
            return Err(spared());
        }
        let within = |count| {
            let too_many = |why: Reason| {
                Reason::new(why.code, format!("cannot replace directory {path}: {why}"))
            };
            self.check_maximum(count).map_err(too_many)
        };
        within(cleared.0 + count)?;
        self.walk(path, true, |gone| {
            if gone == path {
                return self.store.remove(gone).map(|()| true);
            }
            // New files may have appeared since the count.
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

    /// Walks unannounced paths, the content of a directory before the directory, without following links. `visit`
    /// returns whether the path is gone; a directory with remaining content is not visited. Returns the number of
    /// announced paths that exist.
    fn walk(
        &self,
        root: &RelativePath,
        unannounced: bool,
        mut visit: impl FnMut(&RelativePath) -> Result<bool, Reason>,
    ) -> Result<u64, Reason> {
        let top = self.store.stat(root)?.map(|there| there.modified);
        let mut found = u64::from(top.is_some() && self.is_announced(root));
        let mut open = vec![self.level(root.clone(), top, unannounced, self.scope_above(root)?)?];
        while let Some(level) = open.last_mut() {
            let Some(name) = level.names.pop() else {
                let Some(level) = open.pop() else { break };
                let gone = level.unannounced && !level.keeps_content && visit(&level.path)?;
                if let Some(above) = open.last_mut().filter(|_| level.unannounced) {
                    above.keeps_content |= !gone;
                    above.changed |= gone;
                }
                if !gone {
                    self.restore(&level);
                }
                continue;
            };
            // haul cannot have written this name, so it does not remove it.
            let Ok(path) = level.path.join(&name) else {
                level.keeps_content = true;
                continue;
            };
            if self.announced.is_omitted(&path) {
                level.keeps_content = true;
                continue;
            }
            let Some(there) = self.store.stat(&path)? else {
                continue;
            };
            let announced = self.is_announced(&path);
            found += u64::from(announced);
            let unannounced = level.unannounced || !announced;
            let directory = there.kind == Some(Kind::Directory);
            if unannounced
                && excludes(
                    self.spared,
                    level.scope.as_deref(),
                    self.place,
                    &path,
                    directory,
                )
            {
                level.keeps_content = true;
                continue;
            }
            match there.kind {
                Some(Kind::Directory) => {
                    let scope = level.scope.clone();
                    open.push(self.level(path, Some(there.modified), unannounced, scope)?);
                }
                _ if unannounced => {
                    let gone = visit(&path)?;
                    level.keeps_content |= !gone;
                    level.changed |= gone;
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// Returns the rules of .gitignore files that apply to a directory. They apply at the destination as at the
    /// source.
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
        unannounced: bool,
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
            unannounced,
            scope,
            keeps_content: false,
            changed: false,
        })
    }

    /// Restores the time of a directory after a removal in it. Failure is harmless.
    fn restore(&self, level: &Level) {
        if level.changed && !self.dry_run && !level.path.is_root() {
            let attributes = Attributes {
                modified: level.modified,
                ..Attributes::default()
            };
            if let Err(why) = self.store.set_attributes(&level.path, &attributes) {
                tracing::debug!(%why, "cannot restore the time of a directory");
            }
        }
    }
}

/// A directory in the walk, with its remaining names in descending order.
struct Level {
    path: RelativePath,
    names: Vec<Vec<u8>>,
    modified: Option<Time>,
    /// The directory was not announced.
    unannounced: bool,
    scope: Option<Arc<Scope>>,
    /// Some unannounced content stays.
    keeps_content: bool,
    /// Some content was removed.
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
    fn only_unannounced_entries_are_removed_children_first() {
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
            "the directory keeps its time"
        );
        let mut left = store.names(&path("m")).unwrap();
        left.sort();
        assert_eq!(left, [b"a".to_vec(), b"sub".to_vec()]);
        assert!(
            store.stat(&path("other/d")).unwrap().is_some(),
            "the target of a link stays"
        );
        assert_eq!(remove(&store, &announced, None, false), (0, None, vec![]));
    }

    #[test]
    fn nothing_is_removed_beyond_the_maximum() {
        let store = store(&["m/a", "m/b", "m/c"]);
        let refused = (
            0,
            Some("2 to remove, and --max-delete allows 1".into()),
            vec![],
        );
        assert_eq!(remove(&store, &["m", "m/a"], Some(1), false), refused);
        assert_eq!(store.names(&path("m")).unwrap().len(), 3);
        assert_eq!(remove(&store, &["m", "m/a"], Some(2), false).0, 2);
    }

    #[test]
    fn nothing_is_removed_if_announced_names_are_missing() {
        let store = store(&["m/a", "m/stored-otherwise"]);
        let (removed, why, _) = remove(&store, &["m", "m/a", "m/sent"], None, false);
        assert_eq!(removed, 0);
        assert!(why.unwrap().starts_with("1 of the received entries"));
        assert_eq!(remove(&store, &["m", "m/a", "m/sent"], None, true).0, 1);
    }

    #[test]
    fn an_empty_source_removes_nothing_without_a_maximum() {
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
    fn directories_with_partials_stay_and_the_rest_is_removed() {
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
        assert!(
            why.unwrap().starts_with("m/old: "),
            "the reason names the directory"
        );
    }

    #[test]
    fn directories_cleared_in_parallel_share_the_maximum() {
        // Repeated, because a race does not show in every run.
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
                        mirror.clear_directory(&path(&format!("m/{n}")))
                    });
                }
            });
            let left = (0..8)
                .filter(|n| store.stat(&path(&format!("m/{n}"))).unwrap().is_some())
                .count();
            assert_eq!(
                left, 6,
                "two directories of three files each may go, and no third"
            );
        }
    }
}
