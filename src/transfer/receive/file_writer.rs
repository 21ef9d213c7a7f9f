//! Writes one transfer to the store: held ranges, holes and new data, hashed in order.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::io;
use std::time::{Duration, Instant};

use super::body_reader::{MAX_GAPS, Run, gaps};
use super::pieces::Pieces;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::protocol::{
    Durability, ENCODING_PIECES, HELD_BLOCK, HELD_STEP, Held, MAX_HELD, MAX_HOLES, Plan, Range,
    Trailer, content_hasher,
};
use crate::storage::io_errors::fault;
use crate::storage::{Attributes, MetadataWarnings, PartialKey, Store, Upload};

/// Most partial blocks that are offered as held: those at the ends of written ranges. They use half of [`MAX_HELD`],
/// less one for the end of the file.
const MAX_ENDS: u64 = MAX_HELD as u64 / 2 - 1;
/// Bytes read back at a time to hash data that arrived out of order.
const READ_BACK_SIZE: usize = 256 << 10;
/// Zeros written at a time if the store cannot make holes, in bytes.
const ZERO_RUN_SIZE: u64 = 256 << 10;

/// Aligned blocks of zeros of this size in a sparse file are left as holes, in bytes. It is the block size of most
/// file systems.
const HOLE_BLOCK: u64 = 4 << 10;
/// A block of zeros to compare with.
static ZERO_BLOCK: [u8; HOLE_BLOCK as usize] = [0; HOLE_BLOCK as usize];

/// Most bytes of gaps that are read back as zeros when an earlier attempt is offered: a second of hashing.
const MAX_JOINED: u64 = 1 << 30;

/// How long to wait for a partial that another process holds before refusing the file, and the interval of attempts. A
/// killed server may still be closing its files while the next one starts.
const BUSY_TIMEOUT: Duration = Duration::from_secs(3);
const BUSY_INTERVAL: Duration = Duration::from_millis(50);

/// Bytes after which writeback starts while more data arrives: at least a tenth of a second of any disk. Without it,
/// the final sync of 256 MiB took 0.1 to 0.2 s at 300 Mbit/s here, and most of the time on a slow disk.
const WRITE_BACK_SIZE: u64 = 32 << 20;

/// Opens a file's partial. Blocks, and waits up to [`BUSY_TIMEOUT`] for another process that has it open.
pub(super) fn create(
    store: &dyn Store,
    path: &RelativePath,
    claim: &PartialKey,
) -> Result<Box<dyn Upload>, Reason> {
    let begun = Instant::now();
    loop {
        match store.create(path, claim) {
            Err(why) if why.code == Code::Busy && begun.elapsed() < BUSY_TIMEOUT => {
                std::thread::sleep(BUSY_INTERVAL)
            }
            created => return created,
        }
    }
}

/// Writes runs, and hashes everything up to the contiguous frontier. All methods block.
pub(super) struct FileWriter {
    upload: Box<dyn Upload>,
    path: RelativePath,
    size: u64,
    hasher: blake3::Hasher,
    /// Everything before this offset is written and hashed, or is a hole.
    frontier: u64,
    /// Ranges written beyond the frontier, as start and end.
    beyond: BTreeMap<u64, u64>,
    /// Holes at or beyond the frontier.
    holes: VecDeque<Range>,
    /// The source has holes, perhaps more than the plan lists. Zeros in the body become holes too.
    sparse: bool,
    /// Decodes the body if it comes in pieces.
    pieces: Option<Pieces>,
    /// Bytes written since the last writeback; `None` if commits need not reach the disk.
    unsynced: Option<u64>,
}

impl FileWriter {
    /// Opens the data of an earlier attempt, and returns the ranges worth offering.
    pub(super) fn begin(
        upload: Box<dyn Upload>,
        path: &RelativePath,
        size: u64,
    ) -> Result<(Self, Vec<Held>), Reason> {
        let path = path.clone();
        let hasher = blake3::Hasher::new();
        let beyond = BTreeMap::new();
        let holes = VecDeque::new();
        let disk = Self {
            upload,
            path,
            size,
            hasher,
            frontier: 0,
            beyond,
            holes,
            sparse: false,
            pieces: None,
            unsynced: None,
        };
        let mut held = Vec::new();
        let mut buffer = vec![0; READ_BACK_SIZE];
        let parts = disk
            .upload
            .held()
            .map_err(|e| fault(&disk.path, "read its partial", e))?;
        let parts = join_parts(parts);
        // Based on the held bytes, not the size: a file of 1 TiB may consist mostly of holes.
        let bytes: u64 = parts.iter().map(|part| part.end - part.start).sum();
        let block = bytes
            .div_ceil(MAX_HELD as u64 - MAX_ENDS)
            .next_multiple_of(HELD_BLOCK);
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
                    disk.read_back(offset, next, &mut buffer, &mut hasher)?;
                    let range = Range {
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
        Ok((disk, held))
    }

    /// Makes the plan's holes. Counts the other ranges that the plan omits as written, since they were offered as
    /// held.
    pub(super) fn keep(&mut self, plan: &Plan, held: &[Held]) -> Result<(), Reason> {
        if plan.encoding == ENCODING_PIECES {
            self.pieces = Some(Pieces::default());
            return Ok(());
        }
        for part in kept_by(plan, held, self.size)? {
            self.beyond.insert(part.start, part.end);
        }
        let made = if self.in_order() { &[] } else { plan.holes() };
        for hole in made {
            let made = self
                .upload
                .make_hole(hole.offset..hole.offset + hole.length);
            made.map_err(|e| fault(&self.path, "make a hole in it", e))?;
        }
        self.hasher = content_hasher(self.size, plan.holes());
        self.holes = plan.holes().iter().copied().collect();
        self.sparse = !self.holes.is_empty() && !self.in_order();
        Ok(())
    }

    /// Starts writeback during the transfer if the commit must reach the disk.
    pub(super) fn write_back_for(&mut self, durability: Durability) {
        self.unsynced = (durability == Durability::Synced).then_some(0);
    }

    fn write_back(&mut self, written: u64) {
        let Some(unsynced) = &mut self.unsynced else {
            return;
        };
        *unsynced += written;
        if *unsynced >= WRITE_BACK_SIZE {
            *unsynced = 0;
            self.upload.write_back();
        }
    }

    /// Writes runs at their offsets, or decodes them as pieces.
    pub(super) fn write(&mut self, runs: Vec<Run>) -> Result<(), Reason> {
        self.write_back(runs.iter().map(|run| run.data.len() as u64).sum());
        if self.pieces.is_some() {
            return runs.iter().try_for_each(|run| self.write_pieces(&run.data));
        }
        self.catch_up()?;
        for run in runs {
            self.write_run(&run)
                .map_err(|e| fault(&self.path, "write it", e))?;
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

    /// Writes a run. In a sparse file, blocks of zeros become holes, even over data of an earlier attempt.
    fn write_run(&mut self, run: &Run) -> io::Result<()> {
        if !self.sparse {
            return self.upload.write_at(&run.data, run.offset);
        }
        for part in split_at_zeros(run.offset, &run.data) {
            let data = &run.data[part.range.clone()];
            let at = run.offset + part.range.start as u64;
            if part.zeros {
                self.upload.make_hole(at..at + data.len() as u64)?;
            } else {
                self.upload.write_at(data, at)?;
            }
        }
        Ok(())
    }

    fn write_pieces(&mut self, data: &[u8]) -> Result<(), Reason> {
        let Self {
            pieces,
            upload,
            hasher,
            frontier,
            path,
            ..
        } = self;
        let Some(pieces) = pieces else { return Ok(()) };
        pieces.take(data, |content| {
            upload
                .write_at(content, *frontier)
                .map_err(|e| fault(path, "write it", e))?;
            hasher.update(content);
            *frontier += content.len() as u64;
            Ok(())
        })
    }

    /// Commits the file if its content matches the trailer, after `make_room`. Returns its size and the metadata
    /// warnings. The partial is discarded if the content is corrupt, or came in pieces and is incomplete. Otherwise it
    /// stays, also if `make_room` fails.
    pub(super) fn finish(
        mut self,
        trailer: Option<Trailer>,
        attributes: &Attributes,
        durability: Durability,
        make_room: impl FnOnce() -> Result<(), Reason>,
    ) -> Result<(u64, MetadataWarnings), Reason> {
        match self.check(trailer) {
            Ok(()) => make_room()
                .and_then(|()| self.upload.commit(attributes, durability))
                .map(|warnings| (self.size, warnings)),
            Err(why) => {
                // An incomplete transfer can resume from its partial, except in pieces.
                if why.code == Code::Corrupt || self.pieces.is_some() {
                    self.upload.discard();
                }
                Err(why)
            }
        }
    }

    /// Compares the received data with the trailer.
    fn check(&mut self, trailer: Option<Trailer>) -> Result<(), Reason> {
        let trailer = match (trailer, &self.pieces) {
            (Some(trailer), None) => trailer,
            (_, Some(pieces)) => {
                let trailer = pieces.trailer()?;
                self.size = trailer
                    .size
                    .ok_or_else(|| Reason::new(Code::Protocol, "the trailer has no size"))?;
                trailer
            }
            (None, None) => return Err(Code::Internal.into()),
        };
        self.catch_up()?;
        if self.frontier != self.size {
            return Err(Reason::new(
                Code::Protocol,
                format!("received only {} of {} bytes", self.frontier, self.size),
            ));
        }
        if self.hasher.finalize() != trailer.digest {
            return Err(Reason::new(
                Code::Corrupt,
                "the content does not match its digest; send it again",
            ));
        }
        Ok(())
    }

    /// Returns whether the output takes runs only in order.
    pub(super) fn in_order(&self) -> bool {
        self.upload.in_order()
    }

    /// Removes the partial.
    pub(super) fn discard(self) {
        self.upload.discard();
    }

    fn mark(&mut self, start: u64, end: u64) -> Result<(), Reason> {
        let mut start = start;
        let mut end = end;
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

    /// Hashes the data written directly after the frontier, mostly from the page cache. Skips holes.
    fn catch_up(&mut self) -> Result<(), Reason> {
        let mut buffer = Vec::new();
        loop {
            if let Some(hole) = self
                .holes
                .front()
                .copied()
                .filter(|hole| hole.offset == self.frontier)
            {
                if self.in_order() {
                    self.write_zeros(hole)?;
                }
                self.frontier += hole.length;
                self.holes.pop_front();
            } else if let Some(end) = self.beyond.remove(&self.frontier) {
                buffer.resize(READ_BACK_SIZE, 0);
                let mut hasher = std::mem::take(&mut self.hasher);
                self.read_back(self.frontier, end, &mut buffer, &mut hasher)?;
                self.hasher = hasher;
                self.frontier = end;
            } else {
                return Ok(());
            }
        }
    }

    /// Writes a hole as zeros, for outputs that cannot make holes.
    fn write_zeros(&mut self, hole: Range) -> Result<(), Reason> {
        let zeros = vec![0; hole.length.min(ZERO_RUN_SIZE) as usize];
        let mut written = 0;
        while written < hole.length {
            let part = &zeros[..(hole.length - written).min(ZERO_RUN_SIZE) as usize];
            self.upload
                .write_at(part, hole.offset + written)
                .map_err(|e| fault(&self.path, "write it", e))?;
            written += part.len() as u64;
        }
        Ok(())
    }

    fn read_back(
        &self,
        mut at: u64,
        end: u64,
        buffer: &mut [u8],
        hasher: &mut blake3::Hasher,
    ) -> Result<(), Reason> {
        while at < end {
            let part = (end - at).min(buffer.len() as u64) as usize;
            let read = self
                .upload
                .read_at(&mut buffer[..part], at)
                .map_err(|e| fault(&self.path, "read it back", e))?;
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
}

/// Joins held ranges across their smallest gaps if there are more gaps than a plan may have holes. The other gaps were
/// zeros that became holes; the digest shows whether they are zeros at the sender too. A plan lists the largest holes,
/// and the last among equal ones, so these gaps are not joined.
fn join_parts(parts: Vec<std::ops::Range<u64>>) -> Vec<std::ops::Range<u64>> {
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
    let mut all: Vec<std::ops::Range<u64>> = Vec::new();
    for part in parts {
        match all.last_mut() {
            Some(last) if joined.contains(&last.end) => last.end = part.end,
            _ => all.push(part),
        }
    }
    all
}

/// A part of a run that is all zeros or all data.
struct RunPart {
    range: std::ops::Range<usize>,
    /// The part is all zeros.
    zeros: bool,
}

/// Splits a run at the borders of zero blocks. Blocks are aligned in the file, so the first and last part of a run may
/// be partial blocks. A partial block of zeros becomes a hole too, and takes no space if the rest of its block is
/// zeros.
fn split_at_zeros(offset: u64, data: &[u8]) -> Vec<RunPart> {
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

/// Checks that a plan and the ranges it omits from `held` make up the whole file (PROTOCOL.md, 4.5). Returns the
/// omitted ranges. If nothing is held, as for a small file, only holes may be omitted.
pub(super) fn kept_by(
    plan: &Plan,
    held: &[Held],
    size: u64,
) -> Result<Vec<std::ops::Range<u64>>, Reason> {
    let bad = |text| Reason::new(Code::Protocol, text);
    let mut planned: Vec<Range> = plan.ranges.iter().chain(plan.holes()).copied().collect();
    planned.sort_unstable_by_key(|range| range.offset);
    let mut kept = Vec::new();
    let mut next = 0;
    for range in planned {
        let end = range.offset.saturating_add(range.length);
        if end > size {
            return Err(bad("the plan extends beyond the end of the file"));
        }
        if range.offset < next {
            return Err(bad("ranges and holes of the plan overlap"));
        }
        kept.push(next..range.offset);
        next = end;
    }
    kept.push(next..size);
    kept.retain(|part| !part.is_empty());
    if kept.iter().all(|part| covers(held, part.start, part.end)) {
        Ok(kept)
    } else {
        Err(bad("the plan omits ranges that the receiver does not hold"))
    }
}

/// Writes the body of a small file: the ranges of the plan in order, and its holes.
pub(super) fn write_small(upload: &mut dyn Upload, plan: &Plan, body: &[u8]) -> io::Result<()> {
    let in_order = upload.in_order();
    let holes = plan.holes().iter().map(|hole| (*hole, true));
    let ranges = plan.ranges.iter().map(|range| (*range, false));
    let mut parts: Vec<(Range, bool)> = ranges.chain(holes).collect();
    parts.sort_unstable_by_key(|(range, _)| range.offset);
    let mut rest = body;
    for (range, is_hole) in parts {
        if is_hole && in_order {
            upload.write_at(&vec![0; range.length as usize], range.offset)?;
        } else if is_hole {
            upload.make_hole(range.offset..range.offset + range.length)?;
        } else {
            let (part, after) = rest.split_at(rest.len().min(range.length as usize));
            upload.write_at(part, range.offset)?;
            rest = after;
        }
    }
    Ok(())
}

/// Returns whether adjacent held ranges cover a part of the file.
fn covers(held: &[Held], start: u64, end: u64) -> bool {
    let mut at = start;
    for held in held
        .iter()
        .skip_while(|h| h.range.offset + h.range.length <= start)
    {
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
    use super::super::body_reader::BodyReader;
    use super::*;
    use crate::protocol::Message;
    use crate::storage::{MemoryStore, OutputStore, PartialKey, Store};
    use bytes::Bytes;
    use proptest::prelude::*;

    fn plan(ranges: &[(u64, u64)]) -> Plan {
        let ranges = ranges
            .iter()
            .map(|&(offset, length)| Range { offset, length })
            .collect();
        Plan {
            id: 0,
            encoding: 0,
            ranges,
            holes: None,
        }
    }

    /// Makes a plan with holes; the rest of the size is ranges.
    fn with_holes(size: u64, holes: &[(u64, u64)]) -> Plan {
        let mut ranges = Vec::new();
        let mut next = 0;
        for &(offset, length) in holes.iter().chain([&(size, 0)]) {
            if offset > next {
                ranges.push((next, offset - next));
            }
            next = offset + length;
        }
        Plan {
            holes: Some(plan(holes).ranges),
            ..plan(&ranges)
        }
    }

    fn upload(store: &MemoryStore, size: u64) -> Result<Box<dyn Upload>, Reason> {
        let path = RelativePath::from_components(["f"])?;
        store.create(
            &path,
            &PartialKey {
                owner: [0; 32],
                size,
                modified: None,
            },
        )
    }

    /// Sends `content` as the stream of a plan, cut into pieces that arrive in a given order.
    fn receive(
        content: &[u8],
        plan: &Plan,
        held: &[Held],
        cuts: &[usize],
        turn: usize,
    ) -> Result<(), Reason> {
        let start = 17;
        let mut stream: Vec<u8> = Vec::new();
        for r in &plan.ranges {
            stream.extend(&content[r.offset as usize..(r.offset + r.length) as usize]);
        }
        let mut hasher = content_hasher(content.len() as u64, plan.holes());
        for (at, byte) in content.iter().enumerate() {
            if !plan
                .holes()
                .iter()
                .any(|h| (h.offset..h.offset + h.length).contains(&(at as u64)))
            {
                hasher.update(&[*byte]);
            }
        }
        stream.extend(
            Trailer {
                digest: hasher.finalize().into(),
                size: None,
            }
            .to_bytes(),
        );

        let mut body = BodyReader::new(plan, start, Some(content.len() as u64), false)?;
        let store = MemoryStore::new();
        let mut first = upload(&store, content.len() as u64)?;
        for h in held {
            let from = h.range.offset as usize;
            let to = (h.range.offset + h.range.length) as usize;
            first.write_at(&content[from..to], h.range.offset).unwrap();
        }
        drop(first);
        let (mut disk, _) = FileWriter::begin(
            upload(&store, content.len() as u64)?,
            &RelativePath::root(),
            content.len() as u64,
        )?;
        disk.keep(plan, held)?;

        let mut edges: Vec<usize> = cuts
            .iter()
            .map(|c| c % stream.len())
            .chain([0, stream.len()])
            .collect();
        edges.sort_unstable();
        let mut pieces: Vec<_> = edges
            .windows(2)
            .map(|w| (w[0], &stream[w[0]..w[1]]))
            .collect();
        let turn = turn % pieces.len();
        pieces.rotate_left(turn);
        for (at, piece) in pieces {
            body.take(start + at as u64, Bytes::copy_from_slice(piece))?;
            if at % 3 == 0 {
                disk.write(body.drain().0)?;
            }
        }
        disk.write(body.drain().0)?;
        disk.finish(
            body.trailer()?,
            &Attributes::default(),
            Durability::Visible,
            || Ok(()),
        )?;
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

        #[test]
        fn a_body_with_holes_in_any_order_becomes_the_file(
            mut content in proptest::collection::vec(any::<u8>(), 1..3000),
            edges in proptest::collection::btree_set(0u64..3000, 0..12),
            cuts in proptest::collection::vec(any::<usize>(), 0..20), turn: usize,
        ) {
            let size = content.len() as u64;
            let edges: Vec<u64> = edges.into_iter().filter(|&edge| edge <= size).collect();
            let holes: Vec<_> = edges.chunks_exact(2).map(|edge| (edge[0], edge[1] - edge[0])).collect();
            for &(offset, length) in &holes {
                content[offset as usize..(offset + length) as usize].fill(0);
            }
            prop_assert_eq!(receive(&content, &with_holes(size, &holes), &[], &cuts, turn), Ok(()));
        }
    }

    #[test]
    fn holes_hide_data_of_an_earlier_attempt() {
        let block = HELD_BLOCK as usize;
        let content = [vec![1; block], vec![0; block], vec![3; block]].concat();
        let size = content.len() as u64;
        let store = MemoryStore::new();
        upload(&store, size)
            .unwrap()
            .write_at(&vec![9; 2 * block + 7], 0)
            .unwrap();
        let (mut disk, held) =
            FileWriter::begin(upload(&store, size).unwrap(), &RelativePath::root(), size).unwrap();
        assert_eq!(held.len(), 2, "the hole is offered too");
        disk.keep(&with_holes(size, &[(HELD_BLOCK, HELD_BLOCK)]), &held)
            .unwrap();
        disk.write(vec![
            Run {
                offset: 2 * HELD_BLOCK,
                data: content[2 * block..].into(),
            },
            Run {
                offset: 0,
                data: content[..block].into(),
            },
        ])
        .unwrap();
        let mut hasher = content_hasher(
            size,
            &[Range {
                offset: HELD_BLOCK,
                length: HELD_BLOCK,
            }],
        );
        hasher
            .update(&content[..block])
            .update(&content[2 * block..]);
        let trailer = Trailer {
            digest: hasher.finalize().into(),
            size: None,
        };
        disk.finish(
            Some(trailer),
            &Attributes::default(),
            Durability::Visible,
            || Ok(()),
        )
        .unwrap();
        let source = store
            .open(&RelativePath::from_components(["f"]).unwrap())
            .unwrap();
        let mut back = vec![7; content.len()];
        source.read_at(&mut back, 0).unwrap();
        assert!(back == content);
        assert_eq!(
            source.data_from(HELD_BLOCK).unwrap(),
            Some(2 * HELD_BLOCK..size)
        );
    }

    /// Receives a file whose plan has one hole at its end, in runs of `run` bytes. Returns the ranges that are not
    /// holes.
    fn receive_sparse(
        store: &MemoryStore,
        content: &[u8],
        hole: u64,
        run: usize,
    ) -> Vec<(u64, u64)> {
        let size = content.len() as u64;
        let plan = with_holes(size, &[(hole, size - hole)]);
        let path = RelativePath::from_components(["f"]).unwrap();
        let (mut disk, held) =
            FileWriter::begin(upload(store, size).unwrap(), &path, size).unwrap();
        disk.keep(&plan, &held).unwrap();
        let runs = content[..hole as usize].chunks(run).enumerate();
        let mut runs: Vec<Run> = runs
            .map(|(i, data)| Run {
                offset: (i * run) as u64,
                data: data.into(),
            })
            .collect();
        // The first run comes last, so that all others are hashed from the written data.
        runs.rotate_left(1);
        disk.write(runs).unwrap();
        let mut hasher = content_hasher(size, plan.holes());
        hasher.update(&content[..hole as usize]);
        let trailer = Trailer {
            digest: hasher.finalize().into(),
            size: None,
        };
        let attributes = Attributes::default();
        disk.finish(Some(trailer), &attributes, Durability::Visible, || Ok(()))
            .unwrap();
        let source = store.open(&path).unwrap();
        let mut back = vec![7; content.len()];
        assert_eq!(source.read_at(&mut back, 0).unwrap(), content.len());
        assert!(back == content);
        let mut parts = Vec::new();
        let mut at = 0;
        while let Some(part) = source.data_from(at).unwrap() {
            parts.push((part.start, part.end - part.start));
            at = part.end;
        }
        parts
    }

    #[test]
    fn zeros_of_a_sparse_file_are_left_as_holes() {
        let block = HOLE_BLOCK as usize;
        let mut content = vec![0; 64 * block];
        for at in [3, 4, 40] {
            content[at * block..(at + 1) * block].fill(1);
        }
        let data = [
            (3 * HOLE_BLOCK, 2 * HOLE_BLOCK),
            (40 * HOLE_BLOCK, HOLE_BLOCK),
        ];
        let hole = 50 * HOLE_BLOCK;
        // Includes small runs, as on a slow link: no run holds a whole block.
        for run in [1000, block, 10 * block, 64 * block] {
            assert_eq!(
                receive_sparse(&MemoryStore::new(), &content, hole, run),
                data
            );
        }
    }

    #[test]
    fn zeros_left_as_holes_hide_data_of_an_earlier_attempt() {
        let block = HOLE_BLOCK as usize;
        let mut content = vec![0; 64 * block];
        content[..block].fill(1);
        let store = MemoryStore::new();
        let mut earlier = upload(&store, content.len() as u64).unwrap();
        earlier.write_at(&vec![9; 60 * block], 0).unwrap();
        drop(earlier);
        let hole = 50 * HOLE_BLOCK;
        let data = receive_sparse(&store, &content, hole, 10 * block);
        assert_eq!(data, [(0, HOLE_BLOCK)]);
    }

    #[test]
    fn gaps_beyond_the_hole_limit_are_offered_as_held() {
        let parts = MAX_HOLES as u64 + 65;
        let period = HELD_STEP;
        let size = parts * period;
        let store = MemoryStore::new();
        let mut first = upload(&store, size).unwrap();
        for i in 0..parts {
            first.write_at(&[1; 4096], i * period).unwrap();
        }
        drop(first);
        let (_, held) =
            FileWriter::begin(upload(&store, size).unwrap(), &RelativePath::root(), size).unwrap();
        // The last gaps, and the one to the end, may be holes of the plan.
        let bytes: u64 = held.iter().map(|held| held.range.length).sum();
        assert_eq!(bytes, 64 * period);
        assert!(
            held.iter()
                .all(|h| h.range.offset + h.range.length <= 64 * period)
        );
    }

    #[test]
    fn zeros_of_a_file_without_holes_are_written() {
        let store = MemoryStore::new();
        let content = vec![0; 20_000];
        receive(&content, &plan(&[(0, 20_000)]), &[], &[], 0).unwrap();
        let mut disk = FileWriter::begin(
            upload(&store, 20_000).unwrap(),
            &RelativePath::root(),
            20_000,
        )
        .unwrap()
        .0;
        disk.keep(&plan(&[(0, 20_000)]), &[]).unwrap();
        let data = content[..].into();
        disk.write(vec![Run { offset: 0, data }]).unwrap();
        assert_eq!(disk.upload.held().unwrap().first(), Some(&(0..20_000)));
    }

    #[test]
    fn in_order_outputs_receive_holes_as_zeros() {
        let (reader, writer) = std::io::pipe().unwrap();
        let name = RelativePath::from_components(["f"]).unwrap();
        let store = OutputStore::new(name.clone(), writer);
        let upload = store
            .create(
                &name,
                &PartialKey {
                    owner: [0; 32],
                    size: 30,
                    modified: None,
                },
            )
            .unwrap();
        let (mut disk, held) = FileWriter::begin(upload, &name, 30).unwrap();
        assert!(disk.in_order() && held.is_empty());
        let plan = with_holes(30, &[(0, 5), (10, 5), (25, 5)]);
        disk.keep(&plan, &held).unwrap();
        let mut body = BodyReader::new(&plan, 0, Some(30), true).unwrap();
        body.take(5, Bytes::from_static(b"klmnopqrst")).unwrap();
        disk.write(body.drain().0).unwrap();
        assert_eq!(store.written(), 5, "the first hole");
        body.take(0, Bytes::from_static(b"abcde")).unwrap();
        disk.write(body.drain().0).unwrap();
        let mut hasher = content_hasher(30, plan.holes());
        hasher.update(b"abcdeklmnopqrst");
        let trailer = Trailer {
            digest: hasher.finalize().into(),
            size: None,
        };
        disk.finish(
            Some(trailer),
            &Attributes::default(),
            Durability::Visible,
            || Ok(()),
        )
        .unwrap();
        let content = std::io::read_to_string(reader).unwrap();
        assert_eq!(content, "\0\0\0\0\0abcde\0\0\0\0\0klmnopqrst\0\0\0\0\0");
    }

    #[test]
    fn plans_with_invalid_holes_are_refused() {
        let size = 3 * HELD_BLOCK;
        let keep = |plan: &Plan| {
            let store = MemoryStore::new();
            let (mut disk, held) =
                FileWriter::begin(upload(&store, size)?, &RelativePath::root(), size)?;
            disk.keep(plan, &held)
        };
        assert_eq!(keep(&with_holes(size, &[(0, size)])), Ok(()));
        let beyond = Plan {
            holes: Some(plan(&[(size - 5, 10)]).ranges),
            ..plan(&[(0, size - 5)])
        };
        let far = Plan {
            holes: Some(plan(&[(1 << 62, 10)]).ranges),
            ..plan(&[(0, size)])
        };
        let gap = Plan {
            holes: Some(plan(&[(10, size - 10)]).ranges),
            ..plan(&[(0, 9)])
        };
        for bad in [beyond, far, gap] {
            assert_eq!(keep(&bad).unwrap_err().code, Code::Protocol, "{bad:?}");
        }
    }

    #[test]
    fn plans_omit_held_ranges_and_nothing_else() {
        let content: Vec<u8> = (0..3 * HELD_BLOCK as usize)
            .map(|i| (i / 7) as u8)
            .collect();
        let middle = Range {
            offset: HELD_BLOCK,
            length: HELD_BLOCK,
        };
        let held = [Held {
            range: middle,
            digest: [0; 32],
        }];
        let around = plan(&[(0, HELD_BLOCK), (2 * HELD_BLOCK, HELD_BLOCK)]);
        assert_eq!(
            receive(&content, &around, &held, &[1000, 2_000_000], 1),
            Ok(())
        );
        let too_little = plan(&[(0, HELD_BLOCK)]);
        assert_eq!(
            receive(&content, &too_little, &held, &[], 0)
                .unwrap_err()
                .code,
            Code::Protocol
        );
    }

    #[test]
    fn data_of_an_earlier_attempt_is_offered_in_blocks() {
        let store = MemoryStore::new();
        let size = 3 * HELD_BLOCK + 5;
        let mut first = upload(&store, size).unwrap();
        first
            .write_at(&vec![7; HELD_BLOCK as usize + 100], HELD_BLOCK - 50)
            .unwrap();
        first.write_at(&[1; 5], 3 * HELD_BLOCK).unwrap();
        drop(first);
        let (_, held) =
            FileWriter::begin(upload(&store, size).unwrap(), &RelativePath::root(), size).unwrap();
        let ranges: Vec<_> = held
            .iter()
            .map(|h| (h.range.offset, h.range.length))
            .collect();
        assert_eq!(ranges, [(HELD_BLOCK, HELD_BLOCK), (3 * HELD_BLOCK, 5)]);
        assert_eq!(
            held[0].digest,
            *blake3::hash(&vec![7; HELD_BLOCK as usize]).as_bytes()
        );
    }

    #[test]
    fn partial_blocks_are_offered_in_steps_up_to_the_limit() {
        let store = MemoryStore::new();
        let size = 8 * HELD_BLOCK;
        let mut first = upload(&store, size).unwrap();
        first
            .write_at(
                &vec![7; HELD_BLOCK as usize + 2 * HELD_STEP as usize],
                HELD_BLOCK - HELD_STEP - 1,
            )
            .unwrap();
        first
            .write_at(&vec![8; HELD_STEP as usize], 5 * HELD_BLOCK + HELD_STEP)
            .unwrap();
        drop(first);
        let (_, held) =
            FileWriter::begin(upload(&store, size).unwrap(), &RelativePath::root(), size).unwrap();
        let ranges: Vec<_> = held
            .iter()
            .map(|h| (h.range.offset, h.range.length))
            .collect();
        let block = HELD_BLOCK;
        let step = HELD_STEP;
        assert_eq!(
            ranges,
            [
                (block - step, step),
                (block, block),
                (5 * block + step, step)
            ]
        );
        assert_eq!(
            held[2].digest,
            *blake3::hash(&vec![8; HELD_STEP as usize]).as_bytes()
        );

        let size = 600 * 2 * HELD_STEP;
        let mut scattered = upload(&store, size).unwrap();
        for i in 0..600 {
            scattered
                .write_at(&vec![9; HELD_STEP as usize], i * 2 * HELD_STEP)
                .unwrap();
        }
        drop(scattered);
        let (_, held) =
            FileWriter::begin(upload(&store, size).unwrap(), &RelativePath::root(), size).unwrap();
        assert_eq!(held.len(), MAX_ENDS as usize);
    }

    #[test]
    fn changed_content_is_not_committed() {
        let store = MemoryStore::new();
        let (disk, _) =
            FileWriter::begin(upload(&store, 0).unwrap(), &RelativePath::root(), 0).unwrap();
        let trailer = Trailer {
            digest: [9; 32],
            size: None,
        };
        let result = disk.finish(
            Some(trailer),
            &Attributes::default(),
            Durability::Visible,
            || Ok(()),
        );
        assert_eq!(result.unwrap_err().code, Code::Corrupt);
        assert!(
            store
                .stat(&RelativePath::from_components(["f"]).unwrap())
                .unwrap()
                .is_none()
        );
    }
}
