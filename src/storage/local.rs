//! A store on disk: one directory, held as an open descriptor and never left.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, chownat};
use rustix::fs::{fstat, linkat, openat, renameat, symlinkat, unlinkat, utimensat};
use rustix::io::Errno;

use super::holes::next_data;
use super::io_errors::{check_target, fault, refusal};
use super::partial::{
    JUST_NOW, LocalUpload, read_full_at, remove, rename_exclusively, temporary_name, time_of,
    timestamps,
};
use super::reserved::Reserved;
use super::root::{Directory, Root, file_id};
use super::source::has_content;
use super::times::LocalTimeProbe;
use super::unsized_files::Devices;
use super::{
    ALL_PERMISSIONS, Attributes, FileId, Folding, Metadata, MetadataWarnings, PartialKey, Source,
    Store, TimeProbe, Upload, Version, attributes, case, read_only, sweep, xattr,
};
use crate::error::text::printable;
use crate::error::{Code, Error, Reason};
use crate::protocol::path::{RelativePath, is_partial_name};
use crate::protocol::{Attribute, Kind, Xattr};

/// A directory on disk as a [`Store`].
///
/// It is held as an open descriptor, from which every name is resolved; no symbolic link below it is followed. An
/// upload holds one descriptor, every other call only while it runs. When the path that it was opened by leads
/// elsewhere, for example after a rename or a mount, the store writes nothing more.
///
/// ```
/// # fn main() {
/// # example().unwrap();
/// # }
/// # fn example() -> Result<(), haul::Reason> {
/// use haul::{Attributes, Durability, LocalStore, PartialKey, RelativePath, Store};
///
/// let directory = tempfile::tempdir().unwrap();
/// let store = LocalStore::open(directory.path()).unwrap();
/// let name = RelativePath::from_components(["a", "b"])?;
/// let mut upload = store.create(&name, &PartialKey { owner: [0; 32], size: 5, modified: None })?;
/// upload.write_at(b"hello", 0).unwrap();
/// assert!(!directory.path().join("a/b").exists());
/// upload.commit(&Attributes::default(), Durability::Synced)?;
/// assert_eq!(std::fs::read(directory.path().join("a/b")).unwrap(), b"hello");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct LocalStore {
    root: Arc<Root>,
    path: PathBuf,
    /// Devices on which a file of size 0 is known to be empty.
    devices: Arc<Devices>,
    /// Cached results of asking file systems which names they treat as equal.
    probed: Arc<case::Probed>,
}

impl LocalStore {
    /// Opens a directory. Its own path may contain symbolic links.
    ///
    /// # Errors
    /// [`Error::Io`] when it does not exist, is not a directory, or may not be searched.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let root = Root::open(path).map_err(Error::io(format!(
            "cannot open the directory {}",
            display_path(path)
        )))?;
        Ok(Self {
            root: Arc::new(root),
            path: path.to_owned(),
            devices: Arc::default(),
            probed: Arc::default(),
        })
    }

    /// Opens a directory like [`open`](Self::open), and reserves another one, which must exist. The store lists, reads,
    /// creates, changes and removes nothing in the reserved directory, by any name. This includes targets of symbolic
    /// links in it, and links that lead to it. Meant for the directory with this machine's keys and settings, which is
    /// often below a served home directory.
    ///
    /// ```
    /// use haul::{LocalStore, RelativePath, Store};
    ///
    /// let home = tempfile::tempdir().unwrap();
    /// let keys = home.path().join("keys");
    /// std::fs::create_dir(&keys).unwrap();
    /// std::fs::write(keys.join("key.pem"), "secret").unwrap();
    /// let store = LocalStore::open_reserving(home.path(), &keys).unwrap();
    /// let key = RelativePath::from_components(["keys", "key.pem"]).unwrap();
    /// assert!(store.open(&key).is_err());
    /// assert!(LocalStore::open_reserving(&keys, &keys).is_err());
    /// ```
    ///
    /// # Errors
    /// Those of [`open`](Self::open), for both directories; [`Error::Usage`] when the store is the reserved directory,
    /// or is inside it.
    pub fn open_reserving(path: &Path, reserved: &Path) -> Result<Self, Error> {
        let mut store = Self::open(path)?;
        let all = Reserved::new(reserved).map_err(Error::io(format!(
            "cannot read the directory {}",
            display_path(reserved)
        )))?;
        if all.is_any(&store.root.ancestry(&RelativePath::root())) {
            return Err(Error::Usage(format!(
                "cannot use the directory {}: it is part of {}, which holds this machine's keys; choose another directory",
                display_path(path),
                display_path(reserved)
            )));
        }
        if let Some(root) = Arc::get_mut(&mut store.root) {
            root.reserved = Some(all);
        }
        Ok(store)
    }

    /// The directory's path as it was given, for display: names are never resolved through it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks that files can be created in the directory, by creating and removing an empty one.
    ///
    /// # Errors
    /// [`Error::Io`] when they cannot.
    pub fn check_writable(&self) -> Result<(), Error> {
        let name = temporary_name();
        let how =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(self.root.directory(), &name, how, Mode::RUSR | Mode::WUSR)
            .and_then(|_| unlinkat(self.root.directory(), &name, AtFlags::empty()))
            .map_err(|e| {
                let directory = display_path(&self.path);
                Error::io(format!(
                    "cannot write to {directory}; make it writable for this user, or choose another directory"
                ))(e.into())
            })
    }

    /// Opens the parent directory of a path, which must exist.
    fn parent<'p>(&self, path: &'p RelativePath) -> Result<(Directory<'_>, &'p [u8]), Reason> {
        self.root
            .parent(path)?
            .ok_or_else(|| refusal(Code::NotFound, path))
    }

    /// Opens a file or directory for reading, without following a link or waiting for the other end of a FIFO.
    fn open_any(&self, path: &RelativePath) -> Result<(File, Stat), Reason> {
        let cannot = |e: rustix::io::Errno| fault(path, "open it", e);
        if path.is_root() {
            let file = File::from(self.root.directory().readable().map_err(cannot)?);
            let stat = fstat(&file).map_err(cannot)?;
            return Ok((file, stat));
        }
        let (directory, name) = self.parent(path)?;
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
        self.root.check(&stat, path)?;
        check_openable(path, &stat)?;
        self.root.saw(&stat);
        Ok((file, stat))
    }

    /// Opens a file or directory for its metadata, also one that this user may not read.
    fn open_for_metadata(&self, path: &RelativePath) -> Result<File, Reason> {
        match self.open_any(path) {
            Err(why) if why.code == Code::PermissionDenied => {}
            opened => return opened.map(|(file, _)| file),
        }
        let cannot = |e: rustix::io::Errno| fault(path, "open it", e);
        let (directory, name) = self.parent(path)?;
        let file = read_only::open(&directory, name).map_err(cannot)?;
        let stat = fstat(&file).map_err(cannot)?;
        self.root.check(&stat, path)?;
        check_openable(path, &stat)?;
        Ok(file)
    }

    /// Refuses entries that must not get another hard link.
    fn check_linkable(
        &self,
        path: &RelativePath,
        directory: &Directory<'_>,
        name: &[u8],
    ) -> Result<(), Reason> {
        let stat = directory
            .stat(name)
            .map_err(|e| fault(path, "read its metadata", e))?;
        let stat = stat.ok_or_else(|| refusal(Code::NotFound, path))?;
        self.root.check(&stat, path)?;
        check_openable(path, &stat)?;
        if metadata(&stat).kind == Some(Kind::Directory) {
            Err(refusal(Code::IsDirectory, path))
        } else {
            Ok(())
        }
    }
}

impl Store for LocalStore {
    fn stat(&self, path: &RelativePath) -> Result<Option<Metadata>, Reason> {
        let stat = if path.is_root() {
            fstat(self.root.directory()).map(Some)
        } else {
            let Some((directory, name)) = self.root.parent(path)? else {
                return Ok(None);
            };
            directory.stat(name)
        }
        .map_err(|e| fault(path, "read its metadata", e))?;
        let Some(stat) = stat else {
            return Ok(None);
        };
        self.root.check(&stat, path)?;
        self.root.saw(&stat);
        Ok(Some(metadata(&stat)))
    }

    fn names(&self, directory: &RelativePath) -> Result<Vec<Vec<u8>>, Reason> {
        let mut names = Vec::new();
        self.visit(directory, &mut |name| {
            names.push(name.to_vec());
            true
        })?;
        Ok(names)
    }

    fn visit(
        &self,
        directory: &RelativePath,
        each: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<(), Reason> {
        let cannot = |e| fault(directory, "read the directory", e);
        let open = self
            .root
            .find(directory)?
            .ok_or_else(|| refusal(Code::NotFound, directory))?;
        for entry in Dir::new(open.readable().map_err(cannot)?).map_err(cannot)? {
            let entry = entry.map_err(cannot)?;
            let name = entry.file_name().to_bytes();
            if name == b"."
                || name == b".."
                || is_partial_name(name)
                || self.root.leaves_out(&open, name, entry.ino())
            {
                continue;
            }
            if !each(name) {
                break;
            }
        }
        Ok(())
    }

    fn xattrs(
        &self,
        path: &RelativePath,
        privileged: bool,
    ) -> Result<(Vec<Xattr>, MetadataWarnings), Reason> {
        let file = self.open_for_metadata(path)?;
        xattr::read(&file, privileged).map_err(|e| fault(path, "read its extended attributes", e))
    }

    fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Reason> {
        let (directory, name) = self.parent(path)?;
        match rustix::fs::readlinkat(&directory, name, Vec::new()) {
            Ok(target) => Ok(target.into_bytes()),
            Err(rustix::io::Errno::INVAL) => Err(Reason::new(
                Code::Unreadable,
                format!("{path}: it is not a symbolic link"),
            )),
            Err(e) => Err(fault(path, "read the symbolic link", e)),
        }
    }

    fn has_unsized_content(&self, path: &RelativePath, seen: &Metadata) -> Result<bool, Reason> {
        if self.devices.are_sized(&self.root, path, seen) {
            return Ok(false);
        }
        has_content(&*self.open(path)?, path)
    }

    fn open(&self, path: &RelativePath) -> Result<Box<dyn Source>, Reason> {
        let (file, stat) = self.open_any(path)?;
        match metadata(&stat).kind {
            Some(Kind::File) => Ok(Box::new(LocalSource(file))),
            _ => Err(refusal(Code::IsDirectory, path)),
        }
    }

    fn create(&self, path: &RelativePath, key: &PartialKey) -> Result<Box<dyn Upload>, Reason> {
        Ok(Box::new(LocalUpload::create(&self.root, path, key)?))
    }

    fn make_directory(&self, path: &RelativePath) -> Result<(), Reason> {
        self.root.check_not_moved(path)?;
        self.root.make_private(path)
    }

    fn set_attributes(
        &self,
        path: &RelativePath,
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        self.root.check_not_moved(path)?;
        let file = self.open_for_metadata(path)?;
        let _modes = self.root.modes();
        attributes::set(&file, path, attributes)
    }

    fn make_symlink(
        &self,
        path: &RelativePath,
        target: &[u8],
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        let Some(parent) = path.parent() else {
            return Err(refusal(Code::IsDirectory, path));
        };
        check_target(path, target)?;
        self.root.check_not_moved(path)?;
        let directory = self.root.make(&parent)?;
        let last = path.name().unwrap_or_default();
        let temporary = temporary_name();
        self.root.check_name(&directory, last, path)?;
        self.root
            .change(&directory, || symlinkat(target, &directory, &temporary))
            .map_err(|e| fault(path, "create the symbolic link", e))?;
        let mut warnings = MetadataWarnings::new();
        let time = attributes.modified.map_or(Ok(()), |modified| {
            utimensat(
                &directory,
                &temporary,
                &timestamps(modified, JUST_NOW),
                AtFlags::SYMLINK_NOFOLLOW,
            )
        });
        let time = attributes::allow(&mut warnings, Attribute::Time, time);
        let owner = attributes.owner.map_or(Ok(()), |owner| {
            let user = Some(Uid::from_raw(owner.user));
            let group = Some(Gid::from_raw(owner.group));
            chownat(
                &directory,
                &temporary,
                user,
                group,
                AtFlags::SYMLINK_NOFOLLOW,
            )
        });
        let owner = attributes::allow(&mut warnings, Attribute::Owner, owner);
        // If the name is a directory, the system refuses the rename.
        let rename = || match attributes.exclusive {
            true => rename_exclusively(&directory, temporary.as_bytes(), last),
            false => renameat(&directory, &temporary, &directory, last),
        };
        time.and(owner)
            .and_then(|()| self.root.change(&directory, rename))
            .map(|()| warnings)
            .map_err(|e| {
                let _ = remove(&self.root, &directory, temporary.as_bytes());
                match e {
                    Errno::EXIST => refusal(Code::Exists, path),
                    e => fault(path, "rename the symbolic link into place", e),
                }
            })
    }

    fn link(&self, existing: &RelativePath, new: &RelativePath) -> Result<(), Reason> {
        let Some(parent) = new.parent() else {
            return Err(refusal(Code::IsDirectory, new));
        };
        self.root.check_not_moved(new)?;
        let (from, name) = self.parent(existing)?;
        self.check_linkable(existing, &from, name)?;
        let to = self.root.make(&parent)?;
        let last = new.name().unwrap_or_default();
        let temporary = temporary_name();
        self.root.check_name(&to, last, new)?;
        self.root
            .change(&to, || {
                linkat(&from, name, &to, &temporary, AtFlags::empty())
            })
            .map_err(|e| fault(new, &format!("create the hard link to {existing}"), e))?;
        // Check again: the linked file may not be the one that was checked before.
        let renamed = self
            .check_linkable(existing, &to, temporary.as_bytes())
            .and_then(|()| {
                let renamed = self
                    .root
                    .change(&to, || renameat(&to, &temporary, &to, last));
                renamed.map_err(|e| fault(new, "rename the hard link into place", e))
            });
        // The temporary name still exists if the rename failed, or if both were names of the same file already.
        let _ = remove(&self.root, &to, temporary.as_bytes());
        renamed
    }

    fn remove(&self, path: &RelativePath) -> Result<(), Reason> {
        self.root.check_not_moved(path)?;
        let (directory, name) = self.parent(path)?;
        let stat = directory
            .stat(name)
            .map_err(|e| fault(path, "read its metadata", e))?;
        let stat = stat.ok_or_else(|| refusal(Code::NotFound, path))?;
        self.root.check(&stat, path)?;
        let how = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => AtFlags::REMOVEDIR,
            _ => AtFlags::empty(),
        };
        self.root
            .change(&directory, || unlinkat(&directory, name, how))
            .map_err(|e| fault(path, "remove it", e))
    }

    fn ancestry(&self, path: &RelativePath) -> Vec<FileId> {
        self.root.ancestry(path)
    }

    fn folding(&self, directory: &RelativePath, wanted: Folding, may_write: bool) -> Folding {
        case::folding(&self.root, &self.probed, directory, wanted, may_write)
    }

    fn correct_spelling(&self, path: &RelativePath, folding: Folding) -> Result<bool, Reason> {
        case::correct_spelling(&self.root, path, folding)
    }

    fn time_probe(&self, beside: &RelativePath) -> Option<Box<dyn TimeProbe>> {
        Some(Box::new(LocalTimeProbe::new(&self.root, beside)?))
    }

    fn check_root(&self) -> Result<(), Reason> {
        self.root.check_not_moved_now()
    }

    fn sync(&self) -> Result<(), Reason> {
        // A session ends with this call, and may have written since the last check.
        self.check_root()?;
        self.root
            .sync()
            .map_err(|e| fault(&RelativePath::root(), "sync the store to disk", e))
    }

    fn sweep(&self, age: Duration) -> Result<u64, Reason> {
        sweep::sweep(&self.root, age)
    }
}

/// A regular file, open for reading.
struct LocalSource(File);

impl Source for LocalSource {
    fn metadata(&self) -> io::Result<Metadata> {
        Ok(metadata(&fstat(&self.0)?))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        read_full_at(&self.0, buffer, offset)
    }

    fn data_from(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        next_data(&self.0, offset, self.0.metadata()?.len())
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

/// Refuses everything except files and directories.
fn check_openable(path: &RelativePath, stat: &Stat) -> Result<(), Reason> {
    match metadata(stat).kind {
        Some(Kind::File | Kind::Directory) => Ok(()),
        Some(Kind::Symlink) => Err(refusal(Code::Symlink, path)),
        None => Err(refusal(Code::Special, path)),
    }
}

#[allow(
    clippy::unnecessary_cast,
    reason = "the fields of stat have other types on other systems"
)]
fn metadata(stat: &Stat) -> Metadata {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Some(Kind::File),
        FileType::Directory => Some(Kind::Directory),
        FileType::Symlink => Some(Kind::Symlink),
        _ => None,
    };
    let size = if kind == Some(Kind::File) {
        stat.st_size as u64
    } else {
        0
    };
    let modified = time_of(stat.st_mtime as i64, stat.st_mtime_nsec as u32);
    let changed = time_of(stat.st_ctime as i64, stat.st_ctime_nsec as u32);
    let version = Version {
        file: file_id(stat),
        size,
        modified,
        changed,
    };
    let links = if kind == Some(Kind::File) {
        stat.st_nlink as u64
    } else {
        1
    };
    let mode = stat.st_mode as u32 & ALL_PERMISSIONS;
    let owner = attributes::owner_of(stat);
    Metadata {
        kind,
        size,
        modified,
        mode,
        owner,
        links,
        version,
    }
}

fn display_path(path: &Path) -> String {
    printable(path.as_os_str().as_bytes())
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
