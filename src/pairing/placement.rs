//! A sender's number at a relay: receivers find the sender there, and the sender opens its NAT for them.

use std::collections::{HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

use super::rendezvous::{Binding, OtherEnd, RelayClient, RelayConnection};
use super::ticket::MAX_ADDRESSES;
use crate::auth::random::random;
use crate::error::lock::lock;
use crate::error::{Code, Error, Reason, Result};
use crate::net::stream::MessageReader;
use crate::protocol::{Address, Found, Placed};
use crate::transfer::events::Route;

/// Interval of the datagrams that open the NAT for a receiver.
const PUNCH_INTERVAL: Duration = Duration::from_millis(100);
/// Rounds of such datagrams for one receiver: 5 s, as long as a receiver is likely to try.
const PUNCH_LIMIT: usize = 50;
/// Addresses in one round, newest receivers first. A relay, or anyone who knows the number, can name addresses of third machines.
/// This bounds the harm: all third machines together get 320 one-byte datagrams a second, and each gets ten.
const MAX_PUNCHED: usize = 32;
/// The datagram. QUIC endpoints drop it: it has neither a long header nor the fixed bit of a short one.
const PUNCH: [u8; 1] = [0];
/// Receivers that are helped at the same time: the newest ones. A relay has no ports for more.
const MAX_RECEIVERS: usize = 8;
/// Minimum time between two new receivers. Each one costs a datagram to the relay at once.
const RECEIVER_INTERVAL: Duration = Duration::from_millis(250);
/// First wait before reconnecting to a lost relay; it doubles.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// Longest such wait.
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(15);

/// A receiver that looks for this sender.
struct PendingReceiver {
    end: OtherEnd,
    _binding: Binding,
    /// Rounds of datagrams that are still to be sent.
    rounds_left: usize,
}

/// Starts a round: the addresses to send to, so that this end's NAT opens for the receivers.
fn next_round(receivers: &mut VecDeque<PendingReceiver>) -> Vec<SocketAddr> {
    let mut addresses = Vec::new();
    let pending = receivers
        .iter_mut()
        .rev()
        .filter(|receiver| receiver.rounds_left > 0);
    for receiver in pending {
        receiver.rounds_left -= 1;
        for address in receiver.end.seen.iter().chain(&receiver.end.reported) {
            if addresses.len() < MAX_PUNCHED && !addresses.contains(address) {
                addresses.push(*address);
            }
        }
    }
    addresses
}

/// Addresses that the accepted receiver has reported of itself.
type Expected = Arc<Mutex<Vec<SocketAddr>>>;

/// A number that the sender chooses itself, and the claim by which a relay recognises its owner.
#[derive(Clone, Copy)]
pub(super) struct RequestedNumber {
    pub(super) number: u32,
    pub(super) claim: [u8; 16],
}

/// A number under which a sender can be found at a relay, until this is dropped.
pub(super) struct Placement {
    number: u32,
    seen: SocketAddr,
    /// Whether `seen` is this machine's own address, so that it is behind no NAT.
    is_public: bool,
    /// The newest receivers.
    receivers: watch::Receiver<Vec<OtherEnd>>,
    expected: Expected,
    _task: AbortOnDropHandle<()>,
}

impl Placement {
    /// Connects to a relay and takes a number. A task reconnects whenever the relay is lost.
    ///
    /// # Errors
    /// As [`RelayClient::connect`] and [`RelayConnection::place`]; [`Error::Refused`] with [`Code::Busy`] when another machine has
    /// the requested number.
    pub(super) async fn take(
        client: RelayClient,
        requested: Option<RequestedNumber>,
    ) -> Result<Self> {
        let claim = match requested {
            Some(requested) => requested.claim,
            None => random()?,
        };
        let requested = requested.map(|requested| requested.number);
        let connection = client.connect().await?;
        let (Placed { number, seen }, reader, writer) = connection.place(claim, requested).await?;
        if requested.is_some_and(|requested| requested != number) {
            return Err(Error::Refused(Reason::new(
                Code::Busy,
                "another machine has the number at the relay",
            )));
        }
        let is_public = client.own.contains(&seen.0.ip());
        let (receiver_sender, receivers) = watch::channel(Vec::new());
        let expected = Expected::default();
        let keeper = PlacementKeeper {
            expected: expected.clone(),
            client,
            claim,
            number,
            receivers: receiver_sender,
        };
        let task = async move {
            keeper.open_nat(&connection, reader).await;
            drop(connection);
            drop(writer);
            keeper.reconnect().await;
        };
        Ok(Self {
            number,
            seen: seen.0,
            is_public,
            receivers,
            expected,
            _task: AbortOnDropHandle::new(tokio::spawn(task)),
        })
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Opens this end's NAT for these addresses too, when the receiver that has reported them seeks the number again.
    pub(super) fn expect_at(&self, addresses: Vec<Address>) {
        *lock(&self.expected) = addresses.into_iter().map(|address| address.0).collect();
    }

    /// This end's address as the relay saw it at first.
    pub(super) fn seen(&self) -> SocketAddr {
        self.seen
    }

    /// The route by which a receiver has come; `None` when it came without the relay's help. One that comes from the address that
    /// the relay sees has passed this end's NAT, if there is one, and counts as punched. So both ends name the same route.
    pub(super) fn route(&self, from: SocketAddr) -> Option<Route> {
        self.receivers
            .borrow()
            .iter()
            .find_map(|end| match end.route(from)? {
                Route::Relayed => Some(Route::Relayed),
                _ if end.seen == Some(from) && !self.is_public => Some(Route::Punched),
                _ => Some(Route::Direct),
            })
    }
}

/// The relay that gives numbers, and this offering's number there.
pub(super) struct Rendezvous {
    pub(super) client: Option<RelayClient>,
    /// IP addresses of this machine.
    pub(super) own: Vec<IpAddr>,
    /// The number at the relay, or why there is none; `None` without a relay.
    pub(super) placement: Option<Result<Placement>>,
}

impl Rendezvous {
    /// Gives up the number and takes another one, or the requested one.
    pub(super) async fn renew(&mut self, requested: Option<RequestedNumber>) {
        // First, so that a receiver does not wait at the old number.
        self.placement = None;
        if let Some(client) = self.client.clone() {
            self.placement = Some(Placement::take(client, requested).await);
        }
    }

    pub(super) fn placement(&self) -> Option<&Placement> {
        self.placement.as_ref()?.as_ref().ok()
    }

    /// This end's own addresses for a receiver that knows the code; none without a number at a relay.
    pub(super) fn own_addresses(&self) -> Option<Vec<Address>> {
        self.placement()?;
        let addresses = self.client.as_ref()?.addresses();
        Some(addresses).filter(|addresses| !addresses.is_empty())
    }

    /// Addresses for a ticket: where the relay sees this machine first. Loopback ones only if there are no others.
    pub(super) fn ticket_addresses(&self, port: u16) -> Vec<SocketAddr> {
        let seen = self.placement().map(Placement::seen);
        let own = self.own.iter().map(|ip| SocketAddr::new(*ip, port));
        let mut addresses: Vec<_> = seen.into_iter().chain(own).collect();
        let mut known = HashSet::new();
        addresses.retain(|address| known.insert(*address));
        let has_others = addresses.iter().any(|address| !address.ip().is_loopback());
        addresses.retain(|address| !has_others || !address.ip().is_loopback());
        addresses.truncate(MAX_ADDRESSES);
        addresses
    }
}

/// Takes the number again whenever the relay is lost.
struct PlacementKeeper {
    expected: Expected,
    client: RelayClient,
    claim: [u8; 16],
    number: u32,
    receivers: watch::Sender<Vec<OtherEnd>>,
}

impl PlacementKeeper {
    /// Reconnects until it is dropped.
    async fn reconnect(&self) {
        let mut wait = RETRY_INTERVAL;
        loop {
            sleep(wait).await;
            wait = (wait * 2).min(MAX_RETRY_INTERVAL);
            match self.serve_once().await {
                // A number that is lost at once is claimed by another process too. A short wait would let the two take it in turn.
                Ok(true) => wait = RETRY_INTERVAL,
                Ok(false) => {}
                Err(error) => debug!(%error, "cannot reconnect to the relay yet"),
            }
        }
    }

    /// Takes the number once and keeps it until the relay is lost. Returns whether it kept it for longer than the longest wait.
    async fn serve_once(&self) -> Result<bool> {
        let connection = self.client.connect().await?;
        let (placed, reader, _writer) = connection.place(self.claim, Some(self.number)).await?;
        if placed.number != self.number {
            let number = self.number;
            warn!(number, "another machine has the number at the relay now");
            return Ok(false);
        }
        let since = Instant::now();
        self.open_nat(&connection, reader).await;
        Ok(since.elapsed() > MAX_RETRY_INTERVAL)
    }

    /// Opens this end's NAT for the receivers that the relay reports, until the relay is lost.
    async fn open_nat(&self, connection: &RelayConnection, mut reader: MessageReader) {
        let mut receivers = VecDeque::<PendingReceiver>::new();
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
                _ = tick.tick(), if receivers.iter().any(|receiver| receiver.rounds_left > 0) => {
                    for address in next_round(&mut receivers) {
                        connection.port().send(&PUNCH, address);
                    }
                    continue;
                }
            };
            let found = match found {
                Ok(found) => found,
                Err(error) => return debug!(%error, "the relay is lost"),
            };
            next = Instant::now() + RECEIVER_INTERVAL;
            let (mut end, binding) = connection.other_end(found);
            connection.add_reported(&mut end, &lock(&self.expected));
            if receivers.len() == MAX_RECEIVERS {
                receivers.pop_front();
            }
            receivers.push_back(PendingReceiver {
                end,
                _binding: binding,
                rounds_left: PUNCH_LIMIT,
            });
            let ends = receivers.iter().map(|receiver| receiver.end.clone());
            self.receivers.send_replace(ends.collect());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receiver(addresses: impl IntoIterator<Item = u16>) -> PendingReceiver {
        let reported = addresses
            .into_iter()
            .map(|port| SocketAddr::from(([192, 0, 2, 1], port)))
            .collect();
        let end = OtherEnd {
            seen: None,
            reported,
            relayed: None,
        };
        PendingReceiver {
            end,
            _binding: Binding { _task: None },
            rounds_left: PUNCH_LIMIT,
        }
    }

    #[test]
    fn a_relay_cannot_make_a_sender_flood_third_machines() {
        let mut all: VecDeque<_> = (0..8)
            .map(|end| receiver(end * 17..end * 17 + 17))
            .collect();
        let first = next_round(&mut all);
        assert_eq!(first.len(), MAX_PUNCHED);
        assert!(
            first.iter().all(|address| address.port() >= 6 * 17),
            "the newest receivers first"
        );
        let mut one: VecDeque<_> = (0..8).map(|_| receiver([7; 17])).collect();
        assert_eq!(next_round(&mut one).len(), 1, "no address twice in a round");
        let times = 1 + std::iter::from_fn(|| Some(next_round(&mut one).len()))
            .take_while(|count| *count > 0)
            .count();
        assert_eq!(times, PUNCH_LIMIT, "rounds are limited");
    }
}
