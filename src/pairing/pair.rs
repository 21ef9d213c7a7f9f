//! Paired machines: after one introduction by a code they find each other without a code.
//!
//! An introduction leaves both machines with the other's key and a shared secret. The number and the password of a transfer
//! between them follow from that secret, so no third machine knows for which machine a number is announced. A machine's
//! server has a number of its own, which it gives to the machines that it is paired with.

use std::net::IpAddr;
use std::time::Duration;

use data_encoding::BASE64_NOPAD;
use tokio::time::sleep;
use tracing::{info, warn};

use super::code::Credential;
use super::discovery::Announcement;
use super::placement::{Placement, RequestedNumber};
use super::rendezvous::{RelayAt, RelayClient};
use super::route::{PeerDialer, Whereabouts};
use crate::auth::identity::{Identity, KeyId};
use crate::auth::peers::Peer;
use crate::auth::trust::ServerTrust;
use crate::client::Client;
use crate::config::Config;
use crate::error::Result;
use crate::net::endpoint::Port;
// They are apart from those of codes. There are 90 million, so two machines rarely have the same.
use crate::protocol::PAIRED_NUMBERS as NUMBERS;

// Contexts of BLAKE3's key derivation.
const NUMBER_CONTEXT: &str = "haul/1 pair: number";
const SECRET_CONTEXT: &str = "haul/1 pair: secret";
const SERVER_CONTEXT: &str = "haul/1 pair: a server's number";
const CLAIM_CONTEXT: &str = "haul/1 pair: a claim to a number";
/// Time before a server tries a relay again that failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(30);

/// The result of a pairing: what this machine remembers of the other.
#[derive(Clone, PartialEq, Eq)]
pub struct Paired {
    /// The other end's key.
    pub key_id: KeyId,
    /// Known only to the two machines.
    pub secret: [u8; 32],
    /// The number under which the other end's server can be found.
    pub number: u32,
}

/// Does not show the secret.
impl std::fmt::Debug for Paired {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Paired({})", self.key_id)
    }
}

/// The credential for a transfer between two paired machines, of which `sender` is one.
pub(super) fn credential(peer: &Peer, sender: KeyId) -> Credential {
    let secret = blake3::derive_key(SECRET_CONTEXT, &peer.secret);
    let number = number_of(NUMBER_CONTEXT, &[&peer.secret, &sender.0]);
    Credential {
        number,
        secret: BASE64_NOPAD.encode(&secret),
        key_id: Some(peer.key_id),
    }
}

/// The credential for receiving from a paired machine.
pub fn sent_by(peer: &Peer) -> Credential {
    credential(peer, peer.key_id)
}

/// The number under which paired machines find this machine's server.
pub fn number_of_server(identity: &Identity) -> u32 {
    number_of(SERVER_CONTEXT, &[identity.private_key().secret_der()])
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

/// A number with this machine's claim to it. The claim is always the same, so a relay gives the number back.
pub(super) fn claimed_number(number: u32, identity: &Identity) -> RequestedNumber {
    let mut hasher = blake3::Hasher::new_derive_key(CLAIM_CONTEXT);
    hasher
        .update(&number.to_le_bytes())
        .update(identity.private_key().secret_der());
    let mut claim = [0; 16];
    hasher.finalize_xof().fill(&mut claim);
    RequestedNumber { number, claim }
}

/// Connects to the server of a paired machine, on this network or with the help of a relay. Only a server with the key from
/// the pairing is accepted.
///
/// # Errors
/// [`Error::Lost`](crate::error::Error::Lost) when it is not found, and the errors of connecting.
pub async fn connect(
    peer: &Peer,
    relay: Option<RelayAt>,
    own: Vec<IpAddr>,
    identity: &Identity,
    config: &Config,
) -> Result<Client> {
    let whereabouts = Whereabouts {
        relay,
        own,
        ..Whereabouts::default()
    };
    let trust = ServerTrust {
        pin: Some(peer.key_id),
        ..ServerTrust::default()
    };
    let dialer = PeerDialer::new(whereabouts, peer.number, identity, config)?;
    let first = dialer.connect(&trust).await?;
    Client::over(first, dialer.dial(trust), config)
}

/// Lets paired machines find this machine's server, on this network and at the relay if there is one. It runs until it is
/// dropped.
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
        |error| warn!(%error, "paired machines on this network cannot find this server"),
    );
    let Some(relay) = relay else {
        return std::future::pending().await;
    };
    let client = RelayClient {
        port,
        relay,
        own,
        config,
    };
    loop {
        let requested = Some(claimed_number(number, &identity));
        match Placement::take(client.clone(), requested).await {
            Ok(_placement) => {
                info!("paired machines can find this server at the relay");
                return std::future::pending().await;
            }
            Err(error) => {
                warn!(%error, "paired machines cannot find this server at the relay yet; trying again")
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
    fn both_ends_derive_one_credential_for_each_direction() {
        let alice = peer(1);
        let bob = peer(2);
        // Bob's peers file holds alice, and alice's holds bob.
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
    fn a_server_keeps_its_number_and_its_claim() {
        let one = Identity::generate().unwrap();
        let other = Identity::generate().unwrap();
        let number = number_of_server(&one);
        assert!(NUMBERS.contains(&number));
        assert_eq!(number, number_of_server(&one));
        let claim = |identity| claimed_number(number, identity).claim;
        assert_eq!(claim(&one), claim(&one));
        assert_ne!(claim(&one), claim(&other));
    }
}
