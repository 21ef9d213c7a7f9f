//! Who is let in: which handshakes may begin, and which connections get a place. Pure: no I/O and no clock of its own.
//!
//! A handshake costs its sender one datagram, which may have a forged source. So handshakes are counted apart from places:
//! - Few addresses that are not validated are served at once. Further clients prove their address by a Retry packet, for which
//!   the server keeps nothing (RFC 9000, section 8.1.2). A forged source can use up only what forged sources share.
//! - Of the validated handshakes, too many of one network or site end the oldest of the same network or site. An honest
//!   handshake takes one round trip, so the oldest one is the least likely to be honest.
//!
//! A place is taken once the key is known and admitted. When a limit is reached, the connection of the same group that has
//! been idle for longest makes room. Some places are reserved for listed keys.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::running::Running;
use crate::net::share::{Group, Holder, ShareLimits, network, site};

/// Handshakes at the same time with addresses that are not validated. Each may make the server send three times what it
/// received to a forged address. A client beyond them needs one more round trip.
const MAX_UNVALIDATED: usize = 64;
/// The same with one network.
const MAX_UNVALIDATED_OF_NETWORK: usize = 16;
/// Handshakes at the same time with validated addresses. Each takes some 80 KB, so all take 40 MB.
const MAX_VALIDATED: usize = 512;
/// The same with one network: a hundred machines behind one NAT that start at the same time.
const MAX_VALIDATED_OF_NETWORK: usize = 192;
/// The same with one site.
const MAX_VALIDATED_OF_SITE: usize = 256;

/// What becomes of a handshake that a client begins.
#[derive(Debug)]
pub(super) enum Arrival {
    /// It goes on until the token is cancelled, and counts until its number is [left](HalfOpen::leave).
    Accepted(u64, CancellationToken),
    /// The client has to prove its address.
    Retry,
}

/// The handshakes that are under way.
#[derive(Debug, Default)]
pub(super) struct HalfOpen {
    last_number: u64,
    /// The oldest first. At most 256, so reading all is cheap.
    handshakes: VecDeque<Handshake>,
}

#[derive(Debug)]
struct Handshake {
    number: u64,
    ip: IpAddr,
    validated: bool,
    evicted: CancellationToken,
}

impl HalfOpen {
    /// Decides about a new handshake with this address.
    pub(super) fn arrive(&mut self, ip: IpAddr, validated: bool) -> Arrival {
        if !validated && self.has_no_room_for_unvalidated(ip) {
            return Arrival::Retry;
        }
        if validated {
            self.make_room_for_validated(ip);
        }
        self.last_number += 1;
        let evicted = CancellationToken::new();
        self.handshakes.push_back(Handshake {
            number: self.last_number,
            ip,
            validated,
            evicted: evicted.clone(),
        });
        Arrival::Accepted(self.last_number, evicted)
    }

    /// Removes a handshake that has ended.
    pub(super) fn leave(&mut self, number: u64) {
        self.handshakes.retain(|one| one.number != number);
    }

    fn has_no_room_for_unvalidated(&self, ip: IpAddr) -> bool {
        let unvalidated = || self.handshakes.iter().filter(|one| !one.validated);
        let of_network = unvalidated().filter(|one| network(one.ip) == network(ip));
        unvalidated().count() >= MAX_UNVALIDATED || of_network.count() >= MAX_UNVALIDATED_OF_NETWORK
    }

    fn make_room_for_validated(&mut self, ip: IpAddr) {
        let same_network = |one: &Handshake| network(one.ip) == network(ip);
        let same_site = |one: &Handshake| site(one.ip) == site(ip);
        self.keep_below(MAX_VALIDATED_OF_NETWORK, same_network);
        self.keep_below(MAX_VALIDATED_OF_SITE, same_site);
        if self.validated().count() >= MAX_VALIDATED
            && let Some(fullest) = self.fullest_site()
        {
            self.end_oldest(|one| site(one.ip) == fullest);
        }
    }

    fn validated(&self) -> impl Iterator<Item = &Handshake> {
        self.handshakes.iter().filter(|one| one.validated)
    }

    fn keep_below(&mut self, limit: usize, group: impl Fn(&Handshake) -> bool) {
        if self.validated().filter(|one| group(one)).count() >= limit {
            self.end_oldest(group);
        }
    }

    fn end_oldest(&mut self, group: impl Fn(&Handshake) -> bool) {
        let oldest = self
            .handshakes
            .iter()
            .position(|one| one.validated && group(one));
        if let Some(ended) = oldest.and_then(|at| self.handshakes.remove(at)) {
            ended.evicted.cancel();
        }
    }

    /// The site with the most validated handshakes.
    fn fullest_site(&self) -> Option<IpAddr> {
        let mut counts = BTreeMap::<IpAddr, usize>::new();
        for one in self.validated() {
            *counts.entry(site(one.ip)).or_default() += 1;
        }
        let fullest = counts.into_iter().max_by_key(|(_, count)| *count);
        fullest.map(|(site, _)| site)
    }
}

/// Idle time after which a connection may lose its place to another. A client that has just connected, or is about to begin
/// its next session, is not disturbed.
pub(super) const MIN_IDLE: Duration = Duration::from_secs(5);

/// The connections that have a place.
#[derive(Debug)]
pub(super) struct Places {
    limits: ShareLimits,
    /// The most places of all strangers; the others are reserved for listed keys.
    strangers: usize,
    last_number: u64,
    taken: BTreeMap<u64, Place>,
}

#[derive(Debug)]
struct Place {
    holder: Holder,
    running: Arc<Running>,
    evicted: CancellationToken,
}

/// The shares of `max_connections` places.
fn share_limits(max_connections: usize) -> ShareLimits {
    let part = |parts: usize| (max_connections / parts).max(1);
    ShareLimits {
        all: max_connections,
        key: part(2),
        network: part(4),
        site: part(2),
    }
}

impl Places {
    /// Half of the places are the most for a listed key or a site of strangers, a quarter for a network of strangers, and an
    /// eighth for the key of a stranger. An eighth is reserved for listed keys.
    pub(super) fn new(max_connections: usize) -> Self {
        Self {
            limits: share_limits(max_connections),
            strangers: max_connections - max_connections / 8,
            last_number: 0,
            taken: BTreeMap::new(),
        }
    }

    /// Takes a place until it is [left](Self::leave), or until the token is cancelled because another connection got the
    /// place; `None` if there is none.
    pub(super) fn take(
        &mut self,
        holder: Holder,
        running: &Arc<Running>,
        now: Instant,
    ) -> Option<(u64, CancellationToken)> {
        let is_stranger = |one: &Place| one.holder.stranger.is_some();
        for group in holder.groups() {
            let in_group = |one: &Place| one.holder.groups().any(|other| other == group);
            if self.count(in_group) >= self.limit_of(holder, group) {
                self.end_idle(in_group, now)?;
            }
        }
        if holder.stranger.is_some() && self.count(is_stranger) >= self.strangers {
            self.end_idle(is_stranger, now)?;
        }
        if self.taken.len() >= self.limits.all {
            // A listed key may get the place of a stranger, but not the other way round.
            let ended = self.end_idle(is_stranger, now);
            if ended.is_none() {
                self.end_idle(|_| holder.stranger.is_none(), now)?;
            }
        }
        self.last_number += 1;
        let evicted = CancellationToken::new();
        self.taken.insert(
            self.last_number,
            Place {
                holder,
                running: running.clone(),
                evicted: evicted.clone(),
            },
        );
        Some((self.last_number, evicted))
    }

    /// Returns a place.
    pub(super) fn leave(&mut self, number: u64) {
        self.taken.remove(&number);
    }

    fn limit_of(&self, holder: Holder, group: Group) -> usize {
        match (group, holder.stranger) {
            (Group::Key(_), Some(_)) => (self.limits.network / 2).max(1),
            _ => self.limits.of(group),
        }
    }

    fn count(&self, group: impl Fn(&Place) -> bool) -> usize {
        self.taken.values().filter(|one| group(one)).count()
    }

    /// Ends the connection of a group that has been idle for longest; `None` if none has been idle for long enough.
    fn end_idle(&mut self, group: impl Fn(&Place) -> bool, now: Instant) -> Option<()> {
        let idle_since = |place: &Place| place.running.idle_since();
        let in_group = self.taken.iter().filter(|(_, place)| group(place));
        let idle = in_group.filter_map(|(number, place)| Some((idle_since(place)?, *number)));
        let (since, number) = idle.min()?;
        if now.duration_since(since) < MIN_IDLE {
            return None;
        }
        self.taken.remove(&number)?.evicted.cancel();
        Some(())
    }
}

#[cfg(test)]
mod tests;
