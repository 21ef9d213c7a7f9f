//! Where files are read from or committed to.
//!
//! Every call blocks; callers run them off the network threads. Two stores exist: [`LocalStore`], one directory that is
//! never left, and [`MemoryStore`], the reference that the conformance tests run on beside it. [`OutputStore`] is half a
//! one: a place for one file, that nobody can read.

mod attributes;
mod case;
pub mod digest_index;
pub(crate) mod expand;
pub mod filter;
mod holes;
pub(crate) mod io_errors;
pub(crate) mod listing;
mod local;
mod memory;
pub mod open_files;
mod output;
mod partial;
pub mod pipe;
mod read_only;
mod reserved;
mod root;
mod sweep;
mod times;
mod unsized_files;
pub(crate) mod users;
pub mod walk;
mod xattr;

pub use case::Folding;
pub(crate) use case::{has_forms, trimmed};
pub use local::LocalStore;
pub use memory::MemoryStore;
pub use output::OutputStore;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::protocol::{Attribute, Durability, Kind, Time, Xattr};
use crate::storage::digest_index::FileKey;

/// What is known of something in a store without reading its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// What it is; `None` for a device, a FIFO, a socket and the like.
    pub kind: Option<Kind>,
    /// Bytes of content; 0 for what is no file.
    pub size: u64,
    /// When the content was last modified.
    pub modified: Time,
    /// Permission bits (07777).
    pub mode: u32,
    /// Numbers of its user and group.
    pub owner: (u32, u32),
    /// Names that it has in all (hard links); what is no file has one.
    pub links: u64,
    /// Tells this version of this file from any other: device, inode, size, mtime and ctime. Two equal versions have,
    /// as far as the system tells, the same content.
    pub version: Version,
}

/// Tells one version of a file from another; see [`Metadata::version`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Version {
    /// Device and inode.
    pub file: (u64, u64),
    /// Bytes of content.
    pub size: u64,
    /// Time of last modification.
    pub modified: Time,
    /// Time of last change of content or metadata; nobody can set it.
    pub changed: Time,
}

impl Version {
    /// What the [`Index`](crate::storage::digest_index::Index) knows this file by.
    pub fn key(&self) -> FileKey {
        FileKey {
            file: self.file,
            size: self.size,
            modified: self.modified,
        }
    }
}

/// The permission bits that `haul` carries over: read, write and execute (0777).
pub const PERMISSIONS: u32 = 0o777;

/// Bytes read and hashed at a time: as much as keeps a disk's read-ahead busy.
const DIGEST_BLOCK: usize = 256 << 10;

/// Whose partial it is and of which source: what it is bound to, besides its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartialKey {
    /// The key of the sender.
    pub owner: [u8; 32],
    /// Size of the source, or [`PartialKey::UNKNOWN_SIZE`].
    pub size: u64,
    /// Time of last modification of the source.
    pub modified: Option<Time>,
}

impl PartialKey {
    /// The size of a source that tells none: an upload of it begins anew, whatever an earlier attempt left.
    pub const UNKNOWN_SIZE: u64 = u64::MAX;

    /// How long a partial of an earlier attempt may be and still be of use.
    fn useful(&self) -> u64 {
        if self.size == Self::UNKNOWN_SIZE {
            0
        } else {
            self.size
        }
    }
}

/// All bits of a mode: with set-user-ID, set-group-ID and sticky.
pub const ALL_PERMISSIONS: u32 = 0o7777;

/// Final metadata of what is committed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits; `None` leaves those of what is replaced, and the store's default to a new file. Only those in [`PERMISSIONS`] count, and with an owner, on a file,
    /// all.
    pub mode: Option<u32>,
    /// Time of last modification; `None` leaves the time of the commit.
    pub modified: Option<Time>,
    /// Numbers of user and group; `None` leaves what there is.
    pub owner: Option<(u32, u32)>,
    /// The extended attributes, by name; all others that travel are removed. `None` leaves what there is. Those of the
    /// system's administration count with an owner only.
    pub xattrs: Option<Arc<Vec<Xattr>>>,
    /// Nothing is replaced: where something stands by the time of the commit, that fails ([`Code::Exists`](crate::error::Code)).
    pub exclusive: bool,
}

impl Attributes {
    /// The bits of the mode that count on a file, or on something else.
    pub fn mode_bits(&self, file: bool) -> u32 {
        if file && self.owner.is_some() {
            ALL_PERMISSIONS
        } else {
            PERMISSIONS
        }
    }
}

/// What could not be kept of something that stands there whole: the kind of thing, and what the system said.
pub type MetadataWarnings = Vec<(Attribute, String)>;

/// A place that holds files, by [`RelativePath`].
///
/// No call follows a symbolic link, neither as the last component nor on the way, and none leaves the store.
/// Errors are [`Reason`]s, ready to cross the wire.
pub trait Store: Send + Sync + 'static {
    /// What stands under a name; `None` when nothing does (also when a directory on the way is missing).
    fn stat(&self, path: &RelativePath) -> Result<Option<Metadata>, Reason>;

    /// The names in a directory, in no order, partials left out.
    fn names(&self, directory: &RelativePath) -> Result<Vec<Vec<u8>>, Reason>;

    /// The extended attributes of a file or directory that travel, by name, and a lapse for each that does not fit an entry;
    /// `privileged` are those that go with an owner. A store that knows none has none.
    fn xattrs(
        &self,
        path: &RelativePath,
        privileged: bool,
    ) -> Result<(Vec<Xattr>, MetadataWarnings), Reason> {
        let _ = (path, privileged);
        Ok((Vec::new(), MetadataWarnings::new()))
    }

    /// Calls for each name in a directory, in no order, partials left out, until the call says `false`. A store that can
    /// keeps no more of them in memory than the one.
    fn visit(
        &self,
        directory: &RelativePath,
        each: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<(), Reason> {
        let names = self.names(directory)?;
        names.iter().all(|name| each(name));
        Ok(())
    }

    /// What a symbolic link holds.
    fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Reason>;

    /// Whether a file that says it is empty has content all the same, as those of /proc have. Asked of files of size 0 only; a
    /// store that knows better than to read a byte of each says so.
    fn has_unsized_content(&self, path: &RelativePath, seen: &Metadata) -> Result<bool, Reason> {
        let _ = seen;
        reads_as_more(&*self.open(path)?, path)
    }

    /// Opens a regular file for reading. Never blocks on a FIFO or device: those are refused as [`Special`].
    ///
    /// [`Special`]: crate::error::Code::Special
    fn open(&self, path: &RelativePath) -> Result<Box<dyn Source>, Reason>;

    /// Begins a file beside its final name, which stays as it is until [`Upload::commit`]. Missing directories on the
    /// way are made as `mkdir -p` does (0777 less umask). A partial of the same claim is taken up again, with what it holds.
    ///
    /// Fails with [`Busy`] while another process has the same partial open, and with [`IsDirectory`] when a directory
    /// stands under the final name.
    ///
    /// [`Busy`]: crate::error::Code::Busy
    /// [`IsDirectory`]: crate::error::Code::IsDirectory
    fn create(&self, path: &RelativePath, claim: &PartialKey) -> Result<Box<dyn Upload>, Reason>;

    /// Makes a directory, private (0700) until its attributes are set, unless it is there. Missing ones on the way are made as
    /// `mkdir -p` does.
    fn make_directory(&self, path: &RelativePath) -> Result<(), Reason>;

    /// Sets the final metadata of a file or directory.
    fn set_attributes(
        &self,
        path: &RelativePath,
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason>;

    /// Makes a symbolic link, atomically in the place of a file or link that stands there. What it points to is never
    /// looked at.
    fn make_symlink(
        &self,
        path: &RelativePath,
        target: &[u8],
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason>;

    /// Makes `new` another name of the regular file `existing` (a hard link), atomically in the place of a file or link
    /// that stands there. Fails where the filesystem has no such thing, and between two of them.
    fn link(&self, existing: &RelativePath, new: &RelativePath) -> Result<(), Reason>;

    /// Removes what stands there: a file, link, device or the like, or an empty directory. What a link points to is never
    /// touched, and neither are a directory with anything in it, such as a partial, and the store itself.
    fn remove(&self, path: &RelativePath) -> Result<(), Reason>;

    /// Device and inode of a directory, or of the nearest above it that is there, and of all above that, also above the store:
    /// to tell whether it lies in another. Nothing for a store that is no part of a filesystem.
    fn ancestry(&self, path: &RelativePath) -> Vec<(u64, u64)> {
        let _ = path;
        Vec::new()
    }

    /// Which of the `wanted` differences between names a directory does not tell, or what is to be made of that name. A store
    /// may make a file for a moment to find out, unless it must not write.
    fn folding(&self, directory: &RelativePath, wanted: Folding, may_write: bool) -> Folding {
        let _ = (directory, wanted, may_write);
        Folding::default()
    }

    /// Gives what is found by a name exactly this name, where it is stored with another that its directory takes for the
    /// same. `false` where it still has another: some file systems show all names in lower case. A store that tells all names
    /// apart has nothing to do.
    fn respell(&self, path: &RelativePath, folding: Folding) -> Result<bool, Reason> {
        let _ = (path, folding);
        Ok(true)
    }

    /// A way to find out which times the file system keeps that holds what `beside` names. It may write a file of its own, which
    /// goes when the probe is dropped.
    fn time_probe(&self, beside: &RelativePath) -> Option<Box<dyn TimeProbe>> {
        let _ = beside;
        None
    }

    /// Fails when the store is no longer where it was opened, such as a directory that was renamed or mounted over. Every
    /// session of a server begins with it.
    fn check_root(&self) -> Result<(), Reason> {
        Ok(())
    }

    /// Brings to the disk all that was made or found in this store so far.
    fn sync(&self) -> Result<(), Reason>;

    /// Removes partials that nobody has open and that were last written more than `age` ago, below all of the store.
    /// Returns how many went.
    fn sweep(&self, age: std::time::Duration) -> Result<u64, Reason>;
}

/// Tells which times a file system keeps: some round them, or cut them off at their first and last year.
pub trait TimeProbe: Send {
    /// What becomes of a time of last modification; `None` where that cannot be found out.
    fn kept(&mut self, time: Time) -> Option<Time>;
}

/// An open file to read from.
pub trait Source: Send {
    /// What is known of the file that is open.
    fn metadata(&self) -> io::Result<Metadata>;

    /// Reads at an offset until the buffer is full or the file ends; returns the bytes read.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// The first part from an offset on that is no hole; `None` when only a hole is left, or nothing. A hole reads as zeros.
    /// A store that does not know holes has none.
    fn data_from(&self, offset: u64) -> io::Result<Option<std::ops::Range<u64>>>;

    /// The file itself, where it is one of the system's.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Whether a file that says it is empty has anything in it.
fn reads_as_more(source: &dyn Source, path: &RelativePath) -> Result<bool, Reason> {
    let read = source.read_at(&mut [0], 0).map_err(|error| {
        Reason::new(
            Code::Unreadable,
            format!("{path}: its size is not known, and it cannot be read: {error}"),
        )
    })?;
    Ok(read > 0)
}

/// BLAKE3 of what a source reads as, holes included. Blocks; reads no more than this size, and fails when there is less.
pub fn digest(source: &dyn Source, size: u64) -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; DIGEST_BLOCK.min(size as usize)];
    let mut at = 0;
    while at < size {
        let length = buffer.len().min((size - at) as usize);
        if source.read_at(&mut buffer[..length], at)? < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        hasher.update(&buffer[..length]);
        at += length as u64;
    }
    Ok(*hasher.finalize().as_bytes())
}

/// An unfinished file. It cannot be read as a file by anybody but its owner; dropping it keeps the partial for resume.
pub trait Upload: Send {
    /// The parts that may hold content of an earlier attempt: ascending, not touching. What they hold must be checked
    /// by content before it counts.
    fn held(&self) -> io::Result<Vec<std::ops::Range<u64>>>;

    /// Whether it takes bytes in their order only, each once; then it cannot be read back, and holes are written as zeros.
    fn in_order(&self) -> bool {
        false
    }

    /// Writes at an offset.
    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Begins to bring to the disk what was written so far, where the store can, so that a durable commit waits for less. It does
    /// not wait, and what fails shows at the commit.
    fn write_back(&mut self) {}

    /// Takes all that a source holds by sharing its blocks (a reflink); false where the filesystem cannot.
    fn share(&mut self, _source: &dyn Source) -> io::Result<bool> {
        Ok(false)
    }

    /// Makes a part read as zeros, also where an earlier attempt left something, and takes no space for it where the
    /// store can. The file reaches to its end at least.
    fn make_hole(&mut self, part: std::ops::Range<u64>) -> io::Result<()>;

    /// Reads back what was written, to hash it.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Makes the file appear under its final name, whole, with these attributes, and as durable as asked. What stood
    /// there before is whole until then, and gone after.
    fn commit(
        self: Box<Self>,
        attributes: &Attributes,
        durability: Durability,
    ) -> Result<MetadataWarnings, Reason>;

    /// Removes the partial.
    fn discard(self: Box<Self>);
}
