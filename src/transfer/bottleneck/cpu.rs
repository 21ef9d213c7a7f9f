//! Measures how much CPU time a process wanted, from /proc.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::time::Instant;

/// The CPU time that each thread wanted up to an instant.
pub(crate) struct Usage {
    at: Instant,
    /// Nanoseconds on a CPU and waiting for one, by thread.
    threads: HashMap<OsString, u64>,
}

/// The share of time in which threads ran or waited for a CPU; 1 is all the time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct Cpu {
    /// Share of the busiest thread.
    pub busiest: f64,
    /// Sum over all threads.
    pub all: f64,
}

impl Usage {
    /// Measures up to now. Reads one file for each thread; only Linux has these files.
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

    /// Returns the usage since an earlier measurement; `None` if the system does not report it.
    pub(crate) fn since(&self, earlier: &Self) -> Option<Cpu> {
        let elapsed = (self.at - earlier.at).as_nanos() as f64;
        let wanted_since = |(thread, now): (&OsString, &u64)| {
            now.saturating_sub(*earlier.threads.get(thread).unwrap_or(&0))
        };
        let busiest = self.threads.iter().map(wanted_since).max()?;
        let all: u64 = self.threads.iter().map(wanted_since).sum();
        (elapsed > 0.0).then(|| Cpu {
            busiest: busiest as f64 / elapsed,
            all: all as f64 / elapsed,
        })
    }
}

/// Returns the nanoseconds on a CPU and waiting for one: the first two numbers of schedstat (sched-stats.rst of the
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
    fn threads_count_by_the_cpu_time_they_wanted() {
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
            "a system without schedstat"
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
