//! Syncs files and names to disk. A rename is not durable before its directory is synced.

use std::fs::File;
use std::io;

use rustix::io::Errno;

use super::directory::Directory;
use super::root::Root;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::storage::io_errors::{fault, refusal};

/// Calls fsync. A file system without fsync is no reason to fail, as in restic.
pub(super) fn sync_file(file: &File) -> io::Result<()> {
    let unsupported = [Errno::INVAL, Errno::NOTSUP, Errno::OPNOTSUPP, Errno::NOTTY];
    match file.sync_all() {
        Err(e) if Errno::from_io_error(&e).is_some_and(|errno| unsupported.contains(&errno)) => {
            Ok(())
        }
        other => other,
    }
}

/// Syncs the names in one directory to disk.
fn sync_directory(directory: &Directory<'_>) -> io::Result<()> {
    match directory.readable() {
        // Write and search permission allow a rename but not opening the directory; then sync everything.
        Err(Errno::ACCESS) => rustix::fs::sync(),
        other => sync_file(&File::from(other?))?,
    }
    Ok(())
}

/// Syncs the names in a directory to disk, and those of its parents unless they are known to be durable.
///
/// Existing directories are included once: the program that created them may not have synced them.
pub(super) fn sync_names(
    root: &Root,
    directory: &Directory<'_>,
    path: &RelativePath,
) -> Result<(), Reason> {
    sync_directory(directory).map_err(|e| fault(path, "sync it to disk", e))?;
    let mut synced = Vec::new();
    let mut child = path.clone();
    while let Some(parent) = child.parent() {
        if root.durable.contains(&child) {
            break;
        }
        let above = root
            .find(&parent)?
            .ok_or_else(|| refusal(Code::NotFound, &parent))?;
        sync_directory(&above).map_err(|e| fault(&parent, "sync it to disk", e))?;
        synced.push(std::mem::replace(&mut child, parent));
    }
    // Added only now, so that no other thread relies on an fsync that is still running.
    root.durable.insert_all(&synced);
    Ok(())
}

/// Syncs everything below the root to disk.
pub(super) fn sync_all(root: &Root) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    match root.directory().readable() {
        // Write and search permission allow writing but not opening the directory; then sync everything.
        Err(Errno::ACCESS) => rustix::fs::sync(),
        directory => rustix::fs::syncfs(directory?)?,
    }
    // syncfs reports errors, but ends at a mount point.
    if cfg!(not(target_os = "linux")) || root.spans_file_systems() {
        sync_directory(&root.directory())?;
        rustix::fs::sync();
    }
    Ok(())
}
