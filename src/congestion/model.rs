//! What the controller knows of the path: rates, round-trip times and loss, each a round at a time.
//!
//! A round is a flight: it ends when something sent after its beginning is acknowledged (draft-ietf-ccwg-bbr, "Tracking
//! Round Trips"). Rates are in bytes a second, times in seconds, amounts in bytes.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Rounds whose highest delivery rate counts as the path's. BBR keeps the highest of two probe cycles; that is how long
/// flows that share a link would take to give up what they once had.
const RATE_ROUNDS: usize = 4;
/// For how long the highest rate of all bounds how far this flow gives way.
const PEAK_TIME: Duration = Duration::from_secs(10);
/// For how long the least round-trip time is remembered. BBR has 10 s; here each cycle drains the queue it has built,
/// and a longer memory tells apart what others keep there.
const LEAST_TIME: Duration = Duration::from_secs(30);
/// What a round without a queue weighs in the mean of the random loss.
const LEARN: f64 = 3.0;
/// A packet counts as lost so long after its sending, in round-trip times: `TIME_THRESHOLD` of the endpoint.
const DETECTION: f64 = 1.25;
/// The highest loss that is made up for. At 50 % a path carries little anyway.
const MAX_LOSS: f64 = 0.5;
/// The least queue that is aimed for, in seconds of the path's rate: what a scheduler is late by.
const MIN_MARGIN: f64 = 0.001;
/// The least queue that is aimed for, in packets.
const MIN_MARGIN_PACKETS: f64 = 3.0;
/// Shorter round-trip times count as this, in seconds: on a busy machine processes come to their turn by milliseconds, and
/// a window for the wire alone, of some packets, would make a loopback crawl. 5 ms of queue is what a LAN bears; where it
/// does not, an overflow shrinks it together with the margin.
const LOCAL: f64 = 0.005;
/// What a queue is told from the noise of schedulers by, in seconds: on a path, and on a local one.
const NOISE: (f64, f64) = (0.001, 0.010);
/// Packets whose mean round-trip time can be believed. With fewer, jitter makes a base that no later mean reaches.
const SAMPLES: u32 = 8;
/// A round whose mean round-trip time is within these of the least had no queue worth the name: a part of the least, and
/// seconds.
const QUIET: (f64, f64) = (0.1, 0.002);

/// What came of one round.
#[derive(Debug, Clone)]
pub(super) struct Round {
    pub(super) began: Instant,
    pub(super) acked: u64,
    pub(super) lost: u64,
    pub(super) app_limited: bool,
    rtt_sum: f64,
    rtt_count: u32,
    /// When the last acknowledgement but one came, and what was acknowledged by then.
    before_last: Option<(Instant, u64)>,
    last: Option<(Instant, u64)>,
}

impl Round {
    pub(super) fn new(began: Instant) -> Self {
        Self {
            began,
            acked: 0,
            lost: 0,
            app_limited: false,
            rtt_sum: 0.0,
            rtt_count: 0,
            before_last: None,
            last: None,
        }
    }

    pub(super) fn ack(&mut self, bytes: u64, rtt: f64, app_limited: bool) {
        self.acked += bytes;
        self.rtt_sum += rtt;
        self.rtt_count += 1;
        self.app_limited |= app_limited;
    }

    pub(super) fn end_acks(&mut self, now: Instant) {
        self.before_last = self.last.replace((now, self.acked));
    }

    /// Delivery rate and mean round-trip time; `None` when too little came. `shrunk` leaves the acknowledgement that ended
    /// the round out: it is of what was sent in this round, and a window that became smaller has kept it back.
    pub(super) fn sample(&self, shrunk: bool) -> Option<(f64, f64)> {
        let (until, acked) = self.before_last.filter(|_| shrunk).or(self.last)?;
        let took = until.saturating_duration_since(self.began).as_secs_f64();
        (self.rtt_count > 0 && took > 0.0).then(|| {
            (
                acked as f64 / took,
                self.rtt_sum / f64::from(self.rtt_count),
            )
        })
    }

    /// The part that was lost.
    pub(super) fn loss(&self) -> f64 {
        self.lost as f64 / (self.lost + self.acked).max(1) as f64
    }
}

/// The extreme of what came within some time.
#[derive(Debug, Clone)]
struct Extreme {
    /// Of two values, whether the first stays the extreme although the second came later.
    beats: fn(f64, f64) -> bool,
    kept: VecDeque<(Instant, f64)>,
}

impl Extreme {
    fn new(beats: fn(f64, f64) -> bool) -> Self {
        Self {
            beats,
            kept: VecDeque::new(),
        }
    }

    fn note(&mut self, now: Instant, value: f64, time: Duration) {
        while self
            .kept
            .back()
            .is_some_and(|(_, older)| !(self.beats)(*older, value))
        {
            self.kept.pop_back();
        }
        self.kept.push_back((now, value));
        self.forget(now, time);
    }

    fn forget(&mut self, now: Instant, time: Duration) {
        while self
            .kept
            .front()
            .is_some_and(|(at, _)| now.saturating_duration_since(*at) > time)
        {
            self.kept.pop_front();
        }
    }

    fn get(&self) -> Option<f64> {
        self.kept.front().map(|(_, value)| *value)
    }
}

/// The path as it seems.
#[derive(Debug, Clone)]
pub(super) struct Path {
    pub(super) mtu: u64,
    rates: VecDeque<f64>,
    peaks: Extreme,
    means: Extreme,
    /// Whether the means are of `SAMPLES` packets or more.
    sampled: bool,
    /// The round-trip time that counts as the path's own.
    base: f64,
    /// Loss of late, of whatever cause.
    loss: f64,
    /// Loss when there was no queue, and the least round-trip time when it was learned.
    random_loss: f64,
    learned_at: f64,
    /// The part of the usual margin that the queue has room for.
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
            learned_at: 0.0,
            margin_part: 1.0,
        }
    }

    /// The rate that the path delivers.
    pub(super) fn rate(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    /// The least round mean of the round-trip time. Means, since the least single one tells more of jitter than of the
    /// path.
    pub(super) fn least(&self) -> f64 {
        self.means
            .get()
            .map_or(f64::INFINITY, |least| least.max(self.local()))
    }

    /// The round-trip time that counts as the path's own, in seconds; infinite before the first.
    pub(super) fn base(&self) -> f64 {
        self.base.max(self.local())
    }

    pub(super) fn set_base(&mut self, base: f64) {
        self.base = base;
    }

    fn local(&self) -> f64 {
        LOCAL * self.margin_part
    }

    /// Whether the path is so short that delays tell more of the machines than of it.
    pub(super) fn is_local(&self) -> bool {
        self.base < LOCAL
    }

    /// Less delay than this, in seconds, is nobody's queue.
    pub(super) fn noise(&self) -> f64 {
        if self.is_local() { NOISE.1 } else { NOISE.0 }
    }

    /// What the path itself holds.
    pub(super) fn bdp(&self) -> f64 {
        if self.base.is_finite() {
            self.rate() * self.base()
        } else {
            0.0
        }
    }

    /// What the path would hold without anybody's queue.
    pub(super) fn least_bdp(&self) -> f64 {
        if self.base.is_finite() {
            self.rate() * self.base().min(self.least())
        } else {
            0.0
        }
    }

    /// Less than this is not kept in flight for others' sake: half of what the best rate of late needs.
    pub(super) fn floor(&self) -> f64 {
        if self.base.is_finite() {
            self.peaks.get().unwrap_or(0.0) / 2.0 * self.base().min(self.least())
        } else {
            0.0
        }
    }

    /// What is kept in the queue, so that the link never runs dry: the root of what it holds, in packets. As flows that
    /// share a queue see the same delay, a concave margin leads them to equal rates (as in FAST TCP, Wei et al. 2006).
    pub(super) fn margin(&self) -> f64 {
        let root = (self.bdp() * self.mtu as f64).sqrt();
        self.margin_part
            * root
                .max(self.rate() * MIN_MARGIN)
                .max(MIN_MARGIN_PACKETS * self.mtu as f64)
    }

    /// The delay that the margin makes.
    pub(super) fn margin_delay(&self) -> f64 {
        self.margin() / self.rate().max(1.0)
    }

    /// What must be in flight for so much to be in the network and to arrive. Of what is sent, the part p is lost, and is
    /// in flight for `DETECTION` round trips; the rest is for one.
    pub(super) fn in_flight(&self, network: f64) -> f64 {
        let p = self.loss.min(2.0 * self.random_loss + 0.01).min(MAX_LOSS);
        network * (1.0 + p * (DETECTION - 1.0)) / (1.0 - p)
    }

    /// Learns from a round. `patient`, among others, keeps the least round-trip time for longer and the base as it is;
    /// `unhurried` says that the packets were sent when they should have made no queue.
    pub(super) fn learn(
        &mut self,
        now: Instant,
        round: &Round,
        (rate, mean): (f64, f64),
        patient: bool,
        unhurried: Option<f64>,
    ) {
        if round.rtt_count >= SAMPLES || !self.sampled {
            if round.rtt_count >= SAMPLES && !self.sampled {
                self.means.kept.clear();
                self.base = f64::INFINITY;
                self.sampled = true;
            }
            self.means
                .note(now, mean, if patient { 2 * LEAST_TIME } else { LEAST_TIME });
            if !patient {
                self.base = self.base.min(mean);
            }
        }
        if !round.app_limited || rate > self.rate() {
            self.note_rate(now, rate);
        }
        self.peaks.forget(now, PEAK_TIME);
        self.loss += (round.loss() - self.loss) / 8.0;
        if mean < self.learned_at * (1.0 - QUIET.0) - QUIET.1 {
            // There had been a queue all the time, so what was lost then was an overflow.
            self.random_loss = 0.0;
            self.learned_at = 0.0;
        }
        if let Some(most) = unhurried
            && mean < self.least() * (1.0 + QUIET.0) + QUIET.1
        {
            self.random_loss += (round.loss().min(most) - self.random_loss) / LEARN;
            self.learned_at = self.least();
        }
    }

    pub(super) fn note_rate(&mut self, now: Instant, rate: f64) {
        self.peaks.note(now, rate, PEAK_TIME);
        self.rates.push_back(rate);
        if self.rates.len() > RATE_ROUNDS {
            self.rates.pop_front();
        }
    }

    /// Whether more was lost in a round than chance explains: three standard deviations, a packet, and half a per cent.
    pub(super) fn is_excess(&self, round: &Round) -> bool {
        let packets = (round.acked + round.lost) as f64 / self.mtu as f64;
        let expected = self.random_loss * packets;
        round.lost as f64 / self.mtu as f64
            > expected + 3.0 * expected.sqrt() + 1.0 + 0.005 * packets
    }

    /// The part that was lost beyond what is random.
    pub(super) fn excess_loss(&self, round: &Round) -> f64 {
        (round.loss() - self.random_loss).max(0.0)
    }

    /// What was taken for random loss was an overflow.
    pub(super) fn doubt_loss(&mut self) {
        self.random_loss /= 2.0;
    }

    /// The rate has fallen to this.
    pub(super) fn replace_rate(&mut self, now: Instant, rate: f64) {
        self.forget_rates();
        self.note_rate(now, rate);
    }

    /// The path has another round-trip time now.
    pub(super) fn replace_base(&mut self, now: Instant, mean: f64) {
        self.means.kept.clear();
        self.means.note(now, mean, LEAST_TIME);
        self.base = mean;
    }

    /// Forgets all rates.
    pub(super) fn forget_rates(&mut self) {
        self.rates.clear();
        self.peaks.kept.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extreme_is_the_least_of_its_time_and_no_older() {
        let start = Instant::now();
        let time = Duration::from_secs(10);
        let mut least = Extreme::new(|older, newer| older < newer);
        for (second, value) in [(0, 5.0), (1, 3.0), (2, 4.0), (12, 6.0)] {
            least.note(start + Duration::from_secs(second), value, time);
        }
        assert_eq!(least.get(), Some(4.0));
        least.forget(start + Duration::from_secs(13), time);
        assert_eq!(least.get(), Some(6.0));
    }

    #[test]
    fn lost_packets_are_made_up_for_within_what_random_loss_explains() {
        let mut path = Path::new(1500);
        assert_eq!(path.in_flight(1000.0), 1000.0);
        path.loss = 0.2;
        // Nothing was lost without a queue: only one per cent is believed.
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
