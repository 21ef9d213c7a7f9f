//! What all connections of a server share.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::introduction::Introduction;
use super::rates::Rates;
use super::slots::{Handshakes, SharedPlaces};
use crate::auth::Admission;
use crate::bench::MeasurementPermits;
use crate::config::Config;
use crate::net::rate_limit::RateLimits;
use crate::net::share::{ShareLimits, Shares};
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

/// Sessions at the same time. Each may hold 1 MiB of unanswered entries, which takes several times that in memory, so one key
/// gets as many as 64 connections may have.
const SESSIONS: ShareLimits = ShareLimits {
    all: 4_096,
    key: 512,
    network: 1_024,
    site: 2_048,
};
/// Introductions at the same time: four wait for the task that checks codes, and one is checked. A receiver that tries again
/// may have two.
const INTRODUCTIONS: ShareLimits = ShareLimits {
    all: 5,
    key: 2,
    network: 3,
    site: 4,
};

/// The limits over all connections.
pub(super) struct SharedLimits {
    /// Transfers that write at the same time.
    pub(super) transfers: TransferPermits,
    /// Handshakes at the same time; they take no places.
    pub(super) handshakes: Handshakes,
    /// Connections at the same time.
    pub(super) places: SharedPlaces,
    /// Connections, sessions and log lines in a second.
    pub(super) rates: Rates,
    /// Sessions at the same time.
    pub(super) sessions: Arc<Shares>,
    /// Introductions at the same time.
    pub(super) introductions: Arc<Shares>,
    pub(super) measurements: Arc<Shares>,
    pub(super) listings: Arc<Shares>,
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
            handshakes: Handshakes::default(),
            places: SharedPlaces::new(config.max_connections),
            rates: Rates::new(),
            sessions: Shares::new(SESSIONS),
            introductions: Shares::new(INTRODUCTIONS),
            measurements: MeasurementPermits::of_server(),
            listings: listings(),
            memory: ConnectionMemory::of_server(config),
            rate: RateLimits::new(config.limit),
        }
    }
}
