//! Limits and timings, with defaults and units.

use std::path::PathBuf;
use std::time::Duration;

use crate::congestion::Congestion;
use crate::protocol::rate::Rate;
use crate::storage::digest_index::Index;

/// Limits and timings of an endpoint. `Config::default()` suits both ends.
#[derive(Debug, Clone)]
pub struct Config {
    /// Files that are written to the store at the same time, over all connections: the permits. Half of them are for
    /// small files.
    pub max_transfers: usize,
    /// Connections served at the same time: the places of a server. A client takes one once its key is admitted. A key that is
    /// not known gets none of the last eighth, and one key gets half of them at most. When there is none left, a connection
    /// that has been idle for 5 s or more is closed for a new one; else that one is refused as busy.
    pub max_connections: usize,
    /// How long a server waits for a client's handshake, from its first datagram. Handshakes take no place.
    pub half_open: Duration,
    /// Bytes that all connections together may have received and not yet written: the sum of their receive windows.
    /// Half is reserved for new connections, 32 KiB each; the other half of 64 MiB carries 1 Gbit/s at 200 ms (25 MB).
    /// Credit that idle peers were granted and have not used counts beside it, up to four times as much, and an eighth
    /// of this for each key.
    pub memory: usize,
    /// Unacknowledged bytes that a client keeps (quinn's `send_window`); this also limits a sender's memory. 48 MiB
    /// carry 1 Gbit/s at 200 ms, with as much again in retransmission.
    pub send_window: usize,
    /// Unacknowledged bytes that all connections of a server together keep, beyond 1 MiB each; pulls over long paths
    /// need them. Ten at 1 Gbit/s and 200 ms fit into 256 MiB.
    pub send_memory: usize,
    /// Bytes of what all peers together make a server keep: names of directories, rules, tables of paths, entries without
    /// an answer. A connection may take a tenth, and a key a quarter of what is free; a quarter is reserved for small
    /// shares. 128 MiB suffice for ten mirrors of a million files; what does not fit is refused or takes longer.
    pub session_memory: usize,
    /// The congestion controller.
    pub congestion: Congestion,
    /// Transfers that a sender opens at the same time on a connection. At 100 ms, 100 streams carry 450 small files a
    /// second and 1,000 carry 2,400.
    pub parallel: usize,
    /// Highest rate at which a [`Client`](crate::client::Client), or a [`Server`](crate::server::Server) over all its
    /// connections, sends. It counts the bytes of all streams, without QUIC, UDP and IP headers (some 5 %) and
    /// retransmissions. A client that pulls asks the server for it; the server obeys the lower of this and its own.
    pub limit: Option<Rate>,
    /// Directory for a qlog trace of each connection and each attempt; created if missing. Needs the feature `qlog`.
    /// A trace ends at the first write error, which does not affect the connection.
    pub qlog: Option<PathBuf>,
    /// Whether a server lets its clients set owners, groups, set-user-ID and the like. A server that runs as root
    /// then accepts programs that run as root from every client that may write.
    pub allow_owner: bool,
    /// Index of the digests of large files, so that existing content need not be sent: a client announces the digests
    /// that it knows, and a server looks them up. `None`: all wanted content is sent.
    pub index: Option<Index>,
    /// A directory that no pull may change: the directory of this machine's keys and settings, such as
    /// [`Home::path`](crate::auth::home::Home::path); see
    /// [`LocalStore::open_reserving`](crate::storage::LocalStore::open_reserving). A server's store reserves it itself.
    pub reserved: Option<PathBuf>,
    /// Whether a server lets clients that may write delete existing files, as a mirror does.
    pub allow_delete: bool,
    /// Age since the last write at which a server removes a partial, at its start and once a day.
    pub keep_partials: Duration,
    /// How long a stopping server waits for running transfers.
    pub grace: Duration,
    /// Time without progress (nothing, or less than 1 MiB) after which a transfer is parked until it moves
    /// again.
    pub stall: Duration,
    /// Silence after which a stream, a transfer or a wait for an answer is given up.
    pub deadline: Duration,
    /// How long a measurement may load the path in one direction.
    pub max_measurement: Duration,
    /// Silence after which a connection is lost. At least 60 s: quinn's probes back off, so after an outage of 20 s
    /// the next one may be sent 38 s after the outage began.
    pub idle_timeout: Duration,
    /// Interval at which a client keeps an idle connection alive; servers never do.
    pub keep_alive: Duration,
    /// How long a client tries to reconnect and resume a session. It counts from the loss of the connection, and
    /// restarts when the receiver has made progress. Zero: never.
    pub retry_for: Duration,
    /// How long a client waits for the first datagram of a server.
    pub first_reply: Duration,
    /// How long a client's handshake may take in all, once a datagram has arrived.
    pub handshake: Duration,
}

/// Send window under a rate limit, as time at that rate: buffered bytes go out at full speed once the network
/// recovers from an outage. Two round trips of a satellite link, doubled for retransmission.
const RATE_LIMITED_BACKLOG: Duration = Duration::from_secs(2);
/// Smallest send window in bytes under any rate limit: some packets must be in flight.
const MIN_BACKLOG_SIZE: usize = 64 << 10;

impl Config {
    /// The [`send_window`](Self::send_window), reduced to suit the [`limit`](Self::limit).
    pub fn limited_send_window(&self) -> usize {
        let backlog = self.limit.map(|rate| {
            (rate.bytes() * RATE_LIMITED_BACKLOG.as_secs()).max(MIN_BACKLOG_SIZE as u64)
        });
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
            half_open: Duration::from_secs(5),
            memory: 64 << 20,
            send_window: 48 << 20,
            send_memory: 256 << 20,
            session_memory: 128 << 20,
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

/// Formats a duration for people: `30 s`, `10 min`, `2 h`.
pub fn display_duration(time: Duration) -> String {
    match time.as_secs() {
        0 => "0 s".into(),
        seconds if seconds % 3600 == 0 => format!("{} h", seconds / 3600),
        seconds if seconds % 60 == 0 => format!("{} min", seconds / 60),
        seconds => format!("{seconds} s"),
    }
}
