//! A store in memory: the reference of the conformance tests.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::io::Errno;

use super::folding::{Folding, trimmed};
use super::io_errors::{check_target, fault, refusal};
use super::{
    Attributes, FileId, Metadata, MetadataWarnings, OwnerIds, PERMISSIONS, PartialKey, Source,
    Store, TimeProbe, Upload, Version,
};
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::protocol::{Attribute, Durability, Kind, Time};

/// Default capacity of a store in bytes (1 GiB).
const DEFAULT_CAPACITY: u64 = 1 << 30;
/// Mode of a file for which the sender gives none.
const NEW_FILE_MODE: u32 = 0o644;
/// Mode of an announced directory, until its final mode is set.
const PRIVATE_MODE: u32 = 0o700;
/// The first and the last second that FAT can store.
const FIRST_IN_FAT: i64 = 315_532_800;
const LAST_IN_FAT: i64 = 4_354_819_198;
/// Mode of missing parent directories.
const PARENT_MODE: u32 = 0o755;

/// Files in memory as a [`Store`]: for tests, and for programs whose uploads never reach a disk.
///
/// It behaves like [`LocalStore`](super::LocalStore), but its content ends with the process. Clones share their
/// content. Reading the names of a directory takes time proportional to the size of the whole store.
#[derive(Clone)]
pub struct MemoryStore {
    shared: Arc<MemoryShared>,
}

struct MemoryShared {
    state: Mutex<MemoryState>,
    capacity: u64,
    write_delay: Duration,
    /// Whether it keeps only what FAT keeps.
    fat: bool,
    /// Whether it reports size 0 for every file.
    hides_sizes: bool,
    writing: AtomicUsize,
    peak: AtomicUsize,
}

#[derive(Default)]
struct MemoryState {
    nodes: BTreeMap<RelativePath, Node>,
    partials: HashMap<PartialSlot, Partial>,
    /// Bytes in files and partials.
    used: u64,
    /// Counts changes; the source of inode numbers and times of change.
    clock: u64,
}

#[derive(Clone)]
struct Node {
    content: NodeContent,
    metadata: Metadata,
}

#[derive(Clone)]
enum NodeContent {
    File(Arc<Bytes>),
    Directory,
    Symlink(Vec<u8>),
}

/// Content of a file or partial. Holes take memory like other zeros.
#[derive(Default)]
struct Bytes {
    data: Vec<u8>,
    /// The written ranges: ascending, not touching. The rest are holes.
    written: Vec<Range<u64>>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct PartialSlot {
    path: RelativePath,
    owner: [u8; 32],
    size: u64,
    modified: Option<Time>,
}

#[derive(Default)]
struct Partial {
    content: Bytes,
    open: bool,
    written: Option<SystemTime>,
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
        let shared = MemoryShared {
            state: Mutex::default(),
            capacity: bytes,
            write_delay: Duration::ZERO,
            fat: false,
            hides_sizes: false,
            writing: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Creates an empty store of the same capacity that acts as a slow disk: each write blocks for `delay`.
    pub fn with_write_delay(self, delay: Duration) -> Self {
        let mut store = Self::with_capacity(self.shared.capacity);
        if let Some(shared) = Arc::get_mut(&mut store.shared) {
            shared.write_delay = delay;
        }
        store
    }

    /// Creates an empty store of the same capacity that keeps only what FAT keeps: no modes, no hard links, times of
    /// even seconds, and names that ignore case, Unicode form and trailing dots.
    pub fn like_fat(self) -> Self {
        let mut store = Self::with_capacity(self.shared.capacity);
        if let Some(shared) = Arc::get_mut(&mut store.shared) {
            shared.fat = true;
        }
        store
    }

    /// Creates an empty store of the same capacity that reports size 0 for every file, as /proc does.
    pub fn hiding_sizes(self) -> Self {
        let mut store = Self::with_capacity(self.shared.capacity);
        if let Some(shared) = Arc::get_mut(&mut store.shared) {
            shared.hides_sizes = true;
        }
        store
    }

    /// Returns the most uploads that were inside `write_at` or `commit` at the same time.
    pub fn peak_writes(&self) -> usize {
        self.shared.peak.load(Ordering::SeqCst)
    }
}

impl MemoryShared {
    fn lock(&self) -> MutexGuard<'_, MemoryState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the stored form of a path: without trailing dots and spaces, and with the case of existing names.
    fn fold(&self, path: &RelativePath) -> RelativePath {
        if !self.fat {
            return path.clone();
        }
        let state = self.lock();
        let mut kept = RelativePath::root();
        for component in path.components() {
            let key = Folding::ALL.key(component);
            let inside = |there: &&RelativePath| there.parent().as_ref() == Some(&kept);
            let mut names = state.nodes.keys().filter(inside).filter_map(|p| p.name());
            let there = names.find(|name| Folding::ALL.key(name) == key);
            let name = there.unwrap_or(trimmed(component)).to_vec();
            kept = kept.join(&name).unwrap_or_default();
        }
        kept
    }

    /// Returns a file's metadata as the store reports it.
    fn reported(&self, mut metadata: Metadata) -> Metadata {
        if self.hides_sizes {
            metadata.size = 0;
            metadata.version.size = 0;
        }
        metadata
    }

    /// Splits attributes into those that the store keeps, and warnings for the rest.
    fn split_attributes(&self, attributes: &Attributes) -> (Attributes, MetadataWarnings) {
        let mut attributes = attributes.clone();
        let mut warnings = MetadataWarnings::new();
        if attributes.owner.is_some() {
            warnings.push((Attribute::Owner, "this store does not keep it".into()));
        }
        let xattrs = attributes.xattrs.take();
        warnings.extend(
            xattrs
                .iter()
                .flat_map(|all| all.iter())
                .map(|_| (Attribute::Xattr, "this store does not keep it".into())),
        );
        if self.fat {
            if attributes
                .mode
                .is_some_and(|mode| mode & PERMISSIONS != NEW_FILE_MODE)
            {
                warnings.push((Attribute::Mode, "Operation not permitted".into()));
            }
            attributes.mode = None;
            attributes.modified = attributes.modified.map(round_as_fat);
        }
        (attributes, warnings)
    }

    /// Counts a writer while the guard lives.
    fn writing(&self) -> impl Drop + '_ {
        struct Writing<'s>(&'s MemoryShared);
        impl Drop for Writing<'_> {
            fn drop(&mut self) {
                self.0.writing.fetch_sub(1, Ordering::SeqCst);
            }
        }
        let now = self.writing.fetch_add(1, Ordering::SeqCst) + 1;
        self.peak.fetch_max(now, Ordering::SeqCst);
        Writing(self)
    }
}

impl NodeContent {
    fn kind(&self) -> Kind {
        match self {
            Self::File(_) => Kind::File,
            Self::Directory => Kind::Directory,
            Self::Symlink(_) => Kind::Symlink,
        }
    }

    fn size(&self) -> u64 {
        if let Self::File(bytes) = self {
            bytes.size()
        } else {
            0
        }
    }
}

impl MemoryState {
    /// Returns the node of a name; the root always exists.
    fn find(&self, path: &RelativePath) -> Result<Option<Node>, Reason> {
        if path.is_root() {
            return Ok(Some(self.nodes.get(path).cloned().unwrap_or_else(|| {
                Node::new(NodeContent::Directory, PRIVATE_MODE, 0)
            })));
        }
        let mut above = RelativePath::root();
        for component in path.components() {
            match self.nodes.get(&above).map(|node| node.content.kind()) {
                _ if above.is_root() => {}
                None => return Ok(None),
                Some(Kind::Directory) => {}
                Some(Kind::Symlink) => return Err(refusal(Code::Symlink, &above)),
                Some(Kind::File) => return Err(refusal(Code::NotDirectory, &above)),
            }
            above.push(component)?;
        }
        Ok(self.nodes.get(path).cloned())
    }

    fn must_find(&self, path: &RelativePath) -> Result<Node, Reason> {
        self.find(path)?
            .ok_or_else(|| refusal(Code::NotFound, path))
    }

    /// Creates a directory and its parents if they are missing.
    fn make(&mut self, path: &RelativePath) -> Result<(), Reason> {
        self.make_with(path, PARENT_MODE)
    }

    fn make_with(&mut self, path: &RelativePath, last: u32) -> Result<(), Reason> {
        let mut here = RelativePath::root();
        for component in path.components() {
            here.push(component)?;
            match self.find(&here)?.map(|node| node.content.kind()) {
                None => {
                    let mode = if here == *path { last } else { PARENT_MODE };
                    self.put(&here, NodeContent::Directory, mode, None);
                }
                Some(Kind::Directory) => {}
                Some(Kind::Symlink) => return Err(refusal(Code::Symlink, &here)),
                Some(Kind::File) => return Err(refusal(Code::NotDirectory, &here)),
            }
        }
        Ok(())
    }

    /// Prepares a name for a file or link: creates its parents, and fails if it is a directory.
    fn prepare_name(&mut self, path: &RelativePath) -> Result<(), Reason> {
        self.make(&path.parent().unwrap_or_default())?;
        match self.find(path)?.map(|node| node.content.kind()) {
            Some(Kind::Directory) => Err(refusal(Code::IsDirectory, path)),
            _ => Ok(()),
        }
    }

    fn prepare_name_for(
        &mut self,
        path: &RelativePath,
        attributes: &Attributes,
    ) -> Result<(), Reason> {
        self.prepare_name(path)?;
        match attributes.exclusive && self.find(path)?.is_some() {
            true => Err(refusal(Code::Exists, path)),
            false => Ok(()),
        }
    }

    fn put(
        &mut self,
        path: &RelativePath,
        content: NodeContent,
        mode: u32,
        modified: Option<Time>,
    ) {
        self.clock += 1;
        let mut node = Node::new(content, mode, self.clock);
        node.change(self.clock, None, modified);
        self.insert(path, node);
    }

    /// Replaces a node; other hard links of the old one stay.
    fn insert(&mut self, path: &RelativePath, node: Node) {
        if let Some(old) = self.nodes.insert(path.clone(), node) {
            self.forget(old);
        }
    }

    /// Accounts for a removed name; other hard links of the file stay.
    fn forget(&mut self, old: Node) {
        if old.metadata.links == 1 {
            self.used -= old.content.size();
        }
        self.every_name(&old.metadata, |name| name.links -= 1);
    }

    /// Changes the metadata of a file under each of its hard links.
    fn every_name(&mut self, of: &Metadata, change: impl Fn(&mut Metadata)) {
        if of.links > 1 {
            let names = self
                .nodes
                .values_mut()
                .filter(|node| node.metadata.version.file == of.version.file);
            names.for_each(|node| change(&mut node.metadata));
        }
    }
}

impl Node {
    fn new(content: NodeContent, mode: u32, number: u64) -> Self {
        let modified = if number == 0 {
            Time::default()
        } else {
            SystemTime::now().into()
        };
        let size = content.size();
        let version = Version {
            file: FileId {
                device: 0,
                inode: number,
            },
            size,
            modified,
            changed: Time::default(),
        };
        let metadata = Metadata {
            kind: Some(content.kind()),
            size,
            modified,
            mode,
            owner: OwnerIds::default(),
            links: 1,
            version,
        };
        Self { content, metadata }
    }

    fn change(&mut self, clock: u64, mode: Option<u32>, modified: Option<Time>) {
        self.metadata.mode = mode.map_or(self.metadata.mode, |mode| mode & PERMISSIONS);
        self.metadata.modified = modified.unwrap_or(self.metadata.modified);
        self.metadata.version.modified = self.metadata.modified;
        self.metadata.version.changed = Time {
            seconds: clock as i64,
            nanoseconds: 0,
        };
    }
}

impl Store for MemoryStore {
    fn stat(&self, path: &RelativePath) -> Result<Option<Metadata>, Reason> {
        let path = &self.shared.fold(path);
        let found = self.shared.lock().find(path)?;
        Ok(found.map(|node| self.shared.reported(node.metadata)))
    }

    fn names(&self, directory: &RelativePath) -> Result<Vec<Vec<u8>>, Reason> {
        let directory = &self.shared.fold(directory);
        let state = self.shared.lock();
        match state.must_find(directory)?.content.kind() {
            Kind::Directory => {}
            Kind::Symlink => return Err(refusal(Code::Symlink, directory)),
            Kind::File => return Err(refusal(Code::NotDirectory, directory)),
        }
        let inside = state
            .nodes
            .keys()
            .filter(|path| path.parent().as_ref() == Some(directory));
        Ok(inside
            .filter_map(|path| path.name().map(<[u8]>::to_vec))
            .collect())
    }

    fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Reason> {
        let path = &self.shared.fold(path);
        match self.shared.lock().must_find(path)?.content {
            NodeContent::Symlink(target) => Ok(target),
            _ => Err(Reason::new(
                Code::Unreadable,
                format!("{path}: it is not a symbolic link"),
            )),
        }
    }

    fn open(&self, path: &RelativePath) -> Result<Box<dyn Source>, Reason> {
        let path = &self.shared.fold(path);
        let node = self.shared.lock().must_find(path)?;
        match node.content {
            NodeContent::File(content) => Ok(Box::new(MemorySource {
                content,
                metadata: self.shared.reported(node.metadata),
            })),
            NodeContent::Directory => Err(refusal(Code::IsDirectory, path)),
            NodeContent::Symlink(_) => Err(refusal(Code::Symlink, path)),
        }
    }

    fn create(
        &self,
        path: &RelativePath,
        partial_key: &PartialKey,
    ) -> Result<Box<dyn Upload>, Reason> {
        let path = &self.shared.fold(path);
        let mut state = self.shared.lock();
        let state = &mut *state;
        state.make(
            &path
                .parent()
                .ok_or_else(|| refusal(Code::IsDirectory, path))?,
        )?;
        let PartialKey {
            owner,
            size,
            modified,
        } = *partial_key;
        let key = PartialSlot {
            path: path.clone(),
            owner,
            size,
            modified,
        };
        let partial = state.partials.entry(key.clone()).or_default();
        if std::mem::replace(&mut partial.open, true) {
            return Err(refusal(Code::Busy, path));
        }
        state.used -= partial.content.cut(partial_key.useful_size());
        Ok(Box::new(MemoryUpload {
            shared: Arc::clone(&self.shared),
            key,
            finished: false,
        }))
    }

    fn make_directory(&self, path: &RelativePath) -> Result<(), Reason> {
        let path = &self.shared.fold(path);
        self.shared.lock().make_with(path, PRIVATE_MODE)
    }

    fn set_attributes(
        &self,
        path: &RelativePath,
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        let path = &self.shared.fold(path);
        let mut state = self.shared.lock();
        let mut node = state.must_find(path)?;
        if matches!(node.content, NodeContent::Symlink(_)) {
            return Err(refusal(Code::Symlink, path));
        }
        state.clock += 1;
        let (attributes, warnings) = self.shared.split_attributes(attributes);
        node.change(state.clock, attributes.mode, attributes.modified);
        let metadata = node.metadata.clone();
        state.nodes.insert(path.clone(), node);
        state.every_name(&metadata, |name| *name = metadata.clone());
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
        state.prepare_name_for(path, attributes)?;
        let (attributes, _) = self.shared.split_attributes(attributes);
        state.put(
            path,
            NodeContent::Symlink(target.to_vec()),
            PERMISSIONS,
            attributes.modified,
        );
        Ok(MetadataWarnings::new())
    }

    fn link(&self, existing: &RelativePath, new: &RelativePath) -> Result<(), Reason> {
        let existing = &self.shared.fold(existing);
        let new = &self.shared.fold(new);
        let mut state = self.shared.lock();
        let mut node = state.must_find(existing)?;
        match node.content {
            NodeContent::File(_) if self.shared.fat => {
                return Err(fault(new, "create the hard link", Errno::PERM));
            }
            NodeContent::File(_) => {}
            NodeContent::Directory => return Err(refusal(Code::IsDirectory, existing)),
            NodeContent::Symlink(_) => return Err(refusal(Code::Symlink, existing)),
        }
        state.prepare_name(new)?;
        if state
            .find(new)?
            .is_some_and(|there| there.metadata.version.file == node.metadata.version.file)
        {
            return Ok(());
        }
        node.metadata.links += 1;
        let metadata = node.metadata.clone();
        state.insert(new, node);
        state.every_name(&metadata, |name| name.links = metadata.links);
        Ok(())
    }

    fn remove(&self, path: &RelativePath) -> Result<(), Reason> {
        let path = &self.shared.fold(path);
        let mut state = self.shared.lock();
        if path.is_root() {
            return Err(refusal(Code::IsDirectory, path));
        }
        let node = state.must_find(path)?;
        if state
            .nodes
            .keys()
            .chain(state.partials.keys().map(|key| &key.path))
            .any(|key| key.parent().as_ref() == Some(path))
        {
            return Err(fault(path, "remove it", Errno::NOTEMPTY));
        }
        state.nodes.remove(path);
        state.forget(node);
        Ok(())
    }

    fn folding(&self, _: &RelativePath, _: Folding, _: bool) -> Folding {
        match self.shared.fat {
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
        let mut state = self.shared.lock();
        let nodes = std::mem::take(&mut state.nodes);
        let depth = stored.components().count();
        let renamed = nodes.into_iter().map(|(path, node)| {
            if !path.components().take(depth).eq(stored.components()) {
                return Ok((path, node));
            }
            let below = RelativePath::from_components(path.components().skip(depth))?;
            Ok((new.join_path(&below)?, node))
        });
        state.nodes = renamed.collect::<Result<_, Reason>>()?;
        Ok(true)
    }

    fn time_probe(&self, _: &RelativePath) -> Option<Box<dyn TimeProbe>> {
        Some(Box::new(MemoryTimeProbe(self.shared.fat)))
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
            state.used -= partial.content.size();
            swept += 1;
            false
        });
        Ok(swept)
    }
}

/// Reports the times that the store keeps: all, or those of FAT.
struct MemoryTimeProbe(bool);

impl TimeProbe for MemoryTimeProbe {
    fn kept(&mut self, time: Time) -> Option<Time> {
        Some(if self.0 { round_as_fat(time) } else { time })
    }
}

/// Rounds a time as FAT does: even seconds, from 1980 to 2107.
fn round_as_fat(time: Time) -> Time {
    let seconds = time.seconds - time.seconds.rem_euclid(2);
    Time {
        seconds: seconds.clamp(FIRST_IN_FAT, LAST_IN_FAT),
        nanoseconds: 0,
    }
}

/// A snapshot of a file from when it was opened.
struct MemorySource {
    content: Arc<Bytes>,
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
        let written = &self.content.written;
        let next = written.get(written.partition_point(|range| range.end <= offset));
        Ok(next.map(|range| range.start.max(offset)..range.end))
    }
}

struct MemoryUpload {
    shared: Arc<MemoryShared>,
    key: PartialSlot,
    /// Committed or discarded: a partial under this key now belongs to another upload.
    finished: bool,
}

impl Upload for MemoryUpload {
    fn held(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(self
            .shared
            .lock()
            .partials
            .get(&self.key)
            .map(|partial| partial.content.written.clone())
            .unwrap_or_default())
    }

    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        let _writing = self.shared.writing();
        if !self.shared.write_delay.is_zero() {
            std::thread::sleep(self.shared.write_delay);
        }
        if data.is_empty() {
            return Ok(());
        }
        let end = offset.checked_add(data.len() as u64).ok_or(Errno::FBIG)?;
        self.change(end, |content| {
            content.data[offset as usize..end as usize].copy_from_slice(data);
            add_range(&mut content.written, offset..end);
        })
    }

    fn make_hole(&mut self, part: Range<u64>) -> io::Result<()> {
        self.change(part.end, |content| {
            content.data[part.start as usize..part.end as usize].fill(0);
            remove_range(&mut content.written, &part);
        })
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.shared.lock();
        Ok(state
            .partials
            .get(&self.key)
            .map_or(0, |partial| partial.content.copy_at(buffer, offset)))
    }

    fn commit(
        mut self: Box<Self>,
        attributes: &Attributes,
        _: Durability,
    ) -> Result<MetadataWarnings, Reason> {
        let shared = Arc::clone(&self.shared);
        let _writing = shared.writing();
        let mut state = shared.lock();
        state.prepare_name_for(&self.key.path, attributes)?;
        self.finished = true;
        let partial = state.partials.remove(&self.key).unwrap_or_default();
        let (attributes, warnings) = shared.split_attributes(attributes);
        let there = state.find(&self.key.path)?.map(|node| node.metadata);
        let replaced = there.filter(|there| there.kind == Some(Kind::File));
        let usual = replaced.map_or(NEW_FILE_MODE, |there| there.mode);
        let mode = attributes.mode.map_or(usual, |mode| mode & PERMISSIONS);
        state.put(
            &self.key.path,
            NodeContent::File(Arc::new(partial.content)),
            mode,
            attributes.modified,
        );
        Ok(warnings)
    }

    fn discard(mut self: Box<Self>) {
        self.finished = true;
        let mut state = self.shared.lock();
        if let Some(partial) = state.partials.remove(&self.key) {
            state.used -= partial.content.size();
        }
    }
}

impl MemoryUpload {
    /// Extends the content to `end` if it is shorter, then changes it.
    fn change(&self, end: u64, change: impl FnOnce(&mut Bytes)) -> io::Result<()> {
        let mut state = self.shared.lock();
        let state = &mut *state;
        let Some(partial) = state.partials.get_mut(&self.key) else {
            return Err(Errno::NOENT.into());
        };
        let more = end.saturating_sub(partial.content.size());
        if more > self.shared.capacity.saturating_sub(state.used) {
            return Err(Errno::NOSPC.into());
        }
        state.used += more;
        partial
            .content
            .data
            .resize(partial.content.data.len() + more as usize, 0);
        partial.written = Some(SystemTime::now());
        change(&mut partial.content);
        Ok(())
    }
}

impl Drop for MemoryUpload {
    /// Closes the partial, and removes it if it is empty.
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let mut state = self.shared.lock();
        if let Some(partial) = state.partials.get_mut(&self.key) {
            partial.open = false;
            if partial.content.written.is_empty() {
                state.used -= partial.content.size();
                state.partials.remove(&self.key);
            }
        }
    }
}

impl Bytes {
    fn size(&self) -> u64 {
        self.data.len() as u64
    }

    /// Truncates to `size`; returns how many bytes were removed.
    fn cut(&mut self, size: u64) -> u64 {
        let excess = self.size().saturating_sub(size);
        if excess > 0 {
            self.data.truncate(size as usize);
            remove_range(&mut self.written, &(size..size + excess));
        }
        excess
    }

    fn copy_at(&self, buffer: &mut [u8], offset: u64) -> usize {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|at| self.data.get(at..))
            .unwrap_or_default();
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        length
    }
}

/// Adds a range to ascending ranges that do not touch.
fn add_range(ranges: &mut Vec<Range<u64>>, new: Range<u64>) {
    let first = ranges.partition_point(|r| r.end < new.start);
    let last = ranges.partition_point(|r| r.start <= new.end);
    let merged = ranges[first..last]
        .iter()
        .fold(new, |a, b| a.start.min(b.start)..a.end.max(b.end));
    ranges.splice(first..last, [merged]);
}

/// Removes a range from ascending ranges.
fn remove_range(ranges: &mut Vec<Range<u64>>, part: &Range<u64>) {
    let around = |range: Range<u64>| {
        [
            range.start..range.end.min(part.start),
            range.start.max(part.end)..range.end,
        ]
    };
    *ranges = std::mem::take(ranges)
        .into_iter()
        .flat_map(around)
        .filter(|range| range.start < range.end)
        .collect();
}
