//! Forwards datagrams unchanged between the two ends of a pair.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::interval;

use super::limits::NetworkLimits;
use super::pairs::{Allowance, PairTable, Party, TOKEN_SIZE, Tokens};
use super::queue::{Queue, Waiting};
use super::socket::{Buffer, Datagrams, Socket};
use crate::auth::random::random;
use crate::error::Result;
use crate::error::lock::lock;
use crate::net::endpoint;
use crate::net::rate_limit::TokenBucket;
use crate::protocol::rate::Rate;

/// Interval at which ended pairs are removed.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
/// Length of a datagram that binds an address.
const BINDING_SIZE: usize = 1 + TOKEN_SIZE;

/// The forwarding ports and pairs.
///
/// A datagram is assigned by its port and source address. So an end is in one pair at most on each port, and each
/// further pair of it gets another port.
pub(super) struct Forwarder {
    sockets: Vec<Socket>,
    ports: Vec<u16>,
    allowance: Allowance,
    pairs: Mutex<PairTable>,
}

impl Forwarder {
    /// Opens `ports` consecutive ports, starting with the given one; any free ones if that is 0.
    pub(super) fn bind(
        first: SocketAddr,
        ports: u16,
        allowance: Allowance,
        limits: NetworkLimits,
    ) -> Result<Self> {
        let pairs = PairTable::new(limits.pairs(allowance.pairs));
        let mut forwarder = Self {
            sockets: Vec::new(),
            ports: Vec::new(),
            allowance,
            pairs: Mutex::new(pairs),
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

    /// Makes a pair of two ends, of which the second has asked; returns the port and each end's token. `None` when
    /// there is no room. Two ends that ask again, as for each of their connections, get their existing pair.
    pub(super) fn pair(self: &Arc<Self>, ends: [Party; 2]) -> Option<(u16, Tokens)> {
        let tokens = [random().ok()?, random().ok()?];
        let now = Instant::now();
        let mut pairs = lock(&self.pairs);
        if let Some((port, tokens)) = pairs.existing(&ends, now, &self.allowance) {
            return Some((self.ports[port], tokens));
        }
        let port = pairs.least_used_port(&ends, self.ports.len())?;
        let queue = self.allowance.rate.map(|rate| self.queue(port, rate));
        pairs
            .insert(port, ends, tokens, now, queue)
            .then(|| (self.ports[port], tokens))
    }

    /// Starts a queue that sends at this rate.
    fn queue(self: &Arc<Self>, port: usize, rate: Rate) -> Queue {
        let (queue, mut waiting) = Queue::new(rate);
        let forwarder = self.clone();
        let bucket = TokenBucket::new(rate);
        tokio::spawn(async move {
            while let Some(Waiting {
                bytes,
                length,
                ecn,
                to,
                _room,
            }) = waiting.recv().await
            {
                for part in (Datagrams {
                    bytes: &bytes,
                    length,
                    ecn,
                })
                .parts(bucket.block())
                {
                    bucket.take(part.bytes.len()).await;
                    forwarder.sockets[port].send(part, to);
                }
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
        let mut sweep = interval(SWEEP_INTERVAL);
        loop {
            sweep.tick().await;
            lock(&self.pairs).sweep(Instant::now(), &self.allowance);
        }
    }

    async fn forward(self: Arc<Self>, port: usize) {
        let mut buffer = Buffer::new();
        let socket = &self.sockets[port];
        loop {
            let (datagrams, from) = socket.receive(&mut buffer).await;
            // haul sends no longer datagrams.
            if datagrams.length > usize::from(endpoint::MAX_DATAGRAM_SIZE) {
                continue;
            }
            for datagrams in datagrams.isolate(BINDING_SIZE) {
                let to = lock(&self.pairs).take(datagrams, port, from, &self.allowance);
                if let Some(to) = to {
                    socket.send(datagrams, to);
                }
            }
        }
    }
}
