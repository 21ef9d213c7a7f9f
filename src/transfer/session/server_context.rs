//! The context of the sessions on one connection of a server.

use std::sync::Arc;

use super::content::OfferedContent;
use crate::auth::Rights;
use crate::auth::identity::KeyId;
use crate::error::{Code, Reason, Result};
use crate::net::share::{Holder, Shares};
use crate::storage::Store;
use crate::transfer::context::Context;
use crate::transfer::permits::ConnectionPermits;
use crate::transfer::receive::FileLocks;

/// The context of a session, and what only a server has.
pub(crate) struct ServerContext {
    pub(crate) context: Context,
    pub(crate) store: Arc<dyn Store>,
    /// Content that is sent instead of the store.
    pub(crate) offered: Option<Arc<OfferedContent>>,
    /// The client's rights.
    pub(crate) rights: Rights,
    /// Who holds what the sessions take.
    pub(crate) holder: Holder,
    /// Running pushes by session id, over all connections.
    pub(crate) pushes: Arc<FileLocks<[u8; 16]>>,
    pub(crate) file_locks: Arc<FileLocks>,
    /// Access to the permits of the transfers that write at the same time.
    pub(crate) permits: ConnectionPermits,
    /// Limits the listings.
    pub(crate) listings: Arc<Shares>,
}

impl ServerContext {
    /// The client's key.
    pub(super) fn client(&self) -> KeyId {
        self.context.connection.key_id()
    }

    /// Checks whether the client may read the store.
    pub(super) fn check_read(&self) -> Result<(), Reason> {
        match self.rights.read {
            true => Ok(()),
            false => Err(Reason::new(
                Code::NotAllowed,
                "this key may not read on this server",
            )),
        }
    }

    /// Checks whether the server still begins sessions.
    pub(super) fn check_running(&self) -> Result<(), Reason> {
        match self.context.stopping.is_cancelled() {
            true => Err(Code::Stopping.into()),
            false => Ok(()),
        }
    }
}

/// Formats a session id for the log.
pub(super) fn hex(id: &[u8; 16]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}
