//! What a walk finds.

use super::announce::Announce;
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;

/// An item of a walk.
pub enum WalkItem {
    /// A file or link. (Directories use a separate channel.)
    Entry(Announce),
    /// An entry that cannot be sent.
    Failed(RelativePath, Reason),
    /// An entry in a directory that has vanished, or has no content to send; not a failure.
    Omitted(RelativePath, Reason),
    /// The number of entries that the filter excluded in a directory that was left, perhaps none. There is one for each
    /// directory, so that a walk through empty directories runs no further ahead than through files.
    Excluded(u64),
}

/// Reports an entry that no longer exists.
pub(super) fn gone_item(path: RelativePath, named: bool) -> WalkItem {
    let text = "gone before it could be sent";
    if named {
        WalkItem::Failed(path, Reason::new(Code::NotFound, text))
    } else {
        WalkItem::Omitted(path, Reason::new(Code::Vanished, text))
    }
}

/// Reports an entry that could not be read, perhaps because it no longer exists.
pub(super) fn unreadable_item(path: RelativePath, why: Reason, named: bool) -> WalkItem {
    if why.code == Code::NotFound {
        gone_item(path, named)
    } else {
        WalkItem::Failed(path, why)
    }
}
