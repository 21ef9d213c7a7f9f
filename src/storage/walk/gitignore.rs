//! What a walk excludes: the rules of the filter, and of the .gitignore files it finds.

use std::sync::Arc;

use crate::error::{Code, Reason};
use crate::protocol::Kind;
use crate::protocol::path::RelativePath;
use crate::storage::filter::{Filter, MAX_RULES_BYTES, Rules};
use crate::storage::store::Store;

/// The rules of one .gitignore, and those that apply where it has no match.
pub(crate) struct Scope {
    rules: Rules,
    /// The directory that the rules are anchored at, by its name on the wire.
    base: RelativePath,
    above: Option<Arc<Scope>>,
}

impl Scope {
    /// Returns the rules for a directory: its own before those from above. A directory with a `.git` is a repository of
    /// its own, and rules from above do not apply in it.
    pub(crate) fn of(
        store: &dyn Store,
        directory: &RelativePath,
        base: &RelativePath,
        above: Option<Arc<Self>>,
    ) -> Result<Option<Arc<Self>>, Reason> {
        let below = |name: &[u8]| directory.join(name).ok();
        let mut scope = above;
        if let Some(git) = below(b".git")
            && store.stat(&git).is_ok_and(|there| there.is_some())
        {
            let exclude = git
                .join(b"info")
                .and_then(|info| info.join(b"exclude"))
                .ok();
            scope = Self::with_file(
                store,
                exclude.filter(|path| is_file(store, path)),
                base,
                None,
            )?;
        }
        Self::with_file(
            store,
            below(b".gitignore").filter(|path| is_file(store, path)),
            base,
            scope,
        )
    }

    fn with_file(
        store: &dyn Store,
        file: Option<RelativePath>,
        base: &RelativePath,
        above: Option<Arc<Self>>,
    ) -> Result<Option<Arc<Self>>, Reason> {
        let Some(file) = file else { return Ok(above) };
        let rules = read_rules(store, &file).map_err(|why| {
            let text = format!("nothing in {base} was sent: cannot read its exclude rules: {why}");
            Reason::new(why.code, text)
        })?;
        Ok(Some(Arc::new(Self {
            rules,
            base: base.clone(),
            above,
        })))
    }

    fn excludes(&self, path: &RelativePath, directory: bool) -> bool {
        let mut scope = Some(self);
        while let Some(this) = scope {
            if let Some(excluded) = this.rules.excludes(below(&this.base, path), directory) {
                return excluded;
            }
            scope = this.above.as_deref();
        }
        false
    }
}

/// Whether to exclude an entry, by its name on the wire; `top` is the root of its tree. Rules are anchored at a source
/// directory, and never exclude it.
pub(crate) fn excludes(
    filter: &Filter,
    scope: Option<&Scope>,
    top: &RelativePath,
    path: &RelativePath,
    directory: bool,
) -> bool {
    let name = match below(top, path) {
        b"" if directory => return false,
        b"" => path.name().unwrap_or_default(),
        name => name,
    };
    let excluded = filter.rules.excludes(name, directory);
    excluded.unwrap_or_else(|| scope.is_some_and(|scope| scope.excludes(path, directory)))
}

/// The part of a path below a directory that contains it.
pub(crate) fn below<'a>(base: &RelativePath, path: &'a RelativePath) -> &'a [u8] {
    let below = path
        .as_bytes()
        .get(base.as_bytes().len()..)
        .unwrap_or_default();
    below.strip_prefix(b"/").unwrap_or(below)
}

/// Like git, ignores a .gitignore that is a symbolic link.
fn is_file(store: &dyn Store, path: &RelativePath) -> bool {
    store
        .stat(path)
        .ok()
        .flatten()
        .is_some_and(|metadata| metadata.kind == Some(Kind::File))
}

fn read_rules(store: &dyn Store, path: &RelativePath) -> Result<Rules, Reason> {
    let mut text = vec![0; MAX_RULES_BYTES + 1];
    let length = store
        .open(path)?
        .read_at(&mut text, 0)
        .map_err(|error| Reason::new(Code::Unreadable, format!("{path}: {error}")))?;
    Rules::of_file(&text[..length])
        .map_err(|bad| Reason::new(Code::Unsupported, format!("{path}: {bad}")))
}
