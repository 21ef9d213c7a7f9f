//! Containment: every directory is opened from the root's descriptor, and no symbolic link is followed on the way.
//!
//! Linux does this in one call (openat2, with `RESOLVE_BENEATH` and `RESOLVE_NO_SYMLINKS`). If that is missing, and to
//! find out which component failed, the path is walked component by component with `O_NOFOLLOW`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, mkdirat, openat};
use rustix::io::Errno;

use super::directory::{Directory, PASS_THROUGH};
use super::durable_names::DurableNames;
use super::read_only::DirectoryModes;
use super::reserved::Reserved;
use super::stat::{device_of, file_id, type_of};
use crate::error::lock::lock;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::storage::file_id::FileId;
use crate::storage::io_errors::{fault, refusal};

/// Mode of an announced directory, until its final mode is set.
const PRIVATE_MODE: Mode = Mode::RWXU;
/// Mode of missing parent directories: as with `mkdir -p`, the umask or a default ACL restricts it.
const PARENT_MODE: Mode = Mode::RWXU.union(Mode::RWXG).union(Mode::RWXO);
/// How often an operation is retried when another process keeps changing the file.
pub(super) const ATTEMPTS: u32 = 8;
/// Most directories above each other that are looked at.
const MAX_DEPTH: usize = 4096;
/// How long a successful check of the root's path counts, before a change checks again.
const ROOT_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The error when the root is no longer where it was opened.
const DISPLACED: &str = "cannot use the directory of the store: it was renamed, removed or mounted over, and its path leads \
                         elsewhere; restart haul there, then run the same command again";

/// The root of a store.
pub(super) struct Root {
    descriptor: OwnedFd,
    /// The path that the root was opened by.
    path: PathBuf,
    /// When the path last led to the root.
    pub(super) last_found: Mutex<Option<Instant>>,
    device: u64,
    /// Whether openat2 exists; found out by using it.
    pub(super) openat2: AtomicBool,
    /// Whether flock is tried; tests clear it to act like a file system without flock.
    pub(super) flock: AtomicBool,
    /// Whether an entry on another file system was found below the root.
    spans_file_systems: AtomicBool,
    /// Directories that are on disk with all directories above them.
    pub(super) durable: DurableNames,
    pub(super) modes: DirectoryModes,
    /// The files that no session may read or change.
    pub(super) reserved: Reserved,
}

impl Root {
    /// Opens a directory as the root. Its own path may contain symbolic links.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let descriptor = rustix::fs::open(path, PASS_THROUGH, Mode::empty())?;
        Ok(Self {
            device: device_of(&fstat(&descriptor)?),
            descriptor,
            path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
            last_found: Mutex::default(),
            openat2: AtomicBool::new(cfg!(target_os = "linux")),
            flock: AtomicBool::new(true),
            spans_file_systems: AtomicBool::new(false),
            durable: DurableNames::default(),
            modes: DirectoryModes::default(),
            reserved: Reserved::default(),
        })
    }

    /// Returns the root directory.
    pub(super) fn directory(&self) -> Directory<'_> {
        Directory::Root(self.descriptor.as_fd())
    }

    /// Refuses a change when the root is no longer under the path that it was opened by: it was mounted over, renamed
    /// or removed. The user would not find files written after that.
    pub(super) fn check_not_moved(&self, path: &RelativePath) -> Result<(), Reason> {
        let recently = |at: &Instant| at.elapsed() < ROOT_CHECK_INTERVAL;
        if self.last_found().as_ref().is_some_and(recently) {
            return Ok(());
        }
        self.check_not_moved_now()
            .map_err(|why| Reason::new(why.code, format!("{path}: {}", why.text)))
    }

    /// Does the same check for the whole store, without the cached result.
    pub(super) fn check_not_moved_now(&self) -> Result<(), Reason> {
        if self.path_leads_here() {
            *self.last_found() = Some(Instant::now());
            return Ok(());
        }
        tracing::warn!(path = %self.path.display(), "the directory was moved, removed or mounted over");
        Err(Reason::new(Code::Io, DISPLACED))
    }

    /// Whether the path still leads to the root. If the system does not say, for example for lack of permission, it
    /// counts as yes.
    fn path_leads_here(&self) -> bool {
        match (rustix::fs::stat(&self.path), fstat(&self.descriptor)) {
            (Ok(there), Ok(held)) => file_id(&there) == file_id(&held),
            (Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP), _) => false,
            _ => true,
        }
    }

    fn last_found(&self) -> MutexGuard<'_, Option<Instant>> {
        lock(&self.last_found)
    }

    /// Opens a directory; `None` when it or a parent does not exist.
    pub(super) fn find(&self, path: &RelativePath) -> Result<Option<Directory<'_>>, Reason> {
        if path.is_root() {
            return Ok(Some(self.directory()));
        }
        match self.resolve(path) {
            Ok(descriptor) if self.reserved.is_clear(&descriptor, path) => {
                Ok(Some(Directory::Below(descriptor)))
            }
            Err(Errno::NOENT) if self.reserved.is_empty() => Ok(None),
            // The walk handles EAGAIN after a concurrent rename, because it never goes up. It also names the component
            // that is reserved.
            _ => self.walk(path, None),
        }
    }

    /// Returns device and inode of a directory, or its nearest existing parent, and of all directories above it. Those
    /// above the root are only looked at.
    pub(super) fn ancestry(&self, path: &RelativePath) -> Vec<FileId> {
        let identity = |directory: &dyn AsFd| {
            let stat = fstat(directory.as_fd()).ok()?;
            Some(file_id(&stat))
        };
        let mut chain = Vec::new();
        let mut below = Some(path.clone()).filter(|path| !path.is_root());
        while let Some(path) = below {
            chain.extend(
                self.find(&path)
                    .ok()
                    .flatten()
                    .and_then(|directory| identity(&directory)),
            );
            below = path.parent().filter(|path| !path.is_root());
        }
        chain.extend(identity(&self.descriptor));
        let up = |from: BorrowedFd<'_>| openat(from, "..", PASS_THROUGH, Mode::empty()).ok();
        let mut above = up(self.descriptor.as_fd());
        while let Some(directory) = above.take() {
            // The root of the file system is its own parent.
            let Some(next) = identity(&directory).filter(|next| chain.last() != Some(next)) else {
                break;
            };
            if chain.len() >= MAX_DEPTH {
                break;
            }
            chain.push(next);
            above = up(directory.as_fd());
        }
        chain
    }

    /// Opens a directory, and creates it and its parents if they are missing.
    fn make(&self, path: &RelativePath) -> Result<Directory<'_>, Reason> {
        self.make_with(path, PARENT_MODE)
    }

    /// Creates a directory that only its owner may use until its final mode is set, and its parents if they are
    /// missing.
    pub(super) fn make_private(&self, path: &RelativePath) -> Result<(), Reason> {
        self.make_with(path, PRIVATE_MODE).map(|_| ())
    }

    fn make_with(&self, path: &RelativePath, last: Mode) -> Result<Directory<'_>, Reason> {
        if let Some(directory) = self.find(path)? {
            return Ok(directory);
        }
        self.walk(path, Some(last))?
            .ok_or_else(|| refusal(Code::NotFound, path))
    }

    /// Opens the parent directory of a path; `None` when it does not exist. The root has no parent. Refuses a reserved
    /// name.
    pub(super) fn parent<'p>(
        &self,
        path: &'p RelativePath,
    ) -> Result<Option<(Directory<'_>, &'p [u8])>, Reason> {
        let (Some(parent), Some(name)) = (path.parent(), path.name()) else {
            return Err(refusal(Code::IsDirectory, path));
        };
        let Some(directory) = self.find(&parent)? else {
            return Ok(None);
        };
        self.reserved.check_name(&directory, name, path)?;
        Ok(Some((directory, name)))
    }

    /// Opens the parent directory of a path for a new name in it, and creates it if it is missing. Refuses a reserved
    /// name, and every name once the root has moved.
    pub(super) fn make_parent<'p>(
        &self,
        path: &'p RelativePath,
    ) -> Result<(Directory<'_>, &'p [u8]), Reason> {
        let (Some(parent), Some(name)) = (path.parent(), path.name()) else {
            return Err(refusal(Code::IsDirectory, path));
        };
        self.check_not_moved(path)?;
        let directory = self.make(&parent)?;
        self.reserved.check_name(&directory, name, path)?;
        Ok((directory, name))
    }

    /// Opens the parent directory of a path, which must exist.
    pub(super) fn existing_parent<'p>(
        &self,
        path: &'p RelativePath,
    ) -> Result<(Directory<'_>, &'p [u8]), Reason> {
        self.parent(path)?
            .ok_or_else(|| refusal(Code::NotFound, path))
    }

    #[cfg(target_os = "linux")]
    fn resolve(&self, path: &RelativePath) -> Result<OwnedFd, Errno> {
        use rustix::fs::ResolveFlags as R;
        if !self.openat2.load(Ordering::Relaxed) {
            return Err(Errno::NOSYS);
        }
        let how = R::BENEATH | R::NO_SYMLINKS | R::NO_MAGICLINKS;
        let result = rustix::fs::openat2(
            &self.descriptor,
            path.as_bytes(),
            PASS_THROUGH,
            Mode::empty(),
            how,
        );
        // Linux before 5.6, or a container's seccomp filter that does not know the call.
        if let Err(Errno::NOSYS | Errno::PERM) = result {
            self.openat2.store(false, Ordering::Relaxed);
        }
        result
    }

    #[cfg(not(target_os = "linux"))]
    fn resolve(&self, _: &RelativePath) -> Result<OwnedFd, Errno> {
        Err(Errno::NOSYS)
    }

    /// Walks to a directory. With `last`, creates missing directories: the final one with that mode, its parents with
    /// the usual one.
    fn walk(
        &self,
        path: &RelativePath,
        last: Option<Mode>,
    ) -> Result<Option<Directory<'_>>, Reason> {
        let mut directory = self.directory();
        let mut here = RelativePath::root();
        for component in path.components() {
            here.push(component)?;
            let mode = last.map(|last| if here == *path { last } else { PARENT_MODE });
            match self.step(&directory, component, &here, mode)? {
                Some(descriptor) => directory = Directory::Below(descriptor),
                None => return Ok(None),
            }
        }
        Ok(Some(directory))
    }

    /// Opens the next component, whose path is `here`. Creates it if a mode is given and it is missing.
    fn step(
        &self,
        directory: &Directory<'_>,
        component: &[u8],
        here: &RelativePath,
        mode: Option<Mode>,
    ) -> Result<Option<OwnedFd>, Reason> {
        for _ in 0..ATTEMPTS {
            match openat(
                directory,
                component,
                PASS_THROUGH | OFlags::NOFOLLOW,
                Mode::empty(),
            ) {
                Ok(descriptor) => {
                    self.reserved.check_open(&descriptor, here)?;
                    return Ok(Some(descriptor));
                }
                Err(Errno::NOENT) => {
                    let Some(mode) = mode else { return Ok(None) };
                    self.reserved.check_name(directory, component, here)?;
                    let make = || mkdirat(directory, component, mode);
                    match self.modes.change_names(directory, make) {
                        Ok(()) => self.durable.remove(here),
                        Err(Errno::EXIST) => {}
                        Err(e) => return Err(fault(here, "create the directory", e)),
                    }
                }
                // A symbolic link gives one or the other, depending on the system.
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let stat = directory
                        .stat(component)
                        .map_err(|e| fault(here, "read its metadata", e))?;
                    match stat.as_ref().map(type_of) {
                        Some(FileType::Symlink) => return Err(refusal(Code::Symlink, here)),
                        Some(FileType::Directory) | None => {}
                        Some(_) => return Err(refusal(Code::NotDirectory, here)),
                    }
                }
                Err(e) => return Err(fault(here, "open the directory", e)),
            }
        }
        Err(Reason::new(
            Code::Io,
            format!(
                "{here}: another program keeps changing it; run the same command again when that ends"
            ),
        ))
    }

    /// Records whether an entry is on another file system than the root.
    pub(super) fn record_device(&self, stat: &Stat) {
        if device_of(stat) != self.device {
            self.spans_file_systems.store(true, Ordering::Relaxed);
        }
    }

    /// Whether an entry on another file system was found below the root.
    pub(super) fn spans_file_systems(&self) -> bool {
        self.spans_file_systems.load(Ordering::Relaxed)
    }
}
