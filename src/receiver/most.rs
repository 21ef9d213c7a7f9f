//! No more than was agreed to: whoever has accepted a thousand files has not accepted a million.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Receiver;
use crate::error::{Code, Result, Why};
use crate::wire::{Entry, Kind, Offer};

/// Part of what was offered that may come on top of it, and how much in any case: trees grow while they wait for somebody.
const PART: u64 = 10;
const ENTRIES: u64 = 64;
const BYTES: u64 = 16 << 20;

/// The most that is taken in a session, on each of its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Most {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of all files; none where nobody knew how much would come.
    pub bytes: Option<u64>,
}

impl Most {
    /// What was offered, and a tenth of it or so: 64 entries and 16 MiB at least.
    pub fn of(offer: &Offer) -> Self {
        let more = |offered: u64, least: u64| offered.saturating_add((offered / PART).max(least));
        let entries = more(offer.files.saturating_add(offer.others.unwrap_or_default()), ENTRIES);
        let bytes = (offer.piped != Some(true)).then(|| more(offer.bytes, BYTES));
        Self { entries, bytes }
    }
}

/// What was announced so far.
#[derive(Default)]
pub(super) struct Counted {
    entries: AtomicU64,
    bytes: AtomicU64,
}

impl Receiver {
    /// Counts an entry, and refuses it when it is too much.
    pub(super) fn check_most(&self, entry: &Entry) -> Result<(), Why> {
        let Some(most) = self.session.most else { return Ok(()) };
        let size = match (entry.kind, entry.size, most.bytes) {
            (Kind::File, None, Some(_)) => return Err(too_much("a file of unknown size was not offered")),
            (_, size, _) => size.unwrap_or_default(),
        };
        let entries = self.counted.entries.fetch_add(1, Ordering::Relaxed);
        // Sizes are below 2^63, and what is over the limit is not added.
        let bytes = self.counted.bytes.load(Ordering::Relaxed).saturating_add(size);
        if entries >= most.entries || most.bytes.is_some_and(|most| bytes > most) {
            return Err(too_much("more comes than was offered"));
        }
        self.counted.bytes.store(bytes, Ordering::Relaxed);
        Ok(())
    }
}

fn too_much(text: &str) -> Why {
    Why::new(Code::NotWanted, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_may_come_on_top_and_not_much() {
        let offer = |files, others, bytes| Offer { files, others: Some(others), bytes, ..Offer::default() };
        assert_eq!(Most::of(&offer(1, 0, 5)), Most { entries: 65, bytes: Some(5 + BYTES) });
        assert_eq!(Most::of(&offer(9_000, 1_000, 1 << 40)).entries, 11_000);
        assert_eq!(Most::of(&offer(u64::MAX, 1, u64::MAX)).bytes, Some(u64::MAX));
        assert_eq!(Most::of(&Offer { piped: Some(true), ..offer(1, 0, 0) }).bytes, None);
    }
}
