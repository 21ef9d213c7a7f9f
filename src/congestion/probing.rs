//! The probing cycle: Up asks the path for more, and Down shows the queue that remains.

use std::time::{Duration, Instant};

use super::model::Path;
use super::round::RoundSample;

/// Factor of bytes in flight in Up, as in BBR.
const UP_GAIN: f64 = 1.25;
/// Its lower bound, where Up only overflows a buffer.
const MIN_UP_GAIN: f64 = 1.06;
/// Shortest time between deep Downs.
const DEEP_DOWN_INTERVAL: Duration = Duration::from_secs(3);
/// Window of a Down, as a part of the previous one, at which an unchanged round-trip time proves a longer path.
const DEEP_WINDOW_PART: f64 = 0.6;

/// The state of Up.
#[derive(Debug, Clone)]
pub(super) struct Up {
    pub(super) gain: f64,
    /// The rate before this phase.
    pub(super) rate_before: f64,
}

impl Up {
    pub(super) fn new() -> Self {
        Self {
            gain: UP_GAIN,
            rate_before: 0.0,
        }
    }

    /// Evaluates an Up, and adapts the gain of the next one. `base` is the round-trip time without a queue of other
    /// flows, `mean_before` the mean before the Up. Returns whether more bytes in flight increased the rate and made
    /// no queue, so that there may be even more.
    pub(super) fn evaluate(
        &mut self,
        path: &mut Path,
        sample: RoundSample,
        excess: bool,
        base: f64,
        mean_before: f64,
    ) -> bool {
        let RoundSample { rate, mean } = sample;
        let gain = self.gain - 1.0;
        if excess {
            let third = gain / 3.0;
            if rate < self.rate_before * (1.0 + third) && mean < mean_before + third * path.base() {
                path.doubt_loss();
            }
            self.gain = (1.0 + gain / 2.0).max(MIN_UP_GAIN);
        } else {
            self.gain = (1.0 + gain * 1.5).min(UP_GAIN);
        }
        rate > self.rate_before * (1.0 + gain / 2.0)
            && mean - base < base * 0.2 + 2.0 * path.noise()
    }
}

/// The state of Down.
#[derive(Debug, Clone, Default)]
pub(super) struct Down {
    pub(super) deep: bool,
    /// The window before this phase.
    pub(super) window_before: f64,
    /// The mean round-trip time before this phase.
    pub(super) mean_before: f64,
    /// The window in this phase.
    pub(super) window: f64,
    /// The fallen rate that started this phase.
    pub(super) fallen_rate: Option<f64>,
    last_deep: Option<Instant>,
}

/// What a Down has shown.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum DownFinding {
    /// Far fewer bytes in flight and an unchanged delay: there is no queue, the path has become longer.
    LongerPath,
    /// The delay has not changed, and only a deeper Down can tell why.
    Unclear,
    /// The queue in seconds that remained.
    Queue(f64),
}

impl Down {
    /// Evaluates a Down from its mean round-trip time. `overflowed` says that a buffer has overflowed recently.
    pub(super) fn evaluate(
        &mut self,
        now: Instant,
        path: &Path,
        mean: f64,
        overflowed: bool,
    ) -> DownFinding {
        let min_rtt = path.min_rtt();
        let queue = mean - min_rtt;
        let same = (mean - self.mean_before).abs() < mean * 0.01 + path.noise() / 3.0;
        if same && queue > min_rtt * 0.15 + path.noise() {
            if self.window <= DEEP_WINDOW_PART * self.window_before && !overflowed {
                return DownFinding::LongerPath;
            }
            if self
                .last_deep
                .is_none_or(|at| now - at > DEEP_DOWN_INTERVAL)
            {
                self.last_deep = Some(now);
                self.deep = true;
                return DownFinding::Unclear;
            }
        }
        DownFinding::Queue(queue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::congestion::round::Round;

    /// A path of 1 MB/s and this round-trip time in seconds.
    fn path(now: Instant, rtt: f64) -> Path {
        let mut path = Path::new(1_200);
        let mut round = Round::new(now);
        for _ in 0..10 {
            round.ack(1_200, rtt, false);
        }
        let sample = RoundSample {
            rate: 1e6,
            mean: rtt,
        };
        path.learn(now, &round, sample, false, None);
        path
    }

    #[test]
    fn an_up_that_brings_a_higher_rate_finds_room() {
        let mut path = path(Instant::now(), 0.1);
        let mut up = Up::new();
        up.rate_before = 1e6;
        let more = RoundSample {
            rate: 1.2e6,
            mean: 0.1,
        };
        assert!(up.evaluate(&mut path, more, false, 0.1, 0.1));
        let queue = RoundSample { mean: 0.15, ..more };
        assert!(!up.evaluate(&mut path, queue, false, 0.1, 0.1));
        let same = RoundSample { rate: 1e6, ..more };
        assert!(!up.evaluate(&mut path, same, false, 0.1, 0.1));
    }

    #[test]
    fn an_overflow_makes_the_next_up_smaller_down_to_a_bound() {
        let mut path = path(Instant::now(), 0.1);
        let mut up = Up::new();
        up.rate_before = 1e6;
        let sample = RoundSample {
            rate: 1e6,
            mean: 0.1,
        };
        up.evaluate(&mut path, sample, true, 0.1, 0.1);
        assert_eq!(up.gain, 1.125);
        up.evaluate(&mut path, sample, true, 0.1, 0.1);
        up.evaluate(&mut path, sample, true, 0.1, 0.1);
        assert_eq!(up.gain, MIN_UP_GAIN);
        for _ in 0..10 {
            up.evaluate(&mut path, sample, false, 0.1, 0.1);
        }
        assert_eq!(up.gain, UP_GAIN);
    }

    #[test]
    fn an_unchanged_delay_is_looked_at_with_a_deeper_down() {
        let now = Instant::now();
        let path = path(now, 0.1);
        let mut down = Down {
            window_before: 100_000.0,
            mean_before: 0.2,
            window: 93_000.0,
            ..Down::default()
        };
        assert_eq!(down.evaluate(now, &path, 0.2, false), DownFinding::Unclear);
        assert!(down.deep);
        // A deep Down is not repeated at once.
        assert_eq!(
            down.evaluate(now, &path, 0.2, false),
            DownFinding::Queue(0.1)
        );
        down.window = 50_000.0;
        assert_eq!(
            down.evaluate(now, &path, 0.2, false),
            DownFinding::LongerPath
        );
        // After overflows there was a queue.
        assert_eq!(
            down.evaluate(now, &path, 0.2, true),
            DownFinding::Queue(0.1)
        );
    }

    #[test]
    fn a_shorter_delay_in_down_shows_the_queue_that_remains() {
        let now = Instant::now();
        let mut down = Down {
            window_before: 100_000.0,
            mean_before: 0.2,
            window: 93_000.0,
            ..Down::default()
        };
        let finding = down.evaluate(now, &path(now, 0.1), 0.1, false);
        assert_eq!(finding, DownFinding::Queue(0.0));
    }
}
