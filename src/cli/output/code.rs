//! Prints how the other machine gets an offer: by a code, a ticket or a pairing; and what becomes of it before a session.

use std::io::IsTerminal;
use std::net::SocketAddr;

use qrcode::render::unicode::Dense1x2;
use qrcode::{EcLevel, QrCode};
use serde_json::json;

use super::print::{json_line, line, note};
use super::style::Style;

/// The empty margin around a QR code, in modules (ISO/IEC 18004).
const QR_MARGIN: usize = 4;
/// The width that every terminal is assumed to have, in columns.
const COLUMNS: usize = 80;

/// Prints a code, and the command for the other machine.
pub(crate) fn print_code(style: Style, code: &str, port: u16, command: &str) {
    if style == Style::Json {
        return json_line(&json!({"type": "code", "code": code, "port": port}));
    }
    line(&format!("Code: {code}"));
    if style != Style::Quiet {
        note(&format!("On the other machine:  {command}"));
    }
    print_port(style, port);
}

/// Prints which paired machine is waited for, and the command for it.
pub(crate) fn print_waiting(style: Style, name: &str, port: u16) {
    if style == Style::Json {
        return json_line(&json!({"type": "waiting", "for": name, "port": port}));
    }
    if style != Style::Quiet {
        note(&format!(
            "Waiting for {name}. There:  haul receive --from NAME, with the name it gave this machine"
        ));
    }
    print_port(style, port);
}

fn print_port(style: Style, port: u16) {
    if style == Style::Verbose {
        note(&format!(
            "Listening on UDP port {port}; if this network blocks multicast, add --at HOST:{port}"
        ));
    }
}

/// Prints a ticket, on a terminal also as a QR code, and the command for the other machine.
pub(crate) fn print_ticket(style: Style, ticket: &str) {
    if style == Style::Json {
        return json_line(&json!({"type": "ticket", "ticket": ticket}));
    }
    line(ticket);
    if style == Style::Quiet {
        return;
    }
    if std::io::stderr().is_terminal()
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
        && let Some(picture) = qr_code(ticket)
    {
        note(&picture);
    }
    note(
        "Anyone with this ticket can receive the offer, once. On the other machine:\nhaul receive, then paste it; or haul receive --ticket-file FILE",
    );
}

/// Draws a QR code. Returns `None` if it would not fit into 80 columns.
fn qr_code(ticket: &str) -> Option<String> {
    let code = QrCode::with_error_correction_level(ticket, EcLevel::L).ok()?;
    if code.width() + 2 * QR_MARGIN > COLUMNS {
        return None;
    }
    // Black on white, whatever the terminal's colours are, because some scanners do not read inverted codes.
    let blocks = code
        .render::<Dense1x2>()
        .dark_color(Dense1x2::Dark)
        .light_color(Dense1x2::Light)
        .build();
    Some(
        blocks
            .lines()
            .map(|row| format!("\u{1b}[30;107m{row}\u{1b}[0m"))
            .collect::<Vec<_>>()
            .join("\n"),
    )
}

/// Reports that a receiver has shown that it knows the code, and that its user is asked to accept.
pub(crate) fn report_asked(style: Style, receiver: SocketAddr) {
    match style {
        Style::Json => json_line(&json!({"type": "asked", "address": receiver.to_string()})),
        Style::Quiet => {}
        Style::Normal | Style::Verbose => note(&format!(
            "{receiver} knows the code and is asked to accept."
        )),
    }
}

/// Reports that a receiver has left without an answer.
pub(crate) fn report_left(style: Style, receiver: SocketAddr) {
    match style {
        Style::Json => json_line(&json!({"type": "left", "address": receiver.to_string()})),
        Style::Quiet => {}
        Style::Normal | Style::Verbose => note(&format!(
            "{receiver} left without an answer; it may return with the same code."
        )),
    }
}

/// Prints as JSON that an exchange without a session has succeeded.
pub(crate) fn report_done(style: Style) {
    if style == Style::Json {
        json_line(&json!({"type": "done", "files": 0, "bytes": 0}));
    }
}

/// Prints as JSON why an exchange ended before a session.
pub(crate) fn report_refused(style: Style, why: &str) {
    if style == Style::Json {
        json_line(&json!({"type": "error", "why": why}));
    }
}
