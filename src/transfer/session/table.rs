//! The sessions of a connection in which this end receives. The peer's streams find their session here, by its handle:
//! the id of its control stream.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

use crate::error::lock::lock;
use crate::net::stream::{MessageStream, StreamError};
use crate::transfer::receive::Receiver;

/// Receiving sessions by handle.
#[derive(Default)]
pub(super) struct SessionTable {
    sessions: Mutex<HashMap<u64, Registered>>,
    /// Notified when a session is registered.
    registered: Notify,
}

struct Registered {
    /// A client creates its receiver after the server has answered.
    receiver: Option<Arc<Receiver>>,
    manifest: Option<oneshot::Sender<MessageStream>>,
}

/// A registered session. Dropping it removes the session from the table.
pub(super) struct Registration {
    table: Arc<SessionTable>,
    handle: u64,
    manifest: oneshot::Receiver<MessageStream>,
}

impl Registration {
    /// Sets the receiver. From now on, transfers of the session reach it.
    pub(super) fn attach(&self, receiver: &Arc<Receiver>) {
        if let Some(session) = self.table.lock().get_mut(&self.handle) {
            session.receiver = Some(receiver.clone());
        }
    }

    /// Waits for the manifest stream, which the sender opens.
    pub(super) async fn manifest(
        &mut self,
        deadline: Duration,
    ) -> Result<MessageStream, StreamError> {
        timeout(deadline, &mut self.manifest)
            .await
            .map_err(|_| StreamError::TimedOut)?
            .map_err(|_| StreamError::Ended)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.table.lock().remove(&self.handle);
    }
}

impl SessionTable {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Registered>> {
        lock(&self.sessions)
    }

    /// Registers a session, so that its streams find it.
    pub(super) fn register(self: &Arc<Self>, handle: u64) -> Registration {
        let (to, manifest) = oneshot::channel();
        self.lock().insert(
            handle,
            Registered {
                receiver: None,
                manifest: Some(to),
            },
        );
        self.registered.notify_waiters();
        Registration {
            table: self.clone(),
            handle,
            manifest,
        }
    }

    /// Returns the receiver of a session.
    pub(super) fn receiver(&self, handle: u64) -> Option<Arc<Receiver>> {
        let session = self.lock();
        session.get(&handle)?.receiver.clone()
    }

    /// Returns the channel for a session's manifest, once. With `wait` it waits until the session is registered.
    pub(super) async fn manifest_channel(
        &self,
        handle: u64,
        wait: bool,
    ) -> Option<oneshot::Sender<MessageStream>> {
        loop {
            let registered = self.registered.notified();
            match self.lock().get_mut(&handle) {
                Some(session) => return session.manifest.take(),
                None if !wait => return None,
                None => {}
            }
            registered.await;
        }
    }
}
