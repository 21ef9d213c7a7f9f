//! Reading a file to send: in blocks, without its holes, hashed, and watched for changes.

use bytes::{Bytes, BytesMut};

use super::holes;
use crate::error::{Code, Reason};
use crate::protocol::{Held, Plan, Range, content_hasher};
use crate::storage::walk::Announce;
use crate::storage::{Metadata, Source};

/// Bytes read, hashed and handed to the connection at a time.
pub(super) const BLOCK: usize = 256 << 10;

/// Reads a file from front to back. All of it is hashed but its holes; only the planned ranges come out. Blocks.
pub(super) struct FileReader {
    file: What,
    held: Vec<Held>,
    holes: Vec<Range>,
    /// All but the holes, in order.
    parts: Vec<Part>,
    /// Parts that are read to their end.
    passed: usize,
    position: u64,
    hasher: blake3::Hasher,
    source: Option<Box<dyn Source>>,
}

/// A part of a file that is read.
struct Part {
    range: Range,
    /// The receiver does not hold it.
    planned: bool,
}

/// What must stay the same while it is read.
struct What {
    tree: std::sync::Arc<crate::storage::walk::Tree>,
    path: crate::protocol::path::RelativePath,
    seen: Metadata,
    /// It may become longer meanwhile: what it had when it was announced is sent.
    may_grow: bool,
}

impl What {
    /// Whether the file is still what was announced.
    fn check(&self, now: &Metadata) -> Result<(), Reason> {
        let seen = &self.seen.version;
        let now = &now.version;
        // Longer, and otherwise the same file, as far as metadata can tell.
        let grew = now.file == seen.file && now.size > seen.size;
        match () {
            () if now == seen || grew && self.may_grow => Ok(()),
            () if grew => Err(Reason::new(Code::Changed, GREW)),
            () => Err(changed()),
        }
    }
}

/// What is said of a file to which something was appended.
const GREW: &str = "changed while it was being sent: it grew. Send it again once it is at rest, or with --allow-growing, \
                    which sends what it had at the start";

impl FileReader {
    /// A reader for an announced file. The file itself is opened with the first read, so that many wait with few
    /// descriptors.
    pub(super) fn open(announce: &Announce, held: Vec<Held>, may_grow: bool) -> Self {
        let file = What {
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

    /// What will come out.
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

    /// Finds the holes, and compares what the receiver holds with the file: neither what is the same need travel.
    pub(super) fn compare(mut self) -> Result<Self, Reason> {
        let size = self.file.seen.size;
        // What is gone or has changed by now is better known before a stream is opened for it.
        self.holes = holes::find(self.source()?, size).map_err(|e| unreadable(&e))?;
        let mut apart: Vec<(Range, bool)> = self.holes.iter().map(|&hole| (hole, false)).collect();
        let mut buffer = BytesMut::zeroed(BLOCK);
        for held in std::mem::take(&mut self.held) {
            // To compare a hole takes reading its zeros, and a peer could ask for 1 TiB of them.
            if end(held.range) <= size
                && !overlaps(&self.holes, held.range)
                && self.digest(held.range, &mut buffer)? == held.digest
            {
                apart.push((held.range, true));
            }
        }
        apart.sort_unstable_by_key(|(range, _)| range.offset);
        let mut parts = Vec::new();
        let mut next = 0;
        for (range, held) in apart.into_iter().chain([(
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

    /// The next block of the planned ranges; `None` when all of the file is read and hashed.
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

    /// The digest of the whole file, if the file is still what was announced.
    pub(super) fn finish(mut self) -> Result<[u8; 32], Reason> {
        let open = self.source()?.metadata().map_err(|e| unreadable(&e))?;
        let Some(named) = self.file.tree.store.stat(&self.file.path)? else {
            return Err(Reason::new(
                Code::Vanished,
                "removed while it was being sent",
            ));
        };
        // The name last: it may have become that of another file.
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

    /// A file that has become shorter has changed.
    fn read_exact(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Reason> {
        match self.source()?.read_at(buffer, offset) {
            Ok(n) if n == buffer.len() => Ok(()),
            Ok(_) => Err(changed()),
            Err(error) => Err(unreadable(&error)),
        }
    }

    /// Opens the file at first use, and makes sure that it is the one that was announced.
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

/// Whether a range shares a byte with ascending ones.
fn overlaps(ranges: &[Range], range: Range) -> bool {
    let next = ranges.partition_point(|&other| end(other) <= range.offset);
    ranges
        .get(next)
        .is_some_and(|other| other.offset < end(range))
}

/// What is not found at its turn was there when it was announced.
pub(super) fn vanished(why: Reason) -> Reason {
    match why.code {
        Code::NotFound => Code::Vanished.into(),
        _ => why,
    }
}

fn changed() -> Reason {
    Reason::new(
        Code::Changed,
        "changed while it was being sent; send it again once it is at rest",
    )
}

fn unreadable(error: &std::io::Error) -> Reason {
    Reason::new(Code::Unreadable, format!("cannot be read: {error}"))
}
