//! Removes what is in the place of a mirror's entry, before the entry is made.

use super::walk::Mirror;
use crate::error::lock::lock;
use crate::error::{Code, Reason, Result};
use crate::protocol::Kind;
use crate::protocol::path::RelativePath;

/// Most cleared paths that are reported by name. Others are only counted.
const MAX_NAMED: usize = 1 << 14;
/// Memory for a reported path beside its bytes.
const NAMED_OVERHEAD: usize = 48;

impl Mirror<'_> {
    /// Removes an entry of another kind in the place of a mirror's entry. Call it when the new content is complete,
    /// directly before the commit. Blocks.
    pub(in crate::transfer::receive) fn make_room(
        &self,
        path: &RelativePath,
        kind: Kind,
    ) -> Result<(), Reason> {
        self.clear_path_above(path)?;
        if kind == Kind::Directory {
            self.clear_non_directory(path)
        } else {
            self.clear_directory(path)
        }
    }

    /// Removes files and links in the place of parent directories of a mirror's entry, so that its partial can be
    /// made. Blocks.
    pub(in crate::transfer::receive) fn clear_path_above(
        &self,
        path: &RelativePath,
    ) -> Result<(), Reason> {
        let mut above = RelativePath::default();
        for (depth, name) in path.components().enumerate() {
            if depth > self.place.components().count() {
                self.clear_non_directory(&above)?;
            }
            above = above.join(name)?;
        }
        Ok(())
    }

    /// Removes a file or link in the place of a directory.
    fn clear_non_directory(&self, path: &RelativePath) -> Result<(), Reason> {
        let is_obstructed = || {
            let existing = self.store.stat(path)?;
            Ok::<_, Reason>(existing.is_some_and(|there| there.kind != Some(Kind::Directory)))
        };
        if !is_obstructed()? {
            return Ok(());
        }
        // One at a time, so that one task does not remove what another has just made.
        let _cleared = lock(self.cleared);
        if is_obstructed()? {
            self.store.remove(path)
        } else {
            Ok(())
        }
    }

    /// Removes an existing directory and its content, or nothing if a part is protected or the limit is exceeded. Its
    /// content counts as removed.
    pub(super) fn clear_directory(&self, path: &RelativePath) -> Result<(), Reason> {
        let is_directory = || {
            let existing = self.store.stat(path)?;
            Ok::<_, Reason>(existing.is_some_and(|there| there.kind == Some(Kind::Directory)))
        };
        // One at a time, so that all together stay within the maximum.
        let mut cleared = lock(self.cleared);
        if !is_directory()? {
            return Ok(());
        }
        let mut count = 0;
        let mut is_whole = false;
        self.walk(path, true, |gone| {
            // The directory is visited last, and only if all its content can be removed.
            is_whole |= gone == path;
            count += u64::from(gone != path);
            Ok(true)
        })?;
        if !is_whole {
            return Err(holds_protected(path));
        }
        self.check_replacement(path, cleared.count + count)?;
        self.walk(path, true, |gone| {
            if gone == path {
                return self.store.remove(gone).map(|()| true);
            }
            // New files may have appeared since the count.
            self.check_replacement(path, cleared.count + 1)?;
            self.store.remove(gone)?;
            cleared.count += 1;
            let cost = NAMED_OVERHEAD + gone.as_bytes().len();
            let held = cleared.held.get_or_insert_with(|| self.memory.hold());
            let fits = held.grow(cost);
            if fits && cleared.named.len() < MAX_NAMED {
                cleared.named.push(self.below(gone)?);
            }
            Ok(true)
        })?;
        if is_directory()? {
            Err(holds_protected(path))
        } else {
            Ok(())
        }
    }

    /// Checks a number of removals against `--max-delete`, for a directory that is replaced.
    fn check_replacement(&self, path: &RelativePath, count: u64) -> Result<(), Reason> {
        self.check_maximum(count).map_err(|too_many| {
            let text = format!("cannot replace directory {path}: {too_many}");
            Reason::new(too_many.code, text)
        })
    }
}

fn holds_protected(path: &RelativePath) -> Reason {
    Reason::new(
        Code::IsDirectory,
        format!("cannot replace directory {path}: it holds files that must stay"),
    )
}
