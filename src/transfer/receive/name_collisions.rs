//! Names that the receiver's file system takes for the same: the first stands, and every other is refused before anything of
//! it is written. What is found under a name of other case is given the name that was sent.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;

use super::{Receiver, lock};
use crate::error::{Code, Reason, Result};
use crate::protocol::Existing;
use crate::protocol::path::{BadName, RelativePath, is_partial_name};
use crate::storage::{Folding, Store, has_forms, trimmed};

/// Names that a session remembers where some are the same (48 bytes each); past it collisions are no longer found.
const MAX_NAMES: usize = 1 << 20;
/// Directories of which it is remembered which names are the same (20 bytes each); past it they are asked anew.
const MAX_DIRECTORIES: usize = 1 << 16;
/// Names, over all directories, of which it is remembered how they are stored (8 bytes each).
const MAX_STORED: usize = 1 << 20;

/// The names of a session, where some are the same.
#[derive(Default)]
pub(super) struct NameCollisions(Mutex<State>);

#[derive(Default)]
struct State {
    /// By the keys of their paths: names that are the same have the same key.
    directories: HashMap<Digest, Known>,
    /// Digests of paths as they were sent, by the digests of their keys.
    names: HashMap<Digest, Digest>,
    /// A directory in which, and above which, all names differ.
    plain: Option<RelativePath>,
    /// The names in directories as they are stored.
    stored: HashMap<Digest, HashSet<u64>>,
    /// How many those were when their directories were read.
    stored_names: usize,
    /// The file system shows names as it likes, whatever they are changed to.
    spells_itself: bool,
    /// More came than is remembered.
    overflows: bool,
}

/// What is known of a directory.
#[derive(Clone, Copy, Default)]
struct Known {
    folding: Folding,
    /// Whether it was asked about normal forms, which only few names have.
    form: bool,
}

/// Half of BLAKE3: enough that no two names meet.
type Digest = [u8; 16];

/// How the directories are known that a path leads through.
struct Way {
    /// What all paths have in common that lead to the same.
    key: Vec<u8>,
    /// Whether it differs from the path itself anywhere.
    folds: bool,
}

impl Way {
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

impl Receiver {
    /// Refuses a name that would fall on another of this session. Tells how its directory takes names.
    pub(super) fn check_case(&self, path: &RelativePath) -> Result<Folding, Reason> {
        let mut state = lock(&self.cases.0);
        let has_forms = has_forms(path.as_bytes());
        if !has_forms && state.plain == path.parent() {
            return Ok(Folding::default());
        }
        let may_write = !self.session.take.dry_run;
        let mut way = Way::new();
        let mut here = RelativePath::root();
        let mut folding = Folding::default();
        for component in path.components() {
            folding = state.ask(&*self.session.store, &way, &here, component, may_write);
            if is_partial_name(&folding.key(component)) {
                return Err(BadName::Reserved.into());
            }
            here.push(component)?;
            way.push(folding, component);
            if way.folds && !state.remember(&way, &here) {
                let text = "the filesystem there takes it for another name of this transfer, which differs in case, in its \
                            Unicode form or in dots at the end; rename one of them";
                return Err(Reason::new(Code::BadName, format!("{path}: {text}")));
            }
        }
        if !way.folds {
            state.plain = path.parent();
        }
        Ok(folding)
    }

    /// Gives what is found under a name exactly this name, where it is stored with another. A failure is no loss: it is
    /// found under both.
    pub(super) fn respell(&self, path: &RelativePath, folding: Folding) {
        let take = self.session.take;
        let replaces = matches!(take.existing, Existing::Update | Existing::Overwrite);
        // What the user named as the destination has the name that it has.
        let destination = self.session.place.directory() == path;
        let (Some(directory), Some(name)) = (path.parent(), path.name()) else {
            return;
        };
        if !folding.any() || !replaces || take.dry_run || destination {
            return;
        }
        let store = &*self.session.store;
        let mut state = lock(&self.cases.0);
        if state.spells_itself || state.is_stored(store, &directory, name, folding) {
            return;
        }
        match store.respell(path, folding) {
            Ok(spelled) => state.spells_itself = !spelled,
            Err(why) => tracing::debug!(%why, "it keeps its name"),
        }
    }

    /// Remembers that a directory was made in another, and takes names as that does.
    pub(super) fn made_directory(&self, path: &RelativePath) {
        let mut state = lock(&self.cases.0);
        let Some(parent) = path.parent() else { return };
        let above = state.way(&parent);
        let way = state.way(path);
        if let Some(known) = state.directories.get(&digest(&above.key)).copied() {
            state.know(&way, known);
        }
    }
}

impl NameCollisions {
    /// Whether a path that was found is another name of one that was sent.
    pub(super) fn is_other_name(&self, path: &RelativePath) -> bool {
        let state = lock(&self.0);
        let way = state.way(path);
        way.folds && state.names.contains_key(&digest(&way.key))
    }

    /// Whether more came than is remembered.
    pub(super) fn overflows(&self) -> bool {
        lock(&self.0).overflows
    }
}

impl State {
    /// How a directory takes names, as far as it matters for this one.
    fn ask(
        &mut self,
        store: &dyn Store,
        way: &Way,
        directory: &RelativePath,
        name: &[u8],
        may_write: bool,
    ) -> Folding {
        let form = has_forms(name);
        let known = self.directories.get(&digest(&way.key)).copied();
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
            self.know(way, known);
        }
        known.folding
    }

    fn know(&mut self, way: &Way, known: Known) {
        if self.directories.len() >= MAX_DIRECTORIES {
            self.directories.clear();
            // Without them, no other name is known any more.
            self.overflows |= !self.names.is_empty();
        }
        self.directories.insert(digest(&way.key), known);
    }

    /// The way to a path, as far as the directories on it are known.
    fn way(&self, path: &RelativePath) -> Way {
        let mut way = Way::new();
        for component in path.components() {
            let known = self.directories.get(&digest(&way.key)).copied();
            way.push(known.unwrap_or_default().folding, component);
        }
        way
    }

    /// Remembers a path; `false` if another one of the same key was sent.
    fn remember(&mut self, way: &Way, path: &RelativePath) -> bool {
        let key = digest(&way.key);
        let name = digest(path.as_bytes());
        match self.names.get(&key) {
            Some(first) => *first == name,
            None if self.names.len() < MAX_NAMES => self.names.insert(key, name).is_none(),
            None => {
                self.overflows = true;
                true
            }
        }
    }

    /// Whether a name that is found stands in its directory as it is, or as far as it can be kept. The directory is read once.
    fn is_stored(
        &mut self,
        store: &dyn Store,
        directory: &RelativePath,
        name: &[u8],
        folding: Folding,
    ) -> bool {
        let key = digest(directory.as_bytes());
        if !self.stored.contains_key(&key) {
            let names = store.names(directory).unwrap_or_default();
            self.stored_names += names.len() + 1;
            if self.stored_names > MAX_STORED {
                self.stored.clear();
                self.stored_names = names.len() + 1;
            }
            let short = names.iter().map(|name| short(name)).collect();
            self.stored.insert(key, short);
        }
        let stored = self.stored.entry(key).or_default();
        if folding.ends && stored.contains(&short(trimmed(name))) {
            return true;
        }
        // It will, from now on.
        !stored.insert(short(name))
    }
}

fn digest(name: &[u8]) -> Digest {
    let mut digest = Digest::default();
    digest.copy_from_slice(&blake3::hash(name).as_bytes()[..16]);
    digest
}

fn short(name: &[u8]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = digest(name);
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}
