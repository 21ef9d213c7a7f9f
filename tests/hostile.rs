//! Peers that keep to nothing, against a real server and a real client: whatever they do, the honest side neither
//! panics nor hangs, keeps to its bounds and its place, and goes on serving everybody else.

#[path = "hostile/acks.rs"]
mod acks;
#[path = "hostile/agreed.rs"]
mod agreed;
#[path = "hostile/early.rs"]
mod early;
#[path = "hostile/fetch.rs"]
mod fetch;
#[path = "hostile/links.rs"]
mod links;
#[path = "hostile/messages.rs"]
mod messages;
#[path = "hostile/names.rs"]
mod names;
#[path = "hostile/peer.rs"]
mod peer;
#[path = "hostile/resources.rs"]
mod resources;
#[path = "hostile/rogue.rs"]
mod rogue;
#[path = "hostile/streams.rs"]
mod streams;
mod support;
#[path = "hostile/transfers.rs"]
mod transfers;
