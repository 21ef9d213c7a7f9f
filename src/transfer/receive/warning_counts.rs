//! Counts metadata warnings for the summary.

use std::sync::Mutex;

use super::tasks::lock;
use crate::protocol::MetadataWarning;
use crate::protocol::path::RelativePath;
use crate::storage::MetadataWarnings;

/// The metadata warnings of a session.
#[derive(Default)]
pub(super) struct WarningCounts(Mutex<Vec<MetadataWarning>>);

impl WarningCounts {
    /// Counts the warnings of one entry.
    pub(super) fn count(&self, name: &RelativePath, warnings: MetadataWarnings) {
        for (attribute, why) in warnings {
            MetadataWarning::count_one(&mut lock(&self.0), attribute, || format!("{name}: {why}"));
        }
    }

    /// Returns the warnings so far.
    pub(super) fn unkept(&self) -> Option<Vec<MetadataWarning>> {
        let unkept = lock(&self.0);
        (!unkept.is_empty()).then(|| unkept.clone())
    }
}
