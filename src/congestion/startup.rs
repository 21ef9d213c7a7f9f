//! Startup: the window grows exponentially until the rate follows no longer, or until a queue forms.

use super::model::Path;

/// Initial rate on a long path in bytes a second, 5 Mbit/s. With a satellite's 600 ms that saves three round trips of
/// Startup; at 100 ms it is 53 packets.
const INITIAL_RATE: f64 = 640_000.0;
/// Largest initial window in packets, for any path.
const MAX_INITIAL_PACKETS: u64 = 512;
/// Growth of the rate in a round below which Startup ends (draft-ietf-ccwg-bbr), twice in a row.
const STARTUP_GROWTH: f64 = 1.25;
/// Rounds without that growth that end Startup.
const STARTUP_ROUNDS: u32 = 2;
/// Queue in seconds at which Startup ends, or an eighth of the round-trip time if that is longer (RFC 9406, section
/// 4.2; its upper bound of 16 ms is what one window of bursts makes on a satellite path).
const MIN_STARTUP_QUEUE: f64 = 0.004;
/// Part of the window that Startup ends with. Half was in flight a round trip ago and made a queue; the effect of the
/// whole is not known yet.
const STARTUP_PART: f64 = 0.6;

/// The state of Startup.
#[derive(Debug, Clone, Default)]
pub(super) struct Startup {
    /// Whether the path's loss is still unknown.
    pub(super) first: bool,
    /// The loss of the previous round.
    pub(super) loss: f64,
    rate: f64,
    rounds_without_growth: u32,
}

impl Startup {
    /// The first Startup of a path.
    pub(super) fn first() -> Self {
        Self {
            first: true,
            ..Self::default()
        }
    }

    /// A Startup of a path that has delivered this rate.
    pub(super) fn from_rate(rate: f64) -> Self {
        Self {
            rate,
            ..Self::default()
        }
    }

    /// Records a round. Returns whether the path is full: its rate has stopped growing.
    pub(super) fn end_round(&mut self, rate: f64, excess: bool) -> bool {
        if rate > self.rate * STARTUP_GROWTH {
            self.rate = rate;
            self.rounds_without_growth = 0;
        } else {
            self.rounds_without_growth += 1;
        }
        self.rounds_without_growth >= STARTUP_ROUNDS || (excess && self.rounds_without_growth > 0)
    }

    /// Returns the window after an acknowledged packet. Startup grows it as long as the rate follows.
    pub(super) fn grow(
        &self,
        window: f64,
        path: &Path,
        bytes: u64,
        rtt: f64,
        app_limited: bool,
    ) -> f64 {
        if self.rounds_without_growth > 0 {
            return window;
        }
        let grown = if app_limited {
            window
        } else {
            window + bytes as f64
        };
        if !self.first {
            return grown;
        }
        let limit = (MAX_INITIAL_PACKETS * path.mtu) as f64;
        grown.max((INITIAL_RATE * rtt).min(limit))
    }

    /// Returns whether Startup fills a queue. `recent_rtt` is the round-trip time of the last packets.
    pub(super) fn is_filling(&self, path: &Path, recent_rtt: f64) -> bool {
        let queue = (path.base() / 8.0).max(MIN_STARTUP_QUEUE);
        self.rate > 0.0 && path.base().is_finite() && recent_rtt > path.base() + queue
    }

    /// Returns the rate of a path whose queue this window fills.
    pub(super) fn rate_of(window: f64, recent_rtt: f64) -> f64 {
        window * STARTUP_PART / recent_rtt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_rounds_without_growth_end_startup() {
        let mut startup = Startup::first();
        assert!(!startup.end_round(1_000.0, false), "the rate grew");
        assert!(!startup.end_round(1_200.0, false), "one round without");
        assert!(!startup.end_round(2_000.0, true), "it grew again");
        assert!(!startup.end_round(2_100.0, false));
        assert!(startup.end_round(2_100.0, false));
    }

    #[test]
    fn excess_loss_without_growth_ends_startup_at_once() {
        let mut startup = Startup::from_rate(1_000.0);
        assert!(startup.end_round(1_100.0, true));
    }

    #[test]
    fn the_window_grows_only_while_the_rate_follows() {
        let path = Path::new(1_000);
        let mut startup = Startup::from_rate(1_000.0);
        assert_eq!(startup.grow(5_000.0, &path, 1_000, 0.1, false), 6_000.0);
        assert_eq!(startup.grow(5_000.0, &path, 1_000, 0.1, true), 5_000.0);
        startup.end_round(1_000.0, false);
        assert_eq!(startup.grow(5_000.0, &path, 1_000, 0.1, false), 5_000.0);
    }

    #[test]
    fn a_long_path_starts_with_a_larger_window() {
        let path = Path::new(1_000);
        let startup = Startup::first();
        assert_eq!(startup.grow(32_000.0, &path, 1_000, 0.6, true), 384_000.0);
        assert_eq!(startup.grow(32_000.0, &path, 1_000, 9.0, true), 512_000.0);
        assert_eq!(startup.grow(32_000.0, &path, 1_000, 0.01, true), 32_000.0);
    }
}
