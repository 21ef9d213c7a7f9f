//! The context of a session: what every step of it needs beside its own values.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::events::Observer;
use super::session::PeerConnection;
use crate::config::Config;
use crate::net::rate_limit::RateLimits;

/// The context of the sessions on one connection. Each end makes it once: a server for all sessions of the connection,
/// a client for each, because each may have its own observer.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) connection: Arc<PeerConnection>,
    /// Limits and deadlines.
    pub(crate) config: Arc<Config>,
    /// The rate limits of everything that this end sends.
    pub(crate) limits: RateLimits,
    pub(crate) observer: Observer,
    /// Cancelled when this end begins nothing new.
    pub(crate) stopping: CancellationToken,
}
