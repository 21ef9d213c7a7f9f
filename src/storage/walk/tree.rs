//! The sources of a walk: trees of files, each in a store.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::options::Follow;
use crate::error::text::printable;
use crate::error::{Error, Result};
use crate::protocol::path::RelativePath;
use crate::storage::local::LocalStore;
use crate::storage::store::Store;

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
    pub(super) fn top(&self) -> RelativePath {
        RelativePath::from_components(Some(&self.name).filter(|name| !name.is_empty()))
            .unwrap_or_default()
    }
}
