//! The rendezvous at a relay: each end sends the relay its addresses and receives the other's, and both bind their address to
//! the port where the relay forwards. The sender's number there is in `placement.rs`.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use quinn::Connection;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info};

use crate::auth::identity::KeyId;
use crate::auth::trust::trust_any_key;
use crate::config::Config;
use crate::error::text::{PeerText, printable};
use crate::error::{Error, Result};
use crate::net::address::canonical;
use crate::net::connect;
use crate::net::endpoint::Port;
use crate::net::stream::{MessageReader, MessageWriter, StreamError};
use crate::protocol::{
    Address, BIND, Forward, Found, MAX_ADDRESSES, Message, PAIRED_NUMBERS, Place, Placed, Refused,
    Seek,
};
use crate::transfer::events::Route;

/// Default UDP port of a relay. It forwards on the next port.
pub const RELAY_PORT: u16 = 4440;

/// Time for each answer of a relay.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval of the first [`FIRST_BINDS`] datagrams that bind an address. There are several because datagrams get lost.
const FIRST_BIND_INTERVAL: Duration = Duration::from_millis(200);
const FIRST_BINDS: usize = 10;
/// Interval of further such datagrams. They keep the NAT's mapping, and the relay learns of a changed one within that time.
const BIND_INTERVAL: Duration = Duration::from_secs(5);

/// A relay's address and credentials.
#[derive(Clone, PartialEq, Eq)]
pub struct RelayAt {
    /// Host name or IP address.
    pub host: String,
    /// UDP port.
    pub port: u16,
    /// The token that the relay asks for, if any.
    pub token: Option<String>,
    /// The relay's key. Without it any relay is accepted; a false relay can only keep the two ends apart.
    pub pin: Option<KeyId>,
}

impl std::fmt::Debug for RelayAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RelayAt({self})")
    }
}

/// Shows neither token nor pin.
impl std::fmt::Display for RelayAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The host may come from a ticket, which another person wrote.
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
        let invalid = || {
            Error::Usage(format!(
                "cannot use {} as a relay; write HOST or HOST:PORT",
                printable(text.as_bytes())
            ))
        };
        let text = text.trim();
        let (host, port) = match text.parse::<IpAddr>() {
            Ok(ip) => (ip.to_string(), RELAY_PORT),
            Err(_) => match text.rsplit_once(':') {
                Some((host, port)) => (host.to_owned(), port.parse().map_err(|_| invalid())?),
                None => (text.to_owned(), RELAY_PORT),
            },
        };
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(&host);
        // A ticket comes from another person: its host must not send control characters to a terminal that shows it.
        let odd = bare.contains(char::is_whitespace) || printable(bare.as_bytes()) != bare;
        if bare.is_empty() || odd || bare.contains('/') || port == 0 {
            return Err(invalid());
        }
        Ok(Self {
            host: bare.to_owned(),
            port,
            token: None,
            pin: None,
        })
    }
}

/// What a connection to a relay takes.
#[derive(Clone)]
pub(super) struct RelayClient {
    /// The port that the transfer will use too.
    pub(super) port: Port,
    pub(super) relay: RelayAt,
    /// IP addresses of this machine. Their port is the endpoint's.
    pub(super) own: Vec<IpAddr>,
    pub(super) config: Config,
}

/// A connection to a relay.
pub(super) struct RelayConnection {
    port: Port,
    relay: RelayAt,
    connection: Connection,
    /// Addresses of this end, besides the one that the relay sees.
    own: Vec<Address>,
}

/// Addresses of the other end, as the relay reports them.
#[derive(Debug, Clone)]
pub(super) struct OtherEnd {
    /// The address that the relay sees.
    pub(super) seen: Option<SocketAddr>,
    /// Other addresses that the other end reports of itself.
    pub(super) reported: Vec<SocketAddr>,
    /// The relay's address that forwards to it.
    pub(super) relayed: Option<SocketAddr>,
}

impl OtherEnd {
    /// The route that an address belongs to; `None` for an address that the relay has not reported.
    pub(super) fn route(&self, address: SocketAddr) -> Option<Route> {
        match canonical(address) {
            own if self.reported.contains(&own) => Some(Route::Direct),
            relay if self.relayed == Some(relay) => Some(Route::Relayed),
            nat if self.seen == Some(nat) => Some(Route::Punched),
            _ => None,
        }
    }
}

/// Keeps this end's address bound to the port where the relay forwards, until it is dropped.
pub(super) struct Binding {
    pub(super) _task: Option<AbortOnDropHandle<()>>,
}

impl RelayClient {
    /// Connects to the relay.
    ///
    /// # Errors
    /// The errors of connecting.
    pub(super) async fn connect(&self) -> Result<RelayConnection> {
        let Self {
            port,
            relay,
            config,
            ..
        } = self;
        let trust = trust_any_key(relay.pin);
        let connection =
            connect::connect_relay(&port.endpoint, &trust, &relay.host, relay.port, config).await?;
        debug!(%relay, address = %connection.remote_address(), "connected to the relay");
        Ok(RelayConnection {
            port: port.clone(),
            relay: relay.clone(),
            connection,
            own: self.addresses(),
        })
    }

    /// Addresses of this end on its own networks.
    pub(super) fn addresses(&self) -> Vec<Address> {
        let local = self.port.endpoint.local_addr();
        let local = local.map(|local| local.port()).unwrap_or_default();
        self.own
            .iter()
            .map(|ip| Address(SocketAddr::new(*ip, local)))
            .take(MAX_ADDRESSES)
            .collect()
    }
}

impl RelayConnection {
    /// The port that datagrams to the other end are sent from.
    pub(super) fn port(&self) -> &Port {
        &self.port
    }

    pub(super) fn is_closed(&self) -> bool {
        self.connection.close_reason().is_some()
    }

    /// Looks up the sender that has a number, and with `forward` asks the relay to forward.
    ///
    /// # Errors
    /// [`Error::Refused`] with [`Code::NotFound`](crate::error::Code::NotFound) when no sender has the number, or with the relay's
    /// other reasons; the errors of a lost connection.
    pub(super) async fn seek(&self, number: u32, forward: bool) -> Result<(OtherEnd, Binding)> {
        let seek = Seek {
            number,
            token: self.relay.token.clone().map(PeerText::from),
            addresses: self.reported_for(Some(number)),
            forward,
        };
        let (mut reader, _writer) = self.ask(&seek).await?;
        let found = answer(&mut reader).await?;
        Ok(self.other_end(found))
    }

    /// Takes a number at the relay: the given one, or any. The relay keeps it for as long as the stream is open.
    ///
    /// # Errors
    /// [`Error::Refused`] with the relay's reason; the errors of a lost connection.
    pub(super) async fn place(
        &self,
        claim: [u8; 16],
        number: Option<u32>,
    ) -> Result<(Placed, MessageReader, MessageWriter)> {
        let place = Place {
            claim,
            number,
            token: self.relay.token.clone().map(PeerText::from),
            addresses: self.reported_for(number),
        };
        let (mut reader, writer) = self.ask(&place).await?;
        let placed: Placed = answer(&mut reader).await?;
        info!(number = placed.number, seen = %placed.seen.0, "the relay gave a number");
        Ok((placed, reader, writer))
    }

    /// The addresses that the relay may pass on: those of codes are exchanged by the ends themselves (`Offer`, `Accept`), since
    /// anyone may try numbers of codes at a relay.
    fn reported_for(&self, number: Option<u32>) -> Vec<Address> {
        match number.is_some_and(|number| PAIRED_NUMBERS.contains(&number)) {
            true => self.own.clone(),
            false => Vec::new(),
        }
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

    /// Sorts out the addresses of the other end, and binds this end's address if the relay forwards.
    pub(super) fn other_end(&self, found: Found) -> (OtherEnd, Binding) {
        let relay = self.connection.remote_address();
        let local_relay = relay.ip().to_canonical().is_loopback();
        let mut addresses = found.addresses.iter().map(|address| canonical(address.0));
        let seen = addresses
            .next()
            .filter(|address| is_usable(*address, local_relay));
        let rest: Vec<_> = addresses.collect();
        let relayed = found
            .forward
            .as_ref()
            .map(|forward| SocketAddr::new(relay.ip().to_canonical(), forward.port));
        let binding = found.forward.zip(relayed).map(|(forward, at)| {
            AbortOnDropHandle::new(tokio::spawn(bind(self.port.clone(), forward, at)))
        });
        let mut end = OtherEnd {
            seen,
            reported: Vec::new(),
            relayed,
        };
        self.add_reported(&mut end, &rest);
        (end, Binding { _task: binding })
    }

    /// Adds addresses that the other end reports of itself. Each is tried once, also when it is repeated.
    pub(super) fn add_reported(&self, end: &mut OtherEnd, addresses: &[SocketAddr]) {
        let relay = self.connection.remote_address();
        let local_relay = relay.ip().to_canonical().is_loopback();
        for address in addresses {
            let address = canonical(*address);
            if is_usable(address, local_relay) && !end.reported.contains(&address) {
                end.reported.push(address);
            }
        }
    }
}

/// Whether datagrams may be sent to an address that a relay reports. Loopback addresses are usable only with a local relay.
fn is_usable(address: SocketAddr, local_relay: bool) -> bool {
    let ip = address.ip().to_canonical();
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    address.port() != 0
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && !broadcast
        && (local_relay || !ip.is_loopback())
}

/// Binds this port's address to the relay's forwarding port `at`, again and again until it is dropped.
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

/// Reads the next message, or the relay's refusal.
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

    #[test]
    fn unusable_addresses_of_a_relay_are_ignored() {
        for (address, with_local_relay, with_other) in [
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
                (is_usable(address, true), is_usable(address, false)),
                (with_local_relay, with_other),
                "{address}"
            );
        }
    }
}
