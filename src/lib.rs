//! haul

pub mod config;
pub mod endpoint;
pub mod error;
pub mod identity;
pub mod path;
pub mod progress;
pub mod store;
pub mod wire;
