//! The names of a directory in byte order, read in pieces that fit in memory.
//!
//! The first names in order are kept, then the next ones; the directory is read once for each piece. A directory of a
//! million names is read some 16 times by a server, and 4 times where the user named it.

use std::collections::BinaryHeap;

use super::kept_memory::{Held, KeptShare};
use super::store::Store;
use crate::error::Reason;
use crate::protocol::path::RelativePath;

/// Most memory for a piece, in bytes.
const MAX_PIECE: usize = 16 << 20;
/// Memory in bytes that a piece may take in any case, also when none is free: some 200 names.
const MIN_PIECE: usize = 16 << 10;
/// The part (1/N) of the free memory that a piece may take. The directories below it need some too.
const PIECE_PART: usize = 4;
/// Free memory in bytes below which names of outer directories are forgotten while an inner one is walked.
const LOW_MEMORY: usize = 4 * MIN_PIECE;
/// Memory for a name beside its bytes: its place in the list, and the overhead of the allocator.
const NAME_OVERHEAD: usize = 48;

/// The names of one directory that were not taken yet.
pub(crate) struct SortedNames {
    /// The next names, last first.
    names: Vec<Box<[u8]>>,
    /// The least name that was not read or was forgotten; `None` for all names.
    from: Option<Box<[u8]>>,
    /// Whether the directory has to be read for more names.
    more: bool,
    held: Held,
}

impl SortedNames {
    /// The names of a directory, which is read with the first [`next`](Self::next).
    pub(crate) fn unread(memory: &KeptShare) -> Self {
        Self {
            names: Vec::new(),
            from: None,
            more: true,
            held: memory.hold(),
        }
    }

    /// Forgets the names of outer directories if little memory is free, so that a deep tree needs no more than a flat one.
    pub(crate) fn make_room<'a>(outer: impl Iterator<Item = &'a mut Self>, memory: &KeptShare) {
        if memory.free() < LOW_MEMORY {
            outer.for_each(Self::forget);
        }
    }

    /// Names that are known already, in ascending order. They are not counted.
    pub(crate) fn known(names: Vec<Vec<u8>>, memory: &KeptShare) -> Self {
        Self {
            names: names.into_iter().rev().map(Vec::into_boxed_slice).collect(),
            from: None,
            more: false,
            held: memory.hold(),
        }
    }

    /// Reads the first names, so that an unreadable directory is an error now.
    pub(crate) fn begin(
        &mut self,
        store: &dyn Store,
        directory: &RelativePath,
    ) -> Result<(), Reason> {
        if self.names.is_empty() && self.more {
            self.read(store, directory)?;
        }
        Ok(())
    }

    /// Takes the next name; `None` at the end. Reads the directory when it has to. Blocks.
    pub(crate) fn next(
        &mut self,
        store: &dyn Store,
        directory: &RelativePath,
    ) -> Result<Option<Box<[u8]>>, Reason> {
        self.begin(store, directory)?;
        let Some(name) = self.names.pop() else {
            return Ok(None);
        };
        self.held.shrink(memory_cost(&name));
        if self.more && self.names.is_empty() {
            self.from = Some(following(&name));
        }
        Ok(Some(name))
    }

    /// Frees the memory of names that were read and not taken. They are read again when they are needed.
    pub(crate) fn forget(&mut self) {
        // Names that were known already cannot be read again.
        let was_read = self.held.bytes() > 0;
        if was_read && let Some(next) = self.names.pop() {
            self.from = Some(next);
            self.names = Vec::new();
            self.more = true;
            self.held.shrink(usize::MAX);
        }
    }

    fn read(&mut self, store: &dyn Store, directory: &RelativePath) -> Result<(), Reason> {
        let room = self.hold_room();
        let mut first = BinaryHeap::<Box<[u8]>>::new();
        let mut bytes = 0;
        // The least name that does not fit.
        let mut left_out: Option<Box<[u8]>> = None;
        let read = store.visit(directory, &mut |name| {
            if self.from.as_deref().is_some_and(|from| name < from) {
                return true;
            }
            // No name behind one that was left out may be kept, or the one left out would be lost.
            if left_out.as_deref().is_some_and(|least| name >= least) {
                return true;
            }
            let is_full = bytes + memory_cost(name) > room;
            if is_full && first.peek().is_some_and(|greatest| **greatest < *name) {
                left_out = Some(name.into());
                return true;
            }
            bytes += memory_cost(name);
            first.push(name.into());
            while bytes > room && first.len() > 1 {
                left_out = first.pop();
                bytes -= left_out.as_deref().map_or(0, memory_cost);
            }
            true
        });
        self.held.shrink(room);
        self.held.grow_anyway(bytes);
        self.names = first.into_sorted_vec();
        self.names.reverse();
        self.more = left_out.is_some() && read.is_ok();
        read
    }

    /// Holds memory for a piece, and returns how much.
    fn hold_room(&mut self) -> usize {
        let mut room = (self.held.room() / PIECE_PART).min(MAX_PIECE);
        while room > MIN_PIECE {
            if self.held.grow(room) {
                return room;
            }
            // Another session took some of it.
            room /= 2;
        }
        self.held.grow_anyway(MIN_PIECE);
        MIN_PIECE
    }
}

fn memory_cost(name: &[u8]) -> usize {
    name.len() + NAME_OVERHEAD
}

/// The least name that is greater.
fn following(name: &[u8]) -> Box<[u8]> {
    [name, &[0]].concat().into_boxed_slice()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::protocol::Durability;
    use crate::storage::{Attributes, MemoryStore, PartialKey};

    fn store(names: &BTreeSet<String>) -> MemoryStore {
        let store = MemoryStore::new();
        let key = PartialKey {
            owner: [0; 32],
            size: 0,
            modified: None,
        };
        for name in names {
            let path = RelativePath::from_components([name]).unwrap();
            let upload = store.create(&path, &key).unwrap();
            upload
                .commit(&Attributes::default(), Durability::Visible)
                .unwrap();
        }
        store
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn pieces_together_are_the_whole_directory(
            names in proptest::collection::btree_set("[a-c]{1,3}[a-z]{0,200}", 0..600),
            kilobytes in 1_usize..400,
            forgotten in proptest::collection::btree_set(0_usize..600, 0..8),
        ) {
            let store = store(&names);
            let share = KeptShare::whole(kilobytes << 10);
            let mut sorted = SortedNames::unread(&share);
            let mut read = Vec::new();
            while let Some(name) = sorted.next(&store, &RelativePath::root()).unwrap() {
                read.push(String::from_utf8(name.into_vec()).unwrap());
                prop_assert!(sorted.held.bytes() <= (kilobytes << 10) / PIECE_PART + MIN_PIECE);
                if forgotten.contains(&read.len()) {
                    sorted.forget();
                }
            }
            prop_assert!(read.iter().eq(names.iter()), "{} of {} names", read.len(), names.len());
            drop(sorted);
            prop_assert_eq!(share.free(), kilobytes << 10);
        }
    }

    #[test]
    fn names_stay_bounded_in_a_directory_of_any_size() {
        let names: BTreeSet<_> = (0..20_000).map(|n| format!("{n:0100}")).collect();
        let store = store(&names);
        let share = KeptShare::whole(1 << 20);
        let mut sorted = SortedNames::unread(&share);
        sorted.begin(&store, &RelativePath::root()).unwrap();
        assert!(
            (1000..3000).contains(&sorted.names.len()),
            "{}",
            sorted.names.len()
        );
    }
}
