//! Differences between names that a directory may ignore: case, Unicode normal form, and trailing dots and spaces.

use unicode_normalization::UnicodeNormalization;

/// The differences between names that a directory ignores.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Folding {
    /// Upper and lower case.
    pub case: bool,
    /// Unicode normal forms: é as one character, or as e and a combining accent.
    pub form: bool,
    /// Trailing dots and spaces.
    pub ends: bool,
}

impl Folding {
    /// All differences.
    pub const ALL: Self = Self {
        case: true,
        form: true,
        ends: true,
    };

    /// Whether any difference is ignored.
    pub fn any(self) -> bool {
        self != Self::default()
    }

    /// A key that is equal for all names that the directory treats as equal.
    pub fn key(self, name: &[u8]) -> Vec<u8> {
        let name = if self.ends { trimmed(name) } else { name };
        let Ok(text) = std::str::from_utf8(name) else {
            return if self.case {
                name.to_ascii_lowercase()
            } else {
                name.to_vec()
            };
        };
        let folded = |text: String| match self.case {
            true => text.chars().flat_map(fold_case).collect(),
            false => text,
        };
        let normal = |text: String| match self.form {
            true => text.nfd().collect(),
            false => text,
        };
        // Normalize again: case folding may produce characters that decompose.
        normal(folded(normal(text.to_owned()))).into_bytes()
    }
}

/// Whether a name differs between its Unicode normal forms.
pub(crate) fn has_forms(name: &[u8]) -> bool {
    !name.is_ascii() && std::str::from_utf8(name).is_ok_and(|text| text.nfc().ne(text.nfd()))
}

/// A name without trailing dots and spaces, unless it consists of them.
pub(crate) fn trimmed(name: &[u8]) -> &[u8] {
    let end = name.iter().rposition(|byte| !b". ".contains(byte));
    end.map_or(name, |end| &name[..=end])
}

/// Folds the case of one character to one character, as file systems do.
fn fold_case(c: char) -> impl Iterator<Item = char> {
    let mut upper = c.to_uppercase();
    let upper = match (upper.next(), upper.next()) {
        (Some(upper), None) => upper,
        _ => c,
    };
    upper.to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(folding: Folding, name: &str) -> String {
        String::from_utf8(folding.key(name.as_bytes())).unwrap()
    }

    #[test]
    fn names_that_a_directory_folds_have_the_same_key() {
        let case = Folding {
            case: true,
            ..Folding::default()
        };
        let same = [
            (case, "README", "readme"),
            (case, "\u{c4}\u{3a3}", "\u{e4}\u{3c2}"),
            (Folding::ALL, "\u{c9}t\u{e9}", "e\u{301}te\u{301}"),
            (Folding::ALL, "Mr. ", "mr"),
        ];
        for (folding, one, other) in same {
            assert_eq!(key(folding, one), key(folding, other), "{one} {other}");
        }
        let others = [
            (Folding::default(), "README", "readme"),
            (case, "\u{e9}", "e\u{301}"),
            (case, "a", "a."),
            (Folding::ALL, "...", "."),
        ];
        for (folding, one, other) in others {
            assert_ne!(key(folding, one), key(folding, other), "{one} {other}");
        }
    }
}
