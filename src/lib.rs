//! haul
pub mod error;
pub mod path;
pub mod wire;
pub mod progress;
pub mod config;
