//! Sessions: the control stream of a push, pull or list from its request to its summary, at both ends.
//!
//! A connection may carry several sessions, each with its own control stream. The id of that stream is the *handle* of
//! the session. The other streams of the session begin with the handle, by which `connection.rs` finds the session.
//!
//! The course of a push is in `sending.rs` at the client and in `receiving.rs` at the server, that of a pull the other way
//! round. `serve.rs` reads the requests of clients.

mod connection;
mod content;
mod destination;
mod list;
pub(crate) mod nesting;
mod outcome;
mod receiving;
mod request;
mod sending;
mod serve;
mod serve_list;
mod server_context;
mod sources;
mod table;

pub(crate) use connection::{ConnectionMemory, PeerConnection, Purpose};
pub use content::{OfferEvent, OfferedContent, OfferedSource};
pub use list::{ListItem, Listing};
pub use outcome::Outcome;
pub(crate) use receiving::{Delivered, pull};
pub(crate) use request::hello;
pub(crate) use sending::push;
pub(crate) use serve::serve;
pub(crate) use serve_list::listings;
pub(crate) use server_context::ServerContext;
pub(crate) use sources::local_sources;
