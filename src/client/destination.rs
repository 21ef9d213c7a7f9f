//! Where on this machine a pull goes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{PullOptions, blocking};
use crate::error::text::printable;
use crate::error::{Code, Error, Reason, Result};
use crate::protocol::Kind;
use crate::protocol::path::RelativePath;
use crate::storage::{LocalStore, OutputStore, Store};
use crate::transfer::receive::{Placement, Sources};

/// A directory that is held open, and where in it the sources come to stand; or a writer for the only one.
#[derive(Clone)]
pub(super) struct Destination {
    pub(super) store: Arc<dyn Store>,
    pub(super) place: Placement,
}

impl Destination {
    /// A writer, for what the only source is, as far as that is known.
    pub(super) fn output(
        output: &OutputStore,
        options: &PullOptions,
        only: Option<Kind>,
    ) -> Result<Self> {
        if only == Some(Kind::Directory) {
            let path = options.sources.first().cloned().unwrap_or_default();
            let text = format!(
                "{path} is a directory, and only the content of a file can be written to a pipe"
            );
            return Err(Error::Refused(Reason::new(Code::IsDirectory, text)));
        }
        Ok(Self {
            store: Arc::new(output.clone()),
            place: Placement::Into(RelativePath::root()),
        })
    }

    /// Settles it for the session; `only` is what the only source is. Directories that are missing are made.
    pub(super) async fn settle(
        options: &PullOptions,
        only: Option<Kind>,
        reserved: Option<PathBuf>,
    ) -> Result<Self> {
        let several = options.sources.len() != 1
            || options.sources.iter().any(RelativePath::is_root)
            || only.is_none();
        let directory = only == Some(Kind::Directory);
        let root = options.sources.iter().any(RelativePath::is_root);
        let mirror = options.take.delete.is_some();
        if mirror && !directory && !root {
            return Err(Error::Usage(
                "only a directory can be mirrored, and the source is none".into(),
            ));
        }
        let sources = Sources {
            into: options.into,
            several,
            directory,
            mirror: mirror && !root,
        };
        let path = options.destination.clone();
        let dry_run = options.take.dry_run;
        blocking(move || match dry_run && fs::metadata(&path).is_err() {
            true => Self::imagine(&path, sources, reserved.as_deref()),
            false => Self::open(&path, sources, reserved.as_deref()),
        })
        .await?
    }

    /// What is not there and is not to be made, below what is.
    fn imagine(path: &Path, sources: Sources, reserved: Option<&Path>) -> Result<Self> {
        let failed = || Error::io(printable(path.as_os_str().as_encoded_bytes()));
        let path = std::path::absolute(path).map_err(failed())?;
        let there = path
            .ancestors()
            .find(|above| above.is_dir())
            .unwrap_or(Path::new("/"));
        let below = path
            .strip_prefix(there)
            .unwrap_or(&path)
            .iter()
            .map(|name| name.as_encoded_bytes());
        let destination =
            RelativePath::from_components(below).map_err(|bad| Error::Usage(bad.to_string()))?;
        let store = open_store(there, reserved)?;
        let place = Placement::settle(&store, destination, sources).map_err(Error::Refused)?;
        Ok(Self {
            store: Arc::new(store),
            place,
        })
    }

    fn open(path: &Path, sources: Sources, reserved: Option<&Path>) -> Result<Self> {
        let shown = || printable(path.as_os_str().as_encoded_bytes());
        // What ends in `..`, or is `/`, names a directory and not what to make of one.
        let nameless =
            path.file_name().is_none() || path.as_os_str().as_encoded_bytes().ends_with(b"/.");
        let is_there = fs::metadata(path).is_ok();
        if !is_there {
            let into = sources.into || sources.several || nameless;
            let parent = path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            let missing = if into { Some(path) } else { parent };
            if let Some(missing) = missing {
                let what = format!(
                    "cannot make the directory {}",
                    printable(missing.as_os_str().as_encoded_bytes())
                );
                fs::create_dir_all(missing).map_err(Error::io(what))?;
            }
        }
        let real = real_path(path).map_err(Error::io(shown()))?;
        let (directory, name) = match (real.parent(), real.file_name()) {
            (Some(parent), Some(name)) if !nameless => (parent, Some(name)),
            _ => (&*real, None),
        };
        let destination = RelativePath::from_components(name.map(|name| name.as_encoded_bytes()))
            .map_err(|bad| Error::Usage(format!("{}: {bad}", shown())))?;
        let store = open_store(directory, reserved)?;
        let place =
            Placement::settle(&store, destination, sources).map_err(|why| match why.code {
                Code::NotDirectory => Error::Refused(Reason::new(
                    why.code,
                    format!(
                        "{} is no directory; several sources, or a directory, need one",
                        shown()
                    ),
                )),
                _ => Error::Refused(why),
            })?;
        Ok(Self {
            store: Arc::new(store),
            place,
        })
    }
}

fn open_store(path: &Path, reserved: Option<&Path>) -> Result<LocalStore> {
    match reserved {
        Some(reserved) => LocalStore::open_reserving(path, reserved),
        None => LocalStore::open(path),
    }
}

/// The path with no symbolic link in it, of what is there or could be made there.
fn real_path(path: &Path) -> std::io::Result<PathBuf> {
    match (path.canonicalize(), path.file_name()) {
        (Err(error), Some(name)) if error.kind() == std::io::ErrorKind::NotFound => {
            let parent = path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            Ok(parent.unwrap_or(Path::new(".")).canonicalize()?.join(name))
        }
        (real, _) => real,
    }
}
