//! Locks on received files, over all connections of a process.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::error::lock::lock;
use crate::error::{Code, Reason, Result};
use crate::net::flow_control::FlowControl;
use crate::net::stream::varint_of;
use crate::protocol::Durability;
use crate::protocol::path::RelativePath;
use crate::storage::PartialKey;

/// Locks by key and path (or session id).
///
/// A newer connection of a session takes over the locks of an older one, which is usually dead and not yet detected as
/// such. Two sessions of one key take turns: the second waits until the first releases, and may find the file
/// committed. If the first does not respond, its connection is closed; its client can reconnect and wait for its turn.
/// Different keys do not block each other: the last commit wins as a whole.
#[derive(Debug)]
pub struct FileLocks<K: Eq + Hash + Clone = RelativePath> {
    holders: Mutex<HashMap<Key<K>, Arc<Holder>>>,
    next_age: AtomicU64,
}

type Key<K> = ([u8; 32], K);

impl<K: Eq + Hash + Clone> Default for FileLocks<K> {
    fn default() -> Self {
        Self {
            holders: Mutex::default(),
            next_age: AtomicU64::new(0),
        }
    }
}

/// The session and connection that takes a lock.
#[derive(Clone)]
pub(crate) struct Claimant {
    /// The session id, which is the same over all its connections.
    pub(crate) session: [u8; 16],
    /// See [`FileLocks::age`].
    pub(crate) age: u64,
    /// The flow control of its connection; `None` if no other session ever waits for it.
    pub(crate) window: Option<Arc<FlowControl>>,
    /// How long another session may make no progress while this one waits for it.
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

/// A committed source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CommittedSource {
    /// The announced size and time. Two sessions that send the same file announce the same values.
    pub(crate) key: PartialKey,
    /// The announced digest, if any.
    pub(crate) digest: Option<[u8; 32]>,
    pub(crate) durability: Durability,
}

impl CommittedSource {
    /// Returns whether another source counts as the same: by size and time, or by digest.
    pub(crate) fn is_same(&self, other: &Self, checksum: bool) -> bool {
        let same_content = match checksum {
            true => self.digest.is_some() && self.digest == other.digest,
            false => self.key.modified.is_some(),
        };
        same_content && self.key == other.key
    }
}

#[derive(Debug)]
struct Holder {
    claimant: Claimant,
    superseded: CancellationToken,
    released: CancellationToken,
    /// Set when its peer was asked to send. Before that, the holder waits for its own turn.
    asked: CancellationToken,
    /// The source that it committed.
    committed: OnceLock<CommittedSource>,
}

impl Holder {
    /// Waits until a holder of another session releases. Closes its connection if it does not respond, or makes no
    /// progress for `stall` after it was asked to send. Its client can reconnect and wait for its turn.
    async fn wait(&self, stall: Duration) {
        if let Some(window) = &self.claimant.window {
            let silence = async {
                self.asked.cancelled().await;
                window.silence(stall).await;
            };
            tokio::select! {
                () = self.released.cancelled() => return,
                () = window.unresponsive() => {}
                () = silence => {}
            }
            window.connection().close(
                varint_of(Code::TimedOut),
                b"no data arrived while another session waited for the file",
            );
        }
        self.released.cancelled().await;
    }
}

/// The result of an attempt to take a lock.
enum TakeResult<K: Eq + Hash + Clone + Send + 'static> {
    Free(FileLock<K>),
    /// An older connection of the same session must release first.
    Superseding(Waiting<K>),
    /// Another session holds the lock.
    Busy(Arc<Holder>),
}

/// The right to receive a file. Dropping it releases the lock, so it must outlive all disk work on the file.
pub(crate) struct FileLock<K: Eq + Hash + Clone = RelativePath> {
    locks: Arc<FileLocks<K>>,
    key: Key<K>,
    holder: Arc<Holder>,
    /// The source committed by the previous holder, if this session waited for it.
    found: Option<CommittedSource>,
}

impl<K: Eq + Hash + Clone + Send + 'static> FileLocks<K> {
    /// Returns the age of a new session; newer sessions have higher values.
    pub(crate) fn age(&self) -> u64 {
        self.next_age.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes a lock when it is free. An older connection of the same session is told to release it; another session is
    /// waited for. If a newer connection of the same session holds it, this fails with [`Code::Superseded`], so that a
    /// late entry of a dead connection does not disturb its successor. If this is cancelled while it waits for an
    /// older connection, later callers still wait for that connection.
    pub(crate) async fn take(
        self: &Arc<Self>,
        owner: [u8; 32],
        what: &K,
        claimant: &Claimant,
    ) -> Result<FileLock<K>, Reason> {
        let mut found = None;
        let mut file_lock = loop {
            match self.try_take((owner, what.clone()), claimant)? {
                TakeResult::Free(file_lock) => break file_lock,
                TakeResult::Superseding(mut waiting) => {
                    waiting.previous.released.cancelled().await;
                    break waiting.file_lock.take().ok_or(Code::Internal)?;
                }
                TakeResult::Busy(other) => {
                    other.wait(claimant.stall).await;
                    found = other.committed.get().cloned();
                }
            }
        };
        file_lock.found = found;
        Ok(file_lock)
    }

    fn try_take(
        self: &Arc<Self>,
        key: Key<K>,
        claimant: &Claimant,
    ) -> Result<TakeResult<K>, Reason> {
        let mut holders = lock(&self.holders);
        let previous = holders.get(&key).cloned();
        match &previous {
            Some(previous) if previous.claimant.session != claimant.session => {
                return Ok(TakeResult::Busy(previous.clone()));
            }
            Some(previous) if previous.claimant.age > claimant.age => {
                return Err(Code::Superseded.into());
            }
            _ => {}
        }
        let holder = Arc::new(Holder {
            claimant: claimant.clone(),
            superseded: CancellationToken::new(),
            released: CancellationToken::new(),
            asked: CancellationToken::new(),
            committed: OnceLock::new(),
        });
        holders.insert(key.clone(), holder.clone());
        let file_lock = FileLock {
            locks: self.clone(),
            key,
            holder,
            found: None,
        };
        Ok(match previous {
            None => TakeResult::Free(file_lock),
            Some(previous) => {
                previous.superseded.cancel();
                TakeResult::Superseding(Waiting {
                    file_lock: Some(file_lock),
                    previous,
                })
            }
        })
    }
}

/// A lock whose previous holder has not released it yet, for example because its disk is stalled. If dropped, it stays
/// in the table until that release. Otherwise the next caller would write while the previous holder still does.
struct Waiting<K: Eq + Hash + Clone + Send + 'static> {
    file_lock: Option<FileLock<K>>,
    previous: Arc<Holder>,
}

impl<K: Eq + Hash + Clone + Send + 'static> Drop for Waiting<K> {
    fn drop(&mut self) {
        // Without a runtime no other task can follow.
        if let (Some(file_lock), Ok(runtime)) =
            (self.file_lock.take(), tokio::runtime::Handle::try_current())
        {
            let previous = self.previous.clone();
            runtime.spawn(async move {
                previous.released.cancelled().await;
                drop(file_lock);
            });
        }
    }
}

impl<K: Eq + Hash + Clone> FileLock<K> {
    /// Records that the peer was asked to send.
    pub(crate) fn asked(&self) {
        self.holder.asked.cancel();
    }

    /// Records the committed source for sessions that wait.
    pub(crate) fn committed(&self, source: CommittedSource) {
        // Set once: a lock is for one file.
        let _ = self.holder.committed.set(source);
    }

    /// Returns the source that another session committed while this one waited.
    pub(crate) fn found(&self) -> Option<&CommittedSource> {
        self.found.as_ref()
    }

    /// Waits until a newer connection of the session takes over.
    pub(crate) async fn superseded(&self) {
        self.holder.superseded.cancelled().await;
    }

    /// Waits for a future, or fails with [`Code::Superseded`] when a newer connection of the session takes over.
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
        let mut holders = lock(&self.locks.holders);
        if holders
            .get(&self.key)
            .is_some_and(|holder| Arc::ptr_eq(holder, &self.holder))
        {
            holders.remove(&self.key);
        }
        drop(holders);
        self.holder.released.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_newer_connection_takes_over_after_the_older_releases() {
        let locks = Arc::new(FileLocks::default());
        let path = RelativePath::from_components(["a"]).unwrap();
        let older = claimant(&locks, 7);
        let later = claimant(&locks, 7);
        let old = locks.take([1; 32], &path, &older).await.unwrap();
        let other_key = locks.take([2; 32], &path, &later).await.unwrap();
        let mut newer = Box::pin(locks.take([1; 32], &path, &later));
        assert!(
            poll_once(&mut newer).await.is_none(),
            "the older one still holds it"
        );
        old.superseded().await;
        drop(old);
        let newer = newer.await.unwrap();
        let late = locks.take([1; 32], &path, &older).await.err();
        assert_eq!(
            late.unwrap().code,
            Code::Superseded,
            "the older one cannot take it again"
        );
        assert_eq!(lock(&locks.holders).len(), 2);
        drop((newer, other_key));
        assert!(
            lock(&locks.holders).is_empty(),
            "released locks leave the table"
        );
    }

    #[tokio::test]
    async fn a_cancelled_waiter_still_blocks_others_until_release() {
        let locks = Arc::new(FileLocks::default());
        let path = RelativePath::from_components(["a"]).unwrap();
        let of_session = [(); 3].map(|()| claimant(&locks, 7));
        let writing = locks.take([1; 32], &path, &of_session[0]).await.unwrap();
        let mut cut_off = Box::pin(locks.take([1; 32], &path, &of_session[1]));
        assert!(poll_once(&mut cut_off).await.is_none());
        drop(cut_off);
        let mut next = Box::pin(locks.take([1; 32], &path, &of_session[2]));
        for _ in 0..10 {
            tokio::task::yield_now().await;
            assert!(
                poll_once(&mut next).await.is_none(),
                "the disk work of the first one has not ended"
            );
        }
        drop(writing);
        drop(next.await.unwrap());
        assert!(lock(&locks.holders).is_empty());
    }

    #[tokio::test]
    async fn another_session_waits_and_finds_the_committed_source() {
        let locks = Arc::new(FileLocks::default());
        let path = RelativePath::from_components(["a"]).unwrap();
        let first = claimant(&locks, 1);
        let newer = claimant(&locks, 2);
        let source = CommittedSource {
            key: PartialKey {
                owner: [1; 32],
                size: 5,
                modified: None,
            },
            digest: None,
            durability: Durability::Synced,
        };
        for (holder, waiter) in [(&first, &newer), (&newer, &first)] {
            let held = locks.take([1; 32], &path, holder).await.unwrap();
            assert_eq!(held.found(), None);
            let mut waiting = Box::pin(locks.take([1; 32], &path, waiter));
            assert!(poll_once(&mut waiting).await.is_none());
            assert!(
                !held.holder.superseded.is_cancelled(),
                "the holder is not disturbed"
            );
            held.committed(source.clone());
            drop(held);
            assert_eq!(waiting.await.unwrap().found(), Some(&source));
        }
        assert!(lock(&locks.holders).is_empty());
    }

    /// Makes a newer connection of a session.
    fn claimant(locks: &Arc<FileLocks>, session: u8) -> Claimant {
        Claimant {
            session: [session; 16],
            age: locks.age(),
            window: None,
            stall: Duration::MAX,
        }
    }

    async fn poll_once<T>(future: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
        tokio::select! {
            biased;
            done = future => Some(done),
            () = std::future::ready(()) => None,
        }
    }
}
