//! How busy the processors were, from /proc.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::time::Instant;

/// A thread that computed for less of the time had a processor whenever it wanted one.
const SHARE: f64 = 0.3;

/// What was computed up to an instant.
pub(crate) struct Usage {
    at: Instant,
    /// Nanoseconds on a processor, by thread.
    threads: HashMap<OsString, u64>,
    machine: Option<Machine>,
}

/// Ticks of all processors of the machine together.
#[derive(Clone, Copy)]
struct Machine {
    all: u64,
    idle: u64,
}

impl Usage {
    /// Up to now. Reads some files, one for each thread.
    pub(crate) fn now() -> Self {
        let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let thread = |task: fs::DirEntry| Some((task.file_name(), first_number(&task.path().join("schedstat"))?));
        let machine = fs::read_to_string("/proc/stat").ok().and_then(|text| Machine::parse(&text));
        Self { at: Instant::now(), threads: tasks.filter_map(thread).collect(), machine }
    }

    /// The busiest thread's part of the time since; or, if it shared a machine that was busier still, the machine's.
    pub(crate) fn since(&self, earlier: &Self) -> Option<f64> {
        let elapsed = (self.at - earlier.at).as_nanos() as f64;
        let spent = |(thread, now): (&OsString, &u64)| now.saturating_sub(*earlier.threads.get(thread).unwrap_or(&0));
        let busiest = self.threads.iter().map(spent).max().map(|spent| spent as f64 / elapsed);
        let machine = self.machine.zip(earlier.machine).and_then(|(now, before)| now.busy_since(before));
        match busiest.filter(|part| part.is_finite())? {
            // Whatever else kept the machine busy did not slow this process down.
            busiest if busiest < SHARE => Some(busiest),
            busiest => Some(busiest.max(machine.unwrap_or_default()).min(1.0)),
        }
    }
}

impl Machine {
    /// The first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal (proc_stat(5)).
    fn parse(text: &str) -> Option<Self> {
        let ticks: Vec<u64> =
            text.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8).flat_map(str::parse).collect();
        Some(Self { all: ticks.iter().sum(), idle: ticks.get(3)? + ticks.get(4)? })
    }

    fn busy_since(self, before: Self) -> Option<f64> {
        let all = self.all.checked_sub(before.all).filter(|&all| all > 0)?;
        Some(1.0 - self.idle.saturating_sub(before.idle) as f64 / all as f64)
    }
}

fn first_number(file: &std::path::Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_busiest_thread_counts_and_the_machine_if_it_is_busier() {
        let usage = |seconds, threads: &[(&str, u64)], machine: (u64, u64)| Usage {
            at: *BEGUN.get_or_init(Instant::now) + Duration::from_secs(seconds),
            threads: threads.iter().map(|&(thread, ns)| (thread.into(), ns)).collect(),
            machine: Some(Machine { all: machine.0, idle: machine.1 }),
        };
        static BEGUN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        let before = usage(0, &[("1", 5_000_000_000), ("2", 0)], (1000, 1000));
        let thread = usage(2, &[("1", 5_500_000_000), ("2", 1_800_000_000)], (2000, 1500));
        assert_eq!(thread.since(&before), Some(0.9));
        let machine = usage(2, &[("3", 1_000_000_000)], (2000, 1050));
        assert_eq!(machine.since(&before), Some(0.95));
        let others = usage(2, &[("3", 100_000_000)], (2000, 1050));
        assert_eq!(others.since(&before), Some(0.05), "others kept the machine busy, and not this process");
        assert_eq!(before.since(&before), None, "no time has passed");
    }

    #[test]
    fn proc_is_read_as_its_manual_page_says() {
        let machine = Machine::parse("cpu  10 1 5 70 4 2 3 5 9 9\ncpu0 1 2\n").unwrap();
        assert_eq!((machine.all, machine.idle), (100, 74));
        assert!(Machine::parse("").is_none() && Machine::parse("cpu  1 2 3").is_none());
    }
}
