//! QUIC connections: endpoints, connecting, streams, flow control and rate limits.

pub(crate) mod address;
pub(crate) mod amplification;
mod attempt;
pub mod connect;
pub mod endpoint;
pub mod flow_control;
pub mod memory_limit;
pub(crate) mod qlog;
pub mod rate_limit;
pub(crate) mod reachability;
pub(crate) mod send_window;
pub(crate) mod share;
pub(crate) mod socket;
pub mod stream;
