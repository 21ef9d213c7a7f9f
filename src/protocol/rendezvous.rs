//! What two ends and a relay say, so that the two find each other. None of it knows the words of a code.

use std::net::{IpAddr, SocketAddr};

use minicbor::{Decode, Encode};

use super::value::at_most;
use crate::error::text::PeerText;

/// Most addresses that one end tells of.
pub const MAX_ADDRESSES: usize = 16;
/// Most bytes of what admits to a relay.
pub const MAX_RELAY_TOKEN: usize = 256;

/// A UDP address: 4 or 16 bytes of IP, and the port in two.
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
        let wrong = || minicbor::decode::Error::message("an address has 6 or 18 bytes");
        let (ip, port) = bytes.split_last_chunk::<2>().ok_or_else(wrong)?;
        let ip = match (<[u8; 4]>::try_from(ip), <[u8; 16]>::try_from(ip)) {
            (Ok(v4), _) => IpAddr::from(v4),
            (_, Ok(v6)) => IpAddr::from(v6),
            _ => return Err(wrong()),
        };
        Ok(Self(SocketAddr::new(ip, u16::from_be_bytes(*port))))
    }
}

/// A sender asks for a number under which it can be found, for as long as the stream stays open.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Place {
    /// Random: whoever comes again with it takes over the number that it had.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub claim: [u8; 16],
    /// The number that it had before.
    #[n(1)]
    pub number: Option<u32>,
    /// What admits to the relay; at most [`MAX_RELAY_TOKEN`] bytes.
    #[n(2)]
    pub token: Option<PeerText>,
    /// Where else it may be reached; at most [`MAX_ADDRESSES`].
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

/// The relay's answer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Placed {
    /// The number.
    #[n(0)]
    pub number: u32,
    /// Where the relay sees the sender.
    #[n(1)]
    pub seen: Address,
}

/// A receiver looks for whoever has a number.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Seek {
    /// The number.
    #[n(0)]
    pub number: u32,
    /// What admits to the relay; at most [`MAX_RELAY_TOKEN`] bytes.
    #[n(1)]
    pub token: Option<PeerText>,
    /// Where else it may be reached; at most [`MAX_ADDRESSES`].
    #[n(2)]
    pub addresses: Vec<Address>,
    /// Whether the relay is to forward, if it can.
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

/// The relay tells each end of the other.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Found {
    /// Where the relay sees the other end, then what that tells of itself; at most one more than [`MAX_ADDRESSES`].
    #[n(0)]
    pub addresses: Vec<Address>,
    /// How the relay forwards for the two, if it was asked to and has room for them.
    #[n(1)]
    pub forward: Option<Forward>,
}

impl Found {
    pub(super) fn validate(&self) -> Result<(), String> {
        at_most("addresses", self.addresses.len(), MAX_ADDRESSES + 1)
    }
}

/// How a relay forwards: what comes to its port from one end's address goes to the other's.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Forward {
    /// The UDP port, on the relay's own address.
    #[n(0)]
    pub port: u16,
    /// A datagram of [`BIND`] and this, sent there, makes its sender's address this end's.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub token: [u8; 32],
}

/// What a datagram begins with that binds an address: neither a long header nor, without the fixed bit, a short one of QUIC (RFC
/// 9000, section 17). Where that bit is greased (RFC 9287), the token tells them apart.
pub const BIND: u8 = 0x01;
