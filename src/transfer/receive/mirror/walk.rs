//! Walks the paths of a destination that were not announced.

use std::sync::{Arc, Mutex};

use super::announced::Announced;
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Delete, Kind, Time};
use crate::storage::filter::Filter;
use crate::storage::sorted_names::SortedNames;
use crate::storage::walk::gitignore::{RuleFiles, Scope, excludes};
use crate::storage::{Attributes, Held, KeptShare, Store};
use crate::transfer::receive::name_collisions::NameCollisions;

/// Memory for an open directory beside its path, in bytes.
const LEVEL_OVERHEAD: usize = 256;

/// Paths removed before the last step, from directories in the place of announced files and links.
#[derive(Debug, Default)]
pub(in crate::transfer::receive) struct ClearedPaths {
    pub(super) count: u64,
    /// The first of them, to be reported.
    pub(super) named: Vec<RelativePath>,
    /// Counts their memory.
    pub(super) held: Option<Held>,
}

/// A mirror: the rules of what it removes.
pub(in crate::transfer::receive) struct Mirror<'a> {
    pub(in crate::transfer::receive) store: &'a dyn Store,
    /// The destination; nothing outside of it is removed.
    pub(in crate::transfer::receive) place: &'a RelativePath,
    pub(in crate::transfer::receive) announced: &'a Announced,
    /// Detects other spellings of announced names.
    pub(in crate::transfer::receive) collisions: &'a NameCollisions,
    /// Rules for paths that stay though they were not announced.
    pub(in crate::transfer::receive) protected: &'a Filter,
    pub(in crate::transfer::receive) rule_files: &'a RuleFiles,
    /// Counts the memory of names and paths.
    pub(in crate::transfer::receive) memory: &'a KeptShare,
    pub(in crate::transfer::receive) cleared: &'a Mutex<ClearedPaths>,
    pub(in crate::transfer::receive) delete: Delete,
    pub(in crate::transfer::receive) dry_run: bool,
}

impl Mirror<'_> {
    /// Returns whether a path was announced, under this name or an equal one.
    fn is_announced(&self, path: &RelativePath) -> bool {
        self.announced.contains(path) || self.collisions.is_other_name(path)
    }

    /// Checks a number of removals against `--max-delete`.
    pub(super) fn check_maximum(&self, count: u64) -> Result<(), Reason> {
        match self.delete.most {
            Some(most) if count > most => Err(Reason::new(
                Code::TooMany,
                format!("{count} to remove, and --max-delete allows {most}"),
            )),
            _ => Ok(()),
        }
    }

    /// Returns a path relative to the destination.
    pub(super) fn below(&self, path: &RelativePath) -> Result<RelativePath, Reason> {
        Ok(RelativePath::from_components(
            path.components().skip(self.place.components().count()),
        )?)
    }

    /// Walks unannounced paths, the content of a directory before the directory, without following links. `visit`
    /// returns whether the path is gone; a directory with remaining content is not visited. Returns the number of
    /// announced paths that exist.
    pub(super) fn walk(
        &self,
        root: &RelativePath,
        unannounced: bool,
        mut visit: impl FnMut(&RelativePath) -> Result<bool, Reason>,
    ) -> Result<u64, Reason> {
        let top = self.store.stat(root)?.map(|there| there.modified);
        let mut found = u64::from(top.is_some() && self.is_announced(root));
        let scope = self.scope_above(root)?;
        let mut open = vec![self.level(root.clone(), top, unannounced, scope, &[])?];
        while let Some(level) = open.last_mut() {
            let Some(name) = level.names.next(self.store, &level.path)? else {
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
                    self.protected,
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
                    let outer = open.iter_mut().map(|level| &mut level.names);
                    SortedNames::make_room(outer, self.memory);
                    let level =
                        self.level(path, Some(there.modified), unannounced, scope, &open)?;
                    open.push(level);
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
            if self.protected.gitignore && depth >= self.place.components().count() {
                scope = Scope::of(self.store, self.rule_files, &above, &above, scope)?;
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
        outer: &[Level],
    ) -> Result<Level, Reason> {
        let scope = if self.protected.gitignore {
            Scope::of(self.store, self.rule_files, &path, &path, above)?
        } else {
            None
        };
        let mut names = SortedNames::unread(self.memory);
        match names.begin(self.store, &path) {
            Err(why) if why.code == Code::NotFound => {
                names = SortedNames::known(Vec::new(), self.memory);
            }
            read => read?,
        }
        let outer = outer.iter().map(|level| &level.held);
        let cost = LEVEL_OVERHEAD + path.as_bytes().len();
        let held = self.memory.hold_level(cost, outer);
        let held = held.ok_or_else(|| {
            let text = "the tree is too deep for the memory of this connection";
            Reason::new(Code::Busy, format!("{path}: {text}"))
        })?;
        Ok(Level {
            held,
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

/// A directory in the walk, with its remaining names.
struct Level {
    path: RelativePath,
    names: SortedNames,
    held: Held,
    modified: Option<Time>,
    /// The directory was not announced.
    unannounced: bool,
    scope: Option<Arc<Scope>>,
    /// Some unannounced content stays.
    keeps_content: bool,
    /// Some content was removed.
    changed: bool,
}
