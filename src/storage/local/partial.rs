//! Finds, creates and locks the partial of an upload. A file of another user, or one that another program put under the
//! name of a partial, is not written to.

use std::fs::File;
use std::io;

use rustix::fs::{FileType, Mode, OFlags, RawMode, Stat, Timestamps};
use rustix::fs::{fchmod, fstat, futimens, openat};
use rustix::io::Errno;

use super::directory::Directory;
use super::lock::{Lock, lock};
use super::names::{PRIVATE_FILE, is_named, remove, stat_of_new_file};
use super::root::{ATTEMPTS, Root};
use super::stat::{JUST_NOW, device_of, type_of};
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::storage::io_errors::{fault, refusal};

/// The permission bits that let others than the owner write to a file.
const WRITE_BY_OTHERS: RawMode = Mode::WGRP.union(Mode::WOTH).bits();

/// An open and locked partial.
pub(super) struct LockedPartial {
    // Field order matters: once the file is closed, another file may get its inode.
    pub(super) lock: Lock,
    pub(super) file: File,
}

/// What existed under a partial's name.
#[derive(PartialEq, Eq)]
enum PartialState {
    Nothing,
    Writable,
    Unwritable,
}

/// Opens a file, read-only if nothing else is permitted, or creates it.
fn open_or_create(
    directory: &Directory<'_>,
    name: &[u8],
) -> rustix::io::Result<(File, PartialState)> {
    // NONBLOCK: the name may be a FIFO that another program created.
    let open = |how| {
        openat(
            directory,
            name,
            how | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC,
            PRIVATE_FILE,
        )
    };
    match open(OFlags::RDWR) {
        Ok(file) => Ok((file.into(), PartialState::Writable)),
        Err(Errno::NOENT) => Ok((
            open(OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?.into(),
            PartialState::Nothing,
        )),
        Err(Errno::ACCESS) => Ok((open(OFlags::RDONLY)?.into(), PartialState::Unwritable)),
        Err(e) => Err(e),
    }
}

/// Opens or creates the partial of this name, and locks it.
pub(super) fn open_partial(
    root: &Root,
    directory: &Directory<'_>,
    name: &[u8],
    path: &RelativePath,
) -> Result<LockedPartial, Reason> {
    for _ in 0..ATTEMPTS {
        let open = || open_or_create(directory, name);
        let (file, found) = match root.modes.change_names(directory, open) {
            Ok(opened) => opened,
            Err(Errno::EXIST) => continue,
            // A link, a socket or an inaccessible file: haul did not create it.
            Err(Errno::LOOP | Errno::NXIO | Errno::ACCESS)
                if matches!(directory.stat(name), Ok(Some(_))) =>
            {
                remove_other(root, directory, name, path)?;
                continue;
            }
            Err(e) => return Err(fault(path, "open its partial", e)),
        };
        match lock_own(root, directory, name, path, &file, &found) {
            Ok(Some(lock)) => return Ok(LockedPartial { lock, file }),
            Ok(None) => {}
            Err(why) => {
                // Do not leave an empty partial behind that cannot be used.
                if found == PartialState::Nothing && is_named(directory, name, &file) == Ok(true) {
                    let _ = remove(root, directory, name);
                }
                return Err(why);
            }
        }
    }
    Err(refusal(Code::Busy, path))
}

/// Locks an open partial and checks that this user created it; `None` when the caller should retry.
fn lock_own(
    root: &Root,
    directory: &Directory<'_>,
    name: &[u8],
    path: &RelativePath,
    file: &File,
    found: &PartialState,
) -> Result<Option<Lock>, Reason> {
    let cannot = |what| move |e: Errno| fault(path, what, e);
    let Some(lock) = lock(root, file).map_err(cannot("lock its partial"))? else {
        // This process has just created it, but another one locked it first: the retry finds it as theirs.
        return match found {
            PartialState::Nothing => Ok(None),
            _ => Err(refusal(Code::Busy, path)),
        };
    };
    // The previous holder of the lock may just have renamed or removed it.
    if !is_named(directory, name, file).map_err(cannot("read the metadata of its partial"))? {
        return Ok(None);
    }
    if *found == PartialState::Nothing {
        // This process has just created it, whatever owner the file system (NFS, FAT) shows.
        return Ok(Some(lock));
    }
    let stat = fstat(file).map_err(cannot("read the metadata of its partial"))?;
    let regular = type_of(&stat) == FileType::RegularFile;
    // It belongs to another user, or has another hard link, through which the written content would appear elsewhere.
    if !regular || stat.st_nlink > 1 || !is_ours(root, directory, &stat) {
        remove_other(root, directory, name, path)?;
        return Ok(None);
    }
    if *found == PartialState::Unwritable {
        // A commit was interrupted between the final mode and the final name.
        restore(file).map_err(|e| fault(path, "resume its partial", e))?;
        return Ok(None);
    }
    Ok(Some(lock))
}

/// Removes a foreign file that has the name of a partial.
fn remove_other(
    root: &Root,
    directory: &Directory<'_>,
    name: &[u8],
    path: &RelativePath,
) -> Result<(), Reason> {
    remove(root, directory, name).map_err(|e| {
        fault(
            path,
            "remove the foreign file with the name of its partial",
            e,
        )
    })
}

/// Whether the user of this process created a file.
///
/// On some file systems every file seems to belong to another user: FAT, NTFS and SMB mounted for a user, NFS with
/// root_squash, some FUSE file systems. So a file with another user id is compared with a new temporary file.
fn is_ours(root: &Root, directory: &Directory<'_>, there: &Stat) -> bool {
    there.st_uid == rustix::process::geteuid().as_raw()
        || stat_of_new_file(root, directory, PRIVATE_FILE)
            .is_ok_and(|ours| is_as_private(there, &ours))
}

/// Whether a file has the same owner as ours, and no more users may write to it than to ours.
fn is_as_private(there: &Stat, ours: &Stat) -> bool {
    let owners = there.st_uid == ours.st_uid && device_of(there) == device_of(ours);
    let more_writers = there.st_mode & WRITE_BY_OTHERS & !ours.st_mode != 0;
    let group = there.st_gid == ours.st_gid || there.st_mode & Mode::WGRP.as_raw_mode() == 0;
    owners && group && !more_writers
}

/// Makes an uncommitted file a partial again: private, and last written now.
pub(super) fn restore(file: &File) -> io::Result<()> {
    fchmod(file, PRIVATE_FILE)?;
    Ok(futimens(
        file,
        &Timestamps {
            last_access: JUST_NOW,
            last_modification: JUST_NOW,
        },
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a stat with the given owner, group and mode.
    fn stat(owner: u32, group: u32, mode: RawMode) -> Stat {
        let mut stat = fstat(tempfile::tempfile().unwrap()).unwrap();
        stat.st_uid = owner;
        stat.st_gid = group;
        stat.st_mode = FileType::RegularFile.as_raw_mode() | mode;
        stat
    }

    #[test]
    fn files_of_other_users_are_not_ours() {
        // A file system mounted for a user, with fixed modes; and NFS with root_squash, where modes are real.
        let mounted = stat(1000, 1000, 0o777);
        let squashed = stat(65_534, 65_534, 0o600);
        let device = stat(0, 0, 0).st_dev;
        let as_private = |there: Stat, ours: &Stat| {
            let mut there = there;
            let mut ours = *ours;
            there.st_dev = device;
            ours.st_dev = device;
            is_as_private(&there, &ours)
        };
        assert!(as_private(stat(1000, 1000, 0o777), &mounted));
        assert!(!as_private(stat(1001, 1000, 0o777), &mounted));
        assert!(as_private(stat(65_534, 65_534, 0o600), &squashed));
        // A commit was interrupted between the final mode and the final name.
        assert!(as_private(stat(65_534, 65_534, 0o644), &squashed));
        assert!(!as_private(stat(65_534, 65_534, 0o666), &squashed));
        assert!(!as_private(stat(65_534, 65_534, 0o660), &squashed));
        assert!(!as_private(stat(0, 65_534, 0o600), &squashed));
        // Our group may write to ours, but the other file has another group.
        let shared = stat(65_534, 65_534, 0o660);
        assert!(as_private(stat(65_534, 65_534, 0o660), &shared));
        assert!(!as_private(stat(65_534, 100, 0o660), &shared));
    }
}
