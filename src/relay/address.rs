//! Addresses as the relay and its clients compare them.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Returns the network of one subscriber: an IPv4 address, or the first 64 bits of an IPv6 address.
pub(super) fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

/// Returns the address as users write it: a socket for both families shows IPv4 as IPv6.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
