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

use super::FileId;
use super::io_errors::{fault, refusal};
use super::root::{Directory, PASS_THROUGH, Root, file_id};
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;

/// Symbolic links followed on one path, as in Linux.
const MAX_LINKS: usize = 40;

/// The reserved files and names. Links that are created later count from the next start on.
pub(super) struct Reserved {
    /// The directory, its files that have hard links elsewhere, and the targets of its links.
    files: Vec<FileId>,
    /// Names in other directories: links on the way to the directory, and targets of its links.
    names: Vec<(FileId, Vec<u8>)>,
    /// Keeps the system from reusing the inode numbers in `files`.
    _open: Vec<OwnedFd>,
}

impl Reserved {
    /// Reads a directory, which must exist.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        let mut reserved = Self {
            files: Vec::new(),
            names: Vec::new(),
            _open: Vec::new(),
        };
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
        let link = FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
        let shared =
            stat.st_nlink > 1 && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
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
        match FileType::from_raw_mode(fstat(&file)?.st_mode) {
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
            match FileType::from_raw_mode(stat.st_mode) {
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
        let directory = file_id(&fstat(directory)?);
        self.names.push((directory, name.into_vec()));
        Ok(())
    }

    /// Whether a file is reserved, by any name.
    pub(super) fn is(&self, stat: &Stat) -> bool {
        self.files.contains(&file_id(stat))
    }

    /// Whether a name in a directory is reserved.
    fn is_name(&self, directory: impl AsFd, name: &[u8]) -> rustix::io::Result<bool> {
        if !self
            .names
            .iter()
            .any(|(_, reserved)| reserved.eq_ignore_ascii_case(name))
        {
            return Ok(false);
        }
        let directory = file_id(&fstat(directory)?);
        // Ignores case, because the file system may ignore it too. Refusing one name too many does no harm.
        Ok(self
            .names
            .iter()
            .any(|(of, reserved)| *of == directory && reserved.eq_ignore_ascii_case(name)))
    }

    /// Whether any of these is reserved.
    pub(super) fn is_any(&self, identities: &[FileId]) -> bool {
        identities
            .iter()
            .any(|identity| self.files.contains(identity))
    }
}

/// Flags that open a file of any kind without reading it.
#[cfg(target_os = "linux")]
const OPEN_ANY: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);
#[cfg(not(target_os = "linux"))]
const OPEN_ANY: OFlags = OFlags::RDONLY
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

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

fn not_allowed(path: &RelativePath) -> Reason {
    refusal(Code::NotAllowed, path)
}

impl Root {
    /// Whether an open directory is neither reserved nor below a reserved one. Also returns `false` when it cannot find
    /// out; then the path has to be walked.
    pub(super) fn is_clear(&self, directory: impl AsFd, path: &RelativePath) -> bool {
        let Some(reserved) = &self.reserved else {
            return true;
        };
        let mut above = Vec::new();
        (0..path.components().count()).all(|depth| {
            let stat = if depth == 0 {
                fstat(&directory)
            } else {
                above.extend_from_slice(if depth == 1 { b".." } else { b"/.." });
                statat(&directory, &above, AtFlags::empty())
            };
            stat.is_ok_and(|stat| !reserved.is(&stat))
        })
    }

    /// Refuses a reserved file, by any name.
    pub(super) fn check(&self, stat: &Stat, path: &RelativePath) -> Result<(), Reason> {
        match &self.reserved {
            Some(all) if all.is(stat) => Err(not_allowed(path)),
            _ => Ok(()),
        }
    }

    /// Refuses a reserved directory.
    pub(super) fn check_open(
        &self,
        directory: impl AsFd,
        path: &RelativePath,
    ) -> Result<(), Reason> {
        if self.reserved.is_none() {
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
        let Some(all) = &self.reserved else {
            return Ok(());
        };
        match all.is_name(directory, name) {
            Ok(false) => Ok(()),
            Ok(true) => Err(not_allowed(path)),
            Err(e) => Err(fault(path, "read the metadata of its directory", e)),
        }
    }

    /// Whether an entry of a directory is left out of listings.
    pub(super) fn leaves_out(&self, directory: &Directory<'_>, name: &[u8], inode: u64) -> bool {
        let Some(all) = &self.reserved else {
            return false;
        };
        // Reads the device only if the inode matches.
        let same = all.files.iter().any(|file| file.inode == inode)
            && matches!(directory.stat(name), Ok(Some(stat)) if all.is(&stat));
        same || all.is_name(directory, name).unwrap_or(true)
    }
}
