//! Values in messages.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};

use crate::error::text::PeerText;
use crate::error::{Code, MAX_TEXT, Reason};

/// A name as a list of byte strings. Only [`RelativePath`](crate::protocol::path::RelativePath) turns it into a path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Components(pub Vec<Vec<u8>>);

impl Components {
    pub(super) fn validate(&self) -> Result<(), String> {
        if self.0.is_empty() {
            Err("no name".into())
        } else {
            Ok(())
        }
    }
}

impl From<&crate::protocol::path::RelativePath> for Components {
    fn from(path: &crate::protocol::path::RelativePath) -> Self {
        Self(path.components().map(<[u8]>::to_vec).collect())
    }
}

impl<C> Encode<C> for Components {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.array(self.0.len() as u64)?;
        self.0.iter().try_for_each(|c| e.bytes(c).map(|_| ()))
    }
}

impl<'b, C> Decode<'b, C> for Components {
    fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
        d.array_iter::<&minicbor::bytes::ByteSlice>()?
            .map(|c| c.map(|c| c.to_vec()))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// Limit of rules in a [`WireFilter`].
pub const MAX_WIRE_RULES: usize = 1024;
/// Limit of all these rules in bytes. The time of a match grows with them and with the name.
pub const MAX_WIRE_RULES_BYTES: usize = 16 << 10;

/// Names that a pull leaves out or a mirror keeps; see [`Filter`](crate::storage::filter::Filter).
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct WireFilter {
    /// Rules as in .gitignore, relative to each source that is a directory. The last matching rule decides.
    #[n(0)]
    pub rules: Vec<ByteVec>,
    /// Whether .gitignore files in the sources count too.
    #[n(1)]
    pub gitignore: bool,
}

impl WireFilter {
    pub(super) fn validate(&self) -> Result<(), String> {
        at_most("rules", self.rules.len(), MAX_WIRE_RULES)?;
        at_most(
            "bytes of rules",
            self.rules.iter().map(|rule| rule.len()).sum(),
            MAX_WIRE_RULES_BYTES,
        )
    }
}

/// Limit of marks of each kind in an [`Origin`].
pub const MAX_MARKS: usize = 64;

/// Identifies a directory within one session. Only the system that the directory is on can recognise it.
pub type Mark = minicbor::bytes::ByteArray<16>;

/// The directories that are sent, for a receiver on the same running system.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Origin {
    /// The sources that are directories.
    #[n(0)]
    pub sources: Vec<Mark>,
    /// The directories above the only source, nearest first.
    #[n(1)]
    pub above: Vec<Mark>,
}

impl Origin {
    pub(super) fn validate(&self) -> Result<(), String> {
        at_most("marks", self.sources.len(), MAX_MARKS)?;
        at_most("marks", self.above.len(), MAX_MARKS)
    }
}

/// The kind of an entry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Kind {
    /// A regular file.
    #[n(0)]
    #[default]
    File,
    /// A directory. It is announced after everything in it is settled, with its final mode and time.
    #[n(1)]
    Directory,
    /// A symbolic link.
    #[n(2)]
    Symlink,
}

/// How well a committed file survives a crash of the receiver's system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Durability {
    /// It is under its final name on the running system. It reaches the disk at the end of the session; a crash before that may
    /// lose it.
    #[n(0)]
    Visible,
    /// Content and name have reached the disk (fsync of file and directory).
    #[default]
    #[n(1)]
    Synced,
}

/// The kind of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Probe {
    /// The client sends pings and the server answers, to measure the round-trip time.
    #[n(0)]
    Echo,
    /// The client sends filler.
    #[n(1)]
    Up,
    /// The server sends filler.
    #[n(2)]
    Down,
}

/// A time: seconds since 1970-01-01T00:00:00Z, possibly negative, and nanoseconds added to them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Time {
    /// Whole seconds.
    #[n(0)]
    pub seconds: i64,
    /// 0 to 999,999,999.
    #[n(1)]
    pub nanoseconds: u32,
}

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => Self {
                seconds: after.as_secs() as i64,
                nanoseconds: after.subsec_nanos(),
            },
            Err(before) => {
                let before = before.duration();
                let up = u32::from(before.subsec_nanos() > 0);
                Self {
                    seconds: -(before.as_secs() as i64) - i64::from(up),
                    nanoseconds: (Duration::from_secs(u64::from(up))
                        - Duration::from_nanos(before.subsec_nanos().into()))
                    .subsec_nanos(),
                }
            }
        }
    }
}

/// A part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Range {
    /// Offset of the first byte.
    #[n(0)]
    pub offset: u64,
    /// Length in bytes; not 0.
    #[n(1)]
    pub length: u64,
}

/// A range that a receiver holds, with its digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Held {
    /// The range.
    #[n(0)]
    pub range: Range,
    /// BLAKE3 digest of these bytes.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub digest: [u8; 32],
}

/// A [`Reason`] as it is encoded.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct WireReason {
    #[n(0)]
    code: u32,
    #[n(1)]
    text: PeerText,
}

impl WireReason {
    pub(super) fn validate(&self) -> Result<(), String> {
        at_most("text", self.text.len(), MAX_TEXT)
    }
}

impl From<Reason> for WireReason {
    fn from(reason: Reason) -> Self {
        Self {
            code: reason.code.number(),
            text: reason.text,
        }
    }
}

impl From<WireReason> for Reason {
    fn from(reason: WireReason) -> Self {
        Reason::new(Code::from_number(reason.code), reason.text.into_raw())
    }
}

pub(super) fn at_most(what: &str, length: usize, limit: usize) -> Result<(), String> {
    if length > limit {
        Err(format!("{what} of {length} is over the limit of {limit}"))
    } else {
        Ok(())
    }
}

/// Checks that ranges ascend, do not overlap, are not empty, and end at 2^63 - 1 at the latest.
pub(super) fn ascending(ranges: impl Iterator<Item = Range>, what: &str) -> Result<(), String> {
    let mut end = 0;
    for range in ranges {
        if range.length == 0 || range.offset < end {
            return Err(format!("{what} are empty or out of order"));
        }
        end = range
            .offset
            .checked_add(range.length)
            .filter(|&e| e <= i64::MAX as u64)
            .ok_or("a range beyond 2^63 - 1")?;
    }
    Ok(())
}
