//! Who is receiving which file, over all connections of a process.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio_util::sync::CancellationToken;

use super::lock;
use crate::error::{Code, Result, Why};
use crate::path::RelativePath;

/// Files being received, by key and path. A newer session of the same key takes a file over, since the older one is most
/// often dead and does not know it yet. Two keys do not disturb each other: the last commit wins whole.
#[derive(Debug, Default)]
pub struct Claims {
    holders: Mutex<HashMap<Key, Arc<Holder>>>,
}

type Key = ([u8; 32], RelativePath);

#[derive(Debug, Default)]
struct Holder {
    superseded: CancellationToken,
    gone: CancellationToken,
}

/// The right to receive one file; given up when dropped, so it must outlive all disk work on the file.
pub(super) struct Claimed {
    claims: Arc<Claims>,
    key: Key,
    holder: Arc<Holder>,
}

impl Claims {
    /// Takes a file for a session; whoever had it is told, and has let go of it when this returns.
    pub(super) async fn take(self: &Arc<Self>, owner: [u8; 32], path: &RelativePath) -> Claimed {
        let key = (owner, path.clone());
        let holder = Arc::new(Holder::default());
        let before = lock(&self.holders).insert(key.clone(), holder.clone());
        let claimed = Claimed { claims: self.clone(), key, holder };
        if let Some(before) = before {
            before.superseded.cancel();
            before.gone.cancelled().await;
        }
        claimed
    }
}

impl Claimed {
    /// Ends when a newer session takes over.
    pub(super) async fn superseded(&self) {
        self.holder.superseded.cancelled().await;
    }

    /// Waits for something, but not beyond the time that a newer session takes over.
    pub(super) async fn or_superseded<T>(&self, wait: impl Future<Output = Result<T, Why>>) -> Result<T, Why> {
        tokio::select! {
            biased;
            () = self.superseded() => Err(Code::Superseded.into()),
            done = wait => done,
        }
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        let mut holders = lock(&self.claims.holders);
        if holders.get(&self.key).is_some_and(|holder| Arc::ptr_eq(holder, &self.holder)) {
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
        let old = claims.take([1; 32], &path).await;
        let other_key = claims.take([2; 32], &path).await;
        let mut newer = Box::pin(claims.take([1; 32], &path));
        assert!(futures_poll(&mut newer).await.is_none(), "the older one still has it");
        old.superseded().await;
        drop(old);
        let newer = newer.await;
        assert_eq!(lock(&claims.holders).len(), 2);
        drop((newer, other_key));
        assert!(lock(&claims.holders).is_empty(), "the table keeps nothing of what is over");
    }

    async fn futures_poll<T>(future: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
        tokio::select! {
            biased;
            done = future => Some(done),
            () = std::future::ready(()) => None,
        }
    }
}
