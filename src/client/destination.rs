//! The destination of a pull on this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::options::PullOptions;
use crate::error::text::printable;
use crate::error::{Code, Error, Reason, Result};
use crate::protocol::Kind;
use crate::protocol::path::RelativePath;
use crate::storage::{LocalStore, OutputStore, Store};
use crate::transfer::blocking::blocking;
use crate::transfer::receive::{Placement, Sources};

/// An open directory and the place of the sources in it, or a writer for the only source.
#[derive(Clone)]
pub(super) struct Destination {
    pub(super) store: Arc<dyn Store>,
    pub(super) place: Placement,
}

impl Destination {
    /// A writer as the destination. `only` is the kind of the only source, if the server has reported it.
    ///
    /// # Errors
    /// [`Error::Refused`] with [`Code::IsDirectory`] for a directory.
    pub(super) fn output(
        output: &OutputStore,
        options: &PullOptions,
        only: Option<Kind>,
    ) -> Result<Self> {
        if only == Some(Kind::Directory) {
            let path = options.sources.first().cloned().unwrap_or_default();
            let text = format!(
                "cannot write {path} to a pipe: it is a directory, and only files can be written"
            );
            return Err(Error::Refused(Reason::new(Code::IsDirectory, text)));
        }
        Ok(Self {
            store: Arc::new(output.clone()),
            place: Placement::Into(RelativePath::root()),
        })
    }

    /// Settles the destination for the session and creates missing directories. `only` is the kind of the only source. A
    /// destination in the directory `reserved` is an error.
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
                "cannot mirror the source: it is not a directory".into(),
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
        let open = move || match dry_run && fs::metadata(&path).is_err() {
            true => Self::without_creating(&path, sources, reserved.as_deref()),
            false => Self::open(&path, sources, reserved.as_deref()),
        };
        blocking("open the destination", open).await
    }

    /// The destination of a dry run that does not exist: a path below the nearest existing directory.
    fn without_creating(path: &Path, sources: Sources, reserved: Option<&Path>) -> Result<Self> {
        let failed = || Error::io(printable(path.as_os_str().as_encoded_bytes()));
        let path = std::path::absolute(path).map_err(failed())?;
        let existing = path
            .ancestors()
            .find(|above| above.is_dir())
            .unwrap_or(Path::new("/"));
        let below = path
            .strip_prefix(existing)
            .unwrap_or(&path)
            .iter()
            .map(|name| name.as_encoded_bytes());
        let destination =
            RelativePath::from_components(below).map_err(|bad| Error::Usage(bad.to_string()))?;
        let store = open_store(existing, reserved)?;
        let place = Placement::settle(&store, destination, sources).map_err(Error::Refused)?;
        Ok(Self {
            store: Arc::new(store),
            place,
        })
    }

    fn open(path: &Path, sources: Sources, reserved: Option<&Path>) -> Result<Self> {
        let shown = || printable(path.as_os_str().as_encoded_bytes());
        // A path that ends in `..` or `.`, or is `/`, has no last name that the source could get.
        let nameless =
            path.file_name().is_none() || path.as_os_str().as_encoded_bytes().ends_with(b"/.");
        if fs::metadata(path).is_err() {
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
            Placement::settle(&store, destination, sources).map_err(|reason| {
                match reason.code {
                    Code::NotDirectory => Error::Refused(Reason::new(
                        reason.code,
                        format!(
                            "{} is not a directory; several sources, or a directory, need one",
                            shown()
                        ),
                    )),
                    _ => Error::Refused(reason),
                }
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

/// The path without symbolic links. The last component need not exist.
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
