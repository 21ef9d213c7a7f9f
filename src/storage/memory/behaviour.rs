//! How a store in memory differs from an ideal disk, for tests: slow, like FAT, or like /proc.

use std::time::Duration;

use crate::protocol::{Attribute, Time};
use crate::storage::metadata::{Attributes, Metadata, MetadataWarnings, PERMISSIONS};
use crate::storage::store::TimeProbe;

/// Mode of a file for which the sender gives none.
pub(super) const NEW_FILE_MODE: u32 = 0o644;
/// The first and the last second that FAT can store.
const FIRST_IN_FAT: i64 = 315_532_800;
const LAST_IN_FAT: i64 = 4_354_819_198;

/// What a store keeps, reports and costs.
#[derive(Clone, Copy, Default)]
pub(super) struct Behaviour {
    /// How long each write blocks.
    pub(super) write_delay: Duration,
    /// Whether it keeps only what FAT keeps.
    pub(super) fat: bool,
    /// Whether it reports size 0 for every file.
    pub(super) hides_sizes: bool,
}

impl Behaviour {
    /// Returns a file's metadata as the store reports it.
    pub(super) fn reported(&self, mut metadata: Metadata) -> Metadata {
        if self.hides_sizes {
            metadata.size = 0;
            metadata.version.size = 0;
        }
        metadata
    }

    /// Splits attributes into those that the store keeps, and warnings for the rest.
    pub(super) fn split_attributes(
        &self,
        attributes: &Attributes,
    ) -> (Attributes, MetadataWarnings) {
        let mut attributes = attributes.clone();
        let mut warnings = MetadataWarnings::new();
        if attributes.owner.is_some() {
            warnings.push((Attribute::Owner, "this store does not keep it".into()));
        }
        let xattrs = attributes.xattrs.take();
        warnings.extend(
            xattrs
                .iter()
                .flat_map(|all| all.iter())
                .map(|_| (Attribute::Xattr, "this store does not keep it".into())),
        );
        if self.fat {
            if attributes
                .mode
                .is_some_and(|mode| mode & PERMISSIONS != NEW_FILE_MODE)
            {
                warnings.push((Attribute::Mode, "Operation not permitted".into()));
            }
            attributes.mode = None;
            attributes.modified = attributes.modified.map(round_as_fat);
        }
        (attributes, warnings)
    }
}

impl TimeProbe for Behaviour {
    fn kept(&mut self, time: Time) -> Option<Time> {
        Some(if self.fat { round_as_fat(time) } else { time })
    }
}

/// Rounds a time as FAT does: even seconds, from 1980 to 2107.
fn round_as_fat(time: Time) -> Time {
    let seconds = time.seconds - time.seconds.rem_euclid(2);
    Time {
        seconds: seconds.clamp(FIRST_IN_FAT, LAST_IN_FAT),
        nanoseconds: 0,
    }
}
