//! One session's receiver: runs the tasks of the session, and sums up.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::sync::mpsc;

use super::admit::{Admission, AdmissionQueues, admit_large, admit_small};
use super::compare::compare_files;
use super::durable::sync_groups;
use super::entry_credit::EntryCredit;
use super::manifest::{WantedQueues, read_entries, write_verdicts};
use super::mirror::{Announcement, Removal};
use super::options::Receiving;
use super::session::{Queues, Session};
use super::streams::IncomingTransfer;
use crate::error::lock::lock;
use crate::error::{Error, Reason, Result};
use crate::net::stream::{MessageReader, MessageWriter};
use crate::protocol::path::RelativePath;
use crate::protocol::{Durability, End, Plan, SenderTime, Summary, Withdraw};
use crate::transfer::blocking::blocking;
use crate::transfer::events::Event;

/// One session's receiver on one connection.
pub struct Receiver {
    session: Arc<Session>,
    /// What the tasks write and sync; taken when they start.
    queues: Mutex<Option<Queues>>,
    sender_time: OnceLock<SenderTime>,
    /// What a mirror removed.
    removal: OnceLock<Removal>,
    /// Time that writes were slow before this session; sessions may share a flow control.
    slow_writes_before: Duration,
}

impl Receiver {
    /// Creates a receiver. It does nothing until [`run`](Self::run).
    pub fn new(parameters: Receiving) -> Arc<Self> {
        let slow_writes_before = parameters.context.flow_control.slow_writes();
        let (session, queues) = Session::new(parameters);
        Arc::new(Self {
            session: Arc::new(session),
            queues: Mutex::new(Some(queues)),
            sender_time: OnceLock::new(),
            removal: OnceLock::new(),
            slow_writes_before,
        })
    }

    /// Answers a manifest until the sender ends it and the last transfer has ended.
    ///
    /// Fails if the connection is lost or the sender breaks the protocol. Running transfers end with the connection;
    /// their data stays as partials.
    pub async fn run(&self, entries: MessageReader, verdicts: MessageWriter) -> Result<()> {
        let session = &self.session;
        session.tables.quota.start(session.brought());
        let queues = lock(&self.queues).take().ok_or_else(|| {
            Error::Protocol("the peer opened a second manifest in one session".into())
        })?;
        let credit = Arc::new(EntryCredit::default());
        let (admission, AdmissionQueues { small, large }) = Admission::new();
        let (compare_to, compare) = mpsc::unbounded_channel();
        let wanted = WantedQueues {
            compare: compare_to,
            admission: admission.clone(),
        };
        let ended = tokio::try_join!(
            read_entries(session, entries, credit.clone(), wanted),
            compare_files(session, compare, admission),
            sync_groups(session, queues.unsynced, credit.clone()),
            write_verdicts(session, verdicts, queues.verdicts, credit),
            admit_small(session, small),
            admit_large(session, large),
        );
        session.transfers.close();
        ended?;
        Ok(())
    }

    /// Passes a stream to its transfer, or rejects it with [`Code::NotWanted`](crate::error::Code::NotWanted).
    pub fn incoming(&self, plan: Plan, stream: MessageReader, receipt: MessageWriter) {
        self.session.streams.deliver(IncomingTransfer {
            plan,
            stream,
            receipt,
        });
    }

    /// Ends the wait for a file that the sender cannot send.
    pub(crate) fn withdrawn(&self, withdraw: Withdraw) {
        let streams = &self.session.streams;
        streams.withdraw(withdraw.id, withdraw.why.into());
    }

    /// Records the final message of the sender.
    pub(crate) fn ended(&self, end: End) {
        if let Some(sender_time) = end.spent {
            // Set once: a session has one `End`.
            let _ = self.sender_time.set(sender_time);
        }
        self.session.context.stats.sender_ended(end);
    }

    /// Returns the sender's time measurements, if it reported them.
    pub(crate) fn spent(&self) -> Option<SenderTime> {
        self.sender_time.get().copied()
    }

    /// Removes the unannounced paths of a mirror if everything else succeeded, and reports each path to `tell`. If
    /// cancelled, it finishes the current removal and then stops.
    pub(crate) async fn mirror(&self, tell: mpsc::Sender<RelativePath>) {
        if self.session.policy.options.delete.is_none() {
            return;
        }
        self.transfers_ended().await;
        let session = self.session.clone();
        let removal = blocking("write", move || Ok(remove_unannounced(&session, &tell))).await;
        let removal = removal.unwrap_or_else(|reason| Removal {
            removed: 0,
            incomplete: Some(reason),
        });
        if removal.removed > 0 && !self.session.policy.options.dry_run {
            self.session.wrote();
        }
        // Set once: a session has one mirror.
        let _ = self.removal.set(removal);
    }

    /// Waits for all transfers, syncs the store if needed, and returns the summary. Call it after the sender has
    /// ended.
    pub async fn summary(&self) -> Result<Summary, Reason> {
        self.transfers_ended().await;
        let session = &self.session;
        let durability = session.policy.durability;
        if durability == Durability::Synced || session.has_written() {
            // Skipped files may not be on the disk yet, and visible commits reach it only here.
            let store = session.target.store.clone();
            blocking("write", move || store.sync()).await?;
        }
        let slow_writes = session.context.flow_control.slow_writes();
        let held_up = slow_writes.saturating_sub(self.slow_writes_before);
        let counts = session.counts();
        let removal = self.removal.get();
        let incomplete = removal.and_then(|removal| removal.incomplete.clone());
        Ok(Summary {
            committed: counts.committed,
            bytes: counts.bytes,
            skipped: counts.skipped,
            failed: counts.failed,
            durability,
            held_up: Some(held_up.as_millis() as u64),
            unkept: Some(counts.warnings).filter(|warnings| !warnings.is_empty()),
            removed: removal.map(|removal| removal.removed),
            unremoved: incomplete.map(Into::into),
        })
    }

    async fn transfers_ended(&self) {
        self.session.transfers.close();
        self.session.transfers.wait().await;
    }

    /// Returns a future that waits until every receipt is delivered. Call it after the last transfer has ended.
    pub(crate) fn receipts_delivered(&self) -> impl Future<Output = ()> + Send + use<> {
        let receipts = self.session.receipts.clone();
        receipts.close();
        async move { receipts.wait().await }
    }

    /// Abandons this receiver while its disk work may still run. The session continues without it.
    pub(crate) fn give_up(&self) {
        self.session.give_up();
    }
}

/// Removes the unannounced paths of a mirror, and reports each to the observer and to `tell`. Blocks.
fn remove_unannounced(session: &Session, tell: &mpsc::Sender<RelativePath>) -> Removal {
    let connection = session.context.flow_control.connection();
    let is_connected = connection.close_reason().is_none();
    let announcement = Announcement {
        is_whole: is_connected && session.context.stats.is_whole(),
        missing: session.counts().missing,
    };
    let report = |path: RelativePath| {
        session.observe(Event::Removed { path: path.clone() });
        tell.blocking_send(path).is_ok()
    };
    match session.mirror() {
        Some(mirror) => mirror.remove(announcement, report),
        None => Removal::default(),
    }
}
