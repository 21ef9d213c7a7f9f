//! Peers that keep to nothing, against a real server and a real client: whatever they do, the honest side neither
//! panics nor hangs, keeps to its bounds and its place, and goes on serving everybody else.

mod acks;
mod agreed;
mod early;
mod fetch;
mod links;
mod messages;
mod names;
pub(crate) mod peer;
mod resources;
mod rogue;
mod streams;
mod terminal;
mod transfers;
