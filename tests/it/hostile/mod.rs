//! Peers that break every rule, against a real server and a real client. Whatever they do, the honest side neither
//! panics nor hangs, stays within its bounds and its directory, and keeps serving others.

mod acks;
mod agreed;
mod early;
mod fetch;
mod kept;
mod links;
mod messages;
mod names;
pub(crate) mod peer;
mod resources;
mod rogue;
mod streams;
mod terminal;
mod transfers;
