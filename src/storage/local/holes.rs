//! Holes in files on disk: ranges that read as zeros and take no space.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Bytes of zeros written at a time if the file system cannot make a hole.
const ZERO_BLOCK: usize = 64 << 10;

/// Returns the first data range at or after an offset and before `end`. A file system that does not report holes has
/// none.
pub(super) fn next_data(file: &File, at: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    if at >= end {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) if start < end => start,
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(at..end)),
        Err(e) => return Err(e.into()),
    };
    match seek(file, SeekFrom::Hole(start)) {
        Ok(hole) => Ok(Some(start..hole.min(end))),
        // The file was truncated meanwhile.
        Err(Errno::NXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Makes a range read as zeros, with a hole if the file system can. Extends the file to the end of the range.
pub(super) fn make_hole(file: &File, part: Range<u64>) -> io::Result<()> {
    let length = file.metadata()?.len();
    let mut at = part.start;
    // Beyond the end of the file there is no content yet.
    while let Some(data) = next_data(file, at, part.end.min(length))? {
        if !punch_hole(file, &data)? {
            write_zeros(file, &data)?;
        }
        at = data.end;
    }
    if length < part.end {
        file.set_len(part.end)?;
    }
    Ok(())
}

/// Frees the space of a range; `false` if the file system cannot.
#[cfg(target_os = "linux")]
fn punch_hole(file: &File, part: &Range<u64>) -> io::Result<bool> {
    use rustix::fs::{FallocateFlags, fallocate};
    match fallocate(
        file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        part.start,
        part.end - part.start,
    ) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(not(target_os = "linux"))]
fn punch_hole(_: &File, _: &Range<u64>) -> io::Result<bool> {
    Ok(false)
}

fn write_zeros(file: &File, part: &Range<u64>) -> io::Result<()> {
    let zeros = [0; ZERO_BLOCK];
    let mut at = part.start;
    while at < part.end {
        let length = (part.end - at).min(ZERO_BLOCK as u64);
        file.write_all_at(&zeros[..length as usize], at)?;
        at += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_written_without_hole_support() {
        let file = tempfile::tempfile().unwrap();
        let length = 3 * ZERO_BLOCK + 1;
        file.write_all_at(&vec![7; length], 0).unwrap();
        write_zeros(&file, &(1..length as u64 - 1)).unwrap();
        let mut back = vec![1; length];
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!((back[0], back[length - 1]), (7, 7));
        assert!(back[1..length - 1].iter().all(|&byte| byte == 0));
    }
}
