//! An unfinished file to write to, and what identifies it until it is committed.

use std::io;
use std::ops::Range;

use super::metadata::{Attributes, MetadataWarnings};
use super::source::Source;
use crate::error::Reason;
use crate::protocol::{Durability, Time};

/// What a partial is bound to besides its path: the sender's key, and the source's size and time.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PartialKey {
    /// The key of the sender.
    pub owner: [u8; 32],
    /// Size of the source in bytes, or [`PartialKey::UNKNOWN_SIZE`].
    pub size: u64,
    /// Time of last modification of the source.
    pub modified: Option<Time>,
}

impl PartialKey {
    /// The size of a source of unknown size. An upload of it always starts from zero.
    pub const UNKNOWN_SIZE: u64 = u64::MAX;

    /// The longest useful partial of an earlier attempt, in bytes.
    pub(super) fn useful_size(&self) -> u64 {
        if self.size == Self::UNKNOWN_SIZE {
            0
        } else {
            self.size
        }
    }
}

/// An unfinished file, made by [`Store::create`](crate::storage::Store::create). Only its owner can read it as a file.
///
/// All offsets and lengths are bytes. Every call blocks and runs to its end. Dropping it at any moment cancels the
/// upload: written content stays as a partial, which a later `create` with the same key resumes, and a partial that
/// holds nothing is removed.
pub trait Upload: Send {
    /// Returns the ranges that may hold content of an earlier attempt: ascending, not touching. Verify their content
    /// before you rely on it.
    fn held(&self) -> io::Result<Vec<Range<u64>>>;

    /// Whether it takes each byte once and in order only. Then it cannot be read back, and holes are written as zeros.
    fn in_order(&self) -> bool {
        false
    }

    /// Writes all of `data` at an offset, also beyond the end; a gap reads as zeros. After an error, any part of it may
    /// be written.
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
    fn make_hole(&mut self, part: Range<u64>) -> io::Result<()>;

    /// Reads written content back, to hash it: until the buffer is full or the content ends. Returns the bytes read.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Gives the complete file its final name and these attributes, as durable as requested. An existing file stays
    /// whole until then, and is replaced atomically. Attributes that the store cannot keep are returned as warnings.
    ///
    /// # Errors
    /// [`Exists`](crate::error::Code::Exists) when the name exists and the attributes say `exclusive`;
    /// [`IsDirectory`](crate::error::Code::IsDirectory) when it is a directory;
    /// [`NotFound`](crate::error::Code::NotFound) when another program removed the partial or its directory;
    /// [`NoSpace`](crate::error::Code::NoSpace) when the disk is full. After an error the file is a partial again. The
    /// one exception is a directory that cannot be synced after the rename; the text then says that the file is
    /// complete.
    fn commit(
        self: Box<Self>,
        attributes: &Attributes,
        durability: Durability,
    ) -> Result<MetadataWarnings, Reason>;

    /// Removes the partial.
    fn discard(self: Box<Self>);
}
