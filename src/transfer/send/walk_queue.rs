//! The entries that the walk has found and that are not announced yet.
//!
//! The walk runs in a task of its own and stays a bounded number of entries ahead. It outlives connections.

use std::future::pending;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::digests::Digests;
use crate::error::{Reason, Result};
use crate::protocol::path::RelativePath;
use crate::storage::pipe::Pipe;
use crate::storage::walk::{Announce, Tree, Walk, WalkItem, WalkOptions};
use crate::transfer::blocking::blocking;

/// Entries that the walk may be ahead of the manifest.
const WALK_QUEUE_LIMIT: usize = 768;
/// Entries that one blocking task walks.
const WALK_BATCH: usize = 256;
/// Entries that one blocking task walks while little memory is free; then the walk also waits for an empty queue.
const SMALL_WALK_BATCH: usize = 16;
/// Free memory in bytes below which a walk stays close to the manifest: some times what the queue takes.
const LOW_MEMORY: usize = 4 << 20;

/// The queue between the walk and the manifest.
pub(super) struct WalkQueue {
    /// The walk, until the first connection starts it.
    not_started: Option<NotStarted>,
    items: mpsc::Receiver<WalkItem>,
    /// Directories come when all their content is settled.
    directories: mpsc::UnboundedReceiver<Announce>,
    /// Whether the walk may find more items.
    walking: bool,
    /// Whether more directories may come.
    has_directories: bool,
}

struct NotStarted {
    walk: Walk,
    unsendable: Vec<(RelativePath, Reason)>,
    items: mpsc::Sender<WalkItem>,
}

/// What has ended in the queue.
pub(super) enum Ended {
    /// The walk: only directories follow.
    Walk,
    /// The directories, which end after the walk.
    Directories,
}

impl WalkQueue {
    /// Creates the queue of a walk. It begins with the sources in `unsendable`.
    pub(super) fn new(
        trees: Vec<Tree>,
        unsendable: Vec<(RelativePath, Reason)>,
        options: WalkOptions,
    ) -> Self {
        let (item_sender, items) = mpsc::channel(WALK_QUEUE_LIMIT);
        let (directory_sender, directories) = mpsc::unbounded_channel();
        Self {
            not_started: Some(NotStarted {
                walk: Walk::new(trees, options, directory_sender),
                unsendable,
                items: item_sender,
            }),
            items,
            directories,
            walking: true,
            has_directories: true,
        }
    }

    /// Creates the queue of one file with the data of a pipe.
    pub(super) fn of_pipe(name: &[u8], pipe: Arc<Pipe>) -> Result<Self, Reason> {
        let (item_sender, items) = mpsc::channel(1);
        let (_, directories) = mpsc::unbounded_channel();
        // The new channel has room.
        let _ = item_sender.try_send(WalkItem::Entry(Announce::of_pipe(name, pipe)?));
        Ok(Self {
            not_started: None,
            items,
            directories,
            walking: true,
            has_directories: true,
        })
    }

    /// Starts the walk, unless an earlier connection has started it.
    pub(super) fn start(&mut self) {
        let Some(NotStarted {
            walk,
            unsendable,
            items,
        }) = self.not_started.take()
        else {
            return;
        };
        let digests = Digests::of(walk.options());
        let items = if digests.any() {
            digested(digests, items)
        } else {
            items
        };
        tokio::spawn(async move {
            for (path, reason) in unsendable {
                if items.send(WalkItem::Failed(path, reason)).await.is_err() {
                    return;
                }
            }
            run_walk(walk, items).await;
        });
    }

    /// Returns whether everything was taken out of the queue.
    pub(super) fn is_over(&self) -> bool {
        !self.walking && !self.has_directories
    }

    /// Returns what comes next, directories first, as soon as there is anything. Takes nothing but directories unless
    /// `items_too`. Reports each end once. Cancelling loses nothing.
    pub(super) async fn next(&mut self, items_too: bool) -> Result<WalkItem, Ended> {
        tokio::select! {
            biased;
            directory = self.directories.recv(), if self.has_directories => match directory {
                Some(directory) => Ok(WalkItem::Entry(directory)),
                None => {
                    self.has_directories = false;
                    Err(Ended::Directories)
                }
            },
            item = self.items.recv(), if self.walking && items_too => match item {
                Some(item) => Ok(item),
                None => {
                    self.walking = false;
                    Err(Ended::Walk)
                }
            },
            else => pending().await,
        }
    }
}

/// Returns a channel that adds digests to entries on their way to `to`.
fn digested(digests: Digests, to: mpsc::Sender<WalkItem>) -> mpsc::Sender<WalkItem> {
    let (item_sender, items) = mpsc::channel(WALK_QUEUE_LIMIT);
    tokio::spawn(digests.add_to_all(items, to));
    item_sender
}

/// Walks in batches on blocking threads, until the other end of the channel is gone. The wait for a silent peer must
/// not hold one of the few blocking threads.
async fn run_walk(mut walk: Walk, to: mpsc::Sender<WalkItem>) {
    let memory = walk.options().memory.clone();
    loop {
        let size = if memory.free() < LOW_MEMORY {
            // Entries with long paths take much more memory than usual ones.
            if to.reserve_many(to.max_capacity()).await.is_err() {
                return;
            }
            SMALL_WALK_BATCH
        } else {
            WALK_BATCH
        };
        let batch = blocking::<_, Reason>("walk the sources", move || {
            let batch: Vec<WalkItem> = walk.by_ref().take(size).collect();
            Ok((batch, walk))
        });
        let (batch, rest) = match batch.await {
            Ok(walked) => walked,
            Err(reason) => {
                // What was not found counts as failed: a mirror must not remove it.
                let _ = to
                    .send(WalkItem::Failed(RelativePath::root(), reason))
                    .await;
                return;
            }
        };
        if batch.is_empty() {
            return;
        }
        walk = rest;
        for item in batch {
            if to.send(item).await.is_err() {
                return;
            }
        }
    }
}
