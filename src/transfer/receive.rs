//! The receiver: writes the streams of a session to the store.
//!
//! The receiver compares entries with the store in batches. It answers at once what the manifest alone settles. Other
//! entries wait for admission in one of two queues: small files for memory, large files for a permit. A waiting large
//! file thus delays no small one. A [`Want`](crate::protocol::Want) is the admission: its memory or permit is reserved
//! before it is sent. An entry that waits holds nothing that another one needs.

mod attributes;
mod body_reader;
mod compare;
mod decide;
mod dedupe;
mod download;
mod durable;
mod entry_credit;
mod file_locks;
mod file_writer;
mod hard_links;
mod mirror;
mod name_collisions;
mod pieces;
mod placement;
mod quota;
mod session_stats;
mod times;
mod warning_counts;

use compare::Compare;
use durable::Settling;
use entry_credit::EntryCredit;
use file_locks::CommittedSource;
pub use file_locks::FileLocks;
pub(crate) use file_locks::{Claimant, FileLock};
use hard_links::HardLinks;
use mirror::{Announced, Cleared};
use name_collisions::NameCollisions;
pub use placement::{Placement, RequestedNames, Sources};
pub use quota::AcceptedQuota;
use quota::QuotaUse;
pub use session_stats::SessionStats;
use times::Times;
use warning_counts::WarningCounts;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::config::Config;
use crate::error::{Code, Error, Reason, Result};
use crate::net::flow_control::FlowControl;
use crate::net::stream::{MessageReader, MessageWriter, StreamError};
use crate::protocol::Verdict;
use crate::protocol::path::RelativePath;
use crate::protocol::{
    Complete, Durability, End, Entry, Existing, Frame, Kind, Message, Plan, ReceiveOptions,
    SenderTime, Summary, Unsendable, Withdraw,
};
use crate::storage::digest_index::Index;
use crate::storage::filter::Filter;
use crate::storage::users::Owners;
use crate::storage::{Attributes, PartialKey, Store};
use crate::transfer::events::{Event, Observer, Settled};

/// Largest file that may be received whole into memory before it takes a permit, in bytes.
const SMALL_BODY_LIMIT: u64 = 256 << 10;
/// Memory for a small file beyond its content, in bytes, so that empty files count too.
const SMALL_OVERHEAD: usize = 1 << 10;
/// Entries decided in one blocking task.
const ENTRY_BATCH: usize = 256;

/// Permits of the shared semaphore that bounds the transfers which write at the same time. Each connection waits for
/// one permit at a time, so that waiting is fair between connections.
#[derive(Debug)]
pub struct Permits {
    all: Arc<Semaphore>,
    turn: tokio::sync::Mutex<()>,
}

impl Permits {
    /// Returns a connection's access to the shared semaphore.
    pub fn new(all: Arc<Semaphore>) -> Self {
        Self {
            all,
            turn: tokio::sync::Mutex::new(()),
        }
    }

    /// Waits for a permit. The caller holds it until the disk work ends.
    pub async fn acquire(&self) -> Result<OwnedSemaphorePermit, Reason> {
        let _turn = self.turn.lock().await;
        // The semaphore is closed only when the process ends.
        self.all
            .clone()
            .acquire_owned()
            .await
            .map_err(|_| Reason::from(Code::Stopping))
    }
}

/// The optional metadata that this receiver keeps.
#[derive(Debug, Clone, Default)]
pub struct Keep {
    /// Set owners and groups as the sender announces them. Also keep set-user-ID, set-group-ID and sticky bits of
    /// files, and extended attributes that grant rights. The system must permit it, as it does for root.
    pub owner: bool,
    /// Use numeric owner ids, even if the names are known.
    pub numeric_ids: bool,
    /// Set extended attributes as the sender announces them.
    pub xattrs: bool,
}

/// The parameters of a receiving session.
pub struct Receiving {
    /// The store that files are committed to.
    pub store: Arc<dyn Store>,
    /// The place in the store.
    pub place: Placement,
    /// The requested names.
    pub asked: RequestedNames,
    /// The accepted quota, if one was agreed.
    pub most: Option<AcceptedQuota>,
    /// Options for taking entries.
    pub take: ReceiveOptions,
    /// The paths that a mirror keeps though they are not announced. The sender excludes them by the same rules.
    pub spared: Filter,
    /// The optional metadata that is kept.
    pub keep: Keep,
    /// The sender's key, which partials are bound to.
    pub owner: [u8; 32],
    /// The required durability of a commit.
    pub durability: Durability,
    /// Whether a FIFO, socket or device at the sender counts as a failure.
    pub fail_specials: bool,
    /// Access to the shared semaphore.
    pub permits: Arc<Permits>,
    /// The connection's flow control, which bounds its memory.
    pub window: Arc<FlowControl>,
    /// The index of content that need not be sent again. Set only for a key that may read the whole store.
    pub index: Option<Index>,
    /// The file locks of the process.
    pub claims: Arc<FileLocks>,
    /// The session's id, which is the same over all its connections.
    pub session: [u8; 16],
    /// Limits and deadlines.
    pub config: Arc<Config>,
    /// The session's statistics over all its connections.
    pub ledger: Arc<SessionStats>,
    /// The observer of events.
    pub observer: Observer,
    /// Cancelled when no new entries are admitted.
    pub stopping: CancellationToken,
}

/// One session's receiver.
pub struct Receiver {
    session: Receiving,
    /// Identifies this receiver in file locks.
    claimant: Claimant,
    /// Wanted transfers whose stream has not arrived, by entry id.
    admitted: Mutex<HashMap<u64, oneshot::Sender<Result<IncomingTransfer, Reason>>>>,
    names: Mutex<HardLinks>,
    cases: NameCollisions,
    times: Mutex<Times>,
    counted: QuotaUse,
    unkept: Arc<WarningCounts>,
    owners: Owners,
    verdicts: mpsc::UnboundedSender<Verdict>,
    answers: Mutex<Option<mpsc::UnboundedReceiver<Verdict>>>,
    /// Groups of entries that are reported after the next sync.
    settling: mpsc::UnboundedSender<Vec<Settling>>,
    to_settle: Mutex<Option<mpsc::UnboundedReceiver<Vec<Settling>>>>,
    /// Whether this session has made, changed or removed something in the store.
    wrote: AtomicBool,
    committed: AtomicU64,
    bytes: AtomicU64,
    skipped: AtomicU64,
    failed: AtomicU64,
    /// Failures that the sender counted.
    unsent: AtomicU64,
    /// Entries among `failed` and `unsent` that are not failures: vanished sources, FIFOs, sockets and devices.
    omitted: AtomicU64,
    spent: OnceLock<SenderTime>,
    transfers: TaskTracker,
    /// Receipts that are written and not yet acknowledged.
    receipts: TaskTracker,
    /// Paths of a mirror's announced entries.
    announced: Announced,
    cleared: Cleared,
    /// The number of paths that a mirror removed, and the reason if it did not remove all.
    removed: OnceLock<(u64, Option<Reason>)>,
    /// Cancelled when the session continues over another connection or has ended. Later failures here do not count.
    given_up: CancellationToken,
    /// Time that the window was held up before this session; sessions may share a window.
    held_up_before: Duration,
}

/// A transfer's stream, with its plan already read.
pub struct IncomingTransfer {
    plan: Plan,
    stream: MessageReader,
    receipt: MessageWriter,
}

/// A wanted file that waits for admission.
struct WantedFile {
    id: u64,
    /// The sender's name for it.
    name: RelativePath,
    /// Its path in the store.
    path: RelativePath,
    /// Bytes of content, if known to the sender.
    size: Option<u64>,
    attributes: Attributes,
    claim: PartialKey,
    /// The entry's hard link field: the id of the first name.
    hard_link: Option<u64>,
    /// The digest in the entry.
    digest: Option<[u8; 32]>,
    /// The digest to compare with first, if the content may already exist.
    compare: Option<Compare>,
}

impl WantedFile {
    /// Returns the announced size in bytes; 0 if unknown.
    fn known_size(&self) -> u64 {
        self.size.unwrap_or(0)
    }
}

impl Receiver {
    /// Creates a receiver. It does nothing until [`run`](Self::run).
    pub fn new(session: Receiving) -> Arc<Self> {
        let (verdicts, answers) = mpsc::unbounded_channel();
        let (settling, to_settle) = mpsc::unbounded_channel();
        let held_up_before = session.window.slow_writes();
        let claimant = Claimant {
            session: session.session,
            age: session.claims.age(),
            window: Some(session.window.clone()),
            stall: session.config.stall,
        };
        Arc::new(Self {
            held_up_before,
            claimant,
            session,
            counted: QuotaUse::default(),
            admitted: Mutex::default(),
            names: Mutex::default(),
            cases: NameCollisions::default(),
            times: Mutex::default(),
            unkept: Arc::default(),
            owners: Owners::default(),
            verdicts,
            answers: Mutex::new(Some(answers)),
            settling,
            to_settle: Mutex::new(Some(to_settle)),
            wrote: AtomicBool::new(false),
            committed: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            unsent: AtomicU64::new(0),
            omitted: AtomicU64::new(0),
            spent: OnceLock::new(),
            transfers: TaskTracker::new(),
            receipts: TaskTracker::new(),
            announced: Announced::default(),
            cleared: Cleared::default(),
            removed: OnceLock::new(),
            given_up: CancellationToken::new(),
        })
    }

    /// Answers a manifest until the sender ends it and the last transfer has ended.
    ///
    /// Fails if the connection is lost or the sender breaks the protocol. Running transfers end with the connection;
    /// their data stays as partials.
    pub async fn run(
        self: &Arc<Self>,
        entries: MessageReader,
        verdicts: MessageWriter,
    ) -> Result<()> {
        self.record_earlier_connections();
        let second = || Error::Protocol("the peer opened a second manifest in one session".into());
        let answers = lock(&self.answers).take().ok_or_else(second)?;
        let to_settle = lock(&self.to_settle).take().ok_or_else(second)?;
        let unanswered = Arc::new(EntryCredit::default());
        let (small_to, small) = mpsc::unbounded_channel();
        let (large_to, large) = mpsc::unbounded_channel();
        let (compare_to, compare) = mpsc::unbounded_channel();
        let admit = move |wanted: WantedFile| {
            let queue = if wanted.size.is_some_and(|size| size <= SMALL_BODY_LIMIT) {
                &small_to
            } else {
                &large_to
            };
            // Fails only when the session is over.
            let _ = queue.send(wanted);
        };
        let written = tokio::try_join!(
            self.read_entries(entries, unanswered.clone(), admit.clone(), compare_to),
            self.compare(compare, admit),
            self.sync_groups(to_settle, unanswered.clone()),
            self.write_verdicts(verdicts, answers, unanswered),
            self.admit_small(small),
            self.admit_large(large),
        );
        self.transfers.close();
        written?;
        Ok(())
    }

    /// Passes a stream to its transfer, or rejects it with [`Code::NotWanted`].
    pub fn incoming(&self, plan: Plan, mut stream: MessageReader, receipt: MessageWriter) {
        let waiting = lock(&self.admitted).remove(&plan.id);
        match waiting {
            Some(waiting) => {
                // Fails only if the transfer was abandoned; dropping the writer then resets the stream.
                let _ = waiting.send(Ok(IncomingTransfer {
                    plan,
                    stream,
                    receipt,
                }));
            }
            None => {
                stream.stop(Code::NotWanted);
                receipt.reset(Code::NotWanted);
            }
        }
    }

    /// Ends the wait for a file that the sender cannot send.
    pub(crate) fn withdrawn(&self, withdraw: Withdraw) {
        if let Some(waiting) = lock(&self.admitted).remove(&withdraw.id) {
            // Fails only if the transfer was abandoned.
            let _ = waiting.send(Err(withdraw.why.into()));
        }
    }

    /// Records the final message of the sender.
    pub(crate) fn ended(&self, end: End) {
        self.unsent.fetch_add(end.failed, Ordering::Relaxed);
        self.session.ledger.unkept(&end.unkept.unwrap_or_default());
        if let Some(spent) = end.spent {
            // Set once: a session has one `End`.
            let _ = self.spent.set(spent);
        }
        if let Some(why) = end.interrupted {
            self.session.ledger.interrupted(why.into());
        }
    }

    /// Returns the sender's time measurements, if it reported them.
    pub(crate) fn spent(&self) -> Option<SenderTime> {
        self.spent.get().copied()
    }

    /// Removes the unannounced paths of a mirror if everything else succeeded, and reports each path to `tell`. If
    /// cancelled, it finishes the current removal and then stops.
    pub(crate) async fn mirror(self: &Arc<Self>, tell: mpsc::Sender<RelativePath>) {
        if self.session.take.delete.is_none() {
            return;
        }
        self.transfers.close();
        self.transfers.wait().await;
        let receiver = self.clone();
        let omitted = self.omitted.load(Ordering::Relaxed);
        let failed = self.failed.load(Ordering::Relaxed) + self.unsent.load(Ordering::Relaxed);
        let connected = self.session.window.connection().close_reason().is_none();
        let is_whole = failed == omitted && connected && self.session.ledger.is_whole();
        let removed = blocking(move || {
            let tell = |path: RelativePath| {
                (receiver.session.observer)(Event::Removed { path: path.clone() });
                tell.blocking_send(path).is_ok()
            };
            Ok(receiver
                .mirror_plan()
                .map_or((0, None), |mirror| mirror.remove(is_whole, tell)))
        });
        let removed = removed.await.unwrap_or_else(|why| (0, Some(why)));
        self.wrote.fetch_or(
            removed.0 > 0 && !self.session.take.dry_run,
            Ordering::Relaxed,
        );
        // Set once: a session has one mirror.
        let _ = self.removed.set(removed);
    }

    /// Waits for all transfers, syncs the store if needed, and returns the summary. Call it after the sender has
    /// ended.
    pub async fn summary(self: &Arc<Self>) -> Result<Summary, Reason> {
        self.transfers.close();
        self.transfers.wait().await;
        let durability = self.session.durability;
        if durability == Durability::Synced || self.wrote.load(Ordering::Relaxed) {
            // Skipped files may not be on the disk yet, and visible commits reach it only here.
            let store = self.session.store.clone();
            blocking(move || store.sync()).await?;
        }
        let held_up = self
            .session
            .window
            .slow_writes()
            .saturating_sub(self.held_up_before);
        Ok(Summary {
            committed: self.committed.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            skipped: self.skipped.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            durability,
            held_up: Some(held_up.as_millis() as u64),
            unkept: self.unkept.unkept(),
            removed: self.removed.get().map(|(removed, _)| *removed),
            unremoved: self
                .removed
                .get()
                .and_then(|(_, why)| why.clone())
                .map(Into::into),
        })
    }

    /// Returns a future that waits until every receipt is delivered. Call it after the last transfer has ended.
    pub(crate) fn receipts_delivered(&self) -> impl Future<Output = ()> + Send + use<> {
        let receipts = self.receipts.clone();
        receipts.close();
        async move { receipts.wait().await }
    }

    async fn read_entries(
        self: &Arc<Self>,
        mut entries: MessageReader,
        unanswered: Arc<EntryCredit>,
        admit: impl Fn(WantedFile),
        compare: mpsc::UnboundedSender<WantedFile>,
    ) -> Result<()> {
        let mut last_id = None;
        while let Some(frame) = entries.frame(Entry::LIMIT).await? {
            let mut batch = Vec::new();
            let mut frame = Some(frame);
            while let Some(this) = frame {
                if this.kind != Entry::TYPE {
                    self.control_notice(&this)?;
                    frame = entries.buffered(Entry::LIMIT)?;
                    continue;
                }
                let entry: Entry = this.decode().map_err(StreamError::from)?;
                self.session
                    .ledger
                    .found(entry.kind, entry.size.unwrap_or(0));
                if let Some(last) = last_id.filter(|&last| entry.id <= last) {
                    return Err(Error::Protocol(
                        format!(
                            "the ids do not ascend: entry {} follows entry {last}",
                            entry.id
                        )
                        .into(),
                    ));
                }
                last_id = Some(entry.id);
                unanswered.add(entry.id, this.payload.len())?;
                batch.push(entry);
                frame = if batch.len() < ENTRY_BATCH {
                    entries.buffered(Entry::LIMIT)?
                } else {
                    None
                };
            }
            if batch.is_empty() {
                continue;
            }
            (self.session.observer)(self.session.ledger.tell_found());
            let receiver = self.clone();
            let wanted = blocking(move || Ok(receiver.judge(batch)))
                .await
                .map_err(Error::Refused)?;
            for wanted in wanted {
                match wanted.compare {
                    // Fails only when the session is over.
                    Some(_) => drop(compare.send(wanted)),
                    None => admit(wanted),
                }
            }
        }
        unanswered.end();
        Ok(())
    }

    /// Handles a message between the entries of a manifest: `Complete` or `Unsendable`.
    fn control_notice(&self, frame: &Frame) -> Result<()> {
        if frame.kind == Complete::TYPE {
            frame.decode::<Complete>().map_err(StreamError::from)?;
            self.session.ledger.complete();
            (self.session.observer)(self.session.ledger.tell_found());
            return Ok(());
        }
        let Unsendable { path, why, omitted } = frame.decode().map_err(StreamError::from)?;
        let path = RelativePath::from_components(&path.0)
            .map_err(|bad| Error::Protocol(bad.to_string().into()))?;
        let why = Reason::from(why);
        let result = match self.is_omitted(why.code, omitted) {
            true => Settled::Omitted(why),
            false => Settled::Failed(why),
        };
        if let Settled::Omitted(_) = result {
            // An omission does not stop a mirror from removing other paths. The path itself stays, whatever its kind.
            self.omitted.fetch_add(1, Ordering::Relaxed);
            if let (Some(_), Ok(place)) = (self.session.take.delete, self.session.place.of(&path)) {
                self.announced.insert_omitted(&place);
            }
        }
        self.report(None, path, Kind::File, 0, result);
        Ok(())
    }

    /// Returns whether an unsendable source counts as omitted. Senders of older versions do not say; there only
    /// special files were omitted.
    fn is_omitted(&self, code: Code, said: Option<bool>) -> bool {
        match code {
            Code::Special => said.unwrap_or(true) && !self.session.fail_specials,
            Code::Vanished => said.unwrap_or(false),
            _ => false,
        }
    }

    fn answer(&self, verdict: Verdict) {
        // Fails only when the session is over.
        let _ = self.verdicts.send(verdict);
    }

    /// Writes verdicts in batches until every entry is answered and the sender has ended the manifest.
    async fn write_verdicts(
        &self,
        mut stream: MessageWriter,
        mut answers: mpsc::UnboundedReceiver<Verdict>,
        unanswered: Arc<EntryCredit>,
    ) -> Result<()> {
        let mut gathered = Vec::new();
        loop {
            let ended = tokio::select! {
                biased;
                _ = answers.recv_many(&mut gathered, ENTRY_BATCH) => false,
                () = unanswered.ended() => true,
            };
            if ended {
                stream.finish();
                return Ok(());
            }
            let mut buffer = BytesMut::new();
            let ids: Vec<u64> = gathered.iter().map(Verdict::id).collect();
            for verdict in gathered.drain(..) {
                verdict.put(&mut buffer);
            }
            stream
                .write_chunks(&mut [buffer.freeze()], self.session.config.deadline)
                .await?;
            unanswered.remove(&ids);
        }
    }

    /// Admits small files: reserves memory, then sends `Want`.
    async fn admit_small(
        self: &Arc<Self>,
        mut queue: mpsc::UnboundedReceiver<WantedFile>,
    ) -> Result<()> {
        while let Some(file) = queue.recv().await {
            let bytes = file.known_size() as usize + SMALL_OVERHEAD;
            match self
                .or_stopping(async { Ok(self.session.window.reserve(bytes).await) })
                .await
            {
                Err(why) => self.refuse(&file, why),
                Ok(Some(memory)) => {
                    let stream = self.admit(file.id);
                    self.answer(Verdict::Want(file.id, Vec::new()));
                    let receiver = self.clone();
                    self.transfers.spawn(
                        receiver
                            .receive_small(file, stream, memory)
                            .in_current_span(),
                    );
                }
                // The connection's memory share cannot hold the whole file.
                Ok(None) => self.admit_large_file(file).await,
            }
        }
        Ok(())
    }

    /// Admits large files: takes a permit, then sends `Want`.
    async fn admit_large(
        self: &Arc<Self>,
        mut queue: mpsc::UnboundedReceiver<WantedFile>,
    ) -> Result<()> {
        while let Some(file) = queue.recv().await {
            self.admit_large_file(file).await;
        }
        Ok(())
    }

    async fn admit_large_file(self: &Arc<Self>, file: WantedFile) {
        // An older connection of this session, or another session of this key, must first release the file and its
        // permit.
        let admitted = async {
            let claim = self.or_stopping(self.claim(&file)).await?;
            if self.is_committed_by_other(&file, &claim).await? {
                return Ok(None);
            }
            let permit = self
                .or_stopping(claim.or_superseded(self.session.permits.acquire()))
                .await?;
            Ok(Some((permit, claim)))
        };
        match admitted.await {
            Ok(None) => self.tell(Settling {
                id: file.id,
                size: file.known_size(),
                name: file.name,
                kind: Kind::File,
                made: false,
            }),
            Ok(Some((permit, claim))) => {
                let receiver = self.clone();
                self.transfers.spawn(
                    receiver
                        .receive_large(file, permit, claim)
                        .in_current_span(),
                );
            }
            Err(why) => self.refuse(&file, why),
        }
    }

    async fn claim(&self, file: &WantedFile) -> Result<FileLock, Reason> {
        self.session
            .claims
            .take(self.session.owner, &file.path, &self.claimant)
            .await
    }

    /// Returns whether another session of the key committed the same source while this one waited. If so, sets the
    /// metadata that this session wants.
    async fn is_committed_by_other(
        self: &Arc<Self>,
        file: &WantedFile,
        claim: &FileLock,
    ) -> Result<bool, Reason> {
        let source = self.committed_source(file);
        let take = self.session.take;
        let Some(found) = claim.found() else {
            return Ok(false);
        };
        if take.existing == Existing::Overwrite || !source.is_same(found, take.checksum) {
            return Ok(false);
        }
        let receiver = self.clone();
        let path = file.path.clone();
        let attributes = file.attributes.clone();
        let durability = found.durability;
        blocking(move || receiver.adopt(&path, &attributes, durability)).await?;
        self.stands(file.id, file.hard_link, &file.path);
        claim.committed(source);
        Ok(true)
    }

    /// Sets the wanted metadata on a file that another session committed with `durability`, and syncs if this session
    /// requires it. Blocks.
    fn adopt(
        &self,
        path: &RelativePath,
        attributes: &Attributes,
        durability: Durability,
    ) -> Result<(), Reason> {
        let store = &*self.session.store;
        let there = store.stat(path)?.ok_or(Code::NotFound)?;
        let changes = !self.attributes_match(attributes, path, &there);
        if changes {
            self.unkept
                .count(path, store.set_attributes(path, attributes)?);
            self.wrote.store(true, Ordering::Relaxed);
        }
        let is_durable = !changes && durability == Durability::Synced;
        if self.session.durability == Durability::Synced && !is_durable {
            store.sync()?;
        }
        Ok(())
    }

    /// Describes the committed source for other sessions that wait for the file.
    fn committed_source(&self, file: &WantedFile) -> CommittedSource {
        CommittedSource {
            claim: file.claim.clone(),
            digest: file.digest,
            durability: self.session.durability,
        }
    }

    async fn or_stopping<T>(
        &self,
        wait: impl Future<Output = Result<T, Reason>>,
    ) -> Result<T, Reason> {
        tokio::select! {
            biased;
            () = self.session.stopping.cancelled() => Err(Code::Stopping.into()),
            done = wait => done,
        }
    }

    fn admit(&self, id: u64) -> oneshot::Receiver<Result<IncomingTransfer, Reason>> {
        let (to, stream) = oneshot::channel();
        lock(&self.admitted).insert(id, to);
        stream
    }

    fn refuse(&self, file: &WantedFile, why: Reason) {
        self.answer(Verdict::Refuse(file.id, why.clone()));
        self.settled(file, Err(why));
    }

    fn started(&self, file: &WantedFile, held: u64) {
        let id = file.id;
        let path = file.name.clone();
        let size = file.known_size();
        (self.session.observer)(Event::Started {
            id,
            path,
            size,
            held,
        });
    }

    fn moved(&self, id: u64, bytes: u64) {
        self.session.ledger.moved(bytes);
        (self.session.observer)(Event::Moved { id, bytes });
    }

    /// Counts the result of a transfer; `Ok` holds the committed bytes.
    fn settled(&self, file: &WantedFile, result: Result<u64, Reason>) {
        let size = *result.as_ref().unwrap_or(&file.known_size());
        let result = match result {
            Ok(size) => {
                self.committed.fetch_add(1, Ordering::Relaxed);
                self.bytes.fetch_add(size, Ordering::Relaxed);
                self.wrote.store(true, Ordering::Relaxed);
                Settled::Committed
            }
            // Only a sender reports this code.
            Err(why) if why.code == Code::Vanished => {
                self.omitted.fetch_add(1, Ordering::Relaxed);
                self.announced.failed();
                Settled::Omitted(why)
            }
            Err(why) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                self.announced.failed();
                Settled::Failed(why)
            }
        };
        self.report(Some(file.id), file.name.clone(), Kind::File, size, result);
    }

    /// Counts a result in the session's statistics and reports it to the observer.
    fn report(&self, id: Option<u64>, path: RelativePath, kind: Kind, size: u64, result: Settled) {
        let ledger = &self.session.ledger;
        let lost = self.given_up.is_cancelled()
            || self.session.window.connection().close_reason().is_some();
        match &result {
            // After a connection loss, the loss is the cause, not the file.
            Settled::Failed(_) | Settled::Omitted(_) if lost => return,
            result if self.given_up.is_cancelled() => {
                ledger.settled_late(&path, kind, size, result)
            }
            result if !ledger.settled(&path, kind, size, result) => return,
            _ => {}
        }
        (self.session.observer)(Event::Settled {
            id,
            path,
            kind,
            size,
            result,
        });
    }

    /// Abandons this receiver while its disk work may still run. The session continues without it.
    pub(crate) fn give_up(&self) {
        self.given_up.cancel();
    }
}

/// Runs disk work on the threads for blocking tasks.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Reason> + Send + 'static,
) -> Result<T, Reason> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| {
        Err(Reason::new(
            Code::Internal,
            "cannot write: a fault inside haul; please report it",
        ))
    })
}

/// Locks a mutex. A poisoned lock means that another task panicked; the tables stay consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
