//! Samples the stages of open transfers, to find the [bottleneck](crate::transfer::bottleneck).

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use quinn::{Connection, ConnectionStats};

use crate::protocol::SenderTime;
use crate::transfer::bottleneck::{PathStats, TimeBreakdown, Usage};

/// Time between two samples. A session of the minimum length for a verdict (1 s) has fifty.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(20);

/// The stage of a transfer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stage {
    /// The file is being read.
    Reading,
    /// The transfer waits for the rate limit.
    Limited,
    /// The data is being written to the connection.
    Writing,
    /// Everything is written, and the peer has not acknowledged all of it.
    UnderWay,
    /// The peer has acknowledged everything, and the receipt has not arrived.
    Committing,
}

const STAGES: usize = 5;

/// The number of transfers of a session in each stage.
#[derive(Debug, Default)]
pub struct StageCounters([AtomicUsize; STAGES]);

/// Counts a transfer in its stage until dropped.
pub(crate) struct InStage<'a>(&'a AtomicUsize);

impl Drop for InStage<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl StageCounters {
    /// Counts one more transfer in a stage.
    pub(crate) fn at(&self, stage: Stage) -> InStage<'_> {
        let count = &self.0[stage as usize];
        count.fetch_add(1, Ordering::Relaxed);
        InStage(count)
    }
}

/// Samples a session from its start.
pub(crate) struct Sampler {
    connection: Connection,
    counters: Arc<StageCounters>,
    started_at: Instant,
    sampled_at: Instant,
    cpu: Usage,
    first_stats: ConnectionStats,
    last_stats: ConnectionStats,
    times: TimeBreakdown,
    round_trips: Duration,
    samples: u32,
}

impl Sampler {
    /// Starts sampling now.
    pub(crate) async fn begin(connection: Connection, counters: Arc<StageCounters>) -> Self {
        let cpu = usage().await;
        let now = Instant::now();
        let stats = connection.stats();
        Self {
            connection,
            counters,
            started_at: now,
            sampled_at: now,
            cpu,
            first_stats: stats,
            last_stats: stats,
            times: TimeBreakdown::default(),
            round_trips: Duration::ZERO,
            samples: 0,
        }
    }

    /// Returns the measurements so far, in the form that the receiver gets.
    pub(crate) fn sender_time(&mut self) -> SenderTime {
        self.tick();
        let elapsed = self.started_at.elapsed();
        self.path_stats(elapsed).sender_time(&self.times)
    }

    /// Takes one sample.
    pub(crate) fn tick(&mut self) {
        let now = Instant::now();
        self.sample(now - self.sampled_at);
        self.sampled_at = now;
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
        self.last_stats = stats;
        self.round_trips += stats.path.rtt;
        self.samples += 1;
        let counts = self
            .counters
            .0
            .each_ref()
            .map(|count| count.load(Ordering::Relaxed));
        self.times.add(time, counts);
    }

    /// Stops sampling, and returns all measurements.
    pub(crate) async fn end(mut self, held_up: Option<Duration>) -> (PathStats, TimeBreakdown) {
        let now = Instant::now();
        let cpu = usage().await;
        self.sample(now - self.sampled_at);
        self.times.elapsed = now - self.started_at;
        self.times.held_up = held_up;
        self.times.cpu = cpu.since(&self.cpu);
        (self.path_stats(self.times.elapsed), self.times)
    }

    fn path_stats(&self, elapsed: Duration) -> PathStats {
        let first_stats = &self.first_stats;
        let last_stats = &self.last_stats;
        let mut path = PathStats::default();
        path.rtt = self.round_trips / self.samples.max(1);
        path.min_rtt = last_stats.path.min_rtt;
        let since = |count: fn(&ConnectionStats) -> u64| {
            count(last_stats).saturating_sub(count(first_stats))
        };
        path.sent_packets = since(|stats| stats.path.sent_packets);
        path.lost_packets = since(|stats| stats.path.lost_packets);
        path.sent_bytes = since(|stats| stats.udp_tx.bytes);
        path.lost_bytes = since(|stats| stats.path.lost_bytes);
        path.received_bytes = since(|stats| stats.udp_rx.bytes);
        path.congestion_events = since(|stats| stats.path.congestion_events);
        path.black_holes = since(|stats| stats.path.black_holes_detected);
        path.window = last_stats.path.cwnd;
        path.mtu = last_stats.path.current_mtu;
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
    /// Divides a time span among the stages, in proportion to the number of transfers in each.
    fn add(&mut self, time: Duration, counts: [usize; STAGES]) {
        let all: usize = counts.iter().sum();
        let share = |stage: Stage| time.mul_f64(counts[stage as usize] as f64 / all.max(1) as f64);
        self.reading += share(Stage::Reading);
        self.limited += share(Stage::Limited);
        self.network += share(Stage::Writing) + share(Stage::UnderWay);
        self.committing += share(Stage::Committing);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_divided_by_the_stages_of_transfers() {
        let counters = StageCounters::default();
        let mut times = TimeBreakdown::default();
        let counts = || {
            counters
                .0
                .each_ref()
                .map(|count| count.load(Ordering::Relaxed))
        };
        let second = Duration::from_secs(1);
        times.add(second, counts());
        assert_eq!(
            times,
            TimeBreakdown::default(),
            "no transfer was in any stage"
        );
        let reading = counters.at(Stage::Reading);
        let committing: Vec<_> = (0..3).map(|_| counters.at(Stage::Committing)).collect();
        times.add(second, counts());
        assert_eq!(
            (times.reading, times.committing),
            (second / 4, second * 3 / 4)
        );
        drop((reading, committing));
        let _network = (counters.at(Stage::Writing), counters.at(Stage::UnderWay));
        times.add(second, counts());
        assert_eq!((times.reading, times.network), (second / 4, second));
    }
}
