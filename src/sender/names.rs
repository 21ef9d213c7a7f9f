//! Files with several names (hard links): the first is sent, and the others as further names of it, once it stands.
//!
//! What stands is told by the id of an entry, and a receiver knows only those of its own connection. So after a loss the
//! first name is announced once more, under a new id, before any other that is still to come; it is there already.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::manifest::Announce;
use crate::wire::{Aspect, Kind, Unkept};

/// Files whose other names may still come, at some 400 bytes each: 100 MB. Past it a file with several names is sent under
/// each of them. Only those are counted of which some name has not been met: most trees have few.
const MAX_FILES: usize = 262_144;
/// Names that may wait for the first of their file.
pub(super) const MAX_WAITING: usize = 10_000;

/// Device and inode.
type FileId = (u64, u64);

/// What an entry is to the other names of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// It has none that matter.
    Alone,
    /// Others may be linked to it.
    First(FileId),
    /// The first name once more, for a receiver that does not know it. It is settled already, and not counted again.
    Again(FileId),
    /// A further name of the entry with this id.
    Name(FileId, u64),
}

#[derive(Default)]
pub(super) struct Names {
    files: HashMap<FileId, File>,
    /// Names whose turn has come.
    ready: VecDeque<Arc<Announce>>,
    waiting: usize,
}

/// A file with several names.
struct File {
    /// Its first name, kept for [`Role::Again`]; it holds up no directory.
    first: Arc<Announce>,
    state: First,
    /// Names that are not settled, in this tree or outside of it.
    left: u64,
    waiting: Vec<Arc<Announce>>,
}

enum First {
    /// It is announced and not settled.
    Unsettled,
    /// The receiver has it under this id.
    Stands(u64),
    /// It stands, but the receiver has not heard of it on this connection.
    Unheard,
    /// It could not be sent: the next name is the first now.
    Failed,
}

impl Names {
    /// What to announce of something that was found, and as what; `None` when it has to wait for the first name.
    pub(super) fn found(&mut self, announce: Arc<Announce>, unkept: &mut Vec<Unkept>) -> Option<(Arc<Announce>, Role)> {
        if announce.kind != Kind::File || announce.metadata.links < 2 {
            return Some((announce, Role::Alone));
        }
        let id = announce.metadata.version.file;
        if self.files.len() >= MAX_FILES && !self.files.contains_key(&id) {
            Unkept::count_one(unkept, Aspect::HardLink, || {
                format!("{}: more than {MAX_FILES} files with further names", announce.path)
            });
            return Some((announce, Role::Alone));
        }
        self.place(announce)
    }

    fn place(&mut self, announce: Arc<Announce>) -> Option<(Arc<Announce>, Role)> {
        let id = announce.metadata.version.file;
        let lone = || Arc::new(Announce { parent: None, ..Announce::clone(&announce) });
        let file = self.files.entry(id).or_insert_with(|| File {
            first: lone(),
            state: First::Failed,
            left: announce.metadata.links,
            waiting: Vec::new(),
        });
        match file.state {
            First::Stands(first) => Some((announce, Role::Name(id, first))),
            First::Failed => {
                (file.state, file.first) = (First::Unsettled, lone());
                Some((announce, Role::First(id)))
            }
            First::Unsettled => {
                file.waiting.push(announce);
                self.waiting += 1;
                None
            }
            First::Unheard => {
                file.state = First::Unsettled;
                file.waiting.push(announce);
                self.waiting += 1;
                Some((file.first.clone(), Role::Again(id)))
            }
        }
    }

    /// The next whose turn has come.
    pub(super) fn next(&mut self) -> Option<(Arc<Announce>, Role)> {
        while let Some(announce) = self.ready.pop_front() {
            if let Some(placed) = self.place(announce) {
                return Some(placed);
            }
        }
        None
    }

    /// An entry is settled; what waited for it has its turn now.
    pub(super) fn settled(&mut self, id: u64, role: Role, stands: bool) {
        let (Role::First(of) | Role::Again(of) | Role::Name(of, _)) = role else { return };
        let Some(file) = self.files.get_mut(&of) else { return };
        if matches!(role, Role::First(_) | Role::Again(_)) {
            file.state = if stands { First::Stands(id) } else { First::Failed };
            self.waiting -= file.waiting.len();
            self.ready.extend(file.waiting.drain(..));
        }
        if !matches!(role, Role::Again(_)) {
            file.left = file.left.saturating_sub(1);
        }
        if file.left == 0 {
            self.files.remove(&of);
        }
    }

    /// An entry on which nothing was heard comes again; false when it does so under its own id.
    pub(super) fn comes_again(&mut self, announce: &Arc<Announce>, role: Role) -> bool {
        match role {
            Role::Alone | Role::First(_) => false,
            Role::Name(..) => {
                self.ready.push_back(announce.clone());
                true
            }
            Role::Again(of) => {
                if let Some(file) = self.files.get_mut(&of) {
                    file.state = First::Unheard;
                    self.waiting -= file.waiting.len();
                    self.ready.extend(file.waiting.drain(..));
                }
                true
            }
        }
    }

    /// There is another receiver, which has heard of none of them.
    pub(super) fn begin_anew(&mut self) {
        for file in self.files.values_mut().filter(|file| matches!(file.state, First::Stands(_))) {
            file.state = First::Unheard;
        }
    }

    /// Names that are found and not announced.
    pub(super) fn pending(&self) -> usize {
        self.waiting + self.ready.len()
    }
}
