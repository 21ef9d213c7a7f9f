//! Codes, and what is offered under them.

use std::io::IsTerminal;
use std::net::SocketAddr;

use haul::path::{RelativePath, printable};
use haul::wire::Offer;
use serde_json::json;

use super::tally::{bytes, count};
use super::{line, note};
use crate::cli::Output;

/// Names that are shown one a line.
const NAMED: usize = 8;

/// Shows a code, and what to do with it.
pub(in crate::cli) fn code(output: Output, code: &str, port: u16) {
    if output.json {
        return line(&json!({"type": "code", "code": code, "port": port}).to_string());
    }
    line(&format!("Code: {code}"));
    if !output.quiet {
        note("On the other machine:  haul receive");
    }
    if output.verbose {
        note(&format!(
            "Listening on UDP port {port}; where this network blocks multicast: haul receive --at HOST:{port}"
        ));
    }
}

/// Tells a reader of JSON what is offered.
pub(in crate::cli) fn json(offer: &Offer, names: &[RelativePath], from: SocketAddr, free: Option<u64>) {
    let names: Vec<_> = names.iter().map(|name| String::from_utf8_lossy(name.as_bytes())).collect();
    line(&json!({
        "type": "offer", "from": offer.from, "address": from.to_string(), "names": names, "directory": offer.directory,
        "files": offer.files, "bytes": offer.bytes, "text": offer.text, "free": free,
    }).to_string());
}

/// What is offered, for people.
pub(in crate::cli) fn lines(offer: &Offer, names: &[RelativePath]) -> Vec<String> {
    let total = format!("{}, {}", count(offer.files, "file"), bytes(offer.bytes));
    match names {
        [one] if offer.directory => vec![format!("{one}/  {total}")],
        [one] => vec![format!("{one}  {}", bytes(offer.bytes))],
        names => {
            let mut lines: Vec<_> = names.iter().take(NAMED).map(|name| format!("  {name}")).collect();
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
        text.lines().for_each(|text| line(&printable(text.as_bytes())));
    } else {
        line(text);
    }
}
