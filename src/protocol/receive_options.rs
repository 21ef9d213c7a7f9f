//! How a receiver is to take what is announced.

use std::fmt;
use std::str::FromStr;

use minicbor::{Decode, Encode};

/// How entries are taken. What is left out on the wire is what is usual.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ReceiveOptions {
    /// What becomes of what stands there already.
    #[cbor(n(0), default)]
    pub existing: Existing,
    /// A file of the same size is compared by content, whatever its time.
    #[cbor(n(1), default)]
    pub checksum: bool,
    /// Nothing is written: the verdicts say what would become of the entries.
    #[cbor(n(2), default)]
    pub dry_run: bool,
    /// What stands at the destination and was not announced is removed in the end.
    #[n(3)]
    pub delete: Option<Delete>,
    /// Everything wanted is sent: no file is made of what stands elsewhere.
    #[cbor(n(4), default)]
    pub no_dedupe: bool,
    /// Times that differ by so many seconds at most are the same.
    #[n(5)]
    pub modify_window: Option<u32>,
}

/// What may be removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Delete {
    /// If there is more than this, nothing is removed.
    #[n(0)]
    pub most: Option<u64>,
}

/// What becomes of a file or link that stands there already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Existing {
    /// It stays as it is, whatever it is.
    #[n(0)]
    Skip,
    /// It stays if it is the same, and gives way otherwise.
    #[default]
    #[n(1)]
    Update,
    /// It gives way, the same or not.
    #[n(2)]
    Overwrite,
    /// It stays: if it is the same that is well, otherwise the entry fails.
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
        found.ok_or_else(|| "it is one of skip, update, overwrite and fail".into())
    }
}
