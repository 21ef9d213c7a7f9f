//! Transfers of files: the sender, the receiver, and the session that joins them. Either end may be the client.

pub(crate) mod blocking;
pub mod bottleneck;
pub(crate) mod context;
pub mod events;
pub mod permits;
pub mod receive;
pub(crate) mod sampler;
pub mod send;
pub mod session;
pub mod stats;
