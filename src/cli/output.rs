//! All printing of the command. The library reports events and values; the files below turn them into text and JSON.
//!
//! `style.rs` says how a command prints. `screen.rs` shows a running session: `events.rs` has the lines of its events,
//! `progress.rs` its figures, `bars.rs` the moving lines of a terminal, and `report.rs` what is printed at its end.

mod ask;
mod bars;
mod bottleneck;
pub(super) mod code;
mod events;
mod json;
pub(super) mod listing;
pub(super) mod measurement;
pub(super) mod offer;
mod print;
mod progress;
mod report;
mod screen;
mod style;
mod text;

pub(super) use ask::{ask, can_ask, read_line};
pub(super) use bars::StatusLine;
pub(super) use print::{
    failure, json_line, line, note, report_start_failure, unbuffered_standard_output,
};
pub(super) use screen::Screen;
pub(super) use style::{Display, OtherEnd, Style};
pub(super) use text::{bytes, printable_path};
