//! The sender: files to streams.
//!
//! One task announces what the walk finds, one reads verdicts, and each wanted file is a task of its own with a stream
//! of its own. The room for unanswered entries is the receiver's; everything else that bounds the sender is here.

mod digests;
mod entry_table;
mod file_reader;
mod hard_links;
mod holes;
mod pipe;
mod upload;

use digests::Digests;
use entry_table::{EntryTable, Pending};
pub use entry_table::{MAX_FAILURES, TransferStats};
use hard_links::{LinkRole, MAX_WAITING};

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::pending;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use quinn::Connection;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::error::{Code, Error, Reason, Result};
use crate::net::rate_limit::RateLimits;
use crate::net::stream::{MessageReader, MessageWriter, StreamError};
use crate::protocol::path::RelativePath;
use crate::protocol::{
    Complete, Components, End, Entry, Kind, Message, Ready, Removed, SenderTime, StreamType,
    Unsendable, put_varint,
};
use crate::protocol::{EARLY_UNANSWERED, EARLY_UNANSWERED_BYTES, Verdict};
use crate::storage::digest_index::Index;
use crate::storage::open_files::limit_to_open_files;
use crate::storage::pipe::Pipe;
use crate::storage::walk::{Announce, Tree, Walk, WalkItem, WalkOptions};
use crate::transfer::events::{Event, Observer, Settled};
use crate::transfer::sampler::StageCounters;

/// Large bodies that write at the same time on a connection: quinn wakes every writer that is blocked on connection
/// credit, so more only cost.
const LARGE_WRITER_LIMIT: usize = 16;
/// Small files that are read at the same time: enough to keep a disk's queue full.
const SMALL_READER_LIMIT: usize = 32;
/// Memory for small bodies on their way into the connection, in KiB.
const SMALL_MEMORY_LIMIT_KIB: usize = 16 << 10;
/// Entries in all that may be unsettled, transfers under way included; bounds the sender's own memory.
const MAX_UNSETTLED: usize = 10_000;
/// Entries are gathered into one write up to so many bytes.
const MANIFEST_WRITE_SIZE: usize = 16 << 10;
/// What the walk may be ahead of the manifest, in entries.
const WALK_QUEUE_LIMIT: usize = 768;
/// Entries walked in one go off the network threads.
const WALK_BATCH: usize = 256;
/// The connection that a session runs over for now, and what the receiver said on it.
pub struct Sending {
    /// The connection.
    pub connection: Connection,
    /// The stream id of the session's control stream.
    pub handle: u64,
    /// What the receiver allows.
    pub allowed: Arc<Allowed>,
    /// What may go out in a second: entries, plans, bodies and trailers.
    pub limits: RateLimits,
    /// Silence that ends a transfer.
    pub deadline: Duration,
    /// Counts where transfers stand.
    pub meter: Arc<StageCounters>,
    /// Cancelled when the receiver goes away: nothing new is announced then.
    pub stopping: CancellationToken,
    /// Cancelled by the sender when all is announced, answered and sent; receipts may still be on their way.
    pub all_sent: CancellationToken,
}

/// How much may stand unanswered: little before the receiver is ready, then what it says.
#[derive(Debug)]
pub struct Allowed(watch::Sender<(u32, u32)>);

impl Default for Allowed {
    fn default() -> Self {
        Self(watch::Sender::new((
            EARLY_UNANSWERED,
            EARLY_UNANSWERED_BYTES,
        )))
    }
}

impl Allowed {
    /// What a receiver has said.
    pub fn by(entries: u32, entry_bytes: u32) -> Self {
        Self(watch::Sender::new((entries, entry_bytes)))
    }

    /// The receiver is ready.
    pub fn set(&self, ready: &Ready) {
        self.0.send_replace((ready.entries, ready.entry_bytes));
    }
}

/// One session's sender. It outlives its connections: what one of them left unsettled is announced anew on the next,
/// under the same ids, and what is settled never again, so that its account adds up over all of them.
///
/// Dropping it cancels: open transfers are reset, and what the receiver has of them stays there as partials.
pub struct Sender {
    shared: Arc<SenderState>,
    /// What waits for the first connection.
    begin: Option<Begin>,
    found: mpsc::Receiver<WalkItem>,
    directories: mpsc::UnboundedReceiver<Announce>,
    /// There may be more to find.
    walking: bool,
    transfers: JoinSet<()>,
}

struct Begin {
    walk: Walk,
    found: mpsc::Sender<WalkItem>,
    unsendable: Vec<(RelativePath, Reason)>,
}

impl Sender {
    /// A sender that has not begun. At most `parallel` transfers are open at the same time; what is `unsendable` is
    /// settled as failed.
    pub fn new(
        trees: Vec<Tree>,
        unsendable: Vec<(RelativePath, Reason)>,
        options: WalkOptions,
        parallel: usize,
        observer: Observer,
    ) -> Self {
        let (found_to, found) = mpsc::channel(WALK_QUEUE_LIMIT);
        let (directories_to, directories) = mpsc::unbounded_channel();
        let shared = SenderState {
            index: options.index.clone(),
            may_grow: options.allow_growing,
            ..SenderState::new(parallel, None, observer)
        };
        let begin = Some(Begin {
            walk: Walk::new(trees, options, directories_to),
            found: found_to,
            unsendable,
        });
        let shared = Arc::new(shared);
        let transfers = JoinSet::new();
        Self {
            shared,
            begin,
            found,
            directories,
            walking: true,
            transfers,
        }
    }

    /// A sender of one file, whose content comes out of a pipe.
    pub fn of_pipe(name: &[u8], pipe: Arc<Pipe>, observer: Observer) -> Result<Self, Reason> {
        let (found_to, found) = mpsc::channel(1);
        let (_, directories) = mpsc::unbounded_channel();
        // There is room for it.
        let _ = found_to.try_send(WalkItem::Entry(Announce::of_pipe(name, pipe.clone())?));
        let shared = Arc::new(SenderState::new(1, Some(pipe), observer));
        let transfers = JoinSet::new();
        Ok(Self {
            shared,
            begin: None,
            found,
            directories,
            walking: true,
            transfers,
        })
    }

    /// Whether it can go on over another connection. What was read of a pipe is gone.
    pub fn can_go_on(&self) -> bool {
        !self
            .shared
            .pipe
            .as_ref()
            .is_some_and(|pipe| pipe.is_spent())
    }

    /// Whether it can do so at any time.
    pub(crate) fn can_move(&self) -> bool {
        self.shared.pipe.is_none()
    }

    /// Sends over a connection until everything is settled, or, when the receiver goes away, until nothing more can be.
    /// Once it has failed or was dropped it may be called again, with another connection.
    ///
    /// # Errors
    /// What ends the session on this connection; a file that fails is counted in [`TransferStats`].
    pub async fn run(&mut self, sending: Sending) -> Result<()> {
        // Nothing of an earlier connection may settle what is announced on this one.
        self.transfers.shutdown().await;
        self.shared.state().start_connection();
        let (send, receive) = sending
            .connection
            .open_bi()
            .await
            .map_err(StreamError::from)?;
        if let Some(Begin {
            walk: trees,
            found,
            unsendable,
        }) = self.begin.take()
        {
            let digests = Digests::of(trees.options());
            let found = if digests.any() {
                digested(digests, found)
            } else {
                found
            };
            tokio::spawn(async move {
                for (path, why) in unsendable {
                    if found.send(WalkItem::Failed(path, why)).await.is_err() {
                        return;
                    }
                }
                walk(trees, found).await;
            });
        }
        let run = Arc::new(Run {
            shared: self.shared.clone(),
            sending,
            working: AtomicU64::new(0),
        });
        let mut walked = Walked {
            found: &mut self.found,
            directories: &mut self.directories,
            walking: &mut self.walking,
        };
        let mut verdicts = MessageReader::new(receive);
        tokio::select! {
            // All is settled. That the receiver ends its half too may be later, and tells nothing more.
            announced = run.announce(MessageWriter::new(send), &mut walked) => announced?,
            never = run.answers(&mut verdicts, &mut self.transfers) => match never? {},
        }
        // Dropped, it would stop the stream under the receiver's last words.
        tokio::spawn(async move { while let Ok(Some(_)) = verdicts.verdict().await {} });
        Ok(())
    }

    /// The account so far, interrupted when something is left and the receiver has gone away.
    pub fn sent(&self) -> TransferStats {
        self.shared.state().sent()
    }

    /// Whether all is announced and settled.
    pub(crate) fn is_settled(&self) -> bool {
        self.shared.state().is_settled()
    }

    /// What others see of it while it runs.
    pub(crate) fn tally(&self) -> SessionHandle {
        SessionHandle(self.shared.clone())
    }

    /// Grows whenever the receiver is seen to have come further: an entry is settled, or more of a file is held.
    pub fn progress(&self) -> u64 {
        self.shared.state().progress
    }

    /// Takes the events.
    pub fn observer(&self) -> &Observer {
        &self.shared.observer
    }
}

/// A running session's account.
pub(crate) struct SessionHandle(Arc<SenderState>);

impl SessionHandle {
    /// What the receiver is told when all is sent.
    pub(crate) fn end(&self, spent: Option<SenderTime>) -> End {
        let TransferStats {
            entries,
            failed,
            vanished,
            specials,
            interrupted,
            unkept,
            ..
        } = self.0.state().sent();
        // Only a client has somebody to tell it to otherwise.
        let unkept = Some(unkept).filter(|unkept| spent.is_some() && !unkept.is_empty());
        End {
            entries,
            // The receiver was told of each of them which is no failure.
            failed: failed + vanished + specials,
            interrupted: interrupted.map(Into::into),
            spent,
            unkept,
        }
    }

    /// Tells of what a mirror has removed. A name that is none is nobody's to show.
    pub(crate) fn removed(&self, removed: &Removed) {
        if let Ok(path) = RelativePath::from_components(&removed.path.0) {
            (self.0.observer)(Event::Removed { path });
        }
    }

    /// Notes that the receiver goes away.
    pub(crate) fn interrupted(&self, why: Reason) {
        (self.0.observer)(Event::GoingAway { why: why.clone() });
        self.0.state().gone = Some(why);
    }
}

/// What the walk has found and nobody has announced.
struct Walked<'a> {
    found: &'a mut mpsc::Receiver<WalkItem>,
    directories: &'a mut mpsc::UnboundedReceiver<Announce>,
    walking: &'a mut bool,
}

/// What lasts as long as the session.
struct SenderState {
    /// What is sent cannot be read a second time.
    pipe: Option<Arc<Pipe>>,
    parallel: Arc<Semaphore>,
    large: Arc<Semaphore>,
    /// Bounds the files that are open.
    files: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    /// Where the digests of what was sent are remembered.
    index: Option<Index>,
    /// Files may become longer while they are sent.
    may_grow: bool,
    state: Mutex<EntryTable>,
    /// Told whenever an entry is answered or settled.
    changed: Notify,
    observer: Observer,
}

/// The session on one connection.
struct Run {
    shared: Arc<SenderState>,
    sending: Sending,
    /// Times that the receiver said of a file that it is at work on it.
    working: AtomicU64,
}

impl SenderState {
    fn new(parallel: usize, pipe: Option<Arc<Pipe>>, observer: Observer) -> Self {
        Self {
            pipe,
            parallel: Arc::new(Semaphore::new(parallel.max(1))),
            large: Arc::new(Semaphore::new(LARGE_WRITER_LIMIT)),
            files: Arc::new(Semaphore::new(limit_to_open_files(
                LARGE_WRITER_LIMIT + SMALL_READER_LIMIT,
            ))),
            memory: Arc::new(Semaphore::new(SMALL_MEMORY_LIMIT_KIB)),
            index: None,
            may_grow: false,
            state: Mutex::default(),
            changed: Notify::new(),
            observer,
        }
    }

    fn state(&self) -> MutexGuard<'_, EntryTable> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a result and tells the observer.
    fn report(&self, id: Option<u64>, path: RelativePath, kind: Kind, size: u64, result: Settled) {
        self.state().count(&path, kind, size, &result);
        (self.observer)(Event::Settled {
            id,
            path,
            kind,
            size,
            result,
        });
    }
}

impl Run {
    fn state(&self) -> MutexGuard<'_, EntryTable> {
        self.shared.state()
    }

    /// Announces what an earlier connection left and all that is found, and ends the manifest when everything is settled.
    async fn announce(&self, mut manifest: MessageWriter, walked: &mut Walked<'_>) -> Result<()> {
        let mut buffer = BytesMut::new();
        buffer.put_u8(StreamType::Manifest as u8);
        put_varint(&mut buffer, self.sending.handle);
        // There is room before anything is taken up: what this future holds is gone when the connection is lost.
        loop {
            self.room(&mut manifest, &mut buffer).await?;
            if self.sending.stopping.is_cancelled() || !self.state().put_reannounced(&mut buffer) {
                break;
            }
        }
        let mut directories = true;
        loop {
            self.room(&mut manifest, &mut buffer).await?;
            let changed = self.shared.changed.notified();
            if !self.sending.stopping.is_cancelled() && self.state().put_waiting(&mut buffer) {
                continue;
            }
            let waiting = self.state().names.pending();
            if !directories && !*walked.walking && waiting == 0 {
                self.state().complete = true;
                break;
            }
            let next = tokio::select! {
                biased;
                () = self.sending.stopping.cancelled() => {
                    self.state().gone.get_or_insert(Code::Stopping.into());
                    break;
                }
                // Ends when the walk is over and all directories are announced.
                directory = walked.directories.recv(), if directories => match directory {
                    Some(directory) => Some(WalkItem::Entry(directory)),
                    None => {
                        directories = false;
                        continue;
                    }
                },
                next = walked.found.recv(), if *walked.walking && waiting < MAX_WAITING => next,
                // Nothing more is found right now: what is gathered goes out before the wait.
                () = std::future::ready(()), if !buffer.is_empty() => {
                    self.write_entries(&mut manifest, &mut buffer).await?;
                    continue;
                }
                () = changed, if waiting > 0 => continue,
            };
            match next {
                Some(WalkItem::Entry(announce)) => {
                    let counts = announce.kind != Kind::Directory;
                    self.state().put_found(announce, &mut buffer);
                    if counts {
                        self.report_found();
                    }
                }
                Some(WalkItem::Failed(path, why)) => {
                    let omitted = (why.code == Code::Special).then_some(false);
                    self.unsendable(path, Settled::Failed(why), omitted, &mut buffer);
                }
                Some(WalkItem::Omitted(path, why)) => {
                    self.unsendable(path, Settled::Omitted(why), Some(true), &mut buffer);
                }
                Some(WalkItem::Excluded(count)) => self.state().exclude(count),
                None => {
                    *walked.walking = false;
                    Complete {}.put(&mut buffer);
                    self.state().all_found = true;
                    self.report_found();
                }
            }
        }
        self.write_entries(&mut manifest, &mut buffer).await?;
        // What is sent whole wants but its receipt, and the receiver may get the end together with the last of it.
        self.until(EntryTable::all_sent).await;
        manifest.finish();
        self.sending.all_sent.cancel();
        self.until(|state| state.unsettled.is_empty()).await;
        Ok(())
    }

    /// Tells of something that never becomes an entry.
    fn unsendable(
        &self,
        path: RelativePath,
        result: Settled,
        omitted: Option<bool>,
        buffer: &mut BytesMut,
    ) {
        if let Settled::Failed(why) | Settled::Omitted(why) = &result {
            Unsendable {
                path: Components::from(&path),
                why: why.clone().into(),
                omitted,
            }
            .put(buffer);
        }
        self.shared.report(None, path, Kind::File, 0, result);
    }

    /// Writes the entries gathered in the buffer, within the limits.
    async fn write_entries(
        &self,
        manifest: &mut MessageWriter,
        buffer: &mut BytesMut,
    ) -> Result<()> {
        while !buffer.is_empty() {
            let part = buffer.split_to(buffer.len().min(self.sending.limits.block()));
            self.sending.limits.take(part.len()).await;
            manifest.write_bytes(part.freeze()).await?;
        }
        Ok(())
    }

    /// Waits until one more entry may stand unanswered; meanwhile nothing gathered is kept back.
    async fn room(&self, manifest: &mut MessageWriter, buffer: &mut BytesMut) -> Result<()> {
        let mut allowed = self.sending.allowed.0.subscribe();
        loop {
            let (entries, bytes) = *allowed.borrow_and_update();
            // At least one, however little the receiver allows, or nothing would ever move.
            let entries = entries.max(1);
            let bytes = bytes.saturating_sub(Entry::LIMIT as u32).max(1);
            let room = |state: &EntryTable| {
                state.unanswered < entries
                    && state.unanswered_bytes < bytes
                    && state.unsettled.len() < MAX_UNSETTLED
            };
            let has_room = room(&self.state());
            if !has_room || buffer.len() >= MANIFEST_WRITE_SIZE {
                self.write_entries(manifest, buffer).await?;
            }
            if has_room {
                return Ok(());
            }
            tokio::select! {
                () = self.until(room) => return Ok(()),
                // Cannot fail: the run holds the other end.
                _ = allowed.changed() => {}
            }
        }
    }

    async fn until(&self, condition: impl Fn(&EntryTable) -> bool) {
        loop {
            let changed = self.shared.changed.notified();
            if condition(&self.state()) {
                return;
            }
            changed.await;
        }
    }

    fn report_found(&self) {
        let (files, bytes, all) = self.state().found();
        let complete = all && self.shared.pipe.as_ref().is_none_or(|pipe| pipe.is_ended());
        (self.shared.observer)(Event::Found {
            files,
            bytes,
            complete,
        });
    }

    /// Reads verdicts and runs the transfers they ask for, as long as it is polled. A wanted file is but a row
    /// in a queue until one of the open transfers is its: tasks take kilobytes each, and thousands may be wanted.
    async fn answers(
        self: &Arc<Self>,
        verdicts: &mut MessageReader,
        transfers: &mut JoinSet<()>,
    ) -> Result<Infallible> {
        let mut wanted = VecDeque::new();
        loop {
            let verdict = tokio::select! {
                verdict = verdicts.verdict() => verdict?,
                Some(_) = transfers.join_next() => continue,
                Ok(open) = self.shared.parallel.clone().acquire_owned(), if !wanted.is_empty() => {
                    if let Some((id, announce, held)) = wanted.pop_front() {
                        transfers.spawn(self.clone().transfer(id, announce, held, open));
                    }
                    continue;
                }
            };
            let Some(verdict) = verdict else {
                if !self.state().all_sent() {
                    return Err(Error::Protocol(
                        "it ended the manifest with entries unanswered or not sent".into(),
                    ));
                }
                return pending().await;
            };
            let id = verdict.id();
            let (announce, sent) = self.state().answered(id, &verdict)?;
            self.shared.changed.notify_waiters();
            match verdict {
                // Not there already: this session brought it, and the receipt was lost with a connection.
                Verdict::Skip(_) if sent => self.settle(id, Settled::Committed),
                Verdict::Skip(_) => self.settle(id, Settled::Skipped),
                Verdict::Done(_) => self.settle(id, Settled::Committed),
                Verdict::Refuse(_, why) => self.settle(id, Settled::Failed(why)),
                Verdict::Want(_, _) if announce.kind != Kind::File => {
                    return Err(Error::Protocol(
                        format!("it wants the content of entry {id}, which is no file").into(),
                    ));
                }
                Verdict::Want(_, held) => wanted.push_back((id, announce, held)),
            }
        }
    }

    /// Notes that a file was sent to its end.
    fn sent(&self, id: u64) {
        self.state().sent_whole(id);
        self.shared.changed.notify_waiters();
    }

    fn settle_transfer(&self, id: u64, result: Result<(), Reason>) {
        // Once the connection is gone, that is what ended the session; no file failed by itself.
        if self.sending.connection.close_reason().is_none() {
            self.settle(
                id,
                result.map_or_else(Settled::ended, |()| Settled::Committed),
            );
        }
    }

    fn settle(&self, id: u64, result: Settled) {
        let settled = |pending: &Pending| (pending.announce.clone(), pending.size(), pending.role);
        let Some((announce, size, role)) = self.state().unsettled.get(&id).map(settled) else {
            return;
        };
        let stands = matches!(result, Settled::Committed | Settled::Skipped);
        let stopping = matches!(&result, Settled::Failed(why) if why.code == Code::Stopping);
        // The server stops: that is said once for the session, not for each file.
        if stopping {
            self.sending.stopping.cancel();
        } else if !matches!(role, LinkRole::Reannounced(_)) {
            self.shared
                .report(Some(id), announce.path.clone(), announce.kind, size, result);
        }
        self.state().settled(id, stands, stopping);
        self.shared.changed.notify_waiters();
    }
}

/// Puts digests to what is found on its way to there.
fn digested(digests: Digests, to: mpsc::Sender<WalkItem>) -> mpsc::Sender<WalkItem> {
    let (found_to, found) = mpsc::channel(WALK_QUEUE_LIMIT);
    tokio::spawn(digests.put(found, to));
    found_to
}

/// Walks a part at a time, off the network threads, until the other end of the channel is gone. A peer that answers
/// nothing makes it wait, and such a wait must not hold one of the threads for disk work, which are few.
async fn walk(mut walk: Walk, to: mpsc::Sender<WalkItem>) {
    loop {
        let part = blocking(move || {
            let part: Vec<WalkItem> = walk.by_ref().take(WALK_BATCH).collect();
            Ok((part, walk))
        });
        let Ok((part, rest)) = part.await else { return };
        if part.is_empty() {
            return;
        }
        walk = rest;
        for found in part {
            if to.send(found).await.is_err() {
                return;
            }
        }
    }
}

/// Runs disk work and hashing off the network threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Reason> + Send + 'static,
) -> Result<T, Reason> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| {
        Err(Reason::new(
            Code::Internal,
            "a fault inside haul while reading",
        ))
    })
}
