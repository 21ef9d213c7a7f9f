//! When a session that has lost its connection tries another one, and for how long.

use std::time::Duration;

use tokio::time::Instant;

use crate::auth::random::random;
use crate::error::text::PeerText;
use crate::error::{Code, Error, Result};

/// Upper bound of the first wait. A restarted server is back within a second or two.
const FIRST_INTERVAL: Duration = Duration::from_millis(500);
/// Upper bound of any wait: a network that works again stays unused for no longer.
const MAX_INTERVAL: Duration = Duration::from_secs(15);

/// The attempts since the last progress of a session.
pub(super) struct Retry {
    limit: Duration,
    /// When the last connection with progress was lost.
    since: Instant,
    attempt: u32,
    /// The session's progress at that time.
    progress: u64,
}

impl Retry {
    /// Starts for a session whose first connection was just lost.
    pub(super) fn new(limit: Duration, progress: u64) -> Self {
        Self {
            limit,
            since: Instant::now(),
            attempt: 0,
            progress,
        }
    }

    /// Records the loss of another connection. Time and waits start again if that connection made progress.
    pub(super) fn on_loss(&mut self, progress: u64) {
        if progress > self.progress {
            *self = Self::new(self.limit, progress);
        }
    }

    /// The number of the next attempt and the wait before it; `None` when the time is up.
    pub(super) fn next(&mut self) -> Result<Option<(u32, Duration)>> {
        let left = self.limit.saturating_sub(self.since.elapsed());
        if left.is_zero() {
            return Ok(None);
        }
        self.attempt += 1;
        // The last attempt begins no later than the time limit.
        Ok(Some((
            self.attempt,
            backoff(self.attempt, random_fraction()?).min(left),
        )))
    }
}

/// Random wait between zero and a bound that doubles ("full jitter"), so that the clients of a restarted server do not come back
/// in waves (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
fn backoff(attempt: u32, random: f64) -> Duration {
    let doubled = 2_u32
        .checked_pow(attempt.saturating_sub(1))
        .and_then(|times| FIRST_INTERVAL.checked_mul(times));
    doubled
        .map_or(MAX_INTERVAL, |bound| bound.min(MAX_INTERVAL))
        .mul_f64(random)
}

/// A random number, at least 0 and below 1.
fn random_fraction() -> Result<f64> {
    let number = u32::from_le_bytes(random()?);
    Ok(f64::from(number) / (f64::from(u32::MAX) + 1.0))
}

/// Whether another connection may help. A server's decisions and its protocol errors are final.
pub(super) fn is_temporary(error: &Error) -> bool {
    match error {
        Error::Lost(_)
        | Error::Stopping
        | Error::Resolve { .. }
        | Error::Unreachable { .. }
        | Error::Io { .. } => true,
        Error::Refused(reason) => matches!(reason.code, Code::Busy | Code::TimedOut),
        _ => false,
    }
}

/// The reason of a loss, for the middle of a sentence.
pub(super) fn loss_reason(error: &Error) -> PeerText {
    match error {
        Error::Lost(reason) => reason.clone(),
        Error::Stopping => "the server is stopping".into(),
        other => other.to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_random_below_a_doubling_bound() {
        assert_eq!(backoff(1, 0.0), Duration::ZERO);
        let longest: Vec<_> = [1, 2, 3, 6, 7, 1000]
            .iter()
            .map(|&n| backoff(n, 1.0).as_millis())
            .collect();
        assert_eq!(longest, [500, 1000, 2000, 15_000, 15_000, 15_000]);
        assert_eq!(backoff(3, 0.25), Duration::from_millis(500));
        assert_ne!(random_fraction().unwrap(), random_fraction().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_limit_runs_from_the_last_loss_with_progress() {
        let mut retry = Retry::new(Duration::from_secs(60), 7);
        assert_eq!(retry.next().unwrap().unwrap().0, 1);
        tokio::time::advance(Duration::from_secs(59)).await;
        retry.on_loss(7);
        let (attempt, wait) = retry.next().unwrap().unwrap();
        assert_eq!(attempt, 2);
        assert!(wait <= Duration::from_secs(1), "there is a last attempt");
        retry.on_loss(8);
        tokio::time::advance(Duration::from_secs(59)).await;
        assert_eq!(retry.next().unwrap().unwrap().0, 1, "there was progress");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(retry.next().unwrap().is_none());
    }
}
