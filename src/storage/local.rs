//! A store on disk: one directory, held as an open descriptor and never left.
//!
//! `root` opens directories without following links, and `reserved` refuses this machine's keys. `names`, `partial`,
//! `lock` and `upload` make a file appear whole under its final name. The others serve one kind of call each.

mod attributes;
mod descriptor;
mod directory;
mod durable_names;
mod folding;
mod holes;
mod links;
mod lock;
mod names;
mod open;
mod partial;
mod read_only;
mod reserved;
mod root;
mod source;
mod stat;
mod store;
mod sweep;
mod sync;
mod time_probe;
mod unsized_files;
mod upload;
mod xattr;

pub use store::LocalStore;

#[cfg(all(test, target_os = "linux"))]
mod tests;
