//! The server behind an offering.

use std::net::SocketAddr;

use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::net::endpoint::Port;
use crate::server::Server;

/// A server that runs in a task. Dropping it ends the server at once.
pub(super) struct RunningServer {
    pub(super) addresses: Vec<SocketAddr>,
    /// The first port that it listens on.
    pub(super) port: Port,
    pub(super) stop: CancellationToken,
    pub(super) stop_now: CancellationToken,
    pub(super) task: AbortOnDropHandle<()>,
}

impl RunningServer {
    pub(super) fn spawn(server: Server) -> Self {
        let addresses = server.local_addresses();
        let port = server.ports()[0].clone();
        let stop = CancellationToken::new();
        let stop_now = CancellationToken::new();
        let run = server.run(
            stop.clone().cancelled_owned(),
            stop_now.clone().cancelled_owned(),
        );
        Self {
            addresses,
            port,
            stop,
            stop_now,
            task: AbortOnDropHandle::new(tokio::spawn(run)),
        }
    }
}
