//! What all connections of a server share.

use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::introduction::Introduction;
use crate::auth::Admission;
use crate::bench::MeasurementPermits;
use crate::config::Config;
use crate::net::rate_limit::RateLimits;
use crate::storage::Store;
use crate::transfer::events::Observer;
use crate::transfer::permits::TransferPermits;
use crate::transfer::receive::FileLocks;
use crate::transfer::session::{ConnectionMemory, OfferedContent, listings};

/// The state that all connections share.
pub(super) struct ServerState {
    pub(super) admission: Admission,
    pub(super) store: Arc<dyn Store>,
    pub(super) offered: Option<Arc<OfferedContent>>,
    pub(super) introductions: Option<mpsc::Sender<Introduction>>,
    pub(super) quic: quinn::ServerConfig,
    pub(super) config: Arc<Config>,
    pub(super) observer: Observer,
    pub(super) limits: SharedLimits,
    pub(super) file_locks: Arc<FileLocks>,
    /// Running pushes by session id.
    pub(super) pushes: Arc<FileLocks<[u8; 16]>>,
    /// Cancelled when the server stops and refuses new work.
    pub(super) stopping: CancellationToken,
    pub(super) tasks: TaskTracker,
}

/// The limits over all connections.
pub(super) struct SharedLimits {
    /// Transfers that write at the same time.
    pub(super) transfers: TransferPermits,
    pub(super) connections: Arc<Semaphore>,
    pub(super) measurements: Arc<Semaphore>,
    pub(super) listings: Arc<Semaphore>,
    pub(super) memory: ConnectionMemory,
    /// The rate of all bytes sent.
    pub(super) rate: RateLimits,
}

impl SharedLimits {
    pub(super) fn new(config: &Config) -> Self {
        let transfers = TransferPermits::new(config.max_transfers);
        if transfers.total() < config.max_transfers {
            tracing::warn!(
                permits = transfers.total(),
                wanted = config.max_transfers,
                "fewer transfers at the same time: the limit of open files (RLIMIT_NOFILE) is low"
            );
        }
        Self {
            transfers,
            connections: Arc::new(Semaphore::new(config.max_connections)),
            measurements: MeasurementPermits::of_server(),
            listings: listings(),
            memory: ConnectionMemory::of_server(config),
            rate: RateLimits::new(config.limit),
        }
    }
}
