//! How much of its time a process wanted a processor, from /proc.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::time::Instant;

/// What was wanted up to an instant.
pub(crate) struct Usage {
    at: Instant,
    /// Nanoseconds on a processor and waiting for one, by thread.
    threads: HashMap<OsString, u64>,
}

/// Parts of the time in which threads computed, or would have, had others not had the processor; 1 is all the time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct Cpu {
    /// The busiest thread.
    pub busiest: f64,
    /// All threads together.
    pub all: f64,
}

impl Usage {
    /// Up to now. Reads a file for each thread; elsewhere than on Linux there are none.
    pub(crate) fn now() -> Self {
        let tasks = fs::read_dir("/proc/self/task")
            .into_iter()
            .flatten()
            .flatten();
        let thread = |task: fs::DirEntry| {
            let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
            Some((task.file_name(), wanted(&text)?))
        };
        Self {
            at: Instant::now(),
            threads: tasks.filter_map(thread).collect(),
        }
    }

    /// What was wanted since; `None` where the system does not tell.
    pub(crate) fn since(&self, earlier: &Self) -> Option<Cpu> {
        let elapsed = (self.at - earlier.at).as_nanos() as f64;
        let spent = |(thread, now): (&OsString, &u64)| {
            now.saturating_sub(*earlier.threads.get(thread).unwrap_or(&0))
        };
        let busiest = self.threads.iter().map(spent).max()?;
        let all: u64 = self.threads.iter().map(spent).sum();
        (elapsed > 0.0).then(|| Cpu {
            busiest: busiest as f64 / elapsed,
            all: all as f64 / elapsed,
        })
    }
}

/// Nanoseconds on a processor and waiting for one: the first two numbers of a thread's schedstat (sched-stats.rst of the
/// kernel).
fn wanted(schedstat: &str) -> Option<u64> {
    let mut numbers = schedstat
        .split_whitespace()
        .map(|number| number.parse::<u64>().ok());
    Some(numbers.next()?? + numbers.next()??)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn threads_count_by_what_they_wanted_since() {
        let begun = Instant::now();
        let usage = |seconds, threads: &[(&str, u64)]| Usage {
            at: begun + Duration::from_secs(seconds),
            threads: threads
                .iter()
                .map(|&(thread, ns)| (thread.into(), ns))
                .collect(),
        };
        let before = usage(0, &[("1", 5_000_000_000), ("2", 0)]);
        let after = usage(
            2,
            &[
                ("1", 5_500_000_000),
                ("2", 1_500_000_000),
                ("3", 500_000_000),
            ],
        );
        assert_eq!(
            after.since(&before),
            Some(Cpu {
                busiest: 0.75,
                all: 1.25
            })
        );
        assert_eq!(before.since(&before), None, "no time has passed");
        assert_eq!(
            usage(2, &[]).since(&usage(0, &[])),
            None,
            "no system that tells"
        );
    }

    #[test]
    fn schedstat_is_read_as_the_kernel_documents_it() {
        assert_eq!(wanted("123 456 7\n"), Some(579));
        assert_eq!(
            (wanted(""), wanted("123"), wanted("a b c")),
            (None, None, None)
        );
    }
}
