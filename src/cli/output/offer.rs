//! Prints codes, tickets and offers.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::Path;

use haul::internal::error::text::is_unprintable;
use haul::{Offer, PeerText, RelativePath};
use qrcode::render::unicode::Dense1x2;
use qrcode::{EcLevel, QrCode};
use serde_json::json;

use super::tally::{bytes, count};
use super::{json_line, line, note};
use crate::cli::Output;

/// The most names of an offer that are shown, one a line, if none is risky.
const NAMED: usize = 8;
/// The most risky names that are shown: names that exist at the destination, are hidden or look odd. It is more than a
/// person reads before an answer. If there are more, accepting is not the default.
const RISKY_NAMED: usize = 40;

/// What exists under an offered name at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) enum There {
    Nothing,
    /// A file or a link, which the offered entry would replace.
    File,
    /// A directory, which an offered directory would be merged into.
    Directory,
}

/// An offered name, and what exists under it at the destination.
pub(in crate::cli) struct Named<'a> {
    name: &'a RelativePath,
    there: There,
}

impl<'a> Named<'a> {
    /// Looks up each name at the destination, with the matching rules of its file system. Without a destination, no name
    /// exists.
    pub(in crate::cli) fn look(names: &'a [RelativePath], to: Option<&Path>) -> Vec<Self> {
        let there = |name: &RelativePath| {
            let path = to?.join(name.as_path());
            Some(match path.symlink_metadata().ok()?.is_dir() {
                true => There::Directory,
                false => There::File,
            })
        };
        names
            .iter()
            .map(|name| Self {
                name,
                there: there(name).unwrap_or(There::Nothing),
            })
            .collect()
    }

    fn is_hidden(&self) -> bool {
        self.name.as_bytes().starts_with(b".")
    }

    /// Whether the name is not UTF-8, or has characters that are not printed as they are.
    fn is_odd(&self) -> bool {
        std::str::from_utf8(self.name.as_bytes()).map_or(true, |name| name.contains(is_unprintable))
    }

    /// Whether the user must see the name before answering.
    fn is_risky(&self) -> bool {
        self.there != There::Nothing || self.is_hidden() || self.is_odd()
    }

    /// Returns the warning to print in brackets after the name.
    fn remark(&self) -> &'static str {
        match (self.there, self.is_hidden()) {
            (There::File, true) => "  (hidden; a file of that name exists)",
            (There::File, false) => "  (a file of that name exists)",
            (There::Directory, true) => "  (hidden; a directory of that name exists)",
            (There::Directory, false) => "  (a directory of that name exists)",
            (There::Nothing, true) => "  (hidden)",
            (There::Nothing, false) => "",
        }
    }
}

/// An offer as text.
pub(in crate::cli) struct Listed {
    /// The lines to print.
    pub(in crate::cli) lines: Vec<String>,
    /// Whether some risky names are not shown.
    pub(in crate::cli) cut: bool,
}

/// Prints a code, and the command for the other machine.
pub(in crate::cli) fn code(output: Output, code: &str, port: u16, command: &str) {
    if output.json {
        return json_line(&json!({"type": "code", "code": code, "port": port}));
    }
    line(&format!("Code: {code}"));
    if !output.quiet {
        note(&format!("On the other machine:  {command}"));
    }
    if output.verbose {
        note(&format!(
            "Listening on UDP port {port}; if this network blocks multicast, add --at HOST:{port}"
        ));
    }
}

/// Prints a ticket, on a terminal also as a QR code, and the command for the other machine.
pub(in crate::cli) fn ticket(output: Output, ticket: &str) {
    if output.json {
        return json_line(&json!({"type": "ticket", "ticket": ticket}));
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
        "Anyone with this ticket can receive the offer, once. On the other machine:\nhaul receive, then paste it; or haul receive --ticket-file FILE",
    );
}

/// Draws a QR code. Returns `None` if it would not fit into 80 columns.
fn picture(ticket: &str) -> Option<String> {
    let code = QrCode::with_error_correction_level(ticket, EcLevel::L).ok()?;
    if code.width() + 2 * QUIET > COLUMNS {
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

/// The empty margin around a QR code, in modules (ISO/IEC 18004).
const QUIET: usize = 4;
/// The width that every terminal is assumed to have, in columns.
const COLUMNS: usize = 80;

/// Reports that a receiver has shown that it knows the code, or that it has left without an answer.
pub(in crate::cli) fn asked(output: Output, at: SocketAddr, gone: bool) {
    if output.json {
        let what = if gone { "left" } else { "asked" };
        return json_line(&json!({"type": what, "address": at.to_string()}));
    }
    if output.quiet {
        return;
    }
    match gone {
        false => note(&format!("{at} knows the code and is asked to accept.")),
        true => note(&format!(
            "{at} left without an answer; it may return with the same code."
        )),
    }
}

/// Prints as JSON how an exchange without a session has ended.
pub(in crate::cli) fn ended(output: Output, error: Option<&str>) {
    if output.json {
        json_line(&match error {
            Some(why) => json!({"type": "error", "why": why}),
            None => json!({"type": "done", "files": 0, "bytes": 0}),
        });
    }
}

/// Prints which paired machine is waited for, and the command for it.
pub(in crate::cli) fn waiting(output: Output, name: &str, port: u16) {
    if output.json {
        return json_line(&json!({"type": "waiting", "for": name, "port": port}));
    }
    if !output.quiet {
        note(&format!(
            "Waiting for {name}. There:  haul receive --from NAME, with the name it gave this machine"
        ));
    }
    if output.verbose {
        note(&format!(
            "Listening on UDP port {port}; if this network blocks multicast, add --at HOST:{port}"
        ));
    }
}

/// Prints an offer as JSON.
pub(in crate::cli) fn json(
    offer: &Offer,
    names: &[Named<'_>],
    from: SocketAddr,
    free: Option<u64>,
) {
    let piped = offer.piped == Some(true);
    let text = |named: &Named<'_>| String::from_utf8_lossy(named.name.as_bytes()).into_owned();
    let existing = names.iter().filter(|named| named.there != There::Nothing);
    let existing: Vec<_> = existing.map(text).collect();
    let names: Vec<_> = names.iter().map(text).collect();
    json_line(&json!({
        "type": "offer", "from": offer.from.raw(), "address": from.to_string(), "names": names, "existing": existing,
        "directory": offer.directory, "files": offer.files, "bytes": (!piped).then_some(offer.bytes),
        "text": offer.text.as_ref().map(PeerText::raw), "free": free,
    }));
}

/// Formats an offer as text. Risky names come first: those that exist at the destination, are hidden or look odd. Their
/// number is bounded, because a hostile offer could hide one name among many.
pub(in crate::cli) fn lines(offer: &Offer, names: &[Named<'_>]) -> Listed {
    let total = format!("{}, {}", count(offer.files, "file"), bytes(offer.bytes));
    if let [one] = names {
        let name = one.name;
        let remark = one.remark();
        let line = if offer.directory {
            format!("{name}/  {total}{remark}")
        } else if offer.piped == Some(true) {
            format!("{name}  from a pipe, size unknown{remark}")
        } else {
            format!("{name}  {}{remark}", bytes(offer.bytes))
        };
        return Listed {
            lines: vec![line],
            cut: false,
        };
    }
    let (mut risky, plain): (Vec<_>, Vec<_>) = names.iter().partition(|named| named.is_risky());
    // Names that replace a hidden file come first, because shells and other programs run such files.
    risky.sort_by_key(|named| (!named.is_hidden(), named.there == There::Nothing));
    let risky_shown = risky.len().min(RISKY_NAMED);
    let plain_shown = plain.len().min(NAMED.saturating_sub(risky_shown));
    let shown = risky
        .iter()
        .take(risky_shown)
        .chain(plain.iter().take(plain_shown));
    let mut lines: Vec<_> = shown
        .map(|named| format!("  {}{}", named.name, named.remark()))
        .collect();
    let cut = risky.len() > risky_shown;
    if cut {
        lines.push(format!(
            "  and {} more that are hidden or have a name that exists already",
            risky.len() - risky_shown
        ));
    }
    if plain.len() > plain_shown {
        lines.push(format!("  and {} more", plain.len() - plain_shown));
    }
    lines.push(format!("{} names, {total}", names.len()));
    Listed { lines, cut }
}

/// Prints a text of the other machine. On a terminal each line is escaped; otherwise the text is printed unchanged.
pub(in crate::cli) fn text(text: &PeerText) {
    if std::io::stdout().is_terminal() {
        text.raw()
            .lines()
            .for_each(|row| line(&PeerText::from(row).to_string()));
    } else {
        line(text.raw());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[String]) -> Vec<RelativePath> {
        let path = |name: &String| RelativePath::from_components([name]).unwrap();
        names.iter().map(path).collect()
    }

    fn shown(all: &[RelativePath], to: &Path) -> Listed {
        let offer = Offer {
            files: all.len() as u64,
            ..Offer::default()
        };
        lines(&offer, &Named::look(all, Some(to)))
    }

    #[test]
    fn an_offer_shows_every_name_that_is_hidden_or_exists() {
        let to = tempfile::tempdir().unwrap();
        std::fs::write(to.path().join(".bashrc"), "mine").unwrap();
        std::fs::write(to.path().join("notes"), "mine").unwrap();
        std::fs::create_dir(to.path().join("photos")).unwrap();
        let mut all: Vec<String> = (0..20).map(|i| format!("harmless {i:02}")).collect();
        all.extend([".bashrc", ".new", "notes", "photos", "gpj\u{202e}.exe"].map(String::from));
        let listed = shown(&names(&all), to.path());
        assert!(!listed.cut);
        assert_eq!(
            listed.lines[0],
            "  .bashrc  (hidden; a file of that name exists)"
        );
        for line in [
            "  .new  (hidden)",
            "  notes  (a file of that name exists)",
            "  photos  (a directory of that name exists)",
            "  gpj\\u{202e}.exe",
            "  and 17 more",
        ] {
            assert!(
                listed.lines.iter().any(|l| l == line),
                "{line}: {:?}",
                listed.lines
            );
        }
        let one = shown(&names(&[".bashrc".into()]), to.path());
        assert!(one.lines[0].contains("a file of that name exists"));
    }

    #[test]
    fn an_offer_with_too_many_risky_names_counts_and_cuts_them() {
        let to = tempfile::tempdir().unwrap();
        std::fs::write(to.path().join(".profile"), "mine").unwrap();
        let mut all: Vec<String> = (0..900).map(|i| format!(".hidden{i:03}")).collect();
        all.push(".profile".into());
        let listed = shown(&names(&all), to.path());
        assert!(listed.cut && listed.lines.len() <= RISKY_NAMED + 3);
        assert!(
            listed.lines[0].contains(".profile"),
            "what is replaced comes first"
        );
        let more = format!("and {} more that are hidden", all.len() - RISKY_NAMED);
        assert!(
            listed.lines.iter().any(|line| line.contains(&more)),
            "{:?}",
            listed.lines
        );
    }
}
