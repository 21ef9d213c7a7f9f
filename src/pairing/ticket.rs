//! Tickets: one string with a code and the addresses of its sender, to be copied or scanned. For networks without discovery,
//! and for users who would rather scan than type.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use data_encoding::BASE32_NOPAD;
use minicbor::{Decode, Encode};

use super::code::{Credential, ShortCode};
use super::rendezvous::RelayAt;
use super::route::Whereabouts;
use crate::auth::identity::KeyId;
use crate::protocol::Address;

/// The prefix of a ticket. A QR code of only upper case, digits and a colon needs less than half of the space.
const PREFIX: &str = "HAUL:";
/// Addresses in a ticket, at most. Each makes the QR code harder to scan.
pub const MAX_ADDRESSES: usize = 6;
/// Characters that the parser reads, at most.
const MAX_LENGTH: usize = 2048;
/// Bytes of the checksum, which detects a ticket that was cut or mistyped.
const CHECKSUM_SIZE: usize = 4;
const CHECKSUM_CONTEXT: &str = "haul/1 ticket";

/// A ticket. It authorises its holder to receive, so its `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Ticket {
    /// The code.
    pub code: ShortCode,
    /// The sender's key.
    pub key_id: KeyId,
    /// Addresses at which the sender may be reached; at most [`MAX_ADDRESSES`].
    pub addresses: Vec<SocketAddr>,
    /// The sender's relay. The relay's token is not part of the ticket.
    pub relay: Option<RelayAt>,
}

/// A ticket as it is encoded.
#[derive(Encode, Decode)]
#[cbor(map)]
struct EncodedTicket {
    #[n(0)]
    code: String,
    #[cbor(n(1), with = "minicbor::bytes")]
    key_id: [u8; 32],
    #[n(2)]
    addresses: Vec<Address>,
    #[n(3)]
    relay: Option<String>,
    #[cbor(n(4), with = "minicbor::bytes")]
    relay_pin: Option<[u8; 32]>,
}

impl Ticket {
    /// The credential by which the receiver proves that it has the ticket, and recognises the sender.
    pub fn credential(&self) -> Credential {
        Credential {
            key_id: Some(self.key_id),
            ..(&self.code).into()
        }
    }

    /// The places where the sender may be. If this machine is configured for the same relay, its configuration counts, because it
    /// may have the relay's token.
    pub fn whereabouts(&self, relay: Option<RelayAt>, own: Vec<IpAddr>) -> Whereabouts {
        let relay = match (&self.relay, relay) {
            (Some(theirs), Some(ours)) if theirs.host == ours.host && theirs.port == ours.port => {
                Some(ours)
            }
            (Some(theirs), _) => Some(theirs.clone()),
            (None, ours) => ours,
        };
        Whereabouts {
            addresses: self.addresses.clone(),
            relay,
            own,
        }
    }

    /// Whether a text begins like a ticket.
    pub fn has_prefix(text: &str) -> bool {
        let text = text.trim_start();
        text.get(..PREFIX.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(PREFIX))
    }
}

fn checksum(encoded: &[u8]) -> [u8; CHECKSUM_SIZE] {
    let [a, b, c, d, ..] = blake3::derive_key(CHECKSUM_CONTEXT, encoded);
    [a, b, c, d]
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ticket = EncodedTicket {
            code: self.code.to_string(),
            key_id: self.key_id.0,
            addresses: self
                .addresses
                .iter()
                .copied()
                .take(MAX_ADDRESSES)
                .map(Address)
                .collect(),
            relay: self.relay.as_ref().map(RelayAt::to_string),
            relay_pin: self
                .relay
                .as_ref()
                .and_then(|relay| relay.pin)
                .map(|pin| pin.0),
        };
        let mut bytes = minicbor::to_vec(&ticket).map_err(|_| fmt::Error)?;
        bytes.extend(checksum(&bytes));
        write!(f, "{PREFIX}{}", BASE32_NOPAD.encode(&bytes))
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ticket({:?})", self.code)
    }
}

/// Why a text is not a ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadTicket {
    /// It does not begin like a ticket.
    #[error("a ticket begins with {PREFIX}")]
    Form,
    /// A part is missing or was changed.
    #[error("the ticket is incomplete or damaged; copy all of it, from {PREFIX} to its end")]
    Damaged,
    /// The checksum is right, and the content is not a ticket of this version.
    #[error("the ticket has invalid content; it may be from another version of haul")]
    Content,
}

impl FromStr for Ticket {
    type Err = BadTicket;

    /// Reads a ticket. Case does not matter, nor do spaces and line breaks, which mail programs insert.
    fn from_str(text: &str) -> Result<Self, BadTicket> {
        let text: String = text
            .chars()
            .filter(|c| !c.is_whitespace())
            .take(MAX_LENGTH + 1)
            .collect();
        let text = text.to_ascii_uppercase();
        let encoded = text.strip_prefix(PREFIX).ok_or(BadTicket::Form)?;
        if encoded.len() > MAX_LENGTH {
            return Err(BadTicket::Damaged);
        }
        let bytes = BASE32_NOPAD
            .decode(encoded.as_bytes())
            .map_err(|_| BadTicket::Damaged)?;
        let (content, sum) = bytes
            .split_last_chunk::<CHECKSUM_SIZE>()
            .ok_or(BadTicket::Damaged)?;
        if checksum(content) != *sum {
            return Err(BadTicket::Damaged);
        }
        let ticket: EncodedTicket = minicbor::decode(content).map_err(|_| BadTicket::Content)?;
        if ticket.addresses.len() > MAX_ADDRESSES {
            return Err(BadTicket::Content);
        }
        let pin = ticket.relay_pin.map(KeyId);
        let relay = ticket.relay.map(|relay| {
            relay
                .parse::<RelayAt>()
                .map(|relay| RelayAt { pin, ..relay })
        });
        Ok(Self {
            code: ticket.code.parse().map_err(|_| BadTicket::Content)?,
            key_id: KeyId(ticket.key_id),
            addresses: ticket
                .addresses
                .into_iter()
                .map(|address| address.0)
                .collect(),
            relay: relay.transpose().map_err(|_| BadTicket::Content)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ticket() -> Ticket {
        Ticket {
            code: "417-maple-canyon-orbit".parse().unwrap(),
            key_id: KeyId([7; 32]),
            addresses: vec![
                "192.0.2.7:4433".parse().unwrap(),
                "[2001:db8::7]:4433".parse().unwrap(),
            ],
            relay: Some(RelayAt {
                pin: Some(KeyId([8; 32])),
                ..RelayAt::from_str("[2001:db8::1]:99").unwrap()
            }),
        }
    }

    #[test]
    fn a_ticket_reads_back_in_any_case_and_spacing() {
        for ticket in [
            ticket(),
            Ticket {
                relay: None,
                addresses: vec![],
                ..ticket()
            },
        ] {
            let text = ticket.to_string();
            assert!(
                Ticket::has_prefix(&text)
                    && text
                        .chars()
                        .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == ':')
            );
            assert_eq!(text.parse(), Ok(ticket.clone()));
            let (one, other) = text.split_at(40);
            assert_eq!(
                format!(" {}\r\n  {other}\n", one.to_lowercase()).parse(),
                Ok(ticket)
            );
        }
    }

    #[test]
    fn a_cut_or_changed_ticket_is_reported_as_damaged() {
        let text = ticket().to_string();
        for end in PREFIX.len()..text.len() {
            assert_eq!(
                text[..end].parse::<Ticket>(),
                Err(BadTicket::Damaged),
                "{end}"
            );
        }
        let changed = if text.ends_with('A') { "B" } else { "A" };
        assert_eq!(
            format!("{}{changed}", &text[..text.len() - 1]).parse::<Ticket>(),
            Err(BadTicket::Damaged)
        );
        assert_eq!(
            "417-maple-canyon-orbit".parse::<Ticket>(),
            Err(BadTicket::Form)
        );
        assert!(!Ticket::has_prefix("417-maple-canyon-orbit"));
    }

    #[test]
    fn a_ticket_is_refused_if_its_relay_has_control_characters() {
        for host in [
            "\x1b]52;c;ZXZpbA==\x07",
            "a\u{9b}2J",
            "a\u{202e}b",
            "a\nb",
            "a\0",
        ] {
            let ticket = EncodedTicket {
                code: "417-maple-canyon-orbit".into(),
                key_id: [7; 32],
                addresses: vec![],
                relay: Some(format!("{host}:99")),
                relay_pin: None,
            };
            let mut bytes = minicbor::to_vec(&ticket).unwrap();
            bytes.extend(checksum(&bytes));
            let text = format!("{PREFIX}{}", BASE32_NOPAD.encode(&bytes));
            assert_eq!(text.parse::<Ticket>(), Err(BadTicket::Content), "{host:?}");
            let relay = RelayAt {
                host: host.into(),
                ..RelayAt::from_str("relay:99").unwrap()
            };
            let error = crate::error::Error::Resolve {
                host: relay.host.as_str().into(),
                why: host.into(),
            };
            for shown in [relay.to_string(), format!("{relay:?}"), error.to_string()] {
                assert!(
                    !shown.contains(crate::error::text::is_unprintable),
                    "{shown:?}"
                );
            }
        }
    }

    #[test]
    fn debug_hides_the_ticket_and_the_ticket_has_no_token() {
        let mut ticket = ticket();
        ticket.relay = ticket.relay.map(|relay| RelayAt {
            token: Some("secret".into()),
            ..relay
        });
        assert_eq!(format!("{ticket:?}"), "Ticket(ShortCode(417-...))");
        let read: Ticket = ticket.to_string().parse().unwrap();
        assert_eq!(read.relay.clone().unwrap().token, None);
        // A receiver's own token for that relay is used.
        let own = ticket.relay.clone();
        assert_eq!(read.whereabouts(own.clone(), vec![]).relay, own);
        assert_eq!(read.whereabouts(None, vec![]).relay, read.relay);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "(HAUL:)?[A-Z2-7a-z ]{0,80}", bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = text.parse::<Ticket>();
            let bytes = [&bytes[..], &checksum(&bytes)].concat();
            let _ = format!("{PREFIX}{}", BASE32_NOPAD.encode(&bytes)).parse::<Ticket>();
        }
    }
}
