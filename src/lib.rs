//! haul moves files between machines over QUIC. It is fast on lossy and long networks, verifies every file, and never
//! leaves half a file under its final name.
//!
//! The library does everything that the `haul` command does, and prints nothing. Results are values, progress arrives as
//! [`Event`]s, and operators read [`tracing`] spans (`connection`, `transfer`). It runs on tokio.
//!
//! # Send files
//! A [`Client`] connects to one server, knows it by its key, and pushes files:
//!
//! ```
//! # async fn example() -> haul::Result<()> {
//! use std::sync::Arc;
//! use haul::{
//!     Admission, Anyone, Client, Config, Identity, LocalStore, PushOptions, Server, ServerOptions, ServerTrust,
//! };
//!
//! // A server that takes files from everybody into one directory, and never writes anywhere else.
//! let inbox = std::env::temp_dir();
//! let identity = Identity::generate()?;
//! let trust = ServerTrust { pin: Some(identity.key_id()), ..ServerTrust::default() };
//! let server = Server::bind(ServerOptions {
//!     listen: vec!["127.0.0.1:0".parse().unwrap()],
//!     identity,
//!     admission: Admission { anyone: Anyone { read: false, write: true }, ..Admission::default() },
//!     store: Arc::new(LocalStore::open(&inbox)?),
//!     config: Config::default(),
//!     observer: haul::ignore(),
//! })?;
//! let port = server.local_addresses()[0].port();
//! tokio::spawn(server.run(std::future::pending(), std::future::pending()));
//!
//! // A client that knows the server by its key.
//! let client = Client::connect(&Identity::generate()?, &trust, "127.0.0.1", port, &Config::default()).await?;
//! let options = PushOptions { sources: vec!["Cargo.toml".into()], into: true, ..PushOptions::default() };
//! let outcome = client.push(&options, haul::ignore()).await?;
//! assert_eq!(outcome.sent.failed, 0);
//! client.close().await;
//! # Ok(())
//! # }
//! # tokio::runtime::Runtime::new().unwrap().block_on(example()).unwrap();
//! ```
//!
//! Files that fail do not fail the session: they are in [`TransferStats::failures`], each with its [`Reason`].
//!
//! # Fetch files
//! ```no_run
//! # async fn example(client: haul::Client) -> haul::Result<()> {
//! use haul::{PullOptions, RelativePath};
//!
//! let photos = RelativePath::from_components(["photos"]).expect("a valid name");
//! let options = PullOptions { sources: vec![photos], destination: "backup".into(), ..PullOptions::default() };
//! let outcome = client.pull(&options, haul::ignore()).await?;
//! println!("{} files, {} were unchanged", outcome.sent.files, outcome.sent.skipped);
//! # Ok(())
//! # }
//! ```
//!
//! # Serve a directory
//! [`Server::run`] takes two futures: the first asks for a graceful stop, the second ends the wait for transfers under way.
//! `examples/upload_service.rs` is a whole service.
//!
//! # Follow progress
//! An [`Observer`] takes [`Event`]s from the tasks that do the work, so it must be quick and must not block:
//!
//! ```
//! use std::sync::Arc;
//! use haul::{Event, Observer, Settled};
//!
//! let observer: Observer = Arc::new(|event| {
//!     if let Event::Settled { path, result: Settled::Failed(reason), .. } = event {
//!         eprintln!("{path}: {reason}");
//!     }
//! });
//! ```
//!
//! # Cancel
//! Drop the future of [`Client::push`] or [`Client::pull`]. Committed files stay, and the receiver keeps partials of the
//! rest; the same call later goes on from there. [`Client::cancel`] tells the server as well (`examples/cancel.rs`).
//!
//! # Send by a code
//! Two machines that know nothing of each other meet by a short code: see [`pairing`], `examples/send_by_code.rs` and
//! `examples/receive_by_code.rs`.
//!
//! # Measure a path
//! [`Client::measure`] measures the path to a server without touching a disk: see [`bench`](mod@bench).
//!
//! # Use your own store
//! Files are read from and committed to a [`Store`]. A [`LocalStore`] is a directory, a [`MemoryStore`] keeps everything in
//! memory, and `examples/own_store.rs` wraps one to add its own rule.
//!
//! ARCHITECTURE.md describes the inside of the library; PROTOCOL.md specifies what travels.

mod auth;
pub mod bench;
mod client;
mod config;
mod congestion;
mod error;
mod net;
pub mod pairing;
mod protocol;
mod relay;
mod server;
mod storage;
mod transfer;

pub use auth::home::Home;
pub use auth::identity::{Identity, KeyId};
pub use auth::trust::ServerTrust;
pub use auth::{Admission, Anyone, Rights, known_hosts, peers};
pub use client::{Client, PullOptions, PushOptions};
pub use config::Config;
pub use congestion::Congestion;
pub use error::text::{PeerText, printable};
pub use error::{Code, Error, Reason, Result};
pub use protocol::path::{BadName, RelativePath};
pub use protocol::rate::Rate;
pub use protocol::target::{Argument, Host, Petname, Target};
pub use protocol::{
    Attribute, DEFAULT_PORT, Delete, Durability, Existing, Kind, Listed, MetadataWarning, Offer,
    ReceiveOptions, Summary, Time, Xattr,
};
pub use relay::{Allowance, Relay, RelayOptions};
pub use server::{Server, ServerOptions};
pub use storage::digest_index::Index;
pub use storage::filter::{Filter, Only, Rules};
pub use storage::pipe::Pipe;
pub use storage::walk::{Follow, WalkOptions};
pub use storage::{
    Attributes, FileId, Folding, LocalStore, MemoryStore, Metadata, MetadataWarnings, OwnerIds,
    PartialKey, Source, Store, TimeProbe, Upload, Version,
};
pub use transfer::bottleneck::{Bottleneck, Cpu, PathStats, TimeBreakdown};
pub use transfer::events::{Event, Observer, Route, Settled, ignore};
pub use transfer::receive::AcceptedQuota;
pub use transfer::session::{ListItem, Listing, Outcome};
pub use transfer::stats::TransferStats;

/// What haul's own command, tests and benchmarks need of the inside: messages, streams and raw endpoints. No part of the
/// API: any release may change it.
#[doc(hidden)]
pub mod internal {
    pub mod auth {
        pub use crate::auth::*;
    }
    pub mod config {
        pub use crate::config::*;
    }
    pub mod error {
        pub use crate::error::*;
    }
    pub mod net {
        pub use crate::net::*;
    }
    pub mod protocol {
        pub use crate::protocol::*;
    }
    pub mod relay {
        pub use crate::relay::*;
    }
    pub mod server {
        pub use crate::server::*;
    }
    pub mod storage {
        pub use crate::storage::*;
    }
    pub mod transfer {
        pub use crate::transfer::*;
    }
}
