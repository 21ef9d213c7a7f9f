//! Formats and prints offers.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::Path;

use haul::internal::error::text::is_unprintable;
use haul::{Offer, PeerText, RelativePath};
use serde_json::json;

use super::print::{json_line, line};
use super::text::{bytes, count};

/// The most names of an offer that are shown, one a line, if none is risky.
const PLAIN_NAMES: usize = 8;
/// The most risky names that are shown: names that exist at the destination, are hidden or look odd. It is more than a
/// person reads before an answer. If there are more, accepting is not the default.
const RISKY_NAMES: usize = 40;

/// What exists under an offered name at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtDestination {
    Nothing,
    /// A file or a link, which the offered entry would replace.
    File,
    /// A directory, which an offered directory would be merged into.
    Directory,
}

/// An offered name, and what exists under it at the destination.
pub(crate) struct OfferedName<'a> {
    name: &'a RelativePath,
    at_destination: AtDestination,
}

impl<'a> OfferedName<'a> {
    /// Looks up each name at the destination, with the matching rules of its file system. Without a destination, no name
    /// exists.
    pub(crate) fn look_up(names: &'a [RelativePath], to: Option<&Path>) -> Vec<Self> {
        let at_destination = |name: &RelativePath| {
            let path = to?.join(name.as_path());
            Some(match path.symlink_metadata().ok()?.is_dir() {
                true => AtDestination::Directory,
                false => AtDestination::File,
            })
        };
        names
            .iter()
            .map(|name| Self {
                name,
                at_destination: at_destination(name).unwrap_or(AtDestination::Nothing),
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
        self.at_destination != AtDestination::Nothing || self.is_hidden() || self.is_odd()
    }

    /// Returns the warning to print in brackets after the name.
    fn remark(&self) -> &'static str {
        match (self.at_destination, self.is_hidden()) {
            (AtDestination::File, true) => "  (hidden; a file of that name exists)",
            (AtDestination::File, false) => "  (a file of that name exists)",
            (AtDestination::Directory, true) => "  (hidden; a directory of that name exists)",
            (AtDestination::Directory, false) => "  (a directory of that name exists)",
            (AtDestination::Nothing, true) => "  (hidden)",
            (AtDestination::Nothing, false) => "",
        }
    }
}

/// An offer as text.
pub(crate) struct OfferText {
    /// The lines to print.
    pub(crate) lines: Vec<String>,
    /// Whether some risky names are not shown.
    pub(crate) cut: bool,
}

/// Prints an offer as JSON.
pub(crate) fn print_json(
    offer: &Offer,
    names: &[OfferedName<'_>],
    from: SocketAddr,
    free: Option<u64>,
) {
    let piped = offer.piped == Some(true);
    let text =
        |named: &OfferedName<'_>| String::from_utf8_lossy(named.name.as_bytes()).into_owned();
    let existing = names
        .iter()
        .filter(|named| named.at_destination != AtDestination::Nothing);
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
pub(crate) fn describe(offer: &Offer, names: &[OfferedName<'_>]) -> OfferText {
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
        return OfferText {
            lines: vec![line],
            cut: false,
        };
    }
    let (mut risky, plain): (Vec<_>, Vec<_>) = names.iter().partition(|named| named.is_risky());
    // Names that replace a hidden file come first, because shells and other programs run such files.
    risky.sort_by_key(|named| {
        (
            !named.is_hidden(),
            named.at_destination == AtDestination::Nothing,
        )
    });
    let risky_shown = risky.len().min(RISKY_NAMES);
    let plain_shown = plain.len().min(PLAIN_NAMES.saturating_sub(risky_shown));
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
    OfferText { lines, cut }
}

/// Prints a text of the other machine. On a terminal each line is escaped; otherwise the text is printed unchanged.
pub(crate) fn print_text(text: &PeerText) {
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

    fn shown(all: &[RelativePath], to: &Path) -> OfferText {
        let offer = Offer {
            files: all.len() as u64,
            ..Offer::default()
        };
        describe(&offer, &OfferedName::look_up(all, Some(to)))
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
        assert!(listed.cut && listed.lines.len() <= RISKY_NAMES + 3);
        assert!(
            listed.lines[0].contains(".profile"),
            "what is replaced comes first"
        );
        let more = format!("and {} more that are hidden", all.len() - RISKY_NAMES);
        assert!(
            listed.lines.iter().any(|line| line.contains(&more)),
            "{:?}",
            listed.lines
        );
    }
}
