//! Detects names that the receiver's file system treats as equal. The first one is accepted; the others are refused
//! before anything is written. An existing name in another case is renamed to the sent name.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;

use crate::error::lock::lock;
use crate::error::{Code, Reason, Result};
use crate::protocol::path::{BadName, RelativePath, is_partial_name};
use crate::protocol::{Existing, ReceiveOptions};
use crate::storage::{Folding, Held, KeptShare, Store, has_forms, trimmed};

/// Names that a session remembers in folding directories. Beyond it, or beyond the memory of its connection, collisions
/// are not detected.
const MAX_NAMES: usize = 1 << 20;
/// Directories whose folding is remembered. Beyond it, they are probed again.
const MAX_DIRECTORIES: usize = 1 << 16;
/// Stored names that are remembered over all directories.
const MAX_STORED: usize = 1 << 20;
/// Memory in bytes for a name, a directory and a stored name, in tables that are up to half empty.
const NAME_COST: usize = 48;
const DIRECTORY_COST: usize = 32;
const STORED_COST: usize = 16;

/// The names of a session in folding directories.
pub(super) struct NameCollisions(Mutex<State>);

struct State {
    /// Folding of directories, by the digest of the folded path.
    directories: HashMap<Digest, KnownFolding>,
    /// Digests of sent paths, by the digests of their folded paths.
    names: HashMap<Digest, Digest>,
    /// The last directory in which, and above which, all names are distinct.
    plain: Option<RelativePath>,
    /// The stored names of directories that were read.
    stored: HashMap<Digest, HashSet<u64>>,
    /// The number of stored names when their directories were read.
    stored_names: usize,
    /// The file system chooses the spelling of names, and renaming does not change it.
    has_fixed_spelling: bool,
    /// More names were sent than the tables hold.
    overflows: bool,
    /// Counts the names, the directories and the stored names.
    held: Held,
    held_stored: Held,
}

/// The folding of a directory, as far as it was probed.
#[derive(Clone, Copy, Default)]
struct KnownFolding {
    folding: Folding,
    /// Whether normal forms were probed; only few names need it.
    form: bool,
}

/// The first half of a BLAKE3 digest; collisions are negligible.
type Digest = [u8; 16];

/// The folded form of a path.
struct FoldedPath {
    /// The folded path: equal for all paths to the same file.
    key: Vec<u8>,
    /// Whether any directory on the path folds names.
    folds: bool,
}

impl FoldedPath {
    fn new() -> Self {
        Self {
            key: Vec::new(),
            folds: false,
        }
    }

    fn push(&mut self, folding: Folding, component: &[u8]) {
        self.folds |= folding.any();
        self.key.push(b'/');
        self.key.extend(folding.key(component));
    }
}

impl NameCollisions {
    pub(super) fn new(memory: &KeptShare) -> Self {
        Self(Mutex::new(State {
            directories: HashMap::new(),
            names: HashMap::new(),
            plain: None,
            stored: HashMap::new(),
            stored_names: 0,
            has_fixed_spelling: false,
            overflows: false,
            held: memory.hold(),
            held_stored: memory.hold(),
        }))
    }

    /// Refuses a name that collides with another name of this session. Returns how its directory folds names. Blocks.
    pub(super) fn check(
        &self,
        store: &dyn Store,
        path: &RelativePath,
        dry_run: bool,
    ) -> Result<Folding, Reason> {
        let mut state = lock(&self.0);
        let has_forms = has_forms(path.as_bytes());
        if !has_forms && state.plain == path.parent() {
            return Ok(Folding::default());
        }
        let may_write = !dry_run;
        let mut folded_path = FoldedPath::new();
        let mut prefix = RelativePath::root();
        let mut folding = Folding::default();
        for component in path.components() {
            folding = state.folding_of(store, &folded_path, &prefix, component, may_write);
            if is_partial_name(&folding.key(component)) {
                return Err(BadName::Reserved.into());
            }
            prefix.push(component)?;
            folded_path.push(folding, component);
            if folded_path.folds && !state.remember(&folded_path, &prefix) {
                let text = "the receiver's file system treats it as equal to another name of this transfer; they differ in \
                            case, Unicode form or trailing dots; rename one of them";
                return Err(Reason::new(Code::BadName, format!("{path}: {text}")));
            }
        }
        if !folded_path.folds {
            state.plain = path.parent();
        }
        Ok(folding)
    }

    /// Renames an existing entry to the sent spelling if it is stored under another. Failure is harmless: both
    /// spellings open it. Blocks.
    pub(super) fn respell(
        &self,
        store: &dyn Store,
        path: &RelativePath,
        folding: Folding,
        destination: &RelativePath,
        options: &ReceiveOptions,
    ) {
        let replaces = matches!(options.existing, Existing::Update | Existing::Overwrite);
        // The user named the destination, so its spelling stays.
        let (Some(directory), Some(name)) = (path.parent(), path.name()) else {
            return;
        };
        if !folding.any() || !replaces || options.dry_run || destination == path {
            return;
        }
        let mut state = lock(&self.0);
        if state.has_fixed_spelling || state.is_stored(store, &directory, name, folding) {
            return;
        }
        match store.correct_spelling(path, folding) {
            Ok(spelled) => state.has_fixed_spelling = !spelled,
            Err(why) => tracing::debug!(%why, "cannot change the spelling of a name"),
        }
    }

    /// Records that a new directory inherits the folding of its parent.
    pub(super) fn made_directory(&self, path: &RelativePath) {
        let mut state = lock(&self.0);
        let Some(parent) = path.parent() else { return };
        let folded_parent = state.folded_path(&parent);
        let folded_path = state.folded_path(path);
        if let Some(known) = state.directories.get(&digest(&folded_parent.key)).copied() {
            state.remember_folding(&folded_path, known);
        }
    }

    /// Returns whether an existing path is another spelling of a sent one.
    pub(super) fn is_other_name(&self, path: &RelativePath) -> bool {
        let state = lock(&self.0);
        let folded_path = state.folded_path(path);
        folded_path.folds && state.names.contains_key(&digest(&folded_path.key))
    }

    /// Returns whether more names were sent than the tables hold.
    pub(super) fn overflows(&self) -> bool {
        lock(&self.0).overflows
    }
}

impl State {
    /// Returns how a directory folds names, as far as it matters for `name`.
    fn folding_of(
        &mut self,
        store: &dyn Store,
        folded_path: &FoldedPath,
        directory: &RelativePath,
        name: &[u8],
        may_write: bool,
    ) -> Folding {
        let form = has_forms(name);
        let known = self.directories.get(&digest(&folded_path.key)).copied();
        let wanted = Folding {
            case: known.is_none(),
            ends: known.is_none(),
            form: form && known.is_none_or(|known| !known.form),
        };
        let mut known = known.unwrap_or_default();
        if wanted.any() {
            let found = store.folding(directory, wanted, may_write);
            known.folding.case |= found.case;
            known.folding.ends |= found.ends;
            known.folding.form |= found.form;
            known.form |= form;
            self.remember_folding(folded_path, known);
        }
        known.folding
    }

    fn remember_folding(&mut self, folded_path: &FoldedPath, known: KnownFolding) {
        let key = digest(&folded_path.key);
        let is_known = self.directories.contains_key(&key);
        if !is_known
            && (self.directories.len() >= MAX_DIRECTORIES || !self.held.grow_table(DIRECTORY_COST))
        {
            self.held.shrink(DIRECTORY_COST * self.directories.len());
            self.directories = HashMap::new();
            // The one that is remembered now, even if other sessions have taken all the memory.
            self.held.grow_anyway(DIRECTORY_COST);
            // Without the directories, no spelling of a sent name is recognized.
            self.overflows |= !self.names.is_empty();
        }
        self.directories.insert(key, known);
    }

    /// Returns the folded form of a path, as far as its directories are known.
    fn folded_path(&self, path: &RelativePath) -> FoldedPath {
        let mut folded_path = FoldedPath::new();
        for component in path.components() {
            let known = self.directories.get(&digest(&folded_path.key)).copied();
            folded_path.push(known.unwrap_or_default().folding, component);
        }
        folded_path
    }

    /// Remembers a path. Returns `false` if a different path with the same folded form was sent.
    fn remember(&mut self, folded_path: &FoldedPath, path: &RelativePath) -> bool {
        let key = digest(&folded_path.key);
        let name = digest(path.as_bytes());
        match self.names.get(&key) {
            Some(first) => *first == name,
            None if self.names.len() < MAX_NAMES && self.held.grow_table(NAME_COST) => {
                self.names.insert(key, name).is_none()
            }
            None => {
                self.overflows = true;
                true
            }
        }
    }

    /// Returns whether a directory stores the exact spelling of a name, or the closest one it can keep. Reads the
    /// directory once.
    fn is_stored(
        &mut self,
        store: &dyn Store,
        directory: &RelativePath,
        name: &[u8],
        folding: Folding,
    ) -> bool {
        let key = digest(directory.as_bytes());
        if !self.stored.contains_key(&key) {
            let Some(names) = self.read_stored(store, directory) else {
                // Too many for the memory: the name keeps its spelling, which opens it as well.
                return true;
            };
            self.stored.insert(key, names);
        }
        let stored = self.stored.entry(key).or_default();
        if folding.ends && stored.contains(&short_digest(trimmed(name))) {
            return true;
        }
        self.held_stored.grow_anyway(STORED_COST);
        // The caller stores it in this spelling now.
        !stored.insert(short_digest(name))
    }
}

impl State {
    /// Reads the names that a directory stores; `None` if they do not fit in the memory. Forgets other directories
    /// first.
    fn read_stored(&mut self, store: &dyn Store, directory: &RelativePath) -> Option<HashSet<u64>> {
        for attempt in 0..2 {
            let mut names = HashSet::new();
            let mut held = 0;
            let mut fits = true;
            let read = store.visit(directory, &mut |name| {
                fits = self.stored_names + names.len() < MAX_STORED
                    && self.held_stored.grow_table(STORED_COST);
                if fits {
                    held += STORED_COST;
                    names.insert(short_digest(name));
                }
                fits
            });
            if fits {
                if let Err(why) = read {
                    tracing::debug!(%why, "cannot read how names are spelled");
                }
                self.stored_names += names.len() + 1;
                return Some(names);
            }
            self.held_stored.shrink(held);
            if attempt == 0 {
                self.stored = HashMap::new();
                self.stored_names = 0;
                self.held_stored.shrink(usize::MAX);
            }
        }
        None
    }
}

fn digest(name: &[u8]) -> Digest {
    let mut digest = Digest::default();
    digest.copy_from_slice(&blake3::hash(name).as_bytes()[..16]);
    digest
}

fn short_digest(name: &[u8]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = digest(name);
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}
