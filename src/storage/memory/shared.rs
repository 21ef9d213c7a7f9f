//! What all clones of a store in memory, and its uploads, share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::SystemTime;

use super::behaviour::Behaviour;
use super::content::Content;
use super::nodes::Nodes;
use crate::error::lock::lock;
use crate::protocol::path::RelativePath;
use crate::storage::folding::{Folding, trimmed};
use crate::storage::upload::PartialKey;

#[derive(Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    /// Most bytes in files and partials.
    pub(super) capacity: u64,
    pub(super) behaviour: Behaviour,
    /// Uploads that are inside `write_at` or `commit`.
    writing: AtomicUsize,
    peak: AtomicUsize,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) nodes: Nodes,
    pub(super) partials: HashMap<PartialSlot, Partial>,
}

/// What identifies a partial.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct PartialSlot {
    pub(super) path: RelativePath,
    pub(super) key: PartialKey,
}

#[derive(Default)]
pub(super) struct Partial {
    pub(super) content: Content,
    pub(super) open: bool,
    pub(super) written: Option<SystemTime>,
}

impl Shared {
    pub(super) fn new(capacity: u64, behaviour: Behaviour) -> Self {
        Self {
            capacity,
            behaviour,
            ..Self::default()
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Returns the stored form of a path: without trailing dots and spaces, and with the case of existing names.
    pub(super) fn fold(&self, path: &RelativePath) -> RelativePath {
        if !self.behaviour.fat {
            return path.clone();
        }
        let state = self.lock();
        let mut kept = RelativePath::root();
        for component in path.components() {
            let key = Folding::ALL.key(component);
            let inside = |there: &&RelativePath| there.parent().as_ref() == Some(&kept);
            let mut names = state.nodes.paths().filter(inside).filter_map(|p| p.name());
            let there = names.find(|name| Folding::ALL.key(name) == key);
            let name = there.unwrap_or(trimmed(component)).to_vec();
            kept = kept.join(&name).unwrap_or_default();
        }
        kept
    }

    /// Counts a writer while the guard lives.
    pub(super) fn writing(&self) -> impl Drop + '_ {
        struct Writing<'s>(&'s Shared);
        impl Drop for Writing<'_> {
            fn drop(&mut self) {
                self.0.writing.fetch_sub(1, Ordering::SeqCst);
            }
        }
        let now = self.writing.fetch_add(1, Ordering::SeqCst) + 1;
        self.peak.fetch_max(now, Ordering::SeqCst);
        Writing(self)
    }

    /// The most writers at the same time.
    pub(super) fn peak(&self) -> usize {
        self.peak.load(Ordering::SeqCst)
    }
}
