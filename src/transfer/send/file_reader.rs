//! Reads a file to send: in blocks, without its holes, hashed, and checked for changes.

use bytes::{Bytes, BytesMut};

use super::holes;
use crate::error::{Code, Reason};
use crate::protocol::{Held, Plan, Range, content_hasher};
use crate::storage::walk::Announce;
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
    tree: std::sync::Arc<crate::storage::walk::Tree>,
    path: crate::protocol::path::RelativePath,
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
        let parts = if size == 0 {
            Vec::new()
        } else {
            vec![Part {
                range: Range {
                    offset: 0,
                    length: size,
                },
                planned: true,
            }]
        };
        let hasher = content_hasher(size, &[]);
        Self {
            file,
            held,
            holes: Vec::new(),
            parts,
            passed: 0,
            position: 0,
            hasher,
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
        let mut not_sent: Vec<(Range, bool)> =
            self.holes.iter().map(|&hole| (hole, false)).collect();
        let mut buffer = BytesMut::zeroed(BLOCK);
        for held in std::mem::take(&mut self.held) {
            // Comparing a hole would read its zeros, and a peer could request 1 TiB of them.
            if end(held.range) <= size
                && !overlaps(&self.holes, held.range)
                && self.digest(held.range, &mut buffer)? == held.digest
            {
                not_sent.push((held.range, true));
            }
        }
        not_sent.sort_unstable_by_key(|(range, _)| range.offset);
        let mut parts = Vec::new();
        let mut next = 0;
        for (range, held) in not_sent.into_iter().chain([(
            Range {
                offset: size,
                length: 0,
            },
            false,
        )]) {
            if range.offset > next {
                parts.push(Part {
                    range: Range {
                        offset: next,
                        length: range.offset - next,
                    },
                    planned: true,
                });
            }
            if held {
                parts.push(Part {
                    range,
                    planned: false,
                });
            }
            next = end(range);
        }
        self.parts = parts;
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
pub(super) fn vanished(why: Reason) -> Reason {
    match why.code {
        Code::NotFound => Code::Vanished.into(),
        _ => why,
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
