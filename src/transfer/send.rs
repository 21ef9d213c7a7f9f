//! The sender: reads files and sends them on streams.
//!
//! One task announces the entries that the walk finds, and one reads verdicts. Each wanted file has its own task and
//! stream. The receiver limits unanswered entries; all other limits of the sender are here.

mod digests;
mod entry_table;
mod file_reader;
mod hard_links;
mod holes;
mod pipe;
mod upload;

pub use crate::transfer::stats::TransferStats;
use digests::Digests;
use entry_table::{EntryTable, Pending};
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

/// Large bodies that are sent at the same time on a connection. quinn wakes every writer that waits for connection
/// credit, so more of them only cost time.
const LARGE_WRITER_LIMIT: usize = 16;
/// Small files that are read at the same time; enough to fill the queue of a disk.
const SMALL_READER_LIMIT: usize = 32;
/// Memory for small bodies until the connection takes them, in KiB.
const SMALL_MEMORY_LIMIT_KIB: usize = 16 << 10;
/// Most unsettled entries, including running transfers; limits the memory of the sender.
const MAX_UNSETTLED: usize = 10_000;
/// Bytes of entries that are gathered into one write.
const MANIFEST_WRITE_SIZE: usize = 16 << 10;
/// Entries that the walk may be ahead of the manifest.
const WALK_QUEUE_LIMIT: usize = 768;
/// Entries that one blocking task walks.
const WALK_BATCH: usize = 256;

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
    pub meter: Arc<StageCounters>,
    /// Cancelled when the receiver goes away. Nothing new is announced then.
    pub stopping: CancellationToken,
    /// Cancelled by the sender when everything is announced, answered and sent. Receipts may still be in flight.
    pub all_sent: CancellationToken,
}

/// The limits of unanswered entries and their bytes: small before the receiver is ready, then as it says.
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
    /// Creates the limits that a receiver has set.
    pub fn by(entries: u32, entry_bytes: u32) -> Self {
        Self(watch::Sender::new((entries, entry_bytes)))
    }

    /// Sets the limits when the receiver is ready.
    pub fn set(&self, ready: &Ready) {
        self.0.send_replace((ready.entries, ready.entry_bytes));
    }
}

/// The sender of one session. It outlives its connections. Entries that a lost connection left unsettled are announced
/// again on the next one, under the same ids. Settled entries are never announced again, so the statistics cover all
/// connections.
///
/// Dropping it cancels the session: open transfers are reset, and their received data stays at the receiver as
/// partials.
pub struct Sender {
    shared: Arc<SenderState>,
    /// The walk, until the first connection starts it.
    begin: Option<Begin>,
    found: mpsc::Receiver<WalkItem>,
    directories: mpsc::UnboundedReceiver<Announce>,
    /// Whether the walk may find more entries.
    walking: bool,
    transfers: JoinSet<()>,
}

struct Begin {
    walk: Walk,
    found: mpsc::Sender<WalkItem>,
    unsendable: Vec<(RelativePath, Reason)>,
}

impl Sender {
    /// Creates a sender. At most `parallel` transfers are open at the same time. The entries in `unsendable` are
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

    /// Creates a sender of one file with the data of a pipe.
    pub fn of_pipe(name: &[u8], pipe: Arc<Pipe>, observer: Observer) -> Result<Self, Reason> {
        let (found_to, found) = mpsc::channel(1);
        let (_, directories) = mpsc::unbounded_channel();
        // The new channel has room.
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

    /// Returns whether the session can continue over another connection. Data that was read from a pipe is lost.
    pub fn can_go_on(&self) -> bool {
        !self
            .shared
            .pipe
            .as_ref()
            .is_some_and(|pipe| pipe.is_spent())
    }

    /// Returns whether the session can change connections at any time.
    pub(crate) fn can_move(&self) -> bool {
        self.shared.pipe.is_none()
    }

    /// Sends over a connection until everything is settled or, if the receiver goes away, until nothing more can be
    /// settled. After it has failed or was dropped, it may be called again with another connection.
    ///
    /// Returns the error that ends the session on this connection. Failed files are counted in [`TransferStats`].
    pub async fn run(&mut self, sending: Sending) -> Result<()> {
        // Transfers of an earlier connection must not settle entries on this one.
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
            // Everything is settled. The receiver may end its half later, and sends nothing more.
            announced = run.announce(MessageWriter::new(send), &mut walked) => announced?,
            never = run.answers(&mut verdicts, &mut self.transfers) => match never? {},
        }
        // Dropping the reader would stop the stream before the last verdicts are read.
        tokio::spawn(async move { while let Ok(Some(_)) = verdicts.verdict().await {} });
        Ok(())
    }

    /// Returns the statistics so far. They are marked interrupted if entries are left and the receiver has gone away.
    pub fn sent(&self) -> TransferStats {
        self.shared.state().sent()
    }

    /// Returns whether everything is announced and settled.
    pub(crate) fn is_settled(&self) -> bool {
        self.shared.state().is_settled()
    }

    /// Returns a handle for other tasks while the session runs.
    pub(crate) fn tally(&self) -> SessionHandle {
        SessionHandle(self.shared.clone())
    }

    /// Returns a value that grows with progress at the receiver: a settled entry, or more held data of a file.
    pub fn progress(&self) -> u64 {
        self.shared.state().progress
    }

    /// Returns the observer of events.
    pub fn observer(&self) -> &Observer {
        &self.shared.observer
    }
}

/// Access to the statistics of a running session.
pub(crate) struct SessionHandle(Arc<SenderState>);

impl SessionHandle {
    /// Returns the final message to the receiver.
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
        // Without a pull, the client itself shows the warnings.
        let unkept = Some(unkept).filter(|unkept| spent.is_some() && !unkept.is_empty());
        End {
            entries,
            // The receiver was told of each omitted entry.
            failed: failed + vanished + specials,
            interrupted: interrupted.map(Into::into),
            spent,
            unkept,
        }
    }

    /// Reports a path that a mirror has removed. Invalid names are not reported.
    pub(crate) fn removed(&self, removed: &Removed) {
        if let Ok(path) = RelativePath::from_components(&removed.path.0) {
            (self.0.observer)(Event::Removed { path });
        }
    }

    /// Records that the receiver goes away.
    pub(crate) fn interrupted(&self, why: Reason) {
        (self.0.observer)(Event::GoingAway { why: why.clone() });
        self.0.state().gone = Some(why);
    }
}

/// Entries that the walk has found and that are not announced yet.
struct Walked<'a> {
    found: &'a mut mpsc::Receiver<WalkItem>,
    directories: &'a mut mpsc::UnboundedReceiver<Announce>,
    walking: &'a mut bool,
}

/// State that lasts as long as the session.
struct SenderState {
    /// The pipe that is sent, which cannot be read a second time.
    pipe: Option<Arc<Pipe>>,
    parallel: Arc<Semaphore>,
    large: Arc<Semaphore>,
    /// Limits the open files.
    files: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    /// The index that remembers the digests of sent files.
    index: Option<Index>,
    /// Whether files may grow while they are sent.
    may_grow: bool,
    state: Mutex<EntryTable>,
    /// Notified when an entry is answered or settled.
    changed: Notify,
    observer: Observer,
}

/// The session on its current connection.
struct Run {
    shared: Arc<SenderState>,
    sending: Sending,
    /// Number of `Working` messages from the receiver.
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

    /// Counts a result and reports it to the observer.
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

    /// Announces the entries that an earlier connection left and all that the walk finds. Ends the manifest when
    /// everything is settled.
    async fn announce(&self, mut manifest: MessageWriter, walked: &mut Walked<'_>) -> Result<()> {
        let mut buffer = BytesMut::new();
        buffer.put_u8(StreamType::Manifest as u8);
        put_varint(&mut buffer, self.sending.handle);
        // Wait for room before taking an entry: entries held by this future are lost with the connection.
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
                // Ends when the walk has ended and all directories are announced.
                directory = walked.directories.recv(), if directories => match directory {
                    Some(directory) => Some(WalkItem::Entry(directory)),
                    None => {
                        directories = false;
                        continue;
                    }
                },
                next = walked.found.recv(), if *walked.walking && waiting < MAX_WAITING => next,
                // Nothing else is ready: write the gathered entries before waiting.
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
        // Completely sent files only wait for their receipts. The receiver may get the end together with the last
        // file.
        self.until(EntryTable::all_sent).await;
        manifest.finish();
        self.sending.all_sent.cancel();
        self.until(|state| state.unsettled.is_empty()).await;
        Ok(())
    }

    /// Reports a source that never becomes an entry.
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

    /// Writes the gathered entries within the rate limits.
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

    /// Waits until one more entry may be unanswered. Writes all gathered entries before it waits.
    async fn room(&self, manifest: &mut MessageWriter, buffer: &mut BytesMut) -> Result<()> {
        let mut allowed = self.sending.allowed.0.subscribe();
        loop {
            let (entries, bytes) = *allowed.borrow_and_update();
            // Allow at least one entry whatever the receiver says; otherwise the session would never make progress.
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
                // Cannot fail: the run owns the sending end.
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

    /// Reads verdicts and runs the transfers they ask for, as long as it is polled. A wanted file is only an item in a
    /// queue until it may transfer. Tasks take kilobytes each, and thousands of files may be wanted.
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
                        "the receiver ended the manifest before all entries were answered and sent"
                            .into(),
                    ));
                }
                return pending().await;
            };
            let id = verdict.id();
            let (announce, sent) = self.state().answered(id, &verdict)?;
            self.shared.changed.notify_waiters();
            match verdict {
                // This session sent it, and the receipt was lost with a connection.
                Verdict::Skip(_) if sent => self.settle(id, Settled::Committed),
                Verdict::Skip(_) => self.settle(id, Settled::Skipped),
                Verdict::Done(_) => self.settle(id, Settled::Committed),
                Verdict::Refuse(_, why) => self.settle(id, Settled::Failed(why)),
                Verdict::Want(_, _) if announce.kind != Kind::File => {
                    return Err(Error::Protocol(
                        format!(
                            "the receiver wants the content of entry {id}, which is not a file"
                        )
                        .into(),
                    ));
                }
                Verdict::Want(_, held) => wanted.push_back((id, announce, held)),
            }
        }
    }

    /// Records that a file was completely sent.
    fn sent(&self, id: u64) {
        self.state().sent_whole(id);
        self.shared.changed.notify_waiters();
    }

    fn settle_transfer(&self, id: u64, result: Result<(), Reason>) {
        // After a connection loss, the loss ended the session; no single file failed.
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
        // The server is stopping. This is reported once for the session, not for each file.
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

/// Returns a channel that adds digests to entries on their way to `to`.
fn digested(digests: Digests, to: mpsc::Sender<WalkItem>) -> mpsc::Sender<WalkItem> {
    let (found_to, found) = mpsc::channel(WALK_QUEUE_LIMIT);
    tokio::spawn(digests.put(found, to));
    found_to
}

/// Walks in batches on blocking threads, until the other end of the channel is gone. The wait for a silent peer must
/// not hold one of the few blocking threads.
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

/// Runs disk work and hashing on the threads for blocking tasks.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Reason> + Send + 'static,
) -> Result<T, Reason> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| {
        Err(Reason::new(
            Code::Internal,
            "cannot read the file: a fault inside haul; please report it",
        ))
    })
}
