//! A relay: two ends that know the same number find each other here. Where no direct path opens between them, the
//! relay forwards their datagrams. These are QUIC between the two ends, so the relay sees only who sends how much. A
//! dishonest relay can only keep the ends apart.

mod connections;
mod forward;
mod limits;
mod pairs;
mod places;
mod queue;
mod shares;
mod socket;

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tracing::{Instrument, debug, info_span};

use crate::auth::identity::Identity;
use crate::config::Config;
use crate::error::text::PeerText;
use crate::error::{Code, Error, Reason, Result};
use crate::net::endpoint::{self, RELAY_STREAMS};
use crate::net::stream::{MessageReader, MessageWriter, StreamError, varint_of};
use crate::protocol::{Message, Place, Placed, Refused, Seek};

use connections::{ConnectionSlot, Connections};
use forward::Forwarder;
use limits::NetworkLimits;
pub use pairs::Allowance;
use places::{Client, RelayState};

/// Time for one message to arrive or to be sent.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for the handshake of a connection, which counts against the limits meanwhile.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time after which a connection without a place is closed. Its client connects again when it wants something.
const UNUSED_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval at which addresses without recent attempts are forgotten.
const FORGET_INTERVAL: Duration = Duration::from_secs(60);
/// Unsent notices of one place; beyond that its end is too slow to be found.
const MAX_UNSENT_NOTICES: usize = 8;
/// Silence after which a connection is lost; a client with a place keeps it alive.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Limit of handshakes that wait to be accepted.
const MAX_INCOMING: usize = 256;
/// Time that a stopping relay waits for its last packets to be sent.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// Settings of a relay: where to listen, whom to admit, and how much to forward.
#[derive(Debug)]
pub struct RelayOptions {
    /// The address to listen on.
    pub listen: SocketAddr,
    /// The first address to forward on; the others have the following ports. Port 0 takes free ones.
    pub forward: SocketAddr,
    /// The number of ports to forward on, which limits the pairs that one end is in at the same time.
    pub ports: u16,
    /// The relay's key, which clients may pin.
    pub identity: Identity,
    /// The token that clients must present; `None` admits everyone.
    pub token: Option<String>,
    /// Largest number of connections at the same time. One network has at most 64 (an IPv4 address or an IPv6 network of 64
    /// bits), or 256 (the first 24 bits of IPv4, or 48 of IPv6).
    pub connections: usize,
    /// Largest number of senders that can be found at the same time. One network has as many at most as it has connections.
    pub places: usize,
    /// Multiplies all limits of one network, also those of pairs and tries: for a relay whose users share few addresses.
    pub per_network: NonZeroU32,
    /// The limits of forwarding.
    pub allowance: Allowance,
}

/// A listening relay.
pub struct Relay {
    endpoint: quinn::Endpoint,
    state: Arc<RelayState>,
}

impl Relay {
    /// Opens all ports. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Io`] with the address that cannot be opened.
    pub fn bind(options: RelayOptions) -> Result<Self> {
        let RelayOptions {
            listen,
            forward,
            ports,
            identity,
            token,
            connections,
            places,
            per_network,
            allowance,
        } = options;
        let limits = NetworkLimits(per_network);
        let config = Config {
            memory: 1 << 20,
            idle_timeout: IDLE_TIMEOUT,
            ..Config::default()
        };
        let mut quic = endpoint::relay_server_config(&identity, &config)?;
        quic.max_incoming(MAX_INCOMING).migration(true);
        let endpoint = endpoint::Port::listening(listen, &identity, quic)?.endpoint;
        let forwarder = Forwarder::bind(forward, ports, allowance, limits)?;
        let connections = Connections::new(connections, limits);
        let state = RelayState::new(token.as_deref(), connections, places, limits, forwarder);
        let state = Arc::new(state);
        Ok(Self { endpoint, state })
    }

    /// Returns the address that the relay listens on.
    ///
    /// # Errors
    /// [`Error::Io`] when the system does not report it.
    pub fn address(&self) -> Result<SocketAddr> {
        self.endpoint
            .local_addr()
            .map_err(Error::io("cannot read the relay's address"))
    }

    /// Returns the UDP ports on which the relay forwards.
    pub fn forwarding_ports(&self) -> &[u16] {
        self.state.forwarder.ports()
    }

    /// Serves until `stop` resolves. Pairs with a direct path do not notice the end.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let Self { endpoint, state } = self;
        let serve = async {
            let mut id = 0;
            loop {
                let Some(incoming) = endpoint.accept().await else {
                    return;
                };
                // A forged source address would count against its real owner.
                if !incoming.remote_address_validated() {
                    let _ = incoming.retry();
                    continue;
                }
                let ip = incoming.remote_address().ip().to_canonical();
                let Some(slot) = state.connections.add(ip) else {
                    incoming.refuse();
                    continue;
                };
                id += 1;
                let state = state.clone();
                let span = info_span!("connection", from = %incoming.remote_address());
                let connection = async move {
                    let handshake = timeout(HANDSHAKE_TIMEOUT, incoming);
                    if let Some(Ok(Ok(connection))) =
                        slot.evicted.run_until_cancelled(handshake).await
                    {
                        serve_connection(Client { id, connection, ip }, state, &slot).await;
                    }
                };
                tokio::spawn(connection.instrument(span));
            }
        };
        let forget = async {
            loop {
                tokio::time::sleep(FORGET_INTERVAL).await;
                state.forget();
            }
        };
        tokio::select! {
            () = stop => {}
            () = serve => {}
            () = state.forwarder.clone().run() => {}
            () = forget => {}
        }
        endpoint.close(varint_of(Code::Stopping), b"the relay is stopping");
        let _ = timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
    }
}

/// Serves a connection until it ends, is not used for a while, or must make room for one of another network.
async fn serve_connection(client: Client, state: Arc<RelayState>, slot: &ConnectionSlot) {
    let streams = Arc::new(Semaphore::new(RELAY_STREAMS.into()));
    loop {
        let accepted = tokio::select! {
            accepted = client.connection.accept_bi() => accepted,
            () = slot.evicted.cancelled() => {
                let text = "the relay is full, and this network has the most connections";
                return client.connection.close(varint_of(Code::Busy), text.as_bytes());
            }
            () = sleep(UNUSED_TIMEOUT) => {
                if streams.available_permits() < RELAY_STREAMS.into() {
                    continue;
                }
                let text = "nothing was asked for";
                return client.connection.close(varint_of(Code::Stopping), text.as_bytes());
            }
        };
        let Ok((send, receive)) = accepted else {
            return;
        };
        let reader = MessageReader::new(receive);
        let writer = MessageWriter::new(send);
        let Ok(permit) = streams.clone().try_acquire_owned() else {
            writer.reset(Code::Busy);
            continue;
        };
        let state = state.clone();
        let client = client.clone();
        let serve = async move {
            if let Err(error) = serve_stream(&state, &client, reader, writer).await {
                debug!(%error, "stream given up");
                if matches!(error, StreamError::Malformed(_)) {
                    client
                        .connection
                        .close(varint_of(Code::Protocol), error.to_string().as_bytes());
                }
            }
            drop(permit);
        };
        tokio::spawn(serve.in_current_span());
    }
}

/// Serves one request: to find a sender, or to be found.
async fn serve_stream(
    state: &Arc<RelayState>,
    client: &Client,
    mut reader: MessageReader,
    writer: MessageWriter,
) -> Result<(), StreamError> {
    let limit = Place::LIMIT.max(Seek::LIMIT);
    let frame = timeout(ANSWER_TIMEOUT, reader.frame(limit))
        .await
        .map_err(|_| StreamError::TimedOut)??;
    let frame = frame.ok_or(StreamError::Ended)?;
    match frame.kind {
        Seek::TYPE => answer_seek(state, client, &frame.decode()?, writer).await,
        _ => keep_place(state, client, frame.decode()?, reader, writer).await,
    }
}

/// Tells a client where the sender with a number is.
async fn answer_seek(
    state: &RelayState,
    client: &Client,
    seek: &Seek,
    mut writer: MessageWriter,
) -> Result<(), StreamError> {
    let found = state
        .admit(client, seek.token.as_ref().map(PeerText::raw))
        .and_then(|seen| state.introduce(client, seen, seek));
    match found {
        Ok(found) => writer.write_within(&found, ANSWER_TIMEOUT).await?,
        Err(why) => return refuse(writer, why).await,
    }
    writer.finish();
    Ok(())
}

/// Gives a sender a number and tells it of each receiver that seeks it, until the sender gives the number up.
async fn keep_place(
    state: &Arc<RelayState>,
    client: &Client,
    place: Place,
    mut reader: MessageReader,
    mut writer: MessageWriter,
) -> Result<(), StreamError> {
    let seen = match state.admit(client, place.token.as_ref().map(PeerText::raw)) {
        Ok(seen) => seen,
        Err(why) => return refuse(writer, why).await,
    };
    let (notify, mut notices) = mpsc::channel(MAX_UNSENT_NOTICES);
    let reserved = match state.register(client, place, notify) {
        Ok(reserved) => reserved,
        Err(why) => return refuse(writer, why).await,
    };
    let number = reserved.number;
    writer
        .write_within(&Placed { number, seen }, ANSWER_TIMEOUT)
        .await?;
    loop {
        tokio::select! {
            found = notices.recv() => match found {
                Some(found) => writer.write_within(&found, ANSWER_TIMEOUT).await?,
                // Another connection has taken the place with the same claim.
                None => return Ok(()),
            },
            // Any further byte, or the stream's end, gives the place up.
            _ = reader.byte() => return Ok(()),
        }
    }
}

async fn refuse(mut writer: MessageWriter, why: Reason) -> Result<(), StreamError> {
    let refused = Refused { why: why.into() };
    writer.write_within(&refused, ANSWER_TIMEOUT).await?;
    writer.finish();
    Ok(())
}
