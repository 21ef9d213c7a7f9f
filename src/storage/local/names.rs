//! Names in a directory: those of partials and temporary files, and the rename that makes a file appear.
//!
//! A partial is beside its final name, as `.haul-<32 hex digits>.partial`. The digits are derived from the partial key
//! and the path, so that a rerun finds it without an index.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use rustix::fs::{AtFlags, Mode, OFlags, Stat, fstat, linkat, openat, renameat, unlinkat};
use rustix::io::Errno;

use super::directory::Directory;
use super::root::Root;
use super::stat::file_id;
use crate::error::{Code, Reason};
use crate::protocol::Time;
use crate::protocol::path::{PARTIAL_DIGITS, PARTIAL_PREFIX, PARTIAL_SUFFIX, RelativePath};
use crate::storage::io_errors::{fault, refusal};
use crate::storage::upload::PartialKey;

/// Mode of a partial and of a temporary file: other users must not read unverified content.
pub(super) const PRIVATE_FILE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Returns the name of the partial for a path and partial key.
pub(super) fn partial_name_of(path: &RelativePath, key: &PartialKey) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("haul 1 name of a partial");
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(&key.owner);
    field(path.as_bytes());
    field(&key.size.to_le_bytes());
    match key.modified {
        Some(Time {
            seconds,
            nanoseconds,
        }) => {
            field(&seconds.to_le_bytes());
            field(&nanoseconds.to_le_bytes());
        }
        None => field(b""),
    }
    partial_name(&hasher.finalize(), "")
}

/// Returns a unique name in the form of a partial, for a temporary file.
pub(super) fn temporary_name() -> String {
    temporary_name_with("")
}

/// Returns such a name with a suffix after the digits, [`PARTIAL_ACCENT`](crate::protocol::path::PARTIAL_ACCENT) or
/// nothing, to test how a file system treats it.
pub(super) fn temporary_name_with(suffix: &str) -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let unique = (
        std::process::id(),
        COUNTER.fetch_add(1, Ordering::Relaxed),
        SystemTime::now(),
    );
    partial_name(&blake3::hash(format!("{unique:?}").as_bytes()), suffix)
}

fn partial_name(digest: &blake3::Hash, after_digits: &str) -> String {
    let [prefix, suffix] = [PARTIAL_PREFIX, PARTIAL_SUFFIX].map(String::from_utf8_lossy);
    format!(
        "{prefix}{}{after_digits}{suffix}",
        &digest.to_hex()[..PARTIAL_DIGITS]
    )
}

/// Creates an empty file. Fails if the name exists.
pub(super) fn create_new(
    root: &Root,
    directory: &Directory<'_>,
    name: &[u8],
    mode: Mode,
) -> rustix::io::Result<File> {
    let how = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let create = || openat(directory, name, how, mode);
    root.modes.change_names(directory, create).map(File::from)
}

/// Returns the stat that a new file of this mode gets in a directory, from the umask, a default ACL and the file
/// system. Creates a temporary file to find out.
pub(super) fn stat_of_new_file(
    root: &Root,
    directory: &Directory<'_>,
    mode: Mode,
) -> rustix::io::Result<Stat> {
    let name = temporary_name();
    let file = create_new(root, directory, name.as_bytes(), mode)?;
    let stat = fstat(&file);
    remove(root, directory, name.as_bytes())?;
    stat
}

/// Removes a name, but no directory.
pub(super) fn remove(
    root: &Root,
    directory: &Directory<'_>,
    name: &[u8],
) -> rustix::io::Result<()> {
    let remove = || unlinkat(directory, name, AtFlags::empty());
    root.modes.change_names(directory, remove)
}

/// Whether a name still refers to an open file.
pub(super) fn is_named(
    directory: &Directory<'_>,
    name: &[u8],
    file: &File,
) -> rustix::io::Result<bool> {
    let open = file_id(&fstat(file)?);
    let there = directory.stat(name)?;
    Ok(there.is_some_and(|there| file_id(&there) == open))
}

/// Renames a finished file or link to the last component of its path, which replaces a file or link of that name
/// atomically. With `exclusive` it replaces nothing. `what` says what cannot be done if it fails. If the name is a
/// directory, the system refuses the rename.
pub(super) fn rename_into_place(
    root: &Root,
    directory: &Directory<'_>,
    from: &[u8],
    path: &RelativePath,
    exclusive: bool,
    what: &str,
) -> Result<(), Reason> {
    let to = path.name().unwrap_or_default();
    let rename = || match exclusive {
        true => rename_exclusively(directory, from, to),
        false => renameat(directory, from, directory, to),
    };
    let renamed = root.modes.change_names(directory, rename);
    renamed.map_err(|e| match e {
        Errno::EXIST => refusal(Code::Exists, path),
        e => fault(path, what, e),
    })
}

/// Renames, unless the target exists: makes a hard link, which fails if the name exists, and then removes the old name.
/// On a file system without hard links, checks the target first; a file created after the check is replaced.
fn rename_exclusively(directory: &Directory<'_>, from: &[u8], to: &[u8]) -> rustix::io::Result<()> {
    match linkat(directory, from, directory, to, AtFlags::empty()) {
        Ok(()) => unlinkat(directory, from, AtFlags::empty()),
        Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK) => {
            match directory.stat(to)? {
                Some(_) => Err(Errno::EXIST),
                None => renameat(directory, from, directory, to),
            }
        }
        Err(other) => Err(other),
    }
}
