//! Selects the metadata of an entry that is kept, and compares it with the existing metadata.

use std::sync::Arc;

use super::Receiver;
use crate::protocol::path::RelativePath;
use crate::protocol::{Attribute, Entry, Existing, Kind};
use crate::storage::{Attributes, Metadata};

impl Receiver {
    /// Returns the attributes to set. Counts a warning for announced metadata that this receiver may not keep.
    pub(super) fn attributes(&self, entry: &Entry, path: &RelativePath) -> Attributes {
        let keep = &self.session.keep;
        let owner = entry.owner.as_ref().and_then(|owner| {
            if keep.owner {
                return Some(self.owners.local_ids(owner, !keep.numeric_ids));
            }
            self.unkept.count(
                path,
                vec![(
                    Attribute::Owner,
                    "the server does not keep owners; start it with --allow-owner".into(),
                )],
            );
            None
        });
        let xattrs = entry
            .xattrs
            .clone()
            .filter(|_| keep.xattrs && entry.kind != Kind::Symlink)
            .map(Arc::new);
        // Also keep a file that appears while the content is transferred.
        let exclusive = matches!(self.session.take.existing, Existing::Skip | Existing::Fail);
        let mut attributes = Attributes {
            mode: entry.mode,
            modified: entry.modified,
            owner,
            xattrs,
            exclusive,
        };
        let bits = attributes.mode_bits(entry.kind == Kind::File);
        attributes.mode.iter_mut().for_each(|mode| *mode &= bits);
        attributes
    }

    /// Returns whether the existing metadata matches the attributes, apart from the time.
    pub(super) fn attributes_match(
        &self,
        attributes: &Attributes,
        path: &RelativePath,
        there: &Metadata,
    ) -> bool {
        let bits = attributes.mode_bits(there.kind == Some(Kind::File));
        let same_mode = attributes.mode.is_none_or(|mode| mode == there.mode & bits);
        let same_owner = attributes.owner.is_none_or(|owner| owner == there.owner);
        let same_xattrs = || {
            attributes.xattrs.as_ref().is_none_or(|wanted| {
                let there = self.session.store.xattrs(path, attributes.owner.is_some());
                there.is_ok_and(|(there, warnings)| warnings.is_empty() && there == **wanted)
            })
        };
        same_mode && same_owner && same_xattrs()
    }
}
