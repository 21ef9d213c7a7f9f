//! Finding each other at a relay: each end tells it where it may be reached and hears where the other may be, the sender
//! opens its NAT for the receiver, and both bind their addresses where the relay forwards.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use aws_lc_rs::rand;
use quinn::Connection;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use crate::auth::identity::KeyId;
use crate::auth::trust::trust_any_key;
use crate::config::Config;
use crate::error::text::PeerText;
use crate::error::text::printable;
use crate::error::{Code, Error, Reason, Result};
use crate::net::connect;
use crate::net::endpoint::Port;
use crate::net::stream::{MessageReader, MessageWriter, StreamError};
use crate::protocol::{
    Address, BIND, Forward, Found, MAX_ADDRESSES, Message, Place, Placed, Refused, Seek,
};
use crate::transfer::events::Route;

/// The port of a relay, unless another is said; it forwards on the next.
pub const RELAY_PORT: u16 = 4440;

/// Time for each answer of a relay.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a NAT is opened, and for how long: as long as whoever comes is likely to try.
const PUNCH_INTERVAL: Duration = Duration::from_millis(100);
const PUNCH_LIMIT: usize = 50;
/// Addresses that are sent to each time, those of whoever came last first. Whoever knows the number, and every relay, can name addresses of
/// third machines: so 320 datagrams of a byte a second are the most that these ever get together, and ten the most of any one.
const MAX_PUNCHED: usize = 32;
/// A byte that QUIC endpoints drop: neither a long header nor, without the fixed bit, a short one.
const PUNCH: [u8; 1] = [0];
/// How often an address is bound at first, as datagrams get lost, and then: a NAT that has given it another mapping is noticed so
/// soon, and none forgets it meanwhile.
const FIRST_BIND_INTERVAL: Duration = Duration::from_millis(200);
const FIRST_BINDS: usize = 10;
const BIND_INTERVAL: Duration = Duration::from_secs(5);
/// Receivers that are attended to at the same time: the last ones. A relay has no more ports for them.
const MAX_ATTENDED: usize = 8;
/// How soon after one receiver the next is attended to: each is answered with a datagram to the relay at once.
const ATTEND_INTERVAL: Duration = Duration::from_millis(250);
/// How long a sender waits before it goes to a relay again that it has lost: at first, and at most.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(15);

/// Where a relay is, and what it wants.
#[derive(Clone, PartialEq, Eq)]
pub struct RelayAt {
    /// Its name or address.
    pub host: String,
    /// Its UDP port.
    pub port: u16,
    /// What it wants to see.
    pub token: Option<String>,
    /// Its key; without, any relay is taken at its word, and one that lies keeps the two ends apart and nothing more.
    pub pin: Option<KeyId>,
}

impl std::fmt::Debug for RelayAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RelayAt({self})")
    }
}

/// Without token and pin.
impl std::fmt::Display for RelayAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Its host may come from a ticket.
        let host = printable(self.host.as_bytes());
        match self.host.contains(':') {
            true => write!(f, "[{host}]:{}", self.port),
            false => write!(f, "{host}:{}", self.port),
        }
    }
}

impl FromStr for RelayAt {
    type Err = Error;

    /// `HOST`, `HOST:PORT` or `[IPV6]:PORT`.
    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::Usage(format!(
                "a relay is written HOST or HOST:PORT, not {}",
                printable(text.as_bytes())
            ))
        };
        let text = text.trim();
        let (host, port) = match text.parse::<IpAddr>() {
            Ok(ip) => (ip.to_string(), RELAY_PORT),
            Err(_) => match text.rsplit_once(':') {
                Some((host, port)) => (host.to_owned(), port.parse().map_err(|_| wrong())?),
                None => (text.to_owned(), RELAY_PORT),
            },
        };
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(&host);
        // A ticket is somebody else's text: its host must not steer a terminal, wherever it is shown.
        let odd = bare.contains(char::is_whitespace) || printable(bare.as_bytes()) != bare;
        if bare.is_empty() || odd || bare.contains('/') || port == 0 {
            return Err(wrong());
        }
        Ok(Self {
            host: bare.to_owned(),
            port,
            token: None,
            pin: None,
        })
    }
}

/// A task that ends with this.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A connection to a relay, from the very port that the transfer is to use.
pub(super) struct Meeting {
    port: Port,
    relay: RelayAt,
    connection: Connection,
    /// Where this end may be reached besides where the relay sees it.
    own: Vec<Address>,
}

/// The other end, as the relay has told.
#[derive(Debug, Clone)]
pub(super) struct OtherEnd {
    /// Where the relay sees it.
    pub(super) seen: Option<SocketAddr>,
    /// Where else it says it may be reached.
    pub(super) told: Vec<SocketAddr>,
    /// Where the relay forwards to it.
    pub(super) relayed: Option<SocketAddr>,
}

impl OtherEnd {
    /// What way an address of it is; none where the relay has told nothing of it.
    pub(super) fn route(&self, address: SocketAddr) -> Option<Route> {
        match canonical(address) {
            own if self.told.contains(&own) => Some(Route::Direct),
            relay if self.relayed == Some(relay) => Some(Route::Relayed),
            nat if self.seen == Some(nat) => Some(Route::Punched),
            _ => None,
        }
    }
}

/// Binds this end's address where the relay forwards, until it is dropped.
pub(super) struct Binding {
    _task: Option<Task>,
}

impl Meeting {
    /// Goes to a relay. `own` are addresses of this machine; the port is the endpoint's.
    ///
    /// # Errors
    /// What ends a connection before it has begun.
    pub(super) async fn at(
        port: &Port,
        relay: &RelayAt,
        own: &[IpAddr],
        config: &Config,
    ) -> Result<Self> {
        let trust = trust_any_key(relay.pin);
        let connection =
            connect::connect_relay(&port.endpoint, &trust, &relay.host, relay.port, config).await?;
        let local = port
            .endpoint
            .local_addr()
            .map(|local| local.port())
            .unwrap_or_default();
        let own = own
            .iter()
            .map(|ip| Address(SocketAddr::new(*ip, local)))
            .take(MAX_ADDRESSES)
            .collect();
        debug!(%relay, at = %connection.remote_address(), "at the relay");
        Ok(Self {
            port: port.clone(),
            relay: relay.clone(),
            connection,
            own,
        })
    }

    pub(super) fn is_gone(&self) -> bool {
        self.connection.close_reason().is_some()
    }

    /// Asks who is at a number, and to forward if there is no other way.
    ///
    /// # Errors
    /// [`Error::Refused`] with [`Code::NotFound`](crate::error::Code::NotFound) when nobody is, and with what else the relay
    /// refuses; what ends a connection.
    pub(super) async fn seek(&self, number: u32, forward: bool) -> Result<(OtherEnd, Binding)> {
        let seek = Seek {
            number,
            token: self.relay.token.clone().map(PeerText::from),
            addresses: self.own.clone(),
            forward,
        };
        let (mut reader, _writer) = self.ask(&seek).await?;
        let found = answer(&mut reader).await?;
        Ok(self.other_end(found))
    }

    /// Takes a number, or the one that it had before.
    async fn place(
        &self,
        claim: [u8; 16],
        number: Option<u32>,
    ) -> Result<(Placed, MessageReader, MessageWriter)> {
        let place = Place {
            claim,
            number,
            token: self.relay.token.clone().map(PeerText::from),
            addresses: self.own.clone(),
        };
        let (mut reader, writer) = self.ask(&place).await?;
        let placed: Placed = answer(&mut reader).await?;
        info!(number = placed.number, seen = %placed.seen.0, "has a number at the relay");
        Ok((placed, reader, writer))
    }

    async fn ask<M: Message>(&self, message: &M) -> Result<(MessageReader, MessageWriter)> {
        let opened = timeout(ANSWER_TIMEOUT, self.connection.open_bi())
            .await
            .map_err(|_| StreamError::TimedOut)?;
        let (send, receive) = opened.map_err(StreamError::from)?;
        let mut writer = MessageWriter::new(send);
        writer.write_within(message, ANSWER_TIMEOUT).await?;
        Ok((MessageReader::new(receive), writer))
    }

    fn other_end(&self, found: Found) -> (OtherEnd, Binding) {
        let relay = self.connection.remote_address();
        let near = relay.ip().to_canonical().is_loopback();
        let mut addresses = found.addresses.iter().map(|address| canonical(address.0));
        let seen = addresses.next().filter(|address| usable(*address, near));
        let mut told = Vec::new();
        for address in addresses.filter(|address| usable(*address, near)) {
            // Each is tried once, however often a relay names it.
            if !told.contains(&address) {
                told.push(address);
            }
        }
        let relayed = found
            .forward
            .as_ref()
            .map(|forward| SocketAddr::new(relay.ip().to_canonical(), forward.port));
        let binding = found
            .forward
            .zip(relayed)
            .map(|(forward, at)| Task(tokio::spawn(bind(self.port.clone(), forward, at))));
        (
            OtherEnd {
                seen,
                told,
                relayed,
            },
            Binding { _task: binding },
        )
    }
}

/// Whether somebody's address may be sent to. Those of this machine itself only where the relay is on it too.
fn usable(address: SocketAddr, near: bool) -> bool {
    let ip = address.ip().to_canonical();
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    address.port() != 0
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && !broadcast
        && (near || !ip.is_loopback())
}

/// Makes this port's address, as the relay sees it there, the one that it forwards to; until it is dropped.
async fn bind(port: Port, forward: Forward, at: SocketAddr) {
    let datagram = [&[BIND][..], &forward.token].concat();
    for sent in 0.. {
        port.send(&datagram, at);
        sleep(if sent < FIRST_BINDS {
            FIRST_BIND_INTERVAL
        } else {
            BIND_INTERVAL
        })
        .await;
    }
}

/// As the other end's `told` and `seen` are written, and whoever comes by them is compared.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Somebody who looks for this end.
struct Attended {
    end: OtherEnd,
    _binding: Binding,
    /// How often its addresses are still to be sent to.
    punches: usize,
}

/// Where to send to now, so that this end's NAT opens for those who look for it.
fn to_punch(attended: &mut VecDeque<Attended>) -> Vec<SocketAddr> {
    let mut addresses = Vec::new();
    for other in attended.iter_mut().rev().filter(|other| other.punches > 0) {
        other.punches -= 1;
        for address in other.end.seen.iter().chain(&other.end.told) {
            if addresses.len() < MAX_PUNCHED && !addresses.contains(address) {
                addresses.push(*address);
            }
        }
    }
    addresses
}

/// A number that no relay has given, and what shows whose it is.
#[derive(Clone, Copy)]
pub(super) struct WantedFile {
    pub(super) number: u32,
    pub(super) claim: [u8; 16],
}

/// A number under which a sender can be found, until this is dropped.
pub(super) struct Placement {
    number: u32,
    seen: SocketAddr,
    /// Whether that is an address of its own, so that no NAT is in the way here.
    open: bool,
    /// Those who came last.
    came: watch::Receiver<Vec<OtherEnd>>,
    _attending: Task,
}

impl Placement {
    /// Goes to a relay and takes a number; comes back to it whenever it is lost.
    ///
    /// # Errors
    /// As [`Meeting::at`] and [`Meeting::seek`]; [`Error::Refused`] with [`Code::Busy`] when another has the number that is wanted.
    pub(super) async fn take(
        port: Port,
        relay: RelayAt,
        own: Vec<IpAddr>,
        config: Config,
        wanted: Option<WantedFile>,
    ) -> Result<Self> {
        let mut claim = [0; 16];
        match wanted {
            Some(wanted) => claim = wanted.claim,
            None => rand::fill(&mut claim)
                .map_err(|_| Error::Usage("the system gives no random numbers".into()))?,
        }
        let wanted = wanted.map(|wanted| wanted.number);
        let meeting = Meeting::at(&port, &relay, &own, &config).await?;
        let (Placed { number, seen }, reader, writer) = meeting.place(claim, wanted).await?;
        if wanted.is_some_and(|wanted| wanted != number) {
            return Err(Error::Refused(Reason::new(
                Code::Busy,
                "somebody else has the number at the relay",
            )));
        }
        let open = own.contains(&seen.0.ip());
        let (tell, came) = watch::channel(Vec::new());
        let attending = async move {
            attend(&meeting, reader, &tell).await;
            drop((meeting, writer));
            let mut wait = RETRY_INTERVAL;
            loop {
                sleep(wait).await;
                wait = (wait * 2).min(MAX_RETRY_INTERVAL);
                let again = async {
                    let meeting = Meeting::at(&port, &relay, &own, &config).await?;
                    let (given, reader, writer) = meeting.place(claim, Some(number)).await?;
                    Ok::<_, Error>((meeting, given, reader, writer))
                };
                match again.await {
                    Ok((meeting, given, reader, _writer)) if given.number == number => {
                        let placed = Instant::now();
                        attend(&meeting, reader, &tell).await;
                        // Whoever loses it at once shares its claim with another process, and the two would take it in turn.
                        if placed.elapsed() > MAX_RETRY_INTERVAL {
                            wait = RETRY_INTERVAL;
                        }
                    }
                    Ok(_) => warn!(number, "somebody else has the number at the relay now"),
                    Err(error) => debug!(%error, "the relay is not back yet"),
                }
            }
        };
        Ok(Self {
            number,
            seen: seen.0,
            open,
            came,
            _attending: Task(tokio::spawn(attending)),
        })
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Where the relay saw this end when it came.
    pub(super) fn seen(&self) -> SocketAddr {
        self.seen
    }

    /// By what way somebody has come; none where it is not by the relay's help. Whoever comes from where the relay sees it comes
    /// through this end's NAT, if there is one, and that had to be opened. So both ends call the way the same.
    pub(super) fn route(&self, from: SocketAddr) -> Option<Route> {
        self.came
            .borrow()
            .iter()
            .find_map(|end| match end.route(from)? {
                Route::Relayed => Some(Route::Relayed),
                _ if end.seen == Some(from) && !self.open => Some(Route::Punched),
                _ => Some(Route::Direct),
            })
    }
}

/// Makes way for those who look for this end, until the relay is gone.
async fn attend(meeting: &Meeting, mut reader: MessageReader, tell: &watch::Sender<Vec<OtherEnd>>) {
    let mut attended = VecDeque::<Attended>::new();
    let mut tick = interval(PUNCH_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut next = Instant::now();
    loop {
        let found = async {
            sleep_until(next).await;
            reader.read::<Found>().await
        };
        let found = tokio::select! {
            found = found => found,
            _ = tick.tick(), if attended.iter().any(|other| other.punches > 0) => {
                to_punch(&mut attended).into_iter().for_each(|address| meeting.port.send(&PUNCH, address));
                continue;
            }
        };
        let found = match found {
            Ok(found) => found,
            Err(why) => return debug!(%why, "the relay is gone"),
        };
        next = Instant::now() + ATTEND_INTERVAL;
        let (end, binding) = meeting.other_end(found);
        if attended.len() == MAX_ATTENDED {
            attended.pop_front();
        }
        attended.push_back(Attended {
            end,
            _binding: binding,
            punches: PUNCH_LIMIT,
        });
        tell.send_replace(attended.iter().map(|other| other.end.clone()).collect());
    }
}

/// The next message, or why there is none.
async fn answer<M: Message>(reader: &mut MessageReader) -> Result<M> {
    let frame = timeout(ANSWER_TIMEOUT, reader.frame(M::LIMIT.max(Refused::LIMIT))).await;
    let frame = frame
        .map_err(|_| StreamError::TimedOut)??
        .ok_or(StreamError::Ended)?;
    if frame.kind == Refused::TYPE {
        let refused: Refused = frame.decode().map_err(StreamError::from)?;
        return Err(Error::Refused(refused.why.into()));
    }
    Ok(frame.decode().map_err(StreamError::from)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn other(addresses: impl IntoIterator<Item = u16>) -> Attended {
        let told = addresses
            .into_iter()
            .map(|port| SocketAddr::from(([192, 0, 2, 1], port)))
            .collect();
        let end = OtherEnd {
            seen: None,
            told,
            relayed: None,
        };
        Attended {
            end,
            _binding: Binding { _task: None },
            punches: PUNCH_LIMIT,
        }
    }

    #[test]
    fn no_relay_has_a_sender_send_more_than_so_much_nor_to_one_address_more_than_once_each_time() {
        let mut all: VecDeque<_> = (0..8).map(|end| other(end * 17..end * 17 + 17)).collect();
        let first = to_punch(&mut all);
        assert_eq!(first.len(), MAX_PUNCHED);
        assert!(
            first.iter().all(|address| address.port() >= 6 * 17),
            "those of whoever came last"
        );
        let mut one: VecDeque<_> = (0..8).map(|_| other([7; 17])).collect();
        assert_eq!(to_punch(&mut one).len(), 1);
        let times = 1 + std::iter::from_fn(|| Some(to_punch(&mut one).len()))
            .take_while(|count| *count > 0)
            .count();
        assert_eq!(times, PUNCH_LIMIT, "then it ends");
    }

    #[test]
    fn addresses_that_are_nobodys_are_not_sent_to() {
        for (address, near, far) in [
            ("192.0.2.1:7", true, true),
            ("127.0.0.1:7", true, false),
            ("[::ffff:127.0.0.1]:7", true, false),
            ("192.0.2.1:0", false, false),
            ("0.0.0.0:7", false, false),
            ("255.255.255.255:7", false, false),
            ("224.0.0.251:5353", false, false),
            ("[ff02::fb]:5353", false, false),
            ("[::]:7", false, false),
        ] {
            let address = address.parse().unwrap();
            assert_eq!(
                (usable(address, true), usable(address, false)),
                (near, far),
                "{address}"
            );
        }
    }
}
