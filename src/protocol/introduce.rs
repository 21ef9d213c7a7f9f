//! What two ends say that know each other by a code only. The words of the code are in none of it.

use minicbor::{Decode, Encode};

use super::Components;
use super::value::at_most;
use crate::error::text::PeerText;

/// The receiver's first message: which code it means, and its part of the exchange.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Introduce {
    /// The code's number.
    #[n(0)]
    pub number: u32,
    /// A message of SPAKE2.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub exchange: [u8; 33],
}

/// The sender's answer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Introduced {
    /// A message of SPAKE2.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub exchange: [u8; 33],
}

/// Shows that one end has the key that comes of the exchange: the receiver first, then the sender.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Confirm {
    /// Of the key, for this role.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub tag: [u8; 32],
}

/// What the sender has, for the receiver's user to decide on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Offer {
    /// What the sending machine is called; at most [`MAX_OFFER_FROM`] bytes.
    #[n(0)]
    pub from: PeerText,
    /// The names of the sources; at most [`MAX_OFFERED`].
    #[n(1)]
    pub names: Components,
    /// Whether the only source is a directory.
    #[n(2)]
    pub directory: bool,
    /// Files in all.
    #[n(3)]
    pub files: u64,
    /// Their bytes.
    #[n(4)]
    pub bytes: u64,
    /// A text in the place of files; at most [`MAX_OFFER_TEXT`] bytes.
    #[n(5)]
    pub text: Option<PeerText>,
    /// The only source comes out of a pipe: nobody knows its size yet, and it can be had once.
    #[n(6)]
    pub piped: Option<bool>,
    /// Nothing but to know each other from here on: the number under which the sending machine's server can be found.
    #[n(7)]
    pub pair: Option<u32>,
    /// Directories and links in all.
    #[n(8)]
    pub others: Option<u64>,
}

/// Most bytes of the name of a machine.
pub const MAX_OFFER_FROM: usize = 128;
/// Most names in an offer: a person is to read them, and a directory has room for more.
pub const MAX_OFFERED: usize = 1000;
/// Most bytes of a text.
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
        match [
            !self.names.0.is_empty(),
            self.text.is_some(),
            self.pair.is_some(),
        ]
        .iter()
        .filter(|is| **is)
        .count()
        {
            1 => Ok(()),
            _ => Err("either names, a text, or a pair".into()),
        }
    }
}

/// The receiver takes what is offered, and asks for it over another connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Accept {
    /// In answer to an offer to pair: the number under which the receiving machine's server can be found.
    #[n(0)]
    pub pair: Option<u32>,
}
