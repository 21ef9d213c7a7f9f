//! Messages between two ends that have only a code in common. None contains the words of the code.

use minicbor::{Decode, Encode};

use super::Components;
use super::rendezvous::{Address, MAX_ADDRESSES};
use super::value::at_most;
use crate::error::text::PeerText;

/// The receiver's first message: the number of its code, and its part of the exchange.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Introduce {
    /// The code's number.
    #[n(0)]
    pub number: u32,
    /// The receiver's SPAKE2 message.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub exchange: [u8; 33],
}

/// The sender's answer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Introduced {
    /// The sender's SPAKE2 message.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub exchange: [u8; 33],
}

/// Proves that an end has the key of the exchange. The receiver sends it first, then the sender.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Confirm {
    /// The tag of the key for this end's role.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub tag: [u8; 32],
}

/// Describes what the sender offers, for the receiver's user to accept or decline.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Offer {
    /// The sending machine's name; at most [`MAX_OFFER_FROM`] bytes.
    #[n(0)]
    pub from: PeerText,
    /// The names of the sources; at most [`MAX_OFFERED`].
    #[n(1)]
    pub names: Components,
    /// Whether the only source is a directory.
    #[n(2)]
    pub directory: bool,
    /// Number of files.
    #[n(3)]
    pub files: u64,
    /// Size of all files in bytes.
    #[n(4)]
    pub bytes: u64,
    /// A text instead of files; at most [`MAX_OFFER_TEXT`] bytes.
    #[n(5)]
    pub text: Option<PeerText>,
    /// Whether the only source is a pipe. Its size is unknown, and it can be received once.
    #[n(6)]
    pub piped: Option<bool>,
    /// In an offer to pair the two machines: the number under which the sending machine's server can be found.
    #[n(7)]
    pub pair: Option<u32>,
    /// Number of directories and links.
    #[n(8)]
    pub others: Option<u64>,
    /// Addresses of the sender on its own networks, where the receiver may reach it sooner than by the relay; at most
    /// [`MAX_ADDRESSES`]. Only a receiver that has proved that it knows the code learns them.
    #[n(9)]
    pub addresses: Option<Vec<Address>>,
}

/// Limit of a machine's name in bytes.
pub const MAX_OFFER_FROM: usize = 128;
/// Limit of names in an offer. A person reads them; a directory can hold more files.
pub const MAX_OFFERED: usize = 1000;
/// Limit of a text in bytes.
pub const MAX_OFFER_TEXT: usize = 32 << 10;

impl Offer {
    pub(super) fn validate(&self) -> Result<(), String> {
        at_most("from", self.from.len(), MAX_OFFER_FROM)?;
        at_most("names", self.names.0.len(), MAX_OFFERED)?;
        at_most(
            "text",
            self.text.as_ref().map_or(0, PeerText::len),
            MAX_OFFER_TEXT,
        )?;
        at_most("addresses", count(&self.addresses), MAX_ADDRESSES)?;
        let contents = [
            !self.names.0.is_empty(),
            self.text.is_some(),
            self.pair.is_some(),
        ];
        match contents.iter().filter(|present| **present).count() {
            1 => Ok(()),
            _ => Err("either names, a text, or a pair".into()),
        }
    }
}

/// Accepts an offer. The receiver then asks for the files over another connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Accept {
    /// In an answer to an offer to pair: the number under which the receiving machine's server can be found.
    #[n(0)]
    pub pair: Option<u32>,
    /// Addresses of the receiver on its own networks, for which the sender opens its firewall; at most [`MAX_ADDRESSES`].
    #[n(1)]
    pub addresses: Option<Vec<Address>>,
}

impl Accept {
    pub(super) fn validate(&self) -> Result<(), String> {
        at_most("addresses", count(&self.addresses), MAX_ADDRESSES)
    }
}

fn count(addresses: &Option<Vec<Address>>) -> usize {
    addresses.as_ref().map_or(0, Vec::len)
}
