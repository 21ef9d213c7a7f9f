//! Files with several names (hard links). The first name is sent. The others are announced as further names after the
//! first is settled.
//!
//! A link refers to the id of an entry, and a receiver knows only the ids of its own connection. So after a loss the
//! first name is announced again under a new id, before any other name. The receiver already has the file.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::protocol::{Attribute, Kind, MetadataWarning};
use crate::storage::walk::Announce;
use crate::storage::{FileId, Held, KeptShare};

/// Memory for a file whose other names may still come, in bytes: a place in a table that may be half empty. What does not
/// fit is sent once for each name. Only files with names that were not found yet count, and most trees have few.
const FILE_COST: usize = 80;
/// Memory for the first name of such a file beside its path, in bytes, if it is kept for another connection.
const FIRST_COST: usize = 512;
/// Names that may wait for the first name of their file.
pub(super) const MAX_WAITING: usize = 10_000;

/// The role of an entry among the names of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LinkRole {
    /// The file has no other names that matter.
    Alone,
    /// The first name; others may be linked to it.
    First(FileId),
    /// The first name again, for a receiver that does not know it. It is already settled and not counted again.
    Reannounced(FileId),
    /// A further name of the entry with this id.
    Name(FileId, u64),
}

#[derive(Default)]
pub(super) struct HardLinks {
    files: HashMap<FileId, LinkedFile>,
    /// Names that wait for the first name of their file.
    waiting_names: HashMap<FileId, Vec<Arc<Announce>>>,
    /// Whether first names are kept, to be announced again on another connection.
    reconnects: bool,
    /// Counts the files.
    held: Held,
    /// Names that can be announced now.
    ready: VecDeque<Arc<Announce>>,
    waiting: usize,
}

/// A file with several names.
struct LinkedFile {
    /// The first name, kept for [`LinkRole::Reannounced`]. It does not delay its directory.
    first: Option<Arc<Announce>>,
    state: First,
    /// Names that are not settled, in this tree or outside it.
    unsettled: u64,
    /// Memory that is held for it, in bytes.
    cost: usize,
}

enum First {
    /// The first name is announced and not settled.
    Unsettled,
    /// The receiver has the file under this id.
    Committed(u64),
    /// The file is committed, but the receiver does not know it on this connection.
    Unknown,
    /// The first name could not be sent; the next name becomes the first.
    Failed,
}

impl HardLinks {
    pub(super) fn new(memory: &KeptShare, reconnects: bool) -> Self {
        Self {
            reconnects,
            held: memory.hold(),
            ..Self::default()
        }
    }

    /// Returns a found file and its role; `None` if it must wait for the first name.
    pub(super) fn found(
        &mut self,
        announce: Arc<Announce>,
        warnings: &mut Vec<MetadataWarning>,
    ) -> Option<(Arc<Announce>, LinkRole)> {
        if announce.kind != Kind::File || announce.metadata.links < 2 || announce.pipe.is_some() {
            return Some((announce, LinkRole::Alone));
        }
        let id = announce.metadata.version.file;
        if self.files.contains_key(&id) {
            return self.place(announce);
        }
        let cost = self.cost(&announce);
        if !self.held.grow_table(cost) {
            MetadataWarning::count_one(warnings, Attribute::HardLink, || {
                format!(
                    "{}: too many files with further names for the memory of the session, so it is sent as a separate file",
                    announce.path
                )
            });
            return Some((announce, LinkRole::Alone));
        }
        let placed = self.place(announce);
        if let Some(file) = self.files.get_mut(&id) {
            file.cost = cost;
        }
        placed
    }

    /// Returns the memory that a file takes.
    fn cost(&self, first: &Announce) -> usize {
        let paths = first.source.as_bytes().len() + first.path.as_bytes().len();
        FILE_COST
            + if self.reconnects {
                FIRST_COST + paths
            } else {
                0
            }
    }

    fn place(&mut self, announce: Arc<Announce>) -> Option<(Arc<Announce>, LinkRole)> {
        let id = announce.metadata.version.file;
        let reconnects = self.reconnects;
        let lone = || {
            Arc::new(Announce {
                parent: None,
                held: None,
                ..Announce::clone(&announce)
            })
        };
        let file = self.files.entry(id).or_insert_with(|| LinkedFile {
            first: None,
            state: First::Failed,
            unsettled: announce.metadata.links,
            cost: 0,
        });
        match (&file.state, &file.first) {
            (First::Committed(first), _) => Some((announce, LinkRole::Name(id, *first))),
            (First::Failed, _) | (First::Unknown, None) => {
                file.state = First::Unsettled;
                file.first = reconnects.then(lone);
                Some((announce, LinkRole::First(id)))
            }
            (First::Unsettled, _) => {
                self.wait(id, announce);
                None
            }
            (First::Unknown, Some(first)) => {
                let first = first.clone();
                file.state = First::Unsettled;
                self.wait(id, announce);
                Some((first, LinkRole::Reannounced(id)))
            }
        }
    }

    /// Keeps a name until the first name of its file is settled.
    fn wait(&mut self, id: FileId, announce: Arc<Announce>) {
        self.waiting_names.entry(id).or_default().push(announce);
        self.waiting += 1;
    }

    /// Releases the names that waited for the first name of a file.
    fn release(&mut self, id: FileId) {
        let names = self.waiting_names.remove(&id).unwrap_or_default();
        self.waiting -= names.len();
        self.ready.extend(names);
    }

    /// Returns the next name that can be announced.
    pub(super) fn next(&mut self) -> Option<(Arc<Announce>, LinkRole)> {
        while let Some(announce) = self.ready.pop_front() {
            if let Some(placed) = self.place(announce) {
                return Some(placed);
            }
        }
        None
    }

    /// Records that an entry is settled, and releases the names that waited for it. `is_committed` says whether the
    /// receiver has it now, so that others can be linked to it.
    pub(super) fn settled(&mut self, id: u64, role: LinkRole, is_committed: bool) {
        let (LinkRole::First(file_id)
        | LinkRole::Reannounced(file_id)
        | LinkRole::Name(file_id, _)) = role
        else {
            return;
        };
        let Some(file) = self.files.get_mut(&file_id) else {
            return;
        };
        if matches!(role, LinkRole::First(_) | LinkRole::Reannounced(_)) {
            file.state = if is_committed {
                First::Committed(id)
            } else {
                First::Failed
            };
        }
        if !matches!(role, LinkRole::Reannounced(_)) {
            file.unsettled = file.unsettled.saturating_sub(1);
        }
        if file.unsettled == 0
            && let Some(file) = self.files.remove(&file_id)
        {
            self.held.shrink(file.cost);
        }
        if !matches!(role, LinkRole::Name(..)) {
            self.release(file_id);
        }
    }

    /// Prepares an unsettled entry for the next connection. Returns false if it keeps its own id.
    pub(super) fn reannounce(&mut self, announce: &Arc<Announce>, role: LinkRole) -> bool {
        match role {
            LinkRole::Alone | LinkRole::First(_) => false,
            LinkRole::Name(..) => {
                self.ready.push_back(announce.clone());
                true
            }
            LinkRole::Reannounced(file_id) => {
                if let Some(file) = self.files.get_mut(&file_id) {
                    file.state = First::Unknown;
                    self.release(file_id);
                }
                true
            }
        }
    }

    /// Starts a connection, whose receiver knows none of the files.
    pub(super) fn start_connection(&mut self) {
        for file in self
            .files
            .values_mut()
            .filter(|file| matches!(file.state, First::Committed(_)))
        {
            file.state = First::Unknown;
        }
    }

    /// Returns the number of found names that are not announced.
    pub(super) fn pending(&self) -> usize {
        self.waiting + self.ready.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::path::RelativePath;
    use crate::storage::walk::Tree;
    use crate::storage::{MemoryStore, Store};

    /// Makes a name of a file that has `links` names.
    fn name(name: &str, file: u64, links: u64) -> Arc<Announce> {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let path = RelativePath::from_components([name]).unwrap();
        let mut metadata = store.stat(&RelativePath::root()).unwrap().unwrap();
        metadata.links = links;
        metadata.version.file = FileId {
            device: 1,
            inode: file,
        };
        let tree = Arc::new(Tree {
            store,
            path: path.clone(),
            name: name.into(),
            directory: false,
        });
        let pipe = Arc::new(crate::storage::pipe::Pipe::new(std::io::empty()));
        let announce = Announce::of_pipe(name.as_bytes(), pipe).unwrap();
        Arc::new(Announce {
            tree,
            metadata,
            pipe: None,
            ..announce
        })
    }

    fn found(names: &mut HardLinks, announce: Arc<Announce>) -> Option<LinkRole> {
        names.found(announce, &mut Vec::new()).map(|(_, role)| role)
    }

    fn next(names: &mut HardLinks) -> Option<(String, LinkRole)> {
        names
            .next()
            .map(|(announce, role)| (announce.path.to_string(), role))
    }

    #[test]
    fn names_wait_for_the_first_and_are_dropped_when_settled() {
        let mut names = HardLinks::new(&KeptShare::default(), true);
        let file_id = FileId {
            device: 1,
            inode: 7,
        };
        assert_eq!(
            found(&mut names, name("alone", 1, 1)),
            Some(LinkRole::Alone)
        );
        assert_eq!(
            found(&mut names, name("a", 7, 3)),
            Some(LinkRole::First(file_id))
        );
        assert_eq!(found(&mut names, name("b", 7, 3)), None);
        assert_eq!(names.pending(), 1);
        names.settled(5, LinkRole::First(file_id), true);
        assert_eq!(
            next(&mut names),
            Some(("b".into(), LinkRole::Name(file_id, 5)))
        );
        assert_eq!(
            found(&mut names, name("c", 7, 3)),
            Some(LinkRole::Name(file_id, 5))
        );
        names.settled(6, LinkRole::Name(file_id, 5), true);
        names.settled(8, LinkRole::Name(file_id, 5), false);
        assert!(names.files.is_empty() && names.pending() == 0);
    }

    #[test]
    fn the_next_name_becomes_first_when_the_first_fails() {
        let mut names = HardLinks::new(&KeptShare::default(), true);
        let file_id = FileId {
            device: 1,
            inode: 7,
        };
        found(&mut names, name("a", 7, 3));
        found(&mut names, name("b", 7, 3));
        found(&mut names, name("c", 7, 3));
        names.settled(0, LinkRole::First(file_id), false);
        assert_eq!(
            next(&mut names),
            Some(("b".into(), LinkRole::First(file_id)))
        );
        assert_eq!(next(&mut names), None);
        names.settled(1, LinkRole::First(file_id), true);
        assert_eq!(
            next(&mut names),
            Some(("c".into(), LinkRole::Name(file_id, 1)))
        );
    }

    #[test]
    fn the_first_name_is_reannounced_if_names_are_left() {
        let mut names = HardLinks::new(&KeptShare::default(), true);
        let file_id = FileId {
            device: 1,
            inode: 7,
        };
        found(&mut names, name("a", 7, 3));
        names.settled(0, LinkRole::First(file_id), true);
        let b = name("b", 7, 3);
        assert_eq!(
            found(&mut names, b.clone()),
            Some(LinkRole::Name(file_id, 0))
        );
        // The connection is lost before the entry is settled, and so is the next one.
        for again in [4, 9] {
            assert!(names.reannounce(&b, LinkRole::Name(file_id, 0)));
            names.start_connection();
            assert_eq!(
                next(&mut names),
                Some(("a".into(), LinkRole::Reannounced(file_id)))
            );
            assert_eq!(next(&mut names), None);
            if again == 4 {
                names.reannounce(&b, LinkRole::Reannounced(file_id));
                assert_eq!(names.ready.len(), 1);
                names.ready.clear();
                continue;
            }
            names.settled(again, LinkRole::Reannounced(file_id), true);
            assert_eq!(
                next(&mut names),
                Some(("b".into(), LinkRole::Name(file_id, 9)))
            );
        }
        names.settled(10, LinkRole::Name(file_id, 9), true);
        names.start_connection();
        assert_eq!(next(&mut names), None);
    }
}
