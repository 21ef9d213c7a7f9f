//! A relay over real sockets on loopback, what it gives and refuses, and relays and guests that break every rule.

#[path = "relay/abuse.rs"]
mod abuse;
#[path = "relay/datagrams.rs"]
mod datagrams;
#[path = "relay/finding.rs"]
mod finding;
#[path = "relay/rogue.rs"]
mod rogue;
#[path = "relay/stage.rs"]
mod stage;
mod support;
