//! Compares modification times at the precision of the file system.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Mutex;

use crate::error::lock::lock;
use crate::protocol::path::RelativePath;
use crate::protocol::{ReceiveOptions, Time};
use crate::storage::{Metadata, Store, TimeProbe};

/// Nanoseconds in a second.
const SECOND: i128 = 1_000_000_000;
/// Resolutions of file system times, in nanoseconds: NTFS and SMB, UDF, milliseconds, exFAT, whole seconds, FAT.
const STEPS: [i128; 6] = [100, 1_000, 1_000_000, 10_000_000, SECOND, COARSEST];
/// The coarsest resolution, in nanoseconds.
const COARSEST: i128 = 2 * SECOND;
/// The error of file systems that pass times through floating point numbers, such as those written in Python, in
/// nanoseconds.
const NOISE: i128 = 500;
/// Seconds that every file system can represent in any time zone. FAT begins in 1980, and signed 32 bits end in
/// January 2038.
const HELD_BY_ALL: Range<i64> = 315_705_600..2_147_300_000;

/// Compares times, and remembers what probes have found.
#[derive(Default)]
pub(super) struct Times(Mutex<KeptTimes>);

/// Known properties of file system times.
#[derive(Default)]
struct KeptTimes {
    /// The device of the file system probed last, and its probe, if it has one.
    probe: Option<(u64, Option<Box<dyn TimeProbe>>)>,
    /// Devices that keep all nanoseconds of the times in [`HELD_BY_ALL`].
    exact: HashSet<u64>,
}

impl Times {
    /// Returns whether an existing file has the wanted time, or the closest one that its file system keeps. Blocks.
    pub(super) fn are_same(
        &self,
        store: &dyn Store,
        path: &RelativePath,
        wanted: Time,
        existing: &Metadata,
        options: &ReceiveOptions,
    ) -> bool {
        let apart = distance(wanted, existing.modified);
        let window = i128::from(options.modify_window.unwrap_or(0)) * SECOND;
        let whole_seconds = existing.modified.nanoseconds == 0;
        if apart <= window || whole_seconds && wanted.seconds == existing.modified.seconds {
            return true;
        }
        if apart >= COARSEST && HELD_BY_ALL.contains(&wanted.seconds) {
            return false;
        }
        // A probe writes a file, which a dry run must not do.
        if options.dry_run {
            return looks_kept(wanted, existing.modified);
        }
        let device = existing.version.file.device;
        let kept = lock(&self.0).kept(store, device, wanted, path);
        kept == Some(existing.modified)
    }

    /// Ends the probe, which uses a file and an open descriptor.
    pub(super) fn end_probe(&self) {
        lock(&self.0).probe = None;
    }
}

impl KeptTimes {
    /// Returns the time that a file system keeps for `time`, if a probe can tell.
    fn kept(
        &mut self,
        store: &dyn Store,
        device: u64,
        time: Time,
        path: &RelativePath,
    ) -> Option<Time> {
        let ordinary = HELD_BY_ALL.contains(&time.seconds);
        if ordinary && self.exact.contains(&device) {
            return Some(time);
        }
        if self.probe.as_ref().is_none_or(|(of, _)| *of != device) {
            self.probe = Some((device, store.time_probe(path)));
        }
        let kept = self.probe.as_mut()?.1.as_mut()?.kept(time);
        let is_conclusive = STEPS.iter().all(|step| nanoseconds(time) % step != 0);
        if ordinary && is_conclusive && kept == Some(time) {
            self.exact.insert(device);
        }
        kept
    }
}

/// Returns whether `there` looks like the rounded or clamped form of `wanted`.
fn looks_kept(wanted: Time, there: Time) -> bool {
    let apart = distance(wanted, there);
    let rounded = |step: &i128| apart < *step && nanoseconds(there) % *step == 0;
    let beyond = |time: Time| {
        (
            time.seconds < HELD_BY_ALL.start,
            time.seconds >= HELD_BY_ALL.end,
        )
    };
    apart < NOISE
        || STEPS.iter().any(rounded)
        || !HELD_BY_ALL.contains(&wanted.seconds) && beyond(wanted) == beyond(there)
}

fn nanoseconds(time: Time) -> i128 {
    i128::from(time.seconds) * SECOND + i128::from(time.nanoseconds)
}

fn distance(one: Time, other: Time) -> i128 {
    (nanoseconds(one) - nanoseconds(other)).abs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{LocalStore, MemoryStore};

    fn time(seconds: i64, nanoseconds: u32) -> Time {
        Time {
            seconds,
            nanoseconds,
        }
    }

    #[test]
    fn rounded_times_match_the_wanted_time() {
        let wanted = time(1_700_000_001, 123_456_789);
        let kept = [
            time(1_700_000_000, 0),
            time(1_700_000_001, 123_456_700),
            time(1_700_000_001, 120_000_000),
            time(1_700_000_002, 0),
        ];
        assert!(kept.into_iter().all(|there| looks_kept(wanted, there)));
        let others = [
            time(1_699_999_999, 0),
            time(1_700_000_001, 123_455_788),
            time(1_700_000_004, 0),
        ];
        assert!(!others.into_iter().any(|there| looks_kept(wanted, there)));
        // Clamped to signed 32 bits.
        assert!(looks_kept(time(4_102_444_800, 0), time(2_147_483_647, 0)));
        assert!(!looks_kept(time(4_102_444_800, 0), time(1_700_000_000, 0)));
    }

    #[test]
    fn a_file_system_with_exact_times_is_probed_once() {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::open(directory.path()).unwrap();
        let path = RelativePath::from_components(["f"]).unwrap();
        let mut times = KeptTimes::default();
        let odd = time(1_700_000_001, 123_456_789);
        if times.kept(&store, 1, odd, &path) != Some(odd) {
            return println!("skipped: the file system rounds times");
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        times.probe = None;
        assert_eq!(
            std::fs::read_dir(directory.path()).unwrap().count(),
            0,
            "the probe removes its file"
        );
        let even = time(1_700_000_000, 5);
        assert_eq!(times.kept(&store, 1, even, &path), Some(even));
        assert!(times.probe.is_none(), "the file system is not probed again");
    }

    #[test]
    fn times_that_fat_keeps_are_probed() {
        let store = MemoryStore::new().like_fat();
        let path = RelativePath::from_components(["f"]).unwrap();
        let mut times = KeptTimes::default();
        for (given, kept) in [
            (time(1_700_000_001, 7), time(1_700_000_000, 0)),
            (time(7, 0), time(315_532_800, 0)),
            (time(9_000_000_000, 0), time(4_354_819_198, 0)),
        ] {
            assert_eq!(times.kept(&store, 1, given, &path), Some(kept));
        }
    }
}
