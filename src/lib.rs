//! haul

pub mod budget;
pub mod client;
pub mod config;
pub mod endpoint;
pub mod error;
pub mod identity;
pub mod limits;
pub mod manifest;
pub mod path;
pub mod progress;
pub mod receiver;
pub mod sender;
pub mod server;
pub mod session;
pub mod store;
pub mod stream;
pub mod target;
pub mod trust;
pub mod wire;
