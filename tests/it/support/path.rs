//! An impaired UDP path on loopback, to test what must hold on any link. It is not a model of a link: durations over it
//! mean nothing.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// Bytes in flight in one direction, at most; more is dropped, whatever the settings say.
const MAX_UNDER_WAY: usize = 16 << 20;
/// Buffer that is requested for each socket, in bytes, so that the path itself causes the drops as far as possible.
const SOCKET_BUFFER: usize = 4 << 20;
/// Largest possible datagram.
const MAX_DATAGRAM: usize = 64 << 10;

/// What a path does to the datagrams of one direction. By default it only limits them to the size of an Ethernet frame.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Part of the datagrams that is lost, each independently.
    pub loss: f64,
    /// Probability that a burst of losses begins at a datagram.
    pub burst: f64,
    /// Datagrams lost in a burst. A sender that sends only probes, which slow down, stays long in a long burst.
    pub burst_length: u32,
    /// Delay one way.
    pub delay: Duration,
    /// Up to this much is added to the delay of each datagram, so that datagrams overtake each other.
    pub jitter: Duration,
    /// In bytes a second.
    pub rate: Option<u64>,
    /// Bytes that may wait for the rate; more is dropped.
    pub queue: usize,
    /// Part of the datagrams that arrives twice.
    pub duplicate: f64,
    /// Part of the datagrams in which a bit is flipped.
    pub corrupt: f64,
    /// Largest payload that passes, in bytes.
    pub mtu: usize,
    /// Nothing passes, and datagrams in flight are lost.
    pub blackout: bool,
    /// Number of datagrams that pass, from all clients; later ones are lost.
    pub dark_after: u64,
    /// Number of datagrams of the first client's socket that pass; its later ones are lost.
    pub of_first_client: u64,
    /// Nothing of the first connection attempt reaches the server.
    pub first_connection_is_lost: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            loss: 0.0,
            burst: 0.0,
            burst_length: 8,
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            rate: None,
            queue: 64 << 10,
            duplicate: 0.0,
            corrupt: 0.0,
            mtu: 1472,
            blackout: false,
            dark_after: u64::MAX,
            of_first_client: u64::MAX,
            first_connection_is_lost: false,
        }
    }
}

/// What happened to the datagrams of one direction so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub forwarded: u64,
    pub forwarded_bytes: u64,
    pub dropped: u64,
    pub corrupted: u64,
    pub duplicated: u64,
}

/// A relay on a free loopback port in front of a server. It ends when dropped.
pub(crate) struct Path {
    /// The address that clients use in place of the server's.
    pub address: SocketAddr,
    /// From clients to the server.
    pub up: Arc<Line>,
    /// From the server to clients.
    pub down: Arc<Line>,
    rebind: Arc<Notify>,
    addresses: Arc<Mutex<Vec<SocketAddr>>>,
    _tasks: JoinSet<()>,
}

impl Path {
    /// A path with the same settings in both directions. The same seed loses the same datagrams, counted from the first.
    pub(crate) async fn to(server: SocketAddr, seed: u64, settings: Settings) -> Self {
        let front = Arc::new(socket().await.unwrap());
        let address = front.local_addr().unwrap();
        let up = Arc::new(Line::new(seed, settings.clone()));
        let down = Arc::new(Line::new(!seed, settings));
        let (rebind, addresses) = (Arc::new(Notify::new()), Arc::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(deliver(up.clone()));
        tasks.spawn(deliver(down.clone()));
        let relay = Relay {
            server,
            front,
            up: up.clone(),
            down: down.clone(),
            addresses: Arc::clone(&addresses),
        };
        tasks.spawn(relay.run(rebind.clone()));
        Self {
            address,
            up,
            down,
            rebind,
            addresses,
            _tasks: tasks,
        }
    }

    /// Changes the settings of both directions for later datagrams.
    pub(crate) fn set(&self, change: impl Fn(&mut Settings)) {
        self.up.set(&change);
        self.down.set(&change);
    }

    /// Acts as a NAT that has forgotten a client: later datagrams reach the server from another port, and nothing sent
    /// to the old one arrives.
    pub(crate) fn rebind(&self) {
        self.rebind.notify_one();
    }

    /// The addresses from which the server has received datagrams so far.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        lock(&self.addresses).clone()
    }
}

/// Receives datagrams at both ends.
struct Relay {
    server: SocketAddr,
    front: Arc<UdpSocket>,
    up: Arc<Line>,
    down: Arc<Line>,
    addresses: Arc<Mutex<Vec<SocketAddr>>>,
}

impl Relay {
    async fn run(self, rebind: Arc<Notify>) {
        let mut sockets: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
        let mut answers = JoinSet::new();
        let mut buffer = vec![0; MAX_DATAGRAM];
        let mut first = None;
        loop {
            let (length, client) = tokio::select! {
                biased;
                () = rebind.notified() => {
                    answers.shutdown().await;
                    sockets.clear();
                    continue;
                }
                received = self.front.recv_from(&mut buffer) => match received {
                    Ok(received) => received,
                    // ICMP reports that a client is gone.
                    Err(_) => continue,
                },
            };
            let socket = match sockets.entry(client) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(unknown) => {
                    let socket = Arc::new(socket().await.unwrap());
                    socket.connect(self.server).await.unwrap();
                    lock(&self.addresses).push(socket.local_addr().unwrap());
                    answers.spawn(answer(
                        socket.clone(),
                        self.front.clone(),
                        client,
                        self.down.clone(),
                    ));
                    unknown.insert(socket)
                }
            };
            let datagram = &buffer[..length];
            let id = destination_id(datagram);
            // A probe that asks the system whether anything listens may arrive first.
            if first.is_none() && !id.is_empty() {
                first = Some(First {
                    client,
                    connection: id.into(),
                    came: 0,
                });
            }
            let settings = lock(&self.up.state).settings.clone();
            let lost = first
                .as_mut()
                .is_some_and(|first| first.is_lost(client, id, &settings));
            if !lost {
                self.up.take(datagram, socket, self.server);
            }
        }
    }
}

/// The first client.
struct First {
    client: SocketAddr,
    /// The connection id that a client gives its server until the server has answered.
    connection: Vec<u8>,
    came: u64,
}

impl First {
    /// Whether another datagram is lost because it belongs to the first client.
    fn is_lost(&mut self, client: SocketAddr, id: &[u8], settings: &Settings) -> bool {
        self.came += u64::from(self.client == client);
        let late = self.client == client && self.came > settings.of_first_client;
        late || settings.first_connection_is_lost && id == self.connection
    }
}

/// The destination id of a packet with a long header (RFC 8999, section 5.1).
fn destination_id(datagram: &[u8]) -> &[u8] {
    const LONG_HEADER: u8 = 0x80;
    match datagram {
        [first, _, _, _, _, length, rest @ ..] if first & LONG_HEADER != 0 => {
            rest.get(..usize::from(*length)).unwrap_or_default()
        }
        _ => &[],
    }
}

async fn answer(
    socket: Arc<UdpSocket>,
    front: Arc<UdpSocket>,
    client: SocketAddr,
    down: Arc<Line>,
) {
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        // An error comes from ICMP: the server is not there for now.
        if let Ok(length) = socket.recv(&mut buffer).await {
            down.take(&buffer[..length], &front, client);
        }
    }
}

/// One direction of a path.
pub(crate) struct Line {
    state: Mutex<State>,
    /// Notified when a datagram is due earlier than those before it.
    sooner: Notify,
}

struct State {
    settings: Settings,
    seed: u64,
    counts: Counts,
    /// Datagrams that arrived so far.
    came: u64,
    /// Datagrams still to be lost in this burst.
    burst: u32,
    /// When the rate has room for the next datagram.
    free: Instant,
    /// By due time; datagrams with equal due times keep their order.
    under_way: BTreeMap<(Instant, u64), Datagram>,
    bytes: usize,
}

struct Datagram {
    payload: Vec<u8>,
    by: Arc<UdpSocket>,
    to: SocketAddr,
}

impl Line {
    fn new(seed: u64, settings: Settings) -> Self {
        let state = State {
            settings,
            seed,
            counts: Counts::default(),
            came: 0,
            burst: 0,
            free: Instant::now(),
            under_way: BTreeMap::new(),
            bytes: 0,
        };
        Self {
            state: Mutex::new(state),
            sooner: Notify::new(),
        }
    }

    /// Changes the settings of this direction for later datagrams.
    pub(crate) fn set(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut lock(&self.state).settings);
    }

    pub(crate) fn counts(&self) -> Counts {
        lock(&self.state).counts
    }

    fn take(&self, payload: &[u8], by: &Arc<UdpSocket>, to: SocketAddr) {
        let mut state = lock(&self.state);
        let first = state.under_way.keys().next().copied();
        state.came += 1;
        // Drawn for each datagram by its number, so that the result does not depend on earlier datagrams.
        let mut random = Random(state.seed.wrapping_add(state.came << 32));
        let copies = state.copies(&mut random, payload.len());
        for copy in 0..copies {
            let Some(due) = state.arrival(&mut random, payload.len()) else {
                continue;
            };
            let mut payload = payload.to_vec();
            if random.chance(state.settings.corrupt) && !payload.is_empty() {
                let bit = random.below(payload.len() as u64 * 8);
                payload[(bit / 8) as usize] ^= 1 << (bit % 8);
                state.counts.corrupted += 1;
            }
            state.counts.duplicated += u64::from(copy > 0);
            state.bytes += payload.len();
            let key = (due, 2 * state.came + copy);
            state.under_way.insert(
                key,
                Datagram {
                    payload,
                    by: by.clone(),
                    to,
                },
            );
        }
        if state.under_way.keys().next().copied() != first {
            self.sooner.notify_one();
        }
    }

    /// Returns the next datagram if it is due, or when it will be.
    fn next(&self) -> Result<Datagram, Option<Instant>> {
        let mut state = lock(&self.state);
        loop {
            let Some(first) = state.under_way.first_entry() else {
                return Err(None);
            };
            let (due, _) = *first.key();
            if due > Instant::now() {
                return Err(Some(due));
            }
            let datagram = first.remove();
            state.bytes -= datagram.payload.len();
            if !state.settings.blackout {
                state.counts.forwarded += 1;
                state.counts.forwarded_bytes += datagram.payload.len() as u64;
                return Ok(datagram);
            }
            state.counts.dropped += 1;
        }
    }
}

impl State {
    /// How many copies of a datagram pass: none, one or two.
    fn copies(&mut self, random: &mut Random, length: usize) -> u64 {
        let lost = random.chance(self.settings.loss);
        if random.chance(self.settings.burst) && self.burst == 0 {
            self.burst = self.settings.burst_length;
        }
        let in_burst = self.burst > 0;
        self.burst = self.burst.saturating_sub(1);
        let dark = self.settings.blackout || self.came > self.settings.dark_after;
        if lost || in_burst || dark || length > self.settings.mtu {
            self.counts.dropped += 1;
            return 0;
        }
        1 + u64::from(random.chance(self.settings.duplicate))
    }

    /// When a copy arrives, if it fits into the queue.
    fn arrival(&mut self, random: &mut Random, length: usize) -> Option<Instant> {
        let Settings {
            rate,
            queue,
            delay,
            jitter,
            ..
        } = self.settings;
        let now = Instant::now();
        let mut departs = now;
        let mut room = self.bytes + length <= MAX_UNDER_WAY;
        if let Some(rate) = rate {
            let begins = self.free.max(now);
            room &= (begins - now).as_secs_f64() * rate as f64 + length as f64 <= queue as f64;
            departs = begins + Duration::from_secs_f64(length as f64 / rate as f64);
        }
        if !room {
            self.counts.dropped += 1;
            return None;
        }
        self.free = departs;
        Some(departs + delay + jitter.mul_f64(random.fraction()))
    }
}

/// Sends the datagrams that are due.
async fn deliver(line: Arc<Line>) {
    loop {
        match line.next() {
            // Fails where nothing listens any more; a network would not report that either.
            Ok(datagram) => drop(datagram.by.send_to(&datagram.payload, datagram.to).await),
            Err(Some(due)) => tokio::select! {
                () = sleep_until(due) => {}
                () = line.sooner.notified() => {}
            },
            Err(None) => line.sooner.notified().await,
        }
    }
}

async fn socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let options = socket2::SockRef::from(&socket);
    // As large as the system allows.
    let _ = options
        .set_recv_buffer_size(SOCKET_BUFFER)
        .and(options.set_send_buffer_size(SOCKET_BUFFER));
    Ok(socket)
}

/// SplitMix64 (Steele, Lea and Flood, 2014): the same numbers on every machine, and no crate for it.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below 1.
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn chance(&mut self, part: f64) -> bool {
        self.fraction() < part
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
