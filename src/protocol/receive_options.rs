//! Options of the receiver.

use std::fmt;
use std::str::FromStr;

use minicbor::{Decode, Encode};

/// How a receiver treats entries. An absent field has its default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ReceiveOptions {
    /// What happens to existing files and links.
    #[cbor(n(0), default)]
    pub existing: Existing,
    /// Whether an existing file of the same size is compared by content instead of time.
    #[cbor(n(1), default)]
    pub checksum: bool,
    /// Whether nothing is written. The verdicts report what would happen.
    #[cbor(n(2), default)]
    pub dry_run: bool,
    /// Whether entries of the destination that were not announced are removed in the end.
    #[n(3)]
    pub delete: Option<Delete>,
    /// Whether the content of every wanted file is sent, even if the receiver has the same content elsewhere.
    #[cbor(n(4), default)]
    pub no_dedupe: bool,
    /// Times that differ by at most this many seconds count as equal.
    #[n(5)]
    pub modify_window: Option<u32>,
}

/// The limit of removing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Delete {
    /// Limit of entries to remove. If there are more, nothing is removed.
    #[n(0)]
    pub most: Option<u64>,
}

/// What happens to an existing file or link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Existing {
    /// It is kept.
    #[n(0)]
    Skip,
    /// It is kept if it is the same, and replaced otherwise.
    #[default]
    #[n(1)]
    Update,
    /// It is replaced, even if it is the same.
    #[n(2)]
    Overwrite,
    /// It is kept, and the entry fails unless it is the same.
    #[n(3)]
    Fail,
}

impl Existing {
    /// Every choice.
    pub const ALL: [Self; 4] = [Self::Skip, Self::Update, Self::Overwrite, Self::Fail];

    fn name(self) -> &'static str {
        match self {
            Self::Skip => "skip",
            Self::Update => "update",
            Self::Overwrite => "overwrite",
            Self::Fail => "fail",
        }
    }
}

impl fmt::Display for Existing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Existing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL
            .into_iter()
            .find(|existing| existing.name() == text);
        found.ok_or_else(|| "use skip, update, overwrite or fail".into())
    }
}
