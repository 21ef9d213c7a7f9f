//! The pairs of a relay: their ends, addresses, queues and limits. No I/O. A third of the file is tests.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::udp::EcnCodepoint;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tracing::{debug, info};

use super::address::{canonical, network};
use super::socket::Datagrams;
use crate::protocol::BIND;
use crate::protocol::rate::Rate;

/// Silence of one end after which a pair ends; each end binds its address every 5 s while it needs the pair.
/// Otherwise one end could make the relay send to a peer that has left, and pairs that are no longer used would leave
/// no room for others from the same network.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Time in which both ends must bind their addresses.
const UNBOUND_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest time that a datagram waits for the rate of its pair. A short queue slows both ends down like any
/// bottleneck; dropping all excess would lose a third.
const QUEUE_INTERVAL: Duration = Duration::from_millis(50);
/// Smallest size of a queue in bytes: 32 usual datagrams.
const MIN_QUEUE_SIZE: usize = 32 * 1_328;
/// Largest size of a queue in bytes: 1,024 usual datagrams.
const MAX_QUEUE_SIZE: usize = 1_024 * 1_328;
/// Bytes that a datagram takes in a queue in addition to its own, so that empty ones are not free.
const DATAGRAM_OVERHEAD: usize = 128;
pub(super) const TOKEN_SIZE: usize = 32;
/// Pairs requested from one network at the same time, so that none takes all the room.
const MAX_NETWORK_PAIRS: usize = 16;

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

/// A pair's number, and the index of one end.
type End = (u64, usize);

#[derive(Default)]
pub(super) struct PairTable {
    next_number: u64,
    pairs: HashMap<u64, Pair>,
    tokens: HashMap<[u8; TOKEN_SIZE], End>,
    /// Keyed by the port's index and the address.
    addresses: HashMap<(usize, SocketAddr), End>,
}

struct Pair {
    /// Index of the port.
    port: usize,
    ends: [PairEnd; 2],
    since: Instant,
    bytes: u64,
    /// Datagrams that wait; `None` without a rate limit.
    queue: Option<Queue>,
}

/// The input of a pair's queue. The queue's task ends when this is dropped.
pub(super) struct Queue {
    room: Arc<Semaphore>,
    to: mpsc::UnboundedSender<Waiting>,
}

/// Datagrams that wait for their turn.
pub(super) struct Waiting {
    pub(super) bytes: Vec<u8>,
    /// See [`Datagrams`].
    pub(super) length: usize,
    pub(super) ecn: Option<EcnCodepoint>,
    pub(super) to: SocketAddr,
    pub(super) _room: OwnedSemaphorePermit,
}

struct PairEnd {
    party: Party,
    token: [u8; TOKEN_SIZE],
    address: Option<SocketAddr>,
    /// When its last datagram arrived.
    last_seen: Instant,
}

impl Queue {
    /// A queue for a pair with this rate, and its output.
    pub(super) fn new(rate: Rate) -> (Self, mpsc::UnboundedReceiver<Waiting>) {
        let bytes = (rate.bytes() as f64 * QUEUE_INTERVAL.as_secs_f64()) as usize;
        let room = Arc::new(Semaphore::new(bytes.clamp(MIN_QUEUE_SIZE, MAX_QUEUE_SIZE)));
        let (to, waiting) = mpsc::unbounded_channel();
        (Self { room, to }, waiting)
    }

    /// Queues the datagrams that fit; the others are lost, as on any congested path.
    fn put(&self, datagrams: Datagrams<'_>, to: SocketAddr) {
        // Only one task queues datagrams, so the room cannot shrink meanwhile.
        let fitting =
            datagrams.first(self.room.available_permits() / (datagrams.length + DATAGRAM_OVERHEAD));
        let Datagrams { bytes, length, ecn } = fitting;
        let count = fitting.count();
        let cost = u32::try_from(bytes.len() + count * DATAGRAM_OVERHEAD).unwrap_or(u32::MAX);
        if count > 0
            && let Ok(room) = self.room.clone().try_acquire_many_owned(cost)
        {
            // Fails only when the process ends.
            let _ = self.to.send(Waiting {
                bytes: bytes.to_vec(),
                length,
                ecn,
                to,
                _room: room,
            });
        }
    }
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

    /// Whether the pair was requested from this network.
    fn is_of(&self, asking: IpAddr) -> bool {
        network(self.ends[1].party.ip) == asking
    }
}

impl PairTable {
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

    /// Whether one more pair may be requested from this network.
    pub(super) fn has_room(&self, network: IpAddr, allowance: &Allowance) -> bool {
        let of_network = self
            .pairs
            .values()
            .filter(|pair| pair.is_of(network))
            .count();
        self.pairs.len() < allowance.pairs && of_network < MAX_NETWORK_PAIRS
    }

    pub(super) fn insert(
        &mut self,
        port: usize,
        ends: [Party; 2],
        tokens: Tokens,
        now: Instant,
        queue: Option<Queue>,
    ) {
        let number = self.next_number;
        self.next_number += 1;
        let ends = std::array::from_fn(|end| {
            self.tokens.insert(tokens[end], (number, end));
            PairEnd {
                party: ends[end],
                token: tokens[end],
                address: None,
                last_seen: now,
            }
        });
        self.pairs.insert(
            number,
            Pair {
                port,
                ends,
                since: now,
                bytes: 0,
                queue,
            },
        );
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
        if let Some((&BIND, token)) = datagrams.bytes.split_first()
            && let Some(&end) = <&[u8; TOKEN_SIZE]>::try_from(token)
                .ok()
                .and_then(|token| self.tokens.get(token))
        {
            self.bind(end, port, from);
            return None;
        }
        let (number, end) = *self.addresses.get(&(port, from))?;
        let pair = self.pairs.get_mut(&number)?;
        let to = pair.ends[1 - end].address?;
        pair.ends[end].last_seen = Instant::now();
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
    fn bind(&mut self, end: End, port: usize, from: SocketAddr) {
        let (number, end) = end;
        let Some(pair) = self.pairs.get_mut(&number).filter(|pair| pair.port == port) else {
            return;
        };
        let this = &mut pair.ends[end];
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
        if let Some((other, other_end)) = self.addresses.insert((port, from), (number, end))
            && let Some(pair) = self.pairs.get_mut(&other)
            && (other, other_end) != (number, end)
        {
            pair.ends[other_end].address = None;
        }
        if let Some(before) = before {
            self.release((port, before), (number, end));
        }
        debug!(number, end, %from, "bound");
    }

    /// Unbinds an address, if it still belongs to this end.
    fn release(&mut self, address: (usize, SocketAddr), of: End) {
        if self.addresses.get(&address) == Some(&of) {
            self.addresses.remove(&address);
        }
    }

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
            let Some(pair) = self.pairs.remove(&number) else {
                continue;
            };
            for (index, end) in pair.ends.iter().enumerate() {
                self.tokens.remove(&end.token);
                if let Some(bound) = end.address {
                    self.release((pair.port, bound), (number, index));
                }
            }
            info!(
                bytes = pair.bytes,
                seconds = pair.since.elapsed().as_secs(),
                "a pair has ended"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "192.0.2.1:7";
    const B: &str = "192.0.2.2:7";

    /// Two ends with bound addresses, on the only port.
    fn bound() -> PairTable {
        let mut state = unbound();
        assert_eq!(
            [bind(&mut state, 0, A), bind(&mut state, 1, B)],
            [None, None]
        );
        state
    }

    fn unbound() -> PairTable {
        let mut state = PairTable::default();
        let now = Instant::now();
        let ends = [A, B].map(|at| address(at).ip()).into_iter().enumerate();
        let ends: Vec<_> = ends
            .map(|(end, ip)| {
                state.tokens.insert([end as u8; TOKEN_SIZE], (0, end));
                PairEnd {
                    party: Party { id: end as u64, ip },
                    token: [end as u8; TOKEN_SIZE],
                    address: None,
                    last_seen: now,
                }
            })
            .collect();
        let Ok(ends) = ends.try_into() else {
            unreachable!()
        };
        state.pairs.insert(
            0,
            Pair {
                port: 0,
                ends,
                since: now,
                bytes: 0,
                queue: None,
            },
        );
        state
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn bind(state: &mut PairTable, token: u8, from: &str) -> Option<SocketAddr> {
        state.take(
            one(&[&[BIND][..], &[token; TOKEN_SIZE]].concat()),
            0,
            address(from),
            &Allowance::default(),
        )
    }

    fn one(bytes: &[u8]) -> Datagrams<'_> {
        Datagrams {
            bytes,
            length: bytes.len(),
            ecn: None,
        }
    }

    fn forward(state: &mut PairTable, from: &str) -> Option<SocketAddr> {
        state.take(one(b"anything"), 0, address(from), &Allowance::default())
    }

    /// Sweeps as if this many seconds had passed since the last datagram.
    fn swept(state: &mut PairTable, seconds: u64, allowance: &Allowance) -> bool {
        state.sweep(Instant::now() + Duration::from_secs(seconds), allowance);
        assert!(
            !state.pairs.is_empty() || (state.tokens.is_empty() && state.addresses.is_empty()),
            "nothing is left of it"
        );
        state.pairs.is_empty()
    }

    #[test]
    fn datagrams_of_one_end_go_only_to_the_other() {
        let mut state = bound();
        assert_eq!(forward(&mut state, A), Some(address(B)));
        assert_eq!(forward(&mut state, B), Some(address(A)));
        for stranger in ["192.0.2.1:8", "192.0.2.3:7", "[2001:db8::1]:7"] {
            assert_eq!(forward(&mut state, stranger), None);
        }
        assert_eq!(
            state.take(one(b"anything"), 1, address(A), &Allowance::default()),
            None,
            "on another port"
        );
    }

    #[test]
    fn a_token_binds_only_addresses_of_the_validated_ip() {
        let mut state = bound();
        assert_eq!(bind(&mut state, 0, "192.0.2.3:7"), None);
        assert_eq!(
            (forward(&mut state, "192.0.2.3:7"), forward(&mut state, B)),
            (None, Some(address(A)))
        );
        // As a NAT does that changes the port.
        bind(&mut state, 0, "192.0.2.1:9");
        assert_eq!(
            (forward(&mut state, A), forward(&mut state, B)),
            (None, Some(address("192.0.2.1:9")))
        );
        // As a socket for IPv4 and IPv6 shows it.
        bind(&mut state, 0, "[::ffff:192.0.2.1]:9");
        assert_eq!(
            forward(&mut state, B),
            Some(address("[::ffff:192.0.2.1]:9"))
        );
    }

    #[test]
    fn a_silent_end_ends_the_pair_while_the_other_still_sends() {
        let mut state = bound();
        assert!(!swept(
            &mut state,
            IDLE_TIMEOUT.as_secs() - 1,
            &Allowance::default()
        ));
        let Some(pair) = state.pairs.get_mut(&0) else {
            unreachable!()
        };
        pair.ends[1].last_seen += IDLE_TIMEOUT;
        assert!(
            swept(
                &mut state,
                IDLE_TIMEOUT.as_secs() + 1,
                &Allowance::default()
            ),
            "only one of them still sends"
        );
        assert_eq!(forward(&mut state, B), None);
    }

    #[test]
    fn a_pair_with_an_unbound_end_is_removed() {
        let mut state = unbound();
        bind(&mut state, 1, B);
        assert_eq!(forward(&mut state, B), None);
        assert!(!swept(
            &mut state,
            UNBOUND_TIMEOUT.as_secs() - 1,
            &Allowance::default()
        ));
        assert!(swept(
            &mut state,
            UNBOUND_TIMEOUT.as_secs() + 1,
            &Allowance::default()
        ));
    }

    #[test]
    fn a_pair_has_limited_bytes_and_time() {
        let allowance = Allowance {
            bytes: 20,
            time: Duration::from_secs(10),
            ..Allowance::default()
        };
        let mut state = bound();
        let forwarded = (0..9).filter(|_| {
            state
                .take(one(b"8 bytes."), 0, address(A), &allowance)
                .is_some()
        });
        assert_eq!(
            forwarded.count(),
            3,
            "the datagram that reaches the limit is the last"
        );
        assert!(swept(&mut state, 0, &allowance));
        let mut state = bound();
        assert!(!swept(&mut state, 9, &allowance));
        assert!(swept(&mut state, 11, &allowance));
    }

    #[tokio::test]
    async fn queues_are_limited_in_bytes_with_datagram_overhead() {
        let (to, mut waiting) = mpsc::unbounded_channel();
        let queue = Queue {
            room: Arc::new(Semaphore::new(MIN_QUEUE_SIZE)),
            to,
        };
        // Of datagrams received together, those that fit are queued.
        queue.put(
            Datagrams {
                bytes: &[0; 60_000],
                length: 1_200,
                ecn: None,
            },
            address(B),
        );
        (0..1_000).for_each(|_| queue.put(one(&[0]), address(B)));
        drop(queue);
        let mut queued = 0;
        let mut lengths = Vec::new();
        while let Some(Waiting { bytes, length, .. }) = waiting.recv().await {
            queued += bytes.len() + bytes.len().div_ceil(length) * DATAGRAM_OVERHEAD;
            lengths.push(bytes.len());
        }
        assert!(
            queued <= MIN_QUEUE_SIZE && lengths.len() <= MIN_QUEUE_SIZE / DATAGRAM_OVERHEAD,
            "{queued}"
        );
        assert_eq!(lengths[0], 32 * 1_200);
    }
}
