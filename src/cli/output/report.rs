//! The report at the end of a session, as text and as JSON. Its totals are those of the outcome; if the session was lost,
//! they are the results that were reported until then.

use std::time::{Duration, Instant};

use haul::{Error, MetadataWarning, Outcome, Reason, Route, TransferStats};
use indicatif::HumanCount;
use serde_json::{Value, json};

use super::bottleneck;
use super::progress::Progress;
use super::style::{Display, Style};
use super::text::{bytes, count, seconds};

/// Returns the lines of the report.
pub(super) fn lines(
    result: &Result<Outcome, Error>,
    progress: &Progress,
    route: Option<Route>,
    display: Display,
    now: Instant,
) -> Vec<String> {
    let traffic = Traffic {
        moved: progress.bytes_moved(),
        held: progress.bytes_held(),
        elapsed: progress.elapsed(now),
        route,
    };
    match result {
        Ok(outcome) => {
            let mut lines = match display.style {
                Style::Quiet => Vec::new(),
                _ => outcome_lines(outcome, &traffic, display),
            };
            if let Some(why) = &outcome.sent.interrupted {
                lines.push(format!(
                    "haul: {why}; run the same command again later to send the rest"
                ));
            }
            lines
        }
        // If no file was found, the error message alone is enough.
        Err(_) if display.style == Style::Quiet || progress.found().files == 0 => Vec::new(),
        Err(_) => vec![format!(
            "stopped after {}",
            summary(progress.stats(), &traffic, false)
        )],
    }
}

/// What a session sent, and how.
struct Traffic {
    /// Bytes sent over the network.
    moved: u64,
    /// Bytes that partials held before.
    held: u64,
    elapsed: Duration,
    /// The route to the peer, if the session reported one.
    route: Option<Route>,
}

fn outcome_lines(outcome: &Outcome, traffic: &Traffic, display: Display) -> Vec<String> {
    let sent = &outcome.sent;
    let mut lines = Vec::new();
    if display.dry_run {
        lines.push(format!(
            "dry run, nothing was written; would copy {}",
            dry_run_summary(sent)
        ));
    } else {
        let summary = summary(sent, traffic, sent.interrupted.is_none());
        lines.push(bottleneck::add_to_summary(
            &summary,
            outcome,
            display.other_end,
        ));
    }
    lines.extend(mirror_lines(outcome, display.dry_run));
    if display.style == Style::Verbose {
        if sent.excluded > 0 {
            lines.push(format!("{} excluded", sent.excluded));
        }
        lines.extend(bottleneck::details(outcome, display.other_end));
    }
    let warnings = metadata_warnings(outcome);
    lines.extend(warnings.iter().map(|warning| format!("haul: {warning}")));
    lines
}

/// Formats the summary line. "nothing to do" is only possible if the session was `whole`, that is, it did not break off.
fn summary(stats: &TransferStats, traffic: &Traffic, whole: bool) -> String {
    let mut line = counts(stats, traffic, whole);
    if let Some(route) = traffic.route {
        line += &format!(", {}", route.word());
    }
    line
}

fn counts(stats: &TransferStats, traffic: &Traffic, whole: bool) -> String {
    let time = seconds(traffic.elapsed);
    let failed = stats.failed + stats.vanished;
    if whole && stats.skipped > 0 && stats.files == 0 && failed == 0 {
        let skipped = count(stats.skipped, "file");
        let omitted: String = omitted(stats).map(|what| format!(", {what}")).collect();
        return format!("nothing to do in {time}: {skipped} unchanged{omitted}");
    }
    // Held bytes and holes are not sent, so they do not count in the rate.
    let sent = stats.bytes.min(traffic.moved);
    let rate = sent as f64 / traffic.elapsed.as_secs_f64().max(0.001);
    let files = count(stats.files, "file");
    let size = bytes(stats.bytes);
    let mut line = format!("{files}, {size} in {time} ({}/s)", bytes(rate as u64));
    if traffic.held > 0 {
        line += &format!(", {} of it held already", bytes(traffic.held));
    }
    for (count, what) in [(stats.skipped, "unchanged"), (stats.failed, "failed")] {
        if count > 0 {
            line += &format!(", {} {what}", HumanCount(count));
        }
    }
    for omitted in omitted(stats) {
        line += &format!(", {omitted}");
    }
    line
}

/// Formats what a dry run would have done.
fn dry_run_summary(stats: &TransferStats) -> String {
    let mut line = format!("{}, {}", count(stats.files, "file"), bytes(stats.bytes));
    for (count, what) in [(stats.skipped, "unchanged"), (stats.failed, "would fail")] {
        if count > 0 {
            line += &format!("; {} {what}", HumanCount(count));
        }
    }
    for omitted in omitted(stats) {
        line += &format!("; {omitted}");
    }
    line
}

/// Formats the counts of entries that were omitted without a failure.
fn omitted(stats: &TransferStats) -> impl Iterator<Item = String> {
    let vanished = (stats.vanished > 0).then(|| format!("{} vanished", HumanCount(stats.vanished)));
    let specials =
        (stats.specials > 0).then(|| format!("{} skipped", count(stats.specials, "special file")));
    vanished.into_iter().chain(specials)
}

/// Says what a mirror has removed, and why it did not remove the rest.
fn mirror_lines(outcome: &Outcome, dry_run: bool) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(removed @ 1..) = outcome.summary.removed {
        let done = if dry_run { "would remove" } else { "removed" };
        lines.push(format!(
            "{done} {removed} at the destination that the source does not have"
        ));
    }
    if let Some(why) = outcome.summary.unremoved.clone().map(Reason::from) {
        let what = if outcome.summary.removed.unwrap_or(0) > 0 {
            "not all was removed"
        } else {
            "nothing was removed"
        };
        lines.push(format!("haul: {what}: {why}"));
    }
    lines
}

/// Joins the metadata warnings of both ends, one for each attribute.
fn metadata_warnings(outcome: &Outcome) -> Vec<MetadataWarning> {
    let mut all = outcome.sent.unkept.clone();
    MetadataWarning::join(
        &mut all,
        outcome.summary.unkept.as_deref().unwrap_or_default(),
    );
    all
}

/// Returns the report as a JSON object.
pub(super) fn json_object(outcome: &Outcome, progress: &Progress, now: Instant) -> Value {
    let sent = &outcome.sent;
    let mut object = json!({
        "type": "done",
        "files": sent.files, "bytes": sent.bytes, "skipped": sent.skipped, "failed": sent.failed,
        "vanished": sent.vanished, "specials": sent.specials,
        "excluded": sent.excluded, "moved": progress.bytes_moved(), "held": progress.bytes_held(),
        "seconds": progress.elapsed(now).as_secs_f64(),
        "durability": format!("{:?}", outcome.summary.durability).to_lowercase(),
    });
    if let Some(removed) = outcome.summary.removed {
        object["removed"] = removed.into();
    }
    if let Some(why) = outcome.summary.unremoved.clone().map(Reason::from) {
        object["unremoved"] = why.to_string().into();
    }
    if let Some(why) = &sent.interrupted {
        object["interrupted"] = why.to_string().into();
    }
    let warnings = metadata_warnings(outcome);
    if !warnings.is_empty() {
        object["unkept"] = warnings
            .iter()
            .map(|warning| json!({"what": warning.name(), "count": warning.count, "first": warning.first.raw()}))
            .collect();
    }
    bottleneck::add_to_json(&mut object, outcome);
    object
}

#[cfg(test)]
mod tests {
    use haul::internal::error::text::is_unprintable;
    use haul::{Code, Event, Kind, RelativePath, Settled};

    use super::super::style::OtherEnd;
    use super::*;

    const NORMAL: Display = Display {
        style: Style::Normal,
        dry_run: false,
        other_end: OtherEnd::Server,
    };

    fn traffic(seconds: u64, moved: u64, held: u64) -> Traffic {
        Traffic {
            moved,
            held,
            elapsed: Duration::from_secs(seconds),
            route: None,
        }
    }

    #[test]
    fn the_summary_counts_each_result() {
        let later = traffic(75, 0, 0);
        let mut stats = TransferStats {
            skipped: 1,
            ..TransferStats::default()
        };
        assert_eq!(
            summary(&stats, &later, true),
            "nothing to do in 1:15: 1 file unchanged"
        );
        assert_eq!(
            summary(&stats, &later, false),
            "0 files, 0 B in 1:15 (0 B/s), 1 unchanged",
            "there was more to do"
        );
        stats.failed = 1;
        assert_eq!(
            summary(&stats, &later, true),
            "0 files, 0 B in 1:15 (0 B/s), 1 unchanged, 1 failed"
        );
        assert_eq!(
            summary(&TransferStats::default(), &traffic(0, 0, 0), true),
            "0 files, 0 B in 0.0 s (0 B/s)"
        );
    }

    #[test]
    fn held_bytes_do_not_count_in_the_rate() {
        let stats = TransferStats {
            files: 1,
            bytes: 2000,
            skipped: 1,
            ..TransferStats::default()
        };
        assert_eq!(
            summary(&stats, &traffic(1, 1000, 1000), true),
            "1 file, 1.95 KiB in 1.0 s (1000 B/s), 1000 B of it held already, 1 unchanged"
        );
    }

    #[test]
    fn omitted_entries_are_counted_and_the_route_comes_last() {
        let stats = TransferStats {
            vanished: 1,
            specials: 2,
            ..TransferStats::default()
        };
        let relayed = Traffic {
            route: Some(Route::Relayed),
            ..traffic(1, 0, 0)
        };
        assert_eq!(
            summary(&stats, &relayed, true),
            "0 files, 0 B in 1.0 s (0 B/s), 1 vanished, 2 special files skipped, relayed"
        );
    }

    #[test]
    fn a_dry_run_says_what_it_would_do() {
        let mut outcome = Outcome::default();
        outcome.sent.files = 1200;
        outcome.sent.bytes = 5;
        outcome.sent.failed = 1;
        outcome.summary.removed = Some(3);
        let dry_run = Display {
            dry_run: true,
            ..NORMAL
        };
        assert_eq!(
            outcome_lines(&outcome, &traffic(1, 0, 0), dry_run),
            [
                "dry run, nothing was written; would copy 1,200 files, 5 B; 1 would fail",
                "would remove 3 at the destination that the source does not have",
            ]
        );
    }

    #[test]
    fn a_lost_session_reports_what_was_settled() {
        let start = Instant::now();
        let mut progress = Progress::new(start);
        let lost = Err(Error::Lost("gone".into()));
        let report = |progress: &Progress, display| lines(&lost, progress, None, display, start);
        assert_eq!(report(&progress, NORMAL), Vec::<String>::new());
        progress.count(&Event::Found {
            files: 2,
            bytes: 10,
            complete: true,
        });
        progress.count(&Event::Settled {
            id: Some(0),
            path: RelativePath::from_components(["a"]).unwrap(),
            kind: Kind::File,
            size: 5,
            result: Settled::Skipped,
        });
        assert_eq!(
            report(&progress, NORMAL),
            ["stopped after 0 files, 0 B in 0.0 s (0 B/s), 1 unchanged"]
        );
        let quiet = Display {
            style: Style::Quiet,
            ..NORMAL
        };
        assert_eq!(report(&progress, quiet), Vec::<String>::new());
    }

    #[test]
    fn an_interruption_is_reported_even_when_quiet() {
        let mut outcome = Outcome::default();
        outcome.sent.interrupted = Some(Reason::new(Code::Stopping, "the server stops"));
        let quiet = Display {
            style: Style::Quiet,
            ..NORMAL
        };
        let now = Instant::now();
        assert_eq!(
            lines(&Ok(outcome), &Progress::new(now), None, quiet, now),
            ["haul: the server stops; run the same command again later to send the rest"]
        );
    }

    #[test]
    fn reasons_for_not_removing_are_escaped() {
        let mut outcome = Outcome::default();
        let why = Reason::new(Code::Io, "x\x1b]52;c;ZXZpbA==\x07\nhaul: done\u{202e}");
        outcome.summary.unremoved = Some(why.into());
        for line in mirror_lines(&outcome, false) {
            assert!(!line.contains(is_unprintable), "{line:?}");
        }
    }
}
