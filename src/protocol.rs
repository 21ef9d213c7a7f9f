//! Every message of the protocol, with its limits. PROTOCOL.md is the specification. This room does not use quinn.
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
    Address, BIND, Forward, Found, MAX_ADDRESSES, MAX_RELAY_TOKEN, PAIRED_NUMBERS, Place, Placed,
    Seek,
};
pub use sender_time::SenderTime;
pub use value::{
    Components, Durability, Held, Kind, MAX_MARKS, MAX_WIRE_RULES, MAX_WIRE_RULES_BYTES, Mark,
    Origin, Probe, Range, Time, WireFilter, WireReason,
};

pub use verdict::Verdict;

/// Default UDP port of a server.
pub const DEFAULT_PORT: u16 = 4433;
/// The protocol's name and version in TLS (RFC 7301).
pub const ALPN: &[u8] = b"haul/1";
/// The name and version of the protocol between a relay and either end of a transfer.
pub const RELAY_ALPN: &[u8] = b"haul-relay/1";
/// Length in bytes of the ranges that a receiver offers as held. The last one may be shorter.
pub const HELD_BLOCK: u64 = 1 << 20;
/// Alignment in bytes of those ranges. An interrupted file loses half of this on average, not half a block.
pub const HELD_STEP: u64 = 64 << 10;
/// Limit of ranges in one [`Want`].
pub const MAX_HELD: usize = 1024;
/// Limit of holes in one [`Plan`]. A sender with more sends the smallest ones as zeros.
pub const MAX_HOLES: usize = 1024;
/// Limit of ranges in one [`Plan`]: the gaps between [`MAX_HELD`] held ranges and [`MAX_HOLES`] holes.
pub const MAX_PLAN_RANGES: usize = MAX_HELD + MAX_HOLES + 1;
/// Encoding of a body: the plan's ranges, one after the other.
pub const ENCODING_RANGES: u32 = 0;
/// Encoding of a body: pieces, for content of unknown length.
pub const ENCODING_PIECES: u32 = 1;
/// Limit of unanswered entries. At about 100 bytes each they take 1 MB, and at 100 ms round-trip time they allow 100,000 entries a
/// second.
pub const MAX_UNANSWERED: u32 = 10_000;
/// Limit of unanswered entries in bytes.
pub const MAX_UNANSWERED_BYTES: u32 = 1 << 20;

/// Limit of entries that are announced before the receiver has sent its own limit. They are sent with the request.
pub const EARLY_UNANSWERED: u32 = 64;
/// Limit of these entries in bytes: what fits into the first flight with the request, and one entry of any length.
pub const EARLY_UNANSWERED_BYTES: u32 = (12 << 10) + Entry::LIMIT as u32;
/// First byte of a piece. Its length and its bytes follow.
pub const PIECE: u8 = 0x25;
/// Limit of bytes in a piece.
pub const MAX_PIECE: u64 = 256 << 10;
/// Longest target of a symbolic link in bytes: Linux's `PATH_MAX` less the closing NUL.
pub const MAX_SYMLINK: usize = 4095;
/// Limit of a message's header in bytes: the type byte and an eight-byte length.
const MAX_HEADER: usize = 9;

/// The first byte of every stream. A stream of an unknown type is stopped with [`Unsupported`](crate::error::Code::Unsupported).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum StreamType {
    /// Opened by the client, one for each session.
    Control = 0x01,
    /// Opened by the sender, one for each session.
    Manifest = 0x02,
    /// Opened by the sender, one for each wanted file.
    Transfer = 0x03,
    /// Opened by the client to measure the path.
    Measurement = 0x04,
    /// Opened by the client to prove that it knows a code.
    Introduction = 0x05,
}

impl StreamType {
    /// The type that a first byte names; `None` for an unknown one.
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

/// A violation of the protocol in what a peer sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A message is longer than its type allows.
    #[error("message {kind:#04x} of {length} bytes is over its limit of {limit}")]
    TooLong {
        /// The type byte.
        kind: u8,
        /// The length in the header.
        length: u64,
        /// The allowed length.
        limit: usize,
    },
    /// A message of another type than expected.
    #[error("message {got:#04x} instead of {expected}")]
    Unexpected {
        /// The type byte.
        got: u8,
        /// Name of the expected message.
        expected: &'static str,
    },
    /// The payload is invalid for its type.
    #[error("bad {name}: {reason}")]
    Payload {
        /// Name of the message.
        name: &'static str,
        /// The decoder's error.
        reason: String,
    },
}

/// A message: its type byte, name and limit.
pub trait Message: for<'b> Decode<'b, ()> + Encode<()> {
    /// The type byte.
    const TYPE: u8;
    /// The name in PROTOCOL.md.
    const NAME: &'static str;
    /// Limit of the payload in bytes.
    const LIMIT: usize;

    /// Checks the rules that the CBOR encoding does not express.
    ///
    /// # Errors
    /// A description of the first rule that is broken.
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

    /// The whole message as bytes.
    fn to_bytes(&self) -> Bytes {
        let mut out = BytesMut::new();
        self.put(&mut out);
        out.freeze()
    }
}

/// A message that was read and is not decoded yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The type byte.
    pub kind: u8,
    /// The payload.
    pub payload: Bytes,
}

impl Frame {
    /// Takes one frame off the front of a buffer; `None` when more bytes are needed. It checks the length against `limit` before
    /// it allocates.
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
        let invalid = |reason| Malformed::Payload {
            name: M::NAME,
            reason,
        };
        let message: M =
            minicbor::decode(&self.payload).map_err(|error| invalid(error.to_string()))?;
        message.check().map_err(invalid)?;
        Ok(message)
    }
}

/// Appends a QUIC variable-length integer (RFC 9000, section 16). The value must be below 2^62.
pub fn put_varint(out: &mut BytesMut, value: u64) {
    match value {
        0..0x40 => out.put_u8(value as u8),
        0x40..0x4000 => out.put_u16(value as u16 | 0x4000),
        0x4000..0x4000_0000 => out.put_u32(value as u32 | 0x8000_0000),
        _ => out.put_u64(value | 0xc000_0000_0000_0000),
    }
}

/// Reads a QUIC variable-length integer. Returns it with its length in bytes; `None` when more bytes are needed.
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
