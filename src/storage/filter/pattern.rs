//! Patterns in the place of names: what a shell expands, a server does where it was quoted.

use super::{BadRules, Rules};

/// Whether a component of a path stands for what it matches, unless something is really named so.
pub fn is_pattern(component: &[u8]) -> bool {
    component.iter().any(|byte| b"*?[".contains(byte))
}

/// Patterns for one component: `*`, `?` (a byte) and `[...]` as in a rule, of which the first one that matches suffices.
/// As in a shell, a hidden name is matched only by a pattern that begins with a dot.
#[derive(Debug, Clone, Default)]
pub struct Patterns {
    hidden: Rules,
    others: Rules,
}

impl Patterns {
    /// Compiles patterns. One that is malformed matches nothing.
    ///
    /// # Errors
    /// [`BadRules`] past the limits of rules.
    pub fn new<'p>(patterns: impl IntoIterator<Item = &'p [u8]>) -> Result<Self, BadRules> {
        // Anchored, and so without any other meaning that the first byte of a rule may have.
        let (hidden, others): (Vec<_>, Vec<_>) = patterns
            .into_iter()
            .map(|pattern| [b"/", pattern].concat())
            .partition(|rule| rule.starts_with(b"/."));
        Ok(Self {
            hidden: Rules::new(hidden)?,
            others: Rules::new(others)?,
        })
    }

    /// Whether one of them matches a name.
    pub fn matches(&self, name: &[u8]) -> bool {
        let rules = if name.starts_with(b".") {
            &self.hidden
        } else {
            &self.others
        };
        rules.excludes(name, false) == Some(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &[u8]) -> bool {
        Patterns::new([pattern.as_bytes()]).unwrap().matches(name)
    }

    #[test]
    fn patterns_match_as_a_shell_has_it() {
        assert!(
            matches("*.gz", b"a.gz")
                && matches("*", b"a")
                && matches("a?c", b"abc")
                && matches("[ab]*", b"bx")
        );
        assert!(matches("*.gz", b"\xff\n.gz"), "names are bytes");
        assert!(!matches("*.gz", b"a.gz.old") && !matches("?", b"ab") && !matches("[!a]", b"a"));
        assert!(!matches("*", b".hidden") && matches(".*", b".hidden") && !matches(".*", b"open"));
        assert!(
            matches("!#{a,b} *", b"!#{a,b} c"),
            "nothing else means anything"
        );
        assert!(matches(r"a\*[*]", b"a**") && !matches("a[", b"a["));
        assert!(is_pattern(b"a[") && is_pattern(b"*") && !is_pattern(b"{a}!#"));
    }
}
