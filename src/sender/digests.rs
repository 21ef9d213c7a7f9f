//! Digests of files before they are announced, for a receiver that compares content.

use std::collections::VecDeque;

use tokio::sync::mpsc;

use crate::manifest::{Announce, Found};
use crate::store::digest;
use crate::wire::Kind;

/// Files that are read at the same time: enough to keep a disk's queue full, and two cores.
const HASHING: usize = 4;

/// Puts digests to the files that a walk finds, in the walk's order. Ends with the walk, or when nobody listens.
pub(super) async fn put_digests(mut found: mpsc::Receiver<Found>, to: mpsc::Sender<Found>) {
    let (mut hashing, mut walking) = (VecDeque::new(), true);
    loop {
        tokio::select! {
            next = found.recv(), if walking && hashing.len() < HASHING => match next {
                Some(next) => hashing.push_back(tokio::task::spawn_blocking(|| with_digest(next))),
                None => walking = false,
            },
            done = async { hashing.front_mut().expect("guarded").await }, if !hashing.is_empty() => {
                hashing.pop_front();
                let Ok(done) = done else { return };
                if to.send(done).await.is_err() {
                    return;
                }
            }
            else => return,
        }
    }
}

/// A file that cannot be read, or changes meanwhile, goes without: it is for the transfer to say so. Blocks.
fn with_digest(found: Found) -> Found {
    match found {
        Found::Entry(announce) if announce.kind == Kind::File && announce.pipe.is_none() => {
            Found::Entry(Announce {
                digest: digest_of(&announce),
                ..announce
            })
        }
        other => other,
    }
}

fn digest_of(announce: &Announce) -> Option<[u8; 32]> {
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
