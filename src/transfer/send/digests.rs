//! Computes digests of files before they are announced: of all files for a receiver that compares content, or of large
//! files that were sent before and probably exist at the receiver.

use std::collections::VecDeque;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::protocol::Kind;
use crate::storage::digest;
use crate::storage::digest_index::{Index, Known, LARGE_FILE};
use crate::storage::walk::{Announce, WalkItem, WalkOptions};

/// Files that are hashed at the same time; enough to fill the queue of a disk and two cores.
const PARALLEL_HASHES: usize = 4;
/// Entries that may wait behind a file that is hashed, so that the order of the walk is kept.
const MAX_WAITING: usize = 256;

/// Which files get digests.
#[derive(Clone)]
pub(super) struct Digests {
    /// All files.
    all: bool,
    /// Large files that this index knows.
    index: Option<Index>,
}

/// A found entry, in the order of the walk.
enum Queued {
    Ready(Option<Box<WalkItem>>),
    Hashing(JoinHandle<WalkItem>),
}

impl Digests {
    /// Returns the rules for the options of a walk.
    pub(super) fn of(options: &WalkOptions) -> Self {
        Self {
            all: options.checksum,
            index: options.index.clone(),
        }
    }

    /// Returns whether any file gets a digest.
    pub(super) fn any(&self) -> bool {
        self.all || self.index.is_some()
    }

    /// Adds digests to the files that a walk finds, in the order of the walk. Ends with the walk, or when the
    /// receiving end is dropped.
    pub(super) async fn add_to_all(
        self,
        mut found: mpsc::Receiver<WalkItem>,
        to: mpsc::Sender<WalkItem>,
    ) {
        let mut waiting = VecDeque::new();
        let mut hashing = 0;
        let mut walking = true;
        loop {
            let room = hashing < PARALLEL_HASHES && waiting.len() < MAX_WAITING;
            tokio::select! {
                biased;
                done = take_first(&mut waiting), if !waiting.is_empty() => {
                    if let Some(Queued::Hashing(_)) = waiting.pop_front() {
                        hashing -= 1;
                    }
                    let Some(done) = done else { return };
                    if to.send(done).await.is_err() {
                        return;
                    }
                }
                next = found.recv(), if walking && room => match next {
                    Some(next) if self.needs_digest(&next) => {
                        let digests = self.clone();
                        hashing += 1;
                        waiting.push_back(Queued::Hashing(tokio::task::spawn_blocking(move || digests.add_to(next))));
                    }
                    Some(next) => waiting.push_back(Queued::Ready(Some(Box::new(next)))),
                    None => walking = false,
                },
                else => return,
            }
        }
    }

    fn needs_digest(&self, found: &WalkItem) -> bool {
        match found {
            WalkItem::Entry(announce) if announce.kind == Kind::File && announce.pipe.is_none() => {
                self.all || announce.metadata.size >= LARGE_FILE
            }
            _ => false,
        }
    }

    /// Adds the digest to a file. An unreadable or changing file gets none; its transfer will report the error.
    /// Blocks.
    fn add_to(&self, found: WalkItem) -> WalkItem {
        match found {
            WalkItem::Entry(announce) => WalkItem::Entry(Announce {
                digest: self.digest_of(&announce),
                ..announce
            }),
            other => other,
        }
    }

    fn digest_of(&self, announce: &Announce) -> Option<[u8; 32]> {
        let version = announce.metadata.version;
        let large = announce.metadata.size >= LARGE_FILE;
        let index = self.index.as_ref().filter(|_| large);
        let known = index.and_then(|index| index.known(&version.key(), version.changed));
        match known {
            _ if self.all => hash(announce),
            Some(Known::Digest(digest)) => Some(digest),
            // Probably it was renamed. Reading it here costs less than sending content that the receiver has.
            Some(Known::Touched) => {
                let settled = version.key().is_settled(version.changed);
                let digest = hash(announce)?;
                if let Some(index) = index.filter(|_| settled) {
                    index.remember(&version.key(), version.changed, &digest);
                }
                Some(digest)
            }
            None => None,
        }
    }
}

/// Waits for the first entry in order, and leaves its place in the queue. Returns `None` if the hashing task panicked.
async fn take_first(waiting: &mut VecDeque<Queued>) -> Option<WalkItem> {
    match waiting.front_mut()? {
        Queued::Ready(found) => found.take().map(|found| *found),
        Queued::Hashing(hashing) => hashing.await.ok(),
    }
}

fn hash(announce: &Announce) -> Option<[u8; 32]> {
    let source = announce.tree.store.open(&announce.source).ok()?;
    let same = || {
        source
            .metadata()
            .is_ok_and(|metadata| metadata.version == announce.metadata.version)
    };
    let found = same()
        .then(|| digest(&*source, announce.metadata.size))?
        .ok()?;
    same().then_some(found)
}
