//! Who may write to the store: the permits that all connections share, given fairly.
//!
//! A permit goes to the peer that holds the fewest, and within a peer to the connection that holds the fewest. A holder
//! keeps its permit for a time slice. After that it gives the permit up between two blocks if a transfer waits whose
//! peer or connection holds less. A transfer without a permit is *parked*: it keeps its partial and its stream, and
//! waits for another permit. So a peer gets an equal share of the permits, however many connections, transfers or slow
//! streams it opens.
//!
//! Parked transfers keep files open, so their number is limited too. A peer may open at most half of what others leave
//! free, so that a newcomer always finds room (dynamic thresholds, after A. Choudhury and E. Hahne, "Dynamic Queue
//! Length Thresholds for Shared-Memory Packet Switches", IEEE/ACM Transactions on Networking 6(2), 1998).

mod table;

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::{sleep, sleep_until};

use crate::error::lock::lock;
use crate::storage::open_files::limit_to_open_files;
use table::{Member, PermitTable, Purpose};
pub use table::{Peer, TransferLimits};

/// Time that a permit is kept while others wait. It bounds the wait of a peer that holds nothing. A block takes some
/// milliseconds, so giving a permit up between two blocks costs a few percent of a slice.
pub const TIME_SLICE: Duration = Duration::from_millis(500);

/// Part (1/N) of the files that a process may open of which one is being written. The others are for parked transfers.
const WRITING_PART: usize = 4;

/// Permits of one kind, for all connections of a process.
#[derive(Debug)]
pub struct PermitScheduler {
    table: Mutex<PermitTable>,
    slice: Duration,
}

impl PermitScheduler {
    /// Creates a scheduler with all permits free.
    pub fn new(limits: TransferLimits) -> Arc<Self> {
        Self::with_slice(limits, TIME_SLICE)
    }

    fn with_slice(limits: TransferLimits, slice: Duration) -> Arc<Self> {
        Arc::new(Self {
            table: Mutex::new(PermitTable::new(limits)),
            slice,
        })
    }

    /// Returns the access of a new connection of this peer.
    pub fn connection(self: &Arc<Self>, peer: Peer) -> Permits {
        let connection = self.table().next_number();
        Permits {
            scheduler: self.clone(),
            member: Member { peer, connection },
        }
    }

    /// Locks even if another task panicked: no update leaves the table inconsistent.
    fn table(&self) -> MutexGuard<'_, PermitTable> {
        lock(&self.table)
    }
}

/// The permits of a process: half of them for large files, half for small ones. So a small file never waits for a large
/// one, unless there is only one permit.
#[derive(Debug)]
pub struct TransferPermits {
    total: usize,
    large: Arc<PermitScheduler>,
    small: Arc<PermitScheduler>,
}

impl TransferPermits {
    /// Creates `wanted` permits, or fewer if the process may not open as many files; at least one.
    pub fn new(wanted: usize) -> Self {
        let files = limit_to_open_files(usize::MAX);
        let total = wanted.min(files / WRITING_PART).max(1);
        let for_small = total / 2;
        let large = PermitScheduler::new(TransferLimits::for_large(
            total - for_small,
            files.saturating_sub(for_small),
        ));
        let small = match for_small {
            0 => large.clone(),
            permits => PermitScheduler::new(TransferLimits::for_small(permits)),
        };
        Self {
            total,
            large,
            small,
        }
    }

    /// Returns how many transfers may write at the same time.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Returns the access of a new connection of this peer.
    pub fn connection(&self, peer: Peer) -> ConnectionPermits {
        ConnectionPermits {
            large: self.large.connection(peer),
            small: self.small.connection(peer),
        }
    }
}

/// A connection's access to the permits of both kinds.
#[derive(Debug, Clone)]
pub struct ConnectionPermits {
    /// For files that are written while they arrive.
    pub large: Permits,
    /// For files that are written when they are complete in memory.
    pub small: Permits,
}

/// A connection's access to the permits.
#[derive(Debug, Clone)]
pub struct Permits {
    scheduler: Arc<PermitScheduler>,
    member: Member,
}

impl Permits {
    /// Waits until a transfer may open, with a permit in hand. Cancelling gives the place in the queue up.
    pub async fn open(&self) -> Slot {
        self.wait(Purpose::Open).await;
        Slot {
            permits: self.clone(),
            since: Some(Instant::now()),
        }
    }

    async fn wait(&self, purpose: Purpose) {
        let mut place = {
            let (grant, granted) = oneshot::channel();
            let number = self.scheduler.table().request(self.member, purpose, grant);
            Place {
                permits: self,
                purpose,
                number,
                granted: Some(granted),
            }
        };
        if let Some(granted) = &mut place.granted {
            // The sender is dropped only with its place, which this future owns.
            let _ = granted.await;
        }
        place.granted = None;
    }
}

/// A place in the queue. Dropping it before the grant was taken leaves the queue, or returns the permit.
struct Place<'a> {
    permits: &'a Permits,
    purpose: Purpose,
    number: u64,
    /// `None` once the permit was taken.
    granted: Option<oneshot::Receiver<()>>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let Some(mut granted) = self.granted.take() else {
            return;
        };
        let mut table = self.permits.scheduler.table();
        let member = self.permits.member;
        // Grants are made under this lock, so none can come in between.
        if granted.try_recv().is_err() {
            return table.cancel(member, self.number);
        }
        table.release(member);
        if self.purpose == Purpose::Open {
            table.close(member);
        }
    }
}

/// An open transfer. It holds a permit or is parked. Keep it until the disk work ends.
#[derive(Debug)]
pub struct Slot {
    permits: Permits,
    /// When it got its permit; `None` while it is parked.
    since: Option<Instant>,
}

impl Slot {
    /// Returns whether the transfer holds a permit.
    pub fn may_write(&self) -> bool {
        self.since.is_some()
    }

    /// Returns whether the permit should be given up between two blocks: its time slice is over, and a transfer waits
    /// that has a better right to it.
    pub fn is_due(&self) -> bool {
        let scheduler = &self.permits.scheduler;
        self.since.is_some_and(|since| {
            since.elapsed() >= scheduler.slice && scheduler.table().is_due(self.permits.member)
        })
    }

    /// Waits until the permit should be given up; see [`is_due`](Self::is_due). Waits forever while parked.
    pub async fn due(&self) {
        let Some(since) = self.since else {
            return std::future::pending().await;
        };
        let slice = self.permits.scheduler.slice;
        sleep_until((since + slice).into()).await;
        while !self.is_due() {
            sleep(slice).await;
        }
    }

    /// Gives the permit up.
    pub fn park(&mut self) {
        if self.since.take().is_some() {
            self.permits.scheduler.table().release(self.permits.member);
        }
    }

    /// Waits for a permit if none is held. Parked transfers come before new ones of the same connection. Cancelling gives
    /// the place in the queue up.
    pub async fn resume(&mut self) {
        if self.since.is_none() {
            self.permits.wait(Purpose::Resume).await;
            self.since = Some(Instant::now());
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.park();
        self.permits.scheduler.table().close(self.permits.member);
    }
}

#[cfg(test)]
mod tests;
