//! Finds blocks of zeros in the data of a sparse file.

use std::ops::Range;

/// Aligned blocks of zeros of this size in a sparse file are left as holes, in bytes. It is the block size of most
/// file systems.
pub(super) const HOLE_BLOCK: u64 = 4 << 10;
/// A block of zeros to compare with.
static ZERO_BLOCK: [u8; HOLE_BLOCK as usize] = [0; HOLE_BLOCK as usize];

/// A part of a run that is all zeros or all data.
pub(super) struct RunPart {
    pub(super) range: Range<usize>,
    /// The part is all zeros.
    pub(super) zeros: bool,
}

/// Splits a run at the borders of zero blocks. Blocks are aligned in the file, so the first and last part of a run may
/// be partial blocks. A partial block of zeros becomes a hole too, and takes no space if the rest of its block is
/// zeros.
pub(super) fn split_at_zeros(offset: u64, data: &[u8]) -> Vec<RunPart> {
    let mut parts: Vec<RunPart> = Vec::new();
    let mut at = 0;
    while at < data.len() {
        let left_in_block = HOLE_BLOCK - (offset + at as u64) % HOLE_BLOCK;
        let end = data.len().min(at + left_in_block as usize);
        let zeros = data[at..end] == ZERO_BLOCK[..end - at];
        match parts.last_mut() {
            Some(last) if last.zeros == zeros => last.range.end = end,
            _ => parts.push(RunPart {
                range: at..end,
                zeros,
            }),
        }
        at = end;
    }
    parts
}
