//! The moving lines at the bottom of a terminal.

use std::time::{Duration, Instant};

use console::{Term, measure_text_width};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::progress::{Progress, Running};
use super::text::bytes;

/// The time between two redraws. Ten a second look smooth and do not flicker.
pub(super) const REDRAW_INTERVAL: Duration = Duration::from_millis(100);
/// The smallest size of a file that gets a line of its own, in bytes. Smaller files are sent in an instant.
const LARGE_FILE: u64 = 8 << 20;
/// The most lines for single files.
const FILE_LINES: usize = 6;
/// The width that is assumed if the terminal reports none, in columns.
const DEFAULT_COLUMNS: usize = 80;

/// One line for each of a few large files, and one line of totals.
pub(super) struct Bars {
    multi: MultiProgress,
    files: Vec<ProgressBar>,
    total: ProgressBar,
}

/// The texts of all lines.
pub(super) struct Rows {
    files: Vec<String>,
    total: String,
}

impl Rows {
    /// Formats the lines, at most `width` columns wide. Drawing is a separate step, because it can take long on a slow
    /// terminal.
    pub(super) fn of(progress: &Progress, now: Instant, width: usize) -> Self {
        let large = progress.running_of_size(LARGE_FILE).take(FILE_LINES);
        Self {
            files: large.map(|running| file_line(running, width)).collect(),
            total: cut(&progress.line(now), width),
        }
    }
}

/// Returns the width of the terminal for [`Rows::of`], in columns.
pub(super) fn width() -> usize {
    // The last column stays free: some terminals wrap there.
    Term::stderr()
        .size_checked()
        .map_or(DEFAULT_COLUMNS, |(_, columns)| columns as usize)
        .saturating_sub(1)
}

impl Bars {
    /// Makes bars on standard error. Returns `None` if it is not a terminal, or cannot move its cursor (TERM=dumb). There
    /// indicatif would show nothing, not even the lines printed above the bars.
    pub(super) fn on_terminal() -> Option<Self> {
        let target = ProgressDrawTarget::stderr();
        (!target.is_hidden()).then(|| Self::new(target))
    }

    fn new(target: ProgressDrawTarget) -> Self {
        let multi = MultiProgress::with_draw_target(target);
        let style = ProgressStyle::with_template("{msg}").expect("a fixed template");
        let bar = || multi.add(ProgressBar::new_spinner().with_style(style.clone()));
        let files = (0..FILE_LINES).map(|_| bar()).collect();
        let total = bar();
        Self {
            multi,
            files,
            total,
        }
    }

    /// Prints a line above the others.
    pub(super) fn print(&self, text: &str) {
        // Fails only after the terminal was closed.
        let _ = self.multi.println(text);
    }

    /// Replaces the lines.
    pub(super) fn draw(&self, rows: Rows) {
        let mut lines = rows.files.into_iter();
        for bar in &self.files {
            match lines.next() {
                Some(line) => bar.set_message(line),
                // An empty line takes no room.
                None if bar.message().is_empty() => {}
                None => bar.set_message(""),
            }
        }
        self.total.set_message(rows.total);
    }

    /// Removes the lines from the terminal. Nothing is drawn after that.
    pub(super) fn clear(self) {
        // Fails only after the terminal was closed.
        let _ = self.multi.clear();
        // indicatif draws once more as each bar is dropped.
        self.multi.set_draw_target(ProgressDrawTarget::hidden());
    }

    #[cfg(test)]
    pub(super) fn hidden() -> Self {
        Self::new(ProgressDrawTarget::hidden())
    }
}

/// One status line, shown until it is dropped. Nothing is shown if standard error is not a terminal.
pub(crate) struct StatusLine(ProgressBar);

impl StatusLine {
    /// Makes an empty line.
    pub(crate) fn new() -> Self {
        let style = ProgressStyle::with_template("{wide_msg}").expect("a fixed template");
        Self(ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style))
    }

    /// Replaces the text.
    pub(crate) fn show(&self, text: String) {
        self.0.set_message(text);
    }
}

impl Drop for StatusLine {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// `name   12.0 MiB of 26.7 MiB   45 %`, at most `width` columns wide.
fn file_line(running: &Running, width: usize) -> String {
    let percent = (running.moved * 100)
        .checked_div(running.size)
        .unwrap_or(100);
    let right = if running.moved >= running.size {
        format!("  {}  verifying", bytes(running.size))
    } else {
        format!(
            "  {} of {}  {percent:>3} %",
            bytes(running.moved),
            bytes(running.size)
        )
    };
    let room = width.saturating_sub(measure_text_width(&right) + 2);
    let name = cut(&running.path.to_string(), room);
    let gap = " ".repeat(room.saturating_sub(measure_text_width(&name)));
    cut(&format!("  {name}{gap}{right}"), width)
}

/// Shortens a text to at most `width` columns. The middle is cut, because names differ at both ends.
fn cut(text: &str, width: usize) -> String {
    if measure_text_width(text) <= width {
        return text.to_owned();
    }
    let half = width.saturating_sub(1) / 2;
    let chars: Vec<char> = text.chars().collect();
    let take = |chars: &mut dyn Iterator<Item = &char>| {
        let mut taken = String::new();
        for c in chars {
            taken.push(*c);
            if measure_text_width(&taken) > half {
                taken.pop();
                break;
            }
        }
        taken
    };
    let head = take(&mut chars.iter());
    let tail: String = take(&mut chars.iter().rev()).chars().rev().collect();
    format!("{head}…{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use haul::{Event, RelativePath};

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for name in ["short", &"long".repeat(60), &"漢字".repeat(40)] {
            let path = RelativePath::from_components([name]).unwrap();
            for moved in [0, 5 << 20, 20 << 20] {
                let running = Running {
                    path: path.clone(),
                    size: 20 << 20,
                    moved,
                };
                for width in [59, 79, 119] {
                    let line = file_line(&running, width);
                    assert!(measure_text_width(&line) <= width, "{line}");
                }
            }
        }
        assert_eq!(cut("abcdefghij", 5), "ab…ij");
    }

    #[test]
    fn a_few_large_files_have_lines_of_their_own() {
        let start = Instant::now();
        let mut progress = Progress::new(start);
        for id in 0..10 {
            progress.count(&Event::Started {
                id,
                path: RelativePath::from_components([id.to_string()]).unwrap(),
                size: LARGE_FILE - id % 2,
                held: 0,
            });
        }
        let rows = Rows::of(&progress, start, 59);
        let named = |rows: &Rows| -> Vec<String> {
            let names = rows.files.iter().map(|line| line.split_whitespace().next());
            names.map(|name| name.unwrap().to_owned()).collect()
        };
        assert_eq!(named(&rows), ["0", "2", "4", "6", "8"]);
        assert_eq!(rows.total, "0/0+ files  0 B/0 B+  0 B/s");
    }
}
