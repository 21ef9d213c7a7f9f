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
//! use haul::identity::Identity;
//! use haul::path::RelativePath;
//! use haul::server::{Server, ServerOptions};
//! use haul::store::LocalStore;
//! use haul::trust::{Admission, Anyone, ServerTrust};
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
//!     observer: haul::progress::ignore(),
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
//! let outcome = client.push(&options, haul::progress::ignore()).await?;
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

pub mod bucket;
pub mod budget;
pub mod client;
pub mod config;
pub mod congestion;
pub mod endpoint;
pub mod error;
pub mod filter;
pub mod identity;
pub mod index;
pub mod limits;
mod listing;
pub mod manifest;
pub mod measure;
mod owners;
pub mod path;
pub mod peer;
pub mod pipe;
pub mod progress;
mod qlog;
pub mod rate;
pub mod receiver;
pub mod relay;
pub mod sender;
pub mod server;
pub mod session;
pub mod store;
pub mod stream;
pub mod target;
pub mod text;
pub mod trust;
mod upkeep;
pub mod verdict;
pub mod wire;
