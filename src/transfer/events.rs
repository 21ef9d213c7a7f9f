//! What users see of a session, as events; the library itself never prints.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::error::text::PeerText;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::protocol::{Kind, Probe};

/// How a connection goes to the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// To an address of the peer's own.
    Direct,
    /// To an address that a NAT has given the peer, opened from both sides.
    Punched,
    /// By a relay that forwards.
    Relayed,
}

impl Route {
    /// In a word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Punched => "punched",
            Self::Relayed => "relayed",
        }
    }
}

/// Something that a front end may want to show.
///
/// Paths begin with the name of the source. They come from the peer where the peer is the sender: print them with
/// their `Display`, which escapes what could steer a terminal.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// A connection is up and both ends know each other.
    Connected {
        /// Where the peer is.
        address: SocketAddr,
        /// Who it is, as `SHA256:...`.
        key_id: String,
    },
    /// The way to the peer is known, or has become another: only where it is met by a code.
    Routed {
        /// Where the peer is, or seems to be.
        address: SocketAddr,
        /// What way it is.
        route: Route,
    },
    /// More was found to send; totals so far.
    Found {
        /// Files found so far.
        files: u64,
        /// Their bytes.
        bytes: u64,
        /// Whether the search is over, so that these are the final totals.
        complete: bool,
    },
    /// A transfer begins.
    Started {
        /// The entry's number in this session.
        id: u64,
        /// Which file.
        path: RelativePath,
        /// Its size in bytes; 0 when nobody knows it.
        size: u64,
        /// Bytes that the receiver holds already and that need not travel.
        held: u64,
    },
    /// More of a transfer has moved. The sender counts what it gave to the connection, so this can be ahead of the
    /// receiver by what is under way; only [`Event::Settled`] speaks of the receiver's disk.
    Moved {
        /// The entry's number.
        id: u64,
        /// Bytes since the last such event.
        bytes: u64,
    },
    /// An entry is settled, one way or the other.
    Settled {
        /// The entry's number; `None` for a source that never became an entry.
        id: Option<u64>,
        /// Which entry.
        path: RelativePath,
        /// What it is.
        kind: Kind,
        /// Its size in bytes; 0 for what is no file.
        size: u64,
        /// How it went.
        result: Settled,
    },
    /// A mirror has removed something at the destination, or would in a dry run.
    Removed {
        /// Below the destination.
        path: RelativePath,
    },
    /// A measurement is under way.
    Measuring {
        /// What is measured.
        probe: Probe,
        /// Bytes of filler that have arrived.
        bytes: u64,
        /// Since it began in this direction.
        elapsed: Duration,
    },
    /// Somebody has shown that it knows the code, and its user is asked now.
    Asked {
        /// Where it is.
        address: SocketAddr,
    },
    /// It has gone away without an answer; it can come again with the same code.
    Left {
        /// Where it was.
        address: SocketAddr,
    },
    /// A connection was lost in the middle of a session. What is committed stays; the session goes on over another
    /// connection if one comes about. An entry keeps its number; one that was under way is started anew.
    Lost {
        /// What happened, for people; safe to print.
        why: PeerText,
        /// How long it is tried again, at most.
        retry_for: Duration,
    },
    /// Another connection is about to be tried.
    Reconnecting {
        /// Counts from 1; begins anew once a connection has moved something.
        attempt: u32,
        /// How long is waited before it.
        wait: Duration,
    },
    /// The session goes on over another connection, to the same server.
    Reconnected {
        /// Where the server is now.
        address: SocketAddr,
    },
    /// The peer stops: nothing new will be taken, transfers under way may end.
    GoingAway {
        /// What it said.
        why: Reason,
    },
}

/// How an entry went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settled {
    /// Transferred, verified and committed, or made from the manifest alone.
    Committed,
    /// It was there already.
    Skipped,
    /// It did not go through.
    Failed(Reason),
    /// There was nothing to send, which is no failure: it vanished before its turn ([`Vanished`](crate::error::Code)), or it is
    /// a FIFO, socket or device ([`Special`](crate::error::Code)).
    Omitted(Reason),
}

impl Settled {
    /// How an entry ended that the sender could not send, or the receiver could not take.
    pub(crate) fn ended(why: Reason) -> Self {
        if why.code == Code::Vanished {
            Self::Omitted(why)
        } else {
            Self::Failed(why)
        }
    }
}

/// Takes events as they happen. It is called from the tasks that do the work, so it must be quick and must not block.
pub type Observer = Arc<dyn Fn(Event) + Send + Sync>;

/// An observer that ignores everything.
pub fn ignore() -> Observer {
    Arc::new(|_| {})
}
