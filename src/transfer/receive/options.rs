//! The parameters of a receiving session.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::file_locks::FileLocks;
use super::placement::{Placement, RequestedNames};
use super::quota::AcceptedQuota;
use crate::config::Config;
use crate::net::flow_control::FlowControl;
use crate::protocol::{Durability, Existing, ReceiveOptions};
use crate::storage::digest_index::Index;
use crate::storage::filter::Filter;
use crate::storage::{KeptShare, Store};
use crate::transfer::events::Observer;
use crate::transfer::permits::ConnectionPermits;
use crate::transfer::stats::SessionStats;

/// The parameters of a receiving session.
pub struct Receiving {
    /// The session's id, which is the same over all its connections.
    pub session: [u8; 16],
    /// The sender's key, which partials are bound to.
    pub sender: [u8; 32],
    /// Where entries go.
    pub target: Target,
    /// What becomes of them.
    pub policy: Policy,
    /// What the session shares with others.
    pub context: ReceiveContext,
}

/// Where the entries of a session go.
pub struct Target {
    /// The store that files are committed to.
    pub store: Arc<dyn Store>,
    /// The place in the store.
    pub placement: Placement,
    /// The requested names.
    pub requested: RequestedNames,
}

/// What becomes of the entries of a session.
pub struct Policy {
    /// What happens to existing files.
    pub options: ReceiveOptions,
    /// The optional metadata that is kept.
    pub keep: Keep,
    /// The required durability of a commit.
    pub durability: Durability,
    /// Whether a FIFO, socket or device at the sender counts as a failure.
    pub fail_specials: bool,
    /// The paths that a mirror keeps though they are not announced. The sender excludes them by the same rules.
    pub protected: Filter,
    /// The accepted quota, if one was agreed.
    pub quota: Option<AcceptedQuota>,
    /// The index of content that need not be sent again. Set only for a key that may read the whole store.
    pub index: Option<Index>,
}

/// What a session shares with the other sessions of its connection and process.
pub struct ReceiveContext {
    /// Access to the permits of the process.
    pub permits: ConnectionPermits,
    /// The connection's flow control, which bounds its memory.
    pub flow_control: Arc<FlowControl>,
    /// Counts the memory of what the session remembers.
    pub memory: KeptShare,
    /// The file locks of the process.
    pub file_locks: Arc<FileLocks>,
    /// Limits and deadlines.
    pub config: Arc<Config>,
    /// The session's statistics over all its connections.
    pub stats: Arc<SessionStats>,
    /// The observer of events.
    pub observer: Observer,
    /// Cancelled when no new entries are admitted.
    pub stopping: CancellationToken,
}

/// The optional metadata that this receiver keeps.
#[derive(Debug, Clone, Default)]
pub struct Keep {
    /// Set owners and groups as the sender announces them. Also keep set-user-ID, set-group-ID and sticky bits of
    /// files, and extended attributes that grant rights. The system must permit it, as it does for root.
    pub owner: bool,
    /// Use numeric owner ids, even if the names are known.
    pub numeric_ids: bool,
    /// Set extended attributes as the sender announces them.
    pub xattrs: bool,
}

/// Returns whether an entry of another kind is replaced, with all its content. Only a mirror does that.
pub(super) fn replaces_other_kinds(options: &ReceiveOptions) -> bool {
    options.delete.is_some() && matches!(options.existing, Existing::Update | Existing::Overwrite)
}
