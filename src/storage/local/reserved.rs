//! A directory that no session may read or change, such as the one with this machine's keys.
//!
//! It is identified by device and inode, so neither another spelling of its name nor a second mount bypasses it.
//! Symbolic links into it and out of it are reserved too: replacing such a link, or the file it points to, also
//! replaces a key. Descriptors stay open, so that the system does not reuse an inode number.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat, statat,
};
use rustix::io::Errno;

use super::directory::{Directory, PASS_THROUGH};
use super::stat::{file_id, type_of};
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::storage::file_id::FileId;
use crate::storage::io_errors::{fault, refusal};

/// Symbolic links followed on one path, as in Linux.
const MAX_LINKS: usize = 40;

/// Flags that open a file of any kind without reading it.
#[cfg(target_os = "linux")]
const OPEN_ANY: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);
#[cfg(not(target_os = "linux"))]
const OPEN_ANY: OFlags = OFlags::RDONLY
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

/// The reserved files and names; by default none. Links that are created later count from the next start on.
#[derive(Default)]
pub(super) struct Reserved {
    /// The directory, its files that have hard links elsewhere, and the targets of its links.
    files: Vec<FileId>,
    /// Names in other directories: links on the way to the directory, and targets of its links.
    names: Vec<ReservedName>,
    /// Keeps the system from reusing the inode numbers in `files`.
    _open: Vec<OwnedFd>,
}

/// A reserved name in a directory.
struct ReservedName {
    directory: FileId,
    name: Vec<u8>,
}

impl ReservedName {
    /// Ignores case, because the file system may ignore it too. Refusing one name too many does no harm.
    fn matches(&self, name: &[u8]) -> bool {
        self.name.eq_ignore_ascii_case(name)
    }
}

impl Reserved {
    /// Reads a directory, which must exist.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        let mut reserved = Self::default();
        let path = std::path::absolute(path)?;
        reserved.follow(&path)?;
        let directory = openat(CWD, &path, PASS_THROUGH, Mode::empty())?;
        let readable = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        for entry in Dir::new(openat(&directory, c".", readable, Mode::empty())?)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                reserved.add_entry(&directory, &path, &name)?;
            }
        }
        reserved.add(directory)?;
        Ok(reserved)
    }

    /// Adds the other names and targets of one entry of the directory.
    fn add_entry(&mut self, directory: &OwnedFd, path: &Path, name: &[u8]) -> io::Result<()> {
        let stat = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            stat => stat?,
        };
        let link = type_of(&stat) == FileType::Symlink;
        let shared = stat.st_nlink > 1 && type_of(&stat) == FileType::RegularFile;
        if link {
            self.follow(&path.join(OsString::from_vec(name.to_vec())))?;
        }
        if link || shared {
            match openat(directory, name, OPEN_ANY, Mode::empty()) {
                Ok(file) => self.add_file(file)?,
                // The target does not exist; its name is reserved.
                Err(Errno::NOENT) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Adds a file. A directory that a link points to is not reserved.
    fn add_file(&mut self, file: OwnedFd) -> io::Result<()> {
        match type_of(&fstat(&file)?) {
            FileType::Directory => Ok(()),
            _ => self.add(file),
        }
    }

    fn add(&mut self, file: OwnedFd) -> io::Result<()> {
        self.files.push(file_id(&fstat(&file)?));
        self._open.push(file);
        Ok(())
    }

    /// Adds the links that an absolute path passes through, and the name of the file at its end.
    fn follow(&mut self, path: &Path) -> io::Result<()> {
        let mut pending = Vec::new();
        let mut here = openat(CWD, c"/", PASS_THROUGH, Mode::empty())?;
        let mut links = 0;
        push_components(&mut pending, path);
        while let Some(name) = pending.pop() {
            let stat = match statat(&here, &name, AtFlags::SYMLINK_NOFOLLOW) {
                // The name does not exist, and no session may create it.
                Err(Errno::NOENT) => return self.add_name(&here, name),
                stat => stat?,
            };
            match type_of(&stat) {
                FileType::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    let target = readlinkat(&here, &name, Vec::new())?;
                    self.add_name(&here, name)?;
                    let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                    if target.is_absolute() {
                        here = openat(CWD, c"/", PASS_THROUGH, Mode::empty())?;
                    }
                    push_components(&mut pending, &target);
                }
                FileType::Directory => {
                    here = openat(&here, &name, PASS_THROUGH | OFlags::NOFOLLOW, Mode::empty())?;
                }
                _ => return self.add_name(&here, name),
            }
        }
        Ok(())
    }

    fn add_name(&mut self, directory: &OwnedFd, name: OsString) -> io::Result<()> {
        self.names.push(ReservedName {
            directory: file_id(&fstat(directory)?),
            name: name.into_vec(),
        });
        Ok(())
    }

    /// Whether nothing is reserved.
    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty() && self.names.is_empty()
    }

    /// Whether a file is reserved, by any name.
    fn has_file(&self, stat: &Stat) -> bool {
        self.files.contains(&file_id(stat))
    }

    /// Whether any of these files is reserved.
    pub(super) fn has_any(&self, files: &[FileId]) -> bool {
        files.iter().any(|file| self.files.contains(file))
    }

    /// Whether a name in a directory is reserved.
    fn has_name(&self, directory: impl AsFd, name: &[u8]) -> rustix::io::Result<bool> {
        if !self.names.iter().any(|reserved| reserved.matches(name)) {
            return Ok(false);
        }
        let directory = file_id(&fstat(directory)?);
        Ok(self
            .names
            .iter()
            .any(|reserved| reserved.directory == directory && reserved.matches(name)))
    }

    /// Whether an open directory is neither reserved nor below a reserved one. Also returns `false` when it cannot find
    /// out; then the path has to be walked.
    pub(super) fn is_clear(&self, directory: impl AsFd, path: &RelativePath) -> bool {
        if self.is_empty() {
            return true;
        }
        let mut above = Vec::new();
        (0..path.components().count()).all(|depth| {
            let stat = if depth == 0 {
                fstat(&directory)
            } else {
                above.extend_from_slice(if depth == 1 { b".." } else { b"/.." });
                statat(&directory, &above, AtFlags::empty())
            };
            stat.is_ok_and(|stat| !self.has_file(&stat))
        })
    }

    /// Refuses a reserved file, by any name.
    pub(super) fn check(&self, stat: &Stat, path: &RelativePath) -> Result<(), Reason> {
        match self.has_file(stat) {
            true => Err(refusal(Code::NotAllowed, path)),
            false => Ok(()),
        }
    }

    /// Refuses a reserved directory.
    pub(super) fn check_open(
        &self,
        directory: impl AsFd,
        path: &RelativePath,
    ) -> Result<(), Reason> {
        if self.is_empty() {
            return Ok(());
        }
        let stat = fstat(directory).map_err(|e| fault(path, "read its metadata", e))?;
        self.check(&stat, path)
    }

    /// Refuses a reserved name in a directory.
    pub(super) fn check_name(
        &self,
        directory: &Directory<'_>,
        name: &[u8],
        path: &RelativePath,
    ) -> Result<(), Reason> {
        match self.has_name(directory, name) {
            Ok(false) => Ok(()),
            Ok(true) => Err(refusal(Code::NotAllowed, path)),
            Err(e) => Err(fault(path, "read the metadata of its directory", e)),
        }
    }

    /// Whether an entry of a directory is left out of listings.
    pub(super) fn leaves_out(&self, directory: &Directory<'_>, name: &[u8], inode: u64) -> bool {
        // Reads the device only if the inode matches.
        let same = self.files.iter().any(|file| file.inode == inode)
            && matches!(directory.stat(name), Ok(Some(stat)) if self.has_file(&stat));
        same || self.has_name(directory, name).unwrap_or(true)
    }
}

/// Pushes the components of a path on a stack, the first one on top.
fn push_components(pending: &mut Vec<OsString>, path: &Path) {
    let components = path
        .components()
        .rev()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        });
    pending.extend(components);
}
