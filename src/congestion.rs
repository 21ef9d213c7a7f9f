//! Congestion control: how many bytes may be in flight.
//!
//! [`Congestion::Haul`] is haul's own controller; the others are quinn's, for comparison.

mod haul;
mod model;
mod others;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use quinn::congestion::{BbrConfig, Controller, ControllerFactory, CubicConfig, NewRenoConfig};

use crate::error::{Error, Result};

/// A congestion controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Congestion {
    /// haul's own: follows the delivery rate and the round-trip time; random loss does not slow it down.
    #[default]
    Haul,
    /// Cubic (RFC 9438), as in TCP: each loss reduces its rate by about a third.
    Cubic,
    /// NewReno (RFC 9002, section 7).
    NewReno,
    /// quinn's BBR, which its authors call experimental: it overflows queues.
    Bbr,
}

impl Congestion {
    /// All controllers, by name.
    pub const ALL: [(&str, Self); 4] = [
        ("haul", Self::Haul),
        ("cubic", Self::Cubic),
        ("newreno", Self::NewReno),
        ("bbr", Self::Bbr),
    ];

    /// Returns the factory that builds a controller for each path.
    pub(crate) fn factory(self) -> Arc<dyn ControllerFactory + Send + Sync> {
        match self {
            Self::Haul => Arc::new(Factory),
            Self::Cubic => Arc::new(CubicConfig::default()),
            Self::NewReno => Arc::new(NewRenoConfig::default()),
            Self::Bbr => Arc::new(BbrConfig::default()),
        }
    }
}

impl fmt::Display for Congestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            Self::ALL
                .iter()
                .find(|(_, which)| which == self)
                .map_or("", |(name, _)| name),
        )
    }
}

impl FromStr for Congestion {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, which)| *which)
            .ok_or_else(|| {
                let known: Vec<_> = Self::ALL.iter().map(|(known, _)| *known).collect();
                Error::Usage(format!(
                    "cannot use the congestion controller {name:?}: it does not exist; choose one of {}",
                    known.join(", ")
                ))
            })
    }
}

struct Factory;

impl ControllerFactory for Factory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(haul::Haul::new(now, current_mtu))
    }
}

/// Requests to the controller of a connection, if it is haul's.
#[derive(Debug, Default)]
pub(crate) struct Steering {
    probing: AtomicBool,
    closing: AtomicBool,
}

impl Steering {
    /// Returns the handle of a connection's current path.
    pub(crate) fn of(connection: &quinn::Connection) -> Option<Arc<Self>> {
        let controller = connection
            .congestion_state()
            .into_any()
            .downcast::<haul::Haul>()
            .ok()?;
        Some(controller.steering())
    }

    /// Lets some packets through a full window. After an outage only new packets show that the path has recovered,
    /// and quinn doubles the interval of its own probes each time.
    pub(crate) fn probe(&self) {
        self.probing.store(true, Relaxed);
    }

    /// Opens the window permanently: quinn does not send CONNECTION_CLOSE through a full one (quinn#2785).
    pub(crate) fn close(&self) {
        self.closing.store(true, Relaxed);
    }
}
