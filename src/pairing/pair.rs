//! Machines that know each other for good: what a code has brought together once meets again without one.
//!
//! At the end of an introduction both have each other's key, and a secret that came of the exchange. From the secret follows where the two
//! meet when one sends to the other; that is told to nobody else, so that no third machine knows for whom a number is
//! announced. A machine's server is found under a number of its own, which it tells those that it is paired with.

use std::net::IpAddr;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use tokio::time::sleep;
use tracing::{info, warn};

use super::code::Credential;
use super::discovery::Announcement;
use super::rendezvous::{Placement, RelayAt, WantedFile};
use super::route::{Ways, Whereabouts};
use crate::auth::identity::{Identity, KeyId};
use crate::auth::peers::Peer;
use crate::auth::trust::ServerTrust;
use crate::client::Client;
use crate::config::Config;
use crate::error::Result;
use crate::net::endpoint::Port;

/// Numbers of machines that know each other, apart from those of codes: so many that two rarely have the same.
const NUMBERS: std::ops::Range<u32> = 10_000_000..100_000_000;
const NUMBER: &str = "haul/1 pair: number";
const SECRET: &str = "haul/1 pair: secret";
const SERVER: &str = "haul/1 pair: a server's number";
const CLAIM: &str = "haul/1 pair: a claim to a number";
/// How long a server waits before it goes to a relay again that it could not use.
const RETRY_INTERVAL: Duration = Duration::from_secs(30);

/// What an introduction leaves when both ends were to know each other from then on.
#[derive(Clone, PartialEq, Eq)]
pub struct Paired {
    /// The other end's key.
    pub key_id: KeyId,
    /// What only the two know.
    pub secret: [u8; 32],
    /// The number under which the other end's server can be found.
    pub number: u32,
}

/// Without the secret.
impl std::fmt::Debug for Paired {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Paired({})", self.key_id)
    }
}

/// How two paired machines meet when this one of them sends.
pub(super) fn credential(peer: &Peer, sender: KeyId) -> Credential {
    let secret = blake3::derive_key(SECRET, &peer.secret);
    let number = number_of(NUMBER, &[&peer.secret, &sender.0]);
    Credential {
        number,
        secret: STANDARD_NO_PAD.encode(secret),
        key_id: Some(peer.key_id),
    }
}

/// How to meet a paired machine that sends.
pub fn sent_by(peer: &Peer) -> Credential {
    credential(peer, peer.key_id)
}

/// The number under which this machine's server can be found by those that it is paired with.
pub fn number_of_server(identity: &Identity) -> u32 {
    number_of(SERVER, &[identity.private_key().secret_der()])
}

fn number_of(context: &str, parts: &[&[u8]]) -> u32 {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    for part in parts {
        hasher.update(part);
    }
    let [a, b, c, d, e, f, g, h, ..] = *hasher.finalize().as_bytes();
    let random = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    NUMBERS.start + (random % u64::from(NUMBERS.end - NUMBERS.start)) as u32
}

/// A claim to a number at a relay that is the same each time this machine comes.
pub(super) fn wanted(number: u32, identity: &Identity) -> WantedFile {
    let mut hasher = blake3::Hasher::new_derive_key(CLAIM);
    hasher
        .update(&number.to_le_bytes())
        .update(identity.private_key().secret_der());
    let mut claim = [0; 16];
    hasher.finalize_xof().fill(&mut claim);
    WantedFile { number, claim }
}

/// Connects to the server of a paired machine, wherever it is: on this network, or where a relay knows. Its key is the one that
/// was told at the pairing, or there is no connection.
///
/// # Errors
/// [`Error::Lost`](crate::error::Error::Lost) when it is not found, and what ends a connection before it has begun.
pub async fn connect(
    peer: &Peer,
    relay: Option<RelayAt>,
    own: Vec<IpAddr>,
    identity: &Identity,
    config: &Config,
) -> Result<Client> {
    let at = Whereabouts {
        relay,
        own,
        ..Whereabouts::default()
    };
    let trust = ServerTrust {
        pin: Some(peer.key_id),
        ..ServerTrust::default()
    };
    let ways = Ways::new(at, peer.number, identity, config)?;
    let first = ways.connect(&trust).await?;
    Client::over(first, ways.dial(trust), config)
}

/// Lets a server be found by those that this machine is paired with, on this network and at a relay, if there is one; until it
/// is dropped.
pub async fn be_found(
    port: Port,
    relay: Option<RelayAt>,
    own: Vec<IpAddr>,
    identity: Identity,
    config: Config,
) {
    let number = number_of_server(&identity);
    let local = port
        .endpoint
        .local_addr()
        .map(|local| local.port())
        .unwrap_or_default();
    let _announcement = Announcement::of(number, local).inspect_err(
        |error| warn!(%error, "paired machines on this network do not find this server"),
    );
    let Some(relay) = relay else {
        return std::future::pending().await;
    };
    loop {
        let wanted = Some(wanted(number, &identity));
        match Placement::take(
            port.clone(),
            relay.clone(),
            own.clone(),
            config.clone(),
            wanted,
        )
        .await
        {
            Ok(_placement) => {
                info!("paired machines find this server at the relay");
                return std::future::pending().await;
            }
            Err(error) => {
                warn!(%error, "the relay does not help to find this server; it is tried again")
            }
        }
        sleep(RETRY_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(key: u8) -> Peer {
        Peer {
            name: "bob".parse().unwrap(),
            key_id: KeyId([key; 32]),
            secret: [9; 32],
            number: NUMBERS.start,
        }
    }

    #[test]
    fn both_ends_come_to_the_same_meeting_place_and_each_direction_has_its_own() {
        let alice = peer(1);
        let bob = peer(2);
        // Bob's file names alice, and alice's bob.
        let sent = credential(&bob, alice.key_id);
        let expected = sent_by(&alice);
        assert_eq!(
            (sent.number, &sent.secret),
            (expected.number, &expected.secret)
        );
        assert_eq!(
            (sent.key_id, expected.key_id),
            (Some(bob.key_id), Some(alice.key_id))
        );
        assert_ne!(sent.number, sent_by(&bob).number);
        assert!(NUMBERS.contains(&sent.number));
    }

    #[test]
    fn a_server_has_one_number_and_claims_it_as_its_own() {
        let one = Identity::generate().unwrap();
        let other = Identity::generate().unwrap();
        let number = number_of_server(&one);
        assert!(NUMBERS.contains(&number));
        assert_eq!(number, number_of_server(&one));
        assert_eq!(wanted(number, &one).claim, wanted(number, &one).claim);
        assert_ne!(wanted(number, &one).claim, wanted(number, &other).claim);
    }
}
