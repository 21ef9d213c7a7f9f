//! Adds up the events of a session. The caller passes the time in, so that tests need no clock.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use haul::{Code, Event, Kind, RelativePath, Settled};
use indicatif::{HumanCount, HumanDuration};

/// The time over which the shown rate is averaged.
const RATE_OVER: Duration = Duration::from_secs(4);

/// A running transfer.
pub(super) struct Running {
    pub(super) path: RelativePath,
    pub(super) size: u64,
    /// Bytes moved, including those that a partial held before.
    pub(super) moved: u64,
}

/// Totals of a session.
pub(super) struct Tally {
    start: Instant,
    pub(super) found_files: u64,
    pub(super) found_bytes: u64,
    pub(super) complete: bool,
    files: u64,
    skipped: u64,
    failed: u64,
    vanished: u64,
    specials: u64,
    /// Settled entries among those found. A source that could not be read fails without being found.
    settled: u64,
    committed_bytes: u64,
    /// Bytes of all settled files, whatever the result.
    settled_bytes: u64,
    pub(super) running: HashMap<u64, Running>,
    /// Bytes sent over the network.
    pub(super) travelled: u64,
    /// Bytes that partials held before, of resumed files.
    pub(super) held: u64,
    recent: VecDeque<(Instant, u64)>,
}

impl Tally {
    pub(super) fn new(start: Instant) -> Self {
        Self {
            start,
            found_files: 0,
            found_bytes: 0,
            complete: false,
            files: 0,
            skipped: 0,
            failed: 0,
            vanished: 0,
            specials: 0,
            settled: 0,
            committed_bytes: 0,
            settled_bytes: 0,
            running: HashMap::new(),
            travelled: 0,
            held: 0,
            recent: VecDeque::from([(start, 0)]),
        }
    }

    pub(super) fn take(&mut self, event: &Event) {
        match event {
            Event::Found {
                files,
                bytes,
                complete,
            } => {
                self.found_files = *files;
                self.found_bytes = *bytes;
                self.complete |= complete;
            }
            Event::Started {
                id,
                path,
                size,
                held,
            } => {
                self.held += held;
                self.running.insert(
                    *id,
                    Running {
                        path: path.clone(),
                        size: *size,
                        moved: *held,
                    },
                );
            }
            Event::Moved { id, bytes } => {
                self.travelled += bytes;
                if let Some(running) = self.running.get_mut(id) {
                    // The size of a pipe is unknown and counts as 0.
                    let most = if running.size == 0 {
                        u64::MAX
                    } else {
                        running.size
                    };
                    running.moved = (running.moved + bytes).min(most);
                }
            }
            Event::Settled {
                id,
                kind,
                size,
                result,
                ..
            } => {
                if let Some(id) = id {
                    self.running.remove(id);
                    self.settled += u64::from(*kind != Kind::Directory);
                }
                match result {
                    Settled::Failed(_) => self.failed += 1,
                    Settled::Omitted(why) if why.code == Code::Special => self.specials += 1,
                    Settled::Omitted(_) => self.vanished += 1,
                    _ if *kind == Kind::Directory => return,
                    Settled::Skipped => self.skipped += 1,
                    Settled::Committed => {
                        self.files += 1;
                        self.committed_bytes += size;
                    }
                }
                self.settled_bytes += size;
            }
            _ => {}
        }
    }

    /// Formats what a dry run would have done.
    pub(super) fn would(&self) -> String {
        let unchanged = match self.skipped {
            0 => String::new(),
            skipped => format!("; {} unchanged", HumanCount(skipped)),
        };
        let failed = if self.failed == 0 {
            String::new()
        } else {
            format!("; {} would fail", HumanCount(self.failed))
        };
        let omitted: String = self.omitted().map(|what| format!("; {what}")).collect();
        let files = if self.files == 1 { "file" } else { "files" };
        format!(
            "{} {files}, {}{unchanged}{failed}{omitted}",
            HumanCount(self.files),
            bytes(self.committed_bytes)
        )
    }

    /// Formats the counts of entries that were omitted without a failure.
    fn omitted(&self) -> impl Iterator<Item = String> {
        let vanished =
            (self.vanished > 0).then(|| format!("{} vanished", HumanCount(self.vanished)));
        let specials = (self.specials > 0)
            .then(|| format!("{} skipped", count(self.specials, "special file")));
        vanished.into_iter().chain(specials)
    }

    /// Records the bytes moved so far, for the rate.
    pub(super) fn tick(&mut self, now: Instant) {
        self.recent.push_back((now, self.travelled));
        while self.recent.len() > 2 && now - self.recent[1].0 >= RATE_OVER {
            self.recent.pop_front();
        }
    }

    pub(super) fn elapsed(&self, now: Instant) -> Duration {
        now - self.start
    }

    pub(super) fn files_settled(&self) -> u64 {
        self.settled
    }

    /// Returns the bytes of settled files, plus the bytes moved of running ones.
    pub(super) fn bytes_moved(&self) -> u64 {
        self.settled_bytes
            + self
                .running
                .values()
                .map(|running| running.moved)
                .sum::<u64>()
    }

    /// Returns the bytes a second over the last [`RATE_OVER`].
    fn rate(&self, now: Instant) -> f64 {
        let (since, before) = self.recent.front().copied().unwrap_or((self.start, 0));
        let seconds = (now - since).as_secs_f64();
        if seconds > 0.0 {
            (self.travelled - before) as f64 / seconds
        } else {
            0.0
        }
    }

    /// Formats the line of totals of a running session. The time left is shown only after everything was found.
    pub(super) fn total(&self, now: Instant) -> String {
        let rate = self.rate(now);
        let moved = self.bytes_moved();
        let more = if self.complete { "" } else { "+" };
        let mut line = format!(
            "{}/{}{more} files  {}/{}{more}  {}/s",
            HumanCount(self.files_settled()),
            HumanCount(self.found_files),
            bytes(moved),
            bytes(self.found_bytes),
            bytes(rate as u64),
        );
        let left = self.found_bytes.saturating_sub(moved);
        if self.complete && left > 0 && rate >= 1.0 {
            line += &format!(
                "  {} left",
                clock(Duration::from_secs_f64((left as f64 / rate).min(1e9)))
            );
        } else if self.complete && left == 0 && self.files_settled() < self.found_files {
            line += "  verifying";
        }
        line
    }

    /// Formats the summary line. "nothing to do" is only possible if the session was `whole`, that is, it did not break off.
    pub(super) fn summary(&self, now: Instant, whole: bool) -> String {
        let elapsed = self.elapsed(now);
        let failed = self.failed + self.vanished;
        if whole && self.skipped > 0 && self.files == 0 && failed == 0 {
            let omitted: String = self.omitted().map(|what| format!(", {what}")).collect();
            return format!(
                "nothing to do in {}: {} unchanged{omitted}",
                seconds(elapsed),
                count(self.skipped, "file")
            );
        }
        // Held bytes and holes are not sent, so they do not count in the rate.
        let rate =
            self.committed_bytes.min(self.travelled) as f64 / elapsed.as_secs_f64().max(0.001);
        let files = count(self.files, "file");
        let size = bytes(self.committed_bytes);
        let mut line = format!(
            "{files}, {size} in {} ({}/s)",
            seconds(elapsed),
            bytes(rate as u64)
        );
        if self.held > 0 {
            line += &format!(", {} of it held already", bytes(self.held));
        }
        for (count, what) in [(self.skipped, "unchanged"), (self.failed, "failed")] {
            if count > 0 {
                line += &format!(", {} {what}", HumanCount(count));
            }
        }
        for omitted in self.omitted() {
            line += &format!(", {omitted}");
        }
        line
    }
}

pub(in crate::cli) fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

pub(super) fn count(count: u64, what: &str) -> String {
    format!(
        "{} {what}{}",
        HumanCount(count),
        if count == 1 { "" } else { "s" }
    )
}

fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        _ => clock(time),
    }
}

fn clock(time: Duration) -> String {
    let s = time.as_secs();
    match s {
        0..3600 => format!("{}:{:02}", s / 60, s % 60),
        3600..86400 => format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60),
        _ => HumanDuration(time).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> RelativePath {
        RelativePath::from_components([name]).unwrap()
    }

    fn settled(id: u64, size: u64, result: Settled) -> Event {
        Event::Settled {
            id: Some(id),
            path: path("f"),
            kind: Kind::File,
            size,
            result,
        }
    }

    #[test]
    fn totals_show_the_time_left_once_all_is_found() {
        let start = Instant::now();
        let mut tally = Tally::new(start);
        tally.take(&Event::Found {
            files: 2,
            bytes: 3000,
            complete: false,
        });
        tally.take(&Event::Started {
            id: 0,
            path: path("a"),
            size: 2000,
            held: 1000,
        });
        tally.take(&Event::Moved { id: 0, bytes: 500 });
        let later = start + Duration::from_secs(1);
        assert_eq!(
            tally.total(later),
            "0/2+ files  1.46 KiB/2.93 KiB+  500 B/s",
            "no time left before all is found"
        );
        tally.take(&Event::Found {
            files: 2,
            bytes: 3000,
            complete: true,
        });
        assert_eq!(
            tally.total(later),
            "0/2 files  1.46 KiB/2.93 KiB  500 B/s  0:03 left"
        );
        tally.take(&settled(1, 1000, Settled::Skipped));
        tally.take(&Event::Moved { id: 0, bytes: 500 });
        assert!(
            tally.total(later).ends_with("  verifying"),
            "sent is not committed"
        );
        tally.take(&settled(0, 2000, Settled::Committed));
        assert_eq!(
            tally.summary(later, true),
            "1 file, 1.95 KiB in 1.0 s (1000 B/s), 1000 B of it held already, 1 unchanged"
        );
    }

    #[test]
    fn the_size_of_a_pipe_is_the_bytes_moved_so_far() {
        let start = Instant::now();
        let mut tally = Tally::new(start);
        tally.take(&Event::Started {
            id: 0,
            path: path("a"),
            size: 0,
            held: 0,
        });
        tally.take(&Event::Found {
            files: 1,
            bytes: 2048,
            complete: false,
        });
        tally.take(&Event::Moved { id: 0, bytes: 2048 });
        assert_eq!(
            tally.total(start + Duration::from_secs(1)),
            "0/1+ files  2.00 KiB/2.00 KiB+  2.00 KiB/s"
        );
    }

    #[test]
    fn the_summary_counts_each_result() {
        let start = Instant::now();
        let later = start + Duration::from_secs(75);
        let mut tally = Tally::new(start);
        tally.take(&settled(1, 5, Settled::Skipped));
        assert_eq!(
            tally.summary(later, true),
            "nothing to do in 1:15: 1 file unchanged"
        );
        assert_eq!(
            tally.summary(later, false),
            "0 files, 0 B in 1:15 (0 B/s), 1 unchanged",
            "there was more to do"
        );
        tally.take(&settled(2, 5, Settled::Failed(Code::NoSpace.into())));
        assert_eq!(
            tally.summary(later, true),
            "0 files, 0 B in 1:15 (0 B/s), 1 unchanged, 1 failed"
        );
        assert_eq!(
            Tally::new(start).summary(start, true),
            "0 files, 0 B in 0.0 s (0 B/s)"
        );
    }

    #[test]
    fn settled_files_never_exceed_found_files() {
        let start = Instant::now();
        let mut tally = Tally::new(start);
        tally.take(&Event::Found {
            files: 1,
            bytes: 5,
            complete: true,
        });
        let gone = |id, kind| {
            let result = Settled::Failed(Code::Unreadable.into());
            Event::Settled {
                id,
                path: path("gone"),
                kind,
                size: 0,
                result,
            }
        };
        tally.take(&gone(None, Kind::File));
        tally.take(&gone(Some(0), Kind::Directory));
        assert!(
            tally.total(start).starts_with("0/1 files"),
            "{}",
            tally.total(start)
        );
        tally.take(&settled(1, 5, Settled::Committed));
        assert!(
            tally.total(start).starts_with("1/1 files"),
            "{}",
            tally.total(start)
        );
        assert!(tally.summary(start, true).ends_with("2 failed"));
    }

    #[test]
    fn the_rate_covers_only_the_last_seconds() {
        let start = Instant::now();
        let mut tally = Tally::new(start);
        tally.take(&Event::Started {
            id: 0,
            path: path("a"),
            size: 1 << 30,
            held: 0,
        });
        tally.take(&Event::Moved {
            id: 0,
            bytes: 1 << 20,
        });
        for tenth in 1..200 {
            tally.tick(start + Duration::from_millis(tenth * 100));
        }
        assert!(
            tally.rate(start + Duration::from_secs(20)) < 1.0,
            "a stall shows"
        );
    }
}
