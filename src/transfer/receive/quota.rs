//! Limits a session to the offer that was accepted, so that accepting a thousand files does not accept a million.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Code, Reason, Result};
use crate::protocol::{Entry, Kind, Offer};
use crate::transfer::stats::Brought;

/// The allowance above the offer: one part in `EXTRA_PART`, but at least these entries and bytes. Trees grow while the
/// offer waits for an answer.
const EXTRA_PART: u64 = 10;
const EXTRA_ENTRIES: u64 = 64;
const EXTRA_BYTES: u64 = 16 << 20;

/// The most that a session may bring over all its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcceptedQuota {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of all files; `None` if the size was not known in advance.
    pub bytes: Option<u64>,
}

impl AcceptedQuota {
    /// Returns the quota for an offer: a tenth above it, or at least 64 entries and 16 MiB above it.
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

/// What a session has announced and wanted on this connection, checked against its quota.
#[derive(Default)]
pub(super) struct QuotaUse {
    quota: Option<AcceptedQuota>,
    announced: EntryCount,
    wanted: EntryCount,
    /// What earlier connections have brought.
    before: OnceLock<Brought>,
}

/// A number of entries and their bytes.
#[derive(Default)]
struct EntryCount {
    entries: AtomicU64,
    bytes: AtomicU64,
}

impl EntryCount {
    /// Counts an entry with a size below 2^63, or fails if it exceeds the quota together with what was brought before.
    /// Entries are decided one after the other.
    fn add(&self, size: u64, before: Brought, quota: &AcceptedQuota) -> Result<(), Reason> {
        let entries = self
            .entries
            .load(Ordering::Relaxed)
            .saturating_add(before.entries)
            .saturating_add(1);
        let bytes = self
            .bytes
            .load(Ordering::Relaxed)
            .saturating_add(before.bytes)
            .saturating_add(size);
        quota.check(entries, bytes)?;
        self.entries.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(size, Ordering::Relaxed);
        Ok(())
    }
}

impl QuotaUse {
    pub(super) fn new(quota: Option<AcceptedQuota>) -> Self {
        Self {
            quota,
            ..Self::default()
        }
    }

    /// Records what earlier connections have brought.
    pub(super) fn start(&self, brought: Brought) {
        // Set once: a receiver has one connection.
        let _ = self.before.set(brought);
    }

    /// Counts an entry, and refuses it beyond the quota. Entries that earlier connections brought are announced again
    /// and count once. `brought` returns what the session has made so far.
    pub(super) fn announce(
        &self,
        entry: &Entry,
        brought: impl FnOnce() -> Brought,
    ) -> Result<(), Reason> {
        let Some(quota) = self.quota else {
            return Ok(());
        };
        let size = match (entry.kind, entry.size, quota.bytes) {
            (Kind::File, None, Some(_)) => {
                return Err(too_much(
                    "a file of unknown size was not offered; to send it, pipe it into: haul send -"
                        .into(),
                ));
            }
            (_, size, _) => size.unwrap_or_default(),
        };
        let brought = brought();
        quota.check(brought.entries, brought.bytes)?;
        self.announced.add(size, Brought::default(), &quota)
    }

    /// Counts a wanted file, and refuses it beyond the quota. A sender that reconnects and uses other names cannot
    /// exceed the total.
    pub(super) fn want(&self, size: u64) -> Result<(), Reason> {
        let Some(quota) = self.quota else {
            return Ok(());
        };
        let before = self.before.get().copied().unwrap_or_default();
        self.wanted.add(size, before, &quota)
    }
}

impl AcceptedQuota {
    fn check(&self, entries: u64, bytes: u64) -> Result<(), Reason> {
        if entries > self.entries {
            return Err(too_much(format!(
                "the sender brings more than was offered: {entries} entries, at most {} were accepted",
                self.entries
            )));
        }
        match self.bytes.filter(|most| bytes > *most) {
            Some(most) => Err(too_much(format!(
                "the sender brings more than was offered: {bytes} bytes, at most {most} were accepted"
            ))),
            None => Ok(()),
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
    fn the_quota_exceeds_the_offer_by_a_tenth_or_a_minimum() {
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
