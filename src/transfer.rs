//! The transfer of files, the same whichever end is the client: the sender, the receiver, and the session that joins them.

pub mod bottleneck;
pub mod events;
pub mod receive;
pub(crate) mod sampler;
pub mod send;
pub mod session;
