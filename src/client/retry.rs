//! How long and how often another connection is tried for a session that has lost its own.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::text::PeerText;
use crate::error::{Code, Error, Result};

/// Bound of the first wait. A server that is started anew is back within a second or two.
const FIRST_INTERVAL: Duration = Duration::from_millis(500);
/// Bound of any wait: so long a link that is back may stay unused.
const MAX_INTERVAL: Duration = Duration::from_secs(15);

/// The attempts since a session came further last.
pub(super) struct Retry {
    limit: Duration,
    /// When the connection was lost over which the session came further last.
    since: Instant,
    attempt: u32,
    /// The sender's measure of how far the session came.
    progress: u64,
}

impl Retry {
    /// For a session whose first connection has just been lost.
    pub(super) fn new(limit: Duration, progress: u64) -> Self {
        Self {
            limit,
            since: Instant::now(),
            attempt: 0,
            progress,
        }
    }

    /// Another connection was lost. One over which the session came further begins time and waits anew; one that comes
    /// about and moves nothing does not.
    pub(super) fn lost(&mut self, progress: u64) {
        if progress > self.progress {
            *self = Self::new(self.limit, progress);
        }
    }

    /// How long to wait before the next attempt, and its number; `None` when the time is up.
    pub(super) fn next(&mut self) -> Result<Option<(u32, Duration)>> {
        let left = self.limit.saturating_sub(self.since.elapsed());
        if left.is_zero() {
            return Ok(None);
        }
        self.attempt += 1;
        // The last attempt begins at the end at the latest.
        Ok(Some((
            self.attempt,
            backoff(self.attempt, random()?).min(left),
        )))
    }
}

/// "Full jitter": anything between nothing and a bound that doubles, so that the clients of a server that was restarted do
/// not come back in waves (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
fn backoff(attempt: u32, random: f64) -> Duration {
    let doubled = 2_u32
        .checked_pow(attempt.saturating_sub(1))
        .and_then(|times| FIRST_INTERVAL.checked_mul(times));
    doubled
        .map_or(MAX_INTERVAL, |bound| bound.min(MAX_INTERVAL))
        .mul_f64(random)
}

/// At least 0, below 1.
fn random() -> Result<f64> {
    let mut bytes = [0; 4];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Error::Usage("the system gives no random numbers".into()))?;
    Ok(f64::from(u32::from_le_bytes(bytes)) / (f64::from(u32::MAX) + 1.0))
}

/// Whether another connection may do better. What a server decides of a client is final, and so is what it breaks.
pub(super) fn passes(error: &Error) -> bool {
    match error {
        Error::Lost(_)
        | Error::Stopping
        | Error::Resolve { .. }
        | Error::Unreachable { .. }
        | Error::Io { .. } => true,
        Error::Refused(why) => matches!(why.code, Code::Busy | Code::TimedOut),
        _ => false,
    }
}

/// What a loss is called in the middle of a sentence.
pub(super) fn reason(error: &Error) -> PeerText {
    match error {
        Error::Lost(why) => why.clone(),
        Error::Stopping => "the server is stopping".into(),
        other => other.to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_a_bound_and_differ() {
        assert_eq!(backoff(1, 0.0), Duration::ZERO);
        let longest: Vec<_> = [1, 2, 3, 6, 7, 1000]
            .iter()
            .map(|&n| backoff(n, 1.0).as_millis())
            .collect();
        assert_eq!(longest, [500, 1000, 2000, 15_000, 15_000, 15_000]);
        assert_eq!(backoff(3, 0.25), Duration::from_millis(500));
        assert_ne!(random().unwrap(), random().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_runs_from_the_last_loss_that_moved_something() {
        let mut retry = Retry::new(Duration::from_secs(60), 7);
        assert_eq!(retry.next().unwrap().unwrap().0, 1);
        tokio::time::advance(Duration::from_secs(59)).await;
        retry.lost(7);
        let (attempt, wait) = retry.next().unwrap().unwrap();
        assert_eq!(attempt, 2);
        assert!(wait <= Duration::from_secs(1), "there is a last attempt");
        retry.lost(8);
        tokio::time::advance(Duration::from_secs(59)).await;
        assert_eq!(retry.next().unwrap().unwrap().0, 1, "it came further");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(retry.next().unwrap().is_none());
    }
}
