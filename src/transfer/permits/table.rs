//! The table of permits: which peers and connections hold them, and who comes next. It knows no time and never waits.

use std::collections::{BTreeMap, HashMap, VecDeque};

use tokio::sync::oneshot;

/// Open transfers for each permit: enough for one transfer of each of 1,000 connections at the default of 100 permits. An
/// open transfer takes some kilobytes and a file descriptor.
const OPEN_FOR_EACH_PERMIT: usize = 16;
/// Who shares permits with whom: the digest of a key, or of a network of strangers.
pub type Peer = [u8; 32];

/// A connection and the peer that it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Member {
    pub(super) peer: Peer,
    /// A number of the scheduler's own, never reused.
    pub(super) connection: u64,
}

/// What a waiting transfer wants a permit for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To open: nothing has arrived for it yet.
    Open,
    /// To go on: it was parked, and may have bytes in memory, which hold up its connection.
    Resume,
}

/// How many transfers a process may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferLimits {
    /// Transfers that write at the same time: the permits.
    pub writing: usize,
    /// Open transfers, parked ones included.
    pub open: usize,
}

impl TransferLimits {
    /// Returns the limits of large files, which may have this many files open.
    pub fn for_large(permits: usize, files: usize) -> Self {
        Self {
            writing: permits,
            open: (permits * OPEN_FOR_EACH_PERMIT).min(files).max(1),
        }
    }

    /// Returns the limits of small files. They are open only while they are written; with twice as many, a peer alone
    /// can use every permit.
    pub fn for_small(permits: usize) -> Self {
        Self {
            writing: permits,
            open: 2 * permits,
        }
    }
}

/// The holders and the queue. Pure but for the grants: it knows no time and never waits.
#[derive(Debug)]
pub(super) struct PermitTable {
    /// Permits that are not held.
    pub(super) free: usize,
    /// Transfers that may still open.
    closed: usize,
    /// Peers with open transfers or places in the queue.
    pub(super) peers: HashMap<Peer, PeerShare>,
    /// Counts connections, places in the queue and grants.
    last_number: u64,
}

#[derive(Debug, Default)]
pub(super) struct PeerShare {
    pub(super) count: Count,
    connections: BTreeMap<u64, ConnectionShare>,
}

#[derive(Debug, Default)]
struct ConnectionShare {
    count: Count,
    resuming: VecDeque<Waiter>,
    opening: VecDeque<Waiter>,
}

/// What a peer or a connection has.
#[derive(Debug, Default)]
pub(super) struct Count {
    /// Permits.
    held: usize,
    /// Open transfers, parked ones included.
    pub(super) open: usize,
    /// The number of the last grant: among equals, the one with the oldest comes next.
    last_grant: u64,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    grant: oneshot::Sender<()>,
}

impl PeerShare {
    /// Returns whether the peer may open another transfer.
    fn may_open(&self, closed: usize) -> bool {
        let open = self.count.open;
        closed > 0 && (open == 0 || open < (closed + open) / 2)
    }

    /// Returns whether a transfer waits that may be granted a permit.
    fn waits(&self, closed: usize) -> bool {
        let may_open = self.may_open(closed);
        self.connections.values().any(|one| one.waits(may_open))
    }
}

impl ConnectionShare {
    fn waits(&self, may_open: bool) -> bool {
        !self.resuming.is_empty() || may_open && !self.opening.is_empty()
    }

    fn is_unused(&self) -> bool {
        self.count.open == 0 && self.resuming.is_empty() && self.opening.is_empty()
    }
}

impl PermitTable {
    pub(super) fn new(limits: TransferLimits) -> Self {
        Self {
            free: limits.writing,
            closed: limits.open,
            peers: HashMap::new(),
            last_number: 0,
        }
    }

    pub(super) fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// Queues a request, and grants what is free. Returns the number of the place in the queue.
    pub(super) fn request(
        &mut self,
        member: Member,
        purpose: Purpose,
        grant: oneshot::Sender<()>,
    ) -> u64 {
        let number = self.next_number();
        let peer = self.peers.entry(member.peer).or_default();
        let connection = peer.connections.entry(member.connection).or_default();
        let queue = match purpose {
            Purpose::Open => &mut connection.opening,
            Purpose::Resume => &mut connection.resuming,
        };
        queue.push_back(Waiter { number, grant });
        self.grant_free();
        number
    }

    /// Removes a place from the queue.
    pub(super) fn cancel(&mut self, member: Member, number: u64) {
        if let Some(connection) = self.connection(member) {
            connection.resuming.retain(|one| one.number != number);
            connection.opening.retain(|one| one.number != number);
        }
        self.forget_unused(member);
    }

    /// Takes a permit back, and grants it to the next.
    pub(super) fn release(&mut self, member: Member) {
        self.count(member, |count| count.held -= 1);
        self.free += 1;
        self.grant_free();
    }

    /// Records that a transfer without a permit has ended.
    pub(super) fn close(&mut self, member: Member) {
        self.count(member, |count| count.open -= 1);
        self.closed += 1;
        self.forget_unused(member);
        self.grant_free();
    }

    fn connection(&mut self, member: Member) -> Option<&mut ConnectionShare> {
        let peer = self.peers.get_mut(&member.peer)?;
        peer.connections.get_mut(&member.connection)
    }

    /// Changes the count of a connection and of its peer.
    fn count(&mut self, member: Member, change: impl Fn(&mut Count)) {
        if let Some(peer) = self.peers.get_mut(&member.peer) {
            change(&mut peer.count);
            if let Some(connection) = peer.connections.get_mut(&member.connection) {
                change(&mut connection.count);
            }
        }
    }

    fn forget_unused(&mut self, member: Member) {
        let Some(peer) = self.peers.get_mut(&member.peer) else {
            return;
        };
        let connection = peer.connections.get(&member.connection);
        if connection.is_some_and(ConnectionShare::is_unused) {
            peer.connections.remove(&member.connection);
        }
        if peer.connections.is_empty() {
            self.peers.remove(&member.peer);
        }
    }

    fn grant_free(&mut self) {
        while self.free > 0
            && let Some(member) = self.next()
        {
            self.grant(member);
        }
    }

    /// Returns the member that comes next: of the peer that holds the fewest permits, the connection that holds the
    /// fewest.
    fn next(&self) -> Option<Member> {
        let rank = |count: &Count| (count.held, count.last_grant);
        let (&peer, share) = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.waits(self.closed))
            .min_by_key(|(_, peer)| rank(&peer.count))?;
        let may_open = share.may_open(self.closed);
        let (&connection, _) = share
            .connections
            .iter()
            .filter(|(_, connection)| connection.waits(may_open))
            .min_by_key(|(_, connection)| rank(&connection.count))?;
        Some(Member { peer, connection })
    }

    /// Gives a permit to the first transfer that waits at this member.
    fn grant(&mut self, member: Member) {
        let Some(connection) = self.connection(member) else {
            return;
        };
        let resuming = connection.resuming.pop_front();
        let opens = usize::from(resuming.is_none());
        let Some(waiter) = resuming.or_else(|| connection.opening.pop_front()) else {
            return;
        };
        // A place whose receiver is gone has cancelled itself under the same lock, so this cannot fail.
        if waiter.grant.send(()).is_err() {
            return;
        }
        self.free -= 1;
        self.closed -= opens;
        let number = self.next_number();
        self.count(member, |count| {
            count.held += 1;
            count.open += opens;
            count.last_grant = number;
        });
    }

    /// Returns whether a transfer waits that has a better right to a permit of this member: one of a peer that holds
    /// fewer, one of a connection of the same peer that holds fewer, or a parked one of the same connection.
    pub(super) fn is_due(&self, member: Member) -> bool {
        let Some(own) = self.peers.get(&member.peer) else {
            return false;
        };
        let has_better_right = |(peer, share): (&Peer, &PeerShare)| {
            *peer != member.peer && share.count.held < own.count.held && share.waits(self.closed)
        };
        if self.peers.iter().any(has_better_right) {
            return true;
        }
        let may_open = own.may_open(self.closed);
        let connections = &own.connections;
        let held = connections
            .get(&member.connection)
            .map_or(0, |connection| connection.count.held);
        connections.iter().any(|(&number, connection)| {
            if number == member.connection {
                !connection.resuming.is_empty()
            } else {
                connection.count.held < held && connection.waits(may_open)
            }
        })
    }
}
