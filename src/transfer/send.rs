//! The sender: reads files and sends them on streams.
//!
//! The course of one file, and the files of `send/` that it leads through:
//!
//! 1. The walk finds it, and it waits in the queue of `walk_queue.rs`. Some files get a digest there (`digests.rs`).
//! 2. `announce.rs` writes its entry on the manifest stream, within the credit that the receiver gives
//!    (`entry_credit.rs`). A further name of a file waits for the first name (`hard_links.rs`).
//! 3. `verdicts.rs` reads the receiver's answer. Only a wanted file needs a transfer.
//! 4. `upload.rs` sends it on a stream of its own (`transfer_stream.rs`), from a file (`file_reader.rs`) or from an
//!    input of unknown length (`pipe.rs`), and waits for the receipt.
//! 5. `run.rs` settles the entry: it counts and reports the result.
//!
//! One task announces, and one reads verdicts. Each wanted file has its own task and stream. `entry_table.rs` keeps the
//! state of all entries, over all connections of the session. The receiver limits unanswered entries; all other limits
//! of the sender are here.

mod announce;
mod digests;
mod entry_credit;
mod entry_table;
mod file_reader;
mod hard_links;
mod holes;
mod pending;
mod pipe;
mod run;
mod transfer_stream;
mod upload;
mod verdicts;
mod walk_queue;

pub use crate::transfer::stats::TransferStats;
pub use entry_credit::Allowed;
pub use run::Sending;

use std::sync::Arc;

use tokio::task::JoinSet;

use crate::error::{Reason, Result};
use crate::net::stream::{MessageReader, MessageWriter, StreamError};
use crate::protocol::path::RelativePath;
use crate::protocol::{End, Removed, SenderTime};
use crate::storage::pipe::Pipe;
use crate::storage::walk::{Tree, WalkOptions};
use crate::transfer::events::{Event, Observer};

use announce::Manifest;
use entry_table::EntryTable;
use run::{Run, SenderState};
use verdicts::follow_verdicts;
use walk_queue::WalkQueue;

/// The sender of one session. It outlives its connections. Entries that a lost connection left unsettled are announced
/// again on the next one, under the same ids. Settled entries are never announced again, so the statistics cover all
/// connections.
///
/// Dropping it cancels the session: open transfers are reset, and their received data stays at the receiver as
/// partials.
pub struct Sender {
    shared: Arc<SenderState>,
    queue: WalkQueue,
    transfers: JoinSet<()>,
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
        let entries = EntryTable::new(options.memory.clone(), !options.one_connection);
        let mut shared = SenderState::new(parallel, entries, observer);
        shared.index = options.index.clone();
        shared.may_grow = options.allow_growing;
        Self {
            shared: Arc::new(shared),
            queue: WalkQueue::new(trees, unsendable, options),
            transfers: JoinSet::new(),
        }
    }

    /// Creates a sender of one file with the data of a pipe.
    pub fn of_pipe(name: &[u8], pipe: Arc<Pipe>, observer: Observer) -> Result<Self, Reason> {
        let queue = WalkQueue::of_pipe(name, pipe.clone())?;
        let mut shared = SenderState::new(1, EntryTable::default(), observer);
        shared.pipe = Some(pipe);
        Ok(Self {
            shared: Arc::new(shared),
            queue,
            transfers: JoinSet::new(),
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
        self.shared.entries().start_connection();
        let opened = sending.connection.open_bi().await;
        let (send, receive) = opened.map_err(StreamError::from)?;
        self.queue.start();
        let run = Arc::new(Run::new(self.shared.clone(), sending));
        let manifest = Manifest::new(&run, &mut self.queue, MessageWriter::new(send));
        let mut verdicts = MessageReader::new(receive);
        tokio::select! {
            // Everything is settled. The receiver may end its half later, and sends nothing more.
            announced = manifest.announce() => announced?,
            never = follow_verdicts(&run, &mut verdicts, &mut self.transfers) => match never? {},
        }
        // Dropping the reader would stop the stream before the last verdicts are read.
        tokio::spawn(async move { while let Ok(Some(_)) = verdicts.verdict().await {} });
        Ok(())
    }

    /// Returns the statistics so far. They are marked interrupted if entries are left and the receiver has gone away.
    pub fn sent(&self) -> TransferStats {
        self.shared.entries().stats()
    }

    /// Returns whether everything is announced and settled.
    pub(crate) fn is_settled(&self) -> bool {
        self.shared.entries().is_settled()
    }

    /// Returns what the tasks of the control stream need while the session runs.
    pub(crate) fn reporter(&self) -> SenderReporter {
        SenderReporter(self.shared.clone())
    }

    /// Returns a value that grows with progress at the receiver: a settled entry, or more held data of a file.
    pub fn progress(&self) -> u64 {
        self.shared.entries().progress()
    }

    /// Returns the observer of events.
    pub fn observer(&self) -> &Observer {
        &self.shared.observer
    }
}

/// What a running session reports to its receiver, and what the receiver reports to it, on the control stream.
pub(crate) struct SenderReporter(Arc<SenderState>);

impl SenderReporter {
    /// Returns the final message to the receiver.
    pub(crate) fn end(&self, sender_time: Option<SenderTime>) -> End {
        let TransferStats {
            entries,
            failed,
            vanished,
            specials,
            interrupted,
            unkept,
            ..
        } = self.0.entries().stats();
        // Without a pull, the client itself shows the warnings.
        let unkept = Some(unkept).filter(|warnings| sender_time.is_some() && !warnings.is_empty());
        End {
            entries,
            // The receiver was told of each omitted entry.
            failed: failed + vanished + specials,
            interrupted: interrupted.map(Into::into),
            spent: sender_time,
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
    pub(crate) fn interrupted(&self, reason: Reason) {
        (self.0.observer)(Event::GoingAway {
            reason: reason.clone(),
        });
        self.0.entries().receiver_leaves(reason);
    }
}
