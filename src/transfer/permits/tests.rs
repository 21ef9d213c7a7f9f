//! Fairness in virtual time: peers with many and few connections, slow and fast transfers.

use super::*;

/// One step of virtual time.
const STEP: Duration = Duration::from_millis(50);

fn peer(number: u64) -> Peer {
    let mut peer = [0; 32];
    peer[..8].copy_from_slice(&number.to_be_bytes());
    peer
}

/// Limits without a shortage of open files.
fn limits(permits: usize) -> TransferLimits {
    TransferLimits::for_large(permits, usize::MAX)
}

/// A transfer of the simulation.
struct Transfer {
    member: Member,
    /// When it got its permit, or its place in the queue.
    state: TransferState,
    /// Time with a permit so far.
    served: Duration,
    /// Longest wait for a permit.
    longest_wait: Duration,
}

enum TransferState {
    Holding(Duration),
    Waiting(Duration, oneshot::Receiver<()>),
}

/// A server in virtual time. Every transfer always has data.
struct Simulation {
    table: PermitTable,
    transfers: Vec<Transfer>,
    now: Duration,
}

impl Simulation {
    fn new(permits: usize) -> Self {
        Self {
            table: PermitTable::new(limits(permits)),
            transfers: Vec::new(),
            now: Duration::ZERO,
        }
    }

    /// Starts transfers of a new connection of the peer. Returns their indices.
    fn connect(&mut self, peer: Peer, transfers: usize) -> std::ops::Range<usize> {
        let connection = self.table.next_number();
        let first = self.transfers.len();
        for _ in 0..transfers {
            let member = Member { peer, connection };
            let state = self.wait(member, Purpose::Open);
            self.transfers.push(Transfer {
                member,
                state,
                served: Duration::ZERO,
                longest_wait: Duration::ZERO,
            });
        }
        first..self.transfers.len()
    }

    fn wait(&mut self, member: Member, purpose: Purpose) -> TransferState {
        let (grant, granted) = oneshot::channel();
        self.table.request(member, purpose, grant);
        TransferState::Waiting(self.now, granted)
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += STEP;
            for at in 0..self.transfers.len() {
                self.step(at);
            }
        }
    }

    fn step(&mut self, at: usize) {
        let now = self.now;
        let member = self.transfers[at].member;
        let transfer = &mut self.transfers[at];
        match &mut transfer.state {
            TransferState::Holding(since) => {
                transfer.served += STEP;
                if now - *since >= TIME_SLICE && self.table.is_due(member) {
                    self.table.release(member);
                    self.transfers[at].state = self.wait(member, Purpose::Resume);
                }
            }
            TransferState::Waiting(since, granted) => {
                transfer.longest_wait = transfer.longest_wait.max(now - *since);
                if granted.try_recv().is_ok() {
                    transfer.state = TransferState::Holding(now);
                }
            }
        }
    }

    fn served(&self, transfers: std::ops::Range<usize>) -> f64 {
        self.transfers[transfers]
            .iter()
            .map(|transfer| transfer.served.as_secs_f64())
            .sum()
    }

    fn longest_wait(&self, transfers: std::ops::Range<usize>) -> Duration {
        self.transfers[transfers]
            .iter()
            .map(|transfer| transfer.longest_wait)
            .max()
            .unwrap_or_default()
    }
}

/// Jain's fairness index: 1 if all are equal.
fn fairness(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    let squares: f64 = shares.iter().map(|share| share * share).sum();
    sum * sum / (shares.len() as f64 * squares)
}

#[test]
fn a_new_peer_waits_no_longer_than_a_time_slice() {
    let mut simulation = Simulation::new(100);
    for number in 0..7 {
        simulation.connect(peer(number), 20);
    }
    simulation.run(Duration::from_secs(10));
    let newcomer = simulation.connect(peer(99), 1);
    simulation.run(Duration::from_secs(5));
    assert!(simulation.longest_wait(newcomer.clone()) <= TIME_SLICE + STEP);
    assert!(simulation.served(newcomer) > 4.0, "it keeps what it got");
}

#[test]
fn connections_and_transfers_do_not_add_to_the_share_of_a_peer() {
    let mut simulation = Simulation::new(12);
    let greedy: Vec<_> = (0..30).map(|_| simulation.connect(peer(1), 30)).collect();
    let modest: Vec<_> = (2..5)
        .map(|number| simulation.connect(peer(number), 6))
        .collect();
    simulation.run(Duration::from_secs(60));
    let shares: Vec<f64> = std::iter::once(greedy.into_iter().map(|c| simulation.served(c)).sum())
        .chain(modest.into_iter().map(|c| simulation.served(c)))
        .collect();
    assert!(fairness(&shares) > 0.97, "{shares:?}");
}

#[test]
fn a_thousand_peers_take_turns() {
    for peers in [1, 10, 1_000] {
        let mut simulation = Simulation::new(100);
        let connections: Vec<_> = (0..peers)
            .map(|number| simulation.connect(peer(number), 3))
            .collect();
        simulation.run(Duration::from_secs(20));
        let shares: Vec<_> = connections
            .into_iter()
            .map(|connection| simulation.served(connection))
            .collect();
        assert!(
            fairness(&shares) > 0.95,
            "{peers} peers: {}",
            fairness(&shares)
        );
        let used: f64 = shares.iter().sum();
        let wanted = (peers as f64 * 3.0).min(100.0) * 20.0;
        assert!(
            used > 0.85 * wanted,
            "{peers} peers used {used} of {wanted} s"
        );
    }
}

#[test]
fn connections_of_one_peer_share_and_parked_transfers_come_first() {
    let mut simulation = Simulation::new(4);
    let first = simulation.connect(peer(1), 4);
    simulation.run(Duration::from_secs(1));
    let second = simulation.connect(peer(1), 4);
    simulation.run(Duration::from_secs(20));
    let ratio = simulation.served(first.clone()) / simulation.served(second);
    assert!((0.8..1.4).contains(&ratio), "{ratio}");
    let each: Vec<_> = first.map(|one| simulation.served(one..one + 1)).collect();
    assert!(fairness(&each) > 0.9, "all go on: {each:?}");
}

#[test]
fn permits_are_kept_while_nothing_waits() {
    let mut simulation = Simulation::new(5);
    let all = simulation.connect(peer(1), 5);
    simulation.run(Duration::from_secs(5));
    assert!(simulation.longest_wait(all.clone()) <= STEP);
    assert!(
        simulation.transfers[all]
            .iter()
            .all(|t| matches!(t.state, TransferState::Holding(_)))
    );
    assert_eq!(simulation.table.free, 0);
}

/// Opens transfers of a new connection and parks each at once, as long as the table grants them. Returns their number.
fn open_and_park(table: &mut PermitTable, peer: Peer) -> usize {
    let connection = table.next_number();
    let member = Member { peer, connection };
    let mut opened = 0;
    loop {
        let (grant, mut granted) = oneshot::channel();
        table.request(member, Purpose::Open, grant);
        if granted.try_recv().is_err() {
            return opened;
        }
        opened += 1;
        table.release(member);
    }
}

#[test]
fn a_peer_may_open_half_of_what_the_others_leave() {
    let mut table = PermitTable::new(limits(100));
    let opened: Vec<_> = (0..8)
        .map(|number| open_and_park(&mut table, peer(number)))
        .collect();
    assert_eq!(opened[..3], [800, 400, 200]);
    assert!(opened.iter().all(|&opened| opened > 0), "{opened:?}");
    assert_eq!(
        open_and_park(&mut table, peer(0)),
        0,
        "not by more connections"
    );
}

#[test]
fn both_kinds_together_have_no_more_permits_than_wanted() {
    for wanted in [1, 2, 3, 10] {
        let permits = TransferPermits::new(wanted);
        let large = free(&permits.large);
        let small = free(&permits.small);
        if wanted == 1 {
            assert!(Arc::ptr_eq(&permits.large, &permits.small));
            assert_eq!(large, 1);
        } else {
            assert_eq!(large + small, permits.total());
            assert!(large > 0 && small > 0 && permits.total() <= wanted);
        }
    }
    assert_eq!(TransferLimits::for_large(4, 12).open, 12, "open files");
}

/// Whether the future is still pending after one poll.
async fn is_pending<T>(future: &mut (impl Future<Output = T> + Unpin)) -> bool {
    tokio::select! {
        biased;
        _ = future => false,
        () = std::future::ready(()) => true,
    }
}

fn free(scheduler: &PermitScheduler) -> usize {
    scheduler.table().free
}

#[tokio::test]
async fn a_dropped_place_in_the_queue_takes_no_permit() {
    let scheduler = PermitScheduler::new(limits(1));
    let permits = scheduler.connection(peer(1));
    let held = permits.open().await;
    let mut waiting = Box::pin(permits.open());
    assert!(is_pending(&mut waiting).await);
    drop(held);
    // The grant was sent, but not taken.
    drop(waiting);
    assert_eq!(free(&scheduler), 1);
    let mut first = permits.open().await;
    first.park();
    let second = permits.open().await;
    let mut waiting = Box::pin(first.resume());
    assert!(is_pending(&mut waiting).await);
    drop(waiting);
    drop((first, second));
    assert_eq!(free(&scheduler), 1);
    assert!(
        scheduler.table().peers.is_empty(),
        "nothing is kept of a peer that left"
    );
}

#[tokio::test]
async fn a_permit_is_due_only_after_its_slice_and_for_a_better_right() {
    let scheduler = PermitScheduler::with_slice(limits(1), Duration::ZERO);
    let first = scheduler.connection(peer(1));
    let second = scheduler.connection(peer(2));
    let mut held = first.open().await;
    assert!(!held.is_due(), "nothing waits");
    let mut waiting = Box::pin(second.open());
    assert!(is_pending(&mut waiting).await);
    assert!(held.is_due());
    held.due().await;
    held.park();
    let other = waiting.await;
    let mut new = Box::pin(second.open());
    assert!(is_pending(&mut new).await);
    assert!(
        !other.is_due(),
        "a new transfer of the same connection has no better right"
    );
    let mut parked = Box::pin(held.resume());
    assert!(is_pending(&mut parked).await);
    assert!(other.is_due(), "the parked one of another peer has");
    let patient = PermitScheduler::new(limits(1));
    let held = patient.connection(peer(1)).open().await;
    let other = patient.connection(peer(2));
    let mut waiting = Box::pin(other.open());
    assert!(is_pending(&mut waiting).await);
    assert!(!held.is_due(), "its time slice has just begun");
}
