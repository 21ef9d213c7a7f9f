//! Formats the bottleneck of a transfer and the statistics of its path, as text and as JSON.

use std::time::Duration;

use console::measure_text_width;
use haul::{Bottleneck, Outcome, PathStats, TimeBreakdown};
use serde_json::{Value, json};

use super::style::OtherEnd;
use super::text::{bytes, milliseconds, three_digits};

/// The most columns of a line. It does not depend on the terminal, because output may go to a file.
const COLUMNS: usize = 79;
/// Parts of the time below this are left out; 0 to 1.
const SMALL: f64 = 0.01;

/// Adds the bottleneck to the summary line, or as a second line if one line would be too long.
pub(super) fn add_to_summary(line: &str, outcome: &Outcome, other_end: OtherEnd) -> String {
    let Some(bound) = bound(outcome, other_end) else {
        return line.to_owned();
    };
    let joined = format!("{line}, bound by {bound}");
    if measure_text_width(&joined) <= COLUMNS {
        joined
    } else {
        format!("{line},\nbound by {bound}")
    }
}

fn bound(outcome: &Outcome, other_end: OtherEnd) -> Option<String> {
    let path = &outcome.path;
    match outcome.bottleneck {
        Bottleneck::Nothing => None,
        Bottleneck::Network => Some(format!(
            "network ({}, {}, {})",
            rate(path.rate),
            milliseconds(path.rtt),
            lost(path)
        )),
        other => Some(name(other, outcome.pulled, other_end)),
    }
}

/// Names a bottleneck. This end is the sender in a push, and the receiver in a pull.
fn name(bound: Bottleneck, pulled: bool, other_end: OtherEnd) -> String {
    let peer = other_end.name();
    let name = match bound {
        Bottleneck::Network => "network",
        Bottleneck::SenderStore if pulled => return format!("{peer}'s disk"),
        Bottleneck::ReceiverStore if !pulled => return format!("{peer}'s disk"),
        Bottleneck::SenderStore | Bottleneck::ReceiverStore => "this disk",
        Bottleneck::Cpu => "CPU",
        Bottleneck::Limit => "--limit",
        _ => "something else",
    };
    name.into()
}

/// Formats the statistics of the path, for `--verbose`.
pub(super) fn details(outcome: &Outcome, other_end: OtherEnd) -> Vec<String> {
    let path = &outcome.path;
    if path.sent_packets == 0 {
        return Vec::new();
    }
    let black_holes = if path.black_holes > 0 {
        format!(", {} black holes", path.black_holes)
    } else {
        String::new()
    };
    let mut lines = vec![
        format!(
            "  path     {}, RTT {} (min {}), MTU {}",
            rate(path.rate),
            milliseconds(path.rtt),
            milliseconds(path.min_rtt),
            path.mtu
        ),
        format!(
            "  packets  {} sent, {} lost ({:.1} %)",
            path.sent_packets,
            path.lost_packets,
            path.loss() * 100.0
        ),
        format!(
            "  bytes    {} sent, {} lost, {} received",
            bytes(path.sent_bytes),
            bytes(path.lost_bytes),
            bytes(path.received_bytes)
        ),
        format!(
            "  window   {}, {} congestion events{black_holes}",
            bytes(path.window),
            path.congestion_events
        ),
    ];
    lines.extend(time_line(
        &outcome.time_breakdown,
        outcome.pulled,
        other_end,
    ));
    lines
}

/// Formats the part of the time that each stage took.
fn time_line(time_breakdown: &TimeBreakdown, pulled: bool, other_end: OtherEnd) -> Option<String> {
    let share = |&(bound, part): &(Bottleneck, f64)| {
        // Names what the session waited for. The article is left out, because four parts would not fit with it.
        let peer = other_end.name().trim_start_matches("the ");
        let stage = match bound {
            Bottleneck::SenderStore if pulled => format!("{peer}'s reading"),
            Bottleneck::SenderStore => "reading".into(),
            Bottleneck::ReceiverStore if pulled => "writing".into(),
            Bottleneck::ReceiverStore => format!("{peer}'s writing"),
            other => name(other, pulled, other_end),
        };
        (part >= SMALL).then(|| format!("{stage} {:.0} %", (part * 100.0).min(100.0)))
    };
    let parts: Vec<_> = time_breakdown.parts().iter().filter_map(share).collect();
    (!parts.is_empty()).then(|| format!("  time     {}", parts.join(", ")))
}

/// Adds the bottleneck, the path, and the part of the time spent on each stage (0 to 1) to a JSON object.
pub(super) fn add_to_json(object: &mut Value, outcome: &Outcome) {
    let Outcome {
        path,
        time_breakdown,
        bottleneck,
        ..
    } = outcome;
    let ms = |time: Duration| time.as_micros() as f64 / 1000.0;
    object["bound"] = bottleneck.name().into();
    object["path"] = json!({
        "bytes_per_second": path.rate, "rtt_ms": ms(path.rtt), "min_rtt_ms": ms(path.min_rtt),
        "sent_packets": path.sent_packets, "lost_packets": path.lost_packets,
        "sent_bytes": path.sent_bytes, "lost_bytes": path.lost_bytes, "received_bytes": path.received_bytes,
        "congestion_events": path.congestion_events, "black_holes": path.black_holes,
        "window": path.window, "mtu": path.mtu,
    });
    let thousandth = |part: f64| Value::from((part * 1000.0).round() / 1000.0);
    object["time"] = time_breakdown
        .parts()
        .into_iter()
        .map(|(bound, part)| (bound.name(), thousandth(part)))
        .collect();
    object["cpu"] = time_breakdown
        .cpu
        .map(|cpu| json!({"busiest": thousandth(cpu.busiest), "all": thousandth(cpu.all)}))
        .into();
}

/// Formats bytes a second as bits a second, with three significant digits.
fn rate(bytes: u64) -> String {
    let bits = bytes as f64 * 8.0;
    let (value, unit) = match bits {
        0.0..1e6 => (bits / 1e3, "kbit/s"),
        1e6..1e9 => (bits / 1e6, "Mbit/s"),
        _ => (bits / 1e9, "Gbit/s"),
    };
    format!("{} {unit}", three_digits(value))
}

fn lost(path: &PathStats) -> String {
    format!("{:.1} % lost", path.loss() * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(bound: Bottleneck) -> Outcome {
        let mut outcome = Outcome {
            bottleneck: bound,
            ..Outcome::default()
        };
        let path = &mut outcome.path;
        path.rate = 11_650_000;
        path.rtt = Duration::from_micros(101_400);
        path.min_rtt = Duration::from_millis(100);
        path.sent_packets = 1_234_567_890;
        path.lost_packets = 12_345_679;
        path.mtu = 6_500;
        path.sent_bytes = 123 << 40;
        path.lost_bytes = 12 << 30;
        path.received_bytes = 999 << 30;
        path.window = 1023 << 20;
        path.congestion_events = 123_456;
        path.black_holes = 12;
        let time_breakdown = &mut outcome.time_breakdown;
        let part = Duration::from_secs(199);
        time_breakdown.elapsed = 5 * part;
        time_breakdown.network = 2 * part;
        time_breakdown.held_up = Some(part);
        time_breakdown.reading = part;
        time_breakdown.limited = part;
        time_breakdown.committing = part;
        outcome
    }

    #[test]
    fn the_summary_names_the_bottleneck() {
        let summary = |bound| {
            add_to_summary(
                "1 file, 256.00 MiB in 23.1 s (11.08 MiB/s)",
                &outcome(bound),
                OtherEnd::Server,
            )
        };
        assert_eq!(
            summary(Bottleneck::Nothing),
            "1 file, 256.00 MiB in 23.1 s (11.08 MiB/s)"
        );
        assert_eq!(
            add_to_summary(
                "1 file",
                &outcome(Bottleneck::ReceiverStore),
                OtherEnd::Receiver
            ),
            "1 file, bound by the receiver's disk"
        );
        assert_eq!(
            summary(Bottleneck::Limit),
            "1 file, 256.00 MiB in 23.1 s (11.08 MiB/s), bound by --limit"
        );
        assert_eq!(
            summary(Bottleneck::Network),
            "1 file, 256.00 MiB in 23.1 s (11.08 MiB/s),\nbound by network (93.2 Mbit/s, 101 ms, 1.0 % lost)"
        );
    }

    #[test]
    fn no_line_is_wider_than_80_columns() {
        let outcome = outcome(Bottleneck::Network);
        let lines = details(&outcome, OtherEnd::Receiver);
        let summary = add_to_summary(&"x".repeat(70), &outcome, OtherEnd::Receiver);
        assert_eq!(lines.len(), 5);
        for line in lines.iter().map(String::as_str).chain(summary.lines()) {
            assert!(line.len() < 80, "{line}");
        }
        assert!(
            details(&Outcome::default(), OtherEnd::Server).is_empty(),
            "nothing was sent"
        );
    }

    #[test]
    fn rates_have_three_significant_digits() {
        assert_eq!(rate(0), "0.00 kbit/s");
        assert_eq!(rate(125_000), "1.00 Mbit/s");
        assert_eq!(rate(124_999_999_999), "1000 Gbit/s");
    }
}
