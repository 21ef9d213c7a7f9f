//! The tree of files, directories and links in memory.

use std::collections::{BTreeMap, btree_map};
use std::sync::Arc;
use std::time::SystemTime;

use super::content::Content;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::protocol::{Kind, Time};
use crate::storage::file_id::{FileId, Version};
use crate::storage::io_errors::refusal;
use crate::storage::metadata::{Attributes, Metadata, OwnerIds, PERMISSIONS};

/// Mode of an announced directory, until its final mode is set.
pub(super) const PRIVATE_MODE: u32 = 0o700;
/// Mode of missing parent directories.
const PARENT_MODE: u32 = 0o755;

/// All nodes of a store, by path.
#[derive(Default)]
pub(super) struct Nodes {
    by_path: BTreeMap<RelativePath, Node>,
    /// Bytes in files and partials.
    pub(super) used: u64,
    /// Counts changes; the source of inode numbers and times of change.
    clock: u64,
}

#[derive(Clone)]
pub(super) struct Node {
    pub(super) content: NodeContent,
    pub(super) metadata: Metadata,
}

#[derive(Clone)]
pub(super) enum NodeContent {
    File(Arc<Content>),
    Directory,
    Symlink(Vec<u8>),
}

impl NodeContent {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::File(_) => Kind::File,
            Self::Directory => Kind::Directory,
            Self::Symlink(_) => Kind::Symlink,
        }
    }

    fn size(&self) -> u64 {
        if let Self::File(content) = self {
            content.size()
        } else {
            0
        }
    }
}

impl Nodes {
    /// The paths of all nodes, in order.
    pub(super) fn paths(&self) -> btree_map::Keys<'_, RelativePath, Node> {
        self.by_path.keys()
    }

    /// Returns the node of a name; the root always exists.
    pub(super) fn find(&self, path: &RelativePath) -> Result<Option<Node>, Reason> {
        if path.is_root() {
            return Ok(Some(self.by_path.get(path).cloned().unwrap_or_else(|| {
                Node::new(NodeContent::Directory, PRIVATE_MODE, 0)
            })));
        }
        let mut above = RelativePath::root();
        for component in path.components() {
            match self.by_path.get(&above).map(|node| node.content.kind()) {
                _ if above.is_root() => {}
                None => return Ok(None),
                Some(Kind::Directory) => {}
                Some(Kind::Symlink) => return Err(refusal(Code::Symlink, &above)),
                Some(Kind::File) => return Err(refusal(Code::NotDirectory, &above)),
            }
            above.push(component)?;
        }
        Ok(self.by_path.get(path).cloned())
    }

    pub(super) fn must_find(&self, path: &RelativePath) -> Result<Node, Reason> {
        self.find(path)?
            .ok_or_else(|| refusal(Code::NotFound, path))
    }

    /// Creates a directory and its parents if they are missing.
    pub(super) fn make_directory(&mut self, path: &RelativePath) -> Result<(), Reason> {
        self.make_with(path, PARENT_MODE)
    }

    /// Creates a directory that is private until its final mode is set, and its parents if they are missing.
    pub(super) fn make_private_directory(&mut self, path: &RelativePath) -> Result<(), Reason> {
        self.make_with(path, PRIVATE_MODE)
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
    pub(super) fn prepare_name(&mut self, path: &RelativePath) -> Result<(), Reason> {
        self.make_directory(&path.parent().unwrap_or_default())?;
        match self.find(path)?.map(|node| node.content.kind()) {
            Some(Kind::Directory) => Err(refusal(Code::IsDirectory, path)),
            _ => Ok(()),
        }
    }

    /// Prepares a name for a file or link with these attributes, which may forbid that it exists.
    pub(super) fn prepare_name_for(
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

    /// Puts a new node under a name.
    pub(super) fn put(
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
        if let Some(old) = self.by_path.insert(path.clone(), node) {
            self.forget(old);
        }
    }

    /// Makes a name another hard link of the file of a node, unless it is one.
    pub(super) fn link(&mut self, mut node: Node, new: &RelativePath) -> Result<(), Reason> {
        let file = node.metadata.version.file;
        let there = self.find(new)?;
        if there.is_some_and(|there| there.metadata.version.file == file) {
            return Ok(());
        }
        node.metadata.links += 1;
        let metadata = node.metadata.clone();
        self.insert(new, node);
        self.every_name(&metadata, |name| name.links = metadata.links);
        Ok(())
    }

    /// Removes the node of a name.
    pub(super) fn remove(&mut self, path: &RelativePath) {
        if let Some(old) = self.by_path.remove(path) {
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

    /// Sets mode and time of a node, under each of its hard links.
    pub(super) fn change(&mut self, path: &RelativePath, mut node: Node, attributes: &Attributes) {
        self.clock += 1;
        node.change(self.clock, attributes.mode, attributes.modified);
        let metadata = node.metadata.clone();
        self.by_path.insert(path.clone(), node);
        self.every_name(&metadata, |name| *name = metadata.clone());
    }

    /// Changes the metadata of a file under each of its hard links.
    fn every_name(&mut self, of: &Metadata, change: impl Fn(&mut Metadata)) {
        if of.links > 1 {
            let names = self
                .by_path
                .values_mut()
                .filter(|node| node.metadata.version.file == of.version.file);
            names.for_each(|node| change(&mut node.metadata));
        }
    }

    /// Renames a node and all below it.
    pub(super) fn rename(&mut self, old: &RelativePath, new: &RelativePath) -> Result<(), Reason> {
        let depth = old.components().count();
        let nodes = std::mem::take(&mut self.by_path);
        let renamed = nodes.into_iter().map(|(path, node)| {
            if !path.components().take(depth).eq(old.components()) {
                return Ok((path, node));
            }
            let below = RelativePath::from_components(path.components().skip(depth))?;
            Ok((new.join_path(&below)?, node))
        });
        self.by_path = renamed.collect::<Result<_, Reason>>()?;
        Ok(())
    }
}

impl Node {
    fn new(content: NodeContent, mode: u32, inode: u64) -> Self {
        let modified = if inode == 0 {
            Time::default()
        } else {
            SystemTime::now().into()
        };
        let size = content.size();
        let version = Version {
            file: FileId { device: 0, inode },
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
