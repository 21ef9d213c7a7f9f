//! Metadata that a receiver could not keep, reported once for each attribute and not for each file.

use std::fmt;

use minicbor::{Decode, Encode};

use super::value::at_most;
use crate::error::text::PeerText;

/// Limit of an example in bytes.
const MAX_FIRST_SIZE: usize = 256;
/// Limit of attributes in one [`Summary`](super::Summary).
const MAX_ATTRIBUTES: usize = 10;

/// A part of a file's metadata that a file system may not support or not permit.
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
    /// A further name of the file.
    HardLink = 4,
}

impl Attribute {
    /// The name of one, and of several.
    fn names(number: u32) -> (&'static str, &'static str) {
        match number {
            0 => ("mode", "modes"),
            1 => ("modification time", "modification times"),
            2 => ("owner", "owners"),
            3 => ("extended attribute", "extended attributes"),
            4 => ("hard link", "hard links"),
            _ => (
                "attribute that this version does not know",
                "attributes that this version does not know",
            ),
        }
    }
}

/// How often one attribute could not be kept, with the first case.
///
/// Its `Display` is a sentence, and safe to print.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct MetadataWarning {
    /// The number of an [`Attribute`]. A newer peer may send unknown ones.
    #[n(0)]
    pub aspect: u32,
    /// Number of cases.
    #[n(1)]
    pub count: u64,
    /// File and reason of the first case, for display; at most 256 bytes.
    #[n(2)]
    pub first: PeerText,
}

impl MetadataWarning {
    /// Counts one more case. `first` returns file and reason; it is called only for the first case of an attribute.
    pub fn count_one(all: &mut Vec<Self>, attribute: Attribute, first: impl FnOnce() -> String) {
        let number = attribute as u32;
        match all.iter_mut().find(|warning| warning.aspect == number) {
            Some(warning) => warning.count += 1,
            None => {
                let mut first = first();
                let end = (0..=MAX_FIRST_SIZE.min(first.len()))
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

    /// Adds the counts of `more` to `all`.
    pub fn join(all: &mut Vec<Self>, more: &[Self]) {
        for warning in more {
            match all.iter_mut().find(|one| one.aspect == warning.aspect) {
                Some(one) => one.count = one.count.saturating_add(warning.count),
                None => all.push(warning.clone()),
            }
        }
    }

    /// The attribute's name in the plural.
    pub fn name(&self) -> &'static str {
        Attribute::names(self.aspect).1
    }

    pub(super) fn validate(all: &[Self]) -> Result<(), String> {
        at_most("unkept", all.len(), MAX_ATTRIBUTES)?;
        all.iter()
            .try_for_each(|warning| at_most("first", warning.first.len(), MAX_FIRST_SIZE))
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
    fn each_attribute_is_reported_once_with_its_first_case() {
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
        assert_eq!((all[1].count, all[1].first.len()), (1, MAX_FIRST_SIZE));
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
