//! Partials on disk: how they are named, locked, found again and committed.
//!
//! A partial stands beside its final name, as `.haul-<32 hex digits>.partial`. The digits follow from the claim and the
//! path, so that a rerun finds it with no index to keep. Whoever holds its flock owns it: only they write to it, rename
//! it or remove it, and the lock ends with the process.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Timespec, Timestamps};
use rustix::fs::{
    UTIME_NOW, UTIME_OMIT, fchmod, flock, fstat, futimens, linkat, openat, renameat, unlinkat,
};
use rustix::io::Errno;

use super::beneath::{ATTEMPTS, Directory, Root, device, fsync};
use super::fault::{fault, refusal};
use super::holes::{self, next_data};
use super::{Attributes, Claim, Lapses, Upload, attributes};
use crate::error::{Code, Why};
use crate::path::{PARTIAL_PREFIX, PARTIAL_SUFFIX, RelativePath};
use crate::wire::{Durability, Time};

/// Mode of a partial: nobody else reads what is not verified yet.
const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);
/// Hex digits in a partial's name: 16 bytes, so that two claims never meet.
const DIGITS: usize = 32;
/// Most ranges that are found in a partial (256 KiB of them): a peer decides how scattered it is, and a
/// [`Want`](crate::wire::Want) holds 1,024 only.
const MAX_RANGES: usize = 16_384;
/// Nanoseconds in a second.
const SECOND: u32 = 1_000_000_000;

/// The partial's name for a claim on a path.
pub(super) fn claim_name(path: &RelativePath, claim: &Claim) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("haul 1 name of a partial");
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(&claim.owner);
    field(path.as_bytes());
    field(&claim.size.to_le_bytes());
    match claim.modified {
        Some(Time {
            seconds,
            nanoseconds,
        }) => {
            field(&seconds.to_le_bytes());
            field(&nanoseconds.to_le_bytes());
        }
        None => field(b""),
    }
    partial_name(&hasher.finalize())
}

/// A partial's name that nobody else uses: for what is made aside and renamed at once.
pub(super) fn temporary_name() -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let unique = (
        std::process::id(),
        COUNTER.fetch_add(1, Ordering::Relaxed),
        SystemTime::now(),
    );
    partial_name(&blake3::hash(format!("{unique:?}").as_bytes()))
}

fn partial_name(digest: &blake3::Hash) -> String {
    let [prefix, suffix] = [PARTIAL_PREFIX, PARTIAL_SUFFIX].map(String::from_utf8_lossy);
    format!("{prefix}{}{suffix}", &digest.to_hex()[..DIGITS])
}

/// Whether a name is exactly of the form that [`claim_name`] gives: only those are ever swept.
pub(super) fn has_partial_form(name: &[u8]) -> bool {
    name.strip_prefix(PARTIAL_PREFIX)
        .and_then(|rest| rest.strip_suffix(PARTIAL_SUFFIX))
        .is_some_and(|digits| {
            digits.len() == DIGITS
                && digits
                    .iter()
                    .all(|d| matches!(d, b'0'..=b'9' | b'a'..=b'f'))
        })
}

/// Renames, unless something stands there: a second name fails where there is one, and then the first goes. On a filesystem
/// without hard links it is looked at first, and what comes in that moment is replaced.
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

/// Whether a name still stands for an open file.
pub(super) fn is_named(
    directory: &Directory<'_>,
    name: &[u8],
    file: &File,
) -> rustix::io::Result<bool> {
    let open = fstat(file)?;
    Ok(directory
        .stat(name)?
        .is_some_and(|s| (device(&s), s.st_ino) == (device(&open), open.st_ino)))
}

/// Takes the lock of an open partial; false when somebody else has it.
pub(super) fn lock(file: &File) -> rustix::io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(e),
    }
}

/// What futimens takes: the time of access stays as it is.
pub(super) fn timestamps(modified: Time) -> Timestamps {
    // Values past a second have a meaning of their own to the system, such as "now".
    let tv_nsec = modified.nanoseconds.min(SECOND - 1).into();
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: modified.seconds,
            tv_nsec,
        },
    }
}

/// Opens the partial of that name, or makes it, and locks it.
fn acquire(
    root: &Root,
    directory: &Directory<'_>,
    name: &[u8],
    path: &RelativePath,
) -> Result<File, Why> {
    let cannot = |what| move |e: Errno| fault(path, what, e);
    for _ in 0..ATTEMPTS {
        let (file, found) = match root.change(directory, || open_or_make(directory, name)) {
            Ok(found) => found,
            Err(Errno::EXIST) => continue,
            // A link, a socket, a file that nobody may open: none of our making.
            Err(Errno::LOOP | Errno::NXIO | Errno::ACCESS)
                if matches!(directory.stat(name), Ok(Some(_))) =>
            {
                remove(root, directory, name)
                    .map_err(cannot("remove what stands in its partial's place"))?;
                continue;
            }
            Err(e) => return Err(fault(path, "open its partial", e)),
        };
        if !lock(&file).map_err(cannot("lock its partial"))? {
            return Err(refusal(Code::Busy, path));
        }
        // Whoever had the lock before us may just have renamed or removed it.
        if !is_named(directory, name, &file).map_err(cannot("look at its partial"))? {
            continue;
        }
        let stat = fstat(&file).map_err(cannot("look at its partial"))?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if found == Found::Nothing {
            // Made by us just now, whatever owner the filesystem (NFS, FAT) shows.
            return Ok(file);
        } else if !regular
            || stat.st_nlink != 1
            || stat.st_uid != rustix::process::geteuid().as_raw()
        {
            // Somebody else's, or also known by another name: what is written to it would show up elsewhere.
            remove(root, directory, name)
                .map_err(cannot("remove what stands in its partial's place"))?;
        } else if found == Found::Unwritable {
            // A commit was cut short between the final mode and the final name.
            restore(&file).map_err(|e| fault(path, "take up its partial", e))?;
        } else {
            return Ok(file);
        }
    }
    Err(refusal(Code::Busy, path))
}

/// Removes a name.
pub(super) fn remove(
    root: &Root,
    directory: &Directory<'_>,
    name: &[u8],
) -> rustix::io::Result<()> {
    root.change(directory, || unlinkat(directory, name, AtFlags::empty()))
}

/// What stood under a partial's name.
#[derive(PartialEq, Eq)]
enum Found {
    Nothing,
    Writable,
    Unwritable,
}

/// Opens what has that name, for reading only where nothing else is permitted, or makes it.
fn open_or_make(directory: &Directory<'_>, name: &[u8]) -> rustix::io::Result<(File, Found)> {
    // NONBLOCK: somebody may have put a FIFO there.
    let open = |how| {
        openat(
            directory,
            name,
            how | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC,
            PRIVATE,
        )
    };
    match open(OFlags::RDWR) {
        Ok(file) => Ok((file.into(), Found::Writable)),
        Err(Errno::NOENT) => Ok((
            open(OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?.into(),
            Found::Nothing,
        )),
        Err(Errno::ACCESS) => Ok((open(OFlags::RDONLY)?.into(), Found::Unwritable)),
        Err(e) => Err(e),
    }
}

/// Makes a partial again of what was about to be committed: private, and last written now.
fn restore(file: &File) -> io::Result<()> {
    fchmod(file, PRIVATE)?;
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_NOW,
    };
    Ok(futimens(
        file,
        &Timestamps {
            last_access: now,
            last_modification: now,
        },
    )?)
}

/// An unfinished file on disk. Holds one descriptor; the directory is opened again when it is needed.
pub(super) struct LocalUpload {
    root: Arc<Root>,
    path: RelativePath,
    name: String,
    file: File,
    size: u64,
    /// Mode of the file where the sender says none.
    mode: u32,
    /// A thread writes back.
    writing_back: Arc<AtomicBool>,
}

impl LocalUpload {
    pub(super) fn create(
        root: &Arc<Root>,
        path: &RelativePath,
        claim: &Claim,
        mode: u32,
    ) -> Result<Self, Why> {
        let Some(parent) = path.parent() else {
            return Err(refusal(Code::IsDirectory, path));
        };
        let directory = root.make(&parent)?;
        root.check_name(&directory, path.name().unwrap_or_default(), path)?;
        let name = claim_name(path, claim);
        let file = acquire(root, &directory, name.as_bytes(), path)?;
        let upload = Self {
            root: Arc::clone(root),
            path: path.clone(),
            name,
            file,
            size: claim.size,
            mode,
            writing_back: Arc::default(),
        };
        let stat = fstat(&upload.file).map_err(|e| fault(path, "look at its partial", e))?;
        root.saw(&stat);
        if stat.st_size as u64 > claim.useful() {
            upload
                .file
                .set_len(claim.useful())
                .map_err(|e| fault(path, "cut its partial", e))?;
        }
        Ok(upload)
    }

    /// Gives it its final metadata and name; returns the directory it stands in.
    fn place(
        &self,
        attributes: &Attributes,
        durability: Durability,
    ) -> Result<(Directory<'_>, Lapses), Why> {
        let mode = Some(attributes.mode.unwrap_or(self.mode));
        let lapses = attributes::set(
            &self.file,
            &self.path,
            &Attributes {
                mode,
                ..attributes.clone()
            },
        )?;
        if durability == Durability::Synced {
            fsync(&self.file).map_err(|e| fault(&self.path, "bring it to the disk", e))?;
        }
        let Some((directory, last)) = self.root.parent(&self.path)? else {
            return Err(self.gone());
        };
        let name = self.name.as_bytes();
        if !is_named(&directory, name, &self.file)
            .map_err(|e| fault(&self.path, "look at its partial", e))?
        {
            return Err(self.gone());
        }
        // Where a directory stands, the system refuses this itself.
        let rename = || match attributes.exclusive {
            true => rename_exclusively(&directory, name, last),
            false => renameat(&directory, name, &directory, last),
        };
        self.root.change(&directory, rename).map_err(|e| match e {
            Errno::EXIST => refusal(Code::Exists, &self.path),
            e => fault(&self.path, "rename it into place", e),
        })?;
        Ok((directory, lapses))
    }

    fn gone(&self) -> Why {
        let text = format!(
            "{}: its partial was removed or moved by another program; send it again",
            self.path
        );
        Why::new(Code::NotFound, text)
    }

    /// Removes the partial, unless its name is gone or stands for another file by now.
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
        // An open file of its own: it holds no lock, and takes no error from the one that the commit brings to the disk (Linux
        // tells each of them once). Where there is no /proc, the commit does all of it.
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
    ) -> Result<Lapses, Why> {
        let (directory, lapses) = self.place(attributes, durability).inspect_err(|_| {
            // It stays a partial, and the next attempt goes on from here.
            let _ = restore(&self.file);
        })?;
        if durability == Durability::Synced {
            let parent = self.path.parent().unwrap_or_default();
            self.root.sync_names(&directory, &parent).map_err(|why| {
                let text = format!(
                    "{} stands there whole, but may not outlast a crash: {}",
                    self.path, why
                );
                Why::new(why.code, text)
            })?;
        }
        Ok(lapses)
    }

    fn discard(self: Box<Self>) {
        self.remove();
    }
}

impl Drop for LocalUpload {
    /// What was written is kept for resume; a partial that holds nothing would be litter.
    fn drop(&mut self) {
        let holds_nothing =
            |m: std::fs::Metadata| matches!(next_data(&self.file, 0, m.len()), Ok(None));
        if self.file.metadata().is_ok_and(holds_nothing) {
            self.remove();
        }
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
