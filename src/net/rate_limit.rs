//! The token bucket behind a limit: what may be written now, and who is next.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};

use crate::protocol::rate::Rate;

/// What a block takes at the limit: so fine is its rate cut.
const BLOCK_TIME: Duration = Duration::from_millis(5);
/// What may go out at once after a pause: it makes up for timers that are late (tokio's tick is 1 ms).
const BURST_TIME: Duration = Duration::from_millis(10);
/// The smallest block in bytes: less than a packet cuts nothing finer.
const MIN_BLOCK: usize = 1_200;
/// The largest block in bytes: what is read at a time.
const MAX_BLOCK: usize = 256 << 10;

/// Bytes at a [`Rate`], for whoever shares the bucket: each in turn takes a block, in the order they came.
///
/// Over any time *t* no more than *rate* x (*t* + 10 ms) and one [`block`](Self::block) pass.
#[derive(Debug)]
pub struct TokenBucket {
    rate: Rate,
    /// When what was taken so far is paid for. tokio's mutex is fair, and whoever waits for tokens holds it.
    paid: Mutex<Instant>,
}

impl TokenBucket {
    /// A full bucket.
    pub fn new(rate: Rate) -> Self {
        Self {
            rate,
            paid: Mutex::new(Instant::now()),
        }
    }

    /// Its rate.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Most bytes that should be taken at once, so that it flows.
    pub fn block(&self) -> usize {
        let bytes = self.rate.bytes() as f64 * BLOCK_TIME.as_secs_f64();
        (bytes as usize).clamp(MIN_BLOCK, MAX_BLOCK)
    }

    /// Waits until so many bytes may go out. Cancelling it takes nothing.
    pub async fn take(&self, bytes: usize) {
        let mut paid = self.paid.lock().await;
        sleep_until(*paid).await;
        let since = Instant::now()
            .checked_sub(BURST_TIME)
            .map_or(*paid, |earliest| earliest.max(*paid));
        *paid = since + Duration::from_secs_f64(bytes as f64 / self.rate.bytes() as f64);
    }
}

/// The limits that a sender obeys: that of its process, and that of whoever asked it to send.
#[derive(Debug, Clone, Default)]
pub struct RateLimits(Vec<Arc<TokenBucket>>);

impl RateLimits {
    /// Limits that all hold; none at all let everything pass.
    pub fn new(buckets: impl IntoIterator<Item = Arc<TokenBucket>>) -> Self {
        Self(buckets.into_iter().collect())
    }

    /// The lowest of them.
    pub fn rate(&self) -> Option<Rate> {
        self.0.iter().map(|bucket| bucket.rate()).min()
    }

    /// Most bytes to take at once, as [`TokenBucket::block`].
    pub fn block(&self) -> usize {
        self.0
            .iter()
            .map(|bucket| bucket.block())
            .min()
            .unwrap_or(usize::MAX)
    }

    /// Waits until so many bytes may go out, as [`TokenBucket::take`].
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
    fn blocks_are_as_fine_as_the_rate_asks_for() {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(async {
                assert_eq!(bucket(8_000).block(), MIN_BLOCK);
                assert_eq!(bucket(2_500_000).block(), 12_500);
                assert_eq!(bucket(1_250_000_000).block(), MAX_BLOCK);
            });
    }

    #[tokio::test(start_paused = true)]
    async fn every_second_holds_the_rate_whoever_takes() {
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
        let begun = Instant::now();
        for _ in 0..200 {
            bucket.take(bucket.block()).await;
        }
        let least = Duration::from_secs(1) - BURST_TIME - BLOCK_TIME;
        assert!(
            begun.elapsed() >= least,
            "a megabyte in {:?}",
            begun.elapsed()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn takers_come_in_turn_and_one_that_leaves_takes_nothing() {
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
        let begun = Instant::now();
        for taker in takers {
            taker.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), [0, 2, 3]);
        assert!(
            begun.elapsed() <= Duration::from_millis(2_050),
            "{:?}",
            begun.elapsed()
        );
    }
}
