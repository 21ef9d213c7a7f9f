//! An open file to read from.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use super::metadata::Metadata;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;

/// Bytes read and hashed at a time: enough to keep a disk's read-ahead busy.
const DIGEST_BLOCK: usize = 256 << 10;

/// A regular file that [`Store::open`](crate::storage::Store::open) opened for reading. All offsets and lengths are
/// bytes. Every call blocks and runs to its end; errors are those of the system.
///
/// It stays the same file when its name is replaced or removed. Another program may still change its content; compare
/// [`Metadata::version`] before and after reading to find out.
pub trait Source: Send {
    /// Returns the metadata of the open file as it is now.
    fn metadata(&self) -> io::Result<Metadata>;

    /// Reads at an offset until the buffer is full or the file ends. Returns the bytes read; fewer than the buffer
    /// holds, or 0, only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Returns the first data range at or after an offset; `None` when only a hole or nothing follows. A hole reads as
    /// zeros. A store that does not know holes reports all of the rest of the file as data.
    fn data_from(&self, offset: u64) -> io::Result<Option<Range<u64>>>;

    /// The file descriptor, if the source is a file of the system.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Reports whether a file of size 0 has content.
pub(super) fn has_content(source: &dyn Source, path: &RelativePath) -> Result<bool, Reason> {
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
