//! Extended attributes of files and directories on disk. Access control lists are extended attributes in the `system`
//! namespace.

use std::fs::File;

use rustix::fs::{
    XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr, getxattr, listxattr, removexattr,
    setxattr,
};
use rustix::io::Errno;

use super::descriptor::descriptor_path;
use crate::protocol::{Attribute, MAX_XATTR_BYTES, Xattr};
use crate::storage::io_errors::error_text;
use crate::storage::metadata::MetadataWarnings;

/// Longest list of names, in bytes: Linux's `XATTR_LIST_MAX`.
const MAX_LIST_BYTES: usize = 64 << 10;
/// Attributes that every user may set, and the access control lists.
const UNPRIVILEGED: [&[u8]; 3] = [
    b"user.",
    b"system.posix_acl_access",
    b"system.posix_acl_default",
];
/// The attribute in which Linux keeps a file's access control list.
const ACCESS_LIST: &[u8] = b"system.posix_acl_access";
/// Longest access control list, in bytes: Linux's `XATTR_SIZE_MAX`.
const MAX_ACCESS_LIST_BYTES: usize = 64 << 10;
/// Attributes that give rights or belong to the system's administration, such as file capabilities: they are
/// transferred only with the owner.
const PRIVILEGED: [&[u8]; 2] = [b"security.", b"trusted."];
/// Labels are the machine's own policy, and are never transferred.
const LABELS: [&[u8]; 2] = [b"security.selinux", b"security.SMACK64"];

/// Whether an extended attribute is transferred; `privileged` includes those that require owners.
fn is_transferable(name: &[u8], privileged: bool) -> bool {
    let of = |names: &[&[u8]]| names.iter().any(|start| name.starts_with(start));
    of(&UNPRIVILEGED) || (privileged && of(&PRIVILEGED) && !of(&LABELS))
}

/// Reads the transferable attributes, by name, as far as they fit an entry, with a warning for each that does not.
pub(super) fn read(
    file: &File,
    privileged: bool,
) -> rustix::io::Result<(Vec<Xattr>, MetadataWarnings)> {
    let mut xattrs = Vec::new();
    let mut warnings = MetadataWarnings::new();
    let mut bytes = 0;
    for name in names(file)?
        .into_iter()
        .filter(|name| is_transferable(name, privileged))
    {
        let mut value = vec![0; MAX_XATTR_BYTES];
        let read = match fgetxattr(file, &name[..], &mut value[..]) {
            Err(Errno::BADF) => getxattr(descriptor_path(file), &name[..], &mut value[..]),
            read => read,
        };
        match read {
            Ok(length) => {
                value.truncate(length);
                let xattr = Xattr { name, value };
                bytes += xattr.bytes();
                if bytes > MAX_XATTR_BYTES {
                    bytes -= xattr.bytes();
                    warnings.push((
                        Attribute::Xattr,
                        format!("more than {MAX_XATTR_BYTES} bytes of attributes"),
                    ));
                } else {
                    xattrs.push(xattr);
                }
            }
            Err(Errno::RANGE) => warnings.push((
                Attribute::Xattr,
                format!("more than {MAX_XATTR_BYTES} bytes of attributes"),
            )),
            // Removed meanwhile.
            Err(Errno::NODATA) => {}
            Err(e) => return Err(e),
        }
    }
    Ok((xattrs, warnings))
}

fn names(file: &File) -> rustix::io::Result<Vec<Vec<u8>>> {
    let mut list = vec![0; MAX_LIST_BYTES];
    let listed = match flistxattr(file, &mut list[..]) {
        Err(Errno::BADF) => listxattr(descriptor_path(file), &mut list[..]),
        listed => listed,
    };
    let length = match listed {
        // The file system has no extended attributes.
        Err(Errno::OPNOTSUPP) => 0,
        listed => listed?,
    };
    let names = list[..length]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty());
    let mut names: Vec<_> = names.map(<[u8]>::to_vec).collect();
    names.sort_unstable();
    Ok(names)
}

/// Makes the transferable attributes exactly the `wanted` ones; returns a warning for each that fails.
pub(super) fn set(
    file: &File,
    wanted: &[Xattr],
    privileged: bool,
) -> rustix::io::Result<MetadataWarnings> {
    let mut warnings = MetadataWarnings::new();
    let (existing, _) = read(file, privileged)?;
    for old in existing
        .iter()
        .filter(|old| wanted.iter().all(|new| new.name != old.name))
    {
        let removed = match fremovexattr(file, &old.name[..]) {
            Err(Errno::BADF) => removexattr(descriptor_path(file), &old.name[..]),
            removed => removed,
        };
        warn_on_error(&mut warnings, removed);
    }
    for new in wanted.iter().filter(|new| !existing.contains(new)) {
        if !is_transferable(&new.name, privileged) {
            warnings.push((
                Attribute::Xattr,
                "kept only together with an owner that may be set".into(),
            ));
            continue;
        }
        let set = match fsetxattr(file, &new.name[..], &new.value, XattrFlags::empty()) {
            Err(Errno::BADF) => setxattr(
                descriptor_path(file),
                &new.name[..],
                &new.value,
                XattrFlags::empty(),
            ),
            set => set,
        };
        warn_on_error(&mut warnings, set);
    }
    Ok(warnings)
}

/// Copies the access control list of a file to another. Without one, removes the list that the directory's default
/// gave.
pub(super) fn copy_access_list(from: &File, to: &File) -> rustix::io::Result<()> {
    let mut value = vec![0; MAX_ACCESS_LIST_BYTES];
    match getxattr(descriptor_path(from), ACCESS_LIST, &mut value[..]) {
        Ok(length) => fsetxattr(to, ACCESS_LIST, &value[..length], XattrFlags::empty()),
        Err(Errno::NODATA) => match fremovexattr(to, ACCESS_LIST) {
            Err(Errno::NODATA) => Ok(()),
            removed => removed,
        },
        // The file system or the system has none.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOENT) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Records a failure as a warning: the file is whole without the attribute.
fn warn_on_error(warnings: &mut MetadataWarnings, result: rustix::io::Result<()>) {
    if let Err(error) = result {
        warnings.push((Attribute::Xattr, error_text(error)));
    }
}
