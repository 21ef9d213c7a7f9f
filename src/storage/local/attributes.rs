//! Sets the final metadata of files on disk. Metadata that the file system cannot keep, or the system does not permit,
//! is not a failure of the file but a metadata warning.

use std::fs::File;

use rustix::fs::{AtFlags, FileType, Gid, Uid, chownat, fstat, utimensat};
use rustix::io::Errno;

use super::descriptor::{set_mode, set_owner, set_time};
use super::directory::Directory;
use super::stat::{self, JUST_NOW, mode_of, owner_of, timestamps, type_of};
use super::xattr;
use crate::error::Reason;
use crate::protocol::path::RelativePath;
use crate::protocol::{Attribute, Time};
use crate::storage::io_errors::{error_text, fault};
use crate::storage::metadata::{Attributes, MetadataWarnings, PERMISSIONS};

/// Errors for metadata that the system cannot or may not keep. Every other error, such as a broken disk, fails the
/// file.
const UNSUPPORTED: &[Errno] = &[
    Errno::PERM,
    Errno::ACCESS,
    Errno::NOTSUP,
    Errno::OPNOTSUPP,
    Errno::NOSYS,
    Errno::OVERFLOW,
    Errno::INVAL,
];

/// The coarsest resolution of times in any file system, in seconds: FAT's.
const COARSEST_RESOLUTION: u64 = 2;

/// The bits that the owner needs to set extended attributes.
const READ_WRITE: u32 = 0o600;

/// Sets the given attributes. Bits that are not transferred stay, such as the set-group-ID of a shared directory.
pub(super) fn set(
    file: &File,
    path: &RelativePath,
    attributes: &Attributes,
) -> Result<MetadataWarnings, Reason> {
    let before_change = fstat(file).map_err(|e| fault(path, "read its metadata", e))?;
    let mut warnings = MetadataWarnings::new();
    // chown clears set-user-ID and the like, so the mode comes later. It also comes after the extended attributes,
    // because the final mode may not permit setting those.
    let owned = match attributes.owner {
        Some(owner) if owner != owner_of(&before_change) => {
            let set = set_owner(file, owner);
            let before = warnings.len();
            allow(&mut warnings, Attribute::Owner, set)
                .map_err(|e| fault(path, "set its owner", e))?;
            warnings.len() == before
        }
        Some(_) => true,
        None => false,
    };
    let mut mode = mode_of(&before_change);
    let mut made_writable = false;
    if let Some(xattrs) = &attributes.xattrs {
        made_writable =
            mode & READ_WRITE != READ_WRITE && set_mode(file, mode | READ_WRITE).is_ok();
        let set = xattr::set(file, xattrs, owned)
            .map_err(|e| fault(path, "set its extended attributes", e));
        match set {
            Ok(more) => warnings.extend(more),
            Err(why) => {
                let _ = set_mode(file, mode);
                return Err(why);
            }
        }
    }
    if let Some(wanted) = attributes.mode {
        let regular = type_of(&before_change) == FileType::RegularFile;
        // Without its owner a set-user-ID program would run as another user.
        let bits = if owned {
            attributes.mode_bits(regular)
        } else {
            PERMISSIONS
        };
        mode = mode & !bits | wanted & bits;
    }
    if attributes.mode.is_some() || made_writable {
        let set = set_mode(file, mode);
        allow(&mut warnings, Attribute::Mode, set).map_err(|e| fault(path, "set its mode", e))?;
    }
    if let Some(modified) = attributes.modified {
        let set =
            set_time(file, &before_change, modified).and_then(|()| check_time(file, modified));
        allow(&mut warnings, Attribute::Time, set).map_err(|e| fault(path, "set its time", e))?;
    }
    Ok(warnings)
}

/// Sets time and owner of a symbolic link itself; it has no other attributes that count.
pub(super) fn set_on_link(
    directory: &Directory<'_>,
    name: &[u8],
    attributes: &Attributes,
) -> rustix::io::Result<MetadataWarnings> {
    let mut warnings = MetadataWarnings::new();
    if let Some(modified) = attributes.modified {
        let times = timestamps(modified, JUST_NOW);
        let set = utimensat(directory, name, &times, AtFlags::SYMLINK_NOFOLLOW);
        allow(&mut warnings, Attribute::Time, set)?;
    }
    if let Some(owner) = attributes.owner {
        let user = Some(Uid::from_raw(owner.user));
        let group = Some(Gid::from_raw(owner.group));
        let set = chownat(directory, name, user, group, AtFlags::SYMLINK_NOFOLLOW);
        allow(&mut warnings, Attribute::Owner, set)?;
    }
    Ok(warnings)
}

/// Fails if the file system has silently clamped a time that it cannot hold. A resolution of one or two seconds is not
/// reported.
fn check_time(file: &File, modified: Time) -> rustix::io::Result<()> {
    let kept = stat::modified(&fstat(file)?);
    if kept.seconds.abs_diff(modified.seconds) < COARSEST_RESOLUTION {
        Ok(())
    } else {
        Err(Errno::OVERFLOW)
    }
}

/// Turns an error for metadata that is unsupported or not permitted into a warning.
fn allow(
    warnings: &mut MetadataWarnings,
    attribute: Attribute,
    result: rustix::io::Result<()>,
) -> rustix::io::Result<()> {
    match result {
        Err(e) if UNSUPPORTED.contains(&e) => {
            warnings.push((attribute, error_text(e)));
            Ok(())
        }
        other => other,
    }
}
