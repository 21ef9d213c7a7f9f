//! Plain values with defaults and units.

use std::path::PathBuf;
use std::time::Duration;

use crate::congestion::Congestion;
use crate::protocol::rate::Rate;
use crate::storage::digest_index::Index;

/// Limits and timings of an endpoint. `Config::default()` suits both ends.
#[derive(Debug, Clone)]
pub struct Config {
    /// Transfers that write to the store at the same time, over all connections: the permits of the one semaphore.
    pub max_transfers: usize,
    /// Connections served at the same time; one more is refused as busy.
    pub max_connections: usize,
    /// Bytes that all connections together may have received and not yet written: the sum of their receive windows.
    /// Half of it is kept for connections to come; the other half of 64 MiB carries 1 Gbit/s at 200 ms (25 MB).
    pub memory: usize,
    /// Bytes that a client keeps until they are acknowledged (quinn's `send_window`). Also what bounds a sender's
    /// memory. 48 MiB carry 1 Gbit/s at 200 ms with as much again in retransmission.
    pub send_window: usize,
    /// Bytes that all connections of a server together may keep until they are acknowledged, beyond 1 MiB each: what pulls
    /// over long paths are made of. Ten at 1 Gbit/s and 200 ms fit into 256 MiB.
    pub send_memory: usize,
    /// What decides how much may be in flight towards the peer.
    pub congestion: Congestion,
    /// Transfers that a sender has open at the same time on a connection. At 100 ms, 100 streams carry 450 small files
    /// a second and 1,000 carry 2,400.
    pub parallel: usize,
    /// What a [`Client`](crate::client::Client), or a [`Server`](crate::server::Server) over all its connections, sends
    /// at most: the bytes of all streams, without what QUIC, UDP and IP add (some 5 %, and what is sent again after a
    /// loss). A client that pulls asks the server for it, which obeys the lower of this and its own.
    pub limit: Option<Rate>,
    /// Where each connection, and each attempt at one, writes a qlog trace: a directory, made if it is missing. Needs the
    /// feature `qlog`. A trace that cannot be written ends there, and is no error to the connection.
    pub qlog: Option<PathBuf>,
    /// A server lets its clients set owners, groups, set-user-ID and the like: as root it then takes programs that run as
    /// root from whoever may write.
    pub allow_owner: bool,
    /// Where the digests of large files are remembered, so that content that is there already need not be sent: a client
    /// announces what it knows, a server looks for it. None: everything that is wanted is sent.
    pub index: Option<Index>,
    /// A directory that nothing which a client pulls may change: the one with this machine's keys and settings, such as
    /// [`Home::path`](crate::auth::identity::Home::path); see [`LocalStore::open_reserving`](crate::storage::LocalStore::open_reserving).
    /// A server is given a store that reserves it.
    pub reserved: Option<PathBuf>,
    /// Whether a server lets clients that may write remove what stands in its directory, as a mirror does.
    pub allow_delete: bool,
    /// Partials that were not written to for so long are removed by a server, at its start and once a day.
    pub keep_partials: Duration,
    /// How long a stopping server lets transfers under way go on.
    pub grace: Duration,
    /// A transfer that moved nothing, or less than 1 MiB, for so long gives its permit back until it moves again.
    pub stall: Duration,
    /// A stream, transfer or answer that is silent for so long is given up.
    pub deadline: Duration,
    /// How long a measurement may load the way in one direction.
    pub max_measurement: Duration,
    /// A connection on which nothing at all arrives for so long is lost. At least 60 s: quinn's probes back off, so after
    /// an outage of 20 s the next one may come as much as 38 s after its begin.
    pub idle_timeout: Duration,
    /// How often a client keeps an idle connection alive; servers never do.
    pub keep_alive: Duration,
    /// How long a client tries to go on with a session whose connection was lost. It counts from the loss; a connection
    /// over which the receiver came further begins it anew. Zero: never.
    pub retry_for: Duration,
    /// How long a client waits for the first datagram of a server.
    pub first_reply: Duration,
    /// How long a handshake may take in all, once a datagram has come back.
    pub handshake: Duration,
}

/// Under a limit, so much time of it may wait in a connection: what has piled up there goes out at full speed once the
/// network recovers from an outage. Two round trips of a satellite link, with as much again for what is sent twice.
const LIMITED_BACKLOG: Duration = Duration::from_secs(2);
/// Bytes that may wait in a connection at any limit: some packets must be under way.
const MIN_BACKLOG: usize = 64 << 10;

impl Config {
    /// [`send_window`](Self::send_window), or as much of it as suits the [`limit`](Self::limit).
    pub fn limited_send_window(&self) -> usize {
        let backlog = self
            .limit
            .map(|rate| (rate.bytes() * LIMITED_BACKLOG.as_secs()).max(MIN_BACKLOG as u64));
        backlog.map_or(self.send_window, |backlog| {
            self.send_window
                .min(usize::try_from(backlog).unwrap_or(usize::MAX))
        })
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_transfers: 100,
            max_connections: 1024,
            memory: 64 << 20,
            send_window: 48 << 20,
            send_memory: 256 << 20,
            congestion: Congestion::default(),
            parallel: 1000,
            limit: None,
            qlog: None,
            allow_owner: false,
            index: None,
            reserved: None,
            allow_delete: false,
            keep_partials: Duration::from_secs(7 * 24 * 3600),
            grace: Duration::from_secs(30),
            stall: Duration::from_secs(10),
            deadline: Duration::from_secs(60),
            max_measurement: Duration::from_secs(60),
            idle_timeout: Duration::from_secs(60),
            keep_alive: Duration::from_secs(5),
            retry_for: Duration::from_secs(10 * 60),
            first_reply: Duration::from_secs(5),
            handshake: Duration::from_secs(30),
        }
    }
}

/// A time as people write it: `30 s`, `10 min`, `2 h`.
pub fn written(time: Duration) -> String {
    match time.as_secs() {
        0 => "0 s".into(),
        seconds if seconds % 3600 == 0 => format!("{} h", seconds / 3600),
        seconds if seconds % 60 == 0 => format!("{} min", seconds / 60),
        seconds => format!("{seconds} s"),
    }
}
