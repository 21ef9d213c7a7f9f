//! [`PeerText`]: text of a peer, which is escaped whenever it is printed.

use std::fmt;

use minicbor::{Decode, Encode};

/// Text that comes from a peer, or may quote one.
///
/// A hostile peer can write escape sequences that set the clipboard, clear the screen or forge lines. So `Display` and
/// `Debug` escape control characters, line ends and characters that change the direction of text. Only
/// [`raw`](Self::raw) and [`into_raw`](Self::into_raw) return the text unchanged.
///
/// ```
/// use haul::PeerText;
///
/// let text = PeerText::from("done\n\x1b[2J");
/// assert_eq!(text.to_string(), "done\\n\\u{1b}[2J");
/// assert_eq!(text.raw(), "done\n\x1b[2J");
/// ```
#[derive(Clone, Default, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct PeerText(#[n(0)] String);

impl PeerText {
    /// Returns the text as the peer wrote it. Use it for the wire, for JSON, for comparisons, and for files and pipes where
    /// the user wants the content. Never print it on a terminal or in a log.
    pub fn raw(&self) -> &str {
        &self.0
    }

    /// Converts into the text as the peer wrote it, without a copy. The warning of [`raw`](Self::raw) applies.
    pub fn into_raw(self) -> String {
        self.0
    }

    /// Returns the length in bytes, as the peer wrote it.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the text is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the text contains `part`.
    pub fn contains(&self, part: &str) -> bool {
        self.0.contains(part)
    }
}

impl fmt::Display for PeerText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&printable(self.0.as_bytes()))
    }
}

impl fmt::Debug for PeerText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

impl From<String> for PeerText {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for PeerText {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl PartialEq<str> for PeerText {
    fn eq(&self, other: &str) -> bool {
        self.0 == other
    }
}

impl PartialEq<&str> for PeerText {
    fn eq(&self, other: &&str) -> bool {
        self.0 == *other
    }
}

impl PartialEq<String> for PeerText {
    fn eq(&self, other: &String) -> bool {
        self.0 == *other
    }
}

/// Escapes bytes for printing: control characters, bidirectional overrides and invalid UTF-8. So a hostile name can neither
/// move the cursor nor look like another line.
pub fn printable(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                c if is_unprintable(c) => out.extend(c.escape_default()),
                c => out.push(c),
            }
        }
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    out
}

/// Whether a character could control a terminal or change how text looks: control characters, and characters that are
/// invisible or change the direction of text.
pub fn is_unprintable(c: char) -> bool {
    c.is_control() || is_format(c)
}

/// Whether a character is invisible or changes the direction of text, and `char::is_control` does not include it.
fn is_format(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_text_is_escaped_however_it_is_printed() {
        let evil = PeerText::from("\x1b]52;c;ZXZpbA==\x07\u{9b}2J\r\nhaul: done\u{202e}");
        for shown in [
            format!("{evil}"),
            format!("{evil:>80}"),
            format!("{evil:?}"),
            format!("{evil:#?}"),
        ] {
            assert!(!shown.contains(char::is_control), "{shown:?}");
            assert!(!shown.contains('\u{202e}'), "{shown:?}");
        }
        assert_eq!(evil.len(), evil.raw().len());
    }
}
