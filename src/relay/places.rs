//! Who is connected to a relay and can be found: attempt and connection limits, numbers, and introductions.

use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};

use governor::clock::DefaultClock;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};
use quinn::Connection;
use tokio::sync::mpsc;
use tracing::info;

use super::address::{canonical, network};
use super::forward::Forwarder;
use super::pairs::Party;
use crate::auth::random::random;
use crate::error::lock::lock;
use crate::error::{Code, Reason, Result};
use crate::net::stream::varint_of;
use crate::protocol::{Address, Forward, Found, Place, Seek};

/// Connections from one address, or IPv6 network of 64 bits: several people behind one NAT.
const MAX_ADDRESS_CONNECTIONS: usize = 64;
/// Connections in all: each takes some tens of kilobytes, and up to 64 KiB more while its peer does not read.
const MAX_CONNECTIONS: usize = 20_000;
/// Attempts of one address to find or get a number, at once and then each minute.
const ATTEMPT_LIMIT: NonZeroU32 = NonZeroU32::new(20).unwrap();
/// Range of the first numbers; it grows tenfold whenever a third is in use. Numbers of codes without a relay have
/// three digits, so that the two kinds never collide.
const FIRST_NUMBERS: std::ops::Range<u32> = 1_000..10_000;
/// End of all ranges.
const MAX_NUMBER: u32 = 100_000_000;

type Limiter = RateLimiter<IpAddr, HashMapStateStore<IpAddr>, DefaultClock>;

pub(super) struct RelayState {
    /// Digest of the token. Comparing digests takes the same time for every wrong token.
    token: Option<blake3::Hash>,
    places: Mutex<HashMap<u32, RegisteredSender>>,
    max_places: usize,
    pub(super) attempts: Limiter,
    connected: Mutex<ConnectionCounts>,
    pub(super) forwarder: Arc<Forwarder>,
}

/// Connections in all, and for each address.
#[derive(Default)]
struct ConnectionCounts {
    all: usize,
    for_address: HashMap<IpAddr, usize>,
}

/// A sender that can be found.
struct RegisteredSender {
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

/// A connection that counts against the limits until dropped.
pub(super) struct ConnectionSlot {
    state: Arc<RelayState>,
    network: IpAddr,
}

impl ConnectionSlot {
    pub(super) fn add(state: &Arc<RelayState>, network: IpAddr) -> Option<Self> {
        let mut connected = lock(&state.connected);
        if connected.all >= MAX_CONNECTIONS
            || connected
                .for_address
                .get(&network)
                .is_some_and(|n| *n >= MAX_ADDRESS_CONNECTIONS)
        {
            return None;
        }
        connected.all += 1;
        *connected.for_address.entry(network).or_default() += 1;
        Some(Self {
            state: state.clone(),
            network,
        })
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        let mut connected = lock(&self.state.connected);
        connected.all -= 1;
        if let Some(count) = connected.for_address.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                connected.for_address.remove(&self.network);
            }
        }
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
        if places.get(&self.number).is_some_and(own) {
            places.remove(&self.number);
        }
    }
}

impl RelayState {
    pub(super) fn new(token: Option<&str>, max_places: usize, forwarder: Forwarder) -> Self {
        Self {
            token: token.map(|token| blake3::hash(token.as_bytes())),
            places: Mutex::default(),
            max_places,
            attempts: RateLimiter::hashmap(Quota::per_minute(ATTEMPT_LIMIT)),
            connected: Mutex::default(),
            forwarder: Arc::new(forwarder),
        }
    }

    /// Checks the attempt limit and the token; returns the client's observed address.
    pub(super) fn admit(&self, client: &Client, token: Option<&str>) -> Result<Address, Reason> {
        let seen = client.observed_address()?;
        if self.attempts.check_key(&network(client.ip)).is_err() {
            return Err(Reason::new(
                Code::Busy,
                "too many attempts from this address; wait a minute",
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
        let mut places = lock(&self.places);
        let previous = place.number.filter(|number| {
            places
                .get(number)
                .is_none_or(|existing| existing.claim == place.claim)
        });
        if previous.is_none_or(|number| !places.contains_key(&number))
            && places.len() >= self.max_places
        {
            return Err(Reason::new(
                Code::Busy,
                "the relay is full; try again later",
            ));
        }
        let number =
            match previous.filter(|number| (FIRST_NUMBERS.start..MAX_NUMBER).contains(number)) {
                Some(number) => number,
                None => free_number(&places)?,
            };
        let own = notify.downgrade();
        let Place {
            claim, addresses, ..
        } = place;
        places.insert(
            number,
            RegisteredSender {
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
        let sender = places.get(&seek.number).ok_or_else(not_found)?;
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
            addresses: addresses(seen, &seek.addresses),
            forward: to_sender,
        });
        Ok(Found {
            addresses: addresses(sender_address, &sender.addresses),
            forward: to_receiver,
        })
    }
}

/// Lists an end's observed address, then those that it reported.
fn addresses(seen: Address, own: &[Address]) -> Vec<Address> {
    std::iter::once(seen).chain(own.iter().copied()).collect()
}

/// Picks a free number, with as few digits as leave most numbers free.
fn free_number(places: &HashMap<u32, RegisteredSender>) -> Result<u32, Reason> {
    let mut end = FIRST_NUMBERS.end;
    while places.len() as u64 * 3 > u64::from(end - FIRST_NUMBERS.start) && end < MAX_NUMBER {
        end *= 10;
    }
    for _ in 0..100 {
        let drawn = random().map_err(|_| Reason::from(Code::Internal))?;
        let number = FIRST_NUMBERS.start + u32::from_le_bytes(drawn) % (end - FIRST_NUMBERS.start);
        if !places.contains_key(&number) {
            return Ok(number);
        }
    }
    Err(Reason::new(
        Code::Busy,
        "no number is free; try again later",
    ))
}
