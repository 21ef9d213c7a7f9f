//! Who can be found at a relay: numbers and introductions.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use quinn::Connection;
use tokio::sync::mpsc;
use tracing::{debug, info};

use super::connections::Connections;
use super::forward::Forwarder;
use super::limits::{NetworkLimits, Tries};
use super::pairs::Party;
use super::shares::{Networks, Shares};
use crate::auth::random::random;
use crate::error::lock::lock;
use crate::error::{Code, Reason, Result};
use crate::net::address::canonical;
use crate::net::stream::varint_of;
use crate::protocol::{Address, Forward, Found, PAIRED_NUMBERS, Place, Seek};

/// Range of the first numbers: six digits, as people know them from sign-in codes and can read them out in two groups of
/// three. With ten senders at the relay, an address that tries random numbers finds one in 75 hours; with four digits it
/// took 45 minutes.
const FIRST_NUMBERS: std::ops::Range<u32> = 100_000..1_000_000;
/// End of the numbers that the relay draws: a code never takes one of a paired machine away.
const MAX_DRAWN: u32 = PAIRED_NUMBERS.start;
/// The range grows to seven digits when more than one number of so many is in use, so that few guesses hit.
const NUMBERS_PER_PLACE: u64 = 100;
/// Numbers that clients may claim. Those below belong to codes without a relay. A sender that has lost a relay of an
/// earlier version may claim its four digits again.
const CLAIMABLE: std::ops::Range<u32> = 1_000..PAIRED_NUMBERS.end;

pub(super) struct RelayState {
    /// Digest of the token. Comparing digests takes the same time for every wrong token.
    token: Option<blake3::Hash>,
    places: Mutex<Places>,
    requests: Tries,
    pub(super) connections: Arc<Connections>,
    pub(super) forwarder: Arc<Forwarder>,
}

/// The senders that can be found, and how many of them each network has.
struct Places {
    senders: HashMap<u32, RegisteredSender>,
    /// The number of each.
    slots: Shares<u32>,
}

/// A sender that can be found.
struct RegisteredSender {
    networks: Networks,
    slot: u64,
    claim: [u8; 16],
    client: Client,
    addresses: Vec<Address>,
    notify: mpsc::Sender<Found>,
}

/// A connected client, with the IP that QUIC validated in the handshake (RFC 9000, section 8.1).
#[derive(Debug, Clone)]
pub(super) struct Client {
    /// Never reused, unlike quinn's `stable_id`.
    pub(super) id: u64,
    pub(super) connection: Connection,
    pub(super) ip: IpAddr,
}

impl Client {
    /// Returns the client as the forwarder identifies it.
    fn party(&self) -> Party {
        Party {
            id: self.id,
            ip: self.ip,
        }
    }

    /// Returns the client's observed address. If its IP has changed, closes the connection and asks the client to
    /// connect again: quinn adopts a new address before it is validated (RFC 9000, section 9.3), and a datagram's
    /// source may be forged.
    fn observed_address(&self) -> Result<Address, Reason> {
        let observed = canonical(self.connection.remote_address());
        if observed.ip() != self.ip {
            let text = "the address has changed; connect again";
            self.connection
                .close(varint_of(Code::Stopping), text.as_bytes());
            return Err(Reason::new(Code::Stopping, text));
        }
        Ok(Address(observed))
    }
}

/// Reserves a number until dropped.
pub(super) struct ReservedNumber {
    state: Arc<RelayState>,
    pub(super) number: u32,
    notify: mpsc::WeakSender<Found>,
}

impl Drop for ReservedNumber {
    fn drop(&mut self) {
        let mut places = lock(&self.state.places);
        // A newer connection with the same claim may own the number now.
        let own = |sender: &RegisteredSender| {
            self.notify
                .upgrade()
                .is_some_and(|own| own.same_channel(&sender.notify))
        };
        if places.senders.get(&self.number).is_some_and(own) {
            places.remove(self.number);
        }
    }
}

impl Places {
    fn remove(&mut self, number: u32) {
        if let Some(sender) = self.senders.remove(&number) {
            self.slots.release(sender.networks, sender.slot);
        }
    }

    /// Picks the number for a sender: the one that it asks for, if no other claim has it.
    fn number_for(&self, place: &Place) -> Result<u32, Reason> {
        let is_its_own = |number: &u32| {
            let existing = self.senders.get(number);
            existing.is_none_or(|existing| existing.claim == place.claim)
        };
        let requested = place.number.filter(|number| CLAIMABLE.contains(number));
        match requested.filter(is_its_own) {
            Some(number) => Ok(number),
            None => free_number(self.senders.len(), |number| {
                !self.senders.contains_key(&number)
            }),
        }
    }

    /// Takes a slot for a sender, if necessary from the network that has the most.
    fn take_slot(&mut self, networks: Networks, number: u32) -> Result<u64, Reason> {
        let Some(slot) = self.slots.take(networks, number) else {
            let text = "the relay has no room for more senders of this network; try again later";
            return Err(Reason::new(Code::Busy, text));
        };
        if let Some(other) = slot.evicted {
            debug!(number = other, "the largest network gives up a number");
            // Its stream ends with the sender's channel.
            self.senders.remove(&other);
        }
        Ok(slot.id)
    }
}

impl RelayState {
    pub(super) fn new(
        token: Option<&str>,
        connections: Connections,
        places: usize,
        limits: NetworkLimits,
        forwarder: Forwarder,
    ) -> Self {
        Self {
            token: token.map(|token| blake3::hash(token.as_bytes())),
            places: Mutex::new(Places {
                senders: HashMap::new(),
                slots: Shares::new(limits.places(places)),
            }),
            requests: limits.requests(),
            connections: Arc::new(connections),
            forwarder: Arc::new(forwarder),
        }
    }

    /// Forgets networks without recent tries.
    pub(super) fn forget(&self) {
        self.requests.forget();
        self.connections.forget();
    }

    /// Checks the attempt limit and the token; returns the client's observed address.
    pub(super) fn admit(&self, client: &Client, token: Option<&str>) -> Result<Address, Reason> {
        let seen = client.observed_address()?;
        if !self.requests.admit(Networks::of(client.ip)) {
            return Err(Reason::new(
                Code::Busy,
                "too many attempts from this address or network; wait a minute",
            ));
        }
        match &self.token {
            Some(wanted) if token.is_none_or(|token| blake3::hash(token.as_bytes()) != *wanted) => {
                Err(Reason::new(
                    Code::NotAdmitted,
                    "this relay needs a token, and the one given is wrong or missing",
                ))
            }
            _ => Ok(seen),
        }
    }

    /// Gives a client a number, its previous one if possible.
    pub(super) fn register(
        self: &Arc<Self>,
        client: &Client,
        place: Place,
        notify: mpsc::Sender<Found>,
    ) -> Result<ReservedNumber, Reason> {
        let networks = Networks::of(client.ip);
        let mut places = lock(&self.places);
        let number = places.number_for(&place)?;
        // An earlier connection with the same claim gives its slot back.
        places.remove(number);
        let slot = places.take_slot(networks, number)?;
        let own = notify.downgrade();
        let Place {
            claim, addresses, ..
        } = place;
        places.senders.insert(
            number,
            RegisteredSender {
                networks,
                slot,
                claim,
                client: client.clone(),
                addresses,
                notify,
            },
        );
        drop(places);
        info!(number, "placed");
        Ok(ReservedNumber {
            state: self.clone(),
            number,
            notify: own,
        })
    }

    /// Introduces two ends to each other.
    pub(super) fn introduce(
        &self,
        client: &Client,
        seen: Address,
        seek: &Seek,
    ) -> Result<Found, Reason> {
        let not_found = || Reason::new(Code::NotFound, "no sender has this number");
        let places = lock(&self.places);
        let sender = places.senders.get(&seek.number).ok_or_else(not_found)?;
        let sender_address = sender.client.observed_address().map_err(|_| not_found())?;
        // Reserve the notice before making a pair: the sender would not bind a pair that it never hears about.
        let notify = sender.notify.try_reserve();
        let notify = notify.map_err(|_| {
            Reason::new(
                Code::Busy,
                "too many receivers seek this number; wait a moment",
            )
        })?;
        let pair = if seek.forward {
            self.forwarder.pair([sender.client.party(), client.party()])
        } else {
            None
        };
        let [to_sender, to_receiver] = pair.map_or([None, None], |(port, tokens)| {
            tokens.map(|token| Some(Forward { port, token }))
        });
        info!(
            number = seek.number,
            forwarded = to_receiver.is_some(),
            "found"
        );
        notify.send(Found {
            addresses: addresses(seen, &seek.addresses, seek.number),
            forward: to_sender,
        });
        Ok(Found {
            addresses: addresses(sender_address, &sender.addresses, seek.number),
            forward: to_receiver,
        })
    }
}

/// Lists an end's observed address, then those that it reports if the other end has proved something. Whoever guesses the
/// number of a code must not learn addresses of private networks; the two ends of a code exchange these once they have
/// proved to each other that they know the words. The number of paired machines derives from a secret and is a proof.
fn addresses(seen: Address, own: &[Address], number: u32) -> Vec<Address> {
    let reported = own.iter().copied();
    let known = reported.filter(|address| *address == seen || PAIRED_NUMBERS.contains(&number));
    std::iter::once(seen).chain(known).collect()
}

/// Picks a number that is free, with as few digits as leave most numbers free.
fn free_number(in_use: usize, is_free: impl Fn(u32) -> bool) -> Result<u32, Reason> {
    let many = in_use as u64 * NUMBERS_PER_PLACE;
    let end = match many <= u64::from(FIRST_NUMBERS.end - FIRST_NUMBERS.start) {
        true => FIRST_NUMBERS.end,
        false => MAX_DRAWN,
    };
    for _ in 0..100 {
        let drawn = random().map_err(|_| Reason::from(Code::Internal))?;
        let number = FIRST_NUMBERS.start + u32::from_le_bytes(drawn) % (end - FIRST_NUMBERS.start);
        if is_free(number) {
            return Ok(number);
        }
    }
    Err(Reason::new(
        Code::Busy,
        "no number is free; try again later",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_private_networks_are_only_for_paired_machines() {
        let [seen, own] = ["203.0.113.7:4433", "192.168.1.7:4433"]
            .map(|address| Address(address.parse().unwrap()));
        for number in [1_000, 123_456, 9_999_999] {
            assert_eq!(addresses(seen, &[own], number), [seen]);
            // What the relay sees anyway, and so that both ends know that there is no NAT.
            assert_eq!(addresses(seen, &[own, seen], number), [seen, seen]);
        }
        assert_eq!(addresses(seen, &[own], 12_345_678), [seen, own]);
    }

    #[test]
    fn numbers_have_six_digits_until_one_in_a_hundred_is_in_use() {
        let drawn = |in_use| (0..200).map(move |_| free_number(in_use, |_| true).unwrap());
        assert!(drawn(0).all(|number| number.to_string().len() == 6));
        assert!(drawn(9_000).all(|number| number.to_string().len() == 6));
        assert!(drawn(9_001).any(|number| number.to_string().len() == 7));
        // Eight digits are those of paired machines.
        assert!(drawn(1_000_000).all(|number| (100_000..MAX_DRAWN).contains(&number)));
    }
}
