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

use data_encoding::BASE64;
use haul::internal::config::display_duration;
use haul::internal::error::text::is_unprintable;
use haul::{
    Code, Error, Event, Kind, MetadataWarning, Observer, Outcome, Reason, RelativePath, Route,
    Settled, printable,
};
use serde_json::{Value, json};

use tally::Tally;
pub(super) use tally::bytes;
use terminal::Bars;
pub(super) use terminal::Status;

/// The shortest time between two JSON progress objects.
const JSON_PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// The time between two plain progress lines.
const PLAIN_PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// Prints a line on standard output. Errors are ignored, because the reader of a pipe may have closed it.
pub(super) fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Returns standard output for binary data, without a buffer.
///
/// # Errors
/// [`Error::Io`] when the descriptor cannot be duplicated.
pub(super) fn raw() -> Result<std::fs::File, Error> {
    let output = std::io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map_err(Error::io("cannot open standard output"))?;
    Ok(output.into())
}

/// Formats a JSON object on one line. The object may hold text exactly as a peer wrote it, such as names and the text of
/// an offer. Characters that could control a terminal are written as `\u....`, which JSON parsers read as the same.
pub(super) fn json_text(object: &Value) -> String {
    let mut text = String::new();
    let mut units = [0; 2];
    // Compact JSON has such characters only in strings.
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

/// Prints the error that ended the program.
pub(super) fn failure(error: &anyhow::Error) {
    // The outermost context is the whole message. The inner error only chooses the exit code.
    note(&format!("haul: {error}"));
}

/// Prints a JSON error if no session began. [`failure`] prints the same error as text.
pub(super) fn report_start_failure(json: bool, error: &anyhow::Error) {
    if json {
        json_line(&error_object(error));
    }
}

/// Whether standard input and standard error are terminals, so that a question can be asked.
pub(super) fn can_ask() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Asks on the terminal. Returns `None` without a terminal, or at the end of input (Ctrl-D).
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

/// Reads a line of standard input; `None` at its end.
pub(super) fn line_in() -> Option<String> {
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .ok()
        .filter(|read| *read > 0)
        .map(|_| line)
}

/// The name of the other end when it connects to this one.
pub(super) const RECEIVER: &str = "the receiver";

/// The display of a session, while it runs and at its end.
pub(super) struct Screen {
    shared: Arc<ScreenShared>,
}

struct ScreenShared {
    style: Style,
    /// The events report what would be done.
    dry_run: bool,
    /// The name of the other end in messages.
    peer: &'static str,
    state: Mutex<ScreenState>,
}

enum Style {
    Quiet,
    Plain {
        verbose: bool,
    },
    /// The bars are taken out at the end, so that late events cannot draw below the summary.
    Bars {
        bars: Mutex<Option<Bars>>,
        verbose: bool,
    },
    Json,
}

struct ScreenState {
    tally: Tally,
    last_progress: Instant,
    /// The route to the peer, if the session reported one.
    route: Option<Route>,
    /// The summary was printed. Later events of tasks that end slowly are not shown.
    ended: bool,
}

impl Screen {
    /// Makes a screen for the given flags and the terminal.
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
            // Redraws by time, because rates and times change also without events.
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

    /// Returns the observer that shows the session's events.
    pub(super) fn observer(&self) -> Observer {
        let shared = self.shared.clone();
        Arc::new(move |event| shared.take(&event))
    }

    /// Sets the route for the summary, and prints it as JSON.
    pub(super) fn routed(&self, address: SocketAddr, route: Route) {
        self.shared.state().route = Some(route);
        if let (Style::Json, Some(object)) = (
            &self.shared.style,
            event_object(&Event::Routed { address, route }),
        ) {
            json_line(&object);
        }
    }

    /// Ends the display with the summary line, or with the error that ended the session.
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
                mirror_lines(outcome, shared.dry_run)
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
            // No file was found, so the error message alone is enough.
            (_, Err(_)) if state.tally.found_files == 0 => {}
            (_, Err(_)) => note(&format!("stopped after {summary}")),
        }
        if let (Ok(outcome), false) = (result, matches!(shared.style, Style::Json | Style::Quiet)) {
            metadata_warnings(outcome)
                .iter()
                .for_each(|warning| note(&format!("haul: {warning}")));
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
                last_progress: now,
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
                } else if now - state.last_progress >= JSON_PROGRESS_INTERVAL {
                    state.last_progress = now;
                    json_line(&progress_object(&state.tally, now));
                }
            }
            Style::Quiet => failed_lines(event).iter().for_each(|text| note(text)),
            Style::Plain { verbose } => {
                self.lines(event, *verbose)
                    .iter()
                    .for_each(|text| note(text));
                if now - state.last_progress >= PLAIN_PROGRESS_INTERVAL {
                    state.last_progress = now;
                    state.tally.tick(now);
                    note(&state.tally.total(now));
                }
            }
            Style::Bars { bars, verbose } => {
                // The lock is released before printing. A stopped terminal (Ctrl-S) then blocks this print only, not the
                // tasks that only count.
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

    /// Returns the lines to print for an event, in the words of this session.
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
                    "haul: lost the receiver ({why}); waiting for it, for {} at most",
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

/// Returns the lines to print for an event of a session that is no dry run.
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
            vec!["by the relay, until a direct path opens".into()]
        }
        Event::Reconnected { .. } => vec!["haul: connected again, going on".into()],
        Event::GoingAway { why } => vec![format!("{why}; waiting for running transfers")],
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
        // Vanished sources are printed because the exit code reports them too.
        Event::Settled {
            path,
            result: Settled::Omitted(why),
            ..
        } if why.code == Code::Vanished => vec![format!("haul: {}", failed(path, why))],
        _ => Vec::new(),
    }
}

/// Formats a failure. The path is named once, also if the reason contains it.
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
                object["path_bytes"] = BASE64.encode(path.as_bytes()).into();
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
    let warnings = metadata_warnings(outcome);
    if !warnings.is_empty() {
        object["unkept"] = warnings
            .iter()
            .map(|warning| json!({"what": warning.name(), "count": warning.count, "first": warning.first.raw()}))
            .collect();
    }
    verdict::add_to(&mut object, outcome);
    object
}

fn error_object(error: &dyn std::fmt::Display) -> Value {
    json!({"type": "error", "why": error.to_string()})
}

/// Escapes a local path for printing.
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
    fn nothing_is_drawn_or_counted_after_the_summary() {
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
    fn counting_does_not_wait_for_the_terminal() {
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
    fn a_lost_connection_takes_one_line_and_none_when_quiet() {
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
    fn json_keeps_the_bytes_of_names_that_are_not_utf8() {
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
    fn json_keeps_peer_text_and_escapes_control_characters() {
        let evil = "\x1b]52;c;ZXZpbA==\x07\u{9b}2J\u{202e}\u{e0001}\n\\";
        let text = json_text(&json!({ "why": evil }));
        assert!(!text.contains(is_unprintable), "{text:?}");
        let back: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(back["why"], evil);
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

    #[test]
    fn a_failure_names_its_path_once_and_is_escaped() {
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
