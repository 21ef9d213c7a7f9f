//! Maps a body from its stream to file offsets: chunks in any order are gathered into runs.

use bytes::{Bytes, BytesMut};

use crate::error::{Code, Reason};
use crate::protocol::{ENCODING_PIECES, ENCODING_RANGES, Frame, Message, Plan, Range, Trailer};

/// Bytes gathered into one write if they arrive in order.
pub(super) const RUN_SIZE: usize = 256 << 10;
/// Memory for a run that does not continue another, in bytes. A lost packet leaves a small gap, and the data after it
/// does not need a whole [`RUN_SIZE`].
const FIRST_RUN_SIZE: usize = 8 << 10;
/// Runs that can still grow: packets of one flight rarely mix more.
const OPEN_RUN_LIMIT: usize = 4;
/// Most gaps in the written data. A peer that exceeds it is not honest: no link loses 16,384 packets in one window.
pub(super) const MAX_GAPS: usize = 16_384;
/// Most memory of runs for each byte in them: a packet of 1,200 bytes in a [`FIRST_RUN_SIZE`] takes seven times its
/// size.
const MAX_SLACK: usize = 8;

/// Consecutive bytes of the file that are not yet written.
pub(super) struct Run {
    pub(super) offset: u64,
    pub(super) data: BytesMut,
}

impl Run {
    pub(super) fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }
}

/// Maps the bytes of a stream to offsets in the file.
pub(super) struct BodyReader {
    /// Stream offsets and the file ranges they belong to; ascending.
    parts: Vec<(u64, Range)>,
    /// The stream offset at which the body begins.
    start: u64,
    /// The stream offset at which the trailer begins.
    end: u64,
    received: u64,
    trailer_chunks: Vec<(u64, Bytes)>,
    trailer_bytes: usize,
    runs: Vec<Run>,
    pending: usize,
    /// Memory allocated for the runs, in bytes.
    allocated: usize,
    /// File offset at which the last full run ended.
    next: u64,
    /// The file offset of the next run, if runs are returned only in order.
    in_order: Option<u64>,
}

impl BodyReader {
    /// Creates a reader for a body that begins at stream offset `start`. `size` is the size of the file, if known; the
    /// plan must lie within it.
    pub(super) fn new(
        plan: &Plan,
        start: u64,
        size: Option<u64>,
        in_order: bool,
    ) -> Result<Self, Reason> {
        let size = match (plan.encoding, size) {
            (ENCODING_RANGES, Some(size)) => size,
            (ENCODING_PIECES, None) if plan.ranges.is_empty() && plan.holes().is_empty() => {
                let everything = Range {
                    offset: 0,
                    length: i64::MAX as u64,
                };
                return Ok(Self::of(vec![(start, everything)], start, u64::MAX, true));
            }
            (ENCODING_RANGES | ENCODING_PIECES, _) => {
                return Err(Reason::new(
                    Code::Protocol,
                    "the encoding does not match the entry",
                ));
            }
            (other, _) => {
                return Err(Reason::new(
                    Code::Unsupported,
                    format!("encoding {other} is not supported"),
                ));
            }
        };
        let mut end = start;
        let mut parts = Vec::with_capacity(plan.ranges.len());
        for &range in &plan.ranges {
            if range.offset + range.length > size {
                return Err(Reason::new(
                    Code::Protocol,
                    "the plan extends beyond the end of the file",
                ));
            }
            parts.push((end, range));
            end += range.length;
        }
        Ok(Self::of(parts, start, end, in_order))
    }

    fn of(parts: Vec<(u64, Range)>, start: u64, end: u64, in_order: bool) -> Self {
        let next = parts.first().map_or(0, |(_, range)| range.offset);
        let trailer_chunks = Vec::new();
        let runs = Vec::new();
        let in_order = in_order.then_some(next);
        Self {
            parts,
            start,
            end,
            received: 0,
            trailer_chunks,
            trailer_bytes: 0,
            runs,
            pending: 0,
            allocated: 0,
            next,
            in_order,
        }
    }

    /// Takes a chunk of the stream; QUIC never delivers a byte twice. Returns the number of newly pending bytes.
    pub(super) fn take(&mut self, mut offset: u64, mut piece: Bytes) -> Result<usize, Reason> {
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
            self.trailer_bytes += piece.len();
            if self.trailer_bytes > Trailer::LIMIT {
                return Err(Reason::new(
                    Code::Protocol,
                    "the stream continues after its trailer",
                ));
            }
            self.trailer_chunks
                .push((offset, Bytes::copy_from_slice(&piece)));
        }
        Ok(self.pending - before)
    }

    fn add(&mut self, offset: u64, data: &[u8]) -> Result<(), Reason> {
        self.received += data.len() as u64;
        self.pending += data.len();
        let open = self.runs.iter_mut().rev().take(OPEN_RUN_LIMIT);
        if let Some(run) = open
            .into_iter()
            .find(|run| run.end() == offset && run.data.len() + data.len() <= RUN_SIZE)
        {
            run.data.extend_from_slice(data);
            self.next = self.next.max(offset + data.len() as u64);
            return Ok(());
        }
        if self.runs.len() >= MAX_GAPS {
            return Err(gaps());
        }
        // Room to grow is limited, because the flow-control window counts received bytes and not allocated memory.
        let preferred = if offset == self.next {
            RUN_SIZE
        } else {
            FIRST_RUN_SIZE
        };
        let max_allocated = MAX_SLACK * self.pending + 2 * RUN_SIZE;
        let capacity = if self.allocated + preferred <= max_allocated {
            preferred.max(data.len())
        } else {
            data.len()
        };
        self.allocated += capacity;
        let mut run = Run {
            offset,
            data: BytesMut::with_capacity(capacity),
        };
        run.data.extend_from_slice(data);
        self.next = self.next.max(run.end());
        self.runs.push(run);
        Ok(())
    }

    /// The stream offset at which the body begins.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// Returns the number of bytes that wait to be written.
    pub(super) fn pending(&self) -> usize {
        self.pending
    }

    /// Returns whether some of them can be written now.
    pub(super) fn is_ready(&self) -> bool {
        match self.in_order {
            None => self.pending > 0,
            Some(next) => self.runs.iter().any(|run| run.offset == next),
        }
    }

    /// Returns the runs that can be written now, and their number of bytes.
    pub(super) fn drain(&mut self) -> (Vec<Run>, usize) {
        let Some(mut next) = self.in_order else {
            self.allocated = 0;
            return (
                std::mem::take(&mut self.runs),
                std::mem::take(&mut self.pending),
            );
        };
        self.runs.sort_unstable_by_key(|run| run.offset);
        let mut ready = 0;
        while let Some(run) = self.runs.get(ready).filter(|run| run.offset == next) {
            next = self.next_offset(run.end());
            ready += 1;
        }
        self.in_order = Some(next);
        let rest = self.runs.split_off(ready);
        let runs = std::mem::replace(&mut self.runs, rest);
        let bytes = runs.iter().map(|run| run.data.len()).sum();
        self.pending -= bytes;
        self.allocated = self.runs.iter().map(|run| run.data.capacity()).sum();
        (runs, bytes)
    }

    /// Returns the file offset of the next byte of the body after `offset`.
    fn next_offset(&self, offset: u64) -> u64 {
        let passed = self
            .parts
            .partition_point(|(_, range)| range.offset + range.length <= offset);
        self.parts
            .get(passed)
            .map_or(offset, |(_, range)| range.offset.max(offset))
    }

    /// Returns the trailer after the stream has ended; `None` if it is part of the pieces.
    pub(super) fn trailer(&mut self) -> Result<Option<Trailer>, Reason> {
        if self.end == u64::MAX {
            return Ok(None);
        }
        let planned: u64 = self.parts.iter().map(|(_, range)| range.length).sum();
        if self.received != planned {
            return Err(Reason::new(
                Code::Protocol,
                format!("the body ended after {} of {planned} bytes", self.received),
            ));
        }
        self.trailer_chunks.sort_by_key(|&(offset, _)| offset);
        let mut buffer: BytesMut = self
            .trailer_chunks
            .iter()
            .flat_map(|(_, piece)| piece.iter().copied())
            .collect();
        let bad = |e: crate::protocol::Malformed| Reason::new(Code::Protocol, e.to_string());
        let frame = Frame::take(&mut buffer, Trailer::LIMIT).map_err(bad)?;
        match frame {
            Some(frame) if buffer.is_empty() => frame.decode().map(Some).map_err(bad),
            _ => Err(Reason::new(
                Code::Protocol,
                "the body is not followed by its trailer alone",
            )),
        }
    }
}

pub(super) fn gaps() -> Reason {
    Reason::new(
        Code::Protocol,
        "the peer leaves too many gaps in the stream",
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Makes a plan of ranges.
    pub(in crate::transfer::receive) fn plan(ranges: &[(u64, u64)]) -> Plan {
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

    #[test]
    fn single_bytes_with_gaps_use_bounded_memory() {
        let mut body = BodyReader::new(&plan(&[(0, 1 << 30)]), 0, Some(1 << 30), false).unwrap();
        let mut offset = 0;
        let mut gapped = 0;
        loop {
            // First continue the last run, so that a run seems to begin; then write elsewhere until no run can grow.
            for at in [
                offset,
                gapped + (1 << 20),
                gapped + (1 << 20) + 2,
                gapped + (1 << 20) + 4,
                gapped + (1 << 20) + 6,
            ] {
                if let Err(why) = body.take(at, Bytes::from_static(b"x")) {
                    return assert_eq!(why.code, Code::Protocol);
                }
            }
            offset += 1;
            gapped += 8;
            let memory: usize = body.runs.iter().map(|run| run.data.capacity()).sum();
            assert!(
                memory <= 8 * body.pending() + 2 * RUN_SIZE,
                "{memory} bytes of memory for {}",
                body.pending()
            );
        }
    }

    #[test]
    fn bytes_after_the_trailer_and_oversized_plans_are_refused() {
        let mut body = BodyReader::new(&plan(&[(0, 10)]), 0, Some(10), false).unwrap();
        assert_eq!(
            body.take(10, vec![0; 300].into()).unwrap_err().code,
            Code::Protocol
        );
        assert!(BodyReader::new(&plan(&[(5, 10)]), 0, Some(10), false).is_err());
        let mut short = BodyReader::new(&plan(&[(0, 10)]), 0, Some(10), false).unwrap();
        short.take(0, vec![0; 9].into()).unwrap();
        assert_eq!(short.trailer().unwrap_err().code, Code::Protocol);
    }

    #[test]
    fn in_order_bodies_wait_for_missing_bytes() {
        let plan = plan(&[(10, 5), (100, 5)]);
        let mut body = BodyReader::new(&plan, 7, Some(200), true).unwrap();
        let drained = |body: &mut BodyReader| {
            let (runs, bytes) = body.drain();
            assert_eq!(bytes, runs.iter().map(|run| run.data.len()).sum::<usize>());
            runs.iter()
                .flat_map(|run| (run.offset..).zip(run.data.to_vec()))
                .collect::<Vec<_>>()
        };
        body.take(7 + 6, Bytes::from_static(b"234")).unwrap();
        body.take(7 + 3, Bytes::from_static(b"de1")).unwrap();
        assert!(!body.is_ready() && body.pending() == 6);
        assert_eq!(drained(&mut body), []);
        body.take(7 + 1, Bytes::from_static(b"bc")).unwrap();
        assert!(!body.is_ready());
        body.take(7, Bytes::from_static(b"a")).unwrap();
        assert!(body.is_ready());
        let places = [10, 11, 12, 13, 14, 100, 101, 102, 103];
        assert_eq!(
            drained(&mut body),
            places.into_iter().zip(*b"abcde1234").collect::<Vec<_>>()
        );
        assert!(!body.is_ready() && body.pending() == 0);
        body.take(7 + 9, Bytes::from_static(b"5")).unwrap();
        assert_eq!(drained(&mut body), [(104, b'5')]);
    }

    #[test]
    fn unknown_sizes_need_pieces_and_known_sizes_ranges() {
        let ranges = plan(&[(0, 10)]);
        let pieces = Plan {
            encoding: ENCODING_PIECES,
            ..plan(&[])
        };
        assert!(BodyReader::new(&pieces, 0, None, false).is_ok());
        let code = |plan: &Plan, size| {
            BodyReader::new(plan, 0, size, false)
                .err()
                .map(|why| why.code)
        };
        assert_eq!(code(&pieces, Some(10)), Some(Code::Protocol));
        assert_eq!(code(&ranges, None), Some(Code::Protocol));
        assert_eq!(
            code(
                &Plan {
                    encoding: ENCODING_PIECES,
                    ..ranges.clone()
                },
                None
            ),
            Some(Code::Protocol)
        );
        let holes = Some(ranges.ranges.clone());
        assert_eq!(code(&Plan { holes, ..pieces }, None), Some(Code::Protocol));
        assert_eq!(
            code(
                &Plan {
                    encoding: 2,
                    ..ranges
                },
                Some(10)
            ),
            Some(Code::Unsupported)
        );
    }
}
