//! The integration tests, as one program: each would otherwise be linked by itself, which took most of the time of a cold
//! `cargo test`. See tests/README.md.

mod cli;
mod congestion;
mod content;
mod dedupe;
mod durable;
mod every_kind;
mod existing;
mod faithful;
mod faults;
mod filter;
mod follow;
mod hostile;
mod kill;
mod lan;
mod layering;
mod lossy;
mod ls;
mod measure;
mod nat;
mod owner;
mod pair;
mod pipe;
mod protocol;
mod pull;
mod relay;
mod retry;
mod send;
mod session;
mod sources;
mod store;
mod support;
mod sync;
mod system;
mod trust;
mod turns;
