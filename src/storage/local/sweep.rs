//! Removes old partials that no upload resumed.

use std::collections::BTreeSet;
use std::fs::File;
use std::time::{Duration, SystemTime};

use rustix::fs::{Dir, FileType, Mode, OFlags, fstat, openat};

use super::directory::Directory;
use super::lock::{lock, unlock};
use super::names::{is_named, remove};
use super::root::Root;
use super::stat::{changed, modified, type_of};
use crate::error::Reason;
use crate::protocol::Time;
use crate::protocol::path::{RelativePath, is_partial_name};
use crate::storage::io_errors::fault;

/// Most directory names kept in memory at a time (16 MiB of them); a larger directory is read several times.
const MAX_PENDING: usize = 65_536;
/// Directory names that each level of a tree may keep beyond that.
const MIN_PENDING: usize = 16;

/// A directory that is being swept.
struct Level {
    path: RelativePath,
    /// Subdirectories still to be swept, the next one last.
    pending: Vec<Vec<u8>>,
    /// The last name in `pending`, if more may follow it.
    more_after: Option<Vec<u8>>,
}

/// Sweeps the whole tree below the root. Opens at most two descriptors and follows no links.
pub(super) fn sweep(root: &Root, age: Duration) -> Result<u64, Reason> {
    sweep_with_limit(MAX_PENDING, root, age)
}

fn sweep_with_limit(max_pending: usize, root: &Root, age: Duration) -> Result<u64, Reason> {
    // The limit is before the earliest time, so no partial is that old.
    let Some(limit) = SystemTime::now().checked_sub(age).map(Time::from) else {
        return Ok(0);
    };
    let mut removed = 0;
    let top = read_directory(
        root,
        RelativePath::root(),
        None,
        limit,
        max_pending.max(MIN_PENDING),
        &mut removed,
    )?;
    let mut pending = top.pending.len();
    let mut levels = vec![top];
    while let Some(level) = levels.last_mut() {
        let room = max_pending.saturating_sub(pending).max(MIN_PENDING);
        let (path, after, below) = if let Some(name) = level.pending.pop() {
            pending -= 1;
            // haul creates no paths of this length.
            let Ok(path) = level.path.join(&name) else {
                continue;
            };
            (path, None, true)
        } else if let Some(after) = level.more_after.take() {
            (level.path.clone(), Some(after), false)
        } else {
            levels.pop();
            continue;
        };
        match read_directory(root, path, after, limit, room, &mut removed) {
            Ok(next) => {
                pending += next.pending.len();
                if !below {
                    levels.pop();
                }
                levels.push(next);
            }
            // The directory is gone or unreadable; the rest is still swept.
            Err(why) => tracing::debug!(%why, "cannot sweep a directory"),
        }
    }
    Ok(removed)
}

/// Removes the stale partials in one directory, and returns its first subdirectories after `after`.
fn read_directory(
    root: &Root,
    path: RelativePath,
    after: Option<Vec<u8>>,
    limit: Time,
    room: usize,
    removed: &mut u64,
) -> Result<Level, Reason> {
    let cannot = |e| fault(&path, "read the directory", e);
    let mut found = BTreeSet::new();
    let mut more = false;
    if let Some(directory) = root.find(&path)? {
        for entry in Dir::new(directory.readable().map_err(cannot)?).map_err(cannot)? {
            let entry = entry.map_err(cannot)?;
            let name = entry.file_name().to_bytes();
            if is_partial_name(name) {
                *removed += u64::from(remove_stale(root, &directory, name, limit).unwrap_or(false));
            } else if is_directory(&directory, name, entry.file_type())
                && after.as_deref() < Some(name)
            {
                found.insert(name.to_vec());
                if found.len() > room {
                    found.pop_last();
                    more = true;
                }
            }
        }
    }
    let more_after = found.last().filter(|_| more).cloned();
    Ok(Level {
        pending: found.into_iter().rev().collect(),
        more_after,
        path,
    })
}

fn is_directory(directory: &Directory<'_>, name: &[u8], kind: FileType) -> bool {
    match kind {
        _ if name == b"." || name == b".." => false,
        // Not every file system returns the type with the name.
        FileType::Unknown => directory
            .stat(name)
            .is_ok_and(|s| s.is_some_and(|stat| type_of(&stat) == FileType::Directory)),
        kind => kind == FileType::Directory,
    }
}

/// Removes a partial that was last written before the limit, unless it is locked.
fn remove_stale(
    root: &Root,
    directory: &Directory<'_>,
    name: &[u8],
    limit: Time,
) -> rustix::io::Result<bool> {
    let Some(stat) = directory.stat(name)? else {
        return Ok(false);
    };
    // Locked until the name is removed, so that no upload resumes it in between.
    let _locked = match type_of(&stat) {
        FileType::RegularFile if modified(&stat) <= limit => {
            let how = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let open = |access| openat(directory, name, access | how, Mode::empty());
            // NFS needs write access for the lock; an interrupted commit may have left the file read-only.
            let file = File::from(open(OFlags::RDWR).or_else(|_| open(OFlags::RDONLY))?);
            let Some(lock) = lock(root, &file)? else {
                return Ok(false);
            };
            if !is_named(directory, name, &file)? || modified(&fstat(&file)?) > limit {
                unlock(&file);
                return Ok(false);
            }
            Some((file, lock))
        }
        // A temporary link that was never renamed. Its mtime is the source's, so its ctime counts.
        FileType::Symlink if changed(&stat) <= limit => None,
        _ => return Ok(false),
    };
    remove(root, directory, name)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_above_the_memory_limit_are_swept_completely() {
        let directory = tempfile::tempdir().unwrap();
        let partial = format!(".haul-{}.partial", "0f".repeat(16));
        let level = |i: usize| directory.path().join(format!("{i}"));
        for i in 0..5 * MIN_PENDING {
            let below = level(i).join("below");
            std::fs::create_dir_all(&below).unwrap();
            std::fs::write(below.join(&partial), "x").unwrap();
            std::fs::write(level(i).join(&partial), "x").unwrap();
        }
        let root = Root::open(directory.path()).unwrap();
        assert_eq!(
            sweep_with_limit(0, &root, Duration::ZERO),
            Ok(10 * MIN_PENDING as u64)
        );
        assert_eq!(sweep(&root, Duration::ZERO), Ok(0));
    }
}
