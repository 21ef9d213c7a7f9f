//! The receiver: writes the streams of a session to the store.
//!
//! The course of an entry:
//!
//! | step | file |
//! |---|---|
//! | entries are read in batches, and verdicts are written | `manifest.rs`, `batch.rs` |
//! | the name is checked, and what exists in its place is looked at | `examine.rs` |
//! | the decision, a function of values | `decide.rs` |
//! | what needs no content is made at once, and reported when it is on the disk | `apply.rs`, `durable.rs` |
//! | what may have the same content is compared | `compare.rs` |
//! | a small file waits for memory, a large one for a permit, and then `Want` is sent | `admit.rs` |
//! | one transfer, from its `Want` to its receipt | `download.rs`, `file_writer.rs` |
//! | the commit | `commit.rs` |
//! | a mirror removes what was not announced | `mirror.rs` |
//!
//! [`Receiver`] runs these tasks. They share a `Session`, and its statistics are the only account of results.

mod admit;
mod apply;
mod attributes;
mod batch;
mod body_reader;
mod commit;
mod compare;
mod decide;
mod dedupe;
mod download;
mod durable;
mod entry_credit;
mod examine;
mod file_locks;
mod file_writer;
mod hard_links;
mod manifest;
mod mirror;
mod name_collisions;
mod options;
mod partial;
mod path_list;
mod pieces;
mod placement;
mod plan_check;
mod quota;
mod receiver;
mod session;
mod streams;
mod times;
mod turn;
mod wanted;
mod zeros;

pub use crate::transfer::stats::SessionStats;
pub use file_locks::FileLocks;
pub(crate) use file_locks::{Claimant, FileLock};
pub use options::{Keep, Policy, ReceiveContext, Receiving, Target};
pub use placement::{Placement, RequestedNames, Sources};
pub use quota::AcceptedQuota;
pub use receiver::Receiver;
