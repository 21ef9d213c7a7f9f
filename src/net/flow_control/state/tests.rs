use super::*;
use crate::auth::identity::KeyId;

const ROUND_TRIP: Duration = Duration::from_secs(1);

fn state(memory: &std::sync::Arc<MemoryLimit>) -> FlowControlState {
    let share = memory.admit(KeyId([0; 32])).unwrap();
    FlowControlState::new(share, ROUND_TRIP)
}

fn add(state: &mut FlowControlState, bytes: usize, memory: &MemoryLimit) {
    state.add(bytes, memory, || ROUND_TRIP);
}

#[test]
fn an_idle_connection_has_the_initial_window() {
    let memory = MemoryLimit::new(64 << 20);
    let mut state = state(&memory);
    assert_eq!(state.next_window(), INITIAL_WINDOW as usize);
    assert_eq!(memory.room(), 32 << 20);
}

#[test]
fn the_first_content_brings_many_times_as_much_credit() {
    let memory = MemoryLimit::new(64 << 20);
    let mut state = state(&memory);
    let mut came = 0;
    // 32 packets, the first flight of a sender.
    for _ in 0..32 {
        add(&mut state, 1_200, &memory);
        came += 1_200;
        assert!(
            state.share.bytes() >= 8 * came,
            "{} of {came}",
            state.share.bytes()
        );
    }
    assert!(state.share.bytes() >= 700_000, "{}", state.share.bytes());
    add(&mut state, 64 << 10, &memory);
    assert!(state.share.bytes() >= FIRST_SHARE);
}

#[test]
fn an_admitted_file_brings_credit_for_the_first_flight() {
    let memory = MemoryLimit::new(64 << 20);
    let mut state = state(&memory);
    state.expect_content(&memory);
    assert!(state.next_window() >= 512 << 10);
}

#[test]
fn reservations_that_are_never_filled_bring_no_further_credit() {
    let memory = MemoryLimit::new(64 << 20);
    let mut state = state(&memory);
    // quinn's rule: a raised window is granted at once, a lowered one is owed until as much is read.
    let mut window = INITIAL_WINDOW as usize;
    let mut granted = window;
    let mut apply = |next: usize| {
        granted += next.saturating_sub(window);
        window = next;
        granted
    };
    for _ in 0..1_000 {
        let reserved = state.reserve(200_000, &memory, || ROUND_TRIP);
        assert_eq!(reserved, Some(true));
        apply(state.next_window());
        state.unreserve(200_000);
        state.release(200_000);
        let granted = apply(state.next_window());
        // The second term is what was granted while the share grew.
        assert!(
            granted <= 2 * (state.share.bytes() + BASE_WINDOW),
            "{granted} bytes granted"
        );
    }
}

#[test]
fn reads_use_up_what_is_withheld() {
    let memory = MemoryLimit::new(64 << 20);
    let mut state = state(&memory);
    state.reserve(200_000, &memory, || ROUND_TRIP);
    state.unreserve(200_000);
    state.release(200_000);
    let window = state.next_window();
    add(&mut state, 200_000, &memory);
    state.release(200_000);
    assert!(state.next_window() >= window + 200_000);
}

#[test]
fn only_unused_shares_are_parked() {
    let memory = MemoryLimit::new(64 << 20);
    let mut state = state(&memory);
    add(&mut state, 1 << 20, &memory);
    let share = state.share.bytes();
    state.park_unused();
    assert_eq!(state.share.parked(), 0, "in memory");
    state.release(1 << 20);
    state.park_unused();
    assert_eq!(state.share.parked(), 0, "10 MiB a second");
    let long_ago = Instant::now().checked_sub(IDLE_TIME * 2).unwrap();
    state.recent_use.last = long_ago;
    state.park_unused();
    assert_eq!(state.share.parked(), share - MIN_SHARE);
    assert_eq!(memory.room(), 32 << 20);
}

#[test]
fn a_trickle_keeps_no_share() {
    let memory = MemoryLimit::new(64 << 20);
    let mut state = state(&memory);
    add(&mut state, 1 << 20, &memory);
    state.release(1 << 20);
    // A byte now and then, through several periods.
    for _ in 0..3 {
        state.recent_use.since -= IDLE_TIME;
        add(&mut state, 1, &memory);
        state.release(1);
    }
    state.park_unused();
    assert!(state.share.grown() < 100, "{}", state.share.grown());
}
