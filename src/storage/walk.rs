//! Walks the sources of a session into entries to announce.

mod announce;
mod follow;
pub(crate) mod gitignore;
mod item;
mod options;
mod tree;
mod walker;

pub use announce::{Announce, Extra, PendingDirectory};
pub use item::WalkItem;
pub use options::{Follow, WalkOptions};
pub use tree::{LocalTrees, Tree};
pub use walker::Walk;
