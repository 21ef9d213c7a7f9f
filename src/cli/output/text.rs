//! Formats figures, times and names for people.

use std::path::Path;
use std::time::Duration;

use haul::{Reason, RelativePath, printable};
use indicatif::{HumanCount, HumanDuration};

/// Formats a number of bytes with a binary unit: `1.95 KiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// Escapes a local path for printing.
pub(crate) fn printable_path(path: &Path) -> String {
    printable(path.as_os_str().as_encoded_bytes())
}

/// Formats a number with its noun, which takes an `s` unless the number is 1.
pub(super) fn count(count: u64, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", HumanCount(count))
}

/// Formats a duration: `1.5 s`, and from a minute on as [`clock`].
pub(super) fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        _ => clock(time),
    }
}

/// Formats a duration as `minutes:seconds` or `hours:minutes:seconds`, and from a day on in words.
pub(super) fn clock(time: Duration) -> String {
    let s = time.as_secs();
    match s {
        0..3600 => format!("{}:{:02}", s / 60, s % 60),
        3600..86400 => format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60),
        _ => HumanDuration(time).to_string(),
    }
}

/// Formats a duration in milliseconds, with three significant digits.
pub(super) fn milliseconds(time: Duration) -> String {
    format!("{} ms", three_digits(time.as_secs_f64() * 1000.0))
}

/// Formats a figure with three significant digits, and all digits before the point.
pub(super) fn three_digits(value: f64) -> String {
    match value {
        0.0..9.995 => format!("{value:.2}"),
        0.0..99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// Formats a failure. The path is named once, also if the reason contains it.
pub(super) fn failure(path: &RelativePath, why: &Reason) -> String {
    let path = path.to_string();
    let why = why.to_string();
    if why.contains(&path) {
        why
    } else {
        format!("{path}: {why}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use haul::Code;

    #[test]
    fn times_are_short_up_to_a_day() {
        for (time, short, long) in [
            (0, "0.0 s", "0:00"),
            (59, "59.0 s", "0:59"),
            (75, "1:15", "1:15"),
            (3_661, "1:01:01", "1:01:01"),
        ] {
            let time = Duration::from_secs(time);
            assert_eq!((&*seconds(time), &*clock(time)), (short, long));
        }
    }

    #[test]
    fn figures_have_three_significant_digits() {
        assert_eq!(milliseconds(Duration::from_micros(99)), "0.10 ms");
        assert_eq!(milliseconds(Duration::from_micros(99_960)), "100 ms");
        assert_eq!(three_digits(12_345.6), "12346");
    }

    #[test]
    fn a_failure_names_its_path_once_and_is_escaped() {
        let path = RelativePath::from_components([b"a\x1b"]).unwrap();
        for why in ["broken", "a\x1b: broken"] {
            let why = Reason::new(Code::Io, why);
            assert_eq!(failure(&path, &why), "a\\u{1b}: broken");
        }
    }
}
