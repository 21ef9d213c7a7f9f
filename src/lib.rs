//! haul

pub mod config;
pub mod error;
pub mod path;
pub mod progress;
pub mod store;
pub mod wire;
