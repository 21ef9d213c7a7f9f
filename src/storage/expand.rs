//! Expands patterns in a path as a shell does: the matches, in the byte order of names.

use super::filter::{Patterns, is_pattern};
use super::kept_memory::{Held, KeptShare};
use super::store::Store;
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;

/// Most paths that one pattern may expand to.
const MAX_MATCHES: usize = 100_000;
/// Memory for a match beside its path, which is kept twice: in the list of sources and in a session's tree.
const MATCH_OVERHEAD: usize = 160;
/// Most names to look at for all patterns of a request: seconds of disk time.
const MAX_LOOKED_AT: usize = 4_000_000;

/// The result of expanding a path.
pub(crate) struct Expanded {
    /// Existing paths; a path without a pattern is returned unchecked.
    pub(crate) paths: Vec<RelativePath>,
    /// Whether a pattern was expanded.
    pub(crate) by_pattern: bool,
}

/// What a request may still look at, and the memory of what it has found.
pub(crate) struct Effort {
    names: usize,
    held: Held,
}

impl Effort {
    /// The effort of a request whose matches are counted.
    pub(crate) fn within(memory: &KeptShare) -> Self {
        Self {
            names: MAX_LOOKED_AT,
            held: memory.hold(),
        }
    }

    /// Returns the memory of the matches, to be kept as long as they are.
    pub(crate) fn into_held(self) -> Held {
        self.held
    }

    fn spend(&mut self) {
        self.names = self.names.saturating_sub(1);
    }

    /// Counts a match; `false` above the limits.
    fn keep(&mut self, path: &RelativePath) -> bool {
        self.names > 0
            && self
                .held
                .grow_table(MATCH_OVERHEAD + 2 * path.as_bytes().len())
    }
}

/// Expands the patterns in a path; none follows a symbolic link. A component is no pattern if an entry of exactly this
/// name exists. Blocks.
///
/// # Errors
/// [`Code::NotFound`] with the pattern when nothing matches; the error of an unreadable directory if nothing else
/// matches; an error when the limits are exceeded.
pub(crate) fn expand(
    store: &dyn Store,
    path: &RelativePath,
    effort: &mut Effort,
) -> Result<Expanded, Reason> {
    let mut paths = vec![RelativePath::root()];
    let mut by_pattern = false;
    let mut failed = None;
    for component in path.components() {
        if !is_pattern(component) {
            paths = paths
                .iter()
                .map(|path| path.join(component))
                .collect::<Result<_, _>>()?;
            continue;
        }
        let patterns = Patterns::new([component])
            .map_err(|bad| Reason::new(Code::BadName, format!("{path}: {bad}")))?;
        let mut found = Vec::new();
        for directory in paths {
            let literal = directory.join(component)?;
            if store.stat(&literal).is_ok_and(|there| there.is_some()) {
                found.push(literal);
                continue;
            }
            by_pattern = true;
            let before = found.len();
            match add_matches(store, &directory, &patterns, effort, &mut found) {
                Ok(()) => found[before..].sort_unstable_by(|a, b| a.as_bytes().cmp(b.as_bytes())),
                Err(why) if matches!(why.code, Code::NoSpace) => return Err(above_the_limit(path)),
                Err(why) => failed = failed.or(Some(why)),
            }
        }
        paths = found;
    }
    if by_pattern {
        // A component after a pattern may not exist in every match.
        paths.retain(|path| store.stat(path).is_ok_and(|there| there.is_some()));
        if paths.is_empty() {
            let readable = |why: &Reason| {
                matches!(
                    why.code,
                    Code::NotFound | Code::NotDirectory | Code::Symlink
                )
            };
            let nothing = || {
                Reason::new(
                    Code::NotFound,
                    format!("{path}: nothing matches; check the pattern"),
                )
            };
            return Err(failed.filter(|why| !readable(why)).unwrap_or_else(nothing));
        }
    }
    Ok(Expanded { paths, by_pattern })
}

fn above_the_limit(path: &RelativePath) -> Reason {
    let text = format!(
        "{path}: the pattern matches too many files, or reads too large directories; use a narrower one"
    );
    Reason::new(Code::NoSpace, text)
}

/// Adds the matches in a directory. Fails with [`Code::NoSpace`] above the limits.
fn add_matches(
    store: &dyn Store,
    directory: &RelativePath,
    patterns: &Patterns,
    effort: &mut Effort,
    found: &mut Vec<RelativePath>,
) -> Result<(), Reason> {
    let mut result = Ok(());
    // A directory costs as much as a name.
    effort.spend();
    store.visit(directory, &mut |name| {
        effort.spend();
        if effort.names == 0 || found.len() >= MAX_MATCHES {
            result = Err(Code::NoSpace.into());
        } else if patterns.matches(name) {
            match directory.join(name) {
                Ok(path) if effort.keep(&path) => found.push(path),
                Ok(_) => result = Err(Code::NoSpace.into()),
                Err(bad) => result = Err(bad.into()),
            }
        }
        result.is_ok()
    })?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Durability;
    use crate::storage::{MemoryStore, PartialKey};

    fn path(path: &str) -> RelativePath {
        RelativePath::from_components(path.split('/').filter(|c| !c.is_empty())).unwrap()
    }

    fn store(names: &[&str]) -> MemoryStore {
        let store = MemoryStore::new();
        for name in names {
            let key = PartialKey {
                owner: [0; 32],
                size: 0,
                modified: None,
            };
            store
                .create(&path(name), &key)
                .unwrap()
                .commit(&Default::default(), Durability::Visible)
                .unwrap();
        }
        store
    }

    fn expanded(store: &MemoryStore, pattern: &str) -> Result<Vec<String>, String> {
        let expanded = expand(
            store,
            &path(pattern),
            &mut Effort::within(&KeptShare::default()),
        );
        expanded
            .map(|all| all.paths.iter().map(ToString::to_string).collect())
            .map_err(|why| why.to_string())
    }

    #[test]
    fn matches_are_sorted_and_no_match_is_an_error() {
        let store = store(&[
            "logs/b.gz",
            "logs/a.gz",
            "logs/.c.gz",
            "logs/a.txt",
            "x/1/log",
            "x/2/log",
            "x/3/other",
            "f",
        ]);
        assert_eq!(
            expanded(&store, "logs/*.gz").unwrap(),
            ["logs/a.gz", "logs/b.gz"]
        );
        assert_eq!(expanded(&store, "logs/.*").unwrap(), ["logs/.c.gz"]);
        assert_eq!(expanded(&store, "x/*/log").unwrap(), ["x/1/log", "x/2/log"]);
        assert_eq!(expanded(&store, "*/*/log").unwrap(), ["x/1/log", "x/2/log"]);
        assert_eq!(
            expanded(&store, "f/*").unwrap_err(),
            "f/*: nothing matches; check the pattern"
        );
        assert_eq!(
            expanded(&store, "logs/*.zip").unwrap_err(),
            "logs/*.zip: nothing matches; check the pattern"
        );
        assert_eq!(
            expanded(&store, "nowhere").unwrap(),
            ["nowhere"],
            "no pattern, so nothing is looked at"
        );
    }

    #[test]
    fn an_existing_name_is_not_a_pattern() {
        let store = store(&["a[1].jpg", "a1.jpg", "*/f", "d/f"]);
        assert_eq!(expanded(&store, "a[1].jpg").unwrap(), ["a[1].jpg"]);
        assert_eq!(expanded(&store, "*/f").unwrap(), ["*/f"]);
        assert_eq!(expanded(&store, "a[12].jpg").unwrap(), ["a1.jpg"]);
    }

    #[test]
    fn the_effort_for_patterns_is_limited() {
        let names: Vec<_> = (0..50).map(|i| format!("{}/{i}", i % 5)).collect();
        let store = store(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let mut effort = Effort::within(&KeptShare::default());
        effort.names = 30;
        let why = expand(&store, &path("*/*"), &mut effort).err().unwrap();
        assert!(why.to_string().contains("too many"), "{why}");
        assert_eq!(effort.names, 0, "and all of a request shares it");
        // In a backtracking matcher the time doubles with each star.
        let long = store_with_a_long_name();
        assert!(expanded(&long, &format!("{}b", "*a".repeat(100))).is_err());
    }

    #[test]
    fn matches_stay_within_the_memory() {
        let store = store(&["a", "b", "c"]);
        let share = KeptShare::whole(3 * (MATCH_OVERHEAD + 2));
        let mut effort = Effort::within(&share);
        let why = expand(&store, &path("*"), &mut effort).err().unwrap();
        assert!(why.to_string().contains("too many"), "{why}");
        drop(effort);
        let mut effort = Effort::within(&share);
        drop(expand(&store, &path("[ab]"), &mut effort).unwrap());
        let left = share.free();
        drop(effort.into_held());
        assert_eq!(share.free(), left + 2 * (MATCH_OVERHEAD + 2));
    }

    fn store_with_a_long_name() -> MemoryStore {
        store(&[&"a".repeat(255)])
    }
}
