//! A relay over real sockets on loopback: what it grants and refuses, and relays and guests that break every rule.

mod abuse;
mod datagrams;
mod finding;
mod floods;
mod rogue;
mod stage;
