//! Walks the paths of a destination that were not announced.

use std::sync::{Arc, Mutex};

use super::announced::Announced;
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Delete, Kind, Time};
use crate::storage::filter::Filter;
use crate::storage::walk::gitignore::{Scope, excludes};
use crate::storage::{Attributes, Store};
use crate::transfer::receive::name_collisions::NameCollisions;

/// Paths removed before the last step, from directories in the place of announced files and links.
#[derive(Debug, Default)]
pub(in crate::transfer::receive) struct ClearedPaths {
    pub(super) count: u64,
    /// The first of them, to be reported.
    pub(super) named: Vec<RelativePath>,
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
            if self.protected.gitignore && depth >= self.place.components().count() {
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
        let scope = if self.protected.gitignore {
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
