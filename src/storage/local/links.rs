//! Makes symbolic and hard links: under a temporary name first, so that an existing name is replaced atomically.

use rustix::fs::{AtFlags, FileType, linkat, symlinkat};

use super::attributes;
use super::directory::Directory;
use super::names::{remove, rename_into_place, temporary_name};
use super::open::{check_openable, stat_existing};
use super::root::Root;
use super::stat::type_of;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::storage::io_errors::{check_target, fault, refusal};
use crate::storage::metadata::{Attributes, MetadataWarnings};

/// Creates a symbolic link, and atomically replaces a file or link of that name.
pub(super) fn make_symlink(
    root: &Root,
    path: &RelativePath,
    target: &[u8],
    attributes: &Attributes,
) -> Result<MetadataWarnings, Reason> {
    check_target(path, target)?;
    let (directory, _) = root.make_parent(path)?;
    let temporary = temporary_name();
    let create = || symlinkat(target, &directory, &temporary);
    root.modes
        .change_names(&directory, create)
        .map_err(|e| fault(path, "create the symbolic link", e))?;
    let what = "rename the symbolic link into place";
    let temporary = temporary.as_bytes();
    attributes::set_on_link(&directory, temporary, attributes)
        .map_err(|e| fault(path, what, e))
        .and_then(|warnings| {
            let exclusive = attributes.exclusive;
            rename_into_place(root, &directory, temporary, path, exclusive, what)?;
            Ok(warnings)
        })
        .inspect_err(|_| {
            let _ = remove(root, &directory, temporary);
        })
}

/// Makes `new` a hard link to the regular file `existing`, and atomically replaces a file or link of that name.
pub(super) fn make_hard_link(
    root: &Root,
    existing: &RelativePath,
    new: &RelativePath,
) -> Result<(), Reason> {
    if new.is_root() {
        return Err(refusal(Code::IsDirectory, new));
    }
    root.check_not_moved(new)?;
    let (from, name) = root.existing_parent(existing)?;
    check_linkable(root, existing, &from, name)?;
    let (to, _) = root.make_parent(new)?;
    let temporary = temporary_name();
    let link = || linkat(&from, name, &to, &temporary, AtFlags::empty());
    root.modes
        .change_names(&to, link)
        .map_err(|e| fault(new, &format!("create the hard link to {existing}"), e))?;
    let temporary = temporary.as_bytes();
    // Check again: the linked file may not be the one that was checked before.
    let renamed = check_linkable(root, existing, &to, temporary).and_then(|()| {
        let what = "rename the hard link into place";
        rename_into_place(root, &to, temporary, new, false, what)
    });
    // The temporary name still exists if the rename failed, or if both were names of the same file already.
    let _ = remove(root, &to, temporary);
    renamed
}

/// Refuses entries that must not get another hard link.
fn check_linkable(
    root: &Root,
    path: &RelativePath,
    directory: &Directory<'_>,
    name: &[u8],
) -> Result<(), Reason> {
    let stat = stat_existing(root, directory, name, path)?;
    check_openable(path, &stat)?;
    if type_of(&stat) == FileType::Directory {
        Err(refusal(Code::IsDirectory, path))
    } else {
        Ok(())
    }
}
