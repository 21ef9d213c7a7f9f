//! Partials on disk: how they are named, locked, found again and committed.
//!
//! A partial is beside its final name, as `.haul-<32 hex digits>.partial`. The digits are derived from the partial key
//! and the path, so that a rerun finds it without an index. The holder of its flock owns it: only the holder writes to
//! it, renames it or removes it, and the lock ends with the process. For file systems without flock, see [`Lock`].

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, RawMode, Stat, Timespec, Timestamps,
};
use rustix::fs::{UTIME_NOW, fchmod, flock, fstat, futimens, linkat, openat, renameat, unlinkat};
use rustix::io::Errno;

use super::holes::{self, next_data};
use super::io_errors::{fault, refusal};
use super::root::{ATTEMPTS, Directory, Root, device, file_id, fsync};
use super::{
    Attributes, FileId, MetadataWarnings, PERMISSIONS, PartialKey, Upload, attributes, read_only,
    xattr,
};
use crate::error::{Code, Reason, knows_no_flock};
use crate::protocol::path::{
    PARTIAL_DIGITS, PARTIAL_PREFIX, PARTIAL_SUFFIX, RelativePath, is_partial_name,
};
use crate::protocol::{Durability, Time};

/// Mode of a partial: other users must not read unverified content.
const PRIVATE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
/// The permission bits that let others than the owner write to a file.
const WRITE_BY_OTHERS: RawMode = Mode::WGRP.union(Mode::WOTH).bits();
/// Mode that programs request for a new file, by Unix convention.
const NEW_FILE_MODE: RawMode = 0o666;
/// The owner's bits of a mode.
const OWNER_BITS: u32 = 0o700;
/// Most ranges reported for a partial (256 KiB of them): a peer decides how scattered it is, and a
/// [`Want`](crate::protocol::Want) holds only 1,024.
const MAX_RANGES: usize = 16_384;
/// Nanoseconds in a second.
const NANOSECONDS: u32 = 1_000_000_000;

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
pub(super) fn temporary_name_with(behind: &str) -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let unique = (
        std::process::id(),
        COUNTER.fetch_add(1, Ordering::Relaxed),
        SystemTime::now(),
    );
    partial_name(&blake3::hash(format!("{unique:?}").as_bytes()), behind)
}

fn partial_name(digest: &blake3::Hash, behind: &str) -> String {
    let [prefix, suffix] = [PARTIAL_PREFIX, PARTIAL_SUFFIX].map(String::from_utf8_lossy);
    format!(
        "{prefix}{}{behind}{suffix}",
        &digest.to_hex()[..PARTIAL_DIGITS]
    )
}

/// Whether a name has exactly the form of [`partial_name_of`] and [`temporary_name_with`]: only those are swept.
pub(super) fn has_partial_form(name: &[u8]) -> bool {
    is_partial_name(name)
}

/// Renames, unless the target exists: makes a hard link, which fails if the name exists, and then removes the old name.
/// On a file system without hard links, checks the target first; a file created after the check is replaced.
pub(super) fn rename_exclusively(
    directory: &Directory<'_>,
    from: &[u8],
    to: &[u8],
) -> rustix::io::Result<()> {
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

/// Whether a name still refers to an open file.
pub(super) fn is_named(
    directory: &Directory<'_>,
    name: &[u8],
    file: &File,
) -> rustix::io::Result<bool> {
    let open = fstat(file)?;
    Ok(directory
        .stat(name)?
        .is_some_and(|there| file_id(&there) == file_id(&open)))
}

/// The lock of an open partial; it lasts while both this value and the file are alive.
///
/// Some file systems have no flock (Lustre without its mount option, some FUSE file systems, NFS without its lock
/// service). There, partials are locked only within this process. If two processes receive the same version of a file
/// from the same key at the same time, both write to one partial, and the commit of the later one fails.
#[derive(Debug)]
pub(super) struct Lock {
    /// The file, if it is locked only within this process.
    within: Option<FileId>,
}

/// The partials that are locked without flock.
static LOCKED: Mutex<BTreeSet<FileId>> = Mutex::new(BTreeSet::new());

/// Releases the lock of an open partial. Closing the file is not enough: a child that another thread has just forked
/// shares the open file, and with it the lock, until it calls exec.
pub(super) fn unlock(file: &File) {
    // Fails only where the file system has no flock.
    let _ = flock(file, FlockOperation::Unlock);
}

/// Locks an open partial; `None` when another holder has the lock.
pub(super) fn lock(root: &Root, file: &File) -> rustix::io::Result<Option<Lock>> {
    let flocked = if root.flock.load(Ordering::Relaxed) {
        flock(file, FlockOperation::NonBlockingLockExclusive)
    } else {
        Err(Errno::NOSYS)
    };
    match flocked {
        Ok(()) => Ok(Some(Lock { within: None })),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(e) if knows_no_flock(e) => {
            tracing::debug!(error = %e, "no flock on this file system; partials are locked only within this process");
            let id = file_id(&fstat(file)?);
            let new = locked().insert(id);
            // Created lazily: dropping a lock would release the other holder's.
            Ok(new.then(|| Lock { within: Some(id) }))
        }
        Err(e) => Err(e),
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some(id) = self.within {
            locked().remove(&id);
        }
    }
}

fn locked() -> MutexGuard<'static, BTreeSet<FileId>> {
    LOCKED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The current time, as an access time.
pub(super) const JUST_NOW: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: UTIME_NOW,
};

/// Returns the argument of futimens. It sets both times: many FUSE file systems (libfuse 2) ignore a time that is set
/// alone.
pub(super) fn timestamps(modified: Time, accessed: Timespec) -> Timestamps {
    // Larger values have special meanings, such as "now".
    let tv_nsec = modified.nanoseconds.min(NANOSECONDS - 1).into();
    Timestamps {
        last_access: accessed,
        last_modification: Timespec {
            tv_sec: modified.seconds,
            tv_nsec,
        },
    }
}

/// An open and locked partial.
struct Acquired {
    // Field order matters: once the file is closed, another file may get its inode.
    lock: Lock,
    file: File,
}

/// Returns the access time of a file, in the form that sets it again.
#[allow(
    clippy::unnecessary_cast,
    reason = "the fields of stat have other types on other systems"
)]
pub(super) fn accessed(stat: &Stat) -> Timespec {
    let time = time_of(stat.st_atime as i64, stat.st_atime_nsec as u32);
    Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    }
}

/// Converts a time of stat. For times before 1970 some file systems return negative nanoseconds, which arrive as large
/// numbers.
pub(super) fn time_of(seconds: i64, nanoseconds: u32) -> Time {
    let nanoseconds = i64::from(nanoseconds as i32);
    let second = i64::from(NANOSECONDS);
    Time {
        seconds: seconds.saturating_add(nanoseconds.div_euclid(second)),
        nanoseconds: nanoseconds.rem_euclid(second) as u32,
    }
}

/// Opens or creates the partial of this name, and locks it.
fn acquire(
    root: &Root,
    directory: &Directory<'_>,
    name: &[u8],
    path: &RelativePath,
) -> Result<Acquired, Reason> {
    for _ in 0..ATTEMPTS {
        let (file, found) = match root.change(directory, || open_or_make(directory, name)) {
            Ok(found) => found,
            Err(Errno::EXIST) => continue,
            // A link, a socket or an inaccessible file: haul did not create it.
            Err(Errno::LOOP | Errno::NXIO | Errno::ACCESS)
                if matches!(directory.stat(name), Ok(Some(_))) =>
            {
                remove_other(root, directory, name, path)?;
                continue;
            }
            Err(e) => return Err(fault(path, "open its partial", e)),
        };
        match lock_own(root, directory, name, path, &file, &found) {
            Ok(Some(lock)) => return Ok(Acquired { lock, file }),
            Ok(None) => {}
            Err(why) => {
                // Do not leave an empty partial behind that cannot be used.
                if found == PartialState::Nothing && is_named(directory, name, &file) == Ok(true) {
                    let _ = remove(root, directory, name);
                }
                return Err(why);
            }
        }
    }
    Err(refusal(Code::Busy, path))
}

/// Locks an open partial and checks that this user created it; `None` when the caller should retry.
fn lock_own(
    root: &Root,
    directory: &Directory<'_>,
    name: &[u8],
    path: &RelativePath,
    file: &File,
    found: &PartialState,
) -> Result<Option<Lock>, Reason> {
    let cannot = |what| move |e: Errno| fault(path, what, e);
    let Some(lock) = lock(root, file).map_err(cannot("lock its partial"))? else {
        // This process has just created it, but another one locked it first: the retry finds it as theirs.
        return match found {
            PartialState::Nothing => Ok(None),
            _ => Err(refusal(Code::Busy, path)),
        };
    };
    // The previous holder of the lock may just have renamed or removed it.
    if !is_named(directory, name, file).map_err(cannot("read the metadata of its partial"))? {
        return Ok(None);
    }
    if *found == PartialState::Nothing {
        // This process has just created it, whatever owner the file system (NFS, FAT) shows.
        return Ok(Some(lock));
    }
    let stat = fstat(file).map_err(cannot("read the metadata of its partial"))?;
    let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    // It belongs to another user, or has another hard link, through which the written content would appear elsewhere.
    if !regular || stat.st_nlink > 1 || !is_ours(root, directory, &stat) {
        remove_other(root, directory, name, path)?;
        return Ok(None);
    }
    if *found == PartialState::Unwritable {
        // A commit was interrupted between the final mode and the final name.
        restore(file).map_err(|e| fault(path, "resume its partial", e))?;
        return Ok(None);
    }
    Ok(Some(lock))
}

/// Removes a foreign file that has the name of a partial.
fn remove_other(
    root: &Root,
    directory: &Directory<'_>,
    name: &[u8],
    path: &RelativePath,
) -> Result<(), Reason> {
    remove(root, directory, name).map_err(|e| {
        fault(
            path,
            "remove the foreign file with the name of its partial",
            e,
        )
    })
}

/// Whether the user of this process created a file.
///
/// On some file systems every file seems to belong to another user: FAT, NTFS and SMB mounted for a user, NFS with
/// root_squash, some FUSE file systems. So a file with another user id is compared with a new temporary file.
fn is_ours(root: &Root, directory: &Directory<'_>, there: &Stat) -> bool {
    there.st_uid == rustix::process::geteuid().as_raw()
        || stat_of_new_file(root, directory).is_ok_and(|ours| is_as_private(there, &ours))
}

/// Returns the stat of a new private file in a directory.
fn stat_of_new_file(root: &Root, directory: &Directory<'_>) -> rustix::io::Result<Stat> {
    let name = temporary_name();
    let how = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = root.change(directory, || openat(directory, &name, how, PRIVATE_MODE))?;
    let stat = fstat(&file);
    remove(root, directory, name.as_bytes())?;
    stat
}

/// Whether a file has the same owner as ours, and no more users may write to it than to ours.
fn is_as_private(there: &Stat, ours: &Stat) -> bool {
    let owners = there.st_uid == ours.st_uid && device(there) == device(ours);
    let more_writers = there.st_mode & WRITE_BY_OTHERS & !ours.st_mode != 0;
    let group = there.st_gid == ours.st_gid || there.st_mode & Mode::WGRP.as_raw_mode() == 0;
    owners && group && !more_writers
}

pub(super) fn remove(
    root: &Root,
    directory: &Directory<'_>,
    name: &[u8],
) -> rustix::io::Result<()> {
    root.change(directory, || unlinkat(directory, name, AtFlags::empty()))
}

/// What existed under a partial's name.
#[derive(PartialEq, Eq)]
enum PartialState {
    Nothing,
    Writable,
    Unwritable,
}

/// Opens a file, read-only if nothing else is permitted, or creates it.
fn open_or_make(
    directory: &Directory<'_>,
    name: &[u8],
) -> rustix::io::Result<(File, PartialState)> {
    // NONBLOCK: the name may be a FIFO that another program created.
    let open = |how| {
        openat(
            directory,
            name,
            how | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC,
            PRIVATE_MODE,
        )
    };
    match open(OFlags::RDWR) {
        Ok(file) => Ok((file.into(), PartialState::Writable)),
        Err(Errno::NOENT) => Ok((
            open(OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?.into(),
            PartialState::Nothing,
        )),
        Err(Errno::ACCESS) => Ok((open(OFlags::RDONLY)?.into(), PartialState::Unwritable)),
        Err(e) => Err(e),
    }
}

/// Makes an uncommitted file a partial again: private, and last written now.
fn restore(file: &File) -> io::Result<()> {
    fchmod(file, PRIVATE_MODE)?;
    Ok(futimens(
        file,
        &Timestamps {
            last_access: JUST_NOW,
            last_modification: JUST_NOW,
        },
    )?)
}

/// Returns the mode of a new file in a directory, as set by the umask, a default ACL and the file system. Creates a
/// temporary file to find out.
fn new_file_mode(root: &Root, directory: &Directory<'_>) -> rustix::io::Result<u32> {
    let name = temporary_name();
    let how = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = root.change(directory, || {
        openat(directory, &name, how, Mode::from_raw_mode(NEW_FILE_MODE))
    })?;
    let stat = fstat(&file);
    remove(root, directory, name.as_bytes())?;
    Ok(permissions(&stat?))
}

#[allow(
    clippy::unnecessary_cast,
    reason = "the fields of stat have other types on other systems"
)]
fn permissions(stat: &Stat) -> u32 {
    stat.st_mode as u32 & PERMISSIONS
}

/// An unfinished file on disk. Holds one descriptor; the directory is opened again when it is needed.
pub(super) struct LocalUpload {
    root: Arc<Root>,
    path: RelativePath,
    name: String,
    // Field order matters: once the file is closed, another file may get its inode.
    _lock: Lock,
    file: File,
    size: u64,
    /// Whether a thread is writing back.
    writing_back: Arc<AtomicBool>,
}

impl LocalUpload {
    pub(super) fn create(
        root: &Arc<Root>,
        path: &RelativePath,
        key: &PartialKey,
    ) -> Result<Self, Reason> {
        let Some(parent) = path.parent() else {
            return Err(refusal(Code::IsDirectory, path));
        };
        root.check_not_moved(path)?;
        let directory = root.make(&parent)?;
        root.check_name(&directory, path.name().unwrap_or_default(), path)?;
        let name = partial_name_of(path, key);
        let Acquired { lock, file } = acquire(root, &directory, name.as_bytes(), path)?;
        let upload = Self {
            root: Arc::clone(root),
            path: path.clone(),
            name,
            _lock: lock,
            file,
            size: key.size,
            writing_back: Arc::default(),
        };
        let stat =
            fstat(&upload.file).map_err(|e| fault(path, "read the metadata of its partial", e))?;
        root.saw(&stat);
        if stat.st_size as u64 > key.useful_size() {
            upload
                .file
                .set_len(key.useful_size())
                .map_err(|e| fault(path, "truncate its partial", e))?;
        }
        Ok(upload)
    }

    /// Sets the final metadata and renames it into place; returns its directory.
    fn rename_into_place(
        &self,
        attributes: &Attributes,
        durability: Durability,
    ) -> Result<(Directory<'_>, MetadataWarnings), Reason> {
        self.root.check_not_moved(&self.path)?;
        let mode = match attributes.mode {
            None => Some(self.usual_mode()?),
            announced => announced,
        };
        let warnings = attributes::set(
            &self.file,
            &self.path,
            &Attributes {
                mode,
                ..attributes.clone()
            },
        )?;
        if durability == Durability::Synced {
            fsync(&self.file).map_err(|e| fault(&self.path, "sync it to disk", e))?;
        }
        let Some((directory, last)) = self.root.parent(&self.path)? else {
            return Err(self.partial_is_gone());
        };
        let name = self.name.as_bytes();
        if !is_named(&directory, name, &self.file)
            .map_err(|e| fault(&self.path, "read the metadata of its partial", e))?
        {
            return Err(self.partial_is_gone());
        }
        // If the name is a directory, the system refuses the rename.
        let rename = || match attributes.exclusive {
            true => rename_exclusively(&directory, name, last),
            false => renameat(&directory, name, &directory, last),
        };
        self.root.change(&directory, rename).map_err(|e| match e {
            Errno::EXIST => refusal(Code::Exists, &self.path),
            e => fault(&self.path, "rename it into place", e),
        })?;
        Ok((directory, warnings))
    }

    /// Returns the mode for a file if the sender gives none: that of the replaced file, with its access control list,
    /// or that of any new file in the directory.
    fn usual_mode(&self) -> Result<u32, Reason> {
        let cannot = |e| fault(&self.path, "determine its mode", e);
        let Some((directory, last)) = self.root.parent(&self.path)? else {
            return Err(self.partial_is_gone());
        };
        match directory.stat(last).map_err(cannot)? {
            Some(there) if FileType::from_raw_mode(there.st_mode) == FileType::RegularFile => {
                let mode = permissions(&there);
                let replaced = read_only::open(&directory, last).map_err(cannot)?;
                // Without the list, the group bits would grant more than before.
                let kept = xattr::copy_access_list(&replaced, &self.file);
                Ok(if kept.is_ok() {
                    mode
                } else {
                    mode & OWNER_BITS
                })
            }
            _ => new_file_mode(&self.root, &directory).map_err(cannot),
        }
    }

    fn partial_is_gone(&self) -> Reason {
        let text = format!(
            "{}: another program removed or moved its partial; send it again",
            self.path
        );
        Reason::new(Code::NotFound, text)
    }

    /// Removes the partial, unless its name is gone or refers to another file by now.
    fn remove(&self) {
        if let Ok(Some((directory, _))) = self.root.parent(&self.path)
            && is_named(&directory, self.name.as_bytes(), &self.file) == Ok(true)
        {
            let _ = remove(&self.root, &directory, self.name.as_bytes());
        }
    }
}

impl Upload for LocalUpload {
    fn held(&self) -> io::Result<Vec<Range<u64>>> {
        let end = self.file.metadata()?.len().min(self.size);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        while ranges.len() < MAX_RANGES
            && let Some(data) = next_data(&self.file, at, end)?
        {
            at = data.end;
            ranges.push(data);
        }
        Ok(ranges)
    }

    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn write_back(&mut self) {
        if self.writing_back.load(Ordering::Acquire) {
            return;
        }
        // Uses a separate open file: it holds no lock, and does not consume an error that the commit must see (Linux
        // reports each error once per open file). Without /proc, the commit does all the work.
        let Ok(file) = File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd())) else {
            return;
        };
        let writing_back = self.writing_back.clone();
        writing_back.store(true, Ordering::Release);
        let work = move || {
            let _ = file.sync_data();
            writing_back.store(false, Ordering::Release);
        };
        if std::thread::Builder::new()
            .name("write-back".into())
            .spawn(work)
            .is_err()
        {
            self.writing_back.store(false, Ordering::Release);
        }
    }

    fn share(&mut self, source: &dyn super::Source) -> io::Result<bool> {
        #[cfg(target_os = "linux")]
        if let Some(source) = source.descriptor() {
            return Ok(rustix::fs::ioctl_ficlone(&self.file, source).is_ok());
        }
        let _ = source;
        Ok(false)
    }

    fn make_hole(&mut self, part: Range<u64>) -> io::Result<()> {
        holes::make_hole(&self.file, part)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        read_full_at(&self.file, buffer, offset)
    }

    fn commit(
        self: Box<Self>,
        attributes: &Attributes,
        durability: Durability,
    ) -> Result<MetadataWarnings, Reason> {
        let (directory, warnings) =
            self.rename_into_place(attributes, durability)
                .inspect_err(|_| {
                    // It stays a partial, and the next attempt resumes it.
                    let _ = restore(&self.file);
                })?;
        if durability == Durability::Synced {
            let parent = self.path.parent().unwrap_or_default();
            self.root.sync_names(&directory, &parent).map_err(|why| {
                let text = format!(
                    "{} is complete, but may not survive a crash: {}",
                    self.path, why
                );
                Reason::new(why.code, text)
            })?;
        }
        Ok(warnings)
    }

    fn discard(self: Box<Self>) {
        self.remove();
    }
}

impl Drop for LocalUpload {
    /// Keeps written content for resume, and removes an empty partial.
    fn drop(&mut self) {
        let holds_nothing =
            |m: std::fs::Metadata| matches!(next_data(&self.file, 0, m.len()), Ok(None));
        if self.file.metadata().is_ok_and(holds_nothing) {
            self.remove();
        }
        unlock(&self.file);
    }
}

/// Reads until the buffer is full or the file ends.
pub(super) fn read_full_at(
    file: &File,
    mut buffer: &mut [u8],
    mut offset: u64,
) -> io::Result<usize> {
    let length = buffer.len();
    while !buffer.is_empty() {
        match file.read_at(buffer, offset) {
            Ok(0) => break,
            Ok(read) => {
                buffer = &mut buffer[read..];
                offset += read as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(length - buffer.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_partial_is_unlocked_although_a_child_shares_it() {
        let directory = tempfile::tempdir().unwrap();
        let root = Arc::new(Root::open(directory.path()).unwrap());
        let path = RelativePath::from_components(["f"]).unwrap();
        let key = PartialKey {
            owner: [0; 32],
            size: 5,
            modified: None,
        };
        let mut upload = LocalUpload::create(&root, &path, &key).unwrap();
        upload.write_at(b"12345", 0).unwrap();
        // As in a child between fork and exec.
        let shared = upload.file.try_clone().unwrap();
        assert!(LocalUpload::create(&root, &path, &key).is_err());
        drop(upload);
        let again = LocalUpload::create(&root, &path, &key);
        assert_eq!(again.unwrap().held().unwrap().len(), 1);
        drop(shared);
    }

    /// Returns a stat with the given owner, group and mode.
    fn stat(owner: u32, group: u32, mode: RawMode) -> Stat {
        let mut stat = fstat(tempfile::tempfile().unwrap()).unwrap();
        stat.st_uid = owner;
        stat.st_gid = group;
        stat.st_mode = FileType::RegularFile.as_raw_mode() | mode;
        stat
    }

    #[test]
    fn files_of_other_users_are_not_ours() {
        // A file system mounted for a user, with fixed modes; and NFS with root_squash, where modes are real.
        let mounted = stat(1000, 1000, 0o777);
        let squashed = stat(65_534, 65_534, 0o600);
        let device = stat(0, 0, 0).st_dev;
        let as_private = |there: Stat, ours: &Stat| {
            let mut there = there;
            let mut ours = *ours;
            there.st_dev = device;
            ours.st_dev = device;
            is_as_private(&there, &ours)
        };
        assert!(as_private(stat(1000, 1000, 0o777), &mounted));
        assert!(!as_private(stat(1001, 1000, 0o777), &mounted));
        assert!(as_private(stat(65_534, 65_534, 0o600), &squashed));
        // A commit was interrupted between the final mode and the final name.
        assert!(as_private(stat(65_534, 65_534, 0o644), &squashed));
        assert!(!as_private(stat(65_534, 65_534, 0o666), &squashed));
        assert!(!as_private(stat(65_534, 65_534, 0o660), &squashed));
        assert!(!as_private(stat(0, 65_534, 0o600), &squashed));
        // Our group may write to ours, but the other file has another group.
        let shared = stat(65_534, 65_534, 0o660);
        assert!(as_private(stat(65_534, 65_534, 0o660), &shared));
        assert!(!as_private(stat(65_534, 100, 0o660), &shared));
    }
}
