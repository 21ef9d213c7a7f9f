//! Requests to the controller of a connection, from outside of quinn.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Requests to the controller of a connection, if it is haul's.
#[derive(Debug, Default)]
pub(crate) struct Steering {
    probing: AtomicBool,
    closing: AtomicBool,
}

impl Steering {
    /// Lets some packets through a full window. After an outage only new packets show that the path has recovered,
    /// and quinn doubles the interval of its own probes each time.
    pub(crate) fn probe(&self) {
        self.probing.store(true, Relaxed);
    }

    /// Records that a packet was sent, which ends a probe.
    pub(super) fn end_probe(&self) {
        self.probing.store(false, Relaxed);
    }

    pub(super) fn is_probing(&self) -> bool {
        self.probing.load(Relaxed)
    }

    /// Opens the window permanently: quinn does not send CONNECTION_CLOSE through a full one (quinn#2785).
    pub(crate) fn close(&self) {
        self.closing.store(true, Relaxed);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Relaxed)
    }
}
