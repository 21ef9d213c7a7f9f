//! A network in virtual time: quinn's own state machines, without sockets, on both sides of a shared bottleneck.
//!
//! All of quinn's real pacing, loss recovery and flow control runs, driven by a clock that jumps from event to event.
//! Nothing here waits, and the same seed gives the same run.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use haul::{Config, Congestion, Identity, ServerTrust};
use quinn_proto::{
    Connection, ConnectionHandle, DatagramEvent, Dir, Endpoint, EndpointConfig, Event, StreamId,
    Transmit, VarInt,
};

/// IP and UDP headers, in bytes; the link counts them.
const HEADERS: usize = 28;
/// The granularity to which timers of a real runtime are rounded up.
const TICK: Duration = Duration::from_millis(1);

/// One direction of a link. Times are one way.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    /// Bits a second.
    pub rate: f64,
    pub delay: Duration,
    /// Drop-tail queue in bytes.
    pub queue: f64,
    /// Probability of loss, before the queue.
    pub loss: f64,
    /// Probabilities, for each packet, to enter and to leave a state in which everything is lost.
    pub burst: (f64, f64),
    /// Uniform extra delay up to this, which reorders.
    pub jitter: Duration,
    /// Largest IP packet in bytes.
    pub mtu: usize,
    /// Everything is lost while this is set.
    pub dark: bool,
}

impl Link {
    /// A clean link with a queue of one bandwidth-delay product of the round trip.
    pub(crate) fn new(mbit: f64, rtt_ms: u64) -> Self {
        let queue = (mbit * 1e6 / 8.0 * rtt_ms as f64 / 1e3).max(64e3);
        let delay = Duration::from_micros(rtt_ms * 500);
        Self {
            rate: mbit * 1e6,
            delay,
            queue,
            loss: 0.0,
            burst: (0.0, 1.0),
            jitter: Duration::ZERO,
            mtu: 1500,
            dark: false,
        }
    }

    pub(crate) fn loss(self, loss: f64) -> Self {
        Self { loss, ..self }
    }
}

/// The traffic of one direction.
#[derive(Debug, Default, Clone)]
pub(crate) struct Counts {
    pub packets: u64,
    pub bytes: u64,
    pub lost: u64,
    pub overflowed: u64,
    /// Seconds in the queue, summed over the packets that were accepted.
    pub queued: f64,
    pub let_in: u64,
}

impl Counts {
    pub(crate) fn mean_queue(&self) -> f64 {
        self.queued / (self.let_in.max(1)) as f64
    }
}

struct Wire {
    link: Link,
    busy_until: Instant,
    bad: bool,
    counts: Counts,
}

impl Wire {
    /// When a packet of this size comes out at the other end; `None` when it does not.
    fn carry(&mut self, now: Instant, size: usize, random: &mut Random) -> Option<Instant> {
        let (link, counts) = (&self.link, &mut self.counts);
        if size > link.mtu {
            return None;
        }
        counts.packets += 1;
        counts.bytes += size as u64;
        let turn = random.unit();
        if (self.bad && turn < link.burst.1) || (!self.bad && turn < link.burst.0) {
            self.bad = !self.bad;
        }
        if link.dark || self.bad || random.unit() < link.loss {
            counts.lost += 1;
            return None;
        }
        let start = self.busy_until.max(now);
        let waits = (start - now).as_secs_f64();
        if waits * link.rate / 8.0 + size as f64 > link.queue {
            counts.overflowed += 1;
            return None;
        }
        counts.queued += waits;
        counts.let_in += 1;
        self.busy_until = start + Duration::from_secs_f64(size as f64 * 8.0 / link.rate);
        Some(self.busy_until + link.delay + link.jitter.mul_f64(random.unit()))
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

struct Side {
    endpoint: Endpoint,
    connection: Option<(ConnectionHandle, Connection)>,
    wake: Option<Instant>,
    stream: Option<StreamId>,
}

/// One sender and one receiver.
struct Flow {
    sides: [Side; 2],
    begin: Instant,
    bytes: u64,
    /// Bytes still to send.
    left: u64,
    received: u64,
    done: Option<Instant>,
    /// Received bytes by tenth of a second since the beginning.
    tenths: Vec<u64>,
}

enum What {
    Arrive {
        flow: usize,
        side: usize,
        data: BytesMut,
    },
    Wake {
        flow: usize,
        side: usize,
    },
    Begin {
        flow: usize,
    },
    Change(Box<dyn FnOnce(&mut Link)>),
}

/// The network.
pub(crate) struct Network {
    start: Instant,
    now: Instant,
    wires: [Wire; 2],
    random: Random,
    flows: Vec<Flow>,
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    what: HashMap<u64, What>,
    order: u64,
}

const CLIENT: usize = 0;
const SERVER: usize = 1;

impl Network {
    pub(crate) fn new(link: Link) -> Self {
        let now = Instant::now();
        let wire = |link: Link| Wire {
            link,
            busy_until: now,
            bad: false,
            counts: Counts::default(),
        };
        Self {
            start: now,
            now,
            wires: [wire(link.clone()), wire(link)],
            random: Random(7),
            flows: Vec::new(),
            queue: BinaryHeap::new(),
            what: HashMap::new(),
            order: 0,
        }
    }

    /// Adds a flow that sends this many bytes from second `begin` on.
    pub(crate) fn flow(&mut self, congestion: Congestion, bytes: u64, begin: f64) -> usize {
        let config = Config {
            congestion,
            ..Config::default()
        };
        let identity = Identity::generate().unwrap();
        let trust = ServerTrust {
            pin: Some(identity.key_id()),
            ..ServerTrust::default()
        };
        let server = haul::internal::net::endpoint::server_config(&identity, &config).unwrap();
        let client = haul::internal::net::endpoint::client_config(
            &identity,
            trust.verifier("localhost", 1).unwrap(),
            &config,
        )
        .unwrap();
        let mut endpoint = EndpointConfig::default();
        endpoint.max_udp_payload_size(6500).unwrap();
        let endpoint = Arc::new(endpoint);
        let seed = Some([self.flows.len() as u8; 32]);
        let mut sides = [
            Side {
                endpoint: Endpoint::new(endpoint.clone(), None, true, seed),
                connection: None,
                wake: None,
                stream: None,
            },
            Side {
                endpoint: Endpoint::new(endpoint, Some(Arc::new(server)), true, seed),
                connection: None,
                wake: None,
                stream: None,
            },
        ];
        let begin = self.start + Duration::from_secs_f64(begin);
        let connected = sides[CLIENT]
            .endpoint
            .connect(begin, client, address(SERVER), "localhost")
            .unwrap();
        sides[CLIENT].connection = Some(connected);
        self.flows.push(Flow {
            sides,
            begin,
            bytes,
            left: bytes,
            received: 0,
            done: None,
            tenths: Vec::new(),
        });
        let flow = self.flows.len() - 1;
        self.at(begin, What::Begin { flow });
        flow
    }

    /// Changes the return path from the server.
    pub(crate) fn change_back(&mut self, change: impl Fn(&mut Link)) {
        change(&mut self.wires[SERVER].link);
    }

    /// Changes both directions of the link at second `at`.
    pub(crate) fn change(&mut self, at: f64, change: impl Fn(&mut Link) + 'static) {
        self.at(
            self.start + Duration::from_secs_f64(at),
            What::Change(Box::new(change)),
        );
    }

    /// Runs until all flows are done, or second `until`.
    pub(crate) fn run(&mut self, until: f64) {
        let until = self.start + Duration::from_secs_f64(until);
        while let Some(&Reverse((at, order))) = self.queue.peek() {
            if at > until || self.flows.iter().all(|flow| flow.done.is_some()) {
                break;
            }
            self.queue.pop();
            self.now = self.now.max(at);
            match self.what.remove(&order).unwrap() {
                What::Arrive { flow, side, data } => self.arrive(flow, side, data),
                What::Wake { flow, side } => {
                    let now = self.now;
                    let side_of = &mut self.flows[flow].sides[side];
                    if side_of.wake == Some(at) {
                        side_of.wake = None;
                        if let Some((_, connection)) = &mut side_of.connection {
                            connection.handle_timeout(now);
                        }
                        self.drive(flow, side);
                    }
                }
                What::Begin { flow } => self.drive(flow, CLIENT),
                What::Change(change) => {
                    let mut link = self.wires[CLIENT].link.clone();
                    change(&mut link);
                    self.wires[CLIENT].link = link.clone();
                    self.wires[SERVER].link = link;
                }
            }
        }
    }

    /// Seconds until a flow's last byte arrived, from its beginning.
    pub(crate) fn seconds(&self, flow: usize) -> Option<f64> {
        let flow = &self.flows[flow];
        Some((flow.done? - flow.begin).as_secs_f64())
    }

    /// Received bits a second between two seconds since the flow's beginning.
    pub(crate) fn rate(&self, flow: usize, from: f64, to: f64) -> f64 {
        let tenths = &self.flows[flow].tenths;
        let (from, to) = ((from * 10.0) as usize, (to * 10.0) as usize);
        let sum: u64 = tenths.iter().skip(from).take(to - from).sum();
        sum as f64 * 8.0 / ((to - from) as f64 / 10.0)
    }

    /// The traffic from the senders to the receivers.
    pub(crate) fn counts(&self) -> &Counts {
        &self.wires[CLIENT].counts
    }

    fn at(&mut self, at: Instant, what: What) {
        self.order += 1;
        self.queue.push(Reverse((at, self.order)));
        self.what.insert(self.order, what);
    }

    fn arrive(&mut self, flow: usize, side: usize, data: BytesMut) {
        let now = self.now;
        let mut answer = Vec::new();
        let this = &mut self.flows[flow].sides[side];
        match this
            .endpoint
            .handle(now, address(1 - side), None, None, data, &mut answer)
        {
            Some(DatagramEvent::NewConnection(incoming)) => {
                let accepted = this.endpoint.accept(incoming, now, &mut answer, None);
                this.connection = Some(accepted.map_err(|e| e.cause).unwrap());
            }
            Some(DatagramEvent::ConnectionEvent(_, event)) => {
                if let Some((_, connection)) = &mut this.connection {
                    connection.handle_event(event);
                }
            }
            _ => {}
        }
        self.drive(flow, side);
    }

    /// Does all that a connection has to do at this instant.
    fn drive(&mut self, flow: usize, side: usize) {
        let now = self.now;
        self.application(flow, side);
        let mut out = Vec::new();
        let this = &mut self.flows[flow].sides[side];
        let Some((handle, connection)) = &mut this.connection else {
            return;
        };
        let mut buffer = Vec::new();
        while let Some(Transmit {
            size, segment_size, ..
        }) = connection.poll_transmit(now, 10, &mut buffer)
        {
            for datagram in buffer[..size].chunks(segment_size.unwrap_or(size)) {
                out.push(BytesMut::from(datagram));
            }
            buffer.clear();
        }
        while let Some(event) = connection.poll_endpoint_events() {
            if let Some(event) = this.endpoint.handle_event(*handle, event) {
                connection.handle_event(event);
            }
        }
        let wake = connection
            .poll_timeout()
            .map(|at| round_up(self.start, at.max(now)));
        let new = if this.wake == wake { None } else { wake };
        this.wake = wake;
        if let Some(at) = new {
            self.at(at, What::Wake { flow, side });
        }
        for data in out {
            if let Some(at) = self.wires[side].carry(now, data.len() + HEADERS, &mut self.random) {
                self.at(
                    at,
                    What::Arrive {
                        flow,
                        side: 1 - side,
                        data,
                    },
                );
            }
        }
    }

    fn application(&mut self, index: usize, side: usize) {
        let now = self.now;
        let flow = &mut self.flows[index];
        let this = &mut flow.sides[side];
        let Some((_, connection)) = &mut this.connection else {
            return;
        };
        while let Some(event) = connection.poll() {
            if let Event::ConnectionLost { reason } = event {
                panic!("flow {index} lost its connection: {reason}");
            }
            if matches!(event, Event::Connected) {
                // The windows that result from a connection's memory budget and its updates on such links.
                connection.set_receive_window(VarInt::from_u32(64 << 20));
                connection.set_send_window(48 << 20);
            }
        }
        if connection.is_handshaking() {
            return;
        }
        if side == CLIENT {
            if this.stream.is_none() {
                this.stream = connection.streams().open(Dir::Bi);
            }
            let Some(id) = this.stream else { return };
            static FILLER: [u8; 64 << 10] = [7; 64 << 10];
            while flow.left > 0 {
                let part = Bytes::from_static(&FILLER[..flow.left.min(64 << 10) as usize]);
                match connection.send_stream(id).write_chunks(&mut [part]) {
                    Ok(written) => flow.left -= written.bytes as u64,
                    Err(_) => return,
                }
            }
        } else {
            if this.stream.is_none() {
                this.stream = connection.streams().accept(Dir::Bi);
            }
            let Some(id) = this.stream else { return };
            let mut stream = connection.recv_stream(id);
            let Ok(mut chunks) = stream.read(false) else {
                return;
            };
            while let Ok(Some(chunk)) = chunks.next(usize::MAX) {
                flow.received += chunk.bytes.len() as u64;
                let tenth = ((now - flow.begin).as_secs_f64() * 10.0) as usize;
                if flow.tenths.len() <= tenth {
                    flow.tenths.resize(tenth + 1, 0);
                }
                flow.tenths[tenth] += chunk.bytes.len() as u64;
            }
            let _ = chunks.finalize();
            if flow.received == flow.bytes && flow.done.is_none() {
                flow.done = Some(now);
            }
        }
    }
}

fn round_up(start: Instant, at: Instant) -> Instant {
    let ticks = (at - start).as_nanos().div_ceil(TICK.as_nanos());
    start + TICK * ticks as u32
}

fn address(side: usize) -> SocketAddr {
    ([127, 0, 0, 1 + side as u8], 4433).into()
}
