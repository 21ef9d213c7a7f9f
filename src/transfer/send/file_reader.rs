//! Reads a file to send: in blocks, without its holes, hashed, and checked for changes.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::holes;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::protocol::{Held, Plan, Range, content_hasher};
use crate::storage::walk::{Announce, Tree};
use crate::storage::{Metadata, Source};

/// Bytes that are read, hashed and sent at a time.
pub(super) const BLOCK: usize = 256 << 10;

/// Reads a file from start to end. Hashes everything but holes, and returns only the planned ranges. Blocks.
pub(super) struct FileReader {
    file: AnnouncedFile,
    held: Vec<Held>,
    holes: Vec<Range>,
    /// All ranges but the holes, in order.
    parts: Vec<Part>,
    /// Parts that are completely read.
    passed: usize,
    position: u64,
    hasher: blake3::Hasher,
    source: Option<Box<dyn Source>>,
}

/// A range of a file that is read.
struct Part {
    range: Range,
    /// Whether it is sent, because the receiver does not hold it.
    planned: bool,
}

/// The announced version of a file, which must not change while it is read.
struct AnnouncedFile {
    tree: Arc<Tree>,
    path: RelativePath,
    seen: Metadata,
    /// Whether the file may grow. Then only the announced size is sent.
    may_grow: bool,
}

impl AnnouncedFile {
    /// Checks that the file is still the announced one.
    fn check(&self, now: &Metadata) -> Result<(), Reason> {
        let seen = &self.seen.version;
        let now = &now.version;
        // The file has grown, and is otherwise the same as far as metadata shows.
        let grew = now.file == seen.file && now.size > seen.size;
        match () {
            () if now == seen || grew && self.may_grow => Ok(()),
            () if grew => Err(Reason::new(Code::Changed, GREW)),
            () => Err(changed()),
        }
    }
}

/// The message for a file that has grown.
const GREW: &str = "changed while it was being sent: it grew; send it again when it no longer changes, or use \
                    --allow-growing to send its size at the start";

impl FileReader {
    /// Creates a reader for an announced file. The file is opened at the first read, so that many waiting readers need
    /// few descriptors.
    pub(super) fn open(announce: &Announce, held: Vec<Held>, may_grow: bool) -> Self {
        let file = AnnouncedFile {
            tree: announce.tree.clone(),
            path: announce.source.clone(),
            seen: announce.metadata.clone(),
            may_grow,
        };
        let size = announce.metadata.size;
        Self {
            file,
            held,
            holes: Vec::new(),
            parts: split(size, &[], &[]),
            passed: 0,
            position: 0,
            hasher: content_hasher(size, &[]),
            source: None,
        }
    }

    /// Returns the plan: the ranges that will be sent, and the holes.
    pub(super) fn plan(&self, id: u64) -> Plan {
        let ranges = self
            .parts
            .iter()
            .filter(|part| part.planned)
            .map(|part| part.range)
            .collect();
        Plan {
            id,
            encoding: 0,
            ranges,
            holes: (!self.holes.is_empty()).then(|| self.holes.clone()),
        }
    }

    /// Finds the holes, and compares the held ranges with the file. Neither holes nor equal ranges are sent.
    pub(super) fn compare(mut self) -> Result<Self, Reason> {
        let size = self.file.seen.size;
        // Detect a removed or changed file before a stream is opened for it.
        self.holes = holes::find(self.source()?, size).map_err(|e| unreadable(&e))?;
        let mut equal = Vec::new();
        let mut buffer = BytesMut::zeroed(BLOCK);
        for held in std::mem::take(&mut self.held) {
            // Comparing a hole would read its zeros, and a peer could request 1 TiB of them.
            if end(held.range) <= size
                && !overlaps(&self.holes, held.range)
                && self.digest(held.range, &mut buffer)? == held.digest
            {
                equal.push(held.range);
            }
        }
        self.parts = split(size, &self.holes, &equal);
        self.hasher = content_hasher(size, &self.holes);
        Ok(self)
    }

    /// Returns the next block of the planned ranges; `None` when the whole file is read and hashed.
    pub(super) fn next(&mut self) -> Result<Option<Bytes>, Reason> {
        while let Some(&Part { range, planned }) = self.parts.get(self.passed) {
            let at = self.position.max(range.offset);
            let mut block = BytesMut::zeroed((end(range) - at).min(BLOCK as u64) as usize);
            self.read_exact(&mut block, at)?;
            self.hasher.update(&block);
            self.position = at + block.len() as u64;
            self.passed += usize::from(self.position == end(range));
            if planned {
                return Ok(Some(block.freeze()));
            }
        }
        Ok(None)
    }

    /// Returns the digest of the whole file, if the file is still the announced one.
    pub(super) fn finish(mut self) -> Result<[u8; 32], Reason> {
        let open = self.source()?.metadata().map_err(|e| unreadable(&e))?;
        let Some(named) = self.file.tree.store.stat(&self.file.path)? else {
            return Err(Reason::new(
                Code::Vanished,
                "removed while it was being sent",
            ));
        };
        // Check the name last: it may now belong to another file.
        self.file.check(&open)?;
        self.file.check(&named)?;
        Ok(self.hasher.finalize().into())
    }

    fn digest(&mut self, range: Range, buffer: &mut [u8]) -> Result<[u8; 32], Reason> {
        let mut hasher = blake3::Hasher::new();
        let mut at = range.offset;
        let end = end(range);
        while at < end {
            let part = (end - at).min(buffer.len() as u64) as usize;
            self.read_exact(&mut buffer[..part], at)?;
            hasher.update(&buffer[..part]);
            at += part as u64;
        }
        Ok(hasher.finalize().into())
    }

    /// Reads exactly `buffer`. A file that is shorter than announced has changed.
    fn read_exact(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Reason> {
        match self.source()?.read_at(buffer, offset) {
            Ok(n) if n == buffer.len() => Ok(()),
            Ok(_) => Err(changed()),
            Err(error) => Err(unreadable(&error)),
        }
    }

    /// Opens the file at the first use, and checks that it is the announced one.
    fn source(&mut self) -> Result<&dyn Source, Reason> {
        if self.source.is_none() {
            let source = self.file.tree.store.open(&self.file.path);
            let source = source.map_err(vanished)?;
            self.file
                .check(&source.metadata().map_err(|e| unreadable(&e))?)?;
            self.source = Some(source);
        }
        self.source
            .as_deref()
            .ok_or_else(|| Reason::from(Code::Internal))
    }
}

/// Splits a file into the parts that are read: the ranges that the receiver holds, and all others but the holes, which
/// are sent. Holes and held ranges do not overlap.
fn split(size: u64, holes: &[Range], held: &[Range]) -> Vec<Part> {
    let mut not_sent: Vec<(Range, bool)> = holes.iter().map(|&hole| (hole, false)).collect();
    not_sent.extend(held.iter().map(|&range| (range, true)));
    not_sent.sort_unstable_by_key(|(range, _)| range.offset);
    let mut parts = Vec::new();
    let mut next = 0;
    for (range, is_held) in not_sent {
        push_planned(&mut parts, next, range.offset);
        if is_held {
            parts.push(Part {
                range,
                planned: false,
            });
        }
        next = end(range);
    }
    push_planned(&mut parts, next, size);
    parts
}

/// Adds the range from `start` to `end` as one that is sent, unless it is empty.
fn push_planned(parts: &mut Vec<Part>, start: u64, end: u64) {
    if end > start {
        let range = Range {
            offset: start,
            length: end - start,
        };
        parts.push(Part {
            range,
            planned: true,
        });
    }
}

fn end(range: Range) -> u64 {
    range.offset.saturating_add(range.length)
}

/// Returns whether a range overlaps any of the ascending ranges.
fn overlaps(ranges: &[Range], range: Range) -> bool {
    let next = ranges.partition_point(|&other| end(other) <= range.offset);
    ranges
        .get(next)
        .is_some_and(|other| other.offset < end(range))
}

/// Turns [`Code::NotFound`] into [`Code::Vanished`]: the file existed when it was announced.
pub(super) fn vanished(reason: Reason) -> Reason {
    match reason.code {
        Code::NotFound => Code::Vanished.into(),
        _ => reason,
    }
}

fn changed() -> Reason {
    Reason::new(
        Code::Changed,
        "changed while it was being sent; send it again when it no longer changes",
    )
}

fn unreadable(error: &std::io::Error) -> Reason {
    Reason::new(Code::Unreadable, format!("cannot read the file: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, length: u64) -> Range {
        Range { offset, length }
    }

    /// The parts as offset, length, and whether they are sent.
    fn parts(size: u64, holes: &[Range], held: &[Range]) -> Vec<(u64, u64, bool)> {
        split(size, holes, held)
            .iter()
            .map(|part| (part.range.offset, part.range.length, part.planned))
            .collect()
    }

    #[test]
    fn all_of_a_file_is_sent_but_holes_and_held_ranges() {
        assert_eq!(parts(10, &[], &[]), [(0, 10, true)]);
        assert_eq!(parts(10, &[range(4, 2)], &[]), [(0, 4, true), (6, 4, true)]);
        assert_eq!(
            parts(10, &[], &[range(4, 2)]),
            [(0, 4, true), (4, 2, false), (6, 4, true)]
        );
        assert_eq!(
            parts(10, &[range(0, 2), range(8, 2)], &[range(2, 3)]),
            [(2, 3, false), (5, 3, true)]
        );
    }

    #[test]
    fn an_empty_or_hollow_file_has_no_parts() {
        assert_eq!(parts(0, &[], &[]), []);
        assert_eq!(parts(10, &[range(0, 10)], &[]), []);
        assert_eq!(parts(10, &[], &[range(0, 10)]), [(0, 10, false)]);
    }
}
