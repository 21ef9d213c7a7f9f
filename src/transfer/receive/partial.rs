//! Opens or resumes the partial of a file.

use std::collections::HashSet;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{HELD_BLOCK, HELD_STEP, Held, MAX_HELD, MAX_HOLES};
use crate::storage::io_errors::fault;
use crate::storage::{PartialKey, Store, Upload};

/// Most partial blocks that are offered as held: those at the ends of written ranges. They use half of [`MAX_HELD`],
/// less one for the end of the file.
pub(super) const MAX_ENDS: u64 = MAX_HELD as u64 / 2 - 1;
/// Bytes read back at a time to hash data that arrived out of order.
pub(super) const READ_BACK_SIZE: usize = 256 << 10;

/// Most bytes of gaps that are read back as zeros when an earlier attempt is offered: a second of hashing.
const MAX_JOINED: u64 = 1 << 30;

/// How long to wait for a partial that another process holds before refusing the file, and the interval of attempts. A
/// killed server may still be closing its files while the next one starts.
const BUSY_TIMEOUT: Duration = Duration::from_secs(3);
const BUSY_INTERVAL: Duration = Duration::from_millis(50);

/// Opens a file's partial. Blocks, and waits up to [`BUSY_TIMEOUT`] for another process that has it open.
pub(super) fn open_partial(
    store: &dyn Store,
    path: &RelativePath,
    key: &PartialKey,
) -> Result<Box<dyn Upload>, Reason> {
    let begun = Instant::now();
    loop {
        match store.create(path, key) {
            Err(why) if why.code == Code::Busy && begun.elapsed() < BUSY_TIMEOUT => {
                std::thread::sleep(BUSY_INTERVAL)
            }
            created => return created,
        }
    }
}

/// Returns the ranges of an earlier attempt that are worth offering, with their digests. Blocks.
pub(super) fn held_ranges(
    upload: &dyn Upload,
    path: &RelativePath,
    size: u64,
) -> Result<Vec<Held>, Reason> {
    let written = upload
        .held()
        .map_err(|error| fault(path, "read its partial", error))?;
    let parts = join_parts(written);
    // Based on the held bytes, not the size: a file of 1 TiB may consist mostly of holes.
    let bytes: u64 = parts.iter().map(|part| part.end - part.start).sum();
    let block = bytes
        .div_ceil(MAX_HELD as u64 - MAX_ENDS)
        .next_multiple_of(HELD_BLOCK);
    let mut held = Vec::new();
    let mut buffer = vec![0; READ_BACK_SIZE];
    let mut ends = 0;
    for part in parts {
        let mut offset = part.start.next_multiple_of(HELD_STEP);
        let end = if part.end < size {
            part.end - part.end % HELD_STEP
        } else {
            size
        };
        while offset < end {
            let next = (offset - offset % block).saturating_add(block).min(end);
            let whole = offset % block == 0 && (next % block == 0 || next == size);
            if whole || ends < MAX_ENDS {
                ends += u64::from(!whole);
                let mut hasher = blake3::Hasher::new();
                read_back(upload, path, offset..next, &mut buffer, &mut hasher)?;
                let range = crate::protocol::Range {
                    offset,
                    length: next - offset,
                };
                held.push(Held {
                    range,
                    digest: hasher.finalize().into(),
                });
            }
            offset = next;
        }
    }
    Ok(held)
}

/// Hashes a range of a partial, mostly from the page cache. Blocks.
pub(super) fn read_back(
    upload: &dyn Upload,
    path: &RelativePath,
    range: Range<u64>,
    buffer: &mut [u8],
    hasher: &mut blake3::Hasher,
) -> Result<(), Reason> {
    let mut at = range.start;
    while at < range.end {
        let part = (range.end - at).min(buffer.len() as u64) as usize;
        let read = upload
            .read_at(&mut buffer[..part], at)
            .map_err(|error| fault(path, "read it back", error))?;
        if read == 0 {
            return Err(Reason::new(
                Code::Io,
                "cannot read the partial: another process truncated it",
            ));
        }
        hasher.update(&buffer[..read]);
        at += read as u64;
    }
    Ok(())
}

/// Joins held ranges across their smallest gaps if there are more gaps than a plan may have holes. The other gaps were
/// zeros that became holes; the digest shows whether they are zeros at the sender too. A plan lists the largest holes,
/// and the last among equal ones, so these gaps are not joined.
fn join_parts(parts: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut gaps: Vec<(u64, u64)> = parts
        .windows(2)
        .map(|two| (two[1].start - two[0].end, two[0].end))
        .collect();
    gaps.sort_unstable();
    gaps.truncate(gaps.len().saturating_sub(MAX_HOLES));
    let mut joined_bytes = 0;
    let joined: HashSet<u64> = gaps
        .into_iter()
        .take_while(|(length, _)| {
            joined_bytes += length;
            joined_bytes <= MAX_JOINED
        })
        .map(|(_, at)| at)
        .collect();
    let mut all: Vec<Range<u64>> = Vec::new();
    for part in parts {
        match all.last_mut() {
            Some(last) if joined.contains(&last.end) => last.end = part.end,
            _ => all.push(part),
        }
    }
    all
}
