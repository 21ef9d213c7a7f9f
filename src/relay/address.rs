//! Addresses as the relay and its clients compare them.

use std::net::SocketAddr;

/// Returns the address as users write it: a socket for both families shows IPv4 as IPv6.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
