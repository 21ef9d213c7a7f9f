//! QUIC connections: how they are made, their streams, flow control and rate limits.

pub mod connect;
pub mod endpoint;
pub mod flow_control;
pub(crate) mod qlog;
pub mod rate_limit;
pub(crate) mod send_window;
pub mod stream;
