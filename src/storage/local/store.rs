//! A store on disk: one directory, held as an open descriptor and never left.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, Dir, FileType, fstat, unlinkat};
use rustix::io::Errno;

use super::folding::{self, ProbedFolding};
use super::names::{PRIVATE_FILE, stat_of_new_file};
use super::open::{open_any, open_for_metadata, stat_existing};
use super::reserved::Reserved;
use super::root::Root;
use super::source::LocalSource;
use super::stat::{metadata, type_of};
use super::time_probe::LocalTimeProbe;
use super::unsized_files::SizedDevices;
use super::upload::LocalUpload;
use super::{attributes, links, sweep, sync, xattr};
use crate::error::text::printable;
use crate::error::{Code, Error, Reason};
use crate::protocol::Xattr;
use crate::protocol::path::{RelativePath, is_partial_name};
use crate::storage::file_id::FileId;
use crate::storage::folding::Folding;
use crate::storage::io_errors::{fault, refusal};
use crate::storage::metadata::{Attributes, Metadata, MetadataWarnings};
use crate::storage::source::{Source, has_content};
use crate::storage::store::{Store, TimeProbe};
use crate::storage::upload::{PartialKey, Upload};

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
    pub(super) root: Arc<Root>,
    path: PathBuf,
    /// Devices on which a file of size 0 is known to be empty.
    devices: Arc<SizedDevices>,
    /// Cached results of asking file systems which names they treat as equal.
    probed: Arc<ProbedFolding>,
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
        if all.has_any(&store.root.ancestry(&RelativePath::root())) {
            return Err(Error::Usage(format!(
                "cannot use the directory {}: it is part of {}, which holds this machine's keys; choose another directory",
                display_path(path),
                display_path(reserved)
            )));
        }
        if let Some(root) = Arc::get_mut(&mut store.root) {
            root.reserved = all;
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
        stat_of_new_file(&self.root, &self.root.directory(), PRIVATE_FILE)
            .map(drop)
            .map_err(|e| {
                let directory = display_path(&self.path);
                Error::io(format!(
                    "cannot write to {directory}; make it writable for this user, or choose another directory"
                ))(e.into())
            })
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
        self.root.reserved.check(&stat, path)?;
        self.root.record_device(&stat);
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
                || self.root.reserved.leaves_out(&open, name, entry.ino())
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
        let file = open_for_metadata(&self.root, path)?;
        xattr::read(&file, privileged).map_err(|e| fault(path, "read its extended attributes", e))
    }

    fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Reason> {
        let (directory, name) = self.root.existing_parent(path)?;
        match rustix::fs::readlinkat(&directory, name, Vec::new()) {
            Ok(target) => Ok(target.into_bytes()),
            Err(Errno::INVAL) => Err(Reason::new(
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
        let (file, stat) = open_any(&self.root, path)?;
        match type_of(&stat) {
            FileType::RegularFile => Ok(Box::new(LocalSource(file))),
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
        let file = open_for_metadata(&self.root, path)?;
        let _modes = self.root.modes.lock();
        attributes::set(&file, path, attributes)
    }

    fn make_symlink(
        &self,
        path: &RelativePath,
        target: &[u8],
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        links::make_symlink(&self.root, path, target, attributes)
    }

    fn link(&self, existing: &RelativePath, new: &RelativePath) -> Result<(), Reason> {
        links::make_hard_link(&self.root, existing, new)
    }

    fn remove(&self, path: &RelativePath) -> Result<(), Reason> {
        self.root.check_not_moved(path)?;
        let (directory, name) = self.root.existing_parent(path)?;
        let stat = stat_existing(&self.root, &directory, name, path)?;
        let how = match type_of(&stat) {
            FileType::Directory => AtFlags::REMOVEDIR,
            _ => AtFlags::empty(),
        };
        let remove = || unlinkat(&directory, name, how);
        self.root
            .modes
            .change_names(&directory, remove)
            .map_err(|e| fault(path, "remove it", e))
    }

    fn ancestry(&self, path: &RelativePath) -> Vec<FileId> {
        self.root.ancestry(path)
    }

    fn folding(&self, directory: &RelativePath, wanted: Folding, may_write: bool) -> Folding {
        folding::probe_folding(&self.root, &self.probed, directory, wanted, may_write)
    }

    fn correct_spelling(&self, path: &RelativePath, folding: Folding) -> Result<bool, Reason> {
        folding::correct_spelling(&self.root, path, folding)
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
        sync::sync_all(&self.root)
            .map_err(|e| fault(&RelativePath::root(), "sync the store to disk", e))
    }

    fn sweep(&self, age: Duration) -> Result<u64, Reason> {
        sweep::sweep(&self.root, age)
    }
}

fn display_path(path: &Path) -> String {
    printable(path.as_os_str().as_bytes())
}
