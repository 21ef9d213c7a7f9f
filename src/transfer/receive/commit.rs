//! The recipe of every commit: open the partial, write and verify the content, make room, and let the store sync and
//! rename it.

use super::partial::open_partial;
use super::session::Session;
use crate::error::{Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Durability, Kind};
use crate::storage::{Attributes, PartialKey, Upload};

/// A file with all its content, verified and not yet committed.
pub(super) struct CompleteFile<'a> {
    pub(super) upload: Box<dyn Upload>,
    pub(super) path: &'a RelativePath,
    pub(super) attributes: &'a Attributes,
    pub(super) durability: Durability,
    /// Whether the partial stays for a later attempt if a mirror cannot make room for the file.
    pub(super) resumable: bool,
}

/// Opens or resumes the partial of a file, in a directory that a mirror may have to make room for. Blocks.
pub(super) fn open(
    session: &Session,
    path: &RelativePath,
    key: &PartialKey,
) -> Result<Box<dyn Upload>, Reason> {
    session.clear_path_above(path)?;
    open_partial(session.store(), path, key)
}

/// Commits a file under its final name. Blocks.
pub(super) fn commit(session: &Session, file: CompleteFile<'_>) -> Result<(), Reason> {
    if let Err(reason) = session.make_room(file.path, Kind::File) {
        if !file.resumable {
            file.upload.discard();
        }
        return Err(reason);
    }
    let warnings = file.upload.commit(file.attributes, file.durability)?;
    session.warn(file.path, warnings);
    Ok(())
}
