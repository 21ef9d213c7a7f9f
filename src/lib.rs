//! haul moves files between machines over QUIC: fast where the network is lossy or far away, safe against a hostile peer,
//! honest about what has reached the disk.
//!
//! The library does all that the `haul` command does, and prints nothing: results are values, progress is
//! [events](progress::Event), operators read [`tracing`] spans (`connection`, `transfer`) and events. It runs on tokio.
//!
//! ```
//! # async fn example() -> haul::error::Result<()> {
//! use std::sync::Arc;
//! use haul::client::{Client, PushOptions};
//! use haul::config::Config;
//! use haul::auth::identity::Identity;
//! use haul::protocol::path::RelativePath;
//! use haul::server::{Server, ServerOptions};
//! use haul::storage::LocalStore;
//! use haul::auth::trust::{Admission, Anyone, ServerTrust};
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
//!     observer: haul::transfer::events::ignore(),
//! })?;
//! let port = server.local_addresses()[0].port();
//! tokio::spawn(server.run(std::future::pending(), std::future::pending()));
//!
//! // A client that knows the server by its key, and sends.
//! let client = Client::connect(&Identity::generate()?, &trust, "127.0.0.1", port, &Config::default()).await?;
//! let options = PushOptions {
//!     sources: vec!["Cargo.toml".into()],
//!     destination: RelativePath::root(),
//!     into: true,
//!     ..PushOptions::default()
//! };
//! let outcome = client.push(&options, haul::transfer::events::ignore()).await?;
//! assert_eq!(outcome.sent.failed, 0);
//! client.close().await;
//! # Ok(())
//! # }
//! # tokio::runtime::Runtime::new().unwrap().block_on(example()).unwrap();
//! ```
//!
//! # Rooms
//! Each uses only those before it: [`path`], [`error`], [`filter`], [`rate`], [`wire`], [`progress`], [`config`] and
//! [`target`] are plain values; [`index`] remembers digests; [`limits`] and [`bucket`] bound files and what is sent; [`identity`],
//! [`trust`], [`endpoint`] and [`stream`] make connections, and a [`budget`] bounds their memory; [`measure`] measures them; [`store`] holds
//! files, and a [`pipe`] is read once; [`manifest`],
//! [`sender`] and [`receiver`] are the transfer's two roles, and [`verdict`] says what bound it; [`session`], [`server`]
//! and [`client`] put them together, and a [`peer`] is met by a code, perhaps at a [`relay`]. PROTOCOL.md specifies what travels.

mod auth;
mod bench;
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

pub use auth::identity::{Home, Identity, KeyId};
pub use auth::trust::ServerTrust;
pub use auth::{Admission, Anyone, Guests, Rights, known_hosts, peers};
pub use bench::{Load, MeasureOptions, Measurement, RoundTrips};
pub use client::{Client, PullOptions, PushOptions};
pub use config::{Config, written};
pub use congestion::Congestion;
pub use error::text::{PeerText, is_unprintable, printable};
pub use error::{Code, Error, Reason, Result};
pub use protocol::path::{BadName, RelativePath};
pub use protocol::rate::Rate;
pub use protocol::target::{Argument, Host, Petname, Target};
pub use protocol::{
    Attribute, Components, DEFAULT_PORT, Delete, Durability, Existing, Kind, Listed,
    MetadataWarning, Offer, Probe, ReceiveOptions, Summary, Time, Xattr,
};
pub use relay::{Allowance, Relay, RelayOptions};
pub use server::{Server, ServerOptions};
pub use storage::digest_index::Index;
pub use storage::filter::{Filter, Only, Rules, lines};
pub use storage::open_files::raise_open_files;
pub use storage::pipe::Pipe;
pub use storage::walk::{Follow, WalkOptions};
pub use storage::{
    Attributes, Folding, LocalStore, MemoryStore, Metadata, MetadataWarnings, PartialKey, Source,
    Store, TimeProbe, Upload, Version,
};
pub use transfer::bottleneck::{Bottleneck, Cpu, PathStats, TimeBreakdown};
pub use transfer::events::{Event, Observer, Route, Settled, ignore};
pub use transfer::receive::AcceptedQuota;
pub use transfer::send::TransferStats;
pub use transfer::session::{ListItem, Listing, Outcome};

/// What haul's own tests and benchmarks need of the inside: messages, streams and raw endpoints. No part of the API:
/// any release may change it.
#[doc(hidden)]
pub mod internal {
    pub mod auth {
        pub use crate::auth::*;
    }
    pub mod bench {
        pub use crate::bench::*;
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
