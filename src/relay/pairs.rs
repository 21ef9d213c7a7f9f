//! The pairs of a relay: their ends, addresses and limits. No I/O.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tracing::{debug, info};

use super::queue::Queue;
use super::shares::{Networks, Shares, SlotLimits};
use super::socket::Datagrams;
use crate::net::address::canonical;
use crate::protocol::BIND;
use crate::protocol::rate::Rate;

/// Silence of one end after which a pair ends; each end binds its address every 5 s while it needs the pair.
/// Otherwise one end could make the relay send to a peer that has left, and pairs that are no longer used would leave
/// no room for others from the same network.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Time in which both ends must bind their addresses.
const UNBOUND_TIMEOUT: Duration = Duration::from_secs(15);
pub(super) const TOKEN_SIZE: usize = 32;

/// The limits of what a relay forwards.
#[derive(Debug, Clone)]
pub struct Allowance {
    /// Pairs at the same time.
    pub pairs: usize,
    /// Rate of each pair, both directions together; `None` is unlimited. Excess datagrams wait for up to 50 ms.
    pub rate: Option<Rate>,
    /// Bytes that a pair may transfer in all, both directions together.
    pub bytes: u64,
    /// Lifetime of a pair.
    pub time: Duration,
}

/// Limits unless the operator sets others.
impl Default for Allowance {
    fn default() -> Self {
        Self {
            pairs: 256,
            // 100 Mbit/s.
            rate: Rate::from_bytes(12_500_000),
            bytes: 100 << 30,
            time: Duration::from_secs(24 * 3600),
        }
    }
}

/// A client that becomes an end: its connection to the relay, and its IP.
#[derive(Debug, Clone, Copy)]
pub(super) struct Party {
    /// The connection's id, which is never reused.
    pub(super) id: u64,
    /// The IP that QUIC validated. An end may bind only addresses with this IP; the port may differ, since some NATs
    /// use another port for each destination.
    pub(super) ip: IpAddr,
}

/// The tokens of a pair, one for each end.
pub(super) type Tokens = [[u8; TOKEN_SIZE]; 2];

/// One end of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct End {
    /// The pair's number.
    pair: u64,
    /// The index in [`Pair::ends`].
    index: usize,
}

/// The source of datagrams: the port of the relay that they arrive at, and the address that they come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Source {
    /// Index of the port.
    port: usize,
    address: SocketAddr,
}

pub(super) struct PairTable {
    next_number: u64,
    pairs: HashMap<u64, Pair>,
    /// The pairs that each network has asked for.
    slots: Shares<u64>,
    tokens: HashMap<[u8; TOKEN_SIZE], End>,
    addresses: HashMap<Source, End>,
}

struct Pair {
    /// Index of the port.
    port: usize,
    slot: u64,
    ends: [PairEnd; 2],
    since: Instant,
    bytes: u64,
    /// Datagrams that wait; `None` without a rate limit.
    queue: Option<Queue>,
}

struct PairEnd {
    party: Party,
    token: [u8; TOKEN_SIZE],
    address: Option<SocketAddr>,
    /// When its last datagram arrived.
    last_seen: Instant,
}

impl Pair {
    /// Whether these are its ends, in the same order.
    fn is_between(&self, ends: &[Party; 2]) -> bool {
        self.ends.each_ref().map(|end| end.party.id) == ends.map(|end| end.id)
    }

    /// Whether the pair has used up its bytes or its time.
    fn is_over(&self, now: Instant, allowance: &Allowance) -> bool {
        now.duration_since(self.since) > allowance.time || self.bytes >= allowance.bytes
    }

    /// The networks of the end that has asked for the pair.
    fn asked_from(&self) -> Networks {
        Networks::of(self.ends[1].party.ip)
    }
}

impl PairTable {
    pub(super) fn new(limits: SlotLimits) -> Self {
        Self {
            next_number: 0,
            pairs: HashMap::new(),
            slots: Shares::new(limits),
            tokens: HashMap::new(),
            addresses: HashMap::new(),
        }
    }

    /// Returns the port and tokens of the pair of these ends, if it is still valid, and keeps it alive.
    pub(super) fn existing(
        &mut self,
        ends: &[Party; 2],
        now: Instant,
        allowance: &Allowance,
    ) -> Option<(usize, Tokens)> {
        let pair = self
            .pairs
            .values_mut()
            .find(|pair| pair.is_between(ends) && !pair.is_over(now, allowance))?;
        let tokens = pair.ends.each_mut().map(|end| {
            end.last_seen = now;
            end.token
        });
        Some((pair.port, tokens))
    }

    /// Adds a pair, if necessary in place of one of the network that has asked for the most. Returns whether there is room
    /// for it.
    pub(super) fn insert(
        &mut self,
        port: usize,
        ends: [Party; 2],
        tokens: Tokens,
        now: Instant,
        queue: Option<Queue>,
    ) -> bool {
        let number = self.next_number;
        let Some(slot) = self.slots.take(Networks::of(ends[1].ip), number) else {
            return false;
        };
        self.next_number += 1;
        if let Some(other) = slot.evicted {
            self.remove(other);
        }
        let ends = std::array::from_fn(|index| {
            let end = End {
                pair: number,
                index,
            };
            self.tokens.insert(tokens[index], end);
            PairEnd {
                party: ends[index],
                token: tokens[index],
                address: None,
                last_seen: now,
            }
        });
        self.pairs.insert(
            number,
            Pair {
                port,
                slot: slot.id,
                ends,
                since: now,
                bytes: 0,
                queue,
            },
        );
        true
    }

    /// Returns the port with the fewest pairs on which neither end has one.
    pub(super) fn least_used_port(&self, ends: &[Party; 2], ports: usize) -> Option<usize> {
        let shares_an_end = |pair: &Pair| {
            pair.ends
                .iter()
                .any(|existing| ends.iter().any(|end| end.id == existing.party.id))
        };
        let mut load = vec![Some(0_usize); ports];
        for pair in self.pairs.values() {
            load[pair.port] = load[pair.port]
                .filter(|_| !shares_an_end(pair))
                .map(|pairs| pairs + 1);
        }
        load.iter()
            .enumerate()
            .filter_map(|(port, load)| load.map(|load| (load, port)))
            .min()
            .map(|(_, port)| port)
    }

    /// Takes datagrams: binds an address, queues them, or returns where to send them at once. A datagram that may
    /// bind an address must come alone.
    pub(super) fn take(
        &mut self,
        datagrams: Datagrams,
        port: usize,
        from: SocketAddr,
        allowance: &Allowance,
    ) -> Option<SocketAddr> {
        let source = Source {
            port,
            address: from,
        };
        if let Some((&BIND, token)) = datagrams.bytes.split_first()
            && let Some(&end) = <&[u8; TOKEN_SIZE]>::try_from(token)
                .ok()
                .and_then(|token| self.tokens.get(token))
        {
            self.bind(end, source);
            return None;
        }
        let end = *self.addresses.get(&source)?;
        let pair = self.pairs.get_mut(&end.pair)?;
        let to = pair.ends[1 - end.index].address?;
        pair.ends[end.index].last_seen = Instant::now();
        if pair.bytes >= allowance.bytes {
            return None;
        }
        pair.bytes += datagrams.bytes.len() as u64;
        match &pair.queue {
            Some(queue) => queue.put(datagrams, to),
            None => return Some(to),
        }
        None
    }

    /// Binds an end to an address.
    fn bind(&mut self, end: End, source: Source) {
        let from = source.address;
        let pair = self.pairs.get_mut(&end.pair);
        let Some(pair) = pair.filter(|pair| pair.port == source.port) else {
            return;
        };
        let this = &mut pair.ends[end.index];
        if canonical(from).ip() != this.party.ip {
            return debug!(%from, validated = %this.party.ip, "cannot bind an address: its IP was not validated");
        }
        this.last_seen = Instant::now();
        if this.address == Some(from) {
            return;
        }
        let before = this.address.replace(from);
        // An address belongs to the end that bound it last: a sender that serves several receivers in turn has only
        // one.
        if let Some(other) = self.addresses.insert(source, end)
            && let Some(pair) = self.pairs.get_mut(&other.pair)
            && other != end
        {
            pair.ends[other.index].address = None;
        }
        if let Some(before) = before {
            let before = Source {
                address: before,
                ..source
            };
            self.release(before, end);
        }
        debug!(number = end.pair, end = end.index, %from, "bound");
    }

    /// Unbinds an address, if it still belongs to this end.
    fn release(&mut self, source: Source, of: End) {
        if self.addresses.get(&source) == Some(&of) {
            self.addresses.remove(&source);
        }
    }

    /// Removes the pairs that have ended: silent, never bound, or over their limits.
    pub(super) fn sweep(&mut self, now: Instant, allowance: &Allowance) {
        let ended = |pair: &Pair| {
            let idle = if pair.ends.iter().all(|end| end.address.is_some()) {
                IDLE_TIMEOUT
            } else {
                UNBOUND_TIMEOUT
            };
            let silent = pair
                .ends
                .iter()
                .any(|end| now.duration_since(end.last_seen) > idle);
            silent || pair.is_over(now, allowance)
        };
        let numbers: Vec<_> = self
            .pairs
            .iter()
            .filter(|(_, pair)| ended(pair))
            .map(|(number, _)| *number)
            .collect();
        for number in numbers {
            self.remove(number);
        }
    }

    /// Removes a pair: datagrams of its ends are not forwarded any more.
    fn remove(&mut self, number: u64) {
        let Some(pair) = self.pairs.remove(&number) else {
            return;
        };
        self.slots.release(pair.asked_from(), pair.slot);
        for (index, end) in pair.ends.iter().enumerate() {
            self.tokens.remove(&end.token);
            if let Some(address) = end.address {
                let port = pair.port;
                let end = End {
                    pair: number,
                    index,
                };
                self.release(Source { port, address }, end);
            }
        }
        info!(
            bytes = pair.bytes,
            seconds = pair.since.elapsed().as_secs(),
            "a pair has ended"
        );
    }
}

#[cfg(test)]
mod tests;
