//! Finds the holes of a file, which the plan lists and the body omits.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;

use crate::protocol::{MAX_HOLES, Range};
use crate::storage::Source;

/// Returns the largest holes of a file, at most [`MAX_HOLES`]. Other holes are sent as zeros. Blocks.
pub(super) fn find(source: &dyn Source, size: u64) -> io::Result<Vec<Range>> {
    let mut largest = BinaryHeap::new();
    let mut at = 0;
    while at < size {
        let data = source.data_from(at)?;
        let (start, end) = data.map_or((size, size), |data| (data.start.min(size), data.end));
        if start > at {
            largest.push(Reverse((start - at, at)));
        }
        if largest.len() > MAX_HOLES {
            largest.pop();
        }
        // Always advance, so that an inconsistent source cannot loop forever.
        at = end.max(at + 1);
    }
    let mut holes: Vec<_> = largest
        .into_iter()
        .map(|Reverse((length, offset))| Range { offset, length })
        .collect();
    holes.sort_unstable_by_key(|hole| hole.offset);
    Ok(holes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Metadata;

    /// A source with 1 byte of data at each of these offsets.
    struct Dots(Vec<u64>);

    impl Source for Dots {
        fn metadata(&self) -> io::Result<Metadata> {
            unimplemented!()
        }

        fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
            unimplemented!()
        }

        fn data_from(&self, offset: u64) -> io::Result<Option<std::ops::Range<u64>>> {
            Ok(self
                .0
                .iter()
                .find(|&&dot| dot >= offset)
                .map(|&dot| dot..dot + 1))
        }
    }

    fn holes(dots: &[u64], size: u64) -> Vec<(u64, u64)> {
        find(&Dots(dots.to_vec()), size)
            .unwrap()
            .iter()
            .map(|hole| (hole.offset, hole.length))
            .collect()
    }

    #[test]
    fn holes_are_the_gaps_between_data() {
        assert_eq!(holes(&[], 1 << 40), [(0, 1 << 40)]);
        assert_eq!(holes(&[], 0), []);
        assert_eq!(holes(&[0, 5], 6), [(1, 4)]);
        assert_eq!(holes(&[3], 10), [(0, 3), (4, 6)]);
        // The file has grown meanwhile.
        assert_eq!(holes(&[3, 20], 10), [(0, 3), (4, 6)]);
    }

    #[test]
    fn only_the_largest_holes_are_planned() {
        let dots: Vec<u64> = (0..3000).map(|i| 10 * i + i % 2).collect();
        let found = holes(&dots, 30_000);
        assert_eq!(found.len(), MAX_HOLES);
        assert!(found.iter().all(|&(_, length)| length == 10));
        assert!(found.windows(2).all(|two| two[0].0 < two[1].0));
    }
}
