//! Finds out that a server is gone before the idle timeout does, and never takes an outage for that.

use std::future::pending;
use std::time::Duration;

use quinn::Connection;
use tokio::time::{sleep, timeout};

use crate::net::{connect, reachability};

/// How long beyond a keep-alive an answer to it may take before a connection counts as silent.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Times in a row that the port is seen closed before the server counts as gone: a firewall that is being set up may
/// refuse for a moment.
const REFUSALS: u32 = 3;

/// How long the server may take to confirm a handshake (RFC 9001, section 4.1.2), at least, and in round-trip times.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(3);
const CONFIRM_ROUND_TRIPS: u32 = 8;

/// Ends when the handshake's last packet, or what answers it, must have been lost: the server reads nothing before it has
/// that packet, and quinn sends it again only after the patience that it has learned in the handshake, which may be a minute.
pub(super) async fn unconfirmed(connection: &Connection) -> String {
    sleep(CONFIRM_TIMEOUT.max(connection.rtt() * CONFIRM_ROUND_TRIPS)).await;
    if connection.stats().frame_rx.handshake_done > 0 {
        return pending().await;
    }
    "the end of the handshake was lost".into()
}

/// Ends once the connection is silent and the system tells that nothing has the server's port: its process is gone, and
/// with it the connection. When the next process comes it says so itself, by a stateless reset. In an outage nobody
/// tells anything, and only the idle timeout decides.
///
/// A connection that falls silent goes on from another port, once each time, where it has an endpoint of its own.
pub(super) async fn gone(
    endpoint: Option<&quinn::Endpoint>,
    connection: &Connection,
    keep_alive: Duration,
) -> String {
    let arrived = || connection.stats().udp_rx.datagrams;
    let mut before = arrived();
    let mut silent = false;
    let mut refusals = 0;
    while refusals < REFUSALS {
        sleep(if silent {
            ANSWER_TIMEOUT
        } else {
            keep_alive + ANSWER_TIMEOUT
        })
        .await;
        let now = arrived();
        if now != before {
            before = now;
            silent = false;
            refusals = 0;
            continue;
        }
        let address = connection.remote_address();
        if !silent
            && let Some(endpoint) = endpoint
            && let Err(error) = connect::rebind(endpoint, address)
        {
            tracing::debug!(%error, "no other port");
        }
        silent = true;
        match timeout(ANSWER_TIMEOUT, reachability::port_is_closed(address)).await {
            Ok(()) => refusals += 1,
            Err(_) => refusals = 0,
        }
    }
    "nothing listens there any more".into()
}
