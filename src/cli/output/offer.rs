//! Codes, and what is offered under them.

use std::io::IsTerminal;
use std::net::SocketAddr;

use haul::path::{RelativePath, printable};
use haul::wire::Offer;
use qrcode::render::unicode::Dense1x2;
use qrcode::{EcLevel, QrCode};
use serde_json::json;

use super::tally::{bytes, count};
use super::{line, note};
use crate::cli::Output;

/// Names that are shown one a line.
const NAMED: usize = 8;

/// Shows a code, and what to do with it.
pub(in crate::cli) fn code(output: Output, code: &str, port: u16, command: &str) {
    if output.json {
        return line(&json!({"type": "code", "code": code, "port": port}).to_string());
    }
    line(&format!("Code: {code}"));
    if !output.quiet {
        note(&format!("On the other machine:  {command}"));
    }
    if output.verbose {
        note(&format!(
            "Listening on UDP port {port}; where this network blocks multicast: --at HOST:{port}"
        ));
    }
}

/// Shows a ticket, on a terminal as a picture too, and what to do with it.
pub(in crate::cli) fn ticket(output: Output, ticket: &str) {
    if output.json {
        return line(&json!({"type": "ticket", "ticket": ticket}).to_string());
    }
    line(ticket);
    if output.quiet {
        return;
    }
    if std::io::stderr().is_terminal()
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
        && let Some(picture) = picture(ticket)
    {
        note(&picture);
    }
    note(
        "Whoever has this ticket can take it, once. On the other machine: haul receive,\nand paste it, or haul receive --ticket-file FILE.",
    );
}

/// A QR code, dark on light whatever the terminal's colours are; none where it would not fit into 80 columns.
fn picture(ticket: &str) -> Option<String> {
    let code = QrCode::with_error_correction_level(ticket, EcLevel::L).ok()?;
    if code.width() + 2 * QUIET > COLUMNS {
        return None;
    }
    // Black on white, whatever the colours of the terminal are: not every scanner takes the other way round.
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

/// Modules that are left free around a QR code (ISO/IEC 18004).
const QUIET: usize = 4;
/// What everybody's terminal has.
const COLUMNS: usize = 80;

/// Says that somebody knows the code, or has gone away again.
pub(in crate::cli) fn asked(output: Output, at: SocketAddr, gone: bool) {
    if output.json {
        let what = if gone { "left" } else { "asked" };
        return line(&json!({"type": what, "address": at.to_string()}).to_string());
    }
    if output.quiet {
        return;
    }
    match gone {
        false => note(&format!(
            "{at} knows the code, and is asked whether it accepts."
        )),
        true => note(&format!(
            "{at} went away without an answer; it may come again with the same code."
        )),
    }
}

/// Says how something without a session has ended, to a reader of JSON.
pub(in crate::cli) fn ended(output: Output, error: Option<&str>) {
    if output.json {
        line(&match error {
            Some(why) => json!({"type": "error", "why": why}).to_string(),
            None => json!({"type": "done", "files": 0, "bytes": 0}).to_string(),
        });
    }
}

/// Says for whom it waits.
pub(in crate::cli) fn waiting(output: Output, name: &str, port: u16) {
    if output.json {
        return line(&json!({"type": "waiting", "for": name, "port": port}).to_string());
    }
    if !output.quiet {
        note(&format!(
            "Waiting for {name}. There:  haul receive --from NAME, as this machine is called there"
        ));
    }
    if output.verbose {
        note(&format!(
            "Listening on UDP port {port}; where this network blocks multicast: --at HOST:{port}"
        ));
    }
}

/// Tells a reader of JSON what is offered.
pub(in crate::cli) fn json(
    offer: &Offer,
    names: &[RelativePath],
    from: SocketAddr,
    free: Option<u64>,
) {
    let piped = offer.piped == Some(true);
    let names: Vec<_> = names
        .iter()
        .map(|name| String::from_utf8_lossy(name.as_bytes()))
        .collect();
    line(&json!({
        "type": "offer", "from": offer.from, "address": from.to_string(), "names": names, "directory": offer.directory,
        "files": offer.files, "bytes": (!piped).then_some(offer.bytes), "text": offer.text, "free": free,
    }).to_string());
}

/// What is offered, for people.
pub(in crate::cli) fn lines(offer: &Offer, names: &[RelativePath]) -> Vec<String> {
    let total = format!("{}, {}", count(offer.files, "file"), bytes(offer.bytes));
    match names {
        [one] if offer.directory => vec![format!("{one}/  {total}")],
        [one] if offer.piped == Some(true) => {
            vec![format!("{one}  out of a pipe: nobody knows how much")]
        }
        [one] => vec![format!("{one}  {}", bytes(offer.bytes))],
        names => {
            let mut lines: Vec<_> = names
                .iter()
                .take(NAMED)
                .map(|name| format!("  {name}"))
                .collect();
            if names.len() > NAMED {
                lines.push(format!("  and {} more", names.len() - NAMED));
            }
            lines.push(format!("{} names, {total}", names.len()));
            lines
        }
    }
}

/// A text of the other machine: escaped on a terminal, line by line, and else as it is.
pub(in crate::cli) fn text(text: &str) {
    if std::io::stdout().is_terminal() {
        text.lines()
            .for_each(|text| line(&printable(text.as_bytes())));
    } else {
        line(text);
    }
}
