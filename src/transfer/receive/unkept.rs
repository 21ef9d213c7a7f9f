//! What could not be kept, counted for the summary.

use std::sync::Mutex;

use super::lock;
use crate::protocol::Unkept;
use crate::protocol::path::RelativePath;
use crate::storage::Lapses;

/// A session's account of what could not be kept.
#[derive(Default)]
pub(super) struct Tally(Mutex<Vec<Unkept>>);

impl Tally {
    /// Counts what could not be kept of one entry.
    pub(super) fn count(&self, name: &RelativePath, lapses: Lapses) {
        for (aspect, why) in lapses {
            Unkept::count_one(&mut lock(&self.0), aspect, || format!("{name}: {why}"));
        }
    }

    /// The account so far.
    pub(super) fn unkept(&self) -> Option<Vec<Unkept>> {
        let unkept = lock(&self.0);
        (!unkept.is_empty()).then(|| unkept.clone())
    }
}
