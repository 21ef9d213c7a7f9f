//! Tests of the pairs.

use std::num::NonZeroU32;

use super::super::limits::NetworkLimits;
use super::*;

const A: &str = "192.0.2.1:7";
const B: &str = "192.0.2.2:7";

/// Two ends with bound addresses, on the only port.
fn bound() -> PairTable {
    let mut state = unbound();
    assert_eq!(
        [bind(&mut state, 0, A), bind(&mut state, 1, B)],
        [None, None]
    );
    state
}

fn unbound() -> PairTable {
    let mut state = PairTable::new(NetworkLimits(NonZeroU32::MIN).pairs(256));
    let end = |id, at| Party {
        id,
        ip: address(at).ip(),
    };
    let tokens = [[0; TOKEN_SIZE], [1; TOKEN_SIZE]];
    state.insert(0, [end(0, A), end(1, B)], tokens, Instant::now(), None);
    state
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn bind(state: &mut PairTable, token: u8, from: &str) -> Option<SocketAddr> {
    state.take(
        one(&[&[BIND][..], &[token; TOKEN_SIZE]].concat()),
        0,
        address(from),
        &Allowance::default(),
    )
}

fn one(bytes: &[u8]) -> Datagrams<'_> {
    Datagrams {
        bytes,
        length: bytes.len(),
        ecn: None,
    }
}

fn forward(state: &mut PairTable, from: &str) -> Option<SocketAddr> {
    state.take(one(b"anything"), 0, address(from), &Allowance::default())
}

/// Sweeps as if this many seconds had passed since the last datagram.
fn swept(state: &mut PairTable, seconds: u64, allowance: &Allowance) -> bool {
    state.sweep(Instant::now() + Duration::from_secs(seconds), allowance);
    assert!(
        !state.pairs.is_empty() || (state.tokens.is_empty() && state.addresses.is_empty()),
        "nothing is left of it"
    );
    state.pairs.is_empty()
}

#[test]
fn datagrams_of_one_end_go_only_to_the_other() {
    let mut state = bound();
    assert_eq!(forward(&mut state, A), Some(address(B)));
    assert_eq!(forward(&mut state, B), Some(address(A)));
    for stranger in ["192.0.2.1:8", "192.0.2.3:7", "[2001:db8::1]:7"] {
        assert_eq!(forward(&mut state, stranger), None);
    }
    assert_eq!(
        state.take(one(b"anything"), 1, address(A), &Allowance::default()),
        None,
        "on another port"
    );
}

#[test]
fn a_token_binds_only_addresses_of_the_validated_ip() {
    let mut state = bound();
    assert_eq!(bind(&mut state, 0, "192.0.2.3:7"), None);
    assert_eq!(
        (forward(&mut state, "192.0.2.3:7"), forward(&mut state, B)),
        (None, Some(address(A)))
    );
    // As a NAT does that changes the port.
    bind(&mut state, 0, "192.0.2.1:9");
    assert_eq!(
        (forward(&mut state, A), forward(&mut state, B)),
        (None, Some(address("192.0.2.1:9")))
    );
    // As a socket for IPv4 and IPv6 shows it.
    bind(&mut state, 0, "[::ffff:192.0.2.1]:9");
    assert_eq!(
        forward(&mut state, B),
        Some(address("[::ffff:192.0.2.1]:9"))
    );
}

#[test]
fn a_silent_end_ends_the_pair_while_the_other_still_sends() {
    let mut state = bound();
    assert!(!swept(
        &mut state,
        IDLE_TIMEOUT.as_secs() - 1,
        &Allowance::default()
    ));
    let Some(pair) = state.pairs.get_mut(&0) else {
        unreachable!()
    };
    pair.ends[1].last_seen += IDLE_TIMEOUT;
    assert!(
        swept(
            &mut state,
            IDLE_TIMEOUT.as_secs() + 1,
            &Allowance::default()
        ),
        "only one of them still sends"
    );
    assert_eq!(forward(&mut state, B), None);
}

#[test]
fn a_pair_with_an_unbound_end_is_removed() {
    let mut state = unbound();
    bind(&mut state, 1, B);
    assert_eq!(forward(&mut state, B), None);
    assert!(!swept(
        &mut state,
        UNBOUND_TIMEOUT.as_secs() - 1,
        &Allowance::default()
    ));
    assert!(swept(
        &mut state,
        UNBOUND_TIMEOUT.as_secs() + 1,
        &Allowance::default()
    ));
}

#[test]
fn a_pair_has_limited_bytes_and_time() {
    let allowance = Allowance {
        bytes: 20,
        time: Duration::from_secs(10),
        ..Allowance::default()
    };
    let mut state = bound();
    let forwarded = (0..9).filter(|_| {
        state
            .take(one(b"8 bytes."), 0, address(A), &allowance)
            .is_some()
    });
    assert_eq!(
        forwarded.count(),
        3,
        "the datagram that reaches the limit is the last"
    );
    assert!(swept(&mut state, 0, &allowance));
    let mut state = bound();
    assert!(!swept(&mut state, 9, &allowance));
    assert!(swept(&mut state, 11, &allowance));
}
