//! The measurements of one round, which is a flight: it ends when a packet sent after its start is acknowledged
//! (draft-ietf-ccwg-bbr, "Tracking Round Trips"). Rates are in bytes a second, times in seconds, amounts in bytes.

use std::time::Instant;

/// Measurements of one round.
#[derive(Debug, Clone)]
pub(super) struct Round {
    pub(super) began: Instant,
    pub(super) acked: u64,
    pub(super) lost: u64,
    pub(super) app_limited: bool,
    rtt_sum: f64,
    pub(super) rtt_count: u32,
    /// When the second-last ACK arrived, and the bytes acknowledged by then.
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

    /// Returns what the round has measured; `None` for too few ACKs. `shrunk` leaves out the ACK that ended the
    /// round: its packet was sent in this round, and delayed by a window that had become smaller.
    pub(super) fn sample(&self, shrunk: bool) -> Option<RoundSample> {
        let (until, acked) = self.before_last.filter(|_| shrunk).or(self.last)?;
        let took = until.saturating_duration_since(self.began).as_secs_f64();
        (self.rtt_count > 0 && took > 0.0).then(|| RoundSample {
            rate: acked as f64 / took,
            mean: self.rtt_sum / f64::from(self.rtt_count),
        })
    }

    /// The part of the bytes that was lost.
    pub(super) fn loss(&self) -> f64 {
        self.lost as f64 / (self.lost + self.acked).max(1) as f64
    }
}

/// What a round has measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct RoundSample {
    /// The delivery rate.
    pub(super) rate: f64,
    /// The mean round-trip time.
    pub(super) mean: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_sample_needs_an_acknowledged_packet_and_time() {
        let start = Instant::now();
        let mut round = Round::new(start);
        assert!(round.sample(false).is_none(), "nothing was acknowledged");
        round.ack(1_000, 0.1, false);
        round.end_acks(start);
        assert!(round.sample(false).is_none(), "no time has passed");
    }

    #[test]
    fn a_shrunk_window_leaves_out_the_last_ack() {
        let start = Instant::now();
        let mut round = Round::new(start);
        for second in [1, 2] {
            round.ack(1_000 * second, 0.1 * second as f64, false);
            round.end_acks(start + Duration::from_secs(second));
        }
        let whole = round.sample(false).unwrap();
        assert_eq!(whole.rate, 1_500.0);
        assert!((whole.mean - 0.15).abs() < 1e-9, "{whole:?}");
        assert_eq!(round.sample(true).unwrap().rate, 1_000.0);
    }
}
