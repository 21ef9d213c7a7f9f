//! A relay: two ends that know the same number find each other here, and where no direct way opens between them, it forwards
//! their datagrams. What it forwards is QUIC between the two, so that it sees who sends how much, and nothing else; a relay
//! that cheats gains nothing but that they do not find each other.

mod forward;
mod socket;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::rand;
use governor::clock::DefaultClock;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};
use quinn::Connection;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tracing::{Instrument, debug, info, info_span};

use crate::auth::identity::Identity;
use crate::config::Config;
use crate::error::text::PeerText;
use crate::error::{Code, Error, Reason, Result};
use crate::net::endpoint;
use crate::net::stream::{MessageReader, MessageWriter, StreamError, varint_of};
use crate::protocol::rate::Rate;
use crate::protocol::{Address, Forward, Found, Message, Place, Placed, Refused, Seek};

pub use forward::Allowance;
use forward::{Forwarder, Party};

/// Time for each message.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Streams that one connection may have open: some places, and whoever it looks for.
const MAX_STREAMS: u8 = 16;
/// Connections from one address, or IPv6 network of 64 bits: several people behind one NAT.
const MAX_CONNECTIONS_EACH: usize = 64;
/// Connections in all: each takes some tens of kilobytes, and 64 KiB more at most while it sends what nobody reads.
const MAX_CONNECTIONS: usize = 20_000;
/// Tries to find a number, or to get one, that an address has at once and then each minute.
const TRIES: NonZeroU32 = NonZeroU32::new(20).unwrap();
/// How often addresses are forgotten that have not tried for long.
const FORGET_INTERVAL: Duration = Duration::from_secs(60);
/// Whom a place may still have to tell of, before it is too slow for anybody.
const MAX_UNTOLD: usize = 8;
/// First numbers that are given, while a third of them at most are taken; then ten times as many, and so on. Those of codes that
/// no relay has given have three digits, so that nobody is taken for another.
const NUMBERS: std::ops::Range<u32> = 1_000..10_000;
const MAX_NUMBERS: u32 = 100_000_000;

/// Where to listen, whom to admit, and how much is carried.
#[derive(Debug)]
pub struct RelayOptions {
    /// The address to be found at.
    pub listen: SocketAddr,
    /// The first address to forward on; the others have the ports after it. Port 0 takes free ones.
    pub forward: SocketAddr,
    /// How many ports to forward on. An end can be in so many pairs at the same time.
    pub ports: u16,
    /// Its key. Whoever comes may pin it.
    pub identity: Identity,
    /// What admits, if not everybody is.
    pub token: Option<String>,
    /// Senders that can be found at the same time.
    pub places: usize,
    /// What is carried.
    pub allowance: Allowance,
}

/// A relay that listens.
pub struct Relay {
    endpoint: quinn::Endpoint,
    shared: Arc<Shared>,
}

type Limiter = RateLimiter<IpAddr, HashMapStateStore<IpAddr>, DefaultClock>;

struct Shared {
    /// Of the token; comparing digests takes the same time whatever is wrong.
    token: Option<blake3::Hash>,
    places: Mutex<HashMap<u32, Placement>>,
    most_places: usize,
    tries: Limiter,
    connected: Mutex<Connected>,
    forwarder: Arc<Forwarder>,
}

/// How many connections there are, and of each address.
#[derive(Default)]
struct Connected {
    all: usize,
    each: HashMap<IpAddr, usize>,
}

/// A sender that can be found.
struct Placement {
    claim: [u8; 16],
    guest: Guest,
    addresses: Vec<Address>,
    tell: mpsc::Sender<Found>,
}

/// Whoever has connected, from the IP that QUIC has validated in the handshake (RFC 9000, section 8.1).
#[derive(Debug, Clone)]
struct Guest {
    /// No other has it, where quinn's `stable_id` is that of another once this one is gone.
    id: u64,
    connection: Connection,
    ip: IpAddr,
}

impl Guest {
    /// As the forwarder knows it.
    fn party(&self) -> Party {
        Party {
            id: self.id,
            ip: self.ip,
        }
    }

    /// Where it is seen. Where that is another IP than it came from, it is told to come again: quinn takes the new one for the
    /// peer's before anything has answered there (RFC 9000, section 9.3), and a datagram may claim to come from anywhere.
    fn seen(&self) -> Result<Address, Reason> {
        let seen = canonical(self.connection.remote_address());
        if seen.ip() != self.ip {
            let text = "the address has changed; connect again";
            self.connection
                .close(varint_of(Code::Stopping), text.as_bytes());
            return Err(Reason::new(Code::Stopping, text));
        }
        Ok(Address(seen))
    }
}

impl Relay {
    /// Binds both ports. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Io`] when an address cannot be had, naming it.
    pub fn bind(options: RelayOptions) -> Result<Self> {
        let RelayOptions {
            listen,
            forward,
            ports,
            identity,
            token,
            places,
            allowance,
        } = options;
        let config = Config {
            memory: 1 << 20,
            idle_timeout: IDLE_TIMEOUT,
            ..Config::default()
        };
        let mut quic = endpoint::relay_server_config(&identity, &config)?;
        quic.max_incoming(MAX_INCOMING).migration(true);
        let endpoint = endpoint::Port::listening(listen, &identity, quic)?.endpoint;
        let shared = Arc::new(Shared {
            token: token.map(|token| blake3::hash(token.as_bytes())),
            places: Mutex::default(),
            most_places: places,
            tries: RateLimiter::hashmap(Quota::per_minute(TRIES)),
            connected: Mutex::default(),
            forwarder: Arc::new(Forwarder::bind(forward, ports, allowance)?),
        });
        Ok(Self { endpoint, shared })
    }

    /// Where it can be found.
    ///
    /// # Errors
    /// [`Error::Io`] when the system does not tell.
    pub fn address(&self) -> Result<SocketAddr> {
        self.endpoint
            .local_addr()
            .map_err(Error::io("the relay's address"))
    }

    /// The UDP ports on which it forwards.
    pub fn forwards_on(&self) -> &[u16] {
        self.shared.forwarder.ports()
    }

    /// Serves until `stop` is done. Those who have found a direct way do not notice its end.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let Self { endpoint, shared } = self;
        let serve = async {
            let mut id = 0;
            loop {
                let Some(incoming) = endpoint.accept().await else {
                    return;
                };
                // An address that is not its sender's would be counted against somebody else.
                if !incoming.remote_address_validated() {
                    let _ = incoming.retry();
                    continue;
                }
                let ip = incoming.remote_address().ip().to_canonical();
                let Some(counted) = Counted::one(&shared, network(ip)) else {
                    incoming.refuse();
                    continue;
                };
                id += 1;
                let shared = shared.clone();
                let span = info_span!("connection", from = %incoming.remote_address());
                let connection = async move {
                    if let Ok(Ok(connection)) = timeout(ANSWER_TIMEOUT, incoming).await {
                        serve_connection(Guest { id, connection, ip }, shared).await;
                    }
                    drop(counted);
                };
                tokio::spawn(connection.instrument(span));
            }
        };
        let forget = async {
            loop {
                tokio::time::sleep(FORGET_INTERVAL).await;
                shared.tries.retain_recent();
                shared.tries.shrink_to_fit();
            }
        };
        tokio::select! {
            () = stop => {}
            () = serve => {}
            () = shared.forwarder.clone().run() => {}
            () = forget => {}
        }
        endpoint.close(varint_of(Code::Stopping), b"the relay is stopping");
        let _ = timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
    }
}

/// A connection on which nothing comes for so long is gone; whoever has a place keeps it alive.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Handshakes that wait to be looked at.
const MAX_INCOMING: usize = 256;
/// How long a stopping relay waits for its last packets to go out.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// A connection that counts against its address, until this is dropped.
struct Counted(Arc<Shared>, IpAddr);

impl Counted {
    fn one(shared: &Arc<Shared>, from: IpAddr) -> Option<Self> {
        let mut connected = shared
            .connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if connected.all >= MAX_CONNECTIONS
            || connected
                .each
                .get(&from)
                .is_some_and(|n| *n >= MAX_CONNECTIONS_EACH)
        {
            return None;
        }
        connected.all += 1;
        *connected.each.entry(from).or_default() += 1;
        Some(Self(shared.clone(), from))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut connected = self
            .0
            .connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        connected.all -= 1;
        if let Some(count) = connected.each.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                connected.each.remove(&self.1);
            }
        }
    }
}

/// What one customer of a provider has: an IPv4 address, or the first 64 bits of an IPv6 one.
fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

async fn serve_connection(guest: Guest, shared: Arc<Shared>) {
    let streams = Arc::new(Semaphore::new(MAX_STREAMS.into()));
    while let Ok((send, receive)) = guest.connection.accept_bi().await {
        let reader = MessageReader::new(receive);
        let writer = MessageWriter::new(send);
        let Ok(permit) = streams.clone().try_acquire_owned() else {
            writer.reset(Code::Busy);
            continue;
        };
        let shared = shared.clone();
        let guest = guest.clone();
        let serve = async move {
            if let Err(why) = serve_stream(&shared, &guest, (reader, writer)).await {
                debug!(%why, "given up");
                if matches!(why, StreamError::Malformed(_)) {
                    guest
                        .connection
                        .close(varint_of(Code::Protocol), why.to_string().as_bytes());
                }
            }
            drop(permit);
        };
        tokio::spawn(serve.in_current_span());
    }
}

async fn serve_stream(
    shared: &Arc<Shared>,
    guest: &Guest,
    (mut reader, mut writer): (MessageReader, MessageWriter),
) -> Result<(), StreamError> {
    let limit = Place::LIMIT.max(Seek::LIMIT);
    let frame = timeout(ANSWER_TIMEOUT, reader.frame(limit))
        .await
        .map_err(|_| StreamError::TimedOut)??;
    let frame = frame.ok_or(StreamError::Ended)?;
    let place = match frame.kind {
        Seek::TYPE => {
            let seek: Seek = frame.decode()?;
            match shared
                .admit(guest, seek.token.as_ref().map(PeerText::raw))
                .and_then(|seen| shared.seek((guest, seen), &seek))
            {
                Ok(found) => writer.write_within(&found, ANSWER_TIMEOUT).await?,
                Err(why) => {
                    writer
                        .write_within(&Refused { why: why.into() }, ANSWER_TIMEOUT)
                        .await?
                }
            }
            writer.finish();
            return Ok(());
        }
        _ => frame.decode::<Place>()?,
    };
    let (tell, mut untold) = mpsc::channel(MAX_UNTOLD);
    let admitted = shared.admit(guest, place.token.as_ref().map(PeerText::raw));
    let placed = admitted.and_then(|seen| Ok((shared.place(guest, place, tell)?, seen)));
    let (taken, seen) = match placed {
        Ok(placed) => placed,
        Err(why) => {
            writer
                .write_within(&Refused { why: why.into() }, ANSWER_TIMEOUT)
                .await?;
            writer.finish();
            return Ok(());
        }
    };
    writer
        .write_within(
            &Placed {
                number: taken.number,
                seen,
            },
            ANSWER_TIMEOUT,
        )
        .await?;
    loop {
        tokio::select! {
            found = untold.recv() => match found {
                Some(found) => writer.write_within(&found, ANSWER_TIMEOUT).await?,
                // Somebody came with the same claim.
                None => return Ok(()),
            },
            // Whatever it says, it says no more.
            _ = reader.byte() => return Ok(()),
        }
    }
}

/// A number that is somebody's until this is dropped.
struct Taken {
    shared: Arc<Shared>,
    number: u32,
    tell: mpsc::WeakSender<Found>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut places = self.shared.places();
        // Whoever has come again with the same claim has it now.
        let own = |there: &Placement| {
            self.tell
                .upgrade()
                .is_some_and(|own| own.same_channel(&there.tell))
        };
        if places.get(&self.number).is_some_and(own) {
            places.remove(&self.number);
        }
    }
}

impl Shared {
    fn places(&self) -> MutexGuard<'_, HashMap<u32, Placement>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where somebody is seen who may try at all.
    fn admit(&self, guest: &Guest, token: Option<&str>) -> Result<Address, Reason> {
        let seen = guest.seen()?;
        if self.tries.check_key(&network(guest.ip)).is_err() {
            return Err(Reason::new(
                Code::Busy,
                "too many tries from this address; wait a minute",
            ));
        }
        match &self.token {
            Some(wanted) if token.is_none_or(|token| blake3::hash(token.as_bytes()) != *wanted) => {
                Err(Reason::new(
                    Code::NotAdmitted,
                    "this relay wants a token, and this is not the one",
                ))
            }
            _ => Ok(seen),
        }
    }

    /// Gives somebody a number, the one it had if that can be.
    fn place(
        self: &Arc<Self>,
        guest: &Guest,
        place: Place,
        tell: mpsc::Sender<Found>,
    ) -> Result<Taken, Reason> {
        let mut places = self.places();
        let again = place.number.filter(|number| {
            places
                .get(number)
                .is_none_or(|there| there.claim == place.claim)
        });
        if again.is_none_or(|number| !places.contains_key(&number))
            && places.len() >= self.most_places
        {
            return Err(Reason::new(
                Code::Busy,
                "the relay is full; try again later",
            ));
        }
        let number = match again.filter(|number| (NUMBERS.start..MAX_NUMBERS).contains(number)) {
            Some(number) => number,
            None => free_number(&places)?,
        };
        let own = tell.downgrade();
        let Place {
            claim, addresses, ..
        } = place;
        places.insert(
            number,
            Placement {
                claim,
                guest: guest.clone(),
                addresses,
                tell,
            },
        );
        drop(places);
        info!(number, "placed");
        Ok(Taken {
            shared: self.clone(),
            number,
            tell: own,
        })
    }

    /// Tells two ends of each other.
    fn seek(&self, (guest, seen): (&Guest, Address), seek: &Seek) -> Result<Found, Reason> {
        let nobody = || Reason::new(Code::NotFound, "nobody is at this number");
        let places = self.places();
        let there = places.get(&seek.number).ok_or_else(nobody)?;
        let its = there.guest.seen().map_err(|_| nobody())?;
        // Before there is a pair: nobody would bind one that the sender does not hear of.
        let tell = there.tell.try_reserve();
        let tell = tell
            .map_err(|_| Reason::new(Code::Busy, "too many look for this number; wait a moment"))?;
        let pair = if seek.forward {
            self.forwarder.pair([there.guest.party(), guest.party()])
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
        tell.send(Found {
            addresses: addresses(seen, &seek.addresses),
            forward: to_sender,
        });
        Ok(Found {
            addresses: addresses(its, &there.addresses),
            forward: to_receiver,
        })
    }
}

/// Where an end is seen, and what it tells of itself.
fn addresses(seen: Address, own: &[Address]) -> Vec<Address> {
    std::iter::once(seen).chain(own.iter().copied()).collect()
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// One that nobody has, with as few digits as leave most of them free.
fn free_number(places: &HashMap<u32, Placement>) -> Result<u32, Reason> {
    let mut end = NUMBERS.end;
    while places.len() as u64 * 3 > u64::from(end - NUMBERS.start) && end < MAX_NUMBERS {
        end *= 10;
    }
    for _ in 0..100 {
        let mut random = [0; 4];
        rand::fill(&mut random).map_err(|_| Reason::from(Code::Internal))?;
        let number = NUMBERS.start + u32::from_le_bytes(random) % (end - NUMBERS.start);
        if !places.contains_key(&number) {
            return Ok(number);
        }
    }
    Err(Reason::new(Code::Busy, "no number is free"))
}

/// What bounds a pair unless the operator says otherwise.
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
