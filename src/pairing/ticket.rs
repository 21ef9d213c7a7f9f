//! A ticket: a code together with all that finds its sender, in one string that is copied and not spoken. For networks on which nobody can
//! be found, and for whoever would rather scan than type.

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

/// What a ticket begins with. With upper case, digits and a colon alone, a QR code needs less than half of the room.
const PREFIX: &str = "HAUL:";
/// Most addresses in it; the more there are, the harder its picture is to scan.
pub const MAX_ADDRESSES: usize = 6;
/// Most characters that are looked at.
const MAX_LENGTH: usize = 2048;
/// Bytes that tell a ticket which was cut or mistyped from one that is whole.
const CHECK: usize = 4;
const CHECKED: &str = "haul/1 ticket";

/// A ticket. Whoever has it is the receiver: its `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Ticket {
    /// What the sender and the receiver both know.
    pub code: ShortCode,
    /// The sender's key.
    pub key_id: KeyId,
    /// Where the sender may be reached; at most [`MAX_ADDRESSES`].
    pub addresses: Vec<SocketAddr>,
    /// The relay that the sender is at. What admits to it does not travel.
    pub relay: Option<RelayAt>,
}

/// The form in which it travels.
#[derive(Encode, Decode)]
#[cbor(map)]
struct Form {
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
    /// How the receiver shows that it has the ticket, and knows the sender.
    pub fn credential(&self) -> Credential {
        Credential {
            key_id: Some(self.key_id),
            ..(&self.code).into()
        }
    }

    /// Where the sender may be. A relay that this machine uses anyway may know more of it than the ticket, such as what admits there.
    pub fn whereabouts(&self, relay: Option<RelayAt>, own: Vec<IpAddr>) -> Whereabouts {
        let relay = match (&self.relay, relay) {
            (Some(told), Some(own)) if (&told.host, told.port) == (&own.host, own.port) => {
                Some(own)
            }
            (Some(told), _) => Some(told.clone()),
            (None, own) => own,
        };
        Whereabouts {
            addresses: self.addresses.clone(),
            relay,
            own,
        }
    }

    /// Whether a text is meant to be a ticket.
    pub fn is_meant(text: &str) -> bool {
        let text = text.trim_start();
        text.get(..PREFIX.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(PREFIX))
    }
}

fn check(form: &[u8]) -> [u8; CHECK] {
    let [a, b, c, d, ..] = blake3::derive_key(CHECKED, form);
    [a, b, c, d]
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let form = Form {
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
        let mut bytes = minicbor::to_vec(&form).map_err(|_| fmt::Error)?;
        bytes.extend(check(&bytes));
        write!(f, "{PREFIX}{}", BASE32_NOPAD.encode(&bytes))
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ticket({:?})", self.code)
    }
}

/// Why something is no ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadTicket {
    /// It does not begin like one.
    #[error("a ticket begins with {PREFIX}")]
    Form,
    /// Some of it is missing, or was changed.
    #[error("the ticket is not whole: copy all of it, from {PREFIX} to its end")]
    Damaged,
    /// It says what nobody says.
    #[error("the ticket is of another version of haul, or of nobody")]
    Content,
}

impl FromStr for Ticket {
    type Err = BadTicket;

    /// Case does not matter, nor do spaces and line breaks, which mail puts in.
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
        let (form, sum) = bytes
            .split_last_chunk::<CHECK>()
            .ok_or(BadTicket::Damaged)?;
        if check(form) != *sum {
            return Err(BadTicket::Damaged);
        }
        let form: Form = minicbor::decode(form).map_err(|_| BadTicket::Content)?;
        if form.addresses.len() > MAX_ADDRESSES {
            return Err(BadTicket::Content);
        }
        let pin = form.relay_pin.map(KeyId);
        let relay = form.relay.map(|relay| {
            relay
                .parse::<RelayAt>()
                .map(|relay| RelayAt { pin, ..relay })
        });
        Ok(Self {
            code: form.code.parse().map_err(|_| BadTicket::Content)?,
            key_id: KeyId(form.key_id),
            addresses: form
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
    fn what_is_written_is_read_however_it_was_copied() {
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
                Ticket::is_meant(&text)
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
    fn a_ticket_that_was_cut_or_changed_is_told_from_one_that_is_none() {
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
        assert!(!Ticket::is_meant("417-maple-canyon-orbit"));
    }

    #[test]
    fn a_ticket_whose_relay_would_steer_a_terminal_is_none() {
        for host in [
            "\x1b]52;c;ZXZpbA==\x07",
            "a\u{9b}2J",
            "a\u{202e}b",
            "a\nb",
            "a\0",
        ] {
            let form = Form {
                code: "417-maple-canyon-orbit".into(),
                key_id: [7; 32],
                addresses: vec![],
                relay: Some(format!("{host}:99")),
                relay_pin: None,
            };
            let mut bytes = minicbor::to_vec(&form).unwrap();
            bytes.extend(check(&bytes));
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
            for said in [relay.to_string(), format!("{relay:?}"), error.to_string()] {
                assert!(
                    !said.contains(crate::error::text::is_unprintable),
                    "{said:?}"
                );
            }
        }
    }

    #[test]
    fn no_log_shows_it_and_no_token_travels() {
        let mut ticket = ticket();
        ticket.relay = ticket.relay.map(|relay| RelayAt {
            token: Some("secret".into()),
            ..relay
        });
        assert_eq!(format!("{ticket:?}"), "Ticket(ShortCode(417-...))");
        let read: Ticket = ticket.to_string().parse().unwrap();
        assert_eq!(read.relay.clone().unwrap().token, None);
        // Whoever has a token of its own for that relay uses it.
        let own = ticket.relay.clone();
        assert_eq!(read.whereabouts(own.clone(), vec![]).relay, own);
        assert_eq!(read.whereabouts(None, vec![]).relay, read.relay);
    }

    proptest! {
        #[test]
        fn whatever_is_pasted_is_no_panic(text in "(HAUL:)?[A-Z2-7a-z ]{0,80}", bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = text.parse::<Ticket>();
            let bytes = [&bytes[..], &check(&bytes)].concat();
            let _ = format!("{PREFIX}{}", BASE32_NOPAD.encode(&bytes)).parse::<Ticket>();
        }
    }
}
