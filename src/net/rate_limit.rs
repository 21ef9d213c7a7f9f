//! Rate limits: a token bucket that decides when bytes may be sent, in the order of arrival.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};

use crate::protocol::rate::Rate;

/// Time that one block takes at the rate: the granularity of the limit.
const BLOCK_INTERVAL: Duration = Duration::from_millis(5);
/// Bytes that may be sent at once after a pause, as time; makes up for late timers (tokio's tick is 1 ms).
const BURST_INTERVAL: Duration = Duration::from_millis(10);
/// Smallest block in bytes: splitting packets has no effect.
const MIN_BLOCK_SIZE: usize = 1_200;
/// Largest block in bytes: the size of one read.
const MAX_BLOCK_SIZE: usize = 256 << 10;

/// A token bucket that its users share. Each takes one block in turn, in the order of arrival.
///
/// In any time *t*, at most *rate* x (*t* + 10 ms) and one [`block`](Self::block) pass.
#[derive(Debug)]
pub struct TokenBucket {
    rate: Rate,
    /// When the tokens taken so far are refilled. tokio's mutex is fair, and a task that waits for tokens holds it.
    refilled_at: Mutex<Instant>,
}

impl TokenBucket {
    /// Creates a full bucket.
    pub fn new(rate: Rate) -> Self {
        Self {
            rate,
            refilled_at: Mutex::new(Instant::now()),
        }
    }

    /// The rate.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Most bytes to take at once, so that the flow is smooth.
    pub fn block(&self) -> usize {
        let bytes = self.rate.bytes() as f64 * BLOCK_INTERVAL.as_secs_f64();
        (bytes as usize).clamp(MIN_BLOCK_SIZE, MAX_BLOCK_SIZE)
    }

    /// Waits until this many bytes may be sent. Cancelling takes nothing.
    pub async fn take(&self, bytes: usize) {
        let mut refilled_at = self.refilled_at.lock().await;
        sleep_until(*refilled_at).await;
        let since = Instant::now()
            .checked_sub(BURST_INTERVAL)
            .map_or(*refilled_at, |earliest| earliest.max(*refilled_at));
        *refilled_at = since + Duration::from_secs_f64(bytes as f64 / self.rate.bytes() as f64);
    }
}

/// The limits that a sender obeys: that of its process, and that of the peer that asked it to send.
#[derive(Debug, Clone, Default)]
pub struct RateLimits(Vec<Arc<TokenBucket>>);

impl RateLimits {
    /// Creates the limit of a process; without a rate, all bytes pass.
    pub fn new(rate: Option<Rate>) -> Self {
        let bucket = rate.map(|rate| Arc::new(TokenBucket::new(rate)));
        Self(bucket.into_iter().collect())
    }

    /// Adds the limit of a peer. It comes first, so that waiting for it does not delay the other users of these limits.
    pub fn preceded_by(&self, rate: Option<Rate>) -> Self {
        let mut limits = Self::new(rate);
        limits.0.extend(self.0.iter().cloned());
        limits
    }

    /// The lowest rate.
    pub fn rate(&self) -> Option<Rate> {
        self.0.iter().map(|bucket| bucket.rate()).min()
    }

    /// Most bytes to take at once; see [`TokenBucket::block`].
    pub fn block(&self) -> usize {
        self.0
            .iter()
            .map(|bucket| bucket.block())
            .min()
            .unwrap_or(usize::MAX)
    }

    /// Waits until this many bytes may be sent; see [`TokenBucket::take`].
    pub async fn take(&self, bytes: usize) {
        for bucket in &self.0 {
            bucket.take(bytes).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn bucket(bytes: u64) -> Arc<TokenBucket> {
        Arc::new(TokenBucket::new(Rate::from_bytes(bytes).unwrap()))
    }

    #[test]
    fn block_size_follows_the_rate() {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(async {
                assert_eq!(bucket(8_000).block(), MIN_BLOCK_SIZE);
                assert_eq!(bucket(2_500_000).block(), 12_500);
                assert_eq!(bucket(1_250_000_000).block(), MAX_BLOCK_SIZE);
            });
    }

    #[tokio::test(start_paused = true)]
    async fn ten_takers_together_keep_the_rate_in_every_second() {
        for rate in [8_000, 2_500_000, 125_000_000] {
            let bucket = bucket(rate);
            let taken = Arc::new(AtomicU64::new(0));
            let takers: Vec<_> = (0..10)
                .map(|_| {
                    let bucket = bucket.clone();
                    let taken = taken.clone();
                    tokio::spawn(async move {
                        loop {
                            bucket.take(bucket.block()).await;
                            taken.fetch_add(bucket.block() as u64, Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            let mut before = 0;
            for second in 1..=20 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let now = taken.load(Ordering::Relaxed);
                let slack = rate / 50 + 2 * bucket.block() as u64;
                assert!(
                    (now - before).abs_diff(rate) <= slack,
                    "{} in second {second} at {rate}",
                    now - before
                );
                before = now;
            }
            takers.iter().for_each(tokio::task::JoinHandle::abort);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_saves_up_no_more_than_a_burst() {
        let bucket = bucket(1_000_000);
        tokio::time::sleep(Duration::from_secs(3600)).await;
        let started = Instant::now();
        for _ in 0..200 {
            bucket.take(bucket.block()).await;
        }
        let min_time = Duration::from_secs(1) - BURST_INTERVAL - BLOCK_INTERVAL;
        assert!(
            started.elapsed() >= min_time,
            "a megabyte in {:?}",
            started.elapsed()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn takers_are_served_in_order_and_cancelled_ones_take_nothing() {
        let bucket = bucket(10_000);
        bucket.take(10_000).await;
        let order = Arc::new(std::sync::Mutex::new(Vec::new()));
        let mut takers: Vec<_> = (0..4)
            .map(|i| {
                let bucket = bucket.clone();
                let order = order.clone();
                tokio::spawn(async move {
                    bucket.take(5_000).await;
                    order.lock().unwrap().push(i);
                })
            })
            .collect();
        tokio::task::yield_now().await;
        takers.remove(1).abort();
        let started = Instant::now();
        for taker in takers {
            taker.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), [0, 2, 3]);
        assert!(
            started.elapsed() <= Duration::from_millis(2_050),
            "{:?}",
            started.elapsed()
        );
    }
}
