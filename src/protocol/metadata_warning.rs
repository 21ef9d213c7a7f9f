//! What could not be kept of files that stand there whole: said once for each kind of thing, and not for each file.

use std::fmt;

use minicbor::{Decode, Encode};

use super::value::at_most;
use crate::error::text::PeerText;

/// Longest example in bytes.
const MAX_FIRST: usize = 256;
/// Most kinds of things in one [`Summary`](super::Summary).
const MAX_ASPECTS: usize = 10;

/// Something of a file besides its content that a filesystem may not be able to keep, or not permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Attribute {
    /// Permission bits.
    Mode = 0,
    /// The time of last modification.
    Time = 1,
    /// Owner and group.
    Owner = 2,
    /// Extended attributes.
    Xattr = 3,
    /// That it is another name of a file.
    HardLink = 4,
}

impl Attribute {
    /// How one is called, and how several are.
    fn names(number: u32) -> (&'static str, &'static str) {
        match number {
            0 => ("mode", "modes"),
            1 => ("modification time", "modification times"),
            2 => ("owner", "owners"),
            3 => ("extended attribute", "extended attributes"),
            4 => ("hard link", "hard links"),
            _ => (
                "thing that this version does not know",
                "things that this version does not know",
            ),
        }
    }
}

/// How many things of one kind could not be kept, with the first of them.
///
/// Its `Display` is a sentence, and safe to print.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct MetadataWarning {
    /// The number of an [`Attribute`], or of one that only a newer peer knows.
    #[n(0)]
    pub aspect: u32,
    /// How many.
    #[n(1)]
    pub count: u64,
    /// Which file, and why; for people. At most 256 bytes.
    #[n(2)]
    pub first: PeerText,
}

impl MetadataWarning {
    /// Counts one more thing; `first` says which file and why, and is asked only if it is the first of its kind.
    pub fn count_one(all: &mut Vec<Self>, aspect: Attribute, first: impl FnOnce() -> String) {
        let number = aspect as u32;
        match all.iter_mut().find(|unkept| unkept.aspect == number) {
            Some(unkept) => unkept.count += 1,
            None => {
                let mut first = first();
                let end = (0..=MAX_FIRST.min(first.len()))
                    .rev()
                    .find(|&at| first.is_char_boundary(at));
                first.truncate(end.unwrap_or(0));
                all.push(Self {
                    aspect: number,
                    count: 1,
                    first: first.into(),
                });
            }
        }
    }

    /// Adds up two accounts.
    pub fn join(all: &mut Vec<Self>, more: &[Self]) {
        for unkept in more {
            match all.iter_mut().find(|one| one.aspect == unkept.aspect) {
                Some(one) => one.count = one.count.saturating_add(unkept.count),
                None => all.push(unkept.clone()),
            }
        }
    }

    /// What the things are called.
    pub fn name(&self) -> &'static str {
        Attribute::names(self.aspect).1
    }

    pub(super) fn validate(all: &[Self]) -> Result<(), String> {
        at_most("unkept", all.len(), MAX_ASPECTS)?;
        all.iter()
            .try_for_each(|unkept| at_most("first", unkept.first.len(), MAX_FIRST))
    }
}

impl fmt::Display for MetadataWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (one, several) = Attribute::names(self.aspect);
        let name = if self.count == 1 { one } else { several };
        write!(
            f,
            "{} {name} could not be kept (first: {})",
            self.count, self.first
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_said_once_with_the_first_of_it() {
        let mut all = Vec::new();
        for name in ["a\n", "b", "c"] {
            MetadataWarning::count_one(&mut all, Attribute::Xattr, || {
                format!("{name}: not supported")
            });
        }
        MetadataWarning::count_one(&mut all, Attribute::HardLink, || "ä".repeat(200));
        assert_eq!(all.len(), 2);
        assert_eq!(
            all[0].to_string(),
            "3 extended attributes could not be kept (first: a\\n: not supported)"
        );
        assert_eq!((all[1].count, all[1].first.len()), (1, MAX_FIRST));
        let both = all.clone();
        MetadataWarning::join(&mut all, &both);
        assert_eq!((all[0].count, all[1].count), (6, 2));
        assert!(MetadataWarning::validate(&all).is_ok());
        assert!(
            MetadataWarning {
                aspect: 77,
                ..all[0].clone()
            }
            .to_string()
            .contains("does not know")
        );
    }
}
