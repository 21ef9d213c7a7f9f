//! The controller's model of the path: rates, round-trip times and loss, learned from rounds.
//!
//! Rates are in bytes a second, times in seconds, amounts in bytes.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::round::{Round, RoundSample};

/// Rounds whose highest delivery rate counts as the path's. BBR takes the highest of two probe cycles; flows that
/// share a link would take as long to give up what they had.
const RATE_ROUNDS: usize = 4;
/// Time for which the highest rate limits how far this flow yields.
const PEAK_RATE_MEMORY: Duration = Duration::from_secs(10);
/// Time for which the least round-trip time is remembered. BBR has 10 s; here each cycle drains its own queue, and a
/// longer memory reveals the queue that other flows keep.
const MIN_RTT_MEMORY: Duration = Duration::from_secs(30);
/// Divisor of the weight that a round without a queue has in the mean of the random loss.
const LEARNING_DIVISOR: f64 = 3.0;
/// Round-trip times after which a packet counts as lost: `TIME_THRESHOLD` of the endpoint.
const DETECTION: f64 = 1.25;
/// Highest loss that is compensated. At 50 % a path carries little anyway.
const MAX_LOSS: f64 = 0.5;
/// Smallest intended queue, in seconds at the path's rate: the delay of a scheduler.
const MIN_MARGIN: f64 = 0.001;
/// Smallest intended queue, in packets.
const MIN_MARGIN_PACKETS: f64 = 3.0;
/// Smallest round-trip time in seconds; shorter ones count as this. A busy machine schedules processes with
/// milliseconds of delay, and a window for the wire alone, of some packets, would make loopback crawl. A LAN
/// tolerates 5 ms of queue; where it does not, an overflow shrinks this together with the margin.
const RTT_FLOOR: f64 = 0.005;
/// Delay in seconds that is scheduling noise and no queue.
const NOISE: f64 = 0.001;
/// The same on a local path.
const LOCAL_NOISE: f64 = 0.010;
/// Packets whose mean round-trip time is reliable. With fewer, jitter makes a base that no later mean reaches.
const MIN_SAMPLES: u32 = 8;
/// A round had no relevant queue if its mean round-trip time exceeds the least one by less than this part of it and
/// [`QUIET_DELAY`].
const QUIET_PART: f64 = 0.1;
/// Seconds that are added to [`QUIET_PART`].
const QUIET_DELAY: f64 = 0.002;

/// The extreme of the values within some time.
#[derive(Debug, Clone)]
struct Extreme {
    /// Whether the first value remains the extreme although the second is newer.
    beats: fn(f64, f64) -> bool,
    values: VecDeque<(Instant, f64)>,
}

impl Extreme {
    fn new(beats: fn(f64, f64) -> bool) -> Self {
        Self {
            beats,
            values: VecDeque::new(),
        }
    }

    fn note(&mut self, now: Instant, value: f64, time: Duration) {
        while self
            .values
            .back()
            .is_some_and(|(_, older)| !(self.beats)(*older, value))
        {
            self.values.pop_back();
        }
        self.values.push_back((now, value));
        self.forget(now, time);
    }

    fn forget(&mut self, now: Instant, time: Duration) {
        while self
            .values
            .front()
            .is_some_and(|(at, _)| now.saturating_duration_since(*at) > time)
        {
            self.values.pop_front();
        }
    }

    fn get(&self) -> Option<f64> {
        self.values.front().map(|(_, value)| *value)
    }
}

/// The estimated path.
#[derive(Debug, Clone)]
pub(super) struct Path {
    pub(super) mtu: u64,
    rates: VecDeque<f64>,
    peaks: Extreme,
    means: Extreme,
    /// Whether the means are of `MIN_SAMPLES` packets or more.
    sampled: bool,
    /// The path's own round-trip time.
    base: f64,
    /// Recent loss of any cause.
    loss: f64,
    /// Loss while there was no queue.
    random_loss: f64,
    /// The least round-trip time when `random_loss` was learned.
    learned_at_rtt: f64,
    /// Part of the usual margin for which the queue has room.
    pub(super) margin_part: f64,
}

impl Path {
    pub(super) fn new(mtu: u16) -> Self {
        Self {
            mtu: u64::from(mtu),
            rates: VecDeque::new(),
            peaks: Extreme::new(|older, newer| older > newer),
            means: Extreme::new(|older, newer| older < newer),
            sampled: false,
            base: f64::INFINITY,
            loss: 0.0,
            random_loss: 0.0,
            learned_at_rtt: 0.0,
            margin_part: 1.0,
        }
    }

    /// The rate that the path delivers.
    pub(super) fn rate(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    /// The least mean round-trip time of a round. The smallest single sample depends on jitter more than on the path.
    pub(super) fn min_rtt(&self) -> f64 {
        self.means
            .get()
            .map_or(f64::INFINITY, |min| min.max(self.rtt_floor()))
    }

    /// The path's own round-trip time in seconds; infinite before the first round.
    pub(super) fn base(&self) -> f64 {
        self.base.max(self.rtt_floor())
    }

    pub(super) fn set_base(&mut self, base: f64) {
        self.base = base;
    }

    fn rtt_floor(&self) -> f64 {
        RTT_FLOOR * self.margin_part
    }

    /// Whether the path is so short that delays depend on the machines more than on it.
    pub(super) fn is_local(&self) -> bool {
        self.base < RTT_FLOOR
    }

    /// Delay in seconds below which no queue is assumed.
    pub(super) fn noise(&self) -> f64 {
        if self.is_local() { LOCAL_NOISE } else { NOISE }
    }

    /// The bandwidth-delay product.
    pub(super) fn bdp(&self) -> f64 {
        if self.base.is_finite() {
            self.rate() * self.base()
        } else {
            0.0
        }
    }

    /// The bandwidth-delay product without any queue.
    pub(super) fn min_bdp(&self) -> f64 {
        if self.base.is_finite() {
            self.rate() * self.base().min(self.min_rtt())
        } else {
            0.0
        }
    }

    /// The window that this flow never yields: half of what the best recent rate needs.
    pub(super) fn min_flight(&self) -> f64 {
        if self.base.is_finite() {
            self.peaks.get().unwrap_or(0.0) / 2.0 * self.base().min(self.min_rtt())
        } else {
            0.0
        }
    }

    /// Bytes to keep in the queue, so that the link never idles: the root of the bandwidth-delay product, in packets.
    /// Flows that share a queue see the same delay, so a concave margin leads them to equal rates (as in FAST TCP,
    /// Wei et al. 2006).
    pub(super) fn margin(&self) -> f64 {
        let root = (self.bdp() * self.mtu as f64).sqrt();
        self.margin_part
            * root
                .max(self.rate() * MIN_MARGIN)
                .max(MIN_MARGIN_PACKETS * self.mtu as f64)
    }

    /// The delay that the margin causes.
    pub(super) fn margin_delay(&self) -> f64 {
        self.margin() / self.rate().max(1.0)
    }

    /// Bytes that must be in flight for `network` bytes to arrive. The part p of what is sent is lost, and counts as
    /// in flight for `DETECTION` round trips; the rest for one.
    pub(super) fn in_flight(&self, network: f64) -> f64 {
        let p = self.loss.min(2.0 * self.random_loss + 0.01).min(MAX_LOSS);
        network * (1.0 + p * (DETECTION - 1.0)) / (1.0 - p)
    }

    /// Updates the model from a round. Among other flows, `patient` keeps the least round-trip time for longer and
    /// leaves the base. `loss_limit` is set when the packets should have made no queue: the most of the round's loss
    /// that counts as random.
    pub(super) fn learn(
        &mut self,
        now: Instant,
        round: &Round,
        sample: RoundSample,
        patient: bool,
        loss_limit: Option<f64>,
    ) {
        let RoundSample { rate, mean } = sample;
        if round.rtt_count >= MIN_SAMPLES || !self.sampled {
            if round.rtt_count >= MIN_SAMPLES && !self.sampled {
                self.means.values.clear();
                self.base = f64::INFINITY;
                self.sampled = true;
            }
            self.means.note(
                now,
                mean,
                if patient {
                    2 * MIN_RTT_MEMORY
                } else {
                    MIN_RTT_MEMORY
                },
            );
            if !patient {
                self.base = self.base.min(mean);
            }
        }
        if !round.app_limited || rate > self.rate() {
            self.note_rate(now, rate);
        }
        self.peaks.forget(now, PEAK_RATE_MEMORY);
        self.loss += (round.loss() - self.loss) / 8.0;
        if mean < self.learned_at_rtt * (1.0 - QUIET_PART) - QUIET_DELAY {
            // There was a queue all the time, so the losses were overflows.
            self.random_loss = 0.0;
            self.learned_at_rtt = 0.0;
        }
        if let Some(limit) = loss_limit
            && mean < self.min_rtt() * (1.0 + QUIET_PART) + QUIET_DELAY
        {
            self.random_loss += (round.loss().min(limit) - self.random_loss) / LEARNING_DIVISOR;
            self.learned_at_rtt = self.min_rtt();
        }
    }

    pub(super) fn note_rate(&mut self, now: Instant, rate: f64) {
        self.peaks.note(now, rate, PEAK_RATE_MEMORY);
        self.rates.push_back(rate);
        if self.rates.len() > RATE_ROUNDS {
            self.rates.pop_front();
        }
    }

    /// Whether a round lost more than chance explains: three standard deviations, a packet, and half a per cent.
    pub(super) fn is_excess(&self, round: &Round) -> bool {
        let packets = (round.acked + round.lost) as f64 / self.mtu as f64;
        let expected = self.random_loss * packets;
        round.lost as f64 / self.mtu as f64
            > expected + 3.0 * expected.sqrt() + 1.0 + 0.005 * packets
    }

    /// The part that was lost beyond random loss.
    pub(super) fn excess_loss(&self, round: &Round) -> f64 {
        (round.loss() - self.random_loss).max(0.0)
    }

    /// Halves the random loss, which was partly an overflow.
    pub(super) fn doubt_loss(&mut self) {
        self.random_loss /= 2.0;
    }

    /// Replaces all rates by a fallen one.
    pub(super) fn replace_rate(&mut self, now: Instant, rate: f64) {
        self.forget_rates();
        self.note_rate(now, rate);
    }

    /// Replaces the round-trip time of a path that has changed.
    pub(super) fn replace_base(&mut self, now: Instant, mean: f64) {
        self.means.values.clear();
        self.means.note(now, mean, MIN_RTT_MEMORY);
        self.base = mean;
    }

    /// Forgets all rates.
    pub(super) fn forget_rates(&mut self) {
        self.rates.clear();
        self.peaks.values.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_values_leave_the_extreme() {
        let start = Instant::now();
        let time = Duration::from_secs(10);
        let mut minimum = Extreme::new(|older, newer| older < newer);
        for (second, value) in [(0, 5.0), (1, 3.0), (2, 4.0), (12, 6.0)] {
            minimum.note(start + Duration::from_secs(second), value, time);
        }
        assert_eq!(minimum.get(), Some(4.0));
        minimum.forget(start + Duration::from_secs(13), time);
        assert_eq!(minimum.get(), Some(6.0));
    }

    #[test]
    fn only_random_loss_is_compensated() {
        let mut path = Path::new(1500);
        assert_eq!(path.in_flight(1000.0), 1000.0);
        path.loss = 0.2;
        // Without loss outside of queues, only one per cent is believed.
        assert!(
            (path.in_flight(1000.0) - 1012.6).abs() < 0.1,
            "{}",
            path.in_flight(1000.0)
        );
        path.random_loss = 0.2;
        assert_eq!(path.in_flight(1000.0), 1312.5);
        path.loss = 0.9;
        path.random_loss = 0.9;
        assert!(path.in_flight(1000.0) < 2500.0);
    }
}
