//! Who is receiving what, over all connections of a process.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio_util::sync::CancellationToken;

use super::lock;
use crate::error::{Code, Result, Why};
use crate::path::RelativePath;

/// What is being received, by key and path (or session id). A newer session of the same key takes it over, since the older
/// one is most often dead and does not know it yet. Two keys do not disturb each other: the last commit wins whole.
#[derive(Debug)]
pub struct Claims<K: Eq + Hash + Clone = RelativePath> {
    holders: Mutex<HashMap<Key<K>, Arc<Holder>>>,
    ages: AtomicU64,
}

type Key<K> = ([u8; 32], K);

impl<K: Eq + Hash + Clone> Default for Claims<K> {
    fn default() -> Self {
        Self {
            holders: Mutex::default(),
            ages: AtomicU64::new(0),
        }
    }
}

#[derive(Debug)]
struct Holder {
    age: u64,
    superseded: CancellationToken,
    gone: CancellationToken,
}

/// The right to receive something; given up when dropped, so it must outlive all disk work on it.
pub(crate) struct Claimed<K: Eq + Hash + Clone = RelativePath> {
    claims: Arc<Claims<K>>,
    key: Key<K>,
    holder: Arc<Holder>,
}

impl<K: Eq + Hash + Clone + Send + 'static> Claims<K> {
    /// The age of a session that begins now: the newer, the higher.
    pub(crate) fn age(&self) -> u64 {
        self.ages.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes something for a session of this age; an older one that has it is told, and has let go of it when this returns.
    /// A newer one keeps it: what comes up late in the queue of a dead connection must not disturb the session after it.
    /// Cancelling it while it waits gives up nothing that it does not have: who comes next waits as long.
    pub(crate) async fn take(
        self: &Arc<Self>,
        owner: [u8; 32],
        what: &K,
        age: u64,
    ) -> Result<Claimed<K>, Why> {
        let key = (owner, what.clone());
        let holder = Arc::new(Holder {
            age,
            superseded: CancellationToken::new(),
            gone: CancellationToken::new(),
        });
        let before = {
            let mut holders = lock(&self.holders);
            if holders.get(&key).is_some_and(|before| before.age > age) {
                return Err(Code::Superseded.into());
            }
            holders.insert(key.clone(), holder.clone())
        };
        let claimed = Claimed {
            claims: self.clone(),
            key,
            holder,
        };
        let Some(before) = before else {
            return Ok(claimed);
        };
        before.superseded.cancel();
        let mut waiting = Waiting {
            claimed: Some(claimed),
            before,
        };
        waiting.before.gone.cancelled().await;
        waiting.claimed.take().ok_or_else(|| Code::Internal.into())
    }
}

/// A claim whose holder before has not let go yet, such as one whose disk stands still. Dropped meanwhile, it stays in its
/// place until then: the next one finds only this, and would write beside a holder that it knows nothing of.
struct Waiting<K: Eq + Hash + Clone + Send + 'static> {
    claimed: Option<Claimed<K>>,
    before: Arc<Holder>,
}

impl<K: Eq + Hash + Clone + Send + 'static> Drop for Waiting<K> {
    fn drop(&mut self) {
        // Without a runtime nobody comes next.
        if let (Some(claimed), Ok(runtime)) =
            (self.claimed.take(), tokio::runtime::Handle::try_current())
        {
            let before = self.before.clone();
            runtime.spawn(async move {
                before.gone.cancelled().await;
                drop(claimed);
            });
        }
    }
}

impl<K: Eq + Hash + Clone> Claimed<K> {
    /// Ends when a newer session takes over.
    pub(crate) async fn superseded(&self) {
        self.holder.superseded.cancelled().await;
    }

    /// Waits for something, but not beyond the time that a newer session takes over.
    pub(crate) async fn or_superseded<T>(
        &self,
        wait: impl Future<Output = Result<T, Why>>,
    ) -> Result<T, Why> {
        tokio::select! {
            biased;
            () = self.superseded() => Err(Code::Superseded.into()),
            done = wait => done,
        }
    }
}

impl<K: Eq + Hash + Clone> Drop for Claimed<K> {
    fn drop(&mut self) {
        let mut holders = lock(&self.claims.holders);
        if holders
            .get(&self.key)
            .is_some_and(|holder| Arc::ptr_eq(holder, &self.holder))
        {
            holders.remove(&self.key);
        }
        drop(holders);
        self.holder.gone.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_newer_session_of_the_same_key_takes_over_once_the_older_has_let_go() {
        let claims = Arc::new(Claims::default());
        let path = RelativePath::from_components(["a"]).unwrap();
        let (old_age, newer_age) = (claims.age(), claims.age());
        let old = claims.take([1; 32], &path, old_age).await.unwrap();
        let other_key = claims.take([2; 32], &path, newer_age).await.unwrap();
        let mut newer = Box::pin(claims.take([1; 32], &path, newer_age));
        assert!(
            futures_poll(&mut newer).await.is_none(),
            "the older one still has it"
        );
        old.superseded().await;
        drop(old);
        let newer = newer.await.unwrap();
        let late = claims.take([1; 32], &path, old_age).await.err();
        assert_eq!(
            late.unwrap().code,
            Code::Superseded,
            "the older one does not come back"
        );
        assert_eq!(lock(&claims.holders).len(), 2);
        drop((newer, other_key));
        assert!(
            lock(&claims.holders).is_empty(),
            "the table keeps nothing of what is over"
        );
    }

    #[tokio::test]
    async fn a_session_that_is_cut_off_while_it_waits_lets_nobody_past_the_one_that_still_writes() {
        let claims = Arc::new(Claims::default());
        let path = RelativePath::from_components(["a"]).unwrap();
        let ages = [claims.age(), claims.age(), claims.age()];
        let writing = claims.take([1; 32], &path, ages[0]).await.unwrap();
        let mut cut_off = Box::pin(claims.take([1; 32], &path, ages[1]));
        assert!(futures_poll(&mut cut_off).await.is_none());
        drop(cut_off);
        let mut next = Box::pin(claims.take([1; 32], &path, ages[2]));
        for _ in 0..10 {
            tokio::task::yield_now().await;
            assert!(
                futures_poll(&mut next).await.is_none(),
                "the first one's disk work has not ended"
            );
        }
        drop(writing);
        drop(next.await.unwrap());
        assert!(lock(&claims.holders).is_empty());
    }

    async fn futures_poll<T>(future: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
        tokio::select! {
            biased;
            done = future => Some(done),
            () = std::future::ready(()) => None,
        }
    }
}
