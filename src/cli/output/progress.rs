//! The figures of a running session, counted from its events. The caller passes the time in, so that tests need no clock.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use haul::{Event, Kind, RelativePath, TransferStats};
use indicatif::HumanCount;

use super::text::{bytes, clock};

/// The time over which the shown rate is averaged.
const RATE_OVER: Duration = Duration::from_secs(4);

/// The progress of a session.
pub(super) struct Progress {
    start: Instant,
    found: Found,
    /// The results so far.
    stats: TransferStats,
    /// Settled entries among those found. A source that could not be read fails without being found.
    settled_files: u64,
    /// Bytes of all settled files, whatever the result.
    settled_bytes: u64,
    running: HashMap<u64, Running>,
    /// Bytes sent over the network.
    moved: u64,
    /// Bytes that partials held before, of resumed files.
    held: u64,
    rate: RateMeter,
}

/// What the sender has found.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Found {
    pub(super) files: u64,
    pub(super) bytes: u64,
    /// Whether the search has ended.
    pub(super) complete: bool,
}

/// A running transfer.
pub(super) struct Running {
    pub(super) path: RelativePath,
    /// The size in bytes; 0 if unknown.
    pub(super) size: u64,
    /// Bytes moved, including those that a partial held before.
    pub(super) moved: u64,
}

impl Progress {
    pub(super) fn new(start: Instant) -> Self {
        Self {
            start,
            found: Found::default(),
            stats: TransferStats::default(),
            settled_files: 0,
            settled_bytes: 0,
            running: HashMap::new(),
            moved: 0,
            held: 0,
            rate: RateMeter::new(start),
        }
    }

    /// Counts an event.
    pub(super) fn count(&mut self, event: &Event) {
        match event {
            Event::Found {
                files,
                bytes,
                complete,
            } => {
                self.found = Found {
                    files: *files,
                    bytes: *bytes,
                    complete: self.found.complete || *complete,
                }
            }
            Event::Started {
                id,
                path,
                size,
                held,
            } => {
                self.held += held;
                let running = Running {
                    path: path.clone(),
                    size: *size,
                    moved: *held,
                };
                self.running.insert(*id, running);
            }
            Event::Moved { id, bytes } => {
                self.moved += bytes;
                if let Some(running) = self.running.get_mut(id) {
                    running.add(*bytes);
                }
            }
            Event::Settled {
                id,
                path,
                kind,
                size,
                result,
            } => {
                if let Some(id) = id {
                    self.running.remove(id);
                    self.settled_files += u64::from(*kind != Kind::Directory);
                }
                if *kind != Kind::Directory {
                    self.settled_bytes += size;
                }
                self.stats.count(path, *kind, *size, result);
            }
            _ => {}
        }
    }

    /// Records the bytes moved so far, for the rate.
    pub(super) fn sample_rate(&mut self, now: Instant) {
        self.rate.sample(now, self.moved);
    }

    pub(super) fn elapsed(&self, now: Instant) -> Duration {
        now - self.start
    }

    pub(super) fn found(&self) -> Found {
        self.found
    }

    /// Returns the results so far. Those of a session that has ended are in its outcome.
    pub(super) fn stats(&self) -> &TransferStats {
        &self.stats
    }

    pub(super) fn files_settled(&self) -> u64 {
        self.settled_files
    }

    /// Returns the bytes of settled files, plus the bytes moved of running ones.
    pub(super) fn bytes_done(&self) -> u64 {
        let running = self.running.values().map(|running| running.moved);
        self.settled_bytes + running.sum::<u64>()
    }

    /// Returns the bytes that were sent over the network.
    pub(super) fn bytes_moved(&self) -> u64 {
        self.moved
    }

    /// Returns the bytes that partials held before, and that were not sent.
    pub(super) fn bytes_held(&self) -> u64 {
        self.held
    }

    /// Returns the running transfers of at least `size` bytes, in the order of their entries.
    pub(super) fn running_of_size(&self, size: u64) -> impl Iterator<Item = &Running> {
        let running = self.running.iter();
        let mut large: Vec<_> = running.filter(|(_, r)| r.size >= size).collect();
        large.sort_unstable_by_key(|&(id, _)| id);
        large.into_iter().map(|(_, running)| running)
    }

    /// Formats the line of totals of a running session. The time left is shown only after everything was found.
    pub(super) fn line(&self, now: Instant) -> String {
        let rate = self.rate.bytes_a_second(now, self.moved);
        let done = self.bytes_done();
        let found = self.found;
        let more = if found.complete { "" } else { "+" };
        let mut line = format!(
            "{}/{}{more} files  {}/{}{more}  {}/s",
            HumanCount(self.settled_files),
            HumanCount(found.files),
            bytes(done),
            bytes(found.bytes),
            bytes(rate as u64),
        );
        let left = found.bytes.saturating_sub(done);
        if found.complete && left > 0 && rate >= 1.0 {
            let seconds = (left as f64 / rate).min(1e9);
            line += &format!("  {} left", clock(Duration::from_secs_f64(seconds)));
        } else if found.complete && left == 0 && self.settled_files < found.files {
            line += "  verifying";
        }
        line
    }
}

impl Running {
    fn add(&mut self, bytes: u64) {
        let most = match self.size {
            // The size of a pipe is unknown.
            0 => u64::MAX,
            size => size,
        };
        self.moved = (self.moved + bytes).min(most);
    }
}

/// Measures the rate over the last [`RATE_OVER`].
struct RateMeter {
    /// Ascending in time, and never empty.
    samples: VecDeque<Sample>,
}

#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    /// Bytes moved until then.
    bytes: u64,
}

impl RateMeter {
    fn new(start: Instant) -> Self {
        let first = Sample {
            at: start,
            bytes: 0,
        };
        Self {
            samples: VecDeque::from([first]),
        }
    }

    fn sample(&mut self, now: Instant, bytes: u64) {
        self.samples.push_back(Sample { at: now, bytes });
        while self.samples.len() > 2 && now - self.samples[1].at >= RATE_OVER {
            self.samples.pop_front();
        }
    }

    fn bytes_a_second(&self, now: Instant, bytes: u64) -> f64 {
        let first = self.samples[0];
        let seconds = (now - first.at).as_secs_f64();
        if seconds > 0.0 {
            (bytes - first.bytes) as f64 / seconds
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use haul::{Code, Settled};

    use super::*;

    fn path(name: &str) -> RelativePath {
        RelativePath::from_components([name]).unwrap()
    }

    fn found(files: u64, bytes: u64, complete: bool) -> Event {
        Event::Found {
            files,
            bytes,
            complete,
        }
    }

    fn started(size: u64, held: u64) -> Event {
        Event::Started {
            id: 0,
            path: path("a"),
            size,
            held,
        }
    }

    fn settled(id: Option<u64>, kind: Kind, size: u64, result: Settled) -> Event {
        Event::Settled {
            id,
            path: path("f"),
            kind,
            size,
            result,
        }
    }

    #[test]
    fn totals_show_the_time_left_once_all_is_found() {
        let start = Instant::now();
        let mut progress = Progress::new(start);
        progress.count(&found(2, 3000, false));
        progress.count(&started(2000, 1000));
        progress.count(&Event::Moved { id: 0, bytes: 500 });
        let later = start + Duration::from_secs(1);
        assert_eq!(
            progress.line(later),
            "0/2+ files  1.46 KiB/2.93 KiB+  500 B/s",
            "no time left before all is found"
        );
        progress.count(&found(2, 3000, true));
        assert_eq!(
            progress.line(later),
            "0/2 files  1.46 KiB/2.93 KiB  500 B/s  0:03 left"
        );
        progress.count(&settled(Some(1), Kind::File, 1000, Settled::Skipped));
        progress.count(&Event::Moved { id: 0, bytes: 500 });
        assert!(
            progress.line(later).ends_with("  verifying"),
            "sent is not committed"
        );
        progress.count(&settled(Some(0), Kind::File, 2000, Settled::Committed));
        assert_eq!(
            progress.line(later),
            "2/2 files  2.93 KiB/2.93 KiB  1000 B/s"
        );
    }

    #[test]
    fn the_size_of_a_pipe_is_the_bytes_moved_so_far() {
        let start = Instant::now();
        let mut progress = Progress::new(start);
        progress.count(&started(0, 0));
        progress.count(&found(1, 2048, false));
        progress.count(&Event::Moved { id: 0, bytes: 2048 });
        assert_eq!(
            progress.line(start + Duration::from_secs(1)),
            "0/1+ files  2.00 KiB/2.00 KiB+  2.00 KiB/s"
        );
    }

    #[test]
    fn settled_files_never_exceed_found_files() {
        let start = Instant::now();
        let mut progress = Progress::new(start);
        progress.count(&found(1, 5, true));
        let failed = || Settled::Failed(Code::Unreadable.into());
        progress.count(&settled(None, Kind::File, 0, failed()));
        progress.count(&settled(Some(0), Kind::Directory, 0, failed()));
        assert!(
            progress.line(start).starts_with("0/1 files"),
            "{}",
            progress.line(start)
        );
        progress.count(&settled(Some(1), Kind::File, 5, Settled::Committed));
        assert!(
            progress.line(start).starts_with("1/1 files"),
            "{}",
            progress.line(start)
        );
        assert_eq!(progress.stats().failed, 2);
    }

    #[test]
    fn the_rate_covers_only_the_last_seconds() {
        let start = Instant::now();
        let mut progress = Progress::new(start);
        progress.count(&started(1 << 30, 0));
        progress.count(&Event::Moved {
            id: 0,
            bytes: 1 << 20,
        });
        for tenth in 1..200 {
            progress.sample_rate(start + Duration::from_millis(tenth * 100));
        }
        let rate = progress
            .rate
            .bytes_a_second(start + Duration::from_secs(20), progress.moved);
        assert!(rate < 1.0, "a stall shows");
    }
}
