//! The walk itself: an iterator over the entries of trees.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::announce::{Announce, Extra, PendingDirectory};
use super::follow;
use super::gitignore::{self, RuleFiles, Scope, below};
use super::item::{WalkItem, gone_item, unreadable_item};
use super::options::{Follow, WalkOptions};
use super::tree::Tree;
use crate::error::text::printable;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::protocol::{Attribute, Kind};
use crate::storage::file_id::FileId;
use crate::storage::kept_memory::Held;
use crate::storage::metadata::Metadata;
use crate::storage::pipe::Pipe;
use crate::storage::sorted_names::SortedNames;
use crate::storage::users::Owners;

/// Memory for an open directory beside its paths, and for an entry beside its paths, in bytes.
const ENTRY_OVERHEAD: usize = 512;

/// Walks trees depth first, in the byte order of names. It is an iterator, so that it occupies no thread between steps;
/// each step blocks. Directories follow on a separate channel once all their content is settled.
pub struct Walk {
    trees: std::vec::IntoIter<Tree>,
    /// The tree being walked.
    tree: Option<Arc<Tree>>,
    /// A stack instead of recursion: a tree may be deeper than a thread's stack.
    open: Vec<OpenDirectory>,
    directories: mpsc::UnboundedSender<Announce>,
    options: WalkOptions,
    rule_files: RuleFiles,
    /// Excluded entries that were not reported yet.
    excluded: u64,
    owners: Owners,
}

/// A directory that is being walked, and its remaining names.
struct OpenDirectory {
    source: RelativePath,
    path: RelativePath,
    names: SortedNames,
    directory: Arc<PendingDirectory>,
    /// The rules of the .gitignore files here and above.
    scope: Option<Arc<Scope>>,
    file: FileId,
    /// Counts its paths.
    held: Held,
}

impl Walk {
    /// The options of the walk.
    pub(crate) fn options(&self) -> &WalkOptions {
        &self.options
    }

    /// Creates a walk; `directories` receives the directories.
    pub fn new(
        trees: Vec<Tree>,
        options: WalkOptions,
        directories: mpsc::UnboundedSender<Announce>,
    ) -> Self {
        let owners = Owners::default();
        let rule_files = RuleFiles::new(options.memory.clone());
        Self {
            trees: trees.into_iter(),
            tree: None,
            open: Vec::new(),
            directories,
            rule_files,
            options,
            owners,
            excluded: 0,
        }
    }

    /// Starts to walk a tree. `None` when it is a directory, which is then open.
    fn start(&mut self, tree: Tree) -> Option<WalkItem> {
        let tree = self.tree.insert(Arc::new(tree)).clone();
        let source = tree.path.clone();
        if tree.name.is_empty() {
            let root = RelativePath::root();
            return self.open_names(&tree, source, root, FileId::default(), None);
        }
        let path = RelativePath::from_components([&tree.name]).ok()?;
        self.read_entry(&tree, source, path, None)
    }

    /// Looks at the next name; `None` when it is a directory, which is then open, or when a directory has no more
    /// names.
    fn step(&mut self, tree: &Arc<Tree>) -> Option<WalkItem> {
        let top = self.open.last_mut()?;
        let name = match top.names.next(&*tree.store, &top.source) {
            Ok(Some(name)) => name,
            Ok(None) => {
                self.open.pop();
                let excluded = std::mem::take(&mut self.excluded);
                return Some(WalkItem::Excluded(excluded));
            }
            Err(why) => {
                let path = top.path.clone();
                self.open.pop();
                return Some(WalkItem::Failed(path, why));
            }
        };
        match (top.source.join(&name), top.path.join(&name)) {
            (Ok(source), Ok(path)) => {
                let parent = Some(top.directory.clone());
                self.read_entry(tree, source, path, parent)
            }
            (Err(bad), _) | (_, Err(bad)) => {
                let why = Reason::new(Code::BadName, format!("{}: {bad}", printable(&name)));
                Some(WalkItem::Failed(top.path.clone(), why))
            }
        }
    }

    /// Returns the entries that were excluded since the last report.
    fn take_excluded(&mut self) -> Option<WalkItem> {
        Some(std::mem::take(&mut self.excluded))
            .filter(|count| *count > 0)
            .map(WalkItem::Excluded)
    }

    /// Reads the metadata of an entry, and opens it if it is a directory.
    fn read_entry(
        &mut self,
        tree: &Arc<Tree>,
        source: RelativePath,
        path: RelativePath,
        parent: Option<Arc<PendingDirectory>>,
    ) -> Option<WalkItem> {
        // A named source existed when the session began, and must be sent.
        let named = parent.is_none();
        let (source, metadata) = match self.locate(tree, source, &path) {
            Ok(Located::At(source, metadata)) => (source, metadata),
            Ok(Located::Excluded) => {
                self.excluded += 1;
                return None;
            }
            Ok(Located::Gone) => return Some(gone_item(path, named)),
            Err(why) => return Some(WalkItem::Failed(path, why)),
        };
        let Some(kind) = metadata.kind else {
            return Some(self.special(path, named));
        };
        let extra = self.extra(tree, &source, &metadata, kind);
        let mut announce = Announce {
            tree: tree.clone(),
            source,
            path,
            metadata,
            kind,
            target: None,
            digest: None,
            parent,
            pipe: None,
            extra,
            held: None,
        };
        announce.held = Some(self.hold(&announce.source, &announce.path));
        match kind {
            Kind::Directory => return self.enter(announce),
            Kind::Symlink => match tree.store.read_link(&announce.source) {
                Ok(target) => announce.target = Some(target),
                Err(why) => return Some(unreadable_item(announce.path, why, named)),
            },
            Kind::File if announce.metadata.size == 0 => {
                match tree
                    .store
                    .has_unsized_content(&announce.source, &announce.metadata)
                {
                    Ok(false) => {}
                    Ok(true) => announce.pipe = Some(Arc::new(Pipe::of_file())),
                    Err(why) => return Some(unreadable_item(announce.path, why, named)),
                }
            }
            Kind::File => {}
        }
        Some(WalkItem::Entry(announce))
    }

    /// Reports an entry that has no content to send.
    fn special(&self, path: RelativePath, named: bool) -> WalkItem {
        if named || self.options.fail_specials {
            let text = "a FIFO, socket or device; it has no content to send";
            return WalkItem::Failed(path, Reason::new(Code::Special, text));
        }
        let text = "a FIFO, socket or device; skipped, because it has no content to send";
        WalkItem::Omitted(path, Reason::new(Code::Special, text))
    }

    /// Finds the entry to send under a path, and its metadata.
    fn locate(
        &self,
        tree: &Tree,
        source: RelativePath,
        path: &RelativePath,
    ) -> Result<Located, Reason> {
        let Some(there) = tree.store.stat(&source)? else {
            return match self.options.filter.only {
                Some(_) => Err(Reason::new(Code::NotFound, "listed, but it does not exist")),
                None => Ok(Located::Gone),
            };
        };
        let follow = self.options.follow;
        if self.excludes(tree, path, there.kind) {
            return Ok(Located::Excluded);
        }
        if there.kind != Some(Kind::Symlink) || follow == Follow::Never {
            return Ok(Located::At(source, there));
        }
        let (end, there) = follow::resolve(&*tree.store, &source, follow)?;
        // The target may be a directory.
        Ok(match self.excludes(tree, path, there.kind) {
            true => Located::Excluded,
            false => Located::At(end, there),
        })
    }

    /// Whether the filter excludes an entry.
    fn excludes(&self, tree: &Tree, path: &RelativePath, kind: Option<Kind>) -> bool {
        let scope = self.open.last().and_then(|open| open.scope.as_deref());
        gitignore::excludes(
            &self.options.filter,
            scope,
            &tree.top(),
            path,
            kind == Some(Kind::Directory),
        )
    }

    /// Reads the metadata that is announced on request.
    fn extra(
        &self,
        tree: &Tree,
        source: &RelativePath,
        metadata: &Metadata,
        kind: Kind,
    ) -> Option<Box<Extra>> {
        let options = &self.options;
        if !options.owner && !options.xattrs {
            return None;
        }
        let mut extra = Extra::default();
        if options.owner {
            extra.owner = Some(self.owners.announced(metadata.owner, !options.numeric_ids));
        }
        if options.xattrs && kind != Kind::Symlink {
            let (xattrs, warnings) = match tree.store.xattrs(source, options.owner) {
                Ok(read) => read,
                Err(why) => (Vec::new(), vec![(Attribute::Xattr, why.to_string())]),
            };
            extra.xattrs = Some(xattrs);
            extra.warnings = warnings;
        }
        Some(Box::new(extra))
    }

    /// Opens a directory, unless a followed link leads back to one that is open.
    fn enter(&mut self, announce: Announce) -> Option<WalkItem> {
        let source = announce.source.clone();
        let path = announce.path.clone();
        let tree = announce.tree.clone();
        let file = announce.metadata.version.file;
        if self.options.follow != Follow::Never && self.open.iter().any(|open| open.file == file) {
            let why = Reason::new(
                Code::Symlink,
                "a loop: a symbolic link leads to one of its own parent directories",
            );
            return Some(WalkItem::Failed(path, why));
        }
        self.open_names(&tree, source, path, file, Some(announce))
    }

    /// Reads the names of a directory, which are walked next.
    fn open_names(
        &mut self,
        tree: &Tree,
        source: RelativePath,
        path: RelativePath,
        file: FileId,
        announce: Option<Announce>,
    ) -> Option<WalkItem> {
        let filter = &self.options.filter;
        let listed = filter.only.as_ref().and_then(|only| {
            let below = below(&tree.top(), &path)
                .split(|&byte| byte == b'/')
                .filter(|name| !name.is_empty());
            only.within(&RelativePath::from_components(below).ok()?)
        });
        let memory = &self.options.memory;
        let mut names = listed.map_or_else(
            || SortedNames::unread(memory),
            |names| SortedNames::known(names, memory),
        );
        SortedNames::make_room(self.open.iter_mut().map(|open| &mut open.names), memory);
        let read = names.begin(&*tree.store, &source);
        if let (Err(why), Some(below)) = (&read, &announce)
            && why.code == Code::NotFound
            && below.parent.is_some()
        {
            // Not announced, because that would create it at the destination.
            return Some(gone_item(path, false));
        }
        let scope = read.and_then(|()| self.scope(tree, &source, &path));
        let held = scope.and_then(|scope| Ok((scope, self.hold_directory(&source, &path)?)));
        let directory = Arc::new(PendingDirectory::new(announce, self.directories.clone()));
        match held {
            Ok((scope, held)) => {
                self.open.push(OpenDirectory {
                    source,
                    path,
                    names,
                    directory,
                    scope,
                    file,
                    held,
                });
                None
            }
            Err(why) => Some(WalkItem::Failed(path, why)),
        }
    }

    /// Returns the rules of the .gitignore files in a directory and above it.
    fn scope(
        &self,
        tree: &Tree,
        source: &RelativePath,
        path: &RelativePath,
    ) -> Result<Option<Arc<Scope>>, Reason> {
        if !self.options.filter.gitignore {
            return Ok(None);
        }
        let above = self.open.last().and_then(|open| open.scope.clone());
        Scope::of(&*tree.store, &self.rule_files, source, path, above)
    }

    /// Counts the memory of an entry. Others wait until there is room, so it is small.
    fn hold(&self, source: &RelativePath, path: &RelativePath) -> Arc<Held> {
        let mut held = self.options.memory.hold();
        held.grow_anyway(entry_cost(source, path));
        Arc::new(held)
    }

    /// Counts the memory of an open directory, or fails: a tree may be thousands of levels deep.
    fn hold_directory(&self, source: &RelativePath, path: &RelativePath) -> Result<Held, Reason> {
        let memory = &self.options.memory;
        let outer = self.open.iter().map(|open| &open.held);
        let held = memory.hold_level(entry_cost(source, path), outer);
        held.ok_or_else(|| {
            let text = format!(
                "nothing in {path} was sent: this session keeps too much memory; send fewer directories at the same time"
            );
            Reason::new(Code::Busy, text)
        })
    }
}

fn entry_cost(source: &RelativePath, path: &RelativePath) -> usize {
    ENTRY_OVERHEAD + source.as_bytes().len() + path.as_bytes().len()
}

/// The result of looking up a name.
enum Located {
    /// The name exists: its path in the store after following links, and its metadata.
    At(RelativePath, Metadata),
    /// The filter excludes it.
    Excluded,
    /// It existed when its directory was read.
    Gone,
}

impl Iterator for Walk {
    type Item = WalkItem;

    fn next(&mut self) -> Option<WalkItem> {
        loop {
            let found = match self.tree.clone() {
                Some(tree) if !self.open.is_empty() => self.step(&tree),
                _ => match self.trees.next() {
                    Some(tree) => self.start(tree),
                    None => return self.take_excluded(),
                },
            };
            if found.is_some() {
                return found;
            }
        }
    }
}
