//! A list of paths in little memory. Paths that follow each other in a walk begin alike, so each one is kept as the
//! length of what it shares with the one before, and the rest.

use crate::error::Reason;
use crate::protocol::path::RelativePath;

/// Paths in a block. The first of a block shares nothing, so a path is read in at most that many steps.
const BLOCK: usize = 32;
/// Bytes of a path beside the part that it does not share: two lengths.
const HEADER: usize = 4;

/// A list to which paths are added.
#[derive(Debug, Default)]
pub(super) struct PathList {
    blocks: Vec<Vec<u8>>,
    length: usize,
    last: Vec<u8>,
}

impl PathList {
    /// Bytes that a path would add, about.
    pub(super) fn cost(&self, path: &RelativePath) -> usize {
        HEADER + path.as_bytes().len() - self.shared(path.as_bytes())
    }

    fn shared(&self, path: &[u8]) -> usize {
        if self.length.is_multiple_of(BLOCK) {
            return 0;
        }
        let both = self.last.iter().zip(path);
        both.take_while(|(last, next)| last == next).count()
    }

    /// Adds a path, and returns its place.
    pub(super) fn push(&mut self, path: &RelativePath) -> usize {
        let bytes = path.as_bytes();
        let shared = self.shared(bytes);
        if self.length.is_multiple_of(BLOCK) {
            if let Some(full) = self.blocks.last_mut() {
                full.shrink_to_fit();
            }
            self.blocks.push(Vec::new());
        }
        if let Some(block) = self.blocks.last_mut() {
            let rest = &bytes[shared..];
            // A path is at most 4,095 bytes long.
            block.extend((shared as u16).to_le_bytes());
            block.extend((rest.len() as u16).to_le_bytes());
            block.extend(rest);
        }
        self.last = bytes.to_vec();
        self.length += 1;
        self.length - 1
    }

    /// Returns the path at a place.
    pub(super) fn get(&self, place: usize) -> Option<RelativePath> {
        let mut rest = self.blocks.get(place / BLOCK)?.as_slice();
        let mut path = Vec::new();
        for _ in 0..=place % BLOCK {
            let (shared, after) = rest.split_first_chunk()?;
            let (length, after) = after.split_first_chunk()?;
            let (own, after) = after.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
            path.truncate(usize::from(u16::from_le_bytes(*shared)));
            path.extend(own);
            rest = after;
        }
        parse(&path).ok()
    }
}

fn parse(path: &[u8]) -> Result<RelativePath, Reason> {
    let components = path
        .split(|&byte| byte == b'/')
        .filter(|name| !name.is_empty());
    Ok(RelativePath::from_components(components)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_list_returns_the_paths_that_were_added(
            paths in proptest::collection::vec("[ab]{1,3}(/[ab]{1,2}){0,4}", 0..200),
        ) {
            let mut list = PathList::default();
            let paths: Vec<_> = paths.iter().map(|path| parse(path.as_bytes()).unwrap()).collect();
            for (place, path) in paths.iter().enumerate() {
                prop_assert_eq!(list.push(path), place);
            }
            for (place, path) in paths.iter().enumerate() {
                prop_assert_eq!(list.get(place), Some(path.clone()));
            }
            prop_assert_eq!(list.get(paths.len()), None);
        }
    }

    #[test]
    fn paths_of_one_directory_take_little_more_than_their_names() {
        let mut list = PathList::default();
        let mut cost = 0;
        for n in 0..3_200 {
            let path = parse(format!("{}/{n:06}", "directory/".repeat(20)).as_bytes()).unwrap();
            cost += list.cost(&path);
            list.push(&path);
        }
        let kept: usize = list.blocks.iter().map(Vec::len).sum();
        assert!(kept == cost && kept < 3_200 * 16, "{kept} {cost}");
    }
}
