//! Peers that break every rule, against a real server and a real client. Whatever they do, the honest side neither
//! panics nor hangs, stays within its bounds and its directory, and keeps serving others.

mod acks;
mod agreed;
mod early;
mod fetch;
mod handshakes;
mod kept;
mod links;
mod memory;
mod messages;
mod names;
pub(crate) mod peer;
mod permits;
mod resources;
mod rogue;
mod shares;
mod streams;
mod terminal;
mod transfers;
