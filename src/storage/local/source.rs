//! A regular file on disk, open for reading.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::fstat;

use super::holes::next_data;
use super::stat;
use crate::storage::metadata::Metadata;
use crate::storage::source::Source;

/// A regular file, open for reading.
pub(super) struct LocalSource(pub(super) File);

impl Source for LocalSource {
    fn metadata(&self) -> io::Result<Metadata> {
        Ok(stat::metadata(&fstat(&self.0)?))
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
