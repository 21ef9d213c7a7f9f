//! Opens existing files and directories: no link is followed, and no FIFO or device is waited for.

use std::fs::File;

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, openat};
use rustix::io::Errno;

use super::descriptor::open_for_changes;
use super::directory::Directory;
use super::root::Root;
use super::stat::type_of;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::storage::io_errors::{fault, refusal};

/// Opens a file or directory for reading.
pub(super) fn open_any(root: &Root, path: &RelativePath) -> Result<(File, Stat), Reason> {
    let cannot = |e: Errno| fault(path, "open it", e);
    if path.is_root() {
        let file = File::from(root.directory().readable().map_err(cannot)?);
        let stat = fstat(&file).map_err(cannot)?;
        return Ok((file, stat));
    }
    let (directory, name) = root.existing_parent(path)?;
    // Check the type first: opening a device can have side effects.
    let stat = directory
        .stat(name)
        .map_err(cannot)?
        .ok_or_else(|| refusal(Code::NotFound, path))?;
    check_openable(path, &stat)?;
    let how =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = File::from(openat(&directory, name, how, Mode::empty()).map_err(cannot)?);
    let stat = fstat(&file).map_err(cannot)?;
    root.reserved.check(&stat, path)?;
    check_openable(path, &stat)?;
    root.record_device(&stat);
    Ok((file, stat))
}

/// Opens a file or directory for its metadata, also one that this user may not read.
pub(super) fn open_for_metadata(root: &Root, path: &RelativePath) -> Result<File, Reason> {
    match open_any(root, path) {
        Err(why) if why.code == Code::PermissionDenied => {}
        opened => return opened.map(|(file, _)| file),
    }
    let cannot = |e: Errno| fault(path, "open it", e);
    let (directory, name) = root.existing_parent(path)?;
    let file = open_for_changes(&directory, name).map_err(cannot)?;
    let stat = fstat(&file).map_err(cannot)?;
    root.reserved.check(&stat, path)?;
    check_openable(path, &stat)?;
    Ok(file)
}

/// Returns the stat of a name that must exist. Refuses a reserved file.
pub(super) fn stat_existing(
    root: &Root,
    directory: &Directory<'_>,
    name: &[u8],
    path: &RelativePath,
) -> Result<Stat, Reason> {
    let stat = directory
        .stat(name)
        .map_err(|e| fault(path, "read its metadata", e))?;
    let stat = stat.ok_or_else(|| refusal(Code::NotFound, path))?;
    root.reserved.check(&stat, path)?;
    Ok(stat)
}

/// Refuses everything except files and directories.
pub(super) fn check_openable(path: &RelativePath, stat: &Stat) -> Result<(), Reason> {
    match type_of(stat) {
        FileType::RegularFile | FileType::Directory => Ok(()),
        FileType::Symlink => Err(refusal(Code::Symlink, path)),
        _ => Err(refusal(Code::Special, path)),
    }
}
