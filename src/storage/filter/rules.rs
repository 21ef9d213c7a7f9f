//! A list of rules as in .gitignore: compiled once, matched against many names.

use std::sync::Arc;

use regex::bytes::{RegexSet, RegexSetBuilder};

use super::glob::{Effect, translate};

/// Most rules in one list; no person writes a .gitignore of more lines.
pub const MAX_RULES: usize = 4096;
/// Most bytes in the rules of one list.
pub const MAX_RULES_BYTES: usize = 256 << 10;
/// Most bytes that the compiled rules of one list may take. A class of many bytes takes some 100.
const MAX_COMPILED_BYTES: usize = 16 << 20;

/// Why a list of rules was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadRules {
    /// There are too many rules, or too many bytes of them.
    #[error("more than {MAX_RULES} rules or {MAX_RULES_BYTES} bytes; use fewer")]
    TooMany,
    /// The compiled rules take too much memory.
    #[error("the rules take too much memory; use fewer wildcards and classes")]
    TooLarge,
}

/// A list of rules in the syntax of .gitignore lines; the last matching rule decides. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Rules(Option<Arc<Compiled>>);

#[derive(Debug)]
struct Compiled {
    /// The rules as they were written.
    written: Vec<Vec<u8>>,
    set: RegexSet,
    /// The effect of a match, for each expression in the set.
    effects: Vec<Effect>,
}

impl Rules {
    /// Compiles rules. A rule that git would never match matches nothing.
    ///
    /// # Errors
    /// [`BadRules`] above the limits.
    pub fn new(written: Vec<Vec<u8>>) -> Result<Self, BadRules> {
        if written.len() > MAX_RULES
            || written.iter().map(Vec::len).sum::<usize>() > MAX_RULES_BYTES
        {
            return Err(BadRules::TooMany);
        }
        let (expressions, effects): (Vec<_>, Vec<_>) =
            written.iter().filter_map(|rule| translate(rule)).unzip();
        if written.is_empty() {
            return Ok(Self(None));
        }
        let set = RegexSetBuilder::new(expressions)
            .unicode(false)
            .dot_matches_new_line(true)
            .size_limit(MAX_COMPILED_BYTES)
            .build()
            .map_err(|_| BadRules::TooLarge)?;
        Ok(Self(Some(Arc::new(Compiled {
            written,
            set,
            effects,
        }))))
    }

    /// Parses and compiles the rules in a file such as .gitignore.
    ///
    /// # Errors
    /// [`BadRules`] above the limits.
    pub fn of_file(text: &[u8]) -> Result<Self, BadRules> {
        Self::new(lines(text))
    }

    /// Returns whether a name is excluded (`true`) or included; `None` if no rule matches. The name is relative to the
    /// directory that the rules are anchored at, its components joined by `/`.
    pub fn excludes(&self, name: &[u8], directory: bool) -> Option<bool> {
        let compiled = self.0.as_ref()?;
        let matches = compiled.set.matches(name);
        let effects = matches.iter().rev().map(|rule| compiled.effects[rule]);
        effects
            .filter(|effect| directory || !effect.directories_only)
            .map(|effect| effect.excludes)
            .next()
    }

    /// The rules as they were written.
    pub fn written(&self) -> &[Vec<u8>] {
        self.0.as_ref().map_or(&[], |compiled| &compiled.written)
    }

    /// Whether there are no rules.
    pub fn is_empty(&self) -> bool {
        self.written().is_empty()
    }
}

/// Parses the rules in a file such as .gitignore: drops comments, empty lines and trailing spaces.
pub fn lines(text: &[u8]) -> Vec<Vec<u8>> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let lines = text
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty() && line[0] != b'#');
    let lines = lines.map(|line| without_trailing_spaces(line.strip_suffix(b"\r").unwrap_or(line)));
    lines
        .filter(|line| !line.is_empty())
        .map(<[u8]>::to_vec)
        .collect()
}

/// Removes trailing spaces that no backslash quotes; other white space stays.
fn without_trailing_spaces(line: &[u8]) -> &[u8] {
    let mut end = 0;
    let mut at = 0;
    while at < line.len() {
        let quoted = line[at] == b'\\';
        // A backslash at the very end quotes nothing, and git then keeps all spaces before it.
        at += if quoted { 2 } else { 1 };
        if quoted || line[at - 1] != b' ' {
            end = at.min(line.len());
        }
    }
    &line[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn excludes(rules: &str, name: &str) -> bool {
        let (name, directory) = name
            .strip_suffix('/')
            .map_or((name, false), |name| (name, true));
        Rules::of_file(rules.as_bytes())
            .unwrap()
            .excludes(name.as_bytes(), directory)
            == Some(true)
    }

    #[test]
    fn the_last_rule_that_matches_decides() {
        assert!(excludes("*.o", "a/b.o"));
        assert!(!excludes("*.o\n!b.o", "a/b.o"));
        assert!(excludes("!b.o\n*.o", "a/b.o"));
        assert_eq!(
            Rules::of_file(b"*.o").unwrap().excludes(b"b.c", false),
            None
        );
    }

    #[test]
    fn a_slash_anchors_a_rule_and_a_final_one_selects_directories() {
        assert!(excludes("/a", "a") && !excludes("/a", "b/a"));
        assert!(excludes("b/a", "b/a") && !excludes("b/a", "c/b/a"));
        assert!(excludes("a/", "b/a/") && !excludes("a/", "b/a"));
    }

    #[test]
    fn non_utf8_bytes_match_as_bytes() {
        let rules = Rules::of_file(b"\xff?[\x80-\x90]{a,b}").unwrap();
        assert_eq!(rules.excludes(b"\xff\xfe\x85{a,b}", false), Some(true));
        assert_eq!(rules.excludes(b"\xff\xfe\x91{a,b}", false), None);
    }

    #[test]
    fn a_rules_file_is_parsed_as_in_git() {
        let read = |text: &str| {
            lines(text.as_bytes())
                .into_iter()
                .map(|l| String::from_utf8(l).unwrap())
                .collect()
        };
        let read: fn(&str) -> Vec<String> = read;
        assert_eq!(
            read("\u{feff}a\r\n\n# b\n\\#c\n d \\  \ne\\ \nf\t\n   \ng \\"),
            ["a", "\\#c", " d \\ ", "e\\ ", "f\t", "g \\"]
        );
    }

    #[test]
    fn hostile_rules_take_linear_time() {
        // Git's own matcher would take 2^30 steps for the first, if it had no limits.
        let name = "a/".repeat(1000) + "a";
        for rule in [
            "**/a*/".repeat(30) + "b",
            "*a".repeat(500) + "b",
            "[!b]*".repeat(200) + "b",
        ] {
            assert!(!excludes(&rule, &name));
        }
        assert_eq!(
            Rules::new(vec![Vec::new(); MAX_RULES + 1]).err(),
            Some(BadRules::TooMany)
        );
        assert_eq!(
            Rules::new(vec![vec![b'a'; MAX_RULES_BYTES + 1]]).err(),
            Some(BadRules::TooMany)
        );
    }
}
