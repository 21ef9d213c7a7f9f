//! Divides a limited number of slots among networks. No I/O, no clock.
//!
//! While there is room, a network gets what it asks for, up to a limit of its own. When all slots are taken, the network
//! that holds the most gives one up for a network that holds at least two fewer. So a flood from any number of addresses
//! leaves each other network its fair share (max-min fairness), and a network that holds one slot never loses it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::net::address::network;

/// The networks that an address belongs to. They are compared as the address that they begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Networks {
    /// One subscriber: an IPv4 address, or the first 64 bits of an IPv6 address.
    pub(super) near: IpAddr,
    /// One site: the first 24 bits of an IPv4 address, or 48 of an IPv6 address (RFC 6177). Its owner can use all
    /// subscribers' networks in it.
    pub(super) wide: IpAddr,
}

impl Networks {
    pub(super) fn of(ip: IpAddr) -> Self {
        Self {
            near: network(ip, 32, 64),
            wide: network(ip, 24, 48),
        }
    }
}

/// Most slots that may be taken, in all and from one network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SlotLimits {
    pub(super) all: usize,
    pub(super) near: usize,
    pub(super) wide: usize,
}

/// A slot that was given.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Slot<T> {
    /// Never reused.
    pub(super) id: u64,
    /// The slot that had to be given up for it. It is free already.
    pub(super) evicted: Option<T>,
}

/// The slots that are taken, with a value for each.
pub(super) struct Shares<T> {
    limits: SlotLimits,
    next_id: u64,
    taken: usize,
    wide: BTreeMap<IpAddr, WideShare<T>>,
}

/// The slots of one wide network.
struct WideShare<T> {
    taken: usize,
    near: BTreeMap<IpAddr, BTreeMap<u64, T>>,
}

impl<T> Shares<T> {
    pub(super) fn new(limits: SlotLimits) -> Self {
        Self {
            limits,
            next_id: 0,
            taken: 0,
            wide: BTreeMap::new(),
        }
    }

    /// Takes a slot for this network; `None` when its own limit or its fair share is used up.
    pub(super) fn take(&mut self, networks: Networks, value: T) -> Option<Slot<T>> {
        let wide = self.wide.get(&networks.wide);
        let in_wide = wide.map_or(0, |wide| wide.taken);
        let in_near = wide
            .and_then(|wide| wide.near.get(&networks.near))
            .map_or(0, BTreeMap::len);
        if in_near >= self.limits.near {
            return None;
        }
        let has_room = self.taken < self.limits.all && in_wide < self.limits.wide;
        let evicted = match has_room {
            true => None,
            false => Some(self.evict_for(networks, in_wide, in_near)?),
        };
        let id = self.next_id;
        self.next_id += 1;
        self.taken += 1;
        let wide = self.wide.entry(networks.wide).or_insert_with(|| WideShare {
            taken: 0,
            near: BTreeMap::new(),
        });
        wide.taken += 1;
        wide.near
            .entry(networks.near)
            .or_default()
            .insert(id, value);
        Some(Slot { id, evicted })
    }

    /// Gives a slot back; `None` when it was given up already.
    pub(super) fn release(&mut self, networks: Networks, id: u64) -> Option<T> {
        let wide = self.wide.get_mut(&networks.wide)?;
        let near = wide.near.get_mut(&networks.near)?;
        let value = near.remove(&id)?;
        if near.is_empty() {
            wide.near.remove(&networks.near);
        }
        wide.taken -= 1;
        if wide.taken == 0 {
            self.wide.remove(&networks.wide);
        }
        self.taken -= 1;
        Some(value)
    }

    /// Frees a slot of the network that holds the most, if that is fair; else one of a neighbour in the same wide network,
    /// which holds the most there.
    fn evict_for(&mut self, networks: Networks, in_wide: usize, in_near: usize) -> Option<T> {
        let largest = self
            .wide
            .iter()
            .max_by_key(|(_, wide)| wide.taken)
            .filter(|(_, wide)| wide.taken >= in_wide + 2)
            .map(|(wide, _)| *wide);
        let foreign = largest.filter(|_| in_wide < self.limits.wide);
        let from = foreign.unwrap_or(networks.wide);
        let (near, slots) = self
            .wide
            .get(&from)?
            .near
            .iter()
            .max_by_key(|(_, slots)| slots.len())?;
        if foreign.is_none() && slots.len() < in_near + 2 {
            return None;
        }
        // The youngest: who came before a flood keeps its slot.
        let id = *slots.last_key_value()?.0;
        let near = *near;
        self.release(Networks { near, wide: from }, id)
    }
}

#[cfg(test)]
mod tests;
