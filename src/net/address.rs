//! Addresses and networks as limits compare them and users read them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Returns the address as users write it: a socket for both families shows IPv4 as IPv6.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Returns the network of an address: the address that the first `ipv4_bits` or `ipv6_bits` begin with.
pub(crate) fn network(ip: IpAddr, ipv4_bits: u32, ipv6_bits: u32) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - ipv4_bits).unwrap_or(0);
            Ipv4Addr::from_bits(v4.to_bits() & mask).into()
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - ipv6_bits).unwrap_or(0);
            Ipv6Addr::from_bits(v6.to_bits() & mask).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_begins_with_the_first_bits() {
        let of = |ip: &str, v4, v6| network(ip.parse().unwrap(), v4, v6).to_string();
        assert_eq!(of("192.0.2.77", 24, 48), "192.0.2.0");
        assert_eq!(of("192.0.2.77", 32, 64), "192.0.2.77");
        assert_eq!(of("::ffff:192.0.2.77", 24, 48), "192.0.2.0");
        assert_eq!(of("2001:db8:1:2:3::4", 24, 48), "2001:db8:1::");
        assert_eq!(of("2001:db8:1:2:3::4", 24, 64), "2001:db8:1:2::");
        assert_eq!(of("2001:db8::1", 0, 0), "::");
    }
}
