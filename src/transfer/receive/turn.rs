//! The turn of a session to receive a file, if another session of the same key receives it too.

use std::sync::Arc;

use super::attributes::attributes_match;
use super::file_locks::FileLock;
use super::session::Session;
use super::wanted::WantedFile;
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Durability, Existing};
use crate::storage::Attributes;
use crate::transfer::blocking::blocking;

/// Waits for the file's lock.
pub(super) async fn take_lock(session: &Session, file: &WantedFile) -> Result<FileLock, Reason> {
    let locks = &session.context.file_locks;
    locks
        .take(session.sender, &file.path, &session.claimant)
        .await
}

/// Returns whether another session committed the same source while this one waited for the lock. If so, sets the
/// metadata that this session wants.
pub(super) async fn is_committed_by_other(
    session: &Arc<Session>,
    file: &WantedFile,
    lock: &FileLock,
) -> Result<bool, Reason> {
    let options = session.policy.options;
    let Some(found) = lock.found() else {
        return Ok(false);
    };
    let source = file.committed_source(session.policy.durability);
    if options.existing == Existing::Overwrite || !source.is_same(found, options.checksum) {
        return Ok(false);
    }
    let shared = session.clone();
    let path = file.path.clone();
    let attributes = file.attributes.clone();
    let durability = found.durability;
    blocking("write", move || {
        adopt(&shared, &path, &attributes, durability)
    })
    .await?;
    let first_names = &session.tables.first_names;
    first_names.insert(file.id, file.hard_link, &file.path);
    lock.committed(source);
    Ok(true)
}

/// Sets the wanted metadata on a file that another session committed with `durability`, and syncs if this session
/// requires it. Blocks.
fn adopt(
    session: &Session,
    path: &RelativePath,
    attributes: &Attributes,
    durability: Durability,
) -> Result<(), Reason> {
    let store = session.store();
    let existing = store.stat(path)?.ok_or(Code::NotFound)?;
    let changes = !attributes_match(store, path, attributes, &existing);
    if changes {
        session.warn(path, store.set_attributes(path, attributes)?);
        session.wrote();
    }
    let is_durable = !changes && durability == Durability::Synced;
    if session.policy.durability == Durability::Synced && !is_durable {
        store.sync()?;
    }
    Ok(())
}
