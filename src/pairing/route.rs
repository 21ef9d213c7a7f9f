//! The ways to a sender: to its own addresses, to what its NAT has given it, and by a relay.

use std::future::pending;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::discovery;
use super::rendezvous::{Binding, Meeting, RelayAt};
use crate::auth::identity::Identity;
use crate::auth::trust::ServerTrust;
use crate::client::{Dial, Dialed, Dialing};
use crate::config::{Config, display_duration};
use crate::error::{Code, Error, Result};
use crate::net::connect;
use crate::net::endpoint::Port;
use crate::transfer::events::Route;

/// Addresses of a sender that are tried, at most: their attempts run at the same time, and anybody may announce some.
const MAX_ADDRESSES: usize = 16;
/// How much sooner than the relay the other ways are tried: punching takes a round trip or two, and the relay helps at once where
/// it does not work.
const RELAY_DELAY: Duration = Duration::from_secs(1);
/// How long a sender is looked for.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(12);
/// When a relay is asked again meanwhile, and then after twice that: each time is one of the tries that an address has.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// How long a way may take that the relay knows.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a sender may be.
#[derive(Debug, Clone, Default)]
pub struct Whereabouts {
    /// Addresses that are known. Without any it is looked for on the local network.
    pub addresses: Vec<SocketAddr>,
    /// A relay that may know more.
    pub relay: Option<RelayAt>,
    /// Addresses of this machine, for the sender to try to open its NAT to.
    pub own: Vec<IpAddr>,
}

/// The ways to one sender, as often as they are needed.
pub(super) struct Ways {
    at: Whereabouts,
    number: u32,
    /// From where the relay is asked, and the sender connected to.
    port: Option<Port>,
    meeting: Mutex<Option<Arc<Meeting>>>,
    /// For as long as the relay forwards.
    relayed: Mutex<Option<Binding>>,
    /// Where it was found nearby.
    last: Mutex<Option<SocketAddr>>,
    identity: Identity,
    config: Config,
}

impl Ways {
    pub(super) fn new(
        at: Whereabouts,
        number: u32,
        identity: &Identity,
        config: &Config,
    ) -> Result<Arc<Self>> {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        let port = at.relay.as_ref().map(|_| Port::dialing(any)).transpose()?;
        let identity = identity.clone();
        let config = config.clone();
        let meeting = Mutex::default();
        let relayed = Mutex::default();
        let last = Mutex::default();
        Ok(Arc::new(Self {
            at,
            number,
            port,
            meeting,
            relayed,
            last,
            identity,
            config,
        }))
    }

    /// The first connection that comes about, by whatever way.
    ///
    /// # Errors
    /// What kept the last way from being one; what a relay says counts more than that nothing answers.
    pub(super) async fn connect(self: &Arc<Self>, trust: &ServerTrust) -> Result<Dialed> {
        let relay = async {
            self.at.relay.as_ref()?;
            let until = Instant::now() + SEARCH_TIMEOUT;
            let mut wait = RETRY_INTERVAL;
            loop {
                match self.by_relay(trust, true).await {
                    // The sender may be coming back to a relay that was started anew.
                    Err(Error::Refused(why))
                        if why.code == Code::NotFound && Instant::now() + wait < until =>
                    {
                        sleep(wait).await;
                        wait *= 2;
                    }
                    Err(Error::Refused(why)) if why.code == Code::NotFound => {
                        let number = self.number;
                        return Some(Err(Error::Lost(
                            format!("nobody offers {number}, on this network or at the relay")
                                .into(),
                        )));
                    }
                    ended => return Some(ended),
                }
            }
        };
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

    /// To where it was a moment ago, or else to addresses that are known, or that are found on the local network. Multicast DNS
    /// gives no answer twice within a second (RFC 6762, section 6).
    async fn nearby(self: &Arc<Self>, trust: &ServerTrust) -> Result<Dialed> {
        let last = *self.last.lock().await;
        let again = async {
            match last {
                Some(address) => self.known(address, trust).await,
                None => pending().await,
            }
        };
        let dialed = tokio::select! {
            Ok(dialed) = again => dialed,
            dialed = self.search(trust) => dialed?,
        };
        *self.last.lock().await = Some(dialed.connected.connection.remote_address());
        Ok(dialed)
    }

    /// To addresses that are known, or that are found on the local network.
    async fn search(self: &Arc<Self>, trust: &ServerTrust) -> Result<Dialed> {
        let found;
        let addresses = match &self.at.addresses[..] {
            [] => {
                found = discovery::find(self.number, SEARCH_TIMEOUT).await?;
                &found
            }
            known => known,
        };
        let mut attempts = JoinSet::new();
        for &address in addresses.iter().take(MAX_ADDRESSES) {
            let ways = self.clone();
            let trust = trust.clone();
            attempts.spawn(async move { ways.known(address, &trust).await });
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
            Error::Lost(format!("nobody on this network offered {number} within {searched}").into())
        }))
    }

    /// How a client connects again, to this very key.
    pub(super) fn dial(self: &Arc<Self>, trust: ServerTrust) -> Dial {
        let again = {
            let ways = self.clone();
            let trust = trust.clone();
            move || -> Dialing {
                let ways = ways.clone();
                let trust = trust.clone();
                Box::pin(async move { ways.connect(&trust).await })
            }
        };
        let ways = self.clone();
        let direct = move || -> Dialing {
            let ways = ways.clone();
            let trust = trust.clone();
            Box::pin(async move { ways.by_relay(&trust, false).await })
        };
        let direct: Option<Box<dyn Fn() -> Dialing + Send + Sync>> = if self.port.is_some() {
            Some(Box::new(direct))
        } else {
            None
        };
        Dial {
            any: Box::new(again),
            direct,
        }
    }

    /// To an address, from a port of its own.
    async fn known(&self, address: SocketAddr, trust: &ServerTrust) -> Result<Dialed> {
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

    /// Where the relay says it is; and by the relay itself if nothing of that works soon.
    async fn by_relay(&self, trust: &ServerTrust, relayed: bool) -> Result<Dialed> {
        let Some(port) = &self.port else {
            return Err(no_relay());
        };
        let meeting = self.meeting(port).await?;
        let (end, binding) = meeting.seek(self.number, relayed).await?;
        // Where nothing else worked a moment ago, nothing else is waited for; whoever uses it looks for a better way meanwhile.
        let head_start = if self.relayed.lock().await.is_some() {
            Duration::ZERO
        } else {
            RELAY_DELAY
        };
        let config = Config {
            handshake: self.config.handshake.min(ANSWER_TIMEOUT),
            ..self.config.clone()
        };
        let config = &config;
        let to = |addresses: Vec<SocketAddr>| async move {
            connect::connect_over(&port.endpoint, &self.identity, trust, &addresses, config).await
        };
        let connected = {
            let direct = async {
                let seen = end
                    .seen
                    .iter()
                    .copied()
                    .filter(|seen| !end.told.contains(seen));
                to(seen.chain(end.told.iter().copied()).collect()).await
            };
            let by_relay = async {
                match end.relayed.filter(|_| relayed) {
                    None => Err(Error::Usage("there is no room at the relay".into())),
                    Some(relayed) => {
                        sleep(head_start).await;
                        to(vec![relayed]).await
                    }
                }
            };
            tokio::pin!(direct, by_relay);
            tokio::select! {
                Ok(connected) = &mut direct => connected,
                Ok(connected) = &mut by_relay => connected,
                else => return Err(Error::Unreachable {
                    host: "the sender".into(),
                    address: end.seen.or(end.relayed).unwrap_or(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))),
                    why: match end.relayed {
                        Some(_) => "nothing answers, neither where the relay sees it nor through the relay".into(),
                        None if relayed => "nothing answers where the relay sees it, and the relay has no room to forward".into(),
                        None => "nothing answers where the relay sees it".into(),
                    },
                }),
            }
        };
        let route = end
            .route(connected.connection.remote_address())
            .unwrap_or(Route::Direct);
        *self.relayed.lock().await = Some(binding).filter(|_| route == Route::Relayed);
        Ok(Dialed {
            connected,
            route,
            own_port: false,
        })
    }

    /// The connection to the relay, made anew if it is gone.
    async fn meeting(&self, port: &Port) -> Result<Arc<Meeting>> {
        let mut meeting = self.meeting.lock().await;
        if let Some(there) = meeting.as_ref().filter(|there| !there.is_gone()) {
            return Ok(there.clone());
        }
        let relay = self.at.relay.as_ref().ok_or_else(no_relay)?;
        let new = Arc::new(Meeting::at(port, relay, &self.at.own, &self.config).await?);
        Ok(meeting.insert(new).clone())
    }
}

fn no_relay() -> Error {
    Error::Usage("there is no relay".into())
}

/// An address as a resolver takes it, with the interface that a link-local one is of.
fn host(address: SocketAddr) -> String {
    match address {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("{}%{}", v6.ip(), v6.scope_id()),
        other => other.ip().to_string(),
    }
}
