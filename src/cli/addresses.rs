//! The addresses of this machine.

use std::net::IpAddr;

/// Returns the addresses of this machine that other machines may reach.
pub(crate) fn own_addresses() -> Vec<IpAddr> {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let mut own: Vec<_> = interfaces
        .into_iter()
        .map(|interface| interface.ip())
        // A link-local address is useless to another machine, which would need the name of its own interface too.
        .filter(|ip| !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()))
        .collect();
    own.sort_by_key(|ip| (ip.is_loopback(), ip.is_ipv6()));
    own
}
