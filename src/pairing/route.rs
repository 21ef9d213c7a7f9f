//! Routes to a sender: its own addresses, the address that its NAT has given it, and a relay.

use std::future::pending;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::discovery;
use super::rendezvous::{Binding, OtherEnd, RelayAt, RelayClient, RelayConnection};
use crate::auth::identity::Identity;
use crate::auth::trust::ServerTrust;
use crate::client::{Dial, Dialed, Dialing};
use crate::config::{Config, display_duration};
use crate::error::{Code, Error, Result};
use crate::net::connect::{self, Connected};
use crate::net::endpoint::Port;
use crate::protocol::Address;
use crate::transfer::events::Route;

/// Addresses of a sender that are tried, at most. They are tried at the same time, and anyone may announce any number.
const MAX_ADDRESSES: usize = 16;
/// Head start of the direct routes over the relayed one. Punching takes a round trip or two.
const RELAY_DELAY: Duration = Duration::from_secs(1);
/// Time for finding a sender.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(12);
/// First wait before a relay is asked again; it doubles. Each request counts against the relay's limit for an address.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Time for a handshake over a route that the relay reports.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// The places where a sender may be.
#[derive(Debug, Clone, Default)]
pub struct Whereabouts {
    /// Known addresses. Without any, the sender is looked for on the local network.
    pub addresses: Vec<SocketAddr>,
    /// A relay that may know the sender.
    pub relay: Option<RelayAt>,
    /// Addresses of this machine, for which the sender opens its NAT.
    pub own: Vec<IpAddr>,
}

/// Connects to one machine, as often as needed, by the best route.
pub(super) struct PeerDialer {
    /// Known addresses. Without any, the machine is looked for on the local network.
    addresses: Vec<SocketAddr>,
    number: u32,
    /// Its port is also for the routes that the relay reports. `None` without a relay.
    relay_client: Option<RelayClient>,
    relay: Mutex<Option<Arc<RelayConnection>>>,
    /// Keeps the relay's forwarding while the last connection is relayed.
    relay_binding: Mutex<Option<Binding>>,
    /// Addresses of the sender that it has told this end itself.
    reported: Mutex<Vec<SocketAddr>>,
    /// Whether these were not tried yet.
    untried: AtomicBool,
    /// The last address at which the machine was found without the relay.
    last_address: Mutex<Option<SocketAddr>>,
    identity: Identity,
    config: Config,
}

impl PeerDialer {
    pub(super) fn new(
        whereabouts: Whereabouts,
        number: u32,
        identity: &Identity,
        config: &Config,
    ) -> Result<Arc<Self>> {
        let Whereabouts {
            addresses,
            relay,
            own,
        } = whereabouts;
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        let relay_client = match relay {
            Some(relay) => Some(RelayClient {
                port: Port::dialing(any)?,
                relay,
                own,
                config: config.clone(),
            }),
            None => None,
        };
        Ok(Arc::new(Self {
            addresses,
            number,
            relay_client,
            relay: Mutex::default(),
            relay_binding: Mutex::default(),
            reported: Mutex::default(),
            untried: AtomicBool::new(false),
            last_address: Mutex::default(),
            identity: identity.clone(),
            config: config.clone(),
        }))
    }

    /// Addresses of this end on its own networks, for a sender that opens its firewall for them; none without a relay.
    pub(super) fn own_addresses(&self) -> Option<Vec<Address>> {
        let addresses = self.relay_client.as_ref()?.addresses();
        Some(addresses).filter(|addresses| !addresses.is_empty())
    }

    /// Tries the addresses that the sender has reported of itself too, from the next connection on.
    pub(super) async fn add_reported(&self, addresses: &[Address]) {
        let addresses = addresses.iter().map(|address| address.0);
        *self.reported.lock().await = addresses.take(MAX_ADDRESSES).collect();
        self.untried.store(true, Ordering::Relaxed);
    }

    /// Tries all routes at the same time and returns the first connection.
    ///
    /// # Errors
    /// The error of the last route that failed; a relay's error is preferred to that of the other routes.
    pub(super) async fn connect(self: &Arc<Self>, trust: &ServerTrust) -> Result<Dialed> {
        let relay = self.by_relay_with_retry(trust);
        let nearby = self.nearby(trust);
        tokio::pin!(relay, nearby);
        tokio::select! {
            ended = &mut relay => match ended {
                Some(Ok(dialed)) => Ok(dialed),
                Some(Err(error)) => nearby.await.map_err(|_| error),
                None => nearby.await,
            },
            ended = &mut nearby => match ended {
                Ok(dialed) => Ok(dialed),
                Err(error) => relay.await.unwrap_or(Err(error)),
            },
        }
    }

    /// Connects with the relay's help. Retries while the relay does not know the number: the sender may be reconnecting to a
    /// relay that was restarted. Returns `None` without a relay.
    async fn by_relay_with_retry(&self, trust: &ServerTrust) -> Option<Result<Dialed>> {
        self.relay_client.as_ref()?;
        let deadline = Instant::now() + SEARCH_TIMEOUT;
        let mut wait = RETRY_INTERVAL;
        loop {
            let result = self.by_relay(trust, true).await;
            match result {
                Err(Error::Refused(reason)) if reason.code == Code::NotFound => {}
                result => return Some(result),
            }
            if Instant::now() + wait >= deadline {
                let number = self.number;
                let text = format!("no machine offers {number}, on this network or at the relay");
                return Some(Err(Error::Lost(text.into())));
            }
            sleep(wait).await;
            wait *= 2;
        }
    }

    /// Connects to the last address, and at the same time searches as [`search`](Self::search) does. Multicast DNS alone would
    /// not do: it gives no answer twice within a second (RFC 6762, section 6).
    async fn nearby(self: &Arc<Self>, trust: &ServerTrust) -> Result<Dialed> {
        let last = *self.last_address.lock().await;
        let at_last_address = async {
            match last {
                Some(address) => self.connect_to(address, trust).await,
                None => pending().await,
            }
        };
        let dialed = tokio::select! {
            Ok(dialed) = at_last_address => dialed,
            dialed = self.search(trust) => dialed?,
        };
        *self.last_address.lock().await = Some(dialed.connected.connection.remote_address());
        Ok(dialed)
    }

    /// Connects to the known addresses, or to those found on the local network.
    async fn search(self: &Arc<Self>, trust: &ServerTrust) -> Result<Dialed> {
        let found;
        let addresses = match &self.addresses[..] {
            [] => {
                found = discovery::find(self.number, SEARCH_TIMEOUT).await?;
                &found
            }
            known => known,
        };
        let mut attempts = JoinSet::new();
        for &address in addresses.iter().take(MAX_ADDRESSES) {
            let dialer = self.clone();
            let trust = trust.clone();
            attempts.spawn(async move { dialer.connect_to(address, &trust).await });
        }
        let mut failure = None;
        while let Some(ended) = attempts.join_next().await {
            match ended {
                Ok(Ok(dialed)) => return Ok(dialed),
                Ok(Err(error)) => failure = Some(error),
                Err(_) => {}
            }
        }
        Err(failure.unwrap_or_else(|| {
            let number = self.number;
            let searched = display_duration(SEARCH_TIMEOUT);
            let text = format!("no machine on this network offered {number} within {searched}");
            Error::Lost(text.into())
        }))
    }

    /// The way for a client to connect again, to the key in `trust`.
    pub(super) fn dial(self: &Arc<Self>, trust: ServerTrust) -> Dial {
        let any = {
            let dialer = self.clone();
            let trust = trust.clone();
            move || -> Dialing {
                let dialer = dialer.clone();
                let trust = trust.clone();
                Box::pin(async move { dialer.connect(&trust).await })
            }
        };
        let dialer = self.clone();
        let direct = move || -> Dialing {
            let dialer = dialer.clone();
            let trust = trust.clone();
            Box::pin(async move { dialer.by_relay(&trust, false).await })
        };
        let direct: Option<Box<dyn Fn() -> Dialing + Send + Sync>> = if self.relay_client.is_some()
        {
            Some(Box::new(direct))
        } else {
            None
        };
        Dial {
            any: Box::new(any),
            direct,
        }
    }

    /// Connects to an address, from a port of its own.
    async fn connect_to(&self, address: SocketAddr, trust: &ServerTrust) -> Result<Dialed> {
        let connected = connect::connect(
            &self.identity,
            trust,
            &host(address),
            address.port(),
            &self.config,
        )
        .await;
        let connected = connected.map_err(|error| match error {
            Error::Unreachable { host, address, why } if trust.unchecked_key.is_allowed() => {
                let why = why.raw().replace("`haul serve`", "`haul send`").into();
                Error::Unreachable { host, address, why }
            }
            other => other,
        })?;
        Ok(Dialed {
            connected,
            route: Route::Direct,
            own_port: true,
        })
    }

    /// Connects to the addresses that the relay reports. With `forward`, also through the relay itself, a moment later.
    async fn by_relay(&self, trust: &ServerTrust, forward: bool) -> Result<Dialed> {
        let Some(client) = &self.relay_client else {
            return Err(Error::Usage(
                "cannot use a relay: none is configured".into(),
            ));
        };
        let relay = self.relay_connection(client).await?;
        let (mut end, binding) = relay.seek(self.number, forward).await?;
        relay.add_reported(&mut end, &self.reported.lock().await);
        let connected = self.first_of(&client.port, &end, trust, forward).await?;
        let route = end
            .route(connected.connection.remote_address())
            .unwrap_or(Route::Direct);
        *self.relay_binding.lock().await = Some(binding).filter(|_| route == Route::Relayed);
        Ok(Dialed {
            connected,
            route,
            own_port: false,
        })
    }

    /// Tries the direct addresses, and the relayed one after [`RELAY_DELAY`]. Returns the first connection.
    async fn first_of(
        &self,
        port: &Port,
        end: &OtherEnd,
        trust: &ServerTrust,
        forward: bool,
    ) -> Result<Connected> {
        // If the last connection was relayed, the direct routes that were known did not work a moment ago. The client looks for
        // a better route while it uses the relayed one.
        let untried = self.untried.swap(false, Ordering::Relaxed);
        let delay = match self.relay_binding.lock().await.is_some() && !untried {
            true => Duration::ZERO,
            false => RELAY_DELAY,
        };
        let config = Config {
            handshake: self.config.handshake.min(HANDSHAKE_TIMEOUT),
            ..self.config.clone()
        };
        let config = &config;
        let connect_to = |addresses: Vec<SocketAddr>| async move {
            connect::connect_over(&port.endpoint, &self.identity, trust, &addresses, config).await
        };
        let direct = async {
            let seen = end.seen.filter(|seen| !end.reported.contains(seen));
            let reported = end.reported.iter().copied();
            connect_to(seen.into_iter().chain(reported).collect()).await
        };
        let by_relay = async {
            match end.relayed.filter(|_| forward) {
                None => Err(Error::Usage("the relay does not forward".into())),
                Some(relayed) => {
                    sleep(delay).await;
                    connect_to(vec![relayed]).await
                }
            }
        };
        tokio::pin!(direct, by_relay);
        tokio::select! {
            Ok(connected) = &mut direct => Ok(connected),
            Ok(connected) = &mut by_relay => Ok(connected),
            else => Err(unreachable(end, forward)),
        }
    }

    /// The connection to the relay; a new one if the last was closed.
    async fn relay_connection(&self, client: &RelayClient) -> Result<Arc<RelayConnection>> {
        let mut connection = self.relay.lock().await;
        if let Some(open) = connection.as_ref().filter(|open| !open.is_closed()) {
            return Ok(open.clone());
        }
        let new = client.connect().await?;
        Ok(connection.insert(Arc::new(new)).clone())
    }
}

/// No route that the relay reports works.
fn unreachable(end: &OtherEnd, forward: bool) -> Error {
    let reason = match end.relayed {
        Some(_) => "nothing answers, neither where the relay sees it nor through the relay",
        None if forward => {
            "nothing answers where the relay sees it, and the relay has no room to forward"
        }
        None => "nothing answers where the relay sees it",
    };
    let unknown = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    Error::Unreachable {
        host: "the sender".into(),
        address: end.seen.or(end.relayed).unwrap_or(unknown),
        why: reason.into(),
    }
}

/// An address as a resolver reads it: a link-local one with its interface.
fn host(address: SocketAddr) -> String {
    match address {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("{}%{}", v6.ip(), v6.scope_id()),
        other => other.ip().to_string(),
    }
}
