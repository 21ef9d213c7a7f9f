//! What a walk excludes: the rules of the filter, and of the .gitignore files it finds.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::error::lock::lock;
use crate::error::{Code, Reason};
use crate::protocol::Kind;
use crate::protocol::path::RelativePath;
use crate::storage::filter::{BadRules, Filter, MAX_RULES_BYTES, Rules, lines};
use crate::storage::kept_memory::KeptShare;
use crate::storage::store::Store;

/// Compiled files that are kept after their directories were left, in case the next directory has the same rules.
const MAX_RECENT: usize = 8;

/// The files of rules that a walk has read. Their memory is counted, and freed when a directory was left, except for
/// that of the last ones.
#[derive(Default)]
pub(crate) struct RuleFiles {
    memory: KeptShare,
    /// The last compiled rules, by the digests of their text.
    recent: Mutex<VecDeque<(blake3::Hash, Rules)>>,
}

impl RuleFiles {
    pub(crate) fn new(memory: KeptShare) -> Self {
        Self {
            memory,
            recent: Mutex::default(),
        }
    }

    /// Compiles the text of a file, unless the same text was compiled a short time ago.
    fn compile(&self, text: &[u8]) -> Result<Rules, BadRules> {
        let digest = blake3::hash(text);
        let mut recent = lock(&self.recent);
        if let Some((_, rules)) = recent.iter().find(|(known, _)| *known == digest) {
            return Ok(rules.clone());
        }
        let rules = Rules::within(lines(text), &self.memory).or_else(|bad| {
            if recent.is_empty() {
                return Err(bad);
            }
            // Rules that no open directory uses may leave room for these.
            recent.clear();
            Rules::within(lines(text), &self.memory)
        })?;
        recent.truncate(MAX_RECENT - 1);
        recent.push_front((digest, rules.clone()));
        Ok(rules)
    }

    fn read(&self, store: &dyn Store, path: &RelativePath) -> Result<Rules, Reason> {
        let mut text = vec![0; MAX_RULES_BYTES + 1];
        let length = store
            .open(path)?
            .read_at(&mut text, 0)
            .map_err(|error| Reason::new(Code::Unreadable, format!("{path}: {error}")))?;
        self.compile(&text[..length])
            .map_err(|bad| Reason::new(Code::Unsupported, format!("{path}: {bad}")))
    }
}

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
        files: &RuleFiles,
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
                files,
                exclude.filter(|path| is_file(store, path)),
                base,
                None,
            )?;
        }
        Self::with_file(
            store,
            files,
            below(b".gitignore").filter(|path| is_file(store, path)),
            base,
            scope,
        )
    }

    fn with_file(
        store: &dyn Store,
        files: &RuleFiles,
        file: Option<RelativePath>,
        base: &RelativePath,
        above: Option<Arc<Self>>,
    ) -> Result<Option<Arc<Self>>, Reason> {
        let Some(file) = file else { return Ok(above) };
        let rules = files.read(store, &file).map_err(|why| {
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
