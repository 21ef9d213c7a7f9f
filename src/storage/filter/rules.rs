//! A list of rules as in .gitignore: compiled once, matched against many names.

use std::sync::{Arc, Mutex};

use regex_automata::hybrid::dfa::{Cache, Config, DFA};
use regex_automata::{Anchored, Input, MatchKind, PatternSet, nfa::thompson, util::syntax};

use super::glob::{Effect, translate};
use crate::error::lock::lock;
use crate::storage::kept_memory::{Held, KeptShare};

/// Most rules in one list; no person writes a .gitignore of more lines.
pub const MAX_RULES: usize = 4096;
/// Most bytes in the rules of one list.
pub const MAX_RULES_BYTES: usize = 256 << 10;
/// Most bytes that the compiled rules of one list may take. A class of many bytes takes some 100.
const MAX_COMPILED_BYTES: usize = 16 << 20;
/// Memory in bytes for the states that are built while names are matched; when it is full, they are built again. The
/// most is the default of the crate; less is slower for rules with many wildcards.
const MIN_CACHE: usize = 128 << 10;
const MAX_CACHE: usize = 2 << 20;
/// The part (1/N) of the free memory that the cache of one list may take.
const CACHE_PART: usize = 16;
/// The part (1/N) of the free memory that the compiler may use for one list.
const COMPILER_PART: usize = 2;
/// Memory for a rule beside its text and its compiled form, in bytes.
const RULE_OVERHEAD: usize = 64;

/// Why a list of rules was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadRules {
    /// There are too many rules, or too many bytes of them.
    #[error("more than {MAX_RULES} rules or {MAX_RULES_BYTES} bytes; use fewer")]
    TooMany,
    /// The compiled rules take too much memory, by themselves or together with what the session holds already.
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
    automaton: DFA,
    matching: Mutex<Matching>,
    /// The effect of a match, for each expression in the automaton.
    effects: Vec<Effect>,
    _held: Held,
}

/// What a search writes to.
#[derive(Debug)]
struct Matching {
    cache: Cache,
    found: PatternSet,
}

impl Rules {
    /// Compiles rules. A rule that git would never match matches nothing.
    ///
    /// # Errors
    /// [`BadRules`] above the limits.
    pub fn new(written: Vec<Vec<u8>>) -> Result<Self, BadRules> {
        Self::within(written, &KeptShare::default())
    }

    /// Parses and compiles the rules in a file such as .gitignore.
    ///
    /// # Errors
    /// [`BadRules`] above the limits.
    pub fn of_file(text: &[u8]) -> Result<Self, BadRules> {
        Self::new(lines(text))
    }

    /// Compiles rules, and counts their memory as long as they are kept.
    ///
    /// # Errors
    /// [`BadRules`] above the limits, or if they do not fit in the memory.
    pub fn within(written: Vec<Vec<u8>>, memory: &KeptShare) -> Result<Self, BadRules> {
        let bytes = written.iter().map(Vec::len).sum::<usize>();
        if written.len() > MAX_RULES || bytes > MAX_RULES_BYTES {
            return Err(BadRules::TooMany);
        }
        if written.is_empty() {
            return Ok(Self(None));
        }
        let cache_bytes = (memory.free() / CACHE_PART).clamp(MIN_CACHE, MAX_CACHE);
        let mut held = memory
            .try_hold(bytes + written.len() * RULE_OVERHEAD + cache_bytes)
            .ok_or(BadRules::TooLarge)?;
        // Held while the compiler works, so that many of them together stay within the memory too.
        let room = (memory.free() / COMPILER_PART).min(MAX_COMPILED_BYTES);
        if !held.grow(room) {
            return Err(BadRules::TooLarge);
        }
        let (expressions, effects): (Vec<_>, Vec<_>) =
            written.iter().filter_map(|rule| translate(rule)).unzip();
        let automaton = compile(&expressions, room, cache_bytes)?;
        held.shrink(room);
        let least_cache = least_cache(&automaton)?;
        let more = automaton.get_nfa().memory_usage() + least_cache.saturating_sub(cache_bytes);
        if !held.grow(more) {
            return Err(BadRules::TooLarge);
        }
        let cache = automaton.create_cache();
        let found = PatternSet::new(automaton.pattern_len());
        Ok(Self(Some(Arc::new(Compiled {
            written,
            automaton,
            matching: Mutex::new(Matching { cache, found }),
            effects,
            _held: held,
        }))))
    }

    /// Returns whether a name is excluded (`true`) or included; `None` if no rule matches. The name is relative to the
    /// directory that the rules are anchored at, its components joined by `/`.
    pub fn excludes(&self, name: &[u8], directory: bool) -> Option<bool> {
        let compiled = self.0.as_ref()?;
        let mut matching = lock(&compiled.matching);
        let Matching { cache, found } = &mut *matching;
        found.clear();
        let name = Input::new(name).anchored(Anchored::Yes);
        compiled
            .automaton
            .try_which_overlapping_matches(cache, &name, found)
            .ok()?;
        let effects = found.iter().rev().map(|rule| compiled.effects[rule]);
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

/// Compiles expressions to an automaton of at most `room` bytes, beside its cache.
fn compile(expressions: &[String], room: usize, cache_bytes: usize) -> Result<DFA, BadRules> {
    let cache = Config::new()
        .match_kind(MatchKind::All)
        .cache_capacity(cache_bytes)
        // The least that large rules need may be more, and is counted.
        .skip_cache_capacity_check(true);
    let bytes = syntax::Config::new()
        .unicode(false)
        .utf8(false)
        .dot_matches_new_line(true);
    let compiler = thompson::Config::new()
        .utf8(false)
        .nfa_size_limit(Some(room));
    DFA::builder()
        .configure(cache)
        .syntax(bytes)
        .thompson(compiler)
        .build_many(expressions)
        .map_err(|_| BadRules::TooLarge)
}

/// Returns the least bytes that the cache of an automaton takes.
fn least_cache(automaton: &DFA) -> Result<usize, BadRules> {
    automaton
        .get_config()
        .get_minimum_cache_capacity(automaton.get_nfa())
        .map_err(|_| BadRules::TooLarge)
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
