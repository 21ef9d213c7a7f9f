//! Filters: what a walk excludes, by the rules of .gitignore (gitignore(5)).

mod glob;
mod only;
mod pattern;
mod rules;

pub use only::Only;
pub use pattern::{Patterns, is_pattern};
pub use rules::{BadRules, MAX_RULES, MAX_RULES_BYTES, Rules, lines};

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
