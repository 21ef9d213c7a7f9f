//! The limits of a relay's clients: connections, places, pairs and tries, for each network and in all.

use std::net::IpAddr;
use std::num::NonZeroU32;

use governor::clock::{Clock, DefaultClock};
use governor::middleware::NoOpMiddleware;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};

use super::shares::{Networks, SlotLimits};

/// Connections from one address: people behind one NAT, each with a sender and a receiver.
const NEAR_CONNECTIONS: usize = 64;
/// Connections from one site. It is four busy addresses, and 1/80 of all.
const WIDE_CONNECTIONS: usize = 256;
/// Places of one address, as many as its connections.
const NEAR_PLACES: usize = 64;
/// Places of one site; 1/40 of the default of all.
const WIDE_PLACES: usize = 256;
/// Pairs that one address has asked for.
const NEAR_PAIRS: usize = 16;
/// Pairs that one site has asked for; a quarter of the default of all.
const WIDE_PAIRS: usize = 64;
/// Requests of one address to find or get a number, at once and then each minute. A receiver asks once or twice.
const NEAR_TRIES: u32 = 20;
/// Requests of one site, at once and then each minute.
const WIDE_TRIES: u32 = 100;
/// Handshakes of one address, at once and then each minute. A handshake costs the relay most of a millisecond of
/// processor time, so one address takes 1/500 of it.
const NEAR_HANDSHAKES: u32 = 120;
/// Handshakes of one site, at once and then each minute.
const WIDE_HANDSHAKES: u32 = 600;

type Limiter<C> =
    RateLimiter<IpAddr, HashMapStateStore<IpAddr>, C, NoOpMiddleware<<C as Clock>::Instant>>;

/// The limits for each network, times a factor that the operator sets where many users share an address.
#[derive(Debug, Clone, Copy)]
pub(super) struct NetworkLimits(pub(super) NonZeroU32);

impl NetworkLimits {
    pub(super) fn connections(self, all: usize) -> SlotLimits {
        self.slots(all, NEAR_CONNECTIONS, WIDE_CONNECTIONS)
    }

    pub(super) fn places(self, all: usize) -> SlotLimits {
        self.slots(all, NEAR_PLACES, WIDE_PLACES)
    }

    pub(super) fn pairs(self, all: usize) -> SlotLimits {
        self.slots(all, NEAR_PAIRS, WIDE_PAIRS)
    }

    fn slots(self, all: usize, near: usize, wide: usize) -> SlotLimits {
        let factor = self.0.get() as usize;
        SlotLimits {
            all,
            near: near.saturating_mul(factor),
            wide: wide.saturating_mul(factor),
        }
    }

    pub(super) fn requests(self) -> Tries {
        Tries::new(self, NEAR_TRIES, WIDE_TRIES, DefaultClock::default())
    }

    pub(super) fn handshakes(self) -> Tries {
        Tries::new(
            self,
            NEAR_HANDSHAKES,
            WIDE_HANDSHAKES,
            DefaultClock::default(),
        )
    }
}

/// Counts the tries of each network.
pub(super) struct Tries<C: Clock = DefaultClock> {
    near: Limiter<C>,
    wide: Limiter<C>,
}

impl<C: Clock + Clone> Tries<C> {
    /// Allows so many tries at once and then each minute.
    fn new(limits: NetworkLimits, near: u32, wide: u32, clock: C) -> Self {
        let limiter = |tries: u32, clock: C| {
            let tries = limits
                .0
                .saturating_mul(NonZeroU32::new(tries).unwrap_or(limits.0));
            RateLimiter::new(
                Quota::per_minute(tries),
                HashMapStateStore::default(),
                clock,
            )
        };
        Self {
            near: limiter(near, clock.clone()),
            wide: limiter(wide, clock),
        }
    }

    /// Counts a try; `false` when the network has none left. What an address tries past its own limit does not count
    /// against its neighbours.
    pub(super) fn admit(&self, networks: Networks) -> bool {
        self.near.check_key(&networks.near).is_ok() && self.wide.check_key(&networks.wide).is_ok()
    }

    /// Forgets networks without recent tries.
    pub(super) fn forget(&self) {
        for limiter in [&self.near, &self.wide] {
            limiter.retain_recent();
            limiter.shrink_to_fit();
        }
    }

    #[cfg(test)]
    fn known(&self) -> usize {
        self.near.len() + self.wide.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use governor::clock::FakeRelativeClock;

    use super::*;

    fn tries(factor: u32) -> (Tries<FakeRelativeClock>, FakeRelativeClock) {
        let clock = FakeRelativeClock::default();
        let limits = NetworkLimits(NonZeroU32::new(factor).unwrap());
        (
            Tries::new(limits, NEAR_TRIES, WIDE_TRIES, clock.clone()),
            clock,
        )
    }

    fn admitted(tries: &Tries<FakeRelativeClock>, address: &str, count: usize) -> usize {
        let networks = Networks::of(address.parse().unwrap());
        (0..count).filter(|_| tries.admit(networks)).count()
    }

    #[test]
    fn an_address_has_twenty_tries_a_minute() {
        let (tries, clock) = tries(1);
        for address in ["192.0.2.1", "2001:db8::1"] {
            assert_eq!(admitted(&tries, address, 1_000), 20);
        }
        // Another address of the same IPv6 network is the same subscriber.
        assert_eq!(admitted(&tries, "2001:db8::ffff:1", 9), 0);
        for _ in 0..10 {
            clock.advance(Duration::from_secs(60));
            assert_eq!(admitted(&tries, "192.0.2.1", 1_000), 20);
        }
    }

    #[test]
    fn a_site_has_a_hundred_tries_a_minute() {
        for site in ["192.0.2", "2001:db8:0"] {
            let (tries, clock) = tries(1);
            for _ in 0..3 {
                let all: usize = (1..=250)
                    .map(|host| match site.contains(':') {
                        true => admitted(&tries, &format!("{site}:{host:x}::1"), 20),
                        false => admitted(&tries, &format!("{site}.{host}"), 20),
                    })
                    .sum();
                assert_eq!(all, 100, "{site}");
                clock.advance(Duration::from_secs(60));
            }
        }
    }

    #[test]
    fn tries_past_an_addresses_limit_do_not_count_against_neighbours() {
        let (tries, _) = tries(1);
        assert_eq!(admitted(&tries, "192.0.2.1", 100_000), 20);
        assert_eq!(admitted(&tries, "192.0.2.2", 20), 20);
    }

    #[test]
    fn the_operators_factor_multiplies_the_limits_of_networks_only() {
        let (tries, _) = tries(3);
        assert_eq!(admitted(&tries, "192.0.2.1", 1_000), 60);
        let limits = NetworkLimits(NonZeroU32::new(3).unwrap()).pairs(256);
        assert_eq!(
            (limits.all, limits.near, limits.wide),
            (256, 3 * NEAR_PAIRS, 3 * WIDE_PAIRS)
        );
    }

    #[test]
    fn networks_without_recent_tries_are_forgotten() {
        let (tries, clock) = tries(1);
        for host in 0..200 {
            admitted(&tries, &format!("192.0.2.{host}"), 1);
        }
        assert!(tries.known() > 100);
        clock.advance(Duration::from_secs(61));
        tries.forget();
        assert_eq!(tries.known(), 0);
    }
}
