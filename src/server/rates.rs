//! How often a peer may connect and begin sessions, and how many log lines it may cause.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Mutex;

use governor::clock::{Clock, DefaultClock};
use governor::state::keyed::HashMapStateStore;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use tokio::time::sleep;

use crate::error::lock::lock;
use crate::net::share::{Group, Holder, network, site};

/// Handshakes that one network may begin in a second: each costs the server a signature and a key exchange, some 1 ms.
const CONNECTION_RATE: NonZeroU32 = NonZeroU32::new(100).unwrap();
/// Handshakes that one network may begin at once: a fleet behind one NAT that starts together.
const CONNECTION_BURST: NonZeroU32 = NonZeroU32::new(500).unwrap();
/// How many times more a site may begin than a network, and strangers of one network than a key.
const LARGER_GROUP: NonZeroU32 = NonZeroU32::new(4).unwrap();
/// Sessions and measurements that one key may begin in a second. Further ones wait.
const SESSION_RATE: NonZeroU32 = NonZeroU32::new(100).unwrap();
/// Sessions that may begin at once.
const SESSION_BURST: NonZeroU32 = NonZeroU32::new(1_000).unwrap();
/// Connections and sessions of one key, or of one site of strangers, that are logged in a second: at most 600 bytes each.
const LOG_RATE: NonZeroU32 = NonZeroU32::new(1).unwrap();
/// Connections and sessions that are logged at once.
const LOG_BURST: NonZeroU32 = NonZeroU32::new(100).unwrap();
/// The same of all strangers together, in a second.
const STRANGERS_LOG_RATE: NonZeroU32 = NonZeroU32::new(10).unwrap();
/// Refusals of all strangers that are logged in a minute, one for each address.
const REFUSAL_LOG_RATE: NonZeroU32 = NonZeroU32::new(300).unwrap();
/// Peers that a table of rates tells apart; it takes 1 MB at most.
const TABLE: u64 = 1 << 14;
/// Peers whose lines that were left out are counted on their own.
const MAX_COUNTED: usize = 256;

/// A rate for each peer. Peers share the places of a table at random, so that its memory is bounded however many come, and no
/// peer can choose with whom it shares.
struct Keyed {
    hasher: RandomState,
    places: RateLimiter<u64, HashMapStateStore<u64>, DefaultClock>,
}

impl Keyed {
    fn new(quota: Quota) -> Self {
        Self {
            hasher: RandomState::new(),
            places: RateLimiter::hashmap(quota),
        }
    }

    fn place(&self, peer: impl Hash) -> u64 {
        self.hasher.hash_one(peer) % TABLE
    }

    fn allows(&self, peer: impl Hash) -> bool {
        self.places.check_key(&self.place(peer)).is_ok()
    }

    /// Waits until the rate allows it.
    async fn wait(&self, peer: impl Hash) {
        let place = self.place(peer);
        while let Err(refused) = self.places.check_key(&place) {
            sleep(refused.wait_time_from(DefaultClock::default().now())).await;
        }
    }

    /// Forgets peers that may do again what a new peer may.
    fn forget(&self) {
        self.places.retain_recent();
        self.places.shrink_to_fit();
    }
}

/// The rates of a server.
pub(super) struct Rates {
    networks: Keyed,
    sites: Keyed,
    key_sessions: Keyed,
    network_sessions: Keyed,
    /// Connections and sessions.
    pub(super) log: LogLimit,
    /// Strangers that were refused.
    pub(super) refusals: LogLimit,
}

impl Rates {
    pub(super) fn new() -> Self {
        let connections = Quota::per_second(CONNECTION_RATE).allow_burst(CONNECTION_BURST);
        let times = |limit: NonZeroU32| limit.saturating_mul(LARGER_GROUP);
        let of_sites = Quota::per_second(times(CONNECTION_RATE));
        let one_a_minute = Quota::per_minute(NonZeroU32::MIN);
        Self {
            networks: Keyed::new(connections),
            sites: Keyed::new(of_sites.allow_burst(times(CONNECTION_BURST))),
            key_sessions: Keyed::new(Quota::per_second(SESSION_RATE).allow_burst(SESSION_BURST)),
            network_sessions: Keyed::new(
                Quota::per_second(times(SESSION_RATE)).allow_burst(times(SESSION_BURST)),
            ),
            log: LogLimit::new(
                Quota::per_second(LOG_RATE).allow_burst(LOG_BURST),
                Quota::per_second(STRANGERS_LOG_RATE).allow_burst(LOG_BURST),
            ),
            refusals: LogLimit::new(one_a_minute, Quota::per_minute(REFUSAL_LOG_RATE)),
        }
    }

    /// Whether another handshake with this address may begin now.
    pub(super) fn may_connect(&self, ip: IpAddr) -> bool {
        self.networks.allows(network(ip)) && self.sites.allows(site(ip))
    }

    /// Waits until the holder may begin another session. Strangers can make keys at will, so their network counts too.
    pub(super) async fn session(&self, holder: Holder) {
        self.key_sessions.wait(holder.key_id).await;
        if let Some(ip) = holder.stranger {
            self.network_sessions.wait(network(ip)).await;
        }
    }

    /// Forgets peers that were not seen lately.
    pub(super) fn forget(&self) {
        self.networks.forget();
        self.sites.forget();
        self.key_sessions.forget();
        self.network_sessions.forget();
        self.log.each.forget();
        self.refusals.each.forget();
    }
}

/// Limits the log lines that a peer causes, and counts those that are left out.
pub(super) struct LogLimit {
    each: Keyed,
    strangers: DefaultDirectRateLimiter,
    left_out: Mutex<LeftOut>,
}

/// What was left out of the log.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct LeftOut {
    pub(super) by_group: HashMap<Group, u64>,
    /// Of further peers.
    pub(super) others: u64,
}

impl LogLimit {
    fn new(each: Quota, strangers: Quota) -> Self {
        Self {
            each: Keyed::new(each),
            strangers: RateLimiter::direct(strangers),
            left_out: Mutex::default(),
        }
    }

    /// Whether something that this peer does is logged. If not, it is counted.
    pub(super) fn allows(&self, holder: Holder) -> bool {
        let group = match holder.stranger {
            None => Group::Key(holder.key_id),
            Some(ip) => Group::Site(site(ip)),
        };
        let is_logged = self.each.allows(group)
            && (holder.stranger.is_none() || self.strangers.check().is_ok());
        if !is_logged {
            let mut left_out = lock(&self.left_out);
            let has_room = left_out.by_group.len() < MAX_COUNTED;
            match left_out.by_group.get_mut(&group) {
                Some(count) => *count += 1,
                None if has_room => drop(left_out.by_group.insert(group, 1)),
                None => left_out.others += 1,
            }
        }
        is_logged
    }

    /// Takes the counts since the last call.
    pub(super) fn take_left_out(&self) -> LeftOut {
        std::mem::take(&mut lock(&self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::identity::Identity;
    use std::net::Ipv4Addr;

    fn stranger(n: u32) -> Holder {
        Holder {
            key_id: Identity::generate().unwrap().key_id(),
            stranger: Some(Ipv4Addr::from_bits(0x0a00_0000 + n).into()),
        }
    }

    #[test]
    fn refusals_of_one_address_take_one_line_and_are_counted() {
        let rates = Rates::new();
        let logged = (0..1_000).filter(|_| rates.refusals.allows(stranger(1)));
        assert_eq!(logged.count(), 1);
        assert!(
            rates.refusals.allows(stranger(2)),
            "another address has its own line"
        );
        let left_out = rates.refusals.take_left_out();
        assert_eq!(left_out.by_group.into_values().collect::<Vec<_>>(), [999]);
        assert_eq!(rates.refusals.take_left_out(), LeftOut::default());
    }

    #[test]
    fn many_addresses_take_bounded_lines_and_memory() {
        let rates = Rates::new();
        let identity = Identity::generate().unwrap().key_id();
        let holders = (0..100_000).map(|n| Holder {
            key_id: identity,
            stranger: Some(Ipv4Addr::from_bits(0x0a00_0000 + n % 50_000).into()),
        });
        let logged = holders
            .filter(|holder| rates.refusals.allows(*holder))
            .count();
        assert!(logged <= 2 * REFUSAL_LOG_RATE.get() as usize, "{logged}");
        let left_out = rates.refusals.take_left_out();
        assert_eq!(left_out.by_group.len(), MAX_COUNTED);
        let counted = left_out.by_group.values().sum::<u64>() + left_out.others;
        assert_eq!(logged as u64 + counted, 100_000);
    }

    #[test]
    fn a_network_connects_at_its_rate_and_others_at_theirs() {
        let rates = Rates::new();
        let [one, other] = [1, 2].map(|n| IpAddr::from(Ipv4Addr::from_bits(n)));
        let begun = (0..10_000).filter(|_| rates.may_connect(one)).count();
        assert!(
            begun >= CONNECTION_BURST.get() as usize && begun < 2_000,
            "{begun}"
        );
        assert!(rates.may_connect(other));
    }

    #[tokio::test]
    async fn a_key_waits_for_its_sessions_alone() {
        let rates = Rates::new();
        let one = stranger(1);
        let begun = async {
            for _ in 0..10_000 {
                rates.session(one).await;
            }
        };
        let limit = std::time::Duration::from_millis(50);
        assert!(tokio::time::timeout(limit, begun).await.is_err());
        rates.session(stranger(2)).await;
    }
}
