//! Stores: where files are read from and committed to.
//!
//! Every call blocks; callers run them off the network threads. [`LocalStore`] is one directory that no call leaves.
//! [`MemoryStore`] holds files in memory and is the reference of the conformance tests. [`OutputStore`] takes one file
//! in order and cannot be read.

mod attributes;
mod case;
pub mod digest_index;
pub(crate) mod expand;
mod file_id;
pub mod filter;
mod holes;
pub(crate) mod io_errors;
pub(crate) mod listing;
mod local;
mod memory;
mod metadata;
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
pub use file_id::{FileId, FileKey, Version};
pub use local::LocalStore;
pub use memory::MemoryStore;
pub use metadata::{
    ALL_PERMISSIONS, Attributes, Metadata, MetadataWarnings, OwnerIds, PERMISSIONS,
};
pub use output::OutputStore;

use std::io;
use std::os::fd::BorrowedFd;

use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::protocol::{Durability, Time, Xattr};

/// Bytes read and hashed at a time: enough to keep a disk's read-ahead busy.
const DIGEST_BLOCK: usize = 256 << 10;

/// What a partial is bound to besides its path: the sender's key, and the source's size and time.
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
    /// The size of a source of unknown size. An upload of it always starts from zero.
    pub const UNKNOWN_SIZE: u64 = u64::MAX;

    /// The longest useful partial of an earlier attempt, in bytes.
    fn useful_size(&self) -> u64 {
        if self.size == Self::UNKNOWN_SIZE {
            0
        } else {
            self.size
        }
    }
}

/// A store of files, addressed by [`RelativePath`].
///
/// No call follows a symbolic link, neither as the last component nor on the way, and none leaves the store. Errors are
/// [`Reason`]s, ready to cross the wire.
pub trait Store: Send + Sync + 'static {
    /// Returns the metadata of a name; `None` when it does not exist, or a directory above it does not.
    fn stat(&self, path: &RelativePath) -> Result<Option<Metadata>, Reason>;

    /// Returns the names in a directory, unordered, without partials.
    fn names(&self, directory: &RelativePath) -> Result<Vec<Vec<u8>>, Reason>;

    /// Returns the transferable extended attributes of a file or directory, by name, and a warning for each that does
    /// not fit an entry. `privileged` includes those that require an owner. A store without extended attributes returns
    /// none.
    fn xattrs(
        &self,
        path: &RelativePath,
        privileged: bool,
    ) -> Result<(Vec<Xattr>, MetadataWarnings), Reason> {
        let _ = (path, privileged);
        Ok((Vec::new(), MetadataWarnings::new()))
    }

    /// Calls `each` for every name in a directory, unordered, without partials, until it returns `false`. If it can, a
    /// store keeps only one name in memory.
    fn visit(
        &self,
        directory: &RelativePath,
        each: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<(), Reason> {
        let names = self.names(directory)?;
        names.iter().all(|name| each(name));
        Ok(())
    }

    /// Reads the target of a symbolic link.
    fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Reason>;

    /// Reports whether a file of size 0 has content anyway, as files in /proc have. Called for such files only. A store
    /// that knows the answer need not read a byte of each.
    fn has_unsized_content(&self, path: &RelativePath, seen: &Metadata) -> Result<bool, Reason> {
        let _ = seen;
        reads_as_more(&*self.open(path)?, path)
    }

    /// Opens a regular file for reading. Never blocks on a FIFO or device: those are refused as [`Special`].
    ///
    /// [`Special`]: crate::error::Code::Special
    fn open(&self, path: &RelativePath) -> Result<Box<dyn Source>, Reason>;

    /// Creates a partial beside the final name, which stays unchanged until [`Upload::commit`]. Creates missing parent
    /// directories as `mkdir -p` does (0777 less umask). Resumes a partial of the same key with its content.
    ///
    /// Fails with [`Busy`] while another process has the same partial open, and with [`IsDirectory`] when the final
    /// name is a directory.
    ///
    /// [`Busy`]: crate::error::Code::Busy
    /// [`IsDirectory`]: crate::error::Code::IsDirectory
    fn create(&self, path: &RelativePath, key: &PartialKey) -> Result<Box<dyn Upload>, Reason>;

    /// Creates a directory unless it exists. It is private (0700) until its attributes are set. Creates missing parent
    /// directories as `mkdir -p` does.
    fn make_directory(&self, path: &RelativePath) -> Result<(), Reason>;

    /// Sets the final metadata of a file or directory.
    fn set_attributes(
        &self,
        path: &RelativePath,
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason>;

    /// Creates a symbolic link, and atomically replaces a file or link of that name. The target is never looked at.
    fn make_symlink(
        &self,
        path: &RelativePath,
        target: &[u8],
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason>;

    /// Makes `new` a hard link to the regular file `existing`, and atomically replaces a file or link of that name.
    /// Fails if the file system has no hard links, or if the two are on different file systems.
    fn link(&self, existing: &RelativePath, new: &RelativePath) -> Result<(), Reason>;

    /// Removes a file, link, device or the like, or an empty directory. A link's target is never touched. Fails for the
    /// store itself, and for a directory that contains anything, such as a partial.
    fn remove(&self, path: &RelativePath) -> Result<(), Reason>;

    /// Returns device and inode of a directory, or of its nearest existing parent, and of all directories above that,
    /// also above the store. Shows whether a directory is inside another. Empty for a store outside the file system.
    fn ancestry(&self, path: &RelativePath) -> Vec<FileId> {
        let _ = path;
        Vec::new()
    }

    /// Returns which of the `wanted` differences between names a directory ignores, or will ignore once it exists. A
    /// store may create a temporary file to find out, if it `may_write`.
    fn folding(&self, directory: &RelativePath, wanted: Folding, may_write: bool) -> Folding {
        let _ = (directory, wanted, may_write);
        Folding::default()
    }

    /// Renames an entry to exactly the spelling of `path`, if the directory folds names and stores it with another one.
    /// `false` if it still has another spelling: some file systems show all names in lower case. A store that does not
    /// fold names has nothing to do.
    fn correct_spelling(&self, path: &RelativePath, folding: Folding) -> Result<bool, Reason> {
        let _ = (path, folding);
        Ok(true)
    }

    /// Returns a probe for the times that the file system of `beside` keeps. The probe may create a file, and removes
    /// it when it is dropped.
    fn time_probe(&self, beside: &RelativePath) -> Option<Box<dyn TimeProbe>> {
        let _ = beside;
        None
    }

    /// Fails when the store is no longer where it was opened, for example because the directory was renamed or mounted
    /// over. Every session of a server calls this first.
    fn check_root(&self) -> Result<(), Reason> {
        Ok(())
    }

    /// Syncs to disk everything that was created or found in this store so far.
    fn sync(&self) -> Result<(), Reason>;

    /// Removes all partials in the store that no upload has open and that were last written more than `age` ago.
    /// Returns how many it removed.
    fn sweep(&self, age: std::time::Duration) -> Result<u64, Reason>;
}

/// Probes which times a file system keeps: some round them, or clamp them to a first and last year.
pub trait TimeProbe: Send {
    /// Returns the time of last modification as the file system keeps it; `None` if it cannot find out.
    fn kept(&mut self, time: Time) -> Option<Time>;
}

/// An open file to read from.
pub trait Source: Send {
    /// Returns the metadata of the open file.
    fn metadata(&self) -> io::Result<Metadata>;

    /// Reads at an offset until the buffer is full or the file ends; returns the bytes read.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Returns the first data range at or after an offset; `None` when only a hole or nothing follows. A hole reads as
    /// zeros. A store that does not know holes reports none.
    fn data_from(&self, offset: u64) -> io::Result<Option<std::ops::Range<u64>>>;

    /// The file descriptor, if the source is a file of the system.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Reports whether a file of size 0 has content.
fn reads_as_more(source: &dyn Source, path: &RelativePath) -> Result<bool, Reason> {
    let read = source.read_at(&mut [0], 0).map_err(|error| {
        Reason::new(
            Code::Unreadable,
            format!("{path}: cannot read the file, whose size is unknown: {error}"),
        )
    })?;
    Ok(read > 0)
}

/// Computes BLAKE3 of a source's content, holes included. Blocks. Reads no more than `size` bytes, and fails when there
/// are fewer.
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

/// An unfinished file. Only its owner can read it as a file. Dropping it keeps the partial for resume.
pub trait Upload: Send {
    /// Returns the ranges that may hold content of an earlier attempt: ascending, not touching. Verify their content
    /// before you rely on it.
    fn held(&self) -> io::Result<Vec<std::ops::Range<u64>>>;

    /// Whether it takes each byte once and in order only. Then it cannot be read back, and holes are written as zeros.
    fn in_order(&self) -> bool {
        false
    }

    /// Writes at an offset.
    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Starts to write the content to disk, if the store can, so that a durable commit takes less time. Does not wait;
    /// errors appear at the commit.
    fn write_back(&mut self) {}

    /// Copies a source's content by sharing its blocks (a reflink); `false` if the file system cannot.
    fn share(&mut self, _source: &dyn Source) -> io::Result<bool> {
        Ok(false)
    }

    /// Makes a range read as zeros, also over content of an earlier attempt. Frees its space if the store can. Extends
    /// the file to the end of the range if it is shorter.
    fn make_hole(&mut self, part: std::ops::Range<u64>) -> io::Result<()>;

    /// Reads written content back, to hash it.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Gives the complete file its final name and these attributes, as durable as requested. An existing file stays
    /// whole until then, and is replaced atomically.
    fn commit(
        self: Box<Self>,
        attributes: &Attributes,
        durability: Durability,
    ) -> Result<MetadataWarnings, Reason>;

    /// Removes the partial.
    fn discard(self: Box<Self>);
}
