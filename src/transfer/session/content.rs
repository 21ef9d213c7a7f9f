//! The content of a pull, at the server: the requested part of the store, or of an offer.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::nesting;
use super::outcome::Outcome;
use super::request::requested_filter;
use super::sources::{FoundSources, find_sources};
use crate::auth::Guests;
use crate::auth::identity::KeyId;
use crate::error::{Code, Reason, Result};
use crate::protocol::{Kind, Pull, Ready};
use crate::storage::pipe::Pipe;
use crate::storage::walk::{Follow, Tree, WalkOptions};
use crate::storage::{Held, KeptShare, Store};
use crate::transfer::events::Observer;
use crate::transfer::send::Sender;

/// Content that a server offers instead of a store to peers that may read.
pub struct OfferedContent {
    /// The content.
    pub content: OfferedSource,
    /// Options for announcing the content.
    pub walk: WalkOptions,
    /// The peers that may receive it, checked at each request and not when they connected.
    pub guests: Arc<Guests>,
    /// Receives the events of the offer, with the key id of the peer.
    pub told: mpsc::Sender<(KeyId, OfferEvent)>,
}

/// Events of an offer. Each session has one connection.
pub enum OfferEvent {
    /// A session has begun.
    Begun {
        /// The peer's address.
        from: SocketAddr,
    },
    /// A started session has ended.
    Ended(Result<Box<Outcome>>),
}

/// The content of an offer.
pub enum OfferedSource {
    /// Files and directories by their names.
    Trees(Vec<Tree>),
    /// The data of a pipe, under a name; it can be sent once.
    Pipe(Vec<u8>, Arc<Pipe>),
}

/// The content of a pull: its sender, and the answer that announces it.
pub(super) struct PullContent {
    pub(super) ready: Ready,
    pub(super) sender: Sender,
    /// Counts the memory of the sources, as long as they are sent.
    pub(super) held: Held,
}

impl PullContent {
    /// Finds the requested content in the store. At most `parallel` transfers will be open at the same time. Blocks.
    pub(super) fn of_store(
        store: &Arc<dyn Store>,
        pull: &Pull,
        memory: &KeptShare,
        parallel: usize,
        observer: Observer,
    ) -> Result<Self, Reason> {
        store.check_root()?;
        let found = find_sources(store, &pull.sources, memory)?;
        let walk = requested_walk(pull, memory)?;
        Ok(Self::of_sources(found, walk, pull, parallel, observer))
    }

    /// Selects the requested content of an offer. The user at the sender has chosen it; the client only chooses whether
    /// to compare by content. Blocks.
    pub(super) fn of_offer(
        offered: &OfferedContent,
        pull: &Pull,
        memory: &KeptShare,
        parallel: usize,
        observer: Observer,
    ) -> Result<Self, Reason> {
        let is_requested = |name: &[u8]| pull.sources.iter().any(|source| source.0 == [name]);
        let nothing = || Reason::new(Code::NotFound, "nothing with this name is offered");
        match &offered.content {
            OfferedSource::Pipe(name, _) if !is_requested(name) => Err(nothing()),
            OfferedSource::Pipe(_, pipe) if pipe.is_spent() => Err(Reason::new(
                Code::Unreadable,
                "cannot send the data of a pipe a second time; the sender must run haul send again",
            )),
            OfferedSource::Pipe(name, pipe) => Ok(Self {
                sender: Sender::of_pipe(name, pipe.clone(), observer)?,
                held: memory.hold(),
                ready: Ready {
                    only: Some(Kind::File),
                    ..Ready::default()
                },
            }),
            OfferedSource::Trees(trees) => {
                let requested = trees.iter().filter(|tree| is_requested(&tree.name));
                let trees: Vec<_> = requested.cloned().collect();
                let only = match &trees[..] {
                    [] => return Err(nothing()),
                    [one] if one.directory => Some(Kind::Directory),
                    [_] => Some(Kind::File),
                    _ => None,
                };
                let walk = WalkOptions {
                    checksum: pull.checksum.unwrap_or(false),
                    memory: memory.clone(),
                    one_connection: true,
                    ..offered.walk.clone()
                };
                let found = FoundSources {
                    only,
                    trees,
                    unsendable: Vec::new(),
                    held: memory.hold(),
                };
                Ok(Self::of_sources(found, walk, pull, parallel, observer))
            }
        }
    }

    fn of_sources(
        found: FoundSources,
        walk: WalkOptions,
        pull: &Pull,
        parallel: usize,
        observer: Observer,
    ) -> Self {
        Self {
            ready: Ready {
                only: found.only,
                origin: nesting::origin(&found.trees, &pull.session),
                ..Ready::default()
            },
            sender: Sender::new(found.trees, found.unsendable, walk, parallel, observer),
            held: found.held,
        }
    }
}

/// Reads the walk options of a pull.
fn requested_walk(pull: &Pull, memory: &KeptShare) -> Result<WalkOptions, Reason> {
    Ok(WalkOptions {
        filter: requested_filter(pull.filter.as_ref(), memory)?,
        memory: memory.clone(),
        one_connection: true,
        follow: if pull.follow == Some(true) {
            Follow::Within
        } else {
            Follow::Never
        },
        checksum: pull.checksum.unwrap_or(false),
        xattrs: pull.xattrs.unwrap_or(false),
        owner: pull.owner.unwrap_or(false),
        allow_growing: pull.growing.unwrap_or(false),
        ..WalkOptions::default()
    })
}
