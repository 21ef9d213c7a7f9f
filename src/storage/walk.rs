//! Walks the sources of a session into entries to announce.

mod follow;
pub(crate) mod gitignore;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::error::text::printable;
use crate::error::{Code, Error, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Attribute, Components, Entry, Kind, Owner, Time, Xattr};
use crate::storage::digest_index::Index;
use crate::storage::filter::Filter;
use crate::storage::pipe::Pipe;
use crate::storage::users::Owners;
use crate::storage::{
    ALL_PERMISSIONS, FileId, LocalStore, MemoryStore, Metadata, MetadataWarnings, OwnerIds,
    PERMISSIONS, Store, Version,
};

use gitignore::{Scope, below};

/// Most directories that [`LocalTrees`] opens before it uses the root of the file system: the remaining descriptors are
/// for transfers.
const MAX_SOURCE_STORES: usize = 8;

/// A source file or directory, and the name it is sent under.
#[derive(Clone)]
pub struct Tree {
    /// The store it is read from.
    pub store: Arc<dyn Store>,
    /// Its path in the store.
    pub path: RelativePath,
    /// First component of all its entries. If empty, the tree is all of a served directory: its content is sent without
    /// a parent directory, and the directory itself is not an entry.
    pub name: Vec<u8>,
    /// Whether it was a directory when it was opened.
    pub directory: bool,
}

impl Tree {
    /// Opens a local file or directory. A symbolic link named here is followed, as in scp; links inside a directory are
    /// sent as links. The name is the last component as written, or that of the real path if it has none (`.`, `..`).
    ///
    /// Each tree holds a descriptor of its own; [`LocalTrees`] opens many with few.
    ///
    /// # Errors
    /// [`Error::Io`] with the path when it does not exist or is inaccessible; [`Error::Usage`] when it has no name.
    pub fn local(path: &Path, follow: Follow) -> Result<Self> {
        LocalTrees::default().open(path, follow)
    }
}

/// Opens local files and directories as [`Tree`]s with a bounded number of descriptors.
///
/// Sources in the same directory share one store. Beyond eight directories, sources share the root of the filesystem.
#[derive(Default)]
pub struct LocalTrees {
    /// Open stores, by the real path of their directory.
    stores: HashMap<PathBuf, Arc<LocalStore>>,
}

impl LocalTrees {
    /// Opens a tree like [`Tree::local`].
    ///
    /// # Errors
    /// Those of [`Tree::local`].
    pub fn open(&mut self, path: &Path, follow: Follow) -> Result<Tree> {
        let failed = || Error::io(printable(path.as_os_str().as_encoded_bytes()));
        let real = path.canonicalize().map_err(failed())?;
        let (Some(parent), Some(real_name)) = (real.parent(), real.file_name()) else {
            return Err(Error::Usage(
                "cannot send /: it has no name; name the directories in it".into(),
            ));
        };
        let name = path
            .file_name()
            .unwrap_or(real_name)
            .as_encoded_bytes()
            .to_vec();
        RelativePath::from_components([&name])
            .map_err(|bad| Error::Usage(format!("{}: {bad}", printable(&name))))?;
        let directory = real.metadata().map_err(failed())?.is_dir();
        let full = self.stores.len() >= MAX_SOURCE_STORES && !self.stores.contains_key(parent);
        // Links may lead anywhere, so a tree that follows them uses the root of the file system.
        let base = if follow != Follow::Never || full {
            Path::new("/")
        } else {
            parent
        };
        let below = real.strip_prefix(base).unwrap_or(&real);
        let components = below.iter().map(|component| component.as_encoded_bytes());
        let below = RelativePath::from_components(components).map_err(|bad| {
            let shown = printable(real.as_os_str().as_encoded_bytes());
            Error::Usage(format!("{shown}: {bad}"))
        })?;
        Ok(Tree {
            store: self.store(base)?,
            path: below,
            name,
            directory,
        })
    }

    /// Returns the store of a directory, and opens it at first use.
    fn store(&mut self, directory: &Path) -> Result<Arc<LocalStore>> {
        if let Some(store) = self.stores.get(directory) {
            return Ok(store.clone());
        }
        let store = Arc::new(LocalStore::open(directory)?);
        self.stores.insert(directory.to_owned(), store.clone());
        Ok(store)
    }
}

impl Tree {
    /// The common parent of its entries.
    fn top(&self) -> RelativePath {
        RelativePath::from_components(Some(&self.name).filter(|name| !name.is_empty()))
            .unwrap_or_default()
    }
}

/// Which symbolic links inside directories are followed instead of being sent as links.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Follow {
    /// None.
    #[default]
    Never,
    /// Links whose target is in the store; a link that leads out of it fails. For requests of a peer.
    Within,
    /// All links: the store is the whole file system.
    Anywhere,
}

/// Options of a walk.
#[derive(Debug, Clone, Default)]
pub struct WalkOptions {
    /// What is excluded.
    pub filter: Filter,
    /// Announces files with the digest of their content, which is read for it.
    pub checksum: bool,
    /// The index that may know the digests of large files.
    pub index: Option<Index>,
    /// Which symbolic links are followed. A link to one of its own parent directories fails, as does a dangling one.
    pub follow: Follow,
    /// Announces owners and groups, all mode bits, and the extended attributes that give rights.
    pub owner: bool,
    /// Announces owners only by number.
    pub numeric_ids: bool,
    /// Announces extended attributes of files and directories.
    pub xattrs: bool,
    /// Sends a file that only grows while it is sent, such as a log, with the length it had when it was found.
    pub allow_growing: bool,
    /// Reports a FIFO, socket or device in a directory as a failure, and not only as skipped.
    pub fail_specials: bool,
}

/// A directory that is being sent. It is announced when the last of its children drops it, because its final mode and
/// time must be set after its content is complete.
pub struct Directory {
    announce: Option<Announce>,
    to: mpsc::UnboundedSender<Announce>,
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Some(announce) = self.announce.take() {
            // Fails only when the session is over.
            let _ = self.to.send(announce);
        }
    }
}

/// An entry to announce, with everything that the sender needs to send it.
#[derive(Clone)]
pub struct Announce {
    /// The tree it belongs to.
    pub tree: Arc<Tree>,
    /// Its path in the tree's store.
    pub source: RelativePath,
    /// Its path on the wire.
    pub path: RelativePath,
    /// The metadata that the walk read.
    pub metadata: Metadata,
    /// Its kind.
    pub kind: Kind,
    /// The target of a symbolic link.
    pub target: Option<Vec<u8>>,
    /// The digest of a file's content, if known.
    pub digest: Option<[u8; 32]>,
    /// Delays the announcement of its directory until this entry is settled.
    pub parent: Option<Arc<Directory>>,
    /// The source of content of unknown size: an input, or a file in the tree's store that reports size 0.
    pub pipe: Option<Arc<Pipe>>,
    /// Metadata that is announced on request only.
    pub extra: Option<Box<Extra>>,
}

/// Metadata that is announced on request only.
#[derive(Debug, Clone, Default)]
pub struct Extra {
    /// Owner and group, if they are to be kept.
    pub owner: Option<Owner>,
    /// Extended attributes, if they are to be kept.
    pub xattrs: Option<Vec<Xattr>>,
    /// Warnings for extended attributes that cannot be announced.
    pub warnings: MetadataWarnings,
}

impl Announce {
    /// Creates an entry for a file of this name with the content of a pipe.
    pub fn of_pipe(name: &[u8], pipe: Arc<Pipe>) -> Result<Self, Reason> {
        let path = RelativePath::from_components([name])?;
        // It is in no store, so an empty one is never read.
        let store = Arc::new(MemoryStore::new());
        let tree = Tree {
            store,
            path: path.clone(),
            name: name.to_vec(),
            directory: false,
        };
        let kind = Kind::File;
        let modified = Time::default();
        let version = Version::default();
        let metadata = Metadata {
            kind: Some(kind),
            size: 0,
            modified,
            mode: 0,
            owner: OwnerIds::default(),
            links: 1,
            version,
        };
        let tree = Arc::new(tree);
        let source = path.clone();
        let digest = None;
        let parent = None;
        let extra = None;
        Ok(Self {
            tree,
            source,
            path,
            metadata,
            kind,
            target: None,
            digest,
            parent,
            pipe: Some(pipe),
            extra,
        })
    }

    /// Returns the entry for the wire.
    pub fn entry(&self, id: u64) -> Entry {
        let sized = self.pipe.is_none();
        // An input has no metadata.
        let known = self.pipe.as_ref().is_none_or(|pipe| pipe.is_file());
        let (owner, xattrs) = self
            .extra
            .as_ref()
            .map(|extra| (extra.owner.clone(), extra.xattrs.clone()))
            .unwrap_or_default();
        let special = owner.is_some() && self.kind == Kind::File;
        let bits = if special {
            ALL_PERMISSIONS
        } else {
            PERMISSIONS
        };
        Entry {
            id,
            path: Components::from(&self.path),
            kind: self.kind,
            size: (self.kind == Kind::File && sized).then_some(self.metadata.size),
            modified: known.then_some(self.metadata.modified),
            mode: (self.kind != Kind::Symlink && known).then_some(self.metadata.mode & bits),
            target: self.target.clone(),
            digest: self.digest,
            owner,
            xattrs,
            ..Entry::default()
        }
    }
}

/// An item of a walk.
pub enum WalkItem {
    /// A file or link. (Directories use a separate channel.)
    Entry(Announce),
    /// An entry that cannot be sent.
    Failed(RelativePath, Reason),
    /// An entry in a directory that has vanished, or has no content to send; not a failure.
    Omitted(RelativePath, Reason),
    /// The number of entries that the filter excluded.
    Excluded(u64),
}

/// Walks trees depth first, in the byte order of names. It is an iterator, so that it occupies no thread between steps;
/// each step blocks. Directories follow on a separate channel once all their content is settled.
pub struct Walk {
    trees: std::vec::IntoIter<Tree>,
    /// The tree being walked.
    tree: Option<Arc<Tree>>,
    /// A stack instead of recursion: a tree may be deeper than a thread's stack.
    open: Vec<Open>,
    directories: mpsc::UnboundedSender<Announce>,
    options: WalkOptions,
    /// Excluded entries that were not reported yet.
    excluded: u64,
    owners: Owners,
}

/// A directory that is being walked, and its remaining names, last first.
struct Open {
    source: RelativePath,
    path: RelativePath,
    names: Vec<Vec<u8>>,
    directory: Arc<Directory>,
    /// The rules of the .gitignore files here and above.
    scope: Option<Arc<Scope>>,
    file: FileId,
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
        Self {
            trees: trees.into_iter(),
            tree: None,
            open: Vec::new(),
            directories,
            options,
            owners,
            excluded: 0,
        }
    }

    /// Looks at the next name; `None` when it is a directory, which is then open, or when a directory has no more
    /// names.
    fn step(&mut self, tree: &Arc<Tree>) -> Option<WalkItem> {
        let top = self.open.last_mut()?;
        let Some(name) = top.names.pop() else {
            self.open.pop();
            return self.excluded();
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
    fn excluded(&mut self) -> Option<WalkItem> {
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
        parent: Option<Arc<Directory>>,
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
        };
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
        let names = listed.map_or_else(|| tree.store.names(&source), Ok);
        if let (Err(why), Some(below)) = (&names, &announce)
            && why.code == Code::NotFound
            && below.parent.is_some()
        {
            // Not announced, because that would create it at the destination.
            return Some(gone_item(path, false));
        }
        let above = self.open.last().and_then(|open| open.scope.clone());
        let found = names.and_then(|names| match filter.gitignore {
            true => Ok((names, Scope::of(&*tree.store, &source, &path, above)?)),
            false => Ok((names, None)),
        });
        let directory = Arc::new(Directory {
            announce,
            to: self.directories.clone(),
        });
        match found {
            Ok((mut names, scope)) => {
                names.sort_unstable_by(|a, b| b.cmp(a));
                self.open.push(Open {
                    source,
                    path,
                    names,
                    directory,
                    scope,
                    file,
                });
                None
            }
            Err(why) => Some(WalkItem::Failed(path, why)),
        }
    }
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

/// Reports an entry that no longer exists.
fn gone_item(path: RelativePath, named: bool) -> WalkItem {
    let text = "gone before it could be sent";
    if named {
        WalkItem::Failed(path, Reason::new(Code::NotFound, text))
    } else {
        WalkItem::Omitted(path, Reason::new(Code::Vanished, text))
    }
}

/// Reports an entry that could not be read, perhaps because it no longer exists.
fn unreadable_item(path: RelativePath, why: Reason, named: bool) -> WalkItem {
    if why.code == Code::NotFound {
        gone_item(path, named)
    } else {
        WalkItem::Failed(path, why)
    }
}

impl Iterator for Walk {
    type Item = WalkItem;

    fn next(&mut self) -> Option<WalkItem> {
        loop {
            let found = match self.tree.clone().filter(|_| !self.open.is_empty()) {
                Some(tree) => self.step(&tree),
                None => {
                    let Some(tree) = self.trees.next() else {
                        return self.excluded();
                    };
                    let tree = self.tree.insert(Arc::new(tree)).clone();
                    if tree.name.is_empty() {
                        match self.open_names(
                            &tree,
                            tree.path.clone(),
                            RelativePath::root(),
                            FileId::default(),
                            None,
                        ) {
                            Some(failed) => return Some(failed),
                            None => continue,
                        }
                    }
                    let path = RelativePath::from_components([&tree.name]);
                    path.ok()
                        .and_then(|path| self.read_entry(&tree, tree.path.clone(), path, None))
                }
            };
            if found.is_some() {
                return found;
            }
        }
    }
}
