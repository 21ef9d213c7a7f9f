//! No more than was agreed to: whoever has accepted a thousand files has not accepted a million.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Receiver, WantedFile};
use crate::error::{Code, Reason, Result};
use crate::protocol::{Entry, Existing, Kind, Offer};

/// Part of what was offered that may come on top of it, and how much in any case: trees grow while they wait for somebody.
const EXTRA_PART: u64 = 10;
const EXTRA_ENTRIES: u64 = 64;
const EXTRA_BYTES: u64 = 16 << 20;

/// The most that is taken in a session, over all its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcceptedQuota {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of all files; none where nobody knew how much would come.
    pub bytes: Option<u64>,
}

impl AcceptedQuota {
    /// What was offered, and a tenth of it or so: 64 entries and 16 MiB at least.
    pub fn of(offer: &Offer) -> Self {
        let more =
            |offered: u64, least: u64| offered.saturating_add((offered / EXTRA_PART).max(least));
        let entries = more(
            offer.files.saturating_add(offer.others.unwrap_or_default()),
            EXTRA_ENTRIES,
        );
        let bytes = (offer.piped != Some(true)).then(|| more(offer.bytes, EXTRA_BYTES));
        Self { entries, bytes }
    }
}

/// What was announced on this connection, what is wanted of it, and what the connections before it have brought.
#[derive(Default)]
pub(super) struct QuotaUse {
    announced: EntryCount,
    wanted: EntryCount,
    before: OnceLock<(u64, u64)>,
}

/// Entries and their bytes.
#[derive(Default)]
struct EntryCount {
    entries: AtomicU64,
    bytes: AtomicU64,
}

impl EntryCount {
    /// Counts another, whose size is below 2^63, unless that makes it too much. Entries are judged one after the other.
    fn add(
        &self,
        size: u64,
        (entries, bytes): (u64, u64),
        most: &AcceptedQuota,
    ) -> Result<(), Reason> {
        let entries = self
            .entries
            .load(Ordering::Relaxed)
            .saturating_add(entries)
            .saturating_add(1);
        let bytes = self
            .bytes
            .load(Ordering::Relaxed)
            .saturating_add(bytes)
            .saturating_add(size);
        most.check(entries, bytes)?;
        self.entries.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(size, Ordering::Relaxed);
        Ok(())
    }
}

impl AcceptedQuota {
    fn check(&self, entries: u64, bytes: u64) -> Result<(), Reason> {
        if entries > self.entries {
            return Err(too_much(format!(
                "more comes than was offered: {entries} entries, of {} at most",
                self.entries
            )));
        }
        match self.bytes.filter(|most| bytes > *most) {
            Some(most) => Err(too_much(format!(
                "more comes than was offered: {bytes} bytes, of {most} at most"
            ))),
            None => Ok(()),
        }
    }
}

impl Receiver {
    /// Counts an entry, and refuses it when it is too much. What earlier connections have brought comes again, and counts once.
    pub(super) fn check_quota(&self, entry: &Entry) -> Result<(), Reason> {
        let Some(most) = self.session.most else {
            return Ok(());
        };
        let size = match (entry.kind, entry.size, most.bytes) {
            (Kind::File, None, Some(_)) => {
                return Err(too_much("a file of unknown size was not offered; it can be sent through a pipe: haul send -".into()));
            }
            (_, size, _) => size.unwrap_or_default(),
        };
        let (entries, bytes) = self.brought();
        most.check(entries, bytes)?;
        self.counted.announced.add(size, (0, 0), &most)
    }

    /// What the session has made here. Where all is replaced in any case, each connection brings all of it, and only its own counts.
    fn brought(&self) -> (u64, u64) {
        match self.session.take.existing {
            Existing::Overwrite => (0, 0),
            _ => self.session.ledger.brought(),
        }
    }

    /// Notes what it had made before this connection.
    pub(super) fn record_earlier_connections(&self) {
        // Set once: a receiver has one connection.
        let _ = self.counted.before.set(self.brought());
    }

    /// The same of a file that is to be sent: a sender that comes back under other names brings no more in all.
    pub(super) fn check_wanted(&self, file: &WantedFile) -> Result<(), Reason> {
        match self.session.most {
            // One that is compared may be there, and takes the place of one as large.
            Some(most) if file.compare.is_none() => {
                let before = self.counted.before.get().copied().unwrap_or_default();
                self.counted.wanted.add(file.known_size(), before, &most)
            }
            _ => Ok(()),
        }
    }
}

fn too_much(text: String) -> Reason {
    Reason::new(Code::NotWanted, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_may_come_on_top_and_not_much() {
        let offer = |files, others, bytes| Offer {
            files,
            others: Some(others),
            bytes,
            ..Offer::default()
        };
        assert_eq!(
            AcceptedQuota::of(&offer(1, 0, 5)),
            AcceptedQuota {
                entries: 65,
                bytes: Some(5 + EXTRA_BYTES)
            }
        );
        assert_eq!(
            AcceptedQuota::of(&offer(9_000, 1_000, 1 << 40)).entries,
            11_000
        );
        assert_eq!(
            AcceptedQuota::of(&offer(u64::MAX, 1, u64::MAX)).bytes,
            Some(u64::MAX)
        );
        assert_eq!(
            AcceptedQuota::of(&Offer {
                piped: Some(true),
                ..offer(1, 0, 0)
            })
            .bytes,
            None
        );
    }
}
