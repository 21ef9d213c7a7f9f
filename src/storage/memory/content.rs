//! The bytes of a file in memory, and which of them are holes.

use std::ops::Range;

/// Content of a file or partial. Holes take memory like other zeros.
#[derive(Default)]
pub(super) struct Content {
    data: Vec<u8>,
    /// The written ranges: ascending, not touching. The rest are holes.
    written: Vec<Range<u64>>,
}

impl Content {
    pub(super) fn size(&self) -> u64 {
        self.data.len() as u64
    }

    /// The written ranges: ascending, not touching.
    pub(super) fn written(&self) -> &[Range<u64>] {
        &self.written
    }

    /// Returns the first written range at or after an offset.
    pub(super) fn data_from(&self, offset: u64) -> Option<Range<u64>> {
        let next = self.written.partition_point(|range| range.end <= offset);
        let next = self.written.get(next)?;
        Some(next.start.max(offset)..next.end)
    }

    /// Copies bytes from an offset on; returns how many there were.
    pub(super) fn copy_at(&self, buffer: &mut [u8], offset: u64) -> usize {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|at| self.data.get(at..))
            .unwrap_or_default();
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        length
    }

    /// Adds a hole of `more` bytes at the end.
    pub(super) fn extend(&mut self, more: u64) {
        self.data.resize(self.data.len() + more as usize, 0);
    }

    /// Writes at an offset. The content must reach to the end of the range.
    pub(super) fn write(&mut self, data: &[u8], offset: u64) {
        let range = offset..offset + data.len() as u64;
        self.data[range.start as usize..range.end as usize].copy_from_slice(data);
        add_range(&mut self.written, range);
    }

    /// Makes a range a hole. The content must reach to its end.
    pub(super) fn make_hole(&mut self, part: &Range<u64>) {
        self.data[part.start as usize..part.end as usize].fill(0);
        remove_range(&mut self.written, part);
    }

    /// Truncates to `size`; returns how many bytes were removed.
    pub(super) fn truncate(&mut self, size: u64) -> u64 {
        let excess = self.size().saturating_sub(size);
        if excess > 0 {
            self.data.truncate(size as usize);
            remove_range(&mut self.written, &(size..size + excess));
        }
        excess
    }
}

/// Adds a range to ascending ranges that do not touch.
fn add_range(ranges: &mut Vec<Range<u64>>, new: Range<u64>) {
    let first = ranges.partition_point(|r| r.end < new.start);
    let last = ranges.partition_point(|r| r.start <= new.end);
    let merged = ranges[first..last]
        .iter()
        .fold(new, |a, b| a.start.min(b.start)..a.end.max(b.end));
    ranges.splice(first..last, [merged]);
}

/// Removes a range from ascending ranges.
fn remove_range(ranges: &mut Vec<Range<u64>>, part: &Range<u64>) {
    let around = |range: Range<u64>| {
        [
            range.start..range.end.min(part.start),
            range.start.max(part.end)..range.end,
        ]
    };
    *ranges = std::mem::take(ranges)
        .into_iter()
        .flat_map(around)
        .filter(|range| range.start < range.end)
        .collect();
}
