//! Evaluates the samples. Pure: all times are passed in.

use std::time::Duration;

use crate::protocol::Pong;

/// Samples kept of one load. At ten a second they cover more than the longest; further samples of a peer replace only
/// the last.
const MAX_SAMPLES: usize = 2_000;

/// The measured path between two ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Measurement {
    /// Round trips of small messages on the idle path.
    pub idle: RoundTrips,
    /// Median difference between one idle round trip and the next.
    pub jitter: Duration,
    /// From this end to the server, if it was measured.
    pub up: Option<Load>,
    /// From the server to this end, if it was measured.
    pub down: Option<Load>,
}

/// One direction under load.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    /// Bits a second that arrived in the second half of the time, when the sender had found the rate. Filler only:
    /// QUIC, UDP and IP headers are not counted.
    pub rate: f64,
    /// Bytes of filler that arrived.
    pub bytes: u64,
    /// The time they took, as the receiver saw it.
    pub time: Duration,
    /// Round trips under load: the sender's smoothed estimate, sampled ten times a second.
    pub rtt: RoundTrips,
    /// Packets that the sender sent.
    pub packets_sent: u64,
    /// Packets of these that the sender found lost.
    pub packets_lost: u64,
}

impl Load {
    /// Returns the part of the packets that was lost, 0 to 1.
    pub fn loss(&self) -> f64 {
        if self.packets_sent == 0 {
            0.0
        } else {
            (self.packets_lost as f64 / self.packets_sent as f64).min(1.0)
        }
    }
}

/// Round-trip times.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoundTrips {
    /// The number of samples.
    pub count: usize,
    /// The shortest.
    pub min: Duration,
    /// The median.
    pub median: Duration,
    /// The 95th percentile.
    pub p95: Duration,
}

impl RoundTrips {
    pub(super) fn of(trips: &[Duration]) -> Self {
        let mut sorted = trips.to_vec();
        sorted.sort();
        // The nearest rank: a time that was measured.
        let rank = |percent: usize| {
            sorted
                .get((sorted.len() * percent).div_ceil(100).max(1) - 1)
                .copied()
        };
        let at = |percent| rank(percent).unwrap_or_default();
        Self {
            count: sorted.len(),
            min: at(0),
            median: at(50),
            p95: at(95),
        }
    }
}

/// Returns the median difference, so that one packet that was lost and sent again does not decide.
pub(super) fn jitter(trips: &[Duration]) -> Duration {
    let differences: Vec<_> = trips
        .windows(2)
        .map(|pair| pair[0].abs_diff(pair[1]))
        .collect();
    RoundTrips::of(&differences).median
}

/// Bytes that had arrived, by time.
#[derive(Debug, Default)]
pub(super) struct Samples(Vec<(Duration, u64)>);

impl Samples {
    /// Adds a sample of running totals. A peer's may be invalid: totals that do not ascend count as unchanged.
    pub(super) fn push(&mut self, elapsed: Duration, bytes: u64) {
        let (last, before) = self.0.last().copied().unwrap_or_default();
        if self.0.len() >= MAX_SAMPLES {
            self.0.pop();
        }
        self.0.push((elapsed.max(last), bytes.max(before)));
    }

    /// Returns bits a second over the second half of the time.
    fn rate(&self) -> f64 {
        let (end, total) = self.0.last().copied().unwrap_or_default();
        let half = self.0.iter().rev().find(|(elapsed, _)| *elapsed <= end / 2);
        let (begin, before) = half.copied().unwrap_or_default();
        let seconds = (end - begin).as_secs_f64();
        if seconds > 0.0 {
            (total - before) as f64 * 8.0 / seconds
        } else {
            0.0
        }
    }

    /// Summarizes a load; the counters are the sender's, before and after.
    pub(super) fn load(&self, trips: &[Duration], before: &Pong, after: &Pong) -> Load {
        let (time, bytes) = self.0.last().copied().unwrap_or_default();
        let last = [Duration::from_micros(after.rtt)];
        Load {
            rate: self.rate(),
            bytes,
            time,
            rtt: RoundTrips::of(if trips.is_empty() { &last } else { trips }),
            packets_sent: after.packets_sent.saturating_sub(before.packets_sent),
            packets_lost: after.packets_lost.saturating_sub(before.packets_lost),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn pong(packets_sent: u64, packets_lost: u64, rtt: u64) -> Pong {
        Pong {
            id: 0,
            packets_sent,
            packets_lost,
            rtt,
        }
    }

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let trips: Vec<_> = (1..=20).rev().map(ms).collect();
        let expected = RoundTrips {
            count: 20,
            min: ms(1),
            median: ms(10),
            p95: ms(19),
        };
        assert_eq!(RoundTrips::of(&trips), expected);
        assert_eq!(
            RoundTrips::of(&[ms(7)]),
            RoundTrips {
                count: 1,
                min: ms(7),
                median: ms(7),
                p95: ms(7)
            }
        );
        assert_eq!(RoundTrips::of(&[]), RoundTrips::default());
    }

    #[test]
    fn one_lost_packet_does_not_change_jitter() {
        assert_eq!(
            jitter(&[
                ms(100),
                ms(102),
                ms(100),
                ms(350),
                ms(101),
                ms(103),
                ms(101)
            ]),
            ms(2)
        );
        assert_eq!(jitter(&[ms(100)]), Duration::ZERO);
    }

    #[test]
    fn the_rate_is_measured_over_the_second_half() {
        let mut samples = Samples::default();
        for (time, bytes) in [
            (0, 0),
            (500, 1_000),
            (1000, 10_000),
            (1500, 60_000),
            (2000, 110_000),
        ] {
            samples.push(ms(time), bytes);
        }
        let load = samples.load(&[ms(12)], &pong(10, 1, 0), &pong(110, 3, 0));
        assert_eq!(
            (load.rate, load.bytes, load.time),
            (800_000.0, 110_000, ms(2000))
        );
        assert_eq!(
            (load.packets_sent, load.packets_lost, load.loss()),
            (100, 2, 0.02)
        );
    }

    #[test]
    fn invalid_figures_of_a_peer_are_harmless() {
        let mut samples = Samples::default();
        for i in 0..3 * MAX_SAMPLES as u64 {
            samples.push(
                Duration::from_micros(u64::MAX - i),
                if i % 2 == 0 { u64::MAX } else { 0 },
            );
        }
        assert_eq!(samples.0.len(), MAX_SAMPLES);
        let load = samples.load(&[], &pong(9, 9, 9), &pong(0, u64::MAX, u64::MAX));
        assert!(load.rate.is_finite() && load.rate >= 0.0, "{load:?}");
        assert_eq!(load.loss(), 0.0, "more lost than sent");
        assert_eq!(
            Samples::default()
                .load(&[], &pong(0, 0, 5), &pong(0, 0, 5))
                .rate,
            0.0
        );
    }
}
