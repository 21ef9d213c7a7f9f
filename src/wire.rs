//! Every message of the protocol, with its limits; knows no quinn. PROTOCOL.md is the specification.
//!
//! A message is one type byte, the payload's length as a QUIC variable-length integer (RFC 9000, section 16) and the
//! payload, a CBOR map with numbered fields (RFC 8949). Unknown fields are ignored, so messages can grow.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use minicbor::{Decode, Encode};

use crate::error::{Code, MAX_TEXT, Why};

/// The protocol's name and version in TLS (RFC 7301).
pub const ALPN: &[u8] = b"haul/1";
/// Alignment in bytes of the ranges that a receiver offers as held.
pub const HELD_BLOCK: u64 = 1 << 20;
/// Most ranges in one [`Want`].
pub const MAX_HELD: usize = 1024;
/// Most ranges in one [`Plan`]: the gaps between [`MAX_HELD`] held ranges.
pub const MAX_PLAN_RANGES: usize = MAX_HELD + 1;
/// Longest target of a symbolic link in bytes: Linux's `PATH_MAX` less the closing NUL.
pub const MAX_SYMLINK: usize = 4095;
/// Most bytes that a message's header can take: the type byte and an eight-byte length.
const MAX_HEADER: usize = 9;

/// The first byte of every stream; an unknown one is stopped with [`Code::Unsupported`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum StreamType {
    /// Opened by the client, one for each session.
    Control = 0x01,
    /// Opened by the sender, one for each session.
    Manifest = 0x02,
    /// Opened by the sender, one for each wanted file.
    Transfer = 0x03,
}

impl StreamType {
    /// The type of a first byte, if it is known.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Control, Self::Manifest, Self::Transfer].into_iter().find(|&t| t as u8 == byte)
    }
}

/// What no honest peer sends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Longer than the type allows.
    #[error("message {kind:#04x} of {length} bytes is over its limit of {limit}")]
    TooLong {
        /// The type byte.
        kind: u8,
        /// What the header says.
        length: u64,
        /// What is allowed.
        limit: usize,
    },
    /// Another type than belongs here.
    #[error("message {got:#04x} where {expected} belongs")]
    Unexpected {
        /// The type byte.
        got: u8,
        /// Name of what belongs here.
        expected: &'static str,
    },
    /// The payload is not what the type says.
    #[error("bad {name}: {why}")]
    Payload {
        /// Name of the message.
        name: &'static str,
        /// What the decoder said.
        why: String,
    },
}

/// A message: its type byte, name and limit.
pub trait Message: for<'b> Decode<'b, ()> + Encode<()> {
    /// The type byte.
    const TYPE: u8;
    /// The name in PROTOCOL.md.
    const NAME: &'static str;
    /// Most bytes of payload.
    const LIMIT: usize;

    /// What CBOR's form alone cannot say.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }

    /// Appends the whole message: type, length, payload.
    fn put(&self, out: &mut BytesMut) {
        let payload = minicbor::to_vec(self).unwrap_or_default();
        debug_assert!(payload.len() <= Self::LIMIT, "{} of {} bytes", Self::NAME, payload.len());
        out.put_u8(Self::TYPE);
        put_varint(out, payload.len() as u64);
        out.extend_from_slice(&payload);
    }

    /// Whether the payload is within the limit.
    fn fits(&self) -> bool {
        minicbor::to_vec(self).is_ok_and(|payload| payload.len() <= Self::LIMIT)
    }

    /// The whole message.
    fn to_bytes(&self) -> Bytes {
        let mut out = BytesMut::new();
        self.put(&mut out);
        out.freeze()
    }
}

/// A message as read, not yet decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The type byte.
    pub kind: u8,
    /// The payload.
    pub payload: Bytes,
}

impl Frame {
    /// Takes one frame off the front of a buffer; `None` when more bytes are needed. Nothing is allocated before the
    /// length has been held against `limit`.
    ///
    /// # Errors
    /// [`Malformed::TooLong`].
    pub fn take(buffer: &mut BytesMut, limit: usize) -> Result<Option<Self>, Malformed> {
        let Some((&kind, rest)) = buffer.split_first() else { return Ok(None) };
        let Some((length, used)) = peek_varint(rest) else { return Ok(None) };
        if length > limit as u64 {
            return Err(Malformed::TooLong { kind, length, limit });
        }
        let (header, length) = (1 + used, length as usize);
        if buffer.len() < header + length {
            buffer.reserve((header + length - buffer.len()).min(limit + MAX_HEADER));
            return Ok(None);
        }
        buffer.advance(header);
        Ok(Some(Self { kind, payload: buffer.split_to(length).freeze() }))
    }

    /// Decodes the frame as `M`.
    ///
    /// # Errors
    /// [`Malformed`] when it is another message, longer than `M` may be, or not well-formed.
    pub fn decode<M: Message>(&self) -> Result<M, Malformed> {
        if self.kind != M::TYPE {
            return Err(Malformed::Unexpected { got: self.kind, expected: M::NAME });
        }
        if self.payload.len() > M::LIMIT {
            return Err(Malformed::TooLong { kind: self.kind, length: self.payload.len() as u64, limit: M::LIMIT });
        }
        let bad = |why| Malformed::Payload { name: M::NAME, why };
        let message: M = minicbor::decode(&self.payload).map_err(|e| bad(e.to_string()))?;
        message.check().map_err(bad)?;
        Ok(message)
    }
}

/// Appends a QUIC variable-length integer (RFC 9000, section 16); values over 2^62 - 1 cannot occur here.
pub fn put_varint(out: &mut BytesMut, value: u64) {
    match value {
        0..0x40 => out.put_u8(value as u8),
        0x40..0x4000 => out.put_u16(value as u16 | 0x4000),
        0x4000..0x4000_0000 => out.put_u32(value as u32 | 0x8000_0000),
        _ => out.put_u64(value | 0xc000_0000_0000_0000),
    }
}

/// Reads a QUIC variable-length integer and the bytes it took; `None` when more bytes are needed.
pub fn peek_varint(bytes: &[u8]) -> Option<(u64, usize)> {
    let first = *bytes.first()?;
    let length = 1 << (first >> 6);
    let rest = bytes.get(1..length)?;
    Some((rest.iter().fold(u64::from(first & 0x3f), |value, &b| value << 8 | u64::from(b)), length))
}

macro_rules! messages {
    ($($name:ident = $kind:literal, limit $limit:expr;)*) => {
        $(impl Message for $name {
            const TYPE: u8 = $kind;
            const NAME: &'static str = stringify!($name);
            const LIMIT: usize = $limit;
            fn check(&self) -> Result<(), String> { self.validate() }
        })*
        /// Name, type byte and limit of every message; PROTOCOL.md is held against it.
        pub const MESSAGES: &[(&str, u8, usize)] = &[$((stringify!($name), $kind, $limit)),*];
    };
}

messages! {
    Hello = 0x01, limit 4096;
    Push = 0x02, limit 8192;
    Pull = 0x03, limit 65536;
    List = 0x04, limit 8192;
    Ready = 0x05, limit 4096;
    Refused = 0x06, limit 4096;
    End = 0x07, limit 4096;
    Summary = 0x08, limit 4096;
    GoAway = 0x09, limit 4096;
    Working = 0x0a, limit 4096;
    Entry = 0x10, limit 16384;
    Skip = 0x11, limit 64;
    Done = 0x12, limit 64;
    Want = 0x13, limit 65536;
    Refuse = 0x14, limit 4096;
    Plan = 0x20, limit 65536;
    Trailer = 0x21, limit 256;
    Committed = 0x22, limit 256;
    Failed = 0x23, limit 4096;
}

macro_rules! unchecked { ($($name:ident)*) => { $(impl $name { fn validate(&self) -> Result<(), String> { Ok(()) } })* } }
unchecked! { Ready End Summary Working Skip Done Committed Trailer }

/// First message of both ends on every control stream: what each can do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Hello {
    /// Numbers of the optional features spoken; none are defined in `haul/1` yet.
    #[n(0)]
    pub features: Vec<u64>,
    /// Program and version, for logs only; at most 128 bytes.
    #[n(1)]
    pub agent: String,
}

impl Hello {
    fn validate(&self) -> Result<(), String> {
        at_most("agent", self.agent.len(), 128)
    }
}

/// Asks to send files to the server.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Push {
    /// Names the session over all its connections; random.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub session: [u8; 16],
    /// The destination below the served directory, as components.
    #[n(1)]
    pub destination: Components,
    /// What the user wrote ends in `/`.
    #[n(2)]
    pub into: bool,
    /// How many sources there are.
    #[n(3)]
    pub sources: u32,
    /// Whether the only source is a directory.
    #[n(4)]
    pub directory: bool,
    /// How durable a commit has to be.
    #[n(5)]
    pub durability: Durability,
}

impl Push {
    fn validate(&self) -> Result<(), String> {
        if self.sources == 0 { Err("no sources".into()) } else { Ok(()) }
    }
}

/// Asks the server to send files.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Pull {
    /// Names the session over all its connections; random.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub session: [u8; 16],
    /// What is asked for, below the served directory.
    #[n(1)]
    pub sources: Vec<Components>,
    /// Most entries that may stand unanswered; here the client is the receiver.
    #[n(2)]
    pub entries: u32,
    /// Most bytes of entries, headers included, that may stand unanswered.
    #[n(3)]
    pub entry_bytes: u32,
}

impl Pull {
    fn validate(&self) -> Result<(), String> {
        if self.sources.is_empty() { Err("no sources".into()) } else { Ok(()) }
    }
}

/// Asks the server for a listing.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct List {
    /// Names the session; random.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub session: [u8; 16],
    /// What is asked for, below the served directory.
    #[n(1)]
    pub path: Components,
    /// Whether what is below its directories is asked for too.
    #[n(2)]
    pub recursive: bool,
}

impl List {
    fn validate(&self) -> Result<(), String> {
        Ok(())
    }
}

/// The request is accepted: the sender may open its manifest stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Ready {
    /// Most entries that may stand unanswered.
    #[n(0)]
    pub entries: u32,
    /// Most bytes of entries, headers included, that may stand unanswered.
    #[n(1)]
    pub entry_bytes: u32,
    /// Where the sources come to stand, as the receiver settled it; components. For people only.
    #[n(2)]
    pub place: Option<Components>,
}

/// The request is refused.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Refused {
    /// Why.
    #[n(0)]
    pub why: WireWhy,
}

/// The sender has sent all it will, and has an answer or a receipt for each entry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct End {
    /// Entries sent on the manifest stream.
    #[n(0)]
    pub entries: u64,
    /// Sources that the sender could not send at all.
    #[n(1)]
    pub failed: u64,
}

/// The receiver's last word: what stands on its disk now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Summary {
    /// Files committed in this session.
    #[n(0)]
    pub committed: u64,
    /// Bytes of content committed.
    #[n(1)]
    pub bytes: u64,
    /// Entries that were there already.
    #[n(2)]
    pub skipped: u64,
    /// Entries refused or failed.
    #[n(3)]
    pub failed: u64,
    /// How durable all of it is.
    #[n(4)]
    pub durability: Durability,
}

/// A server that stops says so: no new entry will be wanted, transfers under way may end.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct GoAway {
    /// Why.
    #[n(0)]
    pub why: WireWhy,
}

/// Sent every 5 s while long disk work keeps an answer back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Working {}

/// One file, directory or link that the session is about.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Entry {
    /// The sender's number for it, unique in the session on this connection, ascending.
    #[n(0)]
    pub id: u64,
    /// Components; the first is the name of the source that the entry belongs to.
    #[n(1)]
    pub path: Components,
    /// What it is.
    #[n(2)]
    pub kind: Kind,
    /// Bytes of content; only for files, absent when not known beforehand.
    #[n(3)]
    pub size: Option<u64>,
    /// When its content was last modified.
    #[n(4)]
    pub modified: Option<Time>,
    /// Permission bits (07777).
    #[n(5)]
    pub mode: Option<u32>,
    /// What a symbolic link holds; only for those. At most [`MAX_SYMLINK`] bytes, without NUL.
    #[cbor(n(6), with = "minicbor::bytes")]
    pub target: Option<Vec<u8>>,
}

impl Entry {
    fn validate(&self) -> Result<(), String> {
        if let Some(target) = &self.target {
            at_most("target", target.len(), MAX_SYMLINK)?;
            if target.is_empty() || target.contains(&0) {
                return Err("a symbolic link to nothing".into());
            }
        }
        match (self.kind, &self.target, self.size) {
            (Kind::Symlink, None, _) => Err("a symbolic link without a target".into()),
            (Kind::File | Kind::Directory, Some(_), _) => Err("a target on what is no symbolic link".into()),
            (Kind::Symlink | Kind::Directory, _, Some(_)) => Err("a size on what is no file".into()),
            (_, _, Some(size)) if size > i64::MAX as u64 => Err("a size over 2^63 - 1".into()),
            _ => self.path.validate(),
        }
    }
}

/// Verdict: it is there already, as announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Skip {
    /// The entry.
    #[n(0)]
    pub id: u64,
}

/// Verdict: the manifest sufficed, it stands there now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Done {
    /// The entry.
    #[n(0)]
    pub id: u64,
}

/// Verdict: send it. An admission: room and a permit are set aside.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Want {
    /// The entry.
    #[n(0)]
    pub id: u64,
    /// What the receiver holds of an earlier attempt: ascending, not touching, aligned to [`HELD_BLOCK`].
    #[n(1)]
    pub held: Option<Vec<Held>>,
}

impl Want {
    fn validate(&self) -> Result<(), String> {
        let held = self.held.as_deref().unwrap_or_default();
        at_most("held", held.len(), MAX_HELD)?;
        ascending(held.iter().map(|h| h.range), "held")
    }
}

/// Verdict: it cannot stand there.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Refuse {
    /// The entry.
    #[n(0)]
    pub id: u64,
    /// Why.
    #[n(1)]
    pub why: WireWhy,
}

/// Begins a transfer: what of the file the body will hold.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Plan {
    /// The entry.
    #[n(0)]
    pub id: u64,
    /// How the body is encoded: 0 is the bytes of the ranges, one after the other, without framing.
    #[n(1)]
    pub encoding: u32,
    /// The parts of the file that the body holds: ascending, not overlapping.
    #[n(2)]
    pub ranges: Vec<Range>,
}

impl Plan {
    /// Bytes of body in encoding 0: the sum of the ranges.
    pub fn body_length(&self) -> u64 {
        self.ranges.iter().map(|r| r.length).sum()
    }

    fn validate(&self) -> Result<(), String> {
        at_most("ranges", self.ranges.len(), MAX_PLAN_RANGES)?;
        ascending(self.ranges.iter().copied(), "ranges")
    }
}

/// Ends a transfer: the digest of the whole file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Trailer {
    /// BLAKE3 of the file's whole content, held ranges included.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub digest: [u8; 32],
}

/// Receipt: content and trailer agree, and the file stands under its final name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Committed {
    /// Size of the file.
    #[n(0)]
    pub bytes: u64,
    /// How durable it is.
    #[n(1)]
    pub durability: Durability,
}

/// Receipt: it did not go through; what stood under the final name still does.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Failed {
    /// Why.
    #[n(0)]
    pub why: WireWhy,
}

macro_rules! carries_why { ($($name:ident)*) => { $(impl $name { fn validate(&self) -> Result<(), String> { self.why.validate() } })* } }
carries_why! { Refused GoAway Refuse Failed }

/// A name as a list of byte strings. Only [`RelativePath`](crate::path::RelativePath) makes a path of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Components(pub Vec<Vec<u8>>);

impl Components {
    fn validate(&self) -> Result<(), String> {
        if self.0.is_empty() { Err("no name".into()) } else { Ok(()) }
    }
}

impl From<&crate::path::RelativePath> for Components {
    fn from(path: &crate::path::RelativePath) -> Self {
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

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Kind {
    /// A regular file.
    #[n(0)]
    File,
    /// A directory. Sent after all that is in it has been settled: it carries the final mode and time.
    #[n(1)]
    Directory,
    /// A symbolic link.
    #[n(2)]
    Symlink,
}

/// How safe what was committed is from a crash of the receiver's system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Durability {
    /// Under its final name, as far as the running system is concerned.
    #[n(0)]
    Visible,
    /// Content and name have reached the disk (fsync of file and directory).
    #[default]
    #[n(1)]
    Synced,
}

/// Seconds since 1970-01-01T00:00:00Z, may be negative, and nanoseconds forward from there.
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
            Ok(after) => Self { seconds: after.as_secs() as i64, nanoseconds: after.subsec_nanos() },
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
    /// First byte.
    #[n(0)]
    pub offset: u64,
    /// Bytes; not 0.
    #[n(1)]
    pub length: u64,
}

/// A part that a receiver holds, with the digest of what it holds there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Held {
    /// Which part.
    #[n(0)]
    pub range: Range,
    /// BLAKE3 of these bytes.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub digest: [u8; 32],
}

/// [`Why`] as it is encoded.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct WireWhy {
    #[n(0)]
    code: u32,
    #[n(1)]
    text: String,
}

impl WireWhy {
    fn validate(&self) -> Result<(), String> {
        at_most("text", self.text.len(), MAX_TEXT)
    }
}

impl From<Why> for WireWhy {
    fn from(why: Why) -> Self {
        Self { code: why.code.number(), text: why.text }
    }
}

impl From<WireWhy> for Why {
    fn from(why: WireWhy) -> Self {
        Why::new(Code::from_number(why.code), why.text)
    }
}

fn at_most(what: &str, length: usize, limit: usize) -> Result<(), String> {
    if length > limit { Err(format!("{what} of {length} is over the limit of {limit}")) } else { Ok(()) }
}

/// Ranges must ascend, not overlap, not be empty, and end at 2^63 - 1 at the latest.
fn ascending(ranges: impl Iterator<Item = Range>, what: &str) -> Result<(), String> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(path: Vec<Vec<u8>>, size: u64, seconds: i64) -> Entry {
        Entry {
            id: 7,
            path: Components(path),
            kind: Kind::File,
            size: Some(size),
            modified: Some(Time { seconds, nanoseconds: 5 }),
            mode: Some(0o644),
            target: None,
        }
    }

    fn take(mut bytes: &[u8]) -> Result<Option<Frame>, Malformed> {
        let mut buffer = BytesMut::new();
        buffer.put(&mut bytes);
        Frame::take(&mut buffer, 65536)
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_any_byte_of_it_is_awaited() {
        let mut header = BytesMut::new();
        header.put_u8(Hello::TYPE);
        put_varint(&mut header, 1 << 40);
        assert!(matches!(take(&header), Err(Malformed::TooLong { length, .. }) if length == 1 << 40));
    }

    #[test]
    fn fields_of_a_newer_peer_are_ignored() {
        let mut payload = Vec::new();
        let mut e = minicbor::Encoder::new(&mut payload);
        e.map(2).unwrap().u32(0).unwrap().u64(9).unwrap().u32(77).unwrap().str("new").unwrap();
        let frame = Frame { kind: Skip::TYPE, payload: payload.into() };
        assert_eq!(frame.decode::<Skip>(), Ok(Skip { id: 9 }));
    }

    #[test]
    fn overlapping_or_endless_ranges_are_refused() {
        let plan = |ranges: &[(u64, u64)]| {
            let ranges = ranges.iter().map(|&(offset, length)| Range { offset, length }).collect();
            take(&Plan { id: 1, encoding: 0, ranges }.to_bytes()).unwrap().unwrap().decode::<Plan>()
        };
        assert!(plan(&[(0, 10), (10, 5), (20, 1)]).is_ok());
        assert!(plan(&[(0, 10), (9, 5)]).is_err());
        assert!(plan(&[(0, 0)]).is_err());
        assert!(plan(&[(u64::MAX, 2)]).is_err());
        assert!(plan(&[(i64::MAX as u64, 1)]).is_err());
    }

    #[test]
    fn an_entry_must_be_of_one_piece() {
        let check = |e: Entry| take(&e.to_bytes()).unwrap().unwrap().decode::<Entry>();
        let good = entry(vec![b"a".to_vec()], 1, 0);
        assert!(check(good.clone()).is_ok());
        assert!(check(Entry { kind: Kind::Symlink, ..good.clone() }).is_err());
        assert!(check(Entry { target: Some(b"x".to_vec()), ..good.clone() }).is_err());
        assert!(check(Entry { path: Components::default(), ..good.clone() }).is_err());
        assert!(check(Entry { size: Some(u64::MAX), ..good }).is_err());
    }

    #[test]
    fn the_longest_messages_fit_their_limits() {
        let held = (0..MAX_HELD as u64)
            .map(|i| Held { range: Range { offset: i64::MAX as u64 / 2 + 2 * i, length: 1 }, digest: [0xff; 32] })
            .collect();
        assert!(Want { id: u64::MAX, held: Some(held) }.to_bytes().len() <= Want::LIMIT);
        let ranges = (0..MAX_PLAN_RANGES as u64)
            .map(|i| Range { offset: i64::MAX as u64 / 2 + (i << 40), length: 1 << 39 })
            .collect();
        assert!(Plan { id: u64::MAX, encoding: 0, ranges }.to_bytes().len() <= Plan::LIMIT);
        let long = Entry {
            target: Some(vec![b'x'; MAX_SYMLINK]),
            kind: Kind::Symlink,
            size: None,
            ..entry(vec![b"a".to_vec(); 2048], 0, i64::MIN)
        };
        assert!(long.to_bytes().len() <= Entry::LIMIT);
    }

    #[test]
    fn times_before_1970_keep_their_nanoseconds() {
        let time = UNIX_EPOCH - Duration::new(1, 250_000_000);
        assert_eq!(Time::from(time), Time { seconds: -2, nanoseconds: 750_000_000 });
        assert_eq!(Time::from(UNIX_EPOCH - Duration::from_secs(3)), Time { seconds: -3, nanoseconds: 0 });
    }

    proptest! {
        #[test]
        fn varints_survive(value in 0u64..1 << 62) {
            let mut out = BytesMut::new();
            put_varint(&mut out, value);
            prop_assert_eq!(peek_varint(&out), Some((value, out.len())));
            prop_assert_eq!(peek_varint(&out[..out.len() - 1]), None);
        }

        #[test]
        fn entries_survive_in_any_number_of_pieces(
            path in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 1..8),
            size in 0u64..1 << 63, seconds: i64, cut in 0usize..64,
        ) {
            let entry = entry(path, size, seconds);
            let bytes = entry.to_bytes();
            let cut = cut.min(bytes.len() - 1);
            let mut buffer = BytesMut::from(&bytes[..cut]);
            prop_assert_eq!(Frame::take(&mut buffer, Entry::LIMIT), Ok(None));
            buffer.extend_from_slice(&bytes[cut..]);
            let frame = Frame::take(&mut buffer, Entry::LIMIT).unwrap().unwrap();
            prop_assert_eq!(frame.decode::<Entry>(), Ok(entry));
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn no_bytes_make_a_decoder_panic(kind: u8, payload in proptest::collection::vec(any::<u8>(), 0..400)) {
            let frame = Frame { kind, payload: payload.clone().into() };
            macro_rules! try_all { ($($m:ident)*) => { $( let _ = Frame { kind: $m::TYPE, ..frame.clone() }.decode::<$m>(); )* } }
            try_all!(Hello Push Pull List Ready Refused End Summary GoAway Working Entry Skip Done Want Refuse Plan Trailer Committed Failed);
            let _ = take(&payload);
        }
    }
}
