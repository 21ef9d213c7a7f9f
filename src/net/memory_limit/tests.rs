use super::*;

const TOTAL: usize = 64 << 20;

fn key(number: u8) -> KeyId {
    KeyId([number; 32])
}

#[test]
fn a_thousand_idle_connections_leave_the_pool_to_others() {
    let memory = MemoryLimit::new(TOTAL);
    let idle: Vec<_> = std::iter::from_fn(|| memory.admit(key(0)))
        .take(1023)
        .collect();
    assert_eq!(idle.len(), 1023);
    let mut honest = memory.admit(key(1)).unwrap();
    assert!(honest.grow(TOTAL / 2));
    assert_eq!(memory.room(), 0);
    drop((honest, idle));
    assert_eq!(memory.room(), TOTAL / 2);
}

#[test]
fn minimums_and_pool_stay_within_the_limit() {
    let memory = MemoryLimit::new(4 * MIN_SHARE);
    let shares: Vec<_> = std::iter::from_fn(|| memory.admit(key(0))).collect();
    assert_eq!(shares.len(), 4);
    drop(shares);
    let mut first = memory.admit(key(0)).unwrap();
    assert!(!first.grow(usize::MAX));
    assert_eq!(first.grown(), 2 * MIN_SHARE);
    let _second = memory.admit(key(0)).unwrap();
    assert!(memory.admit(key(0)).is_none());
}

#[test]
fn a_parked_share_is_free_for_others_and_no_new_credit() {
    let memory = MemoryLimit::new(TOTAL);
    let mut idle = memory.admit(key(0)).unwrap();
    assert!(idle.grow(2 << 20));
    let before = idle.bytes();
    idle.park(2 << 20);
    assert_eq!((idle.bytes(), memory.room()), (before, TOTAL / 2));
    assert!(idle.grow(3 << 20));
    assert_eq!(idle.parked(), 0);
    assert_eq!(idle.bytes(), before + (1 << 20));
}

#[test]
fn what_the_peer_has_sent_is_not_parked_any_more() {
    let memory = MemoryLimit::new(TOTAL);
    let mut share = memory.admit(key(0)).unwrap();
    assert!(share.grow(1 << 20));
    share.park(1 << 20);
    share.give_back(1 << 19);
    assert_eq!(share.parked(), 1 << 19);
    share.give_back(1 << 20);
    assert_eq!(share.bytes(), MIN_SHARE);
    assert!(memory.lock().parked_by_key.is_empty());
}

#[test]
fn a_key_that_has_parked_all_it_may_gets_nothing_new() {
    let memory = MemoryLimit::new(TOTAL);
    let mut idle = Vec::new();
    while let Some(mut share) = memory.admit(key(0)).filter(|_| idle.len() < 100) {
        share.grow(2 << 20);
        share.park(2 << 20);
        idle.push(share);
    }
    assert_eq!(memory.lock().parked, TOTAL / PARKED_KEY_PART);
    assert_eq!(memory.room(), TOTAL / 2);
    let mut other = memory.admit(key(1)).unwrap();
    assert!(other.grow(8 << 20), "another key is not affected");
}

#[test]
fn parked_credit_of_all_keys_has_a_limit() {
    let memory = MemoryLimit::new(TOTAL);
    let mut idle = Vec::new();
    for number in 0..100 {
        let mut share = memory.admit(key(number)).unwrap();
        share.grow(16 << 20);
        share.park(16 << 20);
        idle.push(share);
        // What could not be parked stays in the pool, but never all of it.
        assert!(
            memory.room() >= TOTAL / PARKED_KEY_PART
                || memory.lock().parked == PARKED_FACTOR * TOTAL
        );
    }
    assert_eq!(memory.lock().parked, PARKED_FACTOR * TOTAL);
}

#[test]
fn a_large_share_shrinks_to_an_equal_part_while_others_are_short() {
    let memory = MemoryLimit::new(TOTAL);
    let mut large = memory.admit(key(0)).unwrap();
    let mut small = memory.admit(key(1)).unwrap();
    assert!(small.grow(1));
    assert!(large.grow(TOTAL / 2 - 1));
    large.give_back(1 << 20);
    assert_eq!(large.grown(), TOTAL / 2 - 1, "no other needs it");
    assert!(!small.grow(1 << 20));
    large.give_back(1 << 20);
    assert!(small.grow(1 << 20));
    large.give_back(TOTAL);
    assert_eq!(large.grown(), TOTAL / 4);
}
