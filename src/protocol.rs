//! Every message of the protocol, with its limits; knows no quinn. PROTOCOL.md is the specification.
//!
//! A message is one type byte, the payload's length as a QUIC variable-length integer (RFC 9000, section 16) and the
//! payload, a CBOR map with numbered fields (RFC 8949). Unknown fields are ignored, so messages can grow.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use minicbor::{Decode, Encode};

mod content;
mod introduce;
mod message;
mod metadata;
mod metadata_warning;
pub mod path;
pub mod rate;
mod receive_options;
mod rendezvous;
mod sender_time;
pub mod target;
#[cfg(test)]
mod tests;
mod value;
mod verdict;

pub use content::content_hasher;
pub use introduce::{
    Accept, Confirm, Introduce, Introduced, MAX_OFFER_FROM, MAX_OFFER_TEXT, MAX_OFFERED, Offer,
};
pub use message::*;
pub use metadata::{MAX_OWNER_NAME, MAX_XATTR_BYTES, MAX_XATTR_NAME, Owner, XATTR_OVERHEAD, Xattr};
pub use metadata_warning::{Attribute, MetadataWarning};
pub use receive_options::{Delete, Existing, ReceiveOptions};
pub use rendezvous::{
    Address, BIND, Forward, Found, MAX_ADDRESSES, MAX_RELAY_TOKEN, Place, Placed, Seek,
};
pub use sender_time::SenderTime;
pub use value::{
    Components, Durability, Held, Kind, MAX_MARKS, MAX_WIRE_RULES, MAX_WIRE_RULES_BYTES, Mark,
    Origin, Probe, Range, Time, WireFilter, WireReason,
};

pub use verdict::Verdict;

/// The UDP port of a server, unless it is told another.
pub const DEFAULT_PORT: u16 = 4433;
/// The protocol's name and version in TLS (RFC 7301).
pub const ALPN: &[u8] = b"haul/1";
/// The same of what both ends of a transfer speak with a relay.
pub const RELAY_ALPN: &[u8] = b"haul-relay/1";
/// Length in bytes, or a part of it, of the ranges that a receiver offers as held, where so much is there.
pub const HELD_BLOCK: u64 = 1 << 20;
/// Alignment in bytes of those ranges: an interrupted file loses half of it at the end, rather than half of a block.
pub const HELD_STEP: u64 = 64 << 10;
/// Most ranges in one [`Want`].
pub const MAX_HELD: usize = 1024;
/// Most holes in one [`Plan`]. A file with more sends the smallest as the zeros that they are read as.
pub const MAX_HOLES: usize = 1024;
/// Most ranges in one [`Plan`]: what lies between [`MAX_HELD`] held ranges and [`MAX_HOLES`] holes.
pub const MAX_PLAN_RANGES: usize = MAX_HELD + MAX_HOLES + 1;
/// A body of the plan's ranges, one after the other.
pub const ENCODING_RANGES: u32 = 0;
/// A body in pieces, for content whose length nobody knows beforehand.
pub const ENCODING_PIECES: u32 = 1;
/// Most entries that may stand unanswered. At some 100 bytes each that is 1 MB: at 100 ms, 100,000 entries a second.
pub const MAX_UNANSWERED: u32 = 10_000;
/// Most bytes of entries that may stand unanswered.
pub const MAX_UNANSWERED_BYTES: u32 = 1 << 20;

/// Entries that may be announced before the receiver has said how many it allows, so that they travel with the request.
pub const EARLY_UNANSWERED: u32 = 64;
/// Bytes of them: what fits into the first flight beside the request, and room for one entry of any length.
pub const EARLY_UNANSWERED_BYTES: u32 = (12 << 10) + Entry::LIMIT as u32;
/// The byte that a piece begins with; its length follows, and its bytes.
pub const PIECE: u8 = 0x25;
/// Most bytes in a piece.
pub const MAX_PIECE: u64 = 256 << 10;
/// Longest target of a symbolic link in bytes: Linux's `PATH_MAX` less the closing NUL.
pub const MAX_SYMLINK: usize = 4095;
/// Most bytes that a message's header can take: the type byte and an eight-byte length.
const MAX_HEADER: usize = 9;

/// The first byte of every stream; an unknown one is stopped with [`Unsupported`](crate::error::Code::Unsupported).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum StreamType {
    /// Opened by the client, one for each session.
    Control = 0x01,
    /// Opened by the sender, one for each session.
    Manifest = 0x02,
    /// Opened by the sender, one for each wanted file.
    Transfer = 0x03,
    /// Opened by the client, to measure the way.
    Measurement = 0x04,
    /// Opened by the client, to show that it knows a code.
    Introduction = 0x05,
}

impl StreamType {
    /// The type of a first byte, if it is known.
    pub fn from_byte(byte: u8) -> Option<Self> {
        let all = [
            Self::Control,
            Self::Manifest,
            Self::Transfer,
            Self::Measurement,
            Self::Introduction,
        ];
        all.into_iter().find(|&t| t as u8 == byte)
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
        debug_assert!(
            payload.len() <= Self::LIMIT,
            "{} of {} bytes",
            Self::NAME,
            payload.len()
        );
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
        let Some((&kind, rest)) = buffer.split_first() else {
            return Ok(None);
        };
        let Some((length, used)) = peek_varint(rest) else {
            return Ok(None);
        };
        if length > limit as u64 {
            return Err(Malformed::TooLong {
                kind,
                length,
                limit,
            });
        }
        let header = 1 + used;
        let length = length as usize;
        if buffer.len() < header + length {
            buffer.reserve((header + length - buffer.len()).min(limit + MAX_HEADER));
            return Ok(None);
        }
        buffer.advance(header);
        Ok(Some(Self {
            kind,
            payload: buffer.split_to(length).freeze(),
        }))
    }

    /// Decodes the frame as `M`.
    ///
    /// # Errors
    /// [`Malformed`] when it is another message, longer than `M` may be, or not well-formed.
    pub fn decode<M: Message>(&self) -> Result<M, Malformed> {
        if self.kind != M::TYPE {
            return Err(Malformed::Unexpected {
                got: self.kind,
                expected: M::NAME,
            });
        }
        if self.payload.len() > M::LIMIT {
            return Err(Malformed::TooLong {
                kind: self.kind,
                length: self.payload.len() as u64,
                limit: M::LIMIT,
            });
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
    Some((
        rest.iter().fold(u64::from(first & 0x3f), |value, &b| {
            value << 8 | u64::from(b)
        }),
        length,
    ))
}
