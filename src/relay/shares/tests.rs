//! Tests of the division among networks.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::*;

const LIMITS: SlotLimits = SlotLimits {
    all: 1_000,
    near: 64,
    wide: 256,
};

fn networks(address: &str) -> Networks {
    Networks::of(address.parse().unwrap())
}

/// Address `host` of the IPv4 network `wide`.
fn v4(wide: u32, host: u8) -> Networks {
    Networks::of(Ipv4Addr::from_bits((0x0b00_0000 + (wide << 8)) | u32::from(host)).into())
}

/// Network `near` of 64 bits in the IPv6 network `wide` of 48 bits.
fn v6(wide: u128, near: u128) -> Networks {
    Networks::of(Ipv6Addr::from_bits(0x2001_0db8 << 96 | wide << 80 | near << 64 | near).into())
}

fn count(shares: &Shares<()>, of: Networks) -> usize {
    shares.wide.get(&of.wide).map_or(0, |wide| wide.taken)
}

fn takes(shares: &mut Shares<()>, of: Networks, tries: usize) -> usize {
    (0..tries).filter_map(|_| shares.take(of, ())).count()
}

#[test]
fn networks_are_those_of_a_subscriber_and_of_a_site() {
    for (address, near, wide) in [
        ("192.0.2.7", "192.0.2.7", "192.0.2.0"),
        ("::ffff:192.0.2.7", "192.0.2.7", "192.0.2.0"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::", "2001:db8:1::"),
    ] {
        let expected = Networks {
            near: near.parse().unwrap(),
            wide: wide.parse().unwrap(),
        };
        assert_eq!(networks(address), expected, "{address}");
    }
}

#[test]
fn a_network_has_a_limit_of_its_own_at_both_sizes() {
    for addresses in [
        [v4(1, 1), v4(1, 2), v4(1, 3), v4(1, 4), v4(1, 5)],
        [v6(1, 1), v6(1, 2), v6(1, 3), v6(1, 4), v6(1, 5)],
    ] {
        let mut shares = Shares::new(LIMITS);
        let taken = addresses.map(|address| takes(&mut shares, address, 100));
        // The last takes from its neighbours, until it has a fifth too.
        assert_eq!(taken, [64, 64, 64, 64, 51]);
        assert_eq!(count(&shares, addresses[0]), LIMITS.wide);
        assert_eq!(
            takes(&mut shares, v4(9, 1), 100),
            64,
            "others are not concerned"
        );
    }
}

#[test]
fn a_flood_from_any_number_of_networks_leaves_others_their_share() {
    // 510 addresses, all in one network, in some, and each in one of its own; IPv6 sites too.
    for sites in [1, 8, 51, 510] {
        for flood in [v4 as fn(u32, u8) -> Networks, |wide, near| {
            v6(wide.into(), near.into())
        }] {
            let mut shares = Shares::new(LIMITS);
            for _ in 0..20 {
                for address in 0..510 {
                    let _ =
                        shares.take(flood(1_000 + address % sites, (address / sites) as u8), ());
                }
            }
            for honest in 0..10 {
                assert!(shares.take(v4(honest, 1), ()).is_some(), "{sites} sites");
            }
            // And they keep it while the flood goes on.
            for address in 0..5_100 {
                let _ = shares.take(flood(1_000 + address % sites, (address % 250) as u8), ());
            }
            assert!((0..10).all(|honest| count(&shares, v4(honest, 1)) == 1));
            assert!(shares.taken <= LIMITS.all);
        }
    }
}

#[test]
fn full_slots_are_divided_evenly_among_those_that_want_them() {
    let mut shares = Shares::new(LIMITS);
    for round in 0..200 {
        for wide in 0..10 {
            let _ = shares.take(v4(wide, (round % 250) as u8), ());
        }
    }
    for wide in 0..10 {
        let taken = count(&shares, v4(wide, 1));
        assert!((99..=101).contains(&taken), "{taken}");
    }
}

#[test]
fn a_network_with_one_slot_never_loses_it() {
    let mut shares = Shares::new(LIMITS);
    assert!((0..1_000).all(|wide| shares.take(v4(wide, 1), ()).is_some()));
    assert_eq!(takes(&mut shares, v4(2_000, 1), 100), 0);
    assert!((0..1_000).all(|wide| count(&shares, v4(wide, 1)) == 1));
}

#[test]
fn within_a_full_site_one_subscriber_takes_from_another() {
    let mut shares = Shares::new(SlotLimits { all: 8, ..LIMITS });
    assert_eq!(takes(&mut shares, v4(1, 1), 100), 8);
    assert_eq!(takes(&mut shares, v4(1, 2), 100), 4, "up to a half");
    assert_eq!(
        takes(&mut shares, v4(2, 1), 100),
        4,
        "another site has a half too"
    );
}

#[test]
fn the_youngest_slot_of_the_largest_network_is_given_up() {
    let mut shares = Shares::new(SlotLimits { all: 3, ..LIMITS });
    for (value, address) in [(0, v4(1, 1)), (1, v4(2, 1)), (2, v4(1, 1))] {
        assert!(shares.take(address, value).is_some());
    }
    let slot = shares.take(v4(3, 1), 3).unwrap();
    assert_eq!(slot.evicted, Some(2));
    assert_eq!(shares.release(v4(1, 1), 2), None, "it is gone already");
    assert_eq!(shares.release(v4(3, 1), slot.id), Some(3));
    assert_eq!(shares.taken, 2);
}

#[test]
fn nothing_is_kept_of_networks_without_slots() {
    let mut shares = Shares::new(LIMITS);
    for wide in 0..100 {
        let slot = shares.take(v4(wide, 1), ()).unwrap();
        assert_eq!(shares.release(v4(wide, 1), slot.id), Some(()));
        assert_eq!(shares.release(v4(wide, 1), slot.id), None);
    }
    assert!(shares.wide.is_empty() && shares.taken == 0);
}
