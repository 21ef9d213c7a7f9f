//! Selects the metadata of an entry that is kept, and compares it with existing metadata.

use std::sync::Arc;

use super::options::Keep;
use crate::protocol::path::RelativePath;
use crate::protocol::{Entry, Existing, Kind};
use crate::storage::users::Owners;
use crate::storage::{Attributes, Metadata, Store};

/// Returns the attributes to set: the announced ones that this receiver keeps.
pub(super) fn kept_attributes(
    entry: &Entry,
    keep: &Keep,
    existing: Existing,
    owners: &Owners,
) -> Attributes {
    let owner = entry
        .owner
        .as_ref()
        .filter(|_| keep.owner)
        .map(|owner| owners.local_ids(owner, !keep.numeric_ids));
    let xattrs = entry
        .xattrs
        .clone()
        .filter(|_| keep.xattrs && entry.kind != Kind::Symlink)
        .map(Arc::new);
    let mut attributes = Attributes {
        mode: entry.mode,
        modified: entry.modified,
        owner,
        xattrs,
        // Also keep a file that appears while the content is transferred.
        exclusive: matches!(existing, Existing::Skip | Existing::Fail),
    };
    let bits = attributes.mode_bits(entry.kind == Kind::File);
    attributes.mode.iter_mut().for_each(|mode| *mode &= bits);
    attributes
}

/// Returns whether existing metadata matches the attributes, apart from the time. Blocks.
pub(super) fn attributes_match(
    store: &dyn Store,
    path: &RelativePath,
    attributes: &Attributes,
    existing: &Metadata,
) -> bool {
    let bits = attributes.mode_bits(existing.kind == Some(Kind::File));
    let same_mode = attributes
        .mode
        .is_none_or(|mode| mode == existing.mode & bits);
    let same_owner = attributes.owner.is_none_or(|owner| owner == existing.owner);
    let same_xattrs = || {
        attributes.xattrs.as_ref().is_none_or(|wanted| {
            let xattrs = store.xattrs(path, attributes.owner.is_some());
            xattrs.is_ok_and(|(xattrs, warnings)| warnings.is_empty() && xattrs == **wanted)
        })
    };
    same_mode && same_owner && same_xattrs()
}
