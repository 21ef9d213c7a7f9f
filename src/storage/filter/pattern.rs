//! Shell patterns in remote paths: the server expands patterns that the local shell did not.

use super::rules::{BadRules, Rules};

/// Whether a component of a path is a pattern, unless a file of exactly this name exists.
pub fn is_pattern(component: &[u8]) -> bool {
    component.iter().any(|byte| b"*?[".contains(byte))
}

/// Patterns for one component: `*`, `?` (a byte) and `[...]` as in a rule; a name matches if any pattern does. As in a
/// shell, only a pattern that begins with a dot matches hidden names.
#[derive(Debug, Clone, Default)]
pub struct Patterns {
    hidden: Rules,
    others: Rules,
}

impl Patterns {
    /// Compiles patterns. A malformed pattern matches nothing.
    ///
    /// # Errors
    /// [`BadRules`] above the limits of rules.
    pub fn new<'p>(patterns: impl IntoIterator<Item = &'p [u8]>) -> Result<Self, BadRules> {
        // Anchored, so that the first byte has no special meaning as in a rule.
        let (hidden, others): (Vec<_>, Vec<_>) = patterns
            .into_iter()
            .map(|pattern| [b"/", pattern].concat())
            .partition(|rule| rule.starts_with(b"/."));
        Ok(Self {
            hidden: Rules::new(hidden)?,
            others: Rules::new(others)?,
        })
    }

    /// Whether any of the patterns matches a name.
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
    fn patterns_match_as_in_a_shell() {
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
