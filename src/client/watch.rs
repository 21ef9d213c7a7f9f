//! Detects a server that has exited before the idle timeout does, without taking a network outage for it.

use std::future::pending;
use std::time::Duration;

use quinn::Connection;
use tokio::time::{sleep, timeout};

use crate::net::{connect, reachability};

/// Time for the answer to a keep-alive before a connection counts as silent.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Refusals in a row by the server's port before the server counts as exited. A firewall that is being set up may refuse for a
/// moment.
const REFUSALS: u32 = 3;

/// Minimum time for the server to confirm a handshake (RFC 9001, section 4.1.2).
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(3);
/// The same in round-trip times; the longer one counts.
const CONFIRM_ROUND_TRIPS: u32 = 8;

/// Returns once the handshake's last packet, or the answer to it, must have been lost. The server reads nothing before it has that
/// packet, and quinn repeats it only after the probe timeout that it has learned in the handshake, which may be a minute.
pub(super) async fn handshake_lost(connection: &Connection) -> String {
    sleep(CONFIRM_TIMEOUT.max(connection.rtt() * CONFIRM_ROUND_TRIPS)).await;
    if connection.stats().frame_rx.handshake_done > 0 {
        return pending().await;
    }
    "the end of the handshake was lost".into()
}

/// Returns once the connection is silent and the system reports that the server's port is closed: the server's process has
/// exited, and the connection with it. A new process answers with a stateless reset instead. In a network outage there is no
/// report, and only the idle timeout decides.
///
/// A connection with an endpoint of its own moves to another port, once each time that it falls silent.
pub(super) async fn server_exited(
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
            tracing::debug!(%error, "cannot move to another port");
        }
        silent = true;
        match timeout(ANSWER_TIMEOUT, reachability::port_is_closed(address)).await {
            Ok(()) => refusals += 1,
            Err(_) => refusals = 0,
        }
    }
    "no process has the server's port any more".into()
}
