//! The sender: files to streams.
//!
//! One task announces what the walk finds, one reads verdicts, and each wanted file is a task of its own with a stream
//! of its own. The room for unanswered entries is the receiver's; everything else that bounds the sender is here.

mod body;
mod meter;
mod transfer;

pub use meter::Meter;
pub(crate) use meter::{Station, Watch};

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use quinn::Connection;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::bucket::Limits;
use crate::error::{Code, Error, Result, Why};
use crate::limits::within_open_files;
use crate::manifest::{Announce, Found, Tree, Verdict, Walk};
use crate::path::RelativePath;
use crate::progress::{Event, Observer, Settled};
use crate::stream::{MessageReader, MessageWriter, StreamError};
use crate::wire::{Kind, Message, Ready, StreamType, put_varint};

/// Large bodies that write at the same time on a connection: quinn wakes every writer that is blocked on connection
/// credit, so more only cost.
const LARGE_WRITERS: usize = 16;
/// Small files that are read at the same time: enough to keep a disk's queue full.
const SMALL_READERS: usize = 32;
/// Memory for small bodies on their way into the connection, in KiB.
const SMALL_MEMORY_KIB: usize = 16 << 10;
/// Entries in all that may be unsettled, transfers under way included; bounds the sender's own memory.
const MAX_UNSETTLED: usize = 10_000;
/// Ranges that a receiver may have offered as held in all its open Wants; over it, it is not honest.
const MAX_OPEN_HELD: usize = 64 << 10;
/// Entries are gathered into one write up to so many bytes.
const MANIFEST_WRITE: usize = 16 << 10;
/// What the walk may be ahead of the manifest, in entries.
const WALK_AHEAD: usize = 768;
/// Entries walked in one go off the network threads.
const WALK_PART: usize = 256;
/// Failures kept by name in [`Sent`]; the events name them all.
pub const MAX_FAILURES: usize = 1000;

/// What became of a session, as the sender saw it.
#[derive(Debug, Clone, Default)]
pub struct Sent {
    /// Entries announced.
    pub entries: u64,
    /// Files committed, links and empty files included.
    pub files: u64,
    /// Bytes of content committed.
    pub bytes: u64,
    /// Files and links that were there already.
    pub skipped: u64,
    /// Entries that failed, and what could not be sent at all.
    pub failed: u64,
    /// The first [`MAX_FAILURES`] of them.
    pub failures: Vec<(RelativePath, Why)>,
    /// Why the receiver ended the session early, if it did; what was not announced or answered by then was not sent.
    pub interrupted: Option<Why>,
}

impl Sent {
    /// The account of a session that never was, since none of its sources could be looked at.
    pub(crate) fn of_failures(failures: Vec<(RelativePath, Why)>, observer: &Observer) -> Self {
        let mut sent = Self::default();
        for (path, why) in failures {
            sent.count(&path, Kind::File, 0, &Settled::Failed(why.clone()));
            (observer)(Event::Settled { id: None, path, kind: Kind::File, size: 0, result: Settled::Failed(why) });
        }
        sent
    }

    fn count(&mut self, path: &RelativePath, kind: Kind, size: u64, result: &Settled) {
        match result {
            Settled::Failed(why) => {
                self.failed += 1;
                if self.failures.len() < MAX_FAILURES {
                    self.failures.push((path.clone(), why.clone()));
                }
            }
            _ if kind == Kind::Directory => {}
            Settled::Skipped => self.skipped += 1,
            Settled::Committed => {
                self.files += 1;
                self.bytes += size;
            }
        }
    }
}

/// What a sender needs to know of its session.
pub struct Sending {
    /// The connection that carries it.
    pub connection: Connection,
    /// The stream id of the session's control stream.
    pub handle: u64,
    /// What the receiver allows.
    pub ready: Ready,
    /// Transfers open at the same time.
    pub parallel: usize,
    /// What may go out in a second: entries, plans, bodies and trailers.
    pub limits: Limits,
    /// Silence that ends a transfer.
    pub deadline: Duration,
    /// Counts where transfers stand.
    pub meter: Arc<Meter>,
    /// Takes the events.
    pub observer: Observer,
    /// Cancelled when the receiver goes away: nothing new is announced then.
    pub stopping: CancellationToken,
}

/// Sends trees and waits until each entry is settled. Dropping the future cancels: open transfers are reset, and what
/// the receiver has of them stays there as partials.
///
/// # Errors
/// What ends the session as a whole; a file that fails is counted in [`Sent`].
pub async fn send(sending: Sending, trees: Vec<Tree>, unsendable: Vec<(RelativePath, Why)>) -> Result<Sent> {
    let (send, receive) = sending.connection.open_bi().await.map_err(StreamError::from)?;
    let sender = Arc::new(Sender {
        parallel: Arc::new(Semaphore::new(sending.parallel.max(1))),
        large: Arc::new(Semaphore::new(LARGE_WRITERS)),
        files: Arc::new(Semaphore::new(within_open_files(LARGE_WRITERS + SMALL_READERS))),
        memory: Arc::new(Semaphore::new(SMALL_MEMORY_KIB)),
        state: Mutex::default(),
        changed: Notify::new(),
        sending,
    });
    for (path, why) in unsendable {
        sender.report(None, path, Kind::File, 0, Settled::Failed(why));
    }
    let announce = sender.announce(MessageWriter::new(send), trees);
    let answers = sender.answers(MessageReader::new(receive));
    tokio::try_join!(announce, answers)?;
    let sent = std::mem::take(&mut sender.state().sent);
    Ok(sent)
}

struct Sender {
    sending: Sending,
    parallel: Arc<Semaphore>,
    large: Arc<Semaphore>,
    /// Bounds the files that are open.
    files: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    state: Mutex<State>,
    /// Told whenever an entry is answered or settled.
    changed: Notify,
}

#[derive(Default)]
struct State {
    unsettled: HashMap<u64, Pending>,
    unanswered: u32,
    unanswered_bytes: u32,
    open_held: usize,
    found_files: u64,
    found_bytes: u64,
    sent: Sent,
}

struct Pending {
    /// Taken by the transfer when the entry is wanted.
    announce: Option<Announce>,
    /// Bytes of the entry while it stands unanswered.
    unanswered: Option<u32>,
    held: usize,
}

impl Sender {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces all that is found, and ends the manifest when everything is settled.
    async fn announce(self: &Arc<Self>, mut manifest: MessageWriter, trees: Vec<Tree>) -> Result<()> {
        let (found_to, mut found) = mpsc::channel(WALK_AHEAD);
        let (directories_to, mut directories) = mpsc::unbounded_channel();
        tokio::spawn(walk(Walk::new(trees, directories_to), found_to));
        let mut buffer = BytesMut::new();
        buffer.put_u8(StreamType::Manifest as u8);
        put_varint(&mut buffer, self.sending.handle);

        let mut walking = true;
        loop {
            let next = tokio::select! {
                biased;
                () = self.sending.stopping.cancelled() => break,
                // Ends when the walk is over and all directories are announced.
                directory = directories.recv() => match directory {
                    Some(directory) => Some(Found::Entry(directory)),
                    None if walking => found.recv().await,
                    None => break,
                },
                next = found.recv(), if walking => next,
                // Nothing more is found right now: what is gathered goes out before the wait.
                () = std::future::ready(()), if !buffer.is_empty() => {
                    self.write_entries(&mut manifest, &mut buffer).await?;
                    continue;
                }
            };
            match next {
                Some(Found::Entry(announce)) => {
                    self.room(&mut manifest, &mut buffer).await?;
                    self.put_entry(announce, &mut buffer);
                    if buffer.len() >= MANIFEST_WRITE {
                        self.write_entries(&mut manifest, &mut buffer).await?;
                    }
                }
                Some(Found::Failed(path, why)) => self.report(None, path, Kind::File, 0, Settled::Failed(why)),
                None => {
                    walking = false;
                    self.report_found(true);
                }
            }
        }
        self.write_entries(&mut manifest, &mut buffer).await?;
        self.until(|state| state.unsettled.is_empty()).await;
        manifest.finish();
        Ok(())
    }

    /// Writes the entries gathered in the buffer, within the limits.
    async fn write_entries(&self, manifest: &mut MessageWriter, buffer: &mut BytesMut) -> Result<()> {
        while !buffer.is_empty() {
            let part = buffer.split_to(buffer.len().min(self.sending.limits.block()));
            self.sending.limits.take(part.len()).await;
            manifest.write_bytes(part.freeze()).await?;
        }
        Ok(())
    }

    /// Waits until one more entry may stand unanswered; meanwhile nothing gathered is kept back.
    async fn room(&self, manifest: &mut MessageWriter, buffer: &mut BytesMut) -> Result<()> {
        // At least one, however little the receiver allows, or nothing would ever move.
        let entries = self.sending.ready.entries.max(1);
        let bytes = self.sending.ready.entry_bytes.saturating_sub(crate::wire::Entry::LIMIT as u32).max(1);
        let room = |state: &State| {
            state.unanswered < entries && state.unanswered_bytes < bytes && state.unsettled.len() < MAX_UNSETTLED
        };
        if !room(&self.state()) {
            self.write_entries(manifest, buffer).await?;
            self.until(room).await;
        }
        Ok(())
    }

    async fn until(&self, condition: impl Fn(&State) -> bool) {
        loop {
            let changed = self.changed.notified();
            if condition(&self.state()) {
                return;
            }
            changed.await;
        }
    }

    fn put_entry(&self, announce: Announce, buffer: &mut BytesMut) {
        let mut state = self.state();
        let id = state.sent.entries;
        let before = buffer.len();
        announce.entry(id).put(buffer);
        let length = (buffer.len() - before) as u32;
        if announce.kind != Kind::Directory {
            state.found_files += 1;
            state.found_bytes += if announce.kind == Kind::File { announce.metadata.size } else { 0 };
        }
        let file = announce.kind != Kind::Directory;
        state.sent.entries += 1;
        state.unanswered += 1;
        state.unanswered_bytes += length;
        state.unsettled.insert(id, Pending { announce: Some(announce), unanswered: Some(length), held: 0 });
        drop(state);
        if file {
            self.report_found(false);
        }
    }

    fn report_found(&self, complete: bool) {
        let (files, bytes) = {
            let state = self.state();
            (state.found_files, state.found_bytes)
        };
        (self.sending.observer)(Event::Found { files, bytes, complete });
    }

    /// Reads verdicts and runs the transfers they ask for, until the receiver ends the stream. A wanted file is but a row
    /// in a queue until one of the open transfers is its: tasks take kilobytes each, and thousands may be wanted.
    async fn answers(self: &Arc<Self>, mut verdicts: MessageReader) -> Result<()> {
        let mut wanted = VecDeque::new();
        let mut transfers = JoinSet::new();
        loop {
            let verdict = tokio::select! {
                verdict = Verdict::read(&mut verdicts) => verdict?,
                Some(_) = transfers.join_next() => continue,
                Ok(open) = self.parallel.clone().acquire_owned(), if !wanted.is_empty() => {
                    if let Some((id, announce, held)) = wanted.pop_front() {
                        transfers.spawn(self.clone().transfer(id, announce, held, open));
                    }
                    continue;
                }
            };
            let Some(verdict) = verdict else {
                return match self.state().unsettled.len() {
                    0 => Ok(()),
                    n => Err(Error::Protocol(format!("it ended the manifest with {n} entries unsettled"))),
                };
            };
            let id = verdict.id();
            self.answered(id, &verdict)?;
            match verdict {
                Verdict::Skip(_) => self.settle(id, Settled::Skipped),
                Verdict::Done(_) => self.settle(id, Settled::Committed),
                Verdict::Refuse(_, why) => self.settle(id, Settled::Failed(why)),
                Verdict::Want(_, held) => {
                    let announce = self.state().unsettled.get_mut(&id).and_then(|pending| pending.announce.take());
                    let Some(announce) = announce.filter(|a| a.kind == Kind::File) else {
                        return Err(Error::Protocol(format!("it wants the content of entry {id}, which is no file")));
                    };
                    wanted.push_back((id, announce, held));
                }
            }
        }
    }

    /// Takes an entry off the unanswered ones. A second answer, or one to no question, is the receiver's fault.
    fn answered(&self, id: u64, verdict: &Verdict) -> Result<()> {
        let mut state = self.state();
        let held = if let Verdict::Want(_, held) = verdict { held.len() } else { 0 };
        let pending = state.unsettled.get_mut(&id);
        let Some((pending, bytes)) = pending.and_then(|p| p.unanswered.take().map(|bytes| (p, bytes))) else {
            return Err(Error::Protocol(format!("it answered entry {id}, which stands for no answer")));
        };
        pending.held = held;
        state.open_held += held;
        state.unanswered -= 1;
        state.unanswered_bytes -= bytes;
        if state.open_held > MAX_OPEN_HELD {
            return Err(Error::Protocol("it holds more ranges than can be compared".into()));
        }
        drop(state);
        self.changed.notify_waiters();
        Ok(())
    }

    fn settle(&self, id: u64, result: Settled) {
        let pending = self.state().unsettled.get_mut(&id).and_then(|p| p.announce.take());
        if let Some(announce) = pending {
            self.settle_as(id, announce, result);
        }
    }

    fn settle_transfer(&self, id: u64, announce: Announce, result: Result<(), Why>) {
        // Once the connection is gone, that is what ended the session; no file failed by itself.
        if self.sending.connection.close_reason().is_none() {
            let result = result.map_or_else(Settled::Failed, |()| Settled::Committed);
            self.settle_as(id, announce, result);
        }
    }

    fn settle_as(&self, id: u64, announce: Announce, result: Settled) {
        let size = if announce.kind == Kind::File { announce.metadata.size } else { 0 };
        if matches!(&result, Settled::Failed(why) if why.code == Code::Stopping) {
            // The server stops: that is said once for the session, not for each file.
            self.interrupt(Why::from(Code::Stopping));
        } else {
            self.report(Some(id), announce.path, announce.kind, size, result);
        }
        let mut state = self.state();
        if let Some(pending) = state.unsettled.remove(&id) {
            state.open_held -= pending.held;
        }
        drop(state);
        self.changed.notify_waiters();
    }

    fn interrupt(&self, why: Why) {
        self.state().sent.interrupted.get_or_insert(why);
    }

    /// Counts a result and tells the observer.
    fn report(&self, id: Option<u64>, path: RelativePath, kind: Kind, size: u64, result: Settled) {
        self.state().sent.count(&path, kind, size, &result);
        (self.sending.observer)(Event::Settled { id, path, kind, size, result });
    }
}

/// Walks a part at a time, off the network threads, until the other end of the channel is gone. A peer that answers
/// nothing makes it wait, and such a wait must not hold one of the threads for disk work, which are few.
async fn walk(mut walk: Walk, to: mpsc::Sender<Found>) {
    loop {
        let part = blocking(move || {
            let part: Vec<Found> = walk.by_ref().take(WALK_PART).collect();
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
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Why> + Send + 'static) -> Result<T, Why> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(Why::new(Code::Internal, "a fault inside haul while reading")))
}
