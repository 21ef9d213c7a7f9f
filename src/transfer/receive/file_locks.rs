//! Who is receiving what, over all connections of a process.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::lock;
use crate::error::{Code, Reason, Result};
use crate::net::flow_control::FlowControl;
use crate::net::stream::varint_of;
use crate::protocol::Durability;
use crate::protocol::path::RelativePath;
use crate::storage::PartialKey;

/// What is being received, by key and path (or session id).
///
/// Over a newer connection a session takes over what it holds over an older one, which is most often dead and does not know
/// it yet. Two sessions of one key take turns: the second waits until the first has let go, and may find the file committed.
/// A connection that does not answer is closed then, so that its client comes back and takes its turn. Two keys do not
/// disturb each other: the last commit wins whole.
#[derive(Debug)]
pub struct FileLocks<K: Eq + Hash + Clone = RelativePath> {
    holders: Mutex<HashMap<Key<K>, Arc<Holder>>>,
    ages: AtomicU64,
}

type Key<K> = ([u8; 32], K);

impl<K: Eq + Hash + Clone> Default for FileLocks<K> {
    fn default() -> Self {
        Self {
            holders: Mutex::default(),
            ages: AtomicU64::new(0),
        }
    }
}

/// Who takes a claim.
#[derive(Clone)]
pub(crate) struct Claimant {
    /// The id of the session, the same over all its connections.
    pub(crate) session: [u8; 16],
    /// See [`FileLocks::age`].
    pub(crate) age: u64,
    /// The connection that it runs over; `None` where no other session ever waits for it.
    pub(crate) window: Option<Arc<FlowControl>>,
    /// How long a session may bring nothing while this one waits for it.
    pub(crate) stall: Duration,
}

impl fmt::Debug for Claimant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claimant")
            .field("session", &self.session)
            .field("age", &self.age)
            .finish_non_exhaustive()
    }
}

/// A source that was committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CommittedSource {
    /// Size and time as announced: two sessions that send the same file announce the same.
    pub(crate) claim: PartialKey,
    /// The digest that was announced, if any.
    pub(crate) digest: Option<[u8; 32]>,
    pub(crate) durability: Durability,
}

impl CommittedSource {
    /// Whether another source counts as the same: by size and time, or by digest.
    pub(crate) fn is_same(&self, other: &Self, checksum: bool) -> bool {
        let same_content = match checksum {
            true => self.digest.is_some() && self.digest == other.digest,
            false => self.claim.modified.is_some(),
        };
        same_content && self.claim == other.claim
    }
}

#[derive(Debug)]
struct Holder {
    claimant: Claimant,
    superseded: CancellationToken,
    gone: CancellationToken,
    /// Its peer has been asked to send. Until then it waits for its own turn.
    asked: CancellationToken,
    /// What it has committed.
    committed: OnceLock<CommittedSource>,
}

impl Holder {
    /// Waits until a holder of another session has let go. Its connection is closed if it does not answer, or brings nothing
    /// for so long of what it was asked for; its client then comes back over another one, and takes its turn.
    async fn wait(&self, stall: Duration) {
        if let Some(window) = &self.claimant.window {
            let silence = async {
                self.asked.cancelled().await;
                window.silence(stall).await;
            };
            tokio::select! {
                () = self.gone.cancelled() => return,
                () = window.unresponsive() => {}
                () = silence => {}
            }
            window.connection().close(
                varint_of(Code::TimedOut),
                b"nothing came while another session waited for a file",
            );
        }
        self.gone.cancelled().await;
    }
}

/// What taking something comes to.
enum Taken<K: Eq + Hash + Clone + Send + 'static> {
    Free(FileLock<K>),
    /// An older connection of the same session lets go first.
    Superseding(Waiting<K>),
    /// Another session has it.
    Busy(Arc<Holder>),
}

/// The right to receive something; given up when dropped, so it must outlive all disk work on it.
pub(crate) struct FileLock<K: Eq + Hash + Clone = RelativePath> {
    claims: Arc<FileLocks<K>>,
    key: Key<K>,
    holder: Arc<Holder>,
    /// What the session committed that had it before, if this one waited for that.
    found: Option<CommittedSource>,
}

impl<K: Eq + Hash + Clone + Send + 'static> FileLocks<K> {
    /// The age of a session that begins now: the newer, the higher.
    pub(crate) fn age(&self) -> u64 {
        self.ages.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes something, once nobody else has it: an older connection of the same session is told to let go of it, another
    /// session is waited for. A newer connection of the same session keeps it: what comes up late in the queue of a dead
    /// connection must not disturb the one after it. Cancelling it while it waits gives up nothing that it does not have: who
    /// comes next waits as long.
    pub(crate) async fn take(
        self: &Arc<Self>,
        owner: [u8; 32],
        what: &K,
        claimant: &Claimant,
    ) -> Result<FileLock<K>, Reason> {
        let mut found = None;
        let mut claimed = loop {
            match self.try_take((owner, what.clone()), claimant)? {
                Taken::Free(claimed) => break claimed,
                Taken::Superseding(mut waiting) => {
                    waiting.before.gone.cancelled().await;
                    break waiting.claimed.take().ok_or(Code::Internal)?;
                }
                Taken::Busy(other) => {
                    other.wait(claimant.stall).await;
                    found = other.committed.get().cloned();
                }
            }
        };
        claimed.found = found;
        Ok(claimed)
    }

    fn try_take(self: &Arc<Self>, key: Key<K>, claimant: &Claimant) -> Result<Taken<K>, Reason> {
        let mut holders = lock(&self.holders);
        let before = holders.get(&key).cloned();
        match &before {
            Some(before) if before.claimant.session != claimant.session => {
                return Ok(Taken::Busy(before.clone()));
            }
            Some(before) if before.claimant.age > claimant.age => {
                return Err(Code::Superseded.into());
            }
            _ => {}
        }
        let holder = Arc::new(Holder {
            claimant: claimant.clone(),
            superseded: CancellationToken::new(),
            gone: CancellationToken::new(),
            asked: CancellationToken::new(),
            committed: OnceLock::new(),
        });
        holders.insert(key.clone(), holder.clone());
        let claimed = FileLock {
            claims: self.clone(),
            key,
            holder,
            found: None,
        };
        Ok(match before {
            None => Taken::Free(claimed),
            Some(before) => {
                before.superseded.cancel();
                Taken::Superseding(Waiting {
                    claimed: Some(claimed),
                    before,
                })
            }
        })
    }
}

/// A claim whose holder before has not let go yet, such as one whose disk stands still. Dropped meanwhile, it stays in its
/// place until then: the next one finds only this, and would write beside a holder that it knows nothing of.
struct Waiting<K: Eq + Hash + Clone + Send + 'static> {
    claimed: Option<FileLock<K>>,
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

impl<K: Eq + Hash + Clone> FileLock<K> {
    /// Notes that the peer is asked to send.
    pub(crate) fn asked(&self) {
        self.holder.asked.cancel();
    }

    /// Notes what was committed, for a session that waits for this one.
    pub(crate) fn committed(&self, source: CommittedSource) {
        // Set once: a claim is for one file.
        let _ = self.holder.committed.set(source);
    }

    /// What another session has committed while this one waited for it.
    pub(crate) fn found(&self) -> Option<&CommittedSource> {
        self.found.as_ref()
    }

    /// Ends when a newer connection of the session takes over.
    pub(crate) async fn superseded(&self) {
        self.holder.superseded.cancelled().await;
    }

    /// Waits for something, but not beyond the time that a newer connection of the session takes over.
    pub(crate) async fn or_superseded<T>(
        &self,
        wait: impl Future<Output = Result<T, Reason>>,
    ) -> Result<T, Reason> {
        tokio::select! {
            biased;
            () = self.superseded() => Err(Code::Superseded.into()),
            done = wait => done,
        }
    }
}

impl<K: Eq + Hash + Clone> Drop for FileLock<K> {
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
    async fn a_newer_connection_takes_over_once_the_older_has_let_go() {
        let claims = Arc::new(FileLocks::default());
        let path = RelativePath::from_components(["a"]).unwrap();
        let older = claimant(&claims, 7);
        let later = claimant(&claims, 7);
        let old = claims.take([1; 32], &path, &older).await.unwrap();
        let other_key = claims.take([2; 32], &path, &later).await.unwrap();
        let mut newer = Box::pin(claims.take([1; 32], &path, &later));
        assert!(
            futures_poll(&mut newer).await.is_none(),
            "the older one still has it"
        );
        old.superseded().await;
        drop(old);
        let newer = newer.await.unwrap();
        let late = claims.take([1; 32], &path, &older).await.err();
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
    async fn one_that_is_cut_off_while_it_waits_lets_no_other_past_the_writer() {
        let claims = Arc::new(FileLocks::default());
        let path = RelativePath::from_components(["a"]).unwrap();
        let of_session = [(); 3].map(|()| claimant(&claims, 7));
        let writing = claims.take([1; 32], &path, &of_session[0]).await.unwrap();
        let mut cut_off = Box::pin(claims.take([1; 32], &path, &of_session[1]));
        assert!(futures_poll(&mut cut_off).await.is_none());
        drop(cut_off);
        let mut next = Box::pin(claims.take([1; 32], &path, &of_session[2]));
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

    #[tokio::test]
    async fn another_session_waits_and_finds_what_was_committed() {
        let claims = Arc::new(FileLocks::default());
        let path = RelativePath::from_components(["a"]).unwrap();
        let first = claimant(&claims, 1);
        let newer = claimant(&claims, 2);
        let source = CommittedSource {
            claim: PartialKey {
                owner: [1; 32],
                size: 5,
                modified: None,
            },
            digest: None,
            durability: Durability::Synced,
        };
        for (holder, waiter) in [(&first, &newer), (&newer, &first)] {
            let held = claims.take([1; 32], &path, holder).await.unwrap();
            assert_eq!(held.found(), None);
            let mut waiting = Box::pin(claims.take([1; 32], &path, waiter));
            assert!(futures_poll(&mut waiting).await.is_none());
            assert!(
                !held.holder.superseded.is_cancelled(),
                "the holder is not disturbed"
            );
            held.committed(source.clone());
            drop(held);
            assert_eq!(waiting.await.unwrap().found(), Some(&source));
        }
        assert!(lock(&claims.holders).is_empty());
    }

    /// A newer connection of a session.
    fn claimant(claims: &Arc<FileLocks>, session: u8) -> Claimant {
        Claimant {
            session: [session; 16],
            age: claims.age(),
            window: None,
            stall: Duration::MAX,
        }
    }

    async fn futures_poll<T>(future: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
        tokio::select! {
            biased;
            done = future => Some(done),
            () = std::future::ready(()) => None,
        }
    }
}
