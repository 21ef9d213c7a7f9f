//! Codes, and what is offered under them.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::Path;

use haul::{Offer, PeerText, RelativePath, is_unprintable};
use qrcode::render::unicode::Dense1x2;
use qrcode::{EcLevel, QrCode};
use serde_json::json;

use super::tally::{bytes, count};
use super::{json_line, line, note};
use crate::cli::Output;

/// Names that are shown, one a line, where nothing is to be feared of them.
const NAMED: usize = 8;
/// Names that are shown because they would replace something or are hidden: more than a person reads before an answer.
/// Where there are more, accepting is not the default.
const RISKY_NAMED: usize = 40;

/// What stands under an offered name at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) enum There {
    Nothing,
    /// A file or a link, which what comes would replace.
    File,
    /// A directory, into which a directory would go.
    Directory,
}

/// A name that is offered, and what stands under it at the destination.
pub(in crate::cli) struct Named<'a> {
    name: &'a RelativePath,
    there: There,
}

impl<'a> Named<'a> {
    /// Looks for each name at the destination, as its file system finds it. Nothing stands in no destination.
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

    /// Whether a name does not look as it is.
    fn is_odd(&self) -> bool {
        std::str::from_utf8(self.name.as_bytes()).map_or(true, |name| name.contains(is_unprintable))
    }

    /// Whether the user has to see it before an answer.
    fn is_risky(&self) -> bool {
        self.there != There::Nothing || self.is_hidden() || self.is_odd()
    }

    /// What the user should know of it, in brackets behind its name.
    fn remark(&self) -> &'static str {
        match (self.there, self.is_hidden()) {
            (There::File, true) => "  (hidden; a file of that name is there)",
            (There::File, false) => "  (a file of that name is there)",
            (There::Directory, true) => "  (hidden; a directory of that name is there)",
            (There::Directory, false) => "  (a directory of that name is there)",
            (There::Nothing, true) => "  (hidden)",
            (There::Nothing, false) => "",
        }
    }
}

/// An offer as people read it.
pub(in crate::cli) struct Listed {
    /// What is shown.
    pub(in crate::cli) lines: Vec<String>,
    /// There are more names that would replace something or are hidden than are shown.
    pub(in crate::cli) cut: bool,
}

/// Shows a code, and what to do with it.
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
            "Listening on UDP port {port}; where this network blocks multicast: --at HOST:{port}"
        ));
    }
}

/// Shows a ticket, on a terminal as a picture too, and what to do with it.
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
        return json_line(&json!({"type": what, "address": at.to_string()}));
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
        json_line(&match error {
            Some(why) => json!({"type": "error", "why": why}),
            None => json!({"type": "done", "files": 0, "bytes": 0}),
        });
    }
}

/// Says for whom it waits.
pub(in crate::cli) fn waiting(output: Output, name: &str, port: u16) {
    if output.json {
        return json_line(&json!({"type": "waiting", "for": name, "port": port}));
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

/// What is offered, for people. Every name is shown that would replace something, is hidden or does not look as it is,
/// before all others; how many of these there may be is bounded, since a hostile offer could hide one among many.
pub(in crate::cli) fn lines(offer: &Offer, names: &[Named<'_>]) -> Listed {
    let total = format!("{}, {}", count(offer.files, "file"), bytes(offer.bytes));
    if let [one] = names {
        let name = one.name;
        let remark = one.remark();
        let line = if offer.directory {
            format!("{name}/  {total}{remark}")
        } else if offer.piped == Some(true) {
            format!("{name}  out of a pipe: nobody knows how much{remark}")
        } else {
            format!("{name}  {}{remark}", bytes(offer.bytes))
        };
        return Listed {
            lines: vec![line],
            cut: false,
        };
    }
    let (mut risky, plain): (Vec<_>, Vec<_>) = names.iter().partition(|named| named.is_risky());
    // Those that replace a hidden file come first: such files are run by shells and other programs.
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
            "  and {} more that are hidden or have a name that is there already",
            risky.len() - risky_shown
        ));
    }
    if plain.len() > plain_shown {
        lines.push(format!("  and {} more", plain.len() - plain_shown));
    }
    lines.push(format!("{} names, {total}", names.len()));
    Listed { lines, cut }
}

/// A text of the other machine: escaped on a terminal, line by line, and else as it is.
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
    fn an_offer_shows_every_name_that_is_hidden_or_there_already() {
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
            "  .bashrc  (hidden; a file of that name is there)"
        );
        for line in [
            "  .new  (hidden)",
            "  notes  (a file of that name is there)",
            "  photos  (a directory of that name is there)",
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
        assert!(one.lines[0].contains("a file of that name is there"));
    }

    #[test]
    fn an_offer_with_too_many_such_names_says_how_many_and_is_cut() {
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
