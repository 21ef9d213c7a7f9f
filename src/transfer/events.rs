//! The events of a session. The library reports them to an [`Observer`] and never prints.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::error::text::PeerText;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::protocol::{Kind, Probe};

/// The kind of path that a connection uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Directly to one of the peer's own addresses.
    Direct,
    /// To an address that a NAT gave the peer, opened by hole punching from both ends.
    Punched,
    /// Through a relay that forwards datagrams.
    Relayed,
}

impl Route {
    /// Returns the name: `direct`, `punched` or `relayed`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Punched => "punched",
            Self::Relayed => "relayed",
        }
    }
}

/// Progress that a front end may show.
///
/// Paths begin with the name of the source. If the peer is the sender, they come from the peer: print them with
/// `Display`, which escapes control characters that could affect a terminal.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// A connection is established and both ends have authenticated.
    Connected {
        /// The peer's address.
        address: SocketAddr,
        /// The peer's key id, as `SHA256:...`.
        key_id: String,
    },
    /// The route to the peer was found or has changed. Reported only for peers that are met by a code.
    Routed {
        /// The peer's address as seen from this end.
        address: SocketAddr,
        /// The kind of route.
        route: Route,
    },
    /// The sender has found more to send. The values are totals so far.
    Found {
        /// Files found so far.
        files: u64,
        /// Bytes of these files.
        bytes: u64,
        /// Whether the search has ended, so that the totals are final.
        complete: bool,
    },
    /// A transfer starts.
    Started {
        /// The entry's number in this session.
        id: u64,
        /// The path of the file.
        path: RelativePath,
        /// The size in bytes; 0 if unknown.
        size: u64,
        /// Bytes that the receiver already holds and the sender does not send.
        held: u64,
    },
    /// A transfer has made progress. The sender counts bytes given to the connection, so it is ahead of the receiver
    /// by the bytes in flight. Only [`Event::Settled`] reports what the receiver has committed.
    Moved {
        /// The entry's number.
        id: u64,
        /// Bytes since the last event of this kind.
        bytes: u64,
    },
    /// An entry has its final result.
    Settled {
        /// The entry's number; `None` for a source that never became an entry.
        id: Option<u64>,
        /// The path of the entry.
        path: RelativePath,
        /// The kind of the entry.
        kind: Kind,
        /// The size in bytes; 0 if the entry is not a file.
        size: u64,
        /// The result.
        result: Settled,
    },
    /// A mirror has removed a path at the destination, or would remove it in a dry run.
    Removed {
        /// The path relative to the destination.
        path: RelativePath,
    },
    /// A measurement (`bench`) is in progress.
    Measuring {
        /// The kind of measurement.
        probe: Probe,
        /// Bytes of filler that have arrived.
        bytes: u64,
        /// Time since the measurement in this direction began.
        elapsed: Duration,
    },
    /// A peer has proved that it knows the code, and its user is now asked to accept.
    Asked {
        /// The peer's address.
        address: SocketAddr,
    },
    /// The peer left without an answer. It can return with the same code.
    Left {
        /// The peer's last address.
        address: SocketAddr,
    },
    /// A connection was lost during a session. Committed files stay. The session continues over another connection if
    /// one can be made. An entry keeps its number; an interrupted transfer starts again.
    Lost {
        /// The cause, as text that is safe to print.
        reason: PeerText,
        /// The longest time for which reconnecting is tried.
        retry_for: Duration,
    },
    /// Another connection attempt is about to start.
    Reconnecting {
        /// The number of the attempt, from 1. It restarts at 1 after a connection has made progress.
        attempt: u32,
        /// The wait before the attempt.
        wait: Duration,
    },
    /// The session continues over another connection to the same server.
    Reconnected {
        /// The server's current address.
        address: SocketAddr,
    },
    /// The peer is stopping: it takes no new entries, and lets running transfers end.
    GoingAway {
        /// The reason that the peer gave.
        reason: Reason,
    },
}

/// The result of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settled {
    /// The entry was transferred, verified and committed, or made from the manifest alone.
    Committed,
    /// The destination already had the entry.
    Skipped,
    /// The entry failed.
    Failed(Reason),
    /// The entry was omitted, which is not a failure: it vanished before its turn ([`Vanished`](crate::error::Code)),
    /// or it is a FIFO, socket or device ([`Special`](crate::error::Code)).
    Omitted(Reason),
}

impl Settled {
    /// Returns the result of an entry that the sender could not send or the receiver could not take.
    pub(crate) fn from_failure(reason: Reason) -> Self {
        if reason.code == Code::Vanished {
            Self::Omitted(reason)
        } else {
            Self::Failed(reason)
        }
    }
}

/// Receives events as they happen. The tasks that do the work call it, so it must return quickly and must not block.
pub type Observer = Arc<dyn Fn(Event) + Send + Sync>;

/// Returns an observer that ignores all events.
pub fn ignore() -> Observer {
    Arc::new(|_| {})
}
