//! All printing of the binary.

pub(super) mod listing;
pub(super) mod measured;
pub(super) mod offer;
mod tally;
mod terminal;
mod verdict;

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::prelude::{BASE64_STANDARD, Engine};
use haul::{
    Code, Error, Event, Kind, MetadataWarning, Observer, Outcome, Reason, RelativePath, Route,
    Settled, display_duration, is_unprintable, printable,
};
use serde_json::{Value, json};

use tally::Tally;
pub(super) use tally::bytes;
use terminal::Bars;
pub(super) use terminal::Status;

/// How often JSON tells of progress at most.
const JSON_PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// How often plain lines tell of progress.
const PLAIN_PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// Prints a line on standard output. A reader that has gone away is no reason to panic.
pub(super) fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Standard output as it is: what comes is passed on at once, and is no text.
pub(super) fn raw() -> Result<std::fs::File, Error> {
    let output = std::io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map_err(Error::io("standard output"))?;
    Ok(output.into())
}

/// A JSON object on a line of its own. It may hold text exactly as a peer wrote it, such as names and the text of an
/// offer. A character that could steer a terminal is written as `\u....`, which means the same to a reader of JSON.
pub(super) fn json_text(object: &Value) -> String {
    let mut text = String::new();
    let mut units = [0; 2];
    // Outside of its strings, compact JSON has no such characters.
    for c in object.to_string().chars() {
        if is_unprintable(c) {
            for unit in c.encode_utf16(&mut units) {
                text.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            text.push(c);
        }
    }
    text
}

/// Prints a JSON object as a line on standard output.
pub(super) fn json_line(object: &Value) {
    line(&json_text(object));
}

/// Prints a line on standard error.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Says what ended the program.
pub(super) fn failure(error: &anyhow::Error) {
    // The outermost context says all of it; what is below is there for the exit code.
    note(&format!("haul: {error}"));
}

/// Tells a reader of JSON that no session came about; people read the same from [`failure`].
pub(super) fn report_start_failure(json: bool, error: &anyhow::Error) {
    if json {
        json_line(&error_object(error));
    }
}

/// Whether there is a terminal to ask on.
pub(super) fn can_ask() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Asks on the terminal; `None` when there is none, or where it is closed (Ctrl-D).
pub(super) fn ask(question: &str) -> Option<String> {
    let input = std::io::stdin();
    let mut output = std::io::stderr();
    if !can_ask() {
        return None;
    }
    write!(output, "{question} ")
        .and_then(|()| output.flush())
        .ok()?;
    let mut answer = String::new();
    let read = input.read_line(&mut answer).ok()?;
    (read > 0).then(|| answer.trim().to_owned())
}

/// A line of what comes in; `None` when nothing comes.
pub(super) fn line_in() -> Option<String> {
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .ok()
        .filter(|read| *read > 0)
        .map(|_| line)
}

/// What the other end is called where it comes to this one.
pub(super) const RECEIVER: &str = "the receiver";

/// What a session shows while it runs and when it ends.
pub(super) struct Screen {
    shared: Arc<ScreenShared>,
}

struct ScreenShared {
    style: Style,
    /// What is told is what would be done.
    dry_run: bool,
    /// What the other end is called.
    peer: &'static str,
    state: Mutex<ScreenState>,
}

enum Style {
    Quiet,
    Plain {
        verbose: bool,
    },
    /// The bars are taken out at the end, so that nothing can draw below the summary.
    Bars {
        bars: Mutex<Option<Bars>>,
        verbose: bool,
    },
    Json,
}

struct ScreenState {
    tally: Tally,
    told: Instant,
    /// The way to the peer, where there are several.
    route: Option<Route>,
    /// The summary is out: what tasks that are slow to end still report is no longer shown.
    ended: bool,
}

impl Screen {
    /// A screen as the flags and the terminal want it.
    pub(super) fn new(output: super::Output) -> Self {
        let verbose = output.verbose;
        let style = if output.json {
            Style::Json
        } else if output.quiet {
            Style::Quiet
        } else if let Some(bars) = Bars::on_terminal() {
            Style::Bars {
                bars: Mutex::new(Some(bars)),
                verbose,
            }
        } else {
            Style::Plain { verbose }
        };
        let shared = Arc::new(ScreenShared {
            dry_run: output.dry_run,
            peer: output.peer,
            ..ScreenShared::new(style)
        });
        if matches!(shared.style, Style::Bars { .. }) {
            let weak = Arc::downgrade(&shared);
            // Rates fall and times run also while no event comes.
            std::thread::spawn(move || {
                while let Some(shared) = weak.upgrade() {
                    shared.redraw();
                    drop(shared);
                    std::thread::sleep(terminal::REDRAW_INTERVAL);
                }
            });
        }
        Self { shared }
    }

    /// Takes the session's events.
    pub(super) fn observer(&self) -> Observer {
        let shared = self.shared.clone();
        Arc::new(move |event| shared.take(&event))
    }

    /// Says which way it was, for whoever hears of that at the end.
    pub(super) fn routed(&self, address: SocketAddr, route: Route) {
        self.shared.state().route = Some(route);
        if let (Style::Json, Some(object)) = (
            &self.shared.style,
            event_object(&Event::Routed { address, route }),
        ) {
            json_line(&object);
        }
    }

    /// Ends the display with the summary line, or with what ended the session.
    pub(super) fn end(self, result: &Result<Outcome, Error>) {
        let shared = &self.shared;
        if let Style::Bars { bars, .. } = &shared.style
            && let Some(bars) = lock(bars).take()
        {
            bars.clear();
        }
        let mut state = shared.state();
        state.ended = true;
        let whole = matches!(result, Ok(outcome) if outcome.sent.interrupted.is_none());
        let summary = state.tally.summary(Instant::now(), whole);
        let summary = state.route.map_or(summary.clone(), |route| {
            format!("{summary}, {}", route.word())
        });
        match (&shared.style, result) {
            (Style::Json, Ok(outcome)) => json_line(&done_object(&state.tally, outcome)),
            (Style::Json, Err(error)) => json_line(&error_object(error)),
            (Style::Quiet, _) => {}
            (style, Ok(outcome)) => {
                match shared.dry_run {
                    true => note(&format!(
                        "dry run, nothing was written; would copy {}",
                        state.tally.would()
                    )),
                    false => note(&verdict::summary(&summary, outcome, shared.peer)),
                }
                mirrored(outcome, shared.dry_run)
                    .iter()
                    .for_each(|text| note(text));
                if let Style::Plain { verbose: true } | Style::Bars { verbose: true, .. } = style {
                    if outcome.sent.excluded > 0 {
                        note(&format!("{} excluded", outcome.sent.excluded));
                    }
                    verdict::details(outcome, shared.peer)
                        .iter()
                        .for_each(|text| note(text));
                }
            }
            // Nothing was begun: what is said of it says all.
            (_, Err(_)) if state.tally.found_files == 0 => {}
            (_, Err(_)) => note(&format!("stopped after {summary}")),
        }
        if let (Ok(outcome), false) = (result, matches!(shared.style, Style::Json | Style::Quiet)) {
            unkept(outcome)
                .iter()
                .for_each(|unkept| note(&format!("haul: {unkept}")));
        }
        if let Ok(Outcome { sent, .. }) = result
            && let Some(why) = &sent.interrupted
            && !matches!(shared.style, Style::Json)
        {
            note(&format!(
                "haul: {why}; run the same command again later to send the rest"
            ));
        }
    }
}

impl ScreenShared {
    fn new(style: Style) -> Self {
        let now = Instant::now();
        Self {
            style,
            dry_run: false,
            peer: "the server",
            state: Mutex::new(ScreenState {
                tally: Tally::new(now),
                told: now,
                route: None,
                ended: false,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, ScreenState> {
        lock(&self.state)
    }

    fn take(&self, event: &Event) {
        let mut state = self.state();
        if state.ended {
            return;
        }
        state.tally.take(event);
        if let Event::Routed { route, .. } = event {
            state.route = Some(*route);
        }
        let now = Instant::now();
        match &self.style {
            Style::Json => {
                if let Some(object) = event_object(event) {
                    json_line(&object);
                } else if now - state.told >= JSON_PROGRESS_INTERVAL {
                    state.told = now;
                    json_line(&progress_object(&state.tally, now));
                }
            }
            Style::Quiet => failed_lines(event).iter().for_each(|text| note(text)),
            Style::Plain { verbose } => {
                self.lines(event, *verbose)
                    .iter()
                    .for_each(|text| note(text));
                if now - state.told >= PLAIN_PROGRESS_INTERVAL {
                    state.told = now;
                    state.tally.tick(now);
                    note(&state.tally.total(now));
                }
            }
            Style::Bars { bars, verbose } => {
                // A terminal that is held (Ctrl-S) holds up whoever prints, and nobody who only counts.
                drop(state);
                let texts = self.lines(event, *verbose);
                if !texts.is_empty()
                    && let Some(bars) = lock(bars).as_ref()
                {
                    texts.iter().for_each(|text| bars.print(text));
                }
            }
        }
    }

    /// Lines that an event is worth, whatever else is shown.
    fn lines(&self, event: &Event, verbose: bool) -> Vec<String> {
        match event {
            Event::Settled {
                path,
                kind,
                result: Settled::Committed,
                ..
            } if self.dry_run => {
                if *kind == Kind::Directory {
                    Vec::new()
                } else {
                    vec![format!("would copy {path}")]
                }
            }
            Event::Removed { path } if self.dry_run => vec![format!("would remove {path}")],
            Event::Lost { why, retry_for } if self.peer == RECEIVER => {
                vec![format!(
                    "haul: the receiver is gone ({why}); waiting for it, for {} at most",
                    display_duration(*retry_for)
                )]
            }
            Event::Reconnected { .. } if self.peer == RECEIVER => {
                vec!["haul: the receiver is back, going on".into()]
            }
            event => lines(event, verbose),
        }
    }

    fn redraw(&self) {
        if let Style::Bars { bars, .. } = &self.style
            && let Some(bars) = lock(bars).as_ref()
        {
            let now = Instant::now();
            let rows = {
                let mut state = self.state();
                state.tally.tick(now);
                bars.rows(&state.tally, now)
            };
            bars.draw(rows);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Those of what is really done.
fn lines(event: &Event, verbose: bool) -> Vec<String> {
    match event {
        Event::Connected { address, key_id } if verbose => {
            vec![format!("connected to {address}, {key_id}")]
        }
        Event::Lost { why, retry_for } => {
            vec![format!(
                "haul: connection lost ({why}); trying again, for {} at most",
                display_duration(*retry_for)
            )]
        }
        Event::Reconnecting { attempt, wait } if verbose => {
            vec![format!(
                "trying again in {:.1} s (attempt {attempt})",
                wait.as_secs_f64()
            )]
        }
        Event::Routed {
            address,
            route: Route::Direct,
        } if verbose => vec![format!("direct, at {address}")],
        Event::Routed {
            address,
            route: Route::Punched,
        } if verbose => {
            vec![format!("direct through the NATs, to {address}")]
        }
        Event::Routed {
            route: Route::Relayed,
            ..
        } => {
            vec!["by the relay, until a direct way opens".into()]
        }
        Event::Reconnected { .. } => vec!["haul: connected again, going on".into()],
        Event::GoingAway { why } => vec![format!("{why}; waiting for what is under way")],
        Event::Settled {
            path,
            result: Settled::Committed,
            ..
        } if verbose => vec![path.to_string()],
        Event::Removed { path } if verbose => vec![format!("removed {path}")],
        Event::Settled {
            path,
            result: Settled::Skipped,
            kind,
            ..
        } if verbose && *kind != Kind::Directory => {
            vec![format!("{path} (unchanged)")]
        }
        Event::Settled {
            path,
            result: Settled::Omitted(why),
            ..
        } => vec![format!("haul: {}", failed(path, why))],
        _ => failed_lines(event),
    }
}

fn failed_lines(event: &Event) -> Vec<String> {
    match event {
        Event::Settled {
            path,
            result: Settled::Failed(why),
            ..
        } => vec![format!("haul: {}", failed(path, why))],
        // That it will be missing is told by the exit code too.
        Event::Settled {
            path,
            result: Settled::Omitted(why),
            ..
        } if why.code == Code::Vanished => vec![format!("haul: {}", failed(path, why))],
        _ => Vec::new(),
    }
}

/// A failure names its file once, also where the reason begins with the name.
fn failed(path: &RelativePath, why: &Reason) -> String {
    let path = path.to_string();
    let why = why.to_string();
    if why.contains(&path) {
        why
    } else {
        format!("{path}: {why}")
    }
}

fn event_object(event: &Event) -> Option<Value> {
    match event {
        Event::Connected { address, key_id } => {
            Some(json!({"type": "start", "address": address.to_string(), "key_id": key_id}))
        }
        Event::Routed { address, route } => {
            Some(json!({"type": "route", "route": route.word(), "address": address.to_string()}))
        }
        Event::Settled {
            path,
            kind,
            size,
            result,
            ..
        } => {
            let kind = match kind {
                Kind::File => "file",
                Kind::Directory => "directory",
                Kind::Symlink => "symlink",
            };
            let name = String::from_utf8_lossy(path.as_bytes());
            let mut object = json!({"type": "file", "path": name, "kind": kind, "bytes": size});
            if std::str::from_utf8(path.as_bytes()).is_err() {
                object["path_bytes"] = BASE64_STANDARD.encode(path.as_bytes()).into();
            }
            match result {
                Settled::Committed => object["result"] = "committed".into(),
                Settled::Skipped => object["result"] = "skipped".into(),
                Settled::Failed(why) | Settled::Omitted(why) => {
                    let omitted = matches!(result, Settled::Omitted(_));
                    object["result"] = if omitted { "omitted" } else { "failed" }.into();
                    object["code"] = why.code.name().into();
                    object["why"] = why.to_string().into();
                }
            }
            Some(object)
        }
        Event::Removed { path } => {
            Some(json!({"type": "removed", "path": String::from_utf8_lossy(path.as_bytes())}))
        }
        Event::Lost { why, retry_for } => Some(
            json!({"type": "lost", "why": why.to_string(), "retry_for": retry_for.as_secs_f64()}),
        ),
        Event::Reconnecting { attempt, wait } => {
            Some(json!({"type": "reconnecting", "attempt": attempt, "wait": wait.as_secs_f64()}))
        }
        Event::Reconnected { address } => {
            Some(json!({"type": "reconnected", "address": address.to_string()}))
        }
        Event::GoingAway { why } => Some(json!({"type": "going_away", "why": why.to_string()})),
        _ => None,
    }
}

/// What a mirror has removed, and why not more.
fn mirrored(outcome: &Outcome, dry_run: bool) -> Vec<String> {
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

/// What neither end could keep, each kind of thing once.
fn unkept(outcome: &Outcome) -> Vec<MetadataWarning> {
    let mut all = outcome.sent.unkept.clone();
    MetadataWarning::join(
        &mut all,
        outcome.summary.unkept.as_deref().unwrap_or_default(),
    );
    all
}

fn progress_object(tally: &Tally, now: Instant) -> Value {
    json!({
        "type": "progress",
        "files": tally.files_settled(), "files_found": tally.found_files,
        "bytes": tally.bytes_moved(), "bytes_found": tally.found_bytes,
        "search_complete": tally.complete, "seconds": tally.elapsed(now).as_secs_f64(),
    })
}

fn done_object(tally: &Tally, outcome: &Outcome) -> Value {
    let sent = &outcome.sent;
    let mut object = json!({
        "type": "done",
        "files": sent.files, "bytes": sent.bytes, "skipped": sent.skipped, "failed": sent.failed,
        "vanished": sent.vanished, "specials": sent.specials,
        "excluded": sent.excluded, "moved": tally.travelled, "held": tally.held,
        "seconds": tally.elapsed(Instant::now()).as_secs_f64(),
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
    let unkept = unkept(outcome);
    if !unkept.is_empty() {
        object["unkept"] = unkept
            .iter()
            .map(|u| json!({"what": u.name(), "count": u.count, "first": u.first.raw()}))
            .collect();
    }
    verdict::add_to(&mut object, outcome);
    object
}

fn error_object(error: &dyn std::fmt::Display) -> Value {
    json!({"type": "error", "why": error.to_string()})
}

/// A path of this machine as it may be printed.
pub(super) fn shown(path: &std::path::Path) -> String {
    printable(path.as_os_str().as_encoded_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(component: &[u8], result: Settled) -> Event {
        let path = RelativePath::from_components([component]).unwrap();
        Event::Settled {
            id: Some(1),
            path,
            kind: Kind::File,
            size: 7,
            result,
        }
    }

    #[test]
    fn nothing_is_drawn_or_counted_once_the_summary_is_out() {
        let style = Style::Bars {
            bars: Mutex::new(Some(Bars::hidden())),
            verbose: true,
        };
        let screen = Screen {
            shared: Arc::new(ScreenShared::new(style)),
        };
        let shared = screen.shared.clone();
        let straggler = screen.observer();
        straggler(settled(b"a", Settled::Committed));
        screen.end(&Ok(Outcome::default()));
        straggler(settled(b"b", Settled::Committed));
        shared.redraw();
        assert!(matches!(&shared.style, Style::Bars { bars, .. } if lock(bars).is_none()));
        assert_eq!(shared.state().tally.files_settled(), 1);
    }

    #[test]
    fn whoever_only_counts_does_not_wait_for_the_terminal() {
        let style = Style::Bars {
            bars: Mutex::new(Some(Bars::hidden())),
            verbose: false,
        };
        let shared = ScreenShared::new(style);
        let Style::Bars { bars, .. } = &shared.style else {
            unreachable!()
        };
        let held = lock(bars);
        shared.take(&Event::Moved { id: 1, bytes: 1 });
        shared.take(&settled(b"a", Settled::Committed));
        drop(held);
        assert_eq!(shared.state().tally.files_settled(), 1);
    }

    #[test]
    fn a_lost_connection_is_told_in_one_line_and_not_to_who_wants_only_failures() {
        let lost = Event::Lost {
            why: "the peer has restarted".into(),
            retry_for: Duration::from_secs(600),
        };
        assert_eq!(
            lines(&lost, false),
            ["haul: connection lost (the peer has restarted); trying again, for 10 min at most"]
        );
        assert!(failed_lines(&lost).is_empty());
        let waiting = Event::Reconnecting {
            attempt: 2,
            wait: Duration::from_millis(730),
        };
        assert!(lines(&waiting, false).is_empty());
        assert_eq!(lines(&waiting, true), ["trying again in 0.7 s (attempt 2)"]);
        assert_eq!(event_object(&lost).unwrap()["retry_for"], 600.0);
    }

    #[test]
    fn json_keeps_the_bytes_of_a_name_that_is_no_text() {
        let object =
            event_object(&settled(b"\xff\n", Settled::Failed(Code::NoSpace.into()))).unwrap();
        assert_eq!(object["path"], "\u{fffd}\n");
        assert_eq!(object["path_bytes"], "/wo=");
        assert_eq!(
            (&object["result"], &object["code"]),
            (&"failed".into(), &"NoSpace".into())
        );
        let plain = event_object(&settled("ä".as_bytes(), Settled::Skipped)).unwrap();
        assert_eq!(
            (&plain["path"], plain.get("path_bytes")),
            (&"ä".into(), None)
        );
    }

    #[test]
    fn json_says_what_a_peer_wrote_and_steers_no_terminal() {
        let evil = "\x1b]52;c;ZXZpbA==\x07\u{9b}2J\u{202e}\u{e0001}\n\\";
        let text = json_text(&json!({ "why": evil }));
        assert!(!text.contains(is_unprintable), "{text:?}");
        let back: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(back["why"], evil);
    }

    #[test]
    fn what_a_mirror_did_not_remove_is_said_without_steering() {
        let mut outcome = Outcome::default();
        let why = Reason::new(Code::Io, "x\x1b]52;c;ZXZpbA==\x07\nhaul: done\u{202e}");
        outcome.summary.unremoved = Some(why.into());
        for line in mirrored(&outcome, false) {
            assert!(!line.contains(is_unprintable), "{line:?}");
        }
    }

    #[test]
    fn a_failure_is_named_once_and_cannot_steer_the_terminal() {
        let failure = |why: &str| {
            failed_lines(&settled(
                b"a\x1b",
                Settled::Failed(Reason::new(Code::Io, why)),
            ))
        };
        assert_eq!(failure("broken"), ["haul: a\\u{1b}: broken"]);
        assert_eq!(failure("a\x1b: broken"), ["haul: a\\u{1b}: broken"]);
    }
}
