//! What stands in a store, by name: patterns expanded and directories listed, both in bounded memory however many names
//! there are.

mod expand;
mod walk;

pub(crate) use expand::{Effort, Expanded, expand};
pub(crate) use walk::Walk;
