//! Containment: every directory is opened from the root's descriptor, and no symbolic link is followed on the way.
//!
//! Linux does it in one call (openat2, with `RESOLVE_BENEATH` and `RESOLVE_NO_SYMLINKS`). Where that is missing, and
//! to find out which component stands in the way, the path is walked component by component with `O_NOFOLLOW`.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, fstat, mkdirat, openat, statat};
use rustix::io::Errno;

use super::io_errors::{fault, refusal};
use super::reserved::Reserved;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;

/// A directory that is only passed through: `O_PATH` needs no permission to read it.
#[cfg(target_os = "linux")]
pub(super) const PASS_THROUGH: OFlags =
    OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
#[cfg(not(target_os = "linux"))]
pub(super) const PASS_THROUGH: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);
/// Mode of a directory that is announced, until its final mode is set.
const PRIVATE: Mode = Mode::RWXU;
/// Mode of a directory made on the way to something: as `mkdir -p`, the umask or a default ACL takes its part.
const ON_THE_WAY: Mode = Mode::RWXU.union(Mode::RWXG).union(Mode::RWXO);
/// How often something that another process keeps changing under our hands is tried anew.
pub(super) const ATTEMPTS: u32 = 8;
/// Directories above each other that are looked at.
const MAX_DEPTH: usize = 4096;
/// How long it counts that the root was found under its path, before a change looks again.
const NAMED_FOR: Duration = Duration::from_secs(1);
/// Most directories remembered as durable (32 bytes each); past it they are forgotten, which only costs time.
const MAX_DURABLE: usize = 65_536;

/// What is said when the root is no longer where it was opened.
const DISPLACED: &str = "cannot go on: the directory that haul has opened there was renamed, removed or mounted over, and its \
                         path names another now; restart haul there, then run the same command again";

/// The root of a store.
pub(super) struct Root {
    descriptor: OwnedFd,
    /// The path that it was opened by.
    path: PathBuf,
    /// When it was last found to be under that path.
    pub(super) named: Mutex<Option<Instant>>,
    device: u64,
    /// Whether openat2 is there; found out by using it.
    pub(super) openat2: AtomicBool,
    /// Whether flock is tried; tests behave as a filesystem without it.
    pub(super) flock: AtomicBool,
    /// Whether something on another filesystem was met below.
    spans: AtomicBool,
    /// Digests of the paths of directories that are on the disk, they and all above them.
    durable: Mutex<HashSet<blake3::Hash>>,
    /// Held while a directory has another mode than it should, or is given one.
    pub(super) modes: Mutex<()>,
    /// What no session may read or change.
    pub(super) reserved: Option<Reserved>,
}

/// An open directory of a store.
pub(super) enum Directory<'r> {
    Root(BorrowedFd<'r>),
    Below(OwnedFd),
}

impl AsFd for Directory<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Root(descriptor) => *descriptor,
            Self::Below(descriptor) => descriptor.as_fd(),
        }
    }
}

impl Directory<'_> {
    /// Opens it again, for reading its names and for fsync, which `O_PATH` does not allow.
    pub(super) fn readable(&self) -> rustix::io::Result<OwnedFd> {
        openat(
            self,
            c".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
    }

    /// What stands under a name in it.
    pub(super) fn stat(&self, name: &[u8]) -> rustix::io::Result<Option<Stat>> {
        match statat(self, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(None),
            other => other.map(Some),
        }
    }

    /// Brings the names in it to the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        match self.readable() {
            // Write and search permission alone let us rename but not open it; then everything is synced instead.
            Err(Errno::ACCESS) => rustix::fs::sync(),
            other => fsync(&File::from(other?))?,
        }
        Ok(())
    }
}

/// fsync, as far as the filesystem knows it: as in restic, one that does not is no reason to fail.
pub(super) fn fsync(file: &File) -> io::Result<()> {
    let unsupported = [Errno::INVAL, Errno::NOTSUP, Errno::OPNOTSUPP, Errno::NOTTY];
    match file.sync_all() {
        Err(e) if Errno::from_io_error(&e).is_some_and(|errno| unsupported.contains(&errno)) => {
            Ok(())
        }
        other => other,
    }
}

impl Root {
    /// Opens a directory as the root; its own path may lead through symbolic links.
    pub(super) fn open(path: &std::path::Path) -> io::Result<Self> {
        let descriptor = rustix::fs::open(path, PASS_THROUGH, Mode::empty())?;
        Ok(Self {
            device: device(&fstat(&descriptor)?),
            descriptor,
            path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
            named: Mutex::default(),
            openat2: AtomicBool::new(cfg!(target_os = "linux")),
            flock: AtomicBool::new(true),
            spans: AtomicBool::new(false),
            durable: Mutex::default(),
            modes: Mutex::default(),
            reserved: None,
        })
    }

    /// The root itself.
    pub(super) fn directory(&self) -> Directory<'_> {
        Directory::Root(self.descriptor.as_fd())
    }

    /// Refuses a change where the root is no longer under the path that it was opened by: something was mounted there, or it
    /// was renamed or removed. What is written then would go where nobody looks for it.
    pub(super) fn check_named(&self, path: &RelativePath) -> Result<(), Reason> {
        let recently = |at: &Instant| at.elapsed() < NAMED_FOR;
        if self.last_named().as_ref().is_some_and(recently) {
            return Ok(());
        }
        self.check_named_now()
            .map_err(|why| Reason::new(why.code, format!("{path}: {}", why.text)))
    }

    /// The same for the store as a whole, and not by what was found before.
    pub(super) fn check_named_now(&self) -> Result<(), Reason> {
        if self.path_leads_here() {
            *self.last_named() = Some(Instant::now());
            return Ok(());
        }
        tracing::warn!(path = %self.path.display(), "the directory was moved, removed or mounted over");
        Err(Reason::new(Code::Io, DISPLACED))
    }

    /// Whether its path still leads to it. What the system does not tell, such as for want of permission, is no reason to fail.
    fn path_leads_here(&self) -> bool {
        match (rustix::fs::stat(&self.path), fstat(&self.descriptor)) {
            (Ok(there), Ok(held)) => (device(&there), there.st_ino) == (device(&held), held.st_ino),
            (Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP), _) => false,
            _ => true,
        }
    }

    fn last_named(&self) -> MutexGuard<'_, Option<Instant>> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a directory; `None` when it, or one above it, is missing.
    pub(super) fn find(&self, path: &RelativePath) -> Result<Option<Directory<'_>>, Reason> {
        if path.is_root() {
            return Ok(Some(self.directory()));
        }
        match self.resolve(path) {
            Ok(descriptor) if self.is_clear(&descriptor, path) => {
                Ok(Some(Directory::Below(descriptor)))
            }
            Err(Errno::NOENT) if self.reserved.is_none() => Ok(None),
            // Also EAGAIN, when something was renamed meanwhile: the walk does not mind, since it never goes up.
            // And where something is reserved, to say what.
            _ => self.walk(path, None),
        }
    }

    /// Device and inode of a directory, or the nearest above it that is there, and of all above that. Those above the root are
    /// only looked at.
    pub(super) fn ancestry(&self, path: &RelativePath) -> Vec<(u64, u64)> {
        let identity = |directory: &dyn AsFd| {
            fstat(directory.as_fd())
                .ok()
                .map(|stat| (device(&stat), stat.st_ino))
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
            // The root of the filesystem is its own parent.
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

    /// Opens a directory on the way to something, and makes it and those above it if they are missing.
    pub(super) fn make(&self, path: &RelativePath) -> Result<Directory<'_>, Reason> {
        self.make_with(path, ON_THE_WAY)
    }

    /// Makes a directory that only its owner may use until its final mode is set, and those above it if they are missing.
    pub(super) fn make_private(&self, path: &RelativePath) -> Result<(), Reason> {
        self.make_with(path, PRIVATE).map(|_| ())
    }

    fn make_with(&self, path: &RelativePath, last: Mode) -> Result<Directory<'_>, Reason> {
        if let Some(directory) = self.find(path)? {
            return Ok(directory);
        }
        self.walk(path, Some(last))?
            .ok_or_else(|| refusal(Code::NotFound, path))
    }

    /// Opens the directory that a path stands in; `None` when it is missing. The root stands in none.
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
        self.check_name(&directory, name, path)?;
        Ok(Some((directory, name)))
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
        // Linux before 5.6, or a seccomp filter of a container that does not know the call.
        if let Err(Errno::NOSYS | Errno::PERM) = result {
            self.openat2.store(false, Ordering::Relaxed);
        }
        result
    }

    #[cfg(not(target_os = "linux"))]
    fn resolve(&self, _: &RelativePath) -> Result<OwnedFd, Errno> {
        Err(Errno::NOSYS)
    }

    /// Walks to a directory. What is missing is made if `last` says with which mode: its own, those above it are as usual.
    fn walk(
        &self,
        path: &RelativePath,
        last: Option<Mode>,
    ) -> Result<Option<Directory<'_>>, Reason> {
        let mut directory = self.directory();
        let mut here = RelativePath::root();
        for component in path.components() {
            here.push(component)?;
            let mode = last.map(|last| if here == *path { last } else { ON_THE_WAY });
            match self.step(&directory, component, &here, mode)? {
                Some(descriptor) => directory = Directory::Below(descriptor),
                None => return Ok(None),
            }
        }
        Ok(Some(directory))
    }

    /// One component further; `here` is where it leads. It is made with a mode, if there is one.
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
                    self.check_open(&descriptor, here)?;
                    return Ok(Some(descriptor));
                }
                Err(Errno::NOENT) => {
                    let Some(mode) = mode else { return Ok(None) };
                    self.check_name(directory, component, here)?;
                    match self.change(directory, || mkdirat(directory, component, mode)) {
                        Ok(()) => self.forget(here),
                        Err(Errno::EXIST) => {}
                        Err(e) => return Err(fault(here, "make the directory", e)),
                    }
                }
                // Systems disagree on which of the two a symbolic link gives.
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let stat = directory
                        .stat(component)
                        .map_err(|e| fault(here, "look at it", e))?;
                    match stat.map(|s| FileType::from_raw_mode(s.st_mode)) {
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
            format!("{here}: it keeps changing; try again when nothing else works there"),
        ))
    }

    /// Brings the names in a directory to the disk, and its own and those above it unless they are known to be.
    ///
    /// Directories that stood there before are included once: whoever made them may not have synced them.
    pub(super) fn sync_names(
        &self,
        directory: &Directory<'_>,
        path: &RelativePath,
    ) -> Result<(), Reason> {
        directory
            .sync()
            .map_err(|e| fault(path, "bring it to the disk", e))?;
        let mut brought = Vec::new();
        let mut child = path.clone();
        while let Some(parent) = child.parent() {
            let digest = blake3::hash(child.as_bytes());
            if self.durable().contains(&digest) {
                break;
            }
            let above = self
                .find(&parent)?
                .ok_or_else(|| refusal(Code::NotFound, &parent))?;
            above
                .sync()
                .map_err(|e| fault(&parent, "bring it to the disk", e))?;
            brought.push(digest);
            child = parent;
        }
        // Only now, so that nobody relies on an fsync that is still under way.
        let mut durable = self.durable();
        if durable.len() + brought.len() > MAX_DURABLE {
            durable.clear();
        }
        durable.extend(brought);
        Ok(())
    }

    /// Brings everything below to the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        match self.directory().readable() {
            // Write and search permission alone let us write but not open it; then everything is synced instead.
            Err(Errno::ACCESS) => rustix::fs::sync(),
            directory => rustix::fs::syncfs(directory?)?,
        }
        // syncfs reports what went wrong, but ends at a mount point.
        if cfg!(not(target_os = "linux")) || self.spans.load(Ordering::Relaxed) {
            self.directory().sync()?;
            rustix::fs::sync();
        }
        Ok(())
    }

    /// Notes which filesystem something below stands on.
    pub(super) fn saw(&self, stat: &Stat) {
        if device(stat) != self.device {
            self.spans.store(true, Ordering::Relaxed);
        }
    }

    fn forget(&self, path: &RelativePath) {
        self.durable().remove(&blake3::hash(path.as_bytes()));
    }

    fn durable(&self) -> std::sync::MutexGuard<'_, HashSet<blake3::Hash>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[allow(
    clippy::unnecessary_cast,
    reason = "dev_t has another type on other systems"
)]
pub(super) fn device(stat: &Stat) -> u64 {
    stat.st_dev as u64
}
