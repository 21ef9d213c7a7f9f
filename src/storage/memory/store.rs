//! Files in memory, as a store.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::behaviour::Behaviour;
use super::content::Content;
use super::nodes::NodeContent;
use super::shared::Shared;
use super::upload::MemoryUpload;
use crate::error::{Code, Reason};
use crate::protocol::Kind;
use crate::protocol::path::RelativePath;
use crate::storage::folding::{Folding, trimmed};
use crate::storage::io_errors::{check_target, fault, refusal};
use crate::storage::metadata::{Attributes, Metadata, MetadataWarnings, PERMISSIONS};
use crate::storage::source::Source;
use crate::storage::store::{Store, TimeProbe};
use crate::storage::upload::{PartialKey, Upload};

/// Default capacity of a store in bytes (1 GiB).
const DEFAULT_CAPACITY: u64 = 1 << 30;

/// Files in memory as a [`Store`]: for tests, and for programs whose uploads never reach a disk.
///
/// It behaves like [`LocalStore`](crate::storage::LocalStore), but its content ends with the process. Clones share
/// their content. Reading the names of a directory takes time proportional to the size of the whole store.
#[derive(Clone)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// Creates an empty store with a capacity of 1 GiB.
    pub fn new() -> Self {
        Self::with_capacity(DEFAULT_CAPACITY)
    }

    /// Creates an empty store. Writes beyond the capacity, partials included, fail as on a full disk.
    pub fn with_capacity(bytes: u64) -> Self {
        Self::with_behaviour(bytes, Behaviour::default())
    }

    /// Creates an empty store of the same capacity that acts as a slow disk: each write blocks for `delay`.
    pub fn with_write_delay(self, delay: Duration) -> Self {
        let behaviour = Behaviour {
            write_delay: delay,
            ..Behaviour::default()
        };
        Self::with_behaviour(self.shared.capacity, behaviour)
    }

    /// Creates an empty store of the same capacity that keeps only what FAT keeps: no modes, no hard links, times of
    /// even seconds, and names that ignore case, Unicode form and trailing dots.
    pub fn like_fat(self) -> Self {
        let behaviour = Behaviour {
            fat: true,
            ..Behaviour::default()
        };
        Self::with_behaviour(self.shared.capacity, behaviour)
    }

    /// Creates an empty store of the same capacity that reports size 0 for every file, as /proc does.
    pub fn hiding_sizes(self) -> Self {
        let behaviour = Behaviour {
            hides_sizes: true,
            ..Behaviour::default()
        };
        Self::with_behaviour(self.shared.capacity, behaviour)
    }

    fn with_behaviour(capacity: u64, behaviour: Behaviour) -> Self {
        Self {
            shared: Arc::new(Shared::new(capacity, behaviour)),
        }
    }

    /// Returns the most uploads that were inside `write_at` or `commit` at the same time.
    pub fn peak_writes(&self) -> usize {
        self.shared.peak()
    }
}

impl Store for MemoryStore {
    fn stat(&self, path: &RelativePath) -> Result<Option<Metadata>, Reason> {
        let path = &self.shared.fold(path);
        let found = self.shared.lock().nodes.find(path)?;
        Ok(found.map(|node| self.shared.behaviour.reported(node.metadata)))
    }

    fn names(&self, directory: &RelativePath) -> Result<Vec<Vec<u8>>, Reason> {
        let directory = &self.shared.fold(directory);
        let state = self.shared.lock();
        match state.nodes.must_find(directory)?.content.kind() {
            Kind::Directory => {}
            Kind::Symlink => return Err(refusal(Code::Symlink, directory)),
            Kind::File => return Err(refusal(Code::NotDirectory, directory)),
        }
        let inside = state
            .nodes
            .paths()
            .filter(|path| path.parent().as_ref() == Some(directory));
        Ok(inside
            .filter_map(|path| path.name().map(<[u8]>::to_vec))
            .collect())
    }

    fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Reason> {
        let path = &self.shared.fold(path);
        match self.shared.lock().nodes.must_find(path)?.content {
            NodeContent::Symlink(target) => Ok(target),
            _ => Err(Reason::new(
                Code::Unreadable,
                format!("{path}: it is not a symbolic link"),
            )),
        }
    }

    fn open(&self, path: &RelativePath) -> Result<Box<dyn Source>, Reason> {
        let path = &self.shared.fold(path);
        let node = self.shared.lock().nodes.must_find(path)?;
        match node.content {
            NodeContent::File(content) => Ok(Box::new(MemorySource {
                content,
                metadata: self.shared.behaviour.reported(node.metadata),
            })),
            NodeContent::Directory => Err(refusal(Code::IsDirectory, path)),
            NodeContent::Symlink(_) => Err(refusal(Code::Symlink, path)),
        }
    }

    fn create(&self, path: &RelativePath, key: &PartialKey) -> Result<Box<dyn Upload>, Reason> {
        let path = &self.shared.fold(path);
        Ok(Box::new(MemoryUpload::create(&self.shared, path, key)?))
    }

    fn make_directory(&self, path: &RelativePath) -> Result<(), Reason> {
        let path = &self.shared.fold(path);
        self.shared.lock().nodes.make_private_directory(path)
    }

    fn set_attributes(
        &self,
        path: &RelativePath,
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        let path = &self.shared.fold(path);
        let mut state = self.shared.lock();
        let node = state.nodes.must_find(path)?;
        if matches!(node.content, NodeContent::Symlink(_)) {
            return Err(refusal(Code::Symlink, path));
        }
        let (attributes, warnings) = self.shared.behaviour.split_attributes(attributes);
        state.nodes.change(path, node, &attributes);
        Ok(warnings)
    }

    fn make_symlink(
        &self,
        path: &RelativePath,
        target: &[u8],
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        let path = &self.shared.fold(path);
        check_target(path, target)?;
        let mut state = self.shared.lock();
        state.nodes.prepare_name_for(path, attributes)?;
        let (attributes, _) = self.shared.behaviour.split_attributes(attributes);
        let content = NodeContent::Symlink(target.to_vec());
        state
            .nodes
            .put(path, content, PERMISSIONS, attributes.modified);
        Ok(MetadataWarnings::new())
    }

    fn link(&self, existing: &RelativePath, new: &RelativePath) -> Result<(), Reason> {
        let existing = &self.shared.fold(existing);
        let new = &self.shared.fold(new);
        let mut state = self.shared.lock();
        let node = state.nodes.must_find(existing)?;
        match node.content {
            NodeContent::File(_) if self.shared.behaviour.fat => {
                return Err(fault(new, "create the hard link", Errno::PERM));
            }
            NodeContent::File(_) => {}
            NodeContent::Directory => return Err(refusal(Code::IsDirectory, existing)),
            NodeContent::Symlink(_) => return Err(refusal(Code::Symlink, existing)),
        }
        state.nodes.prepare_name(new)?;
        state.nodes.link(node, new)
    }

    fn remove(&self, path: &RelativePath) -> Result<(), Reason> {
        let path = &self.shared.fold(path);
        let mut state = self.shared.lock();
        if path.is_root() {
            return Err(refusal(Code::IsDirectory, path));
        }
        state.nodes.must_find(path)?;
        if state
            .nodes
            .paths()
            .chain(state.partials.keys().map(|slot| &slot.path))
            .any(|there| there.parent().as_ref() == Some(path))
        {
            return Err(fault(path, "remove it", Errno::NOTEMPTY));
        }
        state.nodes.remove(path);
        Ok(())
    }

    fn folding(&self, _: &RelativePath, _: Folding, _: bool) -> Folding {
        match self.shared.behaviour.fat {
            true => Folding::ALL,
            false => Folding::default(),
        }
    }

    fn correct_spelling(&self, path: &RelativePath, _: Folding) -> Result<bool, Reason> {
        let stored = self.shared.fold(path);
        let new = match (stored.parent(), path.name()) {
            (Some(parent), Some(name)) => parent.join(trimmed(name))?,
            _ => return Ok(true),
        };
        self.shared.lock().nodes.rename(&stored, &new)?;
        Ok(true)
    }

    fn time_probe(&self, _: &RelativePath) -> Option<Box<dyn TimeProbe>> {
        Some(Box::new(self.shared.behaviour))
    }

    fn sync(&self) -> Result<(), Reason> {
        Ok(())
    }

    fn sweep(&self, age: Duration) -> Result<u64, Reason> {
        let mut state = self.shared.lock();
        let state = &mut *state;
        let mut swept = 0;
        state.partials.retain(|_, partial| {
            let stale = partial
                .written
                .is_none_or(|written| written.elapsed().is_ok_and(|since| since >= age));
            if partial.open || !stale {
                return true;
            }
            state.nodes.used -= partial.content.size();
            swept += 1;
            false
        });
        Ok(swept)
    }
}

/// A snapshot of a file from when it was opened.
struct MemorySource {
    content: Arc<Content>,
    metadata: Metadata,
}

impl Source for MemorySource {
    fn metadata(&self) -> io::Result<Metadata> {
        Ok(self.metadata.clone())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        Ok(self.content.copy_at(buffer, offset))
    }

    fn data_from(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(self.content.data_from(offset))
    }
}
