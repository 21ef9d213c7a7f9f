//! The integration tests, as one program: each would otherwise be linked by itself, which took most of the time of a cold
//! `cargo test`. See tests/README.md.

mod cli;
mod congestion;
mod content;
mod dedupe;
mod every_kind;
mod existing;
mod faithful;
mod faults;
mod filter;
mod folding;
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
mod store;
mod support;
mod sync;
mod trust;
