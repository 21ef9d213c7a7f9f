//! Filters: what a walk excludes, by the rules of .gitignore (gitignore(5)).
//!
//! Rules become one set of regular expressions. It matches in time linear in the name for any rules: they may come from
//! a peer, or from a file in a tree that another person wrote. Git's own matcher backtracks. The translation is haul's
//! own because the crates `ignore` and `globset` lack parts of git's rules: non-UTF-8 bytes, POSIX classes, escapes in
//! classes, and literal braces.

mod pattern;

pub use pattern::{Patterns, is_pattern};

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;

use regex::bytes::{RegexSet, RegexSetBuilder};

use crate::protocol::path::{BadName, RelativePath};

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

/// What a walk excludes.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Rules anchored at each source directory; they take precedence over any .gitignore.
    pub rules: Rules,
    /// Whether .gitignore files in the sources, and .git/info/exclude, count too.
    pub gitignore: bool,
    /// If set, everything outside this list is excluded too.
    pub only: Option<Only>,
}

impl Filter {
    /// Whether the filter excludes nothing.
    pub fn is_empty(&self) -> bool {
        !self.gitignore && self.only.is_none() && self.rules.is_empty()
    }
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

#[derive(Debug, Clone, Copy)]
struct Effect {
    excludes: bool,
    directories_only: bool,
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

/// A list of names below a source to send, with the directories on the way to them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Only {
    names: Arc<BTreeSet<RelativePath>>,
    recursive: bool,
}

impl Only {
    /// Parses names relative to the source, one on each line or each ended by a NUL. A leading `/` or `./` is ignored.
    /// Without NULs, empty lines and lines that begin with `#` or `;` are skipped, as in rsync. A directory in the list
    /// includes its content only if `recursive` is set.
    ///
    /// # Errors
    /// The first name that is invalid, or that contains `..`.
    pub fn parse(text: &[u8], by_nul: bool, recursive: bool) -> Result<Self, (Vec<u8>, BadName)> {
        let end = if by_nul { 0 } else { b'\n' };
        let mut names = BTreeSet::new();
        for name in text.split(|&byte| byte == end) {
            let name = if by_nul {
                name
            } else {
                name.strip_suffix(b"\r").unwrap_or(name)
            };
            if name.is_empty() || !by_nul && matches!(name[0], b'#' | b';') {
                continue;
            }
            let components = name
                .split(|&byte| byte == b'/')
                .filter(|part| !matches!(*part, b"" | b"."));
            names.insert(
                RelativePath::from_components(components).map_err(|bad| (name.to_vec(), bad))?,
            );
        }
        Ok(Self {
            names: Arc::new(names),
            recursive,
        })
    }

    /// Returns the names to look at in a directory; `None` for all. The directory is relative to the source.
    pub fn within(&self, directory: &RelativePath) -> Option<Vec<Vec<u8>>> {
        let mut above = Some(directory.clone());
        while let Some(path) = above.filter(|_| self.recursive) {
            if self.names.contains(&path) {
                return None;
            }
            above = path.parent();
        }
        // In byte order, all paths below a directory are adjacent.
        let prefix = if directory.is_root() {
            Vec::new()
        } else {
            [directory.as_bytes(), b"/"].concat()
        };
        let below = self
            .names
            .range(directory.clone()..)
            .map(RelativePath::as_bytes);
        let below = below.skip_while(|path| *path < prefix.as_slice());
        let below = below.map_while(|path| path.strip_prefix(prefix.as_slice()));
        let names = below.filter_map(|path| {
            path.split(|&byte| byte == b'/')
                .next()
                .filter(|name| !name.is_empty())
        });
        // A name may recur after others, as in `a`, `a-b`, `a/c`.
        let names: BTreeSet<Vec<u8>> = names.map(<[u8]>::to_vec).collect();
        Some(names.into_iter().collect())
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

/// Translates a rule to a regular expression over the whole name; `None` if it can match nothing.
fn translate(rule: &[u8]) -> Option<(String, Effect)> {
    // Git's strings end at a NUL.
    let rule = rule.split(|&byte| byte == 0).next().unwrap_or_default();
    let (excludes, rule) = rule
        .strip_prefix(b"!")
        .map_or((true, rule), |rest| (false, rest));
    let (directories_only, rule) = rule
        .strip_suffix(b"/")
        .map_or((false, rule), |rest| (true, rest));
    let anchored = rule.contains(&b'/');
    let rule = if anchored {
        rule.strip_prefix(b"/").unwrap_or(rule)
    } else {
        rule
    };
    let mut expression = String::from(if anchored { r"\A" } else { r"\A(?:.*/)?" });
    if rule.is_empty() {
        return None;
    }
    push_glob(rule, anchored, &mut expression)?;
    expression.push_str(r"\z");
    Some((
        expression,
        Effect {
            excludes,
            directories_only,
        },
    ))
}

/// Appends the expression for a glob, with the semantics of git's wildmatch.c; `None` if it is malformed.
fn push_glob(rule: &[u8], across_directories: bool, expression: &mut String) -> Option<()> {
    // Git compares the part before the first wildcard separately, and the rest starts like a new rule.
    let literal = rule
        .iter()
        .position(|byte| b"*?[\\".contains(byte))
        .unwrap_or(rule.len());
    let mut at = 0;
    while let Some(&byte) = rule.get(at) {
        at += 1;
        match byte {
            b'?' => expression.push_str("[^/]"),
            b'*' => {
                let begins = at - 1 == literal || rule[at - 2] == b'/';
                let stars = rule[at..].iter().take_while(|&&byte| byte == b'*').count();
                at += stars;
                let whole = across_directories && stars > 0 && begins;
                match &rule[at..] {
                    [] if whole => expression.push_str(".*"),
                    [b'/', ..] if whole => {
                        at += 1;
                        expression.push_str("(?:.*/)?");
                    }
                    [b'\\', b'/', ..] if whole => expression.push_str(".*"),
                    _ => expression.push_str("[^/]*"),
                }
            }
            b'[' => {
                let (class, length) = class(&rule[at..])?;
                at += length;
                expression.push_str(&class);
            }
            b'\\' => {
                push_byte(*rule.get(at)?, expression);
                at += 1;
            }
            byte => push_byte(byte, expression),
        }
    }
    Some(())
}

fn push_byte(byte: u8, expression: &mut String) {
    // Writing to a string cannot fail.
    let _ = write!(expression, r"\x{byte:02x}");
}

/// Translates a class, given the text after its `[`; returns the expression, and the length with its `]`.
fn class(rule: &[u8]) -> Option<(String, usize)> {
    let mut set = [false; 256];
    let negated = matches!(rule.first()?, b'!' | b'^');
    let mut at = usize::from(negated);
    // The byte that a range may begin with.
    let mut previous = None;
    loop {
        let byte = *rule.get(at)?;
        let named =
            (byte == b'[' && rule.get(at + 1) == Some(&b':')).then(|| posix_class(&rule[at + 2..]));
        previous = match (byte, previous, named) {
            (b'\\', ..) => {
                at += 1;
                let quoted = *rule.get(at)?;
                set[usize::from(quoted)] = true;
                Some(quoted)
            }
            (b'-', Some(first), _) if rule.get(at + 1).is_some_and(|&next| next != b']') => {
                at += if rule[at + 1] == b'\\' { 2 } else { 1 };
                let last = *rule.get(at)?;
                set.iter_mut()
                    .take(usize::from(last) + 1)
                    .skip(usize::from(first))
                    .for_each(|is| *is = true);
                None
            }
            (_, _, Some(Posix::Class(is, length))) => {
                (0..=u8::MAX)
                    .filter(is)
                    .for_each(|byte| set[usize::from(byte)] = true);
                at += 1 + length;
                None
            }
            (_, _, Some(Posix::Malformed)) => return None,
            (byte, ..) => {
                set[usize::from(byte)] = true;
                Some(byte)
            }
        };
        at += 1;
        // A `]` that comes first is literal.
        if *rule.get(at)? == b']' {
            break;
        }
    }
    let matches_byte = |byte: u8| byte != b'/' && set[usize::from(byte)] != negated;
    let mut class = String::from("[");
    let mut bytes = (0..=u8::MAX).filter(|&byte| matches_byte(byte)).peekable();
    bytes.peek()?;
    while let Some(first) = bytes.next() {
        let mut last = first;
        while let Some(next) = bytes.next_if(|&next| u16::from(next) == u16::from(last) + 1) {
            last = next;
        }
        push_byte(first, &mut class);
        class.push('-');
        push_byte(last, &mut class);
    }
    class.push(']');
    Some((class, at + 1))
}

/// The result of parsing the text after a `[:` in a class.
enum Posix {
    /// The bytes of the class, and the length of the text with its `:]`.
    Class(fn(&u8) -> bool, usize),
    /// Not a class, but literal bytes.
    Literal,
    /// An unknown name or a missing end; then the rule matches nothing.
    Malformed,
}

/// Parses POSIX classes as git does: ASCII only, and white space without vertical tab and form feed.
fn posix_class(rule: &[u8]) -> Posix {
    let Some(end) = rule.iter().position(|&byte| byte == b']') else {
        return Posix::Malformed;
    };
    let Some(name) = rule[..end].strip_suffix(b":") else {
        return Posix::Literal;
    };
    let is: fn(&u8) -> bool = match name {
        b"alnum" => u8::is_ascii_alphanumeric,
        b"alpha" => u8::is_ascii_alphabetic,
        b"blank" => |byte| matches!(byte, b' ' | b'\t'),
        b"cntrl" => u8::is_ascii_control,
        b"digit" => u8::is_ascii_digit,
        b"graph" => u8::is_ascii_graphic,
        b"lower" => u8::is_ascii_lowercase,
        b"print" => |byte| matches!(byte, 0x20..=0x7e),
        b"punct" => u8::is_ascii_punctuation,
        b"space" => |byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r'),
        b"upper" => u8::is_ascii_uppercase,
        b"xdigit" => u8::is_ascii_hexdigit,
        _ => return Posix::Malformed,
    };
    Posix::Class(is, end + 1)
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
    fn a_list_of_names_is_parsed_as_in_rsync() {
        let names = |only: &Only, directory: &str| {
            let directory =
                RelativePath::from_components(directory.split('/').filter(|c| !c.is_empty()))
                    .unwrap();
            let names = only.within(&directory)?.into_iter();
            Some(
                names
                    .map(|name| String::from_utf8(name).unwrap())
                    .collect::<Vec<_>>(),
            )
        };
        let text = b"# no name\n; nor this\n/a/b//c\r\n./d\na-b\na/e\na\n\na0/x";
        let only = Only::parse(text, false, false).unwrap();
        assert_eq!(names(&only, "").unwrap(), ["a", "a-b", "a0", "d"]);
        assert_eq!(names(&only, "a").unwrap(), ["b", "e"]);
        assert_eq!(names(&only, "a/b").unwrap(), ["c"]);
        assert_eq!(names(&only, "d").unwrap(), [""; 0]);
        let only = Only::parse(text, false, true).unwrap();
        assert_eq!((names(&only, "a"), names(&only, "a/b")), (None, None));
        assert_eq!(names(&only, "").unwrap(), ["a", "a-b", "a0", "d"]);
        let only = Only::parse(b"#x\0a\nb\0", true, false).unwrap();
        assert_eq!(names(&only, "").unwrap(), ["#x", "a\nb"]);
        assert_eq!(
            Only::parse(b"a/../b", false, false).unwrap_err().1,
            BadName::Dots
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
