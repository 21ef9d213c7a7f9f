//! Forwards datagrams between the two ends of a pair, as they are.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aws_lc_rs::rand;
use quinn::udp::EcnCodepoint;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::interval;
use tracing::{debug, info};

use super::socket::{Buffer, Datagrams, Socket};
use super::{canonical, network};
use crate::error::Result;
use crate::net::endpoint;
use crate::net::rate_limit::TokenBucket;
use crate::protocol::BIND;
use crate::protocol::rate::Rate;

/// A pair ends when one of its ends is not heard for so long: each binds its address every 5 s while it wants the pair. Otherwise
/// whoever is the other end could have a relay send to somebody who is long gone; and pairs of transfers that are over, or have gone
/// another way, would leave no room for those who come from the same office.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// One of whose ends one has not come yet for so long ends too.
const UNBOUND_TIMEOUT: Duration = Duration::from_secs(15);
/// How often pairs are looked at that may have ended.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
/// What may wait for its turn at the rate of a pair, as time, and in bytes at least and at most: 32 and 1,024 usual datagrams. A
/// short queue slows both ends down as any bottleneck does, where dropping all that is above would lose a third.
const QUEUE_TIME: Duration = Duration::from_millis(50);
const QUEUE_AT_LEAST: usize = 32 * 1_328;
const QUEUE_AT_MOST: usize = 1_024 * 1_328;
/// What a datagram takes in a queue beyond its bytes, so that empty ones are not free.
const OVERHEAD: usize = 128;
const TOKEN: usize = 32;
/// What binds an address.
const BINDING: usize = 1 + TOKEN;
/// Pairs that those who ask from one address have at the same time, so that nobody takes all the room.
const MAX_PAIRS_EACH: usize = 16;

/// What a relay carries.
#[derive(Debug, Clone)]
pub struct Allowance {
    /// Pairs at the same time.
    pub pairs: usize,
    /// Bytes a second of each pair, both directions together; none is no limit. Some of what is above waits, for 50 ms at most.
    pub rate: Option<Rate>,
    /// Bytes that a pair has in all, both directions together.
    pub bytes: u64,
    /// How long a pair has.
    pub time: Duration,
}

/// Whoever is to be an end: which connection to the relay it has, and from where.
#[derive(Debug, Clone, Copy)]
pub(super) struct Party {
    /// Of the connection, and of no other before it.
    pub(super) id: u64,
    /// Validated by QUIC. An address is the party's own if it has this IP; the port may be another, where a NAT gives each destination
    /// one of its own.
    pub(super) ip: IpAddr,
}

/// Which of all pairs, and which of its ends.
type End = (u64, usize);

/// The ports on which datagrams are forwarded, and for whom.
///
/// A datagram is told by its port and where it came from. So an end is in one pair at most on each port: whoever asks for it after
/// another gets another port.
pub(super) struct Forwarder {
    sockets: Vec<Socket>,
    ports: Vec<u16>,
    allowance: Allowance,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    pairs: HashMap<u64, Pair>,
    tokens: HashMap<[u8; TOKEN], End>,
    /// By the port's place among all.
    addresses: HashMap<(usize, SocketAddr), End>,
}

struct Pair {
    /// Its place among all.
    port: usize,
    ends: [PairEnd; 2],
    since: Instant,
    bytes: u64,
    /// What has to wait for its turn. None without a rate.
    queue: Option<Queue>,
}

/// Takes what has to wait for its turn at the rate of a pair; it ends with that.
struct Queue {
    room: Arc<Semaphore>,
    to: mpsc::UnboundedSender<Waiting>,
}

/// Datagrams that wait for their turn.
struct Waiting {
    bytes: Vec<u8>,
    /// As of [`Datagrams`].
    each: usize,
    ecn: Option<EcnCodepoint>,
    to: SocketAddr,
    _room: OwnedSemaphorePermit,
}

struct PairEnd {
    party: Party,
    token: [u8; TOKEN],
    bound: Option<SocketAddr>,
    /// When it was heard last.
    heard: Instant,
}

impl Forwarder {
    /// On so many ports from the given one on; or on any, where that is 0.
    pub(super) fn bind(first: SocketAddr, ports: u16, allowance: Allowance) -> Result<Self> {
        let mut forwarder = Self {
            sockets: Vec::new(),
            ports: Vec::new(),
            allowance,
            state: Mutex::default(),
        };
        for number in 0..ports {
            let port = if first.port() == 0 {
                0
            } else {
                first.port().saturating_add(number)
            };
            let address = SocketAddr::new(first.ip(), port);
            let socket = Socket::bind(address)?;
            forwarder.ports.push(socket.port);
            forwarder.sockets.push(socket);
        }
        Ok(forwarder)
    }

    /// The UDP ports.
    pub(super) fn ports(&self) -> &[u16] {
        &self.ports
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for two ends, of which the second has asked: the port, and the token of each; none where there is none. Two that ask
    /// again, as for each of their connections, have what they had.
    pub(super) fn pair(self: &Arc<Self>, ends: [Party; 2]) -> Option<(u16, [[u8; TOKEN]; 2])> {
        let mut tokens = [[0; TOKEN]; 2];
        for token in &mut tokens {
            rand::fill(token).ok()?;
        }
        let now = Instant::now();
        let mut state = self.state();
        let allowance = &self.allowance;
        if let Some(pair) = state
            .pairs
            .values_mut()
            .find(|pair| pair.is_between(&ends) && !pair.is_over(now, allowance))
        {
            let tokens = pair.ends.each_mut().map(|end| {
                end.heard = now;
                end.token
            });
            return Some((self.ports[pair.port], tokens));
        }
        let network = network(ends[1].ip);
        let of_network = state
            .pairs
            .values()
            .filter(|pair| pair.is_of(network))
            .count();
        if state.pairs.len() >= self.allowance.pairs || of_network >= MAX_PAIRS_EACH {
            return None;
        }
        let port = state.free_port(&ends, self.ports.len())?;
        let number = state.next;
        state.next += 1;
        let ends = std::array::from_fn(|end| {
            state.tokens.insert(tokens[end], (number, end));
            PairEnd {
                party: ends[end],
                token: tokens[end],
                bound: None,
                heard: now,
            }
        });
        let queue = self.allowance.rate.map(|rate| self.queue(port, rate));
        state.pairs.insert(
            number,
            Pair {
                port,
                ends,
                since: now,
                bytes: 0,
                queue,
            },
        );
        Some((self.ports[port], tokens))
    }

    /// What goes in comes out at the rate.
    fn queue(self: &Arc<Self>, port: usize, rate: Rate) -> Queue {
        let bytes = (rate.bytes() as f64 * QUEUE_TIME.as_secs_f64()) as usize;
        let room = Arc::new(Semaphore::new(bytes.clamp(QUEUE_AT_LEAST, QUEUE_AT_MOST)));
        let (to, mut waiting) = mpsc::unbounded_channel::<Waiting>();
        let forwarder = self.clone();
        let bucket = TokenBucket::new(rate);
        tokio::spawn(async move {
            while let Some(Waiting {
                bytes,
                each,
                ecn,
                to,
                _room,
            }) = waiting.recv().await
            {
                for part in (Datagrams {
                    bytes: &bytes,
                    each,
                    ecn,
                })
                .parts(bucket.block())
                {
                    bucket.take(part.bytes.len()).await;
                    forwarder.sockets[port].send(part, to);
                }
            }
        });
        Queue { room, to }
    }

    /// Forwards until it is dropped.
    pub(super) async fn run(self: Arc<Self>) {
        let mut forwarding = JoinSet::new();
        for port in 0..self.sockets.len() {
            forwarding.spawn(self.clone().forward(port));
        }
        let mut sweep = interval(SWEEP_INTERVAL);
        loop {
            sweep.tick().await;
            self.state().sweep(Instant::now(), &self.allowance);
        }
    }

    async fn forward(self: Arc<Self>, port: usize) {
        let mut buffer = Buffer::new();
        let socket = &self.sockets[port];
        loop {
            let (datagrams, from) = socket.receive(&mut buffer).await;
            // Longer than any of haul's.
            if datagrams.each > usize::from(endpoint::MAX_DATAGRAM) {
                continue;
            }
            for datagrams in datagrams.with_alone(BINDING) {
                let to = self.state().take(datagrams, (port, from), &self.allowance);
                if let Some(to) = to {
                    socket.send(datagrams, to);
                }
            }
        }
    }
}

impl Queue {
    /// What finds no room is lost, as on any path that is full.
    fn put(&self, datagrams: Datagrams<'_>, to: SocketAddr) {
        // Only one puts here, so that nobody else takes the room meanwhile.
        let fitting = datagrams.first(self.room.available_permits() / (datagrams.each + OVERHEAD));
        let Datagrams { bytes, each, ecn } = fitting;
        let count = fitting.count();
        let length = u32::try_from(bytes.len() + count * OVERHEAD).unwrap_or(u32::MAX);
        if count > 0
            && let Ok(room) = self.room.clone().try_acquire_many_owned(length)
        {
            // Fails only when the process ends.
            let _ = self.to.send(Waiting {
                bytes: bytes.to_vec(),
                each,
                ecn,
                to,
                _room: room,
            });
        }
    }
}

impl Pair {
    /// Whether these are its ends, the same way around.
    fn is_between(&self, ends: &[Party; 2]) -> bool {
        self.ends.each_ref().map(|end| end.party.id) == ends.map(|end| end.id)
    }

    /// Whether it has had all that it may have.
    fn is_over(&self, now: Instant, allowance: &Allowance) -> bool {
        now.duration_since(self.since) > allowance.time || self.bytes >= allowance.bytes
    }

    /// Whether it was asked for from there.
    fn is_of(&self, asking: IpAddr) -> bool {
        network(self.ends[1].party.ip) == asking
    }
}

impl State {
    /// The port with the fewest pairs on which neither end is in one.
    fn free_port(&self, ends: &[Party; 2], ports: usize) -> Option<usize> {
        let same = |pair: &Pair| {
            pair.ends
                .iter()
                .any(|there| ends.iter().any(|end| end.id == there.party.id))
        };
        let mut load = vec![Some(0_usize); ports];
        for pair in self.pairs.values() {
            load[pair.port] = load[pair.port]
                .filter(|_| !same(pair))
                .map(|pairs| pairs + 1);
        }
        load.iter()
            .enumerate()
            .filter_map(|(port, load)| load.map(|load| (load, port)))
            .min()
            .map(|(_, port)| port)
    }

    /// Where datagrams go at once, if anywhere. One that may bind an address comes alone.
    fn take(
        &mut self,
        datagrams: Datagrams,
        from: (usize, SocketAddr),
        allowance: &Allowance,
    ) -> Option<SocketAddr> {
        if let Some((&BIND, token)) = datagrams.bytes.split_first()
            && let Some(&end) = <&[u8; TOKEN]>::try_from(token)
                .ok()
                .and_then(|token| self.tokens.get(token))
        {
            self.bind(end, from);
            return None;
        }
        let (number, end) = *self.addresses.get(&from)?;
        let pair = self.pairs.get_mut(&number)?;
        let to = pair.ends[1 - end].bound?;
        pair.ends[end].heard = Instant::now();
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

    /// An end is at this address now.
    fn bind(&mut self, (number, end): End, (port, from): (usize, SocketAddr)) {
        let Some(pair) = self.pairs.get_mut(&number).filter(|pair| pair.port == port) else {
            return;
        };
        let this = &mut pair.ends[end];
        if canonical(from).ip() != this.party.ip {
            return debug!(%from, validated = %this.party.ip, "an address that was not validated is not bound");
        }
        this.heard = Instant::now();
        if this.bound == Some(from) {
            return;
        }
        let before = this.bound.replace(from);
        // An address belongs to the end that has bound it last: a sender that serves one receiver after another has but one.
        if let Some((other, its)) = self.addresses.insert((port, from), (number, end))
            && let Some(pair) = self.pairs.get_mut(&other)
            && (other, its) != (number, end)
        {
            pair.ends[its].bound = None;
        }
        if let Some(before) = before {
            self.release((port, before), (number, end));
        }
        debug!(number, end, %from, "bound");
    }

    /// An address is not this end's any more.
    fn release(&mut self, address: (usize, SocketAddr), of: End) {
        if self.addresses.get(&address) == Some(&of) {
            self.addresses.remove(&address);
        }
    }

    fn sweep(&mut self, now: Instant, allowance: &Allowance) {
        let ended = |pair: &Pair| {
            let idle = if pair.ends.iter().all(|end| end.bound.is_some()) {
                IDLE_TIMEOUT
            } else {
                UNBOUND_TIMEOUT
            };
            let silent = pair
                .ends
                .iter()
                .any(|end| now.duration_since(end.heard) > idle);
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
            for (its, end) in pair.ends.iter().enumerate() {
                self.tokens.remove(&end.token);
                if let Some(bound) = end.bound {
                    self.release((pair.port, bound), (number, its));
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

    /// Two ends that have bound their addresses, on the only port.
    fn bound() -> State {
        let mut state = unbound();
        assert_eq!(
            [bind(&mut state, 0, A), bind(&mut state, 1, B)],
            [None, None]
        );
        state
    }

    fn unbound() -> State {
        let mut state = State::default();
        let now = Instant::now();
        let ends = [A, B].map(|at| address(at).ip()).into_iter().enumerate();
        let ends: Vec<_> = ends
            .map(|(end, ip)| {
                state.tokens.insert([end as u8; TOKEN], (0, end));
                PairEnd {
                    party: Party { id: end as u64, ip },
                    token: [end as u8; TOKEN],
                    bound: None,
                    heard: now,
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

    fn bind(state: &mut State, token: u8, from: &str) -> Option<SocketAddr> {
        state.take(
            one(&[&[BIND][..], &[token; TOKEN]].concat()),
            (0, address(from)),
            &Allowance::default(),
        )
    }

    fn one(bytes: &[u8]) -> Datagrams<'_> {
        Datagrams {
            bytes,
            each: bytes.len(),
            ecn: None,
        }
    }

    fn goes(state: &mut State, from: &str) -> Option<SocketAddr> {
        state.take(one(b"anything"), (0, address(from)), &Allowance::default())
    }

    /// As if so many seconds had passed since anything was heard.
    fn swept(state: &mut State, seconds: u64, allowance: &Allowance) -> bool {
        state.sweep(Instant::now() + Duration::from_secs(seconds), allowance);
        assert!(
            !state.pairs.is_empty() || (state.tokens.is_empty() && state.addresses.is_empty()),
            "nothing is left of it"
        );
        state.pairs.is_empty()
    }

    #[test]
    fn what_comes_from_one_end_goes_to_the_other_and_nowhere_else() {
        let mut state = bound();
        assert_eq!(goes(&mut state, A), Some(address(B)));
        assert_eq!(goes(&mut state, B), Some(address(A)));
        for stranger in ["192.0.2.1:8", "192.0.2.3:7", "[2001:db8::1]:7"] {
            assert_eq!(goes(&mut state, stranger), None);
        }
        assert_eq!(
            state.take(one(b"anything"), (1, address(A)), &Allowance::default()),
            None,
            "on another port"
        );
    }

    #[test]
    fn a_token_is_worth_nothing_from_another_ip_and_moves_an_end_within_its_own() {
        let mut state = bound();
        assert_eq!(bind(&mut state, 0, "192.0.2.3:7"), None);
        assert_eq!(
            (goes(&mut state, "192.0.2.3:7"), goes(&mut state, B)),
            (None, Some(address(A)))
        );
        // As a NAT does that gives it another port.
        bind(&mut state, 0, "192.0.2.1:9");
        assert_eq!(
            (goes(&mut state, A), goes(&mut state, B)),
            (None, Some(address("192.0.2.1:9")))
        );
        // As a socket of both families shows it.
        bind(&mut state, 0, "[::ffff:192.0.2.1]:9");
        assert_eq!(goes(&mut state, B), Some(address("[::ffff:192.0.2.1]:9")));
    }

    #[test]
    fn nobody_is_sent_to_who_is_gone_however_much_the_other_end_sends() {
        let mut state = bound();
        assert!(!swept(
            &mut state,
            IDLE_TIMEOUT.as_secs() - 1,
            &Allowance::default()
        ));
        let Some(pair) = state.pairs.get_mut(&0) else {
            unreachable!()
        };
        pair.ends[1].heard += IDLE_TIMEOUT;
        assert!(
            swept(
                &mut state,
                IDLE_TIMEOUT.as_secs() + 1,
                &Allowance::default()
            ),
            "only one of them still comes"
        );
        assert_eq!(goes(&mut state, B), None);
    }

    #[test]
    fn a_pair_whose_other_end_never_comes_makes_room() {
        let mut state = unbound();
        bind(&mut state, 1, B);
        assert_eq!(goes(&mut state, B), None);
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
    fn bytes_and_time_are_bounded() {
        let allowance = Allowance {
            bytes: 20,
            time: Duration::from_secs(10),
            ..Allowance::default()
        };
        let mut state = bound();
        let forwarded = (0..9).filter(|_| {
            state
                .take(one(b"8 bytes."), (0, address(A)), &allowance)
                .is_some()
        });
        assert_eq!(forwarded.count(), 3, "what reaches the limit is the last");
        assert!(swept(&mut state, 0, &allowance));
        let mut state = bound();
        assert!(!swept(&mut state, 9, &allowance));
        assert!(swept(&mut state, 11, &allowance));
    }

    #[tokio::test]
    async fn a_queue_is_bounded_in_bytes_and_short_datagrams_are_not_free() {
        let (to, mut waiting) = mpsc::unbounded_channel();
        let queue = Queue {
            room: Arc::new(Semaphore::new(QUEUE_AT_LEAST)),
            to,
        };
        // Of what comes together, what fits goes in.
        queue.put(
            Datagrams {
                bytes: &[0; 60_000],
                each: 1_200,
                ecn: None,
            },
            address(B),
        );
        (0..1_000).for_each(|_| queue.put(one(&[0]), address(B)));
        drop(queue);
        let mut held = 0;
        let mut lengths = Vec::new();
        while let Some(Waiting { bytes, each, .. }) = waiting.recv().await {
            held += bytes.len() + bytes.len().div_ceil(each) * OVERHEAD;
            lengths.push(bytes.len());
        }
        assert!(
            held <= QUEUE_AT_LEAST && lengths.len() <= QUEUE_AT_LEAST / OVERHEAD,
            "{held}"
        );
        assert_eq!(lengths[0], 32 * 1_200);
    }
}
