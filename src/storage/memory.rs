//! A store in memory: the reference of the conformance tests.

mod behaviour;
mod content;
mod nodes;
mod shared;
mod store;
mod upload;

pub use store::MemoryStore;
