//! A body on its way from the stream to the disk: pieces in any order, written at their offsets, hashed in order.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};

use crate::error::{Code, Why};
use crate::path::RelativePath;
use crate::store::fault::fault;
use crate::store::{Attributes, Upload};
use crate::wire::{Durability, Frame, HELD_BLOCK, Held, MAX_HELD, Message, Plan, Range, Trailer};

/// Bytes gathered into one write where they come in order.
pub(super) const RUN: usize = 256 << 10;
/// Memory for the first bytes of a run that does not continue another: a lost packet leaves a small gap, and what comes
/// behind it is no reason to set a whole [`RUN`] aside.
const FIRST_RUN: usize = 8 << 10;
/// Runs that may still be continued: packets of one flight rarely mix more.
const OPEN_RUNS: usize = 4;
/// Gaps in what is written, over which the peer is not honest: 16,384 lost packets in one window are no link.
const MAX_GAPS: usize = 16_384;
/// Memory that runs may take for each byte in them: a packet of 1,200 bytes in a [`FIRST_RUN`] takes seven times its own.
const MAX_SLACK: usize = 8;
/// Bytes read back at a time to hash what came out of order.
const READ_BACK: usize = 256 << 10;

/// Bytes that follow each other in the file, not yet written.
pub(super) struct Run {
    offset: u64,
    data: BytesMut,
}

impl Run {
    fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }
}

/// The receiving end of a body: where the stream's bytes belong in the file.
pub(super) struct Body {
    /// Offset in the stream, and where in the file it belongs; ascending.
    parts: Vec<(u64, Range)>,
    /// Offset in the stream at which the body begins.
    start: u64,
    /// Offset in the stream at which the trailer begins.
    end: u64,
    received: u64,
    tail: Vec<(u64, Bytes)>,
    tail_bytes: usize,
    runs: Vec<Run>,
    pending: usize,
    /// Memory that the runs take, in bytes.
    set_aside: usize,
    /// Where in the file the last full run ended.
    next: u64,
}

impl Body {
    /// A body that begins at an offset of its stream. The plan must lie within the file.
    pub(super) fn new(plan: &Plan, start: u64, size: u64) -> Result<Self, Why> {
        if plan.encoding != 0 {
            return Err(Why::new(Code::Unsupported, format!("encoding {} is not spoken here", plan.encoding)));
        }
        let mut end = start;
        let mut parts = Vec::with_capacity(plan.ranges.len());
        for &range in &plan.ranges {
            if range.offset + range.length > size {
                return Err(Why::new(Code::Protocol, "the plan reaches beyond the end of the file"));
            }
            parts.push((end, range));
            end += range.length;
        }
        let next = plan.ranges.first().map_or(0, |r| r.offset);
        let (tail, runs) = (Vec::new(), Vec::new());
        Ok(Self { parts, start, end, received: 0, tail, tail_bytes: 0, runs, pending: 0, set_aside: 0, next })
    }

    /// Takes a piece of the stream; QUIC never delivers a byte twice. Returns the bytes now pending more than before.
    pub(super) fn take(&mut self, mut offset: u64, mut piece: Bytes) -> Result<usize, Why> {
        let before = self.pending;
        while !piece.is_empty() && offset < self.end {
            let at = self.parts.partition_point(|&(start, _)| start <= offset) - 1;
            let (start, range) = self.parts[at];
            let into = offset - start;
            let part = piece.split_to(piece.len().min((range.length - into) as usize));
            self.add(range.offset + into, &part)?;
            offset += part.len() as u64;
        }
        if !piece.is_empty() {
            self.tail_bytes += piece.len();
            if self.tail_bytes > Trailer::LIMIT {
                return Err(Why::new(Code::Protocol, "the stream goes on behind its trailer"));
            }
            self.tail.push((offset, Bytes::copy_from_slice(&piece)));
        }
        Ok(self.pending - before)
    }

    fn add(&mut self, offset: u64, data: &[u8]) -> Result<(), Why> {
        self.received += data.len() as u64;
        self.pending += data.len();
        let open = self.runs.iter_mut().rev().take(OPEN_RUNS);
        if let Some(run) = open.into_iter().find(|run| run.end() == offset && run.data.len() + data.len() <= RUN) {
            run.data.extend_from_slice(data);
            self.next = self.next.max(offset + data.len() as u64);
            return Ok(());
        }
        if self.runs.len() >= MAX_GAPS {
            return Err(gaps());
        }
        // Room to grow only within measure: what is held against the window are bytes that came, not memory set aside.
        let roomy = if offset == self.next { RUN } else { FIRST_RUN };
        let room = MAX_SLACK * self.pending + 2 * RUN;
        let capacity = if self.set_aside + roomy <= room { roomy.max(data.len()) } else { data.len() };
        self.set_aside += capacity;
        let mut run = Run { offset, data: BytesMut::with_capacity(capacity) };
        run.data.extend_from_slice(data);
        self.next = self.next.max(run.end());
        self.runs.push(run);
        Ok(())
    }

    /// Offset in the stream at which the body begins.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// Bytes that wait to be written.
    pub(super) fn pending(&self) -> usize {
        self.pending
    }

    /// Hands over what waits to be written.
    pub(super) fn drain(&mut self) -> (Vec<Run>, usize) {
        self.set_aside = 0;
        (std::mem::take(&mut self.runs), std::mem::take(&mut self.pending))
    }

    /// The trailer, once the stream has ended.
    pub(super) fn trailer(&mut self) -> Result<Trailer, Why> {
        let planned: u64 = self.parts.iter().map(|(_, range)| range.length).sum();
        if self.received != planned {
            return Err(Why::new(Code::Protocol, format!("the body ended after {} of {planned} bytes", self.received)));
        }
        self.tail.sort_by_key(|&(offset, _)| offset);
        let mut buffer: BytesMut = self.tail.iter().flat_map(|(_, piece)| piece.iter().copied()).collect();
        let bad = |e: crate::wire::Malformed| Why::new(Code::Protocol, e.to_string());
        let frame = Frame::take(&mut buffer, Trailer::LIMIT).map_err(bad)?;
        match frame {
            Some(frame) if buffer.is_empty() => frame.decode().map_err(bad),
            _ => Err(Why::new(Code::Protocol, "the body is not followed by its trailer alone")),
        }
    }
}

/// The disk's side of a transfer: writes runs and hashes behind the contiguous frontier. All of it blocks.
pub(super) struct Disk {
    upload: Box<dyn Upload>,
    path: RelativePath,
    size: u64,
    hasher: blake3::Hasher,
    /// All before it is written and hashed.
    frontier: u64,
    /// Written beyond the frontier: start and end of each part.
    beyond: BTreeMap<u64, u64>,
}

impl Disk {
    /// Begins with what an earlier attempt left, and says what of it is worth offering.
    pub(super) fn begin(upload: Box<dyn Upload>, path: &RelativePath, size: u64) -> Result<(Self, Vec<Held>), Why> {
        let path = path.clone();
        let disk = Self { upload, path, size, hasher: blake3::Hasher::new(), frontier: 0, beyond: BTreeMap::new() };
        let mut held = Vec::new();
        let mut buffer = vec![0; READ_BACK];
        let block = size.div_ceil(MAX_HELD as u64).next_multiple_of(HELD_BLOCK);
        for part in disk.upload.held().map_err(|e| fault(&disk.path, "read what is there of it", e))? {
            let mut offset = part.start.next_multiple_of(block);
            while offset < part.end {
                let length = block.min(size - offset);
                if offset + length > part.end {
                    break;
                }
                let mut hasher = blake3::Hasher::new();
                disk.read_back(offset, offset + length, &mut buffer, &mut hasher)?;
                held.push(Held { range: Range { offset, length }, digest: hasher.finalize().into() });
                offset += length;
            }
        }
        Ok((disk, held))
    }

    /// Counts as written what the plan leaves out; it was offered as held.
    pub(super) fn keep(&mut self, plan: &Plan, held: &[Held]) -> Result<(), Why> {
        let mut next = 0;
        let ends = plan.ranges.iter().map(|r| (r.offset, r.offset + r.length)).chain([(self.size, self.size)]);
        for (start, end) in ends {
            if start > next {
                if !covers(held, next, start) {
                    return Err(Why::new(Code::Protocol, "the plan leaves out what this side does not hold"));
                }
                self.beyond.insert(next, start);
            }
            next = end;
        }
        Ok(())
    }

    /// Writes runs at their offsets.
    pub(super) fn write(&mut self, runs: Vec<Run>) -> Result<(), Why> {
        for run in runs {
            self.upload.write_at(&run.data, run.offset).map_err(|e| fault(&self.path, "write it", e))?;
            if run.offset == self.frontier {
                self.hasher.update(&run.data);
                self.frontier = run.end();
            } else {
                self.mark(run.offset, run.end())?;
            }
            self.catch_up()?;
        }
        Ok(())
    }

    /// Commits the file if its content is what the trailer says; otherwise nothing of it is kept.
    pub(super) fn finish(
        mut self,
        trailer: &Trailer,
        attributes: &Attributes,
        durability: Durability,
    ) -> Result<(), Why> {
        self.catch_up()?;
        if self.frontier != self.size {
            return Err(Why::new(Code::Protocol, format!("only {} of {} bytes came", self.frontier, self.size)));
        }
        if self.hasher.finalize() != trailer.digest {
            self.upload.discard();
            return Err(Why::new(Code::Corrupt, "the content does not match its digest; send it again"));
        }
        self.upload.commit(attributes, durability)
    }

    /// Removes the partial.
    pub(super) fn discard(self) {
        self.upload.discard();
    }

    fn mark(&mut self, start: u64, end: u64) -> Result<(), Why> {
        let (mut start, mut end) = (start, end);
        if let Some((&s, &e)) = self.beyond.range(..=start).next_back()
            && e == start
        {
            start = s;
        }
        if let Some(e) = self.beyond.remove(&end) {
            end = e;
        }
        self.beyond.insert(start, end);
        if self.beyond.len() > MAX_GAPS {
            return Err(gaps());
        }
        Ok(())
    }

    /// Hashes what is written right behind the frontier; it comes from the page cache most of the time.
    fn catch_up(&mut self) -> Result<(), Why> {
        let mut buffer = Vec::new();
        while let Some(end) = self.beyond.remove(&self.frontier) {
            buffer.resize(READ_BACK, 0);
            let mut hasher = std::mem::take(&mut self.hasher);
            self.read_back(self.frontier, end, &mut buffer, &mut hasher)?;
            self.hasher = hasher;
            self.frontier = end;
        }
        Ok(())
    }

    fn read_back(&self, mut at: u64, end: u64, buffer: &mut [u8], hasher: &mut blake3::Hasher) -> Result<(), Why> {
        while at < end {
            let part = (end - at).min(buffer.len() as u64) as usize;
            let read =
                self.upload.read_at(&mut buffer[..part], at).map_err(|e| fault(&self.path, "read it back", e))?;
            if read == 0 {
                return Err(Why::new(Code::Io, "the unfinished file has become shorter by another hand"));
            }
            hasher.update(&buffer[..read]);
            at += read as u64;
        }
        Ok(())
    }
}

fn gaps() -> Why {
    Why::new(Code::Protocol, "more gaps than any link makes")
}

/// Whether neighbouring held ranges cover a part of the file.
fn covers(held: &[Held], start: u64, end: u64) -> bool {
    let mut at = start;
    for held in held.iter().skip_while(|h| h.range.offset + h.range.length <= start) {
        if held.range.offset > at {
            break;
        }
        at = held.range.offset + held.range.length;
        if at >= end {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Result;
    use crate::store::{Claim, MemoryStore, Store};
    use proptest::prelude::*;

    fn plan(ranges: &[(u64, u64)]) -> Plan {
        let ranges = ranges.iter().map(|&(offset, length)| Range { offset, length }).collect();
        Plan { id: 0, encoding: 0, ranges }
    }

    fn upload(store: &MemoryStore, size: u64) -> Result<Box<dyn Upload>, Why> {
        let path = RelativePath::from_components(["f"])?;
        store.create(&path, &Claim { owner: [0; 32], size, modified: None })
    }

    /// Sends `content` as the stream of a plan, cut into pieces that come in a given order.
    fn receive(content: &[u8], plan: &Plan, held: &[Held], cuts: &[usize], turn: usize) -> Result<(), Why> {
        let start = 17;
        let mut stream: Vec<u8> = Vec::new();
        for r in &plan.ranges {
            stream.extend(&content[r.offset as usize..(r.offset + r.length) as usize]);
        }
        let trailer = Trailer { digest: *blake3::hash(content).as_bytes() };
        stream.extend(trailer.to_bytes());

        let mut body = Body::new(plan, start, content.len() as u64)?;
        let store = MemoryStore::new();
        let mut first = upload(&store, content.len() as u64)?;
        for h in held {
            let (from, to) = (h.range.offset as usize, (h.range.offset + h.range.length) as usize);
            first.write_at(&content[from..to], h.range.offset).unwrap();
        }
        drop(first);
        let (mut disk, _) =
            Disk::begin(upload(&store, content.len() as u64)?, &RelativePath::root(), content.len() as u64)?;
        disk.keep(plan, held)?;

        let mut edges: Vec<usize> = cuts.iter().map(|c| c % stream.len()).chain([0, stream.len()]).collect();
        edges.sort_unstable();
        let mut pieces: Vec<_> = edges.windows(2).map(|w| (w[0], &stream[w[0]..w[1]])).collect();
        let turn = turn % pieces.len();
        pieces.rotate_left(turn);
        for (at, piece) in pieces {
            body.take(start + at as u64, Bytes::copy_from_slice(piece))?;
            if at % 3 == 0 {
                disk.write(body.drain().0)?;
            }
        }
        disk.write(body.drain().0)?;
        disk.finish(&body.trailer()?, &Attributes::default(), Durability::Visible)?;
        let mut back = vec![0; content.len()];
        let path = RelativePath::from_components(["f"])?;
        store.open(&path)?.read_at(&mut back, 0).unwrap();
        assert_eq!(back, content);
        Ok(())
    }

    proptest! {
        #[test]
        fn a_body_in_any_order_becomes_the_file(
            content in proptest::collection::vec(any::<u8>(), 1..5000),
            cuts in proptest::collection::vec(any::<usize>(), 0..40), turn: usize,
        ) {
            let all = plan(&[(0, content.len() as u64)]);
            prop_assert_eq!(receive(&content, &all, &[], &cuts, turn), Ok(()));
        }
    }

    #[test]
    fn a_plan_leaves_out_what_is_held_and_nothing_else() {
        let content: Vec<u8> = (0..3 * HELD_BLOCK as usize).map(|i| (i / 7) as u8).collect();
        let middle = Range { offset: HELD_BLOCK, length: HELD_BLOCK };
        let held = [Held { range: middle, digest: [0; 32] }];
        let around = plan(&[(0, HELD_BLOCK), (2 * HELD_BLOCK, HELD_BLOCK)]);
        assert_eq!(receive(&content, &around, &held, &[1000, 2_000_000], 1), Ok(()));
        let too_little = plan(&[(0, HELD_BLOCK)]);
        assert_eq!(receive(&content, &too_little, &held, &[], 0).unwrap_err().code, Code::Protocol);
    }

    #[test]
    fn what_an_earlier_attempt_left_is_offered_in_whole_blocks() {
        let store = MemoryStore::new();
        let size = 3 * HELD_BLOCK + 5;
        let mut first = upload(&store, size).unwrap();
        first.write_at(&vec![7; HELD_BLOCK as usize + 100], HELD_BLOCK - 50).unwrap();
        first.write_at(&[1; 5], 3 * HELD_BLOCK).unwrap();
        drop(first);
        let (_, held) = Disk::begin(upload(&store, size).unwrap(), &RelativePath::root(), size).unwrap();
        let ranges: Vec<_> = held.iter().map(|h| (h.range.offset, h.range.length)).collect();
        assert_eq!(ranges, [(HELD_BLOCK, HELD_BLOCK), (3 * HELD_BLOCK, 5)]);
        assert_eq!(held[0].digest, *blake3::hash(&vec![7; HELD_BLOCK as usize]).as_bytes());
    }

    #[test]
    fn single_bytes_with_gaps_between_them_take_no_more_memory_than_bytes_of_an_honest_peer() {
        let mut body = Body::new(&plan(&[(0, 1 << 30)]), 0, 1 << 30).unwrap();
        let mut offset = 0;
        let mut gapped = 0;
        loop {
            // Where the last one ended, so that a run seems to begin, then elsewhere, until no run can be continued.
            for at in
                [offset, gapped + (1 << 20), gapped + (1 << 20) + 2, gapped + (1 << 20) + 4, gapped + (1 << 20) + 6]
            {
                if let Err(why) = body.take(at, Bytes::from_static(b"x")) {
                    return assert_eq!(why.code, Code::Protocol);
                }
            }
            (offset, gapped) = (offset + 1, gapped + 8);
            let memory: usize = body.runs.iter().map(|run| run.data.capacity()).sum();
            assert!(memory <= 8 * body.pending() + 2 * RUN, "{memory} bytes of memory for {}", body.pending());
        }
    }

    #[test]
    fn bytes_behind_the_trailer_and_plans_beyond_the_file_are_refused() {
        let mut body = Body::new(&plan(&[(0, 10)]), 0, 10).unwrap();
        assert_eq!(body.take(10, vec![0; 300].into()).unwrap_err().code, Code::Protocol);
        assert!(Body::new(&plan(&[(5, 10)]), 0, 10).is_err());
        let mut short = Body::new(&plan(&[(0, 10)]), 0, 10).unwrap();
        short.take(0, vec![0; 9].into()).unwrap();
        assert_eq!(short.trailer().unwrap_err().code, Code::Protocol);
    }

    #[test]
    fn changed_content_is_not_committed() {
        let store = MemoryStore::new();
        let (disk, _) = Disk::begin(upload(&store, 0).unwrap(), &RelativePath::root(), 0).unwrap();
        let trailer = Trailer { digest: [9; 32] };
        let result = disk.finish(&trailer, &Attributes::default(), Durability::Visible);
        assert_eq!(result.unwrap_err().code, Code::Corrupt);
        assert!(store.stat(&RelativePath::from_components(["f"]).unwrap()).unwrap().is_none());
    }
}
