//! A session on its current connection, and what outlives the connection.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use quinn::Connection;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use super::entry_credit::Allowed;
use super::entry_table::EntryTable;
use super::hard_links::LinkRole;
use crate::error::Code;
use crate::error::lock::lock;
use crate::net::rate_limit::RateLimits;
use crate::protocol::Kind;
use crate::protocol::path::RelativePath;
use crate::storage::digest_index::Index;
use crate::storage::open_files::limit_to_open_files;
use crate::storage::pipe::Pipe;
use crate::storage::walk::Announce;
use crate::transfer::events::{Event, Observer, Settled};
use crate::transfer::sampler::StageCounters;

/// Large bodies that are sent at the same time on a connection. quinn wakes every writer that waits for connection
/// credit, so more of them only cost time.
const LARGE_WRITER_LIMIT: usize = 16;
/// Small files that are read at the same time; enough to fill the queue of a disk.
const SMALL_READER_LIMIT: usize = 32;
/// Memory for small bodies until the connection takes them, in KiB.
const SMALL_MEMORY_LIMIT_KIB: usize = 16 << 10;

/// The current connection of a session, and the limits on it.
pub struct Sending {
    /// The connection.
    pub connection: Connection,
    /// The stream id of the control stream of the session.
    pub handle: u64,
    /// The limits that the receiver set.
    pub allowed: Arc<Allowed>,
    /// The rate limits of entries, plans, bodies and trailers.
    pub limits: RateLimits,
    /// How long the connection may be silent before a transfer fails.
    pub deadline: Duration,
    /// Counts the transfers in each stage.
    pub stage_counters: Arc<StageCounters>,
    /// Cancelled when the receiver goes away. Nothing new is announced then.
    pub stopping: CancellationToken,
    /// Cancelled by the sender when everything is announced, answered and sent. Receipts may still be in flight.
    pub all_sent: CancellationToken,
}

/// State that lasts as long as the session.
pub(super) struct SenderState {
    /// The pipe that is sent, which cannot be read a second time.
    pub(super) pipe: Option<Arc<Pipe>>,
    pub(super) permits: SendPermits,
    /// The index that remembers the digests of sent files.
    pub(super) index: Option<Index>,
    /// Whether files may grow while they are sent.
    pub(super) may_grow: bool,
    entries: Mutex<EntryTable>,
    /// Notified when an entry is answered or settled.
    pub(super) changed: Notify,
    pub(super) observer: Observer,
}

/// What the transfers of a session share.
pub(super) struct SendPermits {
    /// Transfers at the same time.
    pub(super) parallel: Arc<Semaphore>,
    pub(super) large_writers: Semaphore,
    pub(super) open_files: Arc<Semaphore>,
    /// Memory for small bodies, in KiB.
    pub(super) small_memory: Semaphore,
}

impl SendPermits {
    fn new(parallel: usize) -> Self {
        let open_files = limit_to_open_files(LARGE_WRITER_LIMIT + SMALL_READER_LIMIT);
        Self {
            parallel: Arc::new(Semaphore::new(parallel.max(1))),
            large_writers: Semaphore::new(LARGE_WRITER_LIMIT),
            open_files: Arc::new(Semaphore::new(open_files)),
            small_memory: Semaphore::new(SMALL_MEMORY_LIMIT_KIB),
        }
    }
}

impl SenderState {
    pub(super) fn new(parallel: usize, entries: EntryTable, observer: Observer) -> Self {
        Self {
            pipe: None,
            permits: SendPermits::new(parallel),
            index: None,
            may_grow: false,
            entries: Mutex::new(entries),
            changed: Notify::new(),
            observer,
        }
    }

    pub(super) fn entries(&self) -> MutexGuard<'_, EntryTable> {
        lock(&self.entries)
    }

    /// Counts a result and reports it to the observer.
    pub(super) fn report(
        &self,
        id: Option<u64>,
        path: RelativePath,
        kind: Kind,
        size: u64,
        result: Settled,
    ) {
        self.entries().count(&path, kind, size, &result);
        (self.observer)(Event::Settled {
            id,
            path,
            kind,
            size,
            result,
        });
    }
}

/// The session on its current connection.
pub(super) struct Run {
    pub(super) shared: Arc<SenderState>,
    pub(super) sending: Sending,
    /// Number of `Working` messages from the receiver.
    pub(super) working: AtomicU64,
}

impl Run {
    pub(super) fn new(shared: Arc<SenderState>, sending: Sending) -> Self {
        Self {
            shared,
            sending,
            working: AtomicU64::new(0),
        }
    }

    pub(super) fn entries(&self) -> MutexGuard<'_, EntryTable> {
        self.shared.entries()
    }

    /// Waits until the entries meet a condition.
    pub(super) async fn until(&self, condition: impl Fn(&EntryTable) -> bool) {
        loop {
            let changed = self.shared.changed.notified();
            if condition(&self.entries()) {
                return;
            }
            changed.await;
        }
    }

    /// Reports what the walk has found so far.
    pub(super) fn report_found(&self) {
        let found = self.entries().found();
        let pipe = self.shared.pipe.as_ref();
        (self.shared.observer)(Event::Found {
            files: found.files,
            bytes: found.bytes,
            complete: found.complete && pipe.is_none_or(|pipe| pipe.is_ended()),
        });
    }

    /// Reports that a transfer starts. The receiver holds `held` bytes of it.
    pub(super) fn report_started(&self, id: u64, announce: &Announce, held: u64) {
        (self.shared.observer)(Event::Started {
            id,
            path: announce.path.clone(),
            size: announce.metadata.size,
            held,
        });
    }

    /// Reports that the connection took bytes of a transfer.
    pub(super) fn report_moved(&self, id: u64, bytes: u64) {
        (self.shared.observer)(Event::Moved { id, bytes });
    }

    /// Records that a file was completely sent.
    pub(super) fn sent_whole(&self, id: u64) {
        self.entries().sent_whole(id);
        self.shared.changed.notify_waiters();
    }

    /// Settles an entry: counts and reports its result, and releases what waited for it. An entry that is settled
    /// already stays as it is.
    pub(super) fn settle(&self, id: u64, result: Settled) {
        let Some(settling) = self.entries().settling(id) else {
            return;
        };
        let announce = settling.announce;
        let is_committed = matches!(result, Settled::Committed | Settled::Skipped);
        if matches!(&result, Settled::Failed(reason) if reason.code == Code::Stopping) {
            // The receiver is stopping. This is reported once for the session, not for each file.
            self.sending.stopping.cancel();
            self.entries().left(id);
        } else {
            // A first name that is announced again was counted when it was settled.
            if !matches!(settling.role, LinkRole::Reannounced(_)) {
                let path = announce.path.clone();
                self.shared
                    .report(Some(id), path, announce.kind, settling.size, result);
            }
            self.entries().settled(id, is_committed);
        }
        self.shared.changed.notify_waiters();
    }
}
