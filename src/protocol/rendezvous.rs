//! Messages between two ends and a relay by which the two find each other. None contains the words of a code.

use std::net::{IpAddr, SocketAddr};

use minicbor::{Decode, Encode};

use super::value::at_most;
use crate::error::text::PeerText;

/// Limit of addresses that one end reports.
pub const MAX_ADDRESSES: usize = 16;
/// Limit of a relay's token in bytes.
pub const MAX_RELAY_TOKEN: usize = 256;

/// Numbers of paired machines. They derive from a secret of the pair or of the server (PROTOCOL.md, section 4).
pub const PAIRED_NUMBERS: std::ops::Range<u32> = 10_000_000..100_000_000;

/// A UDP address: 4 or 16 bytes of IP address and 2 bytes of port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Address(pub SocketAddr);

impl<C> Encode<C> for Address {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        let port = self.0.port().to_be_bytes();
        match self.0.ip() {
            IpAddr::V4(ip) => e.bytes(&[&ip.octets()[..], &port].concat())?,
            IpAddr::V6(ip) => e.bytes(&[&ip.octets()[..], &port].concat())?,
        };
        Ok(())
    }
}

impl<'b, C> Decode<'b, C> for Address {
    fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
        let bytes = d.bytes()?;
        let invalid = || minicbor::decode::Error::message("an address has 6 or 18 bytes");
        let (ip, port) = bytes.split_last_chunk::<2>().ok_or_else(invalid)?;
        let ip = match (<[u8; 4]>::try_from(ip), <[u8; 16]>::try_from(ip)) {
            (Ok(v4), _) => IpAddr::from(v4),
            (_, Ok(v6)) => IpAddr::from(v6),
            _ => return Err(invalid()),
        };
        Ok(Self(SocketAddr::new(ip, u16::from_be_bytes(*port))))
    }
}

/// Requests a number under which the sender can be found for as long as the stream is open.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Place {
    /// Secret of the number's owner. A sender that reconnects with it gets its number back.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub claim: [u8; 16],
    /// The number that the sender had before, or chooses itself.
    #[n(1)]
    pub number: Option<u32>,
    /// The relay's token; at most [`MAX_RELAY_TOKEN`] bytes.
    #[n(2)]
    pub token: Option<PeerText>,
    /// Other addresses of this end; at most [`MAX_ADDRESSES`].
    #[n(3)]
    pub addresses: Vec<Address>,
}

impl Place {
    pub(super) fn validate(&self) -> Result<(), String> {
        at_most(
            "token",
            self.token.as_ref().map_or(0, PeerText::len),
            MAX_RELAY_TOKEN,
        )?;
        at_most("addresses", self.addresses.len(), MAX_ADDRESSES)
    }
}

/// The relay's answer to [`Place`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Placed {
    /// The number.
    #[n(0)]
    pub number: u32,
    /// The sender's address as the relay sees it.
    #[n(1)]
    pub seen: Address,
}

/// Requests the addresses of the sender that has a number.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Seek {
    /// The number.
    #[n(0)]
    pub number: u32,
    /// The relay's token; at most [`MAX_RELAY_TOKEN`] bytes.
    #[n(1)]
    pub token: Option<PeerText>,
    /// Other addresses of this end; at most [`MAX_ADDRESSES`].
    #[n(2)]
    pub addresses: Vec<Address>,
    /// Whether the relay should forward, if it can.
    #[n(3)]
    pub forward: bool,
}

impl Seek {
    pub(super) fn validate(&self) -> Result<(), String> {
        at_most(
            "token",
            self.token.as_ref().map_or(0, PeerText::len),
            MAX_RELAY_TOKEN,
        )?;
        at_most("addresses", self.addresses.len(), MAX_ADDRESSES)
    }
}

/// Reports the addresses of one end to the other.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Found {
    /// The other end's address as the relay sees it, then those that it reports of itself; at most one more than [`MAX_ADDRESSES`].
    #[n(0)]
    pub addresses: Vec<Address>,
    /// How the relay forwards between the two, if that was requested and it has a free port.
    #[n(1)]
    pub forward: Option<Forward>,
}

impl Found {
    pub(super) fn validate(&self) -> Result<(), String> {
        at_most("addresses", self.addresses.len(), MAX_ADDRESSES + 1)
    }
}

/// A forwarding port of a relay. Datagrams to it from one end's address go to the other end's.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Forward {
    /// The UDP port, on the relay's own address.
    #[n(0)]
    pub port: u16,
    /// Token of this end. A datagram of [`BIND`] and this token to the port binds its source address as this end's.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub token: [u8; 32],
}

/// First byte of a datagram that binds an address. It is no QUIC packet: it has neither a long header nor the fixed bit of a short
/// one (RFC 9000, section 17). If that bit is greased (RFC 9287), the token distinguishes them.
pub const BIND: u8 = 0x01;
