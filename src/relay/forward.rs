//! Forwards datagrams between the two ends of a pair, as they are.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aws_lc_rs::rand;
use quinn::Connection;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::interval;
use tracing::{debug, info};

use super::{Caller, canonical, network};
use crate::bucket::Bucket;
use crate::endpoint;
use crate::error::{Code, Error, Result};
use crate::rate::Rate;
use crate::stream::varint_of;
use crate::wire::BIND;

/// A pair over which nothing comes for so long ends. Both ends of a connection that is idle keep it alive.
const IDLE: Duration = Duration::from_secs(60);
/// One whose ends have not both come for so long ends too.
const UNBOUND: Duration = Duration::from_secs(15);
/// How often pairs are looked at that may have ended.
const SWEEP: Duration = Duration::from_secs(5);
/// What may wait for its turn at the rate of a pair, as time, and in datagrams at least and at most. A short queue slows both ends down
/// as any bottleneck does, where dropping all that is above would lose a third.
const QUEUE: Duration = Duration::from_millis(50);
const QUEUE_AT_LEAST: usize = 32;
const QUEUE_AT_MOST: usize = 1_024;
/// What a datagram is taken for where queues are measured in them.
const USUAL_DATAGRAM: u64 = 1_200;
/// A datagram cannot be longer.
const MAX_DATAGRAM: usize = 65_536;
const TOKEN: usize = 32;
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

/// Which of all pairs, and which of its ends.
type End = (u64, usize);

/// The ports on which datagrams are forwarded, and for whom.
///
/// A datagram is told by its port and where it came from. So an end is in one pair at most on each port: whoever asks for it after
/// another gets another port.
pub(super) struct Forwarder {
    sockets: Vec<UdpSocket>,
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
    /// When something came last.
    last: Instant,
    bytes: u64,
    /// Takes what has to wait for its turn; it ends with the pair. None without a rate.
    queue: Option<mpsc::Sender<(Vec<u8>, SocketAddr)>>,
}

struct PairEnd {
    /// The relay's connection to it.
    connection: Connection,
    /// An address is its own if it has this IP, which was validated before the handshake (RFC 9000, section 8.1): quinn takes a new one for
    /// the connection's before that has answered. The port may be another, where a NAT gives each destination one of its own.
    validated: IpAddr,
    token: [u8; TOKEN],
    bound: Option<SocketAddr>,
}

impl Forwarder {
    /// On so many ports from the given one on; or on any, where that is 0.
    pub(super) fn bind(first: SocketAddr, ports: u16, allowance: Allowance) -> Result<Self> {
        let mut forwarder = Self { sockets: Vec::new(), ports: Vec::new(), allowance, state: Mutex::default() };
        for number in 0..ports {
            let port = if first.port() == 0 { 0 } else { first.port().saturating_add(number) };
            let address = SocketAddr::new(first.ip(), port);
            let failed = || Error::io(format!("cannot forward on UDP {address}"));
            let socket = endpoint::udp_socket(address)?;
            socket.set_nonblocking(true).map_err(failed())?;
            let socket = UdpSocket::from_std(socket).map_err(failed())?;
            forwarder.ports.push(socket.local_addr().map_err(failed())?.port());
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

    /// Room for two ends, of which the second has asked: the port, and the token of each; none where there is none.
    pub(super) fn pair(self: &Arc<Self>, ends: [&Caller; 2]) -> Option<(u16, [[u8; TOKEN]; 2])> {
        let mut tokens = [[0; TOKEN]; 2];
        for token in &mut tokens {
            rand::fill(token).ok()?;
        }
        let mut state = self.state();
        let asks = network(ends[1].validated);
        let of_it = state.pairs.values().filter(|pair| network(pair.ends[1].validated) == asks);
        if state.pairs.len() >= self.allowance.pairs || of_it.count() >= MAX_PAIRS_EACH {
            return None;
        }
        let port = state.free_port(&ends, self.ports.len())?;
        let number = state.next;
        state.next += 1;
        let mut of = tokens.iter().zip(ends);
        let ends = std::array::from_fn(|end| {
            let (token, caller) = of.next().expect("two of each");
            state.tokens.insert(*token, (number, end));
            let Caller { connection, validated } = caller.clone();
            PairEnd { connection, validated, token: *token, bound: None }
        });
        let now = Instant::now();
        let queue = self.allowance.rate.map(|rate| self.queue(port, rate));
        state.pairs.insert(number, Pair { port, ends, since: now, last: now, bytes: 0, queue });
        Some((self.ports[port], tokens))
    }

    /// What goes in comes out at the rate.
    fn queue(self: &Arc<Self>, port: usize, rate: Rate) -> mpsc::Sender<(Vec<u8>, SocketAddr)> {
        let datagrams = (rate.bytes() as f64 * QUEUE.as_secs_f64()) as u64 / USUAL_DATAGRAM;
        let length = usize::try_from(datagrams).unwrap_or(usize::MAX).clamp(QUEUE_AT_LEAST, QUEUE_AT_MOST);
        let (queue, mut waiting) = mpsc::channel::<(Vec<u8>, SocketAddr)>(length);
        let (forwarder, bucket) = (self.clone(), Bucket::new(rate));
        tokio::spawn(async move {
            while let Some((datagram, to)) = waiting.recv().await {
                bucket.take(datagram.len()).await;
                let _ = forwarder.sockets[port].try_send_to(&datagram, to);
            }
        });
        queue
    }

    /// Forwards until it is dropped.
    pub(super) async fn run(self: Arc<Self>) {
        let mut forwarding = JoinSet::new();
        for port in 0..self.sockets.len() {
            forwarding.spawn(self.clone().forward(port));
        }
        let mut sweep = interval(SWEEP);
        loop {
            sweep.tick().await;
            self.state().sweep(&self.allowance);
        }
    }

    async fn forward(self: Arc<Self>, port: usize) {
        let (mut datagram, socket) = (vec![0; MAX_DATAGRAM], &self.sockets[port]);
        loop {
            // What a receiver's port refused is told here, and concerns nobody else.
            let Ok((length, from)) = socket.recv_from(&mut datagram).await else { continue };
            let to = self.state().take(&datagram[..length], (port, from), &self.allowance);
            if let Some(to) = to {
                // Where the system has no room for it, it is lost like any datagram.
                let _ = socket.try_send_to(&datagram[..length], to);
            }
        }
    }
}

impl State {
    /// The port with the fewest pairs on which neither end is in one.
    fn free_port(&self, ends: &[&Caller; 2], ports: usize) -> Option<usize> {
        let same = |pair: &Pair| {
            let ids = ends.map(|end| end.connection.stable_id());
            pair.ends.iter().any(|there| ids.contains(&there.connection.stable_id()))
        };
        let mut load = vec![Some(0_usize); ports];
        for pair in self.pairs.values() {
            load[pair.port] = load[pair.port].filter(|_| !same(pair)).map(|pairs| pairs + 1);
        }
        load.iter().enumerate().filter_map(|(port, load)| load.map(|load| (load, port))).min().map(|(_, port)| port)
    }

    /// Where a datagram goes at once, if anywhere.
    fn take(&mut self, datagram: &[u8], from: (usize, SocketAddr), allowance: &Allowance) -> Option<SocketAddr> {
        if let Some((&BIND, token)) = datagram.split_first()
            && let Some(&end) = <&[u8; TOKEN]>::try_from(token).ok().and_then(|token| self.tokens.get(token))
        {
            self.bind(end, from);
            return None;
        }
        let (number, end) = *self.addresses.get(&from)?;
        let pair = self.pairs.get_mut(&number)?;
        let to = pair.ends[1 - end].bound?;
        let now = Instant::now();
        pair.last = now;
        if pair.bytes >= allowance.bytes {
            return None;
        }
        pair.bytes += datagram.len() as u64;
        match &pair.queue {
            // What finds no room is lost, as on any path that is full.
            Some(queue) => drop(queue.try_send((datagram.to_vec(), to))),
            None => return Some(to),
        }
        None
    }

    /// An end is at this address now.
    fn bind(&mut self, (number, end): End, (port, from): (usize, SocketAddr)) {
        let Some(pair) = self.pairs.get_mut(&number).filter(|pair| pair.port == port) else { return };
        let this = &mut pair.ends[end];
        if canonical(from).ip() != this.validated {
            debug!(%from, validated = %this.validated, "an address that was not validated is not bound");
            if canonical(this.connection.remote_address()).ip() == canonical(from).ip() {
                // Its network has given it another. When it comes again, that is validated.
                this.connection.close(varint_of(Code::Superseded), b"your address has changed; come again");
            }
            return;
        }
        if this.bound == Some(from) {
            return;
        }
        pair.last = Instant::now();
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

    fn sweep(&mut self, allowance: &Allowance) {
        let ended = |pair: &Pair| {
            let idle = if pair.ends.iter().all(|end| end.bound.is_some()) { IDLE } else { UNBOUND };
            pair.last.elapsed() > idle || pair.since.elapsed() > allowance.time
        };
        let numbers: Vec<_> = self.pairs.iter().filter(|(_, pair)| ended(pair)).map(|(number, _)| *number).collect();
        for number in numbers {
            let Some(pair) = self.pairs.remove(&number) else { continue };
            for (its, end) in pair.ends.iter().enumerate() {
                self.tokens.remove(&end.token);
                if let Some(bound) = end.bound {
                    self.release((pair.port, bound), (number, its));
                }
            }
            info!(bytes = pair.bytes, seconds = pair.since.elapsed().as_secs(), "a pair has ended");
        }
    }
}
