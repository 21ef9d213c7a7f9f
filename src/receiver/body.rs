//! A body on its way from the stream to the disk: pieces in any order, gathered into runs that belong at an offset.

use bytes::{Bytes, BytesMut};

use crate::error::{Code, Why};
use crate::wire::{Frame, Message, Plan, Range, Trailer};

/// Bytes gathered into one write where they come in order.
pub(super) const RUN: usize = 256 << 10;
/// Memory for the first bytes of a run that does not continue another: a lost packet leaves a small gap, and what comes
/// behind it is no reason to set a whole [`RUN`] aside.
const FIRST_RUN: usize = 8 << 10;
/// Runs that may still be continued: packets of one flight rarely mix more.
const OPEN_RUNS: usize = 4;
/// Gaps in what is written, over which the peer is not honest: 16,384 lost packets in one window are no link.
pub(super) const MAX_GAPS: usize = 16_384;
/// Memory that runs may take for each byte in them: a packet of 1,200 bytes in a [`FIRST_RUN`] takes seven times its own.
const MAX_SLACK: usize = 8;

/// Bytes that follow each other in the file, not yet written.
pub(super) struct Run {
    pub(super) offset: u64,
    pub(super) data: BytesMut,
}

impl Run {
    pub(super) fn end(&self) -> u64 {
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

pub(super) fn gaps() -> Why {
    Why::new(Code::Protocol, "more gaps than any link makes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(ranges: &[(u64, u64)]) -> Plan {
        let ranges = ranges.iter().map(|&(offset, length)| Range { offset, length }).collect();
        Plan { id: 0, encoding: 0, ranges, holes: None }
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
}
