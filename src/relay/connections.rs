//! The connections of a relay: which are admitted, and which is closed for another.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::limits::{NetworkLimits, Tries};
use super::shares::{Networks, Shares};
use crate::error::lock::lock;

/// All connections.
pub(super) struct Connections {
    handshakes: Tries,
    slots: Mutex<Shares<CancellationToken>>,
}

/// A connection that counts against the limits until dropped.
pub(super) struct ConnectionSlot {
    connections: Arc<Connections>,
    networks: Networks,
    id: u64,
    /// Cancelled when the connection must be closed for another network's.
    pub(super) evicted: CancellationToken,
}

impl Connections {
    pub(super) fn new(all: usize, limits: NetworkLimits) -> Self {
        Self {
            handshakes: limits.handshakes(),
            slots: Mutex::new(Shares::new(limits.connections(all))),
        }
    }

    /// Counts a connection from a validated address; `None` when it must be refused.
    pub(super) fn add(self: &Arc<Self>, ip: IpAddr) -> Option<ConnectionSlot> {
        let networks = Networks::of(ip);
        if !self.handshakes.admit(networks) {
            return None;
        }
        let evicted = CancellationToken::new();
        let slot = lock(&self.slots).take(networks, evicted.clone())?;
        if let Some(other) = slot.evicted {
            debug!(%ip, "a connection of the largest network is closed for this one");
            other.cancel();
        }
        Some(ConnectionSlot {
            connections: self.clone(),
            networks,
            id: slot.id,
            evicted,
        })
    }

    /// Forgets networks without recent handshakes.
    pub(super) fn forget(&self) {
        self.handshakes.forget();
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        lock(&self.connections.slots).release(self.networks, self.id);
    }
}
