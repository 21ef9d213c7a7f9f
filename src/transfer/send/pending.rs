//! An entry from its announcement until it is settled.

use std::sync::Arc;

use super::hard_links::LinkRole;
use crate::protocol::{Entry, Held, Kind};
use crate::storage::walk::Announce;

/// An unsettled entry.
pub(super) struct Pending {
    pub(super) announce: Arc<Announce>,
    pub(super) role: LinkRole,
    /// Bytes of the entry while it is unanswered.
    pub(super) unanswered: Option<u32>,
    /// Ranges that the receiver offered as held on this connection.
    pub(super) held_ranges: usize,
    /// Most bytes that a `Want` has offered as held.
    held_bytes: Option<u64>,
    /// Whether it was completely sent, so that it may be committed without a receipt.
    pub(super) sent: bool,
    /// Whether it is wanted on this connection and not completely sent.
    pub(super) to_send: bool,
}

impl Pending {
    pub(super) fn new(announce: Arc<Announce>, role: LinkRole) -> Self {
        Self {
            announce,
            role,
            unanswered: None,
            held_ranges: 0,
            held_bytes: None,
            sent: false,
            to_send: false,
        }
    }

    /// Records that the entry is announced with this length, and forgets what a receiver said on an earlier connection.
    pub(super) fn announced(&mut self, length: u32) {
        self.unanswered = Some(length);
        self.held_ranges = 0;
        self.to_send = false;
    }

    /// Records that the receiver wants the content. Returns whether it holds more than when it wanted it before.
    pub(super) fn wanted(&mut self, held: &[Held]) -> bool {
        let held_bytes = held
            .iter()
            .map(|held| held.range.length)
            .fold(0, u64::saturating_add);
        let holds_more = self.held_bytes.is_some_and(|before| held_bytes > before);
        self.held_bytes = self.held_bytes.max(Some(held_bytes));
        self.held_ranges = held.len();
        self.to_send = true;
        holds_more
    }

    /// Returns the bytes of content of the entry.
    pub(super) fn size(&self) -> u64 {
        match (&self.announce.pipe, self.role) {
            (Some(pipe), _) => pipe.bytes(),
            (None, LinkRole::Alone | LinkRole::First(_)) if self.announce.kind == Kind::File => {
                self.announce.metadata.size
            }
            _ => 0,
        }
    }

    /// Returns the entry for the wire.
    pub(super) fn entry(&self, id: u64) -> Entry {
        let hard_link = match self.role {
            LinkRole::Alone => None,
            LinkRole::First(_) | LinkRole::Reannounced(_) => Some(id),
            LinkRole::Name(_, first) => Some(first),
        };
        Entry {
            hard_link,
            ..self.announce.entry(id)
        }
    }
}
