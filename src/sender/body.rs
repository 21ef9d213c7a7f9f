//! Reading a file to send: in blocks, hashed, and watched for changes.

use bytes::{Bytes, BytesMut};

use crate::error::{Code, Why};
use crate::manifest::Announce;
use crate::store::{Metadata, Source};
use crate::wire::{Held, Range};

/// Bytes read, hashed and handed to the connection at a time.
pub(super) const BLOCK: usize = 256 << 10;

/// The range of a whole file; none for an empty one.
pub(super) fn whole(size: u64) -> Vec<Range> {
    if size == 0 { Vec::new() } else { vec![Range { offset: 0, length: size }] }
}

/// Reads a file from front to back. All of it is hashed; only the planned ranges come out. Blocks.
pub(super) struct FileReader {
    file: What,
    held: Vec<Held>,
    ranges: Vec<Range>,
    /// Ranges that are read to their end.
    passed: usize,
    position: u64,
    hasher: blake3::Hasher,
    source: Option<Box<dyn Source>>,
}

/// What must stay the same while it is read.
struct What {
    tree: std::sync::Arc<crate::manifest::Tree>,
    path: crate::path::RelativePath,
    seen: Metadata,
}

impl FileReader {
    /// A reader for an announced file. The file itself is opened with the first read, so that many wait with few
    /// descriptors.
    pub(super) fn open(announce: &Announce, held: Vec<Held>) -> Self {
        let file = What { tree: announce.tree.clone(), path: announce.source.clone(), seen: announce.metadata.clone() };
        let ranges = whole(announce.metadata.size);
        Self { file, held, ranges, passed: 0, position: 0, hasher: blake3::Hasher::new(), source: None }
    }

    /// What will come out.
    pub(super) fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// Compares what the receiver holds with the file: what is the same need not travel.
    pub(super) fn compare_held(mut self) -> Result<Self, Why> {
        // What is gone or has changed by now is better known before a stream is opened for it.
        self.source()?;
        let mut missing = Vec::new();
        let mut next = 0;
        let mut buffer = BytesMut::zeroed(BLOCK);
        for held in std::mem::take(&mut self.held) {
            let end = held.range.offset + held.range.length;
            if end > self.file.seen.size || self.digest(held.range, &mut buffer)? != held.digest {
                continue;
            }
            if held.range.offset > next {
                missing.push(Range { offset: next, length: held.range.offset - next });
            }
            next = end;
        }
        if next < self.file.seen.size {
            missing.push(Range { offset: next, length: self.file.seen.size - next });
        }
        self.ranges = missing;
        Ok(self)
    }

    /// The next block of the planned ranges; `None` when all of the file is read and hashed.
    pub(super) fn next(&mut self) -> Result<Option<Bytes>, Why> {
        while self.position < self.file.seen.size {
            let (end, planned) = match self.ranges.get(self.passed) {
                Some(range) if self.position >= range.offset => (range.offset + range.length, true),
                Some(range) => (range.offset, false),
                None => (self.file.seen.size, false),
            };
            let mut block = BytesMut::zeroed((end - self.position).min(BLOCK as u64) as usize);
            self.read_exact(&mut block, self.position)?;
            self.hasher.update(&block);
            self.position += block.len() as u64;
            if self.position == end && planned {
                self.passed += 1;
            }
            if planned {
                return Ok(Some(block.freeze()));
            }
        }
        Ok(None)
    }

    /// The digest of the whole file, if the file is still what was announced.
    pub(super) fn finish(mut self) -> Result<[u8; 32], Why> {
        let open = self.source()?.metadata().map_err(|e| unreadable(&e))?;
        let named = self.file.tree.store.stat(&self.file.path)?;
        if open.version != self.file.seen.version || named.is_none_or(|named| named.version != open.version) {
            return Err(changed());
        }
        Ok(self.hasher.finalize().into())
    }

    fn digest(&mut self, range: Range, buffer: &mut [u8]) -> Result<[u8; 32], Why> {
        let mut hasher = blake3::Hasher::new();
        let (mut at, end) = (range.offset, range.offset + range.length);
        while at < end {
            let part = (end - at).min(buffer.len() as u64) as usize;
            self.read_exact(&mut buffer[..part], at)?;
            hasher.update(&buffer[..part]);
            at += part as u64;
        }
        Ok(hasher.finalize().into())
    }

    /// A file that has become shorter has changed.
    fn read_exact(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Why> {
        match self.source()?.read_at(buffer, offset) {
            Ok(n) if n == buffer.len() => Ok(()),
            Ok(_) => Err(changed()),
            Err(error) => Err(unreadable(&error)),
        }
    }

    /// Opens the file at first use, and makes sure that it is the one that was announced.
    fn source(&mut self) -> Result<&dyn Source, Why> {
        if self.source.is_none() {
            let source = self.file.tree.store.open(&self.file.path)?;
            if source.metadata().map_err(|e| unreadable(&e))?.version != self.file.seen.version {
                return Err(changed());
            }
            self.source = Some(source);
        }
        self.source.as_deref().ok_or_else(|| Why::from(Code::Internal))
    }
}

fn changed() -> Why {
    Why::new(Code::Changed, "changed while it was being sent; send it again once it is at rest")
}

fn unreadable(error: &std::io::Error) -> Why {
    Why::new(Code::Unreadable, format!("cannot be read: {error}"))
}
