//! The receiver: streams to the store.
//!
//! Entries are judged in batches against what stands in the store; what is settled by the manifest alone is answered at
//! once. The rest waits for admission in one of two queues: small files for memory, large ones for a permit, so that a
//! large file that waits holds up no small one. A [`Want`](crate::protocol::Want) is the admission: by then the room is set
//! aside, and nothing that waits holds anything that something else needs.

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

/// Files up to this size may be received whole into memory before they take a permit, in bytes.
const SMALL_BODY_LIMIT: u64 = 256 << 10;
/// What a small file in memory costs beyond its content, in bytes; so that empty ones are not free.
const SMALL_OVERHEAD: usize = 1 << 10;
/// Entries judged in one go off the network threads.
const ENTRY_BATCH: usize = 256;

/// The permits of the one semaphore that bounds the transfers which write at the same time, as one connection sees them:
/// it never waits for more than one, so that waiting is fair between connections.
#[derive(Debug)]
pub struct Permits {
    all: Arc<Semaphore>,
    turn: tokio::sync::Mutex<()>,
}

impl Permits {
    /// A connection's way to the shared semaphore.
    pub fn new(all: Arc<Semaphore>) -> Self {
        Self {
            all,
            turn: tokio::sync::Mutex::new(()),
        }
    }

    /// Waits for a permit. It is to be held until the disk work ends.
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

/// What of the metadata that is announced on demand is kept here.
#[derive(Debug, Clone, Default)]
pub struct Keep {
    /// Owners and groups are set as the sender says, and with them set-user-ID, set-group-ID and sticky on files, and the
    /// extended attributes that give rights. The system must permit it, as it does to root.
    pub owner: bool,
    /// Owners are taken by their numbers, also where their names are known.
    pub numeric_ids: bool,
    /// Extended attributes are set as the sender says.
    pub xattrs: bool,
}

/// Everything that a receiver needs to know of its session.
pub struct Receiving {
    /// Where files are committed to.
    pub store: Arc<dyn Store>,
    /// Where in the store.
    pub place: Placement,
    /// What was asked for.
    pub asked: RequestedNames,
    /// The most that is taken, if that was agreed.
    pub most: Option<AcceptedQuota>,
    /// How entries are taken.
    pub take: ReceiveOptions,
    /// What a mirror does not remove, though it is not announced. It is left out at the sender by the same rules.
    pub spared: Filter,
    /// What of the metadata that is announced on demand is kept.
    pub keep: Keep,
    /// The key of the sender, which partials are bound to.
    pub owner: [u8; 32],
    /// How durable a commit has to be.
    pub durability: Durability,
    /// A FIFO, socket or device that the sender has come upon is a failure.
    pub fail_specials: bool,
    /// The way to the shared semaphore.
    pub permits: Arc<Permits>,
    /// The connection's share of the memory.
    pub window: Arc<FlowControl>,
    /// Where content stands that need not be sent again. Only for a key that may read all of the store.
    pub index: Option<Index>,
    /// Who is receiving which file.
    pub claims: Arc<FileLocks>,
    /// The session's id, the same over all its connections.
    pub session: [u8; 16],
    /// Limits and deadlines.
    pub config: Config,
    /// The session's account, over all its connections.
    pub ledger: Arc<SessionStats>,
    /// Takes the events.
    pub observer: Observer,
    /// Cancelled when nothing new is to be admitted.
    pub stopping: CancellationToken,
}

/// One session's receiver.
pub struct Receiver {
    session: Receiving,
    /// As it claims files.
    claimant: Claimant,
    /// Transfers that are wanted and whose stream has not come yet.
    admitted: Mutex<HashMap<u64, oneshot::Sender<Result<IncomingTransfer, Reason>>>>,
    names: Mutex<HardLinks>,
    cases: NameCollisions,
    times: Mutex<Times>,
    counted: QuotaUse,
    unkept: Arc<WarningCounts>,
    owners: Owners,
    verdicts: mpsc::UnboundedSender<Verdict>,
    answers: Mutex<Option<mpsc::UnboundedReceiver<Verdict>>>,
    /// Entries that are told once they are on the disk, in groups.
    settling: mpsc::UnboundedSender<Vec<Settling>>,
    to_settle: Mutex<Option<mpsc::UnboundedReceiver<Vec<Settling>>>>,
    /// Something was made, changed or removed in the store.
    wrote: AtomicBool,
    committed: AtomicU64,
    bytes: AtomicU64,
    skipped: AtomicU64,
    failed: AtomicU64,
    /// What failed as the sender saw it.
    unsent: AtomicU64,
    /// What of that is no failure: what has vanished at the source, and FIFOs, sockets and devices.
    omitted: AtomicU64,
    spent: OnceLock<SenderTime>,
    transfers: TaskTracker,
    /// Receipts that are written and not yet delivered.
    receipts: TaskTracker,
    /// Where a mirror's entries stand.
    announced: Announced,
    cleared: Cleared,
    /// How many things a mirror has removed, and why not all.
    removed: OnceLock<(u64, Option<Reason>)>,
    /// The session goes on over another connection, or is over: what fails here from now on has not failed by itself.
    given_up: CancellationToken,
    /// What the window had been held up when this began; other sessions may share it.
    held_up_before: Duration,
}

/// A transfer's stream, its plan read.
pub struct IncomingTransfer {
    plan: Plan,
    stream: MessageReader,
    receipt: MessageWriter,
}

/// A file that is wanted, on its way to admission.
struct WantedFile {
    id: u64,
    /// As the sender named it.
    name: RelativePath,
    /// Where it comes to stand.
    path: RelativePath,
    /// Bytes of content, if the sender knows.
    size: Option<u64>,
    attributes: Attributes,
    claim: PartialKey,
    /// What the entry said of its other names.
    hard_link: Option<u64>,
    /// What the entry said of its content.
    digest: Option<[u8; 32]>,
    /// What to compare with first, if it may be there already.
    compare: Option<Compare>,
}

impl WantedFile {
    /// Bytes of content as far as the sender knows.
    fn known_size(&self) -> u64 {
        self.size.unwrap_or(0)
    }
}

impl Receiver {
    /// A receiver that has not begun.
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

    /// Answers a manifest until the sender ends it, and until the last transfer is over.
    ///
    /// # Errors
    /// What ends the session as a whole: the connection is lost, or the sender breaks the protocol. Transfers under way
    /// end with the connection; what they brought stays as partials.
    pub async fn run(
        self: &Arc<Self>,
        entries: MessageReader,
        verdicts: MessageWriter,
    ) -> Result<()> {
        self.record_earlier_connections();
        let second = || Error::Protocol("a second manifest in one session".into());
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

    /// Hands over a transfer's stream; one that was not wanted is turned away.
    pub fn incoming(&self, plan: Plan, mut stream: MessageReader, receipt: MessageWriter) {
        let waiting = lock(&self.admitted).remove(&plan.id);
        match waiting {
            Some(waiting) => {
                // Fails only when the transfer was given up meanwhile; dropping the writer resets it then.
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

    /// Takes back what was wanted and cannot be sent.
    pub(crate) fn withdrawn(&self, withdraw: Withdraw) {
        if let Some(waiting) = lock(&self.admitted).remove(&withdraw.id) {
            // Fails only when the transfer was given up meanwhile.
            let _ = waiting.send(Err(withdraw.why.into()));
        }
    }

    /// Takes note of how the sender has ended.
    pub(crate) fn ended(&self, end: End) {
        self.unsent.fetch_add(end.failed, Ordering::Relaxed);
        self.session.ledger.unkept(&end.unkept.unwrap_or_default());
        if let Some(spent) = end.spent {
            // A session has one end.
            let _ = self.spent.set(spent);
        }
        if let Some(why) = end.interrupted {
            self.session.ledger.interrupted(why.into());
        }
    }

    /// Where the sender's time went, as it told.
    pub(crate) fn spent(&self) -> Option<SenderTime> {
        self.spent.get().copied()
    }

    /// Removes what a mirror has to, once everything else has gone well, and tells of each thing. Cancelled, it ends with
    /// the thing that it is at.
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

    /// What stands on the disk of all that this session brought. To be called when the sender has ended it.
    pub async fn summary(self: &Arc<Self>) -> Result<Summary, Reason> {
        self.transfers.close();
        self.transfers.wait().await;
        let durability = self.session.durability;
        if durability == Durability::Synced || self.wrote.load(Ordering::Relaxed) {
            // Also what was skipped may not have reached the disk yet; and what was committed as visible only does so now.
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

    /// Done once every receipt is delivered. To be called when no transfer runs any more.
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
                        format!("entry {} after entry {last}", entry.id).into(),
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

    /// What stands between the entries of a manifest.
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
            // It keeps nothing else from being removed; what stands in its place is left, whatever it is.
            self.omitted.fetch_add(1, Ordering::Relaxed);
            if let (Some(_), Ok(place)) = (self.session.take.delete, self.session.place.of(&path)) {
                self.announced.insert_omitted(&place);
            }
        }
        self.report(None, path, Kind::File, 0, result);
        Ok(())
    }

    /// Whether what the sender does not send is no failure, as it says itself. One that says nothing is of an older version, in
    /// which only specials were none.
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

    /// Writes verdicts, several at a time, until every entry is answered and the sender has ended the manifest.
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

    /// Small files: memory first, then the Want.
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
                // The connection's share is too small to hold it whole.
                Ok(None) => self.admit_large_file(file).await,
            }
        }
        Ok(())
    }

    /// Large files: a permit first, then the Want.
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
        // An older connection of this session, or another session of this key, lets go of the file and of its permit first.
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

    /// Whether another session of the key has committed the same source while this one waited for the file. Its metadata is
    /// set as this session wants it.
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

    /// Gives a file that was committed so durably the metadata that this session wants, as durable as it has to be. Blocks.
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

    /// What is committed with a file, for another session that waits for it.
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

    /// Counts how a transfer went; what is committed has so many bytes.
    fn settled(&self, file: &WantedFile, result: Result<u64, Reason>) {
        let size = *result.as_ref().unwrap_or(&file.known_size());
        let result = match result {
            Ok(size) => {
                self.committed.fetch_add(1, Ordering::Relaxed);
                self.bytes.fetch_add(size, Ordering::Relaxed);
                self.wrote.store(true, Ordering::Relaxed);
                Settled::Committed
            }
            // Only a sender says so.
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

    /// Counts a result for the session's user and tells the observer.
    fn report(&self, id: Option<u64>, path: RelativePath, kind: Kind, size: u64, result: Settled) {
        let ledger = &self.session.ledger;
        let lost = self.given_up.is_cancelled()
            || self.session.window.connection().close_reason().is_some();
        match &result {
            // Once the connection is gone, that is what ended it.
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

    /// The session goes on without this receiver, which may still have a disk to wait for.
    pub(crate) fn give_up(&self) {
        self.given_up.cancel();
    }
}

/// Runs disk work off the network threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Reason> + Send + 'static,
) -> Result<T, Reason> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| {
        Err(Reason::new(
            Code::Internal,
            "a fault inside haul while writing",
        ))
    })
}

/// A poisoned lock means that another task panicked; the tables behind it are still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
