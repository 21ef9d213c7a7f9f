//! Stores: where files are read from and committed to.
//!
//! Every call blocks; callers run them off the network threads. [`LocalStore`] is one directory that no call leaves.
//! [`MemoryStore`] holds files in memory and is the reference of the conformance tests. [`OutputStore`] takes one file
//! in order and cannot be read.
//!
//! The traits are in `store`, `source` and `upload`, and the values that they take and return in `metadata`, `file_id`
//! and `folding`. `walk`, `filter` and `pipe` find what a session sends, `listing` and `expand` what a list shows.

pub mod digest_index;
pub(crate) mod expand;
mod file_id;
pub mod filter;
mod folding;
pub(crate) mod io_errors;
pub(crate) mod kept_memory;
pub(crate) mod listing;
mod local;
mod memory;
mod metadata;
pub mod open_files;
mod output;
pub mod pipe;
pub(crate) mod sorted_names;
mod source;
mod store;
mod upload;
pub(crate) mod users;
pub mod walk;

pub use file_id::{FileId, FileKey, Version};
pub use folding::Folding;
pub(crate) use folding::{has_forms, trimmed};
pub use kept_memory::{Held, KeptMemory, KeptShare};
pub use local::LocalStore;
pub use memory::MemoryStore;
pub use metadata::{
    ALL_PERMISSIONS, Attributes, Metadata, MetadataWarnings, OwnerIds, PERMISSIONS,
};
pub use output::OutputStore;
pub use source::{Source, digest};
pub use store::{Store, TimeProbe};
pub use upload::{PartialKey, Upload};
