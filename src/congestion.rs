//! Congestion control: how many bytes may be in flight.
//!
//! [`Congestion::Haul`] is haul's own controller; the others are quinn's, for comparison.

mod controller;
mod haul;
mod model;
mod others;
mod probing;
mod round;
mod startup;
mod steering;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use quinn::congestion::{BbrConfig, ControllerFactory, CubicConfig, NewRenoConfig};

use crate::error::{Error, Result};
pub(crate) use steering::Steering;

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
            Self::Haul => Arc::new(controller::HaulFactory),
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
