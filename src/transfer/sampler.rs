//! Counts where open transfers stand, and samples it, for the [verdict](crate::transfer::bottleneck).

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use quinn::{Connection, ConnectionStats};

use crate::protocol::SenderTime;
use crate::transfer::bottleneck::{PathStats, TimeBreakdown, Usage};

/// Time between two samples. A session that is long enough for a verdict has fifty.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(20);

/// Where a transfer stands.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stage {
    /// Its file is read.
    Reading,
    /// It waits for the limit.
    Limited,
    /// The connection takes what was read.
    Writing,
    /// All is written, and the peer does not have all of it yet.
    UnderWay,
    /// The peer has all of it; the receipt is not there.
    Committing,
}

const STAGES: usize = 5;

/// How many transfers of a session stand where.
#[derive(Debug, Default)]
pub struct StageCounters([AtomicUsize; STAGES]);

/// A transfer stands there until this is dropped.
pub(crate) struct InStage<'a>(&'a AtomicUsize);

impl Drop for InStage<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl StageCounters {
    /// One more at a station.
    pub(crate) fn at(&self, station: Stage) -> InStage<'_> {
        let count = &self.0[station as usize];
        count.fetch_add(1, Ordering::Relaxed);
        InStage(count)
    }
}

/// Watches a session from its begin.
pub(crate) struct Sampler {
    connection: Connection,
    meter: Arc<StageCounters>,
    begun: Instant,
    sampled: Instant,
    cpu: Usage,
    before: ConnectionStats,
    last: ConnectionStats,
    account: TimeBreakdown,
    round_trips: Duration,
    samples: u32,
}

impl Sampler {
    /// Begins now.
    pub(crate) async fn begin(connection: Connection, meter: Arc<StageCounters>) -> Self {
        let cpu = usage().await;
        let now = Instant::now();
        let stats = connection.stats();
        Self {
            connection,
            meter,
            begun: now,
            sampled: now,
            cpu,
            before: stats,
            last: stats,
            account: TimeBreakdown::default(),
            round_trips: Duration::ZERO,
            samples: 0,
        }
    }

    /// What was seen so far, for the receiver.
    pub(crate) fn spent(&mut self) -> SenderTime {
        self.tick();
        let elapsed = self.begun.elapsed();
        self.path(elapsed).spent(&self.account)
    }

    pub(crate) fn tick(&mut self) {
        let now = Instant::now();
        self.sample(now - self.sampled);
        self.sampled = now;
    }

    /// Samples until it is cancelled.
    pub(crate) async fn run(&mut self) -> Infallible {
        loop {
            tokio::time::sleep(SAMPLE_INTERVAL).await;
            self.tick();
        }
    }

    fn sample(&mut self, time: Duration) {
        let stats = self.connection.stats();
        self.last = stats;
        self.round_trips += stats.path.rtt;
        self.samples += 1;
        let counts = self
            .meter
            .0
            .each_ref()
            .map(|count| count.load(Ordering::Relaxed));
        self.account.add(time, counts);
    }

    /// What was seen.
    pub(crate) async fn end(mut self, held_up: Option<Duration>) -> (PathStats, TimeBreakdown) {
        let now = Instant::now();
        let cpu = usage().await;
        self.sample(now - self.sampled);
        self.account.elapsed = now - self.begun;
        self.account.held_up = held_up;
        self.account.cpu = cpu.since(&self.cpu);
        (self.path(self.account.elapsed), self.account)
    }

    fn path(&self, elapsed: Duration) -> PathStats {
        let before = &self.before;
        let after = &self.last;
        let mut path = PathStats::default();
        path.rtt = self.round_trips / self.samples.max(1);
        path.min_rtt = after.path.min_rtt;
        path.sent_packets = after
            .path
            .sent_packets
            .saturating_sub(before.path.sent_packets);
        path.lost_packets = after
            .path
            .lost_packets
            .saturating_sub(before.path.lost_packets);
        path.sent_bytes = after.udp_tx.bytes.saturating_sub(before.udp_tx.bytes);
        path.lost_bytes = after.path.lost_bytes.saturating_sub(before.path.lost_bytes);
        path.received_bytes = after.udp_rx.bytes.saturating_sub(before.udp_rx.bytes);
        path.congestion_events = after
            .path
            .congestion_events
            .saturating_sub(before.path.congestion_events);
        path.black_holes = after
            .path
            .black_holes_detected
            .saturating_sub(before.path.black_holes_detected);
        path.window = after.path.cwnd;
        path.mtu = after.path.current_mtu;
        let seconds = elapsed.as_secs_f64().max(f64::EPSILON);
        path.rate = (path.sent_bytes.saturating_sub(path.lost_bytes) as f64 / seconds) as u64;
        path
    }
}

async fn usage() -> Usage {
    tokio::task::spawn_blocking(Usage::now)
        .await
        .unwrap_or_else(|_| Usage::now())
}

impl TimeBreakdown {
    /// Shares a stretch of time out by how many transfers stood where.
    fn add(&mut self, time: Duration, counts: [usize; STAGES]) {
        let all: usize = counts.iter().sum();
        let part =
            |station: Stage| time.mul_f64(counts[station as usize] as f64 / all.max(1) as f64);
        self.reading += part(Stage::Reading);
        self.limited += part(Stage::Limited);
        self.network += part(Stage::Writing) + part(Stage::UnderWay);
        self.committing += part(Stage::Committing);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_shared_out_by_where_transfers_stand() {
        let meter = StageCounters::default();
        let mut account = TimeBreakdown::default();
        let counts = || {
            meter
                .0
                .each_ref()
                .map(|count| count.load(Ordering::Relaxed))
        };
        let second = Duration::from_secs(1);
        account.add(second, counts());
        assert_eq!(account, TimeBreakdown::default(), "nobody stood anywhere");
        let reading = meter.at(Stage::Reading);
        let committing: Vec<_> = (0..3).map(|_| meter.at(Stage::Committing)).collect();
        account.add(second, counts());
        assert_eq!(
            (account.reading, account.committing),
            (second / 4, second * 3 / 4)
        );
        drop((reading, committing));
        let _network = (meter.at(Stage::Writing), meter.at(Stage::UnderWay));
        account.add(second, counts());
        assert_eq!((account.reading, account.network), (second / 4, second));
    }
}
