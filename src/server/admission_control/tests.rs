use std::net::Ipv4Addr;

use super::*;
use crate::auth::identity::{Identity, KeyId};

fn v4(n: u32) -> IpAddr {
    Ipv4Addr::from_bits(0x0a00_0000 + n).into()
}

/// Begins a handshake whose address is validated.
fn validated(half_open: &mut HalfOpen, ip: IpAddr) -> (u64, CancellationToken) {
    match half_open.arrive(ip, true) {
        Arrival::Accepted(number, evicted) => (number, evicted),
        Arrival::Retry => panic!("a validated client is never asked to prove its address again"),
    }
}

#[test]
fn forged_addresses_get_a_retry_and_take_nothing_from_others() {
    let mut half_open = HalfOpen::default();
    let accepted =
        (0..10_000).filter(|n| matches!(half_open.arrive(v4(*n), false), Arrival::Accepted(..)));
    assert_eq!(accepted.count(), MAX_UNVALIDATED);
    let (number, evicted) = validated(&mut half_open, v4(77));
    for n in 0..10_000 {
        assert!(matches!(half_open.arrive(v4(n), false), Arrival::Retry));
    }
    assert!(!evicted.is_cancelled());
    half_open.leave(number);
    assert_eq!(half_open.handshakes.len(), MAX_UNVALIDATED);
}

#[test]
fn one_network_does_not_take_the_early_handshakes_of_others() {
    let mut half_open = HalfOpen::default();
    for n in 0..1_100 {
        let ip = format!("2001:db8:0:7::{n:x}").parse().unwrap();
        half_open.arrive(ip, false);
    }
    assert_eq!(half_open.handshakes.len(), MAX_UNVALIDATED_OF_NETWORK);
    assert!(matches!(
        half_open.arrive(v4(1), false),
        Arrival::Accepted(..)
    ));
}

#[test]
fn a_network_with_too_many_handshakes_loses_its_own_oldest() {
    let mut half_open = HalfOpen::default();
    let (_, other) = validated(&mut half_open, v4(2));
    let flood: Vec<_> = (0..1_100)
        .map(|_| validated(&mut half_open, v4(1)).1)
        .collect();
    let open = flood.iter().filter(|evicted| !evicted.is_cancelled());
    assert_eq!(open.count(), MAX_VALIDATED_OF_NETWORK);
    assert!(flood[0].is_cancelled() && !flood[1_099].is_cancelled());
    assert!(!other.is_cancelled());
}

#[test]
fn many_networks_of_one_site_lose_only_their_own() {
    let mut half_open = HalfOpen::default();
    let (_, other) = validated(&mut half_open, "2001:db8:2::1".parse().unwrap());
    for n in 0..1_100 {
        validated(
            &mut half_open,
            format!("2001:db8:1:{n:x}::1").parse().unwrap(),
        );
    }
    assert_eq!(half_open.handshakes.len(), MAX_VALIDATED_OF_SITE + 1);
    assert!(!other.is_cancelled());
}

#[test]
fn the_fullest_site_makes_room_when_all_is_full() {
    let mut half_open = HalfOpen::default();
    let lonely = validated(&mut half_open, v4(1_000)).1;
    for n in 0..8 {
        for _ in 0..MAX_VALIDATED / 4 {
            validated(&mut half_open, v4(n));
        }
    }
    assert_eq!(half_open.handshakes.len(), MAX_VALIDATED);
    assert!(!lonely.is_cancelled());
}

fn key() -> KeyId {
    Identity::generate().unwrap().key_id()
}

fn listed() -> Holder {
    Holder {
        key_id: key(),
        stranger: None,
    }
}

fn stranger(ip: IpAddr) -> Holder {
    Holder {
        key_id: key(),
        stranger: Some(ip),
    }
}

/// Takes a place for a connection on which a session runs.
fn take_busy(places: &mut Places, holder: Holder) -> Option<(Arc<Running>, CancellationToken)> {
    let running = Arc::new(Running::default());
    running.begin();
    let (_, evicted) = places.take(holder, &running, Instant::now())?;
    Some((running, evicted))
}

#[test]
fn strangers_leave_an_eighth_of_the_places_to_listed_keys() {
    let mut places = Places::new(64);
    let taken = (0..100).filter(|n| take_busy(&mut places, stranger(v4(*n))).is_some());
    assert_eq!(taken.count(), 56);
    let ours = (0..100).filter(|_| take_busy(&mut places, listed()).is_some());
    assert_eq!(ours.count(), 8);
}

#[test]
fn one_key_and_one_network_leave_places_to_others() {
    let mut places = Places::new(64);
    let greedy = listed();
    let taken = (0..100).filter(|_| take_busy(&mut places, greedy).is_some());
    assert_eq!(taken.count(), 32);
    let of_network = (0..100).filter(|_| take_busy(&mut places, stranger(v4(1))).is_some());
    assert_eq!(of_network.count(), 16);
    let greedy = stranger(v4(2));
    let of_key = (0..100).filter(|_| take_busy(&mut places, greedy).is_some());
    assert_eq!(of_key.count(), 8);
    assert!(take_busy(&mut places, listed()).is_some());
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_loses_its_place_to_a_newcomer() {
    let mut places = Places::new(8);
    let greedy = listed();
    let held: Vec<_> = (0..4)
        .map(|_| take_busy(&mut places, greedy).unwrap())
        .collect();
    held[2].0.end();
    assert!(
        take_busy(&mut places, greedy).is_none(),
        "it has only just become idle"
    );
    tokio::time::advance(MIN_IDLE).await;
    assert!(take_busy(&mut places, greedy).is_some());
    let evicted: Vec<_> = held
        .iter()
        .map(|(_, evicted)| evicted.is_cancelled())
        .collect();
    assert_eq!(evicted, [false, false, true, false]);
}

#[tokio::test(start_paused = true)]
async fn a_stranger_takes_no_place_of_a_listed_key() {
    let mut places = Places::new(8);
    let held: Vec<_> = (0..8)
        .map(|_| take_busy(&mut places, listed()).unwrap())
        .collect();
    held.iter().for_each(|(running, _)| running.end());
    tokio::time::advance(MIN_IDLE).await;
    assert!(take_busy(&mut places, stranger(v4(1))).is_none());
    assert!(held.iter().all(|(_, evicted)| !evicted.is_cancelled()));
    assert!(take_busy(&mut places, listed()).is_some());
}
