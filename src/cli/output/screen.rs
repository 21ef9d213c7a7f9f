//! Shows a session while it runs, and its report at the end.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use haul::internal::error::lock::lock;
use haul::{Error, Event, Observer, Outcome, Route};

use super::bars::{self, Bars, Rows};
use super::events::line_of;
use super::print::{json_line, note};
use super::progress::Progress;
use super::style::{Display, Style};
use super::{json, report};

/// The shortest time between two JSON progress objects.
const JSON_PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// The time between two plain progress lines.
const PLAIN_PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// The display of one session.
pub(crate) struct Screen {
    shared: Arc<Shared>,
}

struct Shared {
    display: Display,
    /// Absent without a terminal. The bars are taken out at the end, so that late events cannot draw below the report.
    bars: Option<Mutex<Option<Bars>>>,
    state: Mutex<State>,
}

struct State {
    progress: Progress,
    last_progress: Instant,
    /// The route to the peer, if the session reported one.
    route: Option<Route>,
    /// The report was printed. Later events of tasks that end slowly are not shown.
    ended: bool,
}

impl Screen {
    /// Makes the screen of a session that starts now, with bars if standard error is a terminal.
    pub(crate) fn new(display: Display) -> Self {
        let bars = match display.style {
            Style::Normal | Style::Verbose => Bars::on_terminal(),
            Style::Quiet | Style::Json => None,
        };
        let redraws = bars.is_some();
        let shared = Arc::new(Shared::new(display, bars));
        if redraws {
            let weak = Arc::downgrade(&shared);
            // Redraws by time, because rates and times change also without events.
            std::thread::spawn(move || {
                while let Some(shared) = weak.upgrade() {
                    shared.redraw();
                    drop(shared);
                    std::thread::sleep(bars::REDRAW_INTERVAL);
                }
            });
        }
        Self { shared }
    }

    /// Returns the observer that shows the session's events.
    pub(crate) fn observer(&self) -> Observer {
        let shared = self.shared.clone();
        Arc::new(move |event| shared.show(&event))
    }

    /// Sets the route for the report, and prints it as JSON.
    pub(crate) fn set_route(&self, address: SocketAddr, route: Route) {
        self.shared.state().route = Some(route);
        if self.shared.display.style == Style::Json
            && let Some(object) = json::event(&Event::Routed { address, route })
        {
            json_line(&object);
        }
    }

    /// Ends the display with the report, or with the error that ended the session.
    pub(crate) fn end(self, result: &Result<Outcome, Error>) {
        let Shared { display, bars, .. } = &*self.shared;
        if let Some(bars) = bars
            && let Some(bars) = lock(bars).take()
        {
            bars.clear();
        }
        let mut state = self.shared.state();
        state.ended = true;
        let now = Instant::now();
        let progress = &state.progress;
        match (display.style, result) {
            (Style::Json, Ok(outcome)) => json_line(&report::json_object(outcome, progress, now)),
            (Style::Json, Err(error)) => json_line(&json::error(error)),
            _ => report::lines(result, progress, state.route, *display, now)
                .iter()
                .for_each(|text| note(text)),
        }
    }
}

impl Shared {
    fn new(display: Display, bars: Option<Bars>) -> Self {
        let now = Instant::now();
        Self {
            display,
            bars: bars.map(|bars| Mutex::new(Some(bars))),
            state: Mutex::new(State {
                progress: Progress::new(now),
                last_progress: now,
                route: None,
                ended: false,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Counts and prints an event.
    fn show(&self, event: &Event) {
        let mut state = self.state();
        if state.ended {
            return;
        }
        state.progress.count(event);
        if let Event::Routed { route, .. } = event {
            state.route = Some(*route);
        }
        match (self.display.style, &self.bars) {
            (Style::Json, _) => print_json(&mut state, event),
            (Style::Quiet, _) => self.print_line(event),
            (Style::Normal | Style::Verbose, None) => {
                self.print_line(event);
                print_progress(&mut state);
            }
            (Style::Normal | Style::Verbose, Some(bars)) => {
                // The lock is released before printing. A stopped terminal (Ctrl-S) then blocks this print only, not the
                // tasks that only count.
                drop(state);
                if let Some(text) = line_of(event, self.display)
                    && let Some(bars) = lock(bars).as_ref()
                {
                    bars.print(&text);
                }
            }
        }
    }

    fn print_line(&self, event: &Event) {
        if let Some(text) = line_of(event, self.display) {
            note(&text);
        }
    }

    fn redraw(&self) {
        if let Some(bars) = &self.bars
            && let Some(bars) = lock(bars).as_ref()
        {
            let now = Instant::now();
            let rows = {
                let mut state = self.state();
                state.progress.sample_rate(now);
                Rows::of(&state.progress, now, bars::width())
            };
            bars.draw(rows);
        }
    }
}

/// Prints the object of an event. Events without one make progress, which is printed from time to time.
fn print_json(state: &mut State, event: &Event) {
    if let Some(object) = json::event(event) {
        json_line(&object);
    } else if state.progress_is_due(JSON_PROGRESS_INTERVAL) {
        json_line(&json::progress(&state.progress, state.last_progress));
    }
}

/// Prints a line of progress from time to time.
fn print_progress(state: &mut State) {
    if state.progress_is_due(PLAIN_PROGRESS_INTERVAL) {
        let now = state.last_progress;
        state.progress.sample_rate(now);
        note(&state.progress.line(now));
    }
}

impl State {
    /// Whether the interval since the last printed progress is over. If so, the next interval begins now.
    fn progress_is_due(&mut self, interval: Duration) -> bool {
        let now = Instant::now();
        let due = now - self.last_progress >= interval;
        if due {
            self.last_progress = now;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use haul::{Kind, RelativePath, Settled};

    use super::super::style::OtherEnd;
    use super::*;

    fn on_terminal(style: Style) -> Shared {
        let display = Display {
            style,
            dry_run: false,
            other_end: OtherEnd::Server,
        };
        Shared::new(display, Some(Bars::hidden()))
    }

    fn committed(name: &str) -> Event {
        Event::Settled {
            id: Some(1),
            path: RelativePath::from_components([name]).unwrap(),
            kind: Kind::File,
            size: 7,
            result: Settled::Committed,
        }
    }

    #[test]
    fn nothing_is_drawn_or_counted_after_the_report() {
        let shared = Arc::new(on_terminal(Style::Verbose));
        let screen = Screen {
            shared: shared.clone(),
        };
        let straggler = screen.observer();
        straggler(committed("a"));
        screen.end(&Ok(Outcome::default()));
        straggler(committed("b"));
        shared.redraw();
        assert!(lock(shared.bars.as_ref().unwrap()).is_none());
        assert_eq!(shared.state().progress.files_settled(), 1);
    }

    #[test]
    fn counting_does_not_wait_for_the_terminal() {
        let shared = on_terminal(Style::Normal);
        let held = lock(shared.bars.as_ref().unwrap());
        shared.show(&Event::Moved { id: 1, bytes: 1 });
        shared.show(&committed("a"));
        drop(held);
        assert_eq!(shared.state().progress.files_settled(), 1);
    }
}
