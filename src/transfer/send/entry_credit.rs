//! The credit for unanswered entries, as the sender counts it.

use tokio::sync::watch;

use crate::protocol::{EARLY_UNANSWERED, EARLY_UNANSWERED_BYTES, Entry, Message, Ready};

/// How many entries may be unanswered, and how many bytes they may have.
#[derive(Debug, Clone, Copy)]
pub(super) struct UnansweredLimit {
    entries: u32,
    bytes: u32,
}

/// The limits of unanswered entries and their bytes: small before the receiver is ready, then as it says.
#[derive(Debug)]
pub struct Allowed(watch::Sender<UnansweredLimit>);

impl Default for Allowed {
    fn default() -> Self {
        Self::by(EARLY_UNANSWERED, EARLY_UNANSWERED_BYTES)
    }
}

impl Allowed {
    /// Creates the limits that a receiver has set.
    pub fn by(entries: u32, entry_bytes: u32) -> Self {
        Self(watch::Sender::new(UnansweredLimit {
            entries,
            bytes: entry_bytes,
        }))
    }

    /// Sets the limits when the receiver is ready.
    pub fn set(&self, ready: &Ready) {
        self.0.send_replace(UnansweredLimit {
            entries: ready.entries,
            bytes: ready.entry_bytes,
        });
    }

    /// Returns the current limits, and their changes.
    pub(super) fn subscribe(&self) -> watch::Receiver<UnansweredLimit> {
        self.0.subscribe()
    }
}

/// The entries that wait for their verdict.
#[derive(Debug, Default)]
pub(super) struct Unanswered {
    entries: u32,
    bytes: u32,
}

impl Unanswered {
    /// Counts an entry of this length.
    pub(super) fn add(&mut self, length: u32) {
        self.entries += 1;
        self.bytes += length;
    }

    /// Removes an entry that was counted with this length.
    pub(super) fn remove(&mut self, length: u32) {
        self.entries -= 1;
        self.bytes -= length;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Returns whether one more entry of any length may be announced. One entry may, whatever the receiver says;
    /// otherwise the session would never make progress.
    pub(super) fn has_room(&self, limit: UnansweredLimit) -> bool {
        let bytes = limit.bytes.saturating_sub(Entry::LIMIT as u32);
        self.entries < limit.entries.max(1) && self.bytes < bytes.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(entries: u32, bytes: u32) -> UnansweredLimit {
        UnansweredLimit { entries, bytes }
    }

    #[test]
    fn entries_and_their_bytes_are_limited() {
        let longest = Entry::LIMIT as u32;
        let mut unanswered = Unanswered::default();
        for _ in 0..3 {
            assert!(unanswered.has_room(limit(3, longest + 300)));
            unanswered.add(100);
        }
        assert!(!unanswered.has_room(limit(3, longest + 301)));
        assert!(!unanswered.has_room(limit(4, longest + 300)));
        assert!(unanswered.has_room(limit(4, longest + 301)));
        unanswered.remove(100);
        assert!(unanswered.has_room(limit(3, longest + 300)));
    }

    #[test]
    fn one_entry_is_announced_whatever_the_receiver_says() {
        let mut unanswered = Unanswered::default();
        assert!(unanswered.has_room(limit(0, 0)));
        unanswered.add(100);
        assert!(!unanswered.has_room(limit(0, 0)));
    }

    #[test]
    fn the_receiver_raises_the_limits_when_it_is_ready() {
        let allowed = Allowed::default();
        let mut limits = allowed.subscribe();
        assert_eq!(limits.borrow_and_update().entries, EARLY_UNANSWERED);
        allowed.set(&Ready {
            entries: 7,
            entry_bytes: 9,
            ..Ready::default()
        });
        assert!(limits.has_changed().unwrap());
        let limit = *limits.borrow_and_update();
        assert_eq!(limit.entries, 7);
        assert_eq!(limit.bytes, 9);
    }
}
