//! A mirror: the destination loses what the source does not have.
//!
//! An entry of another kind in the place of an announced one is removed before the new one is made. All other unannounced
//! paths are removed in the last step, and only if everything else succeeded.

mod announced;
mod obstacles;
mod removal;
#[cfg(test)]
mod tests;
mod walk;

pub(super) use announced::Announced;
pub(super) use removal::{Announcement, Removal};
pub(super) use walk::{ClearedPaths, Mirror};
