//! Metadata that is sent on request: owners and extended attributes.

use minicbor::{Decode, Encode};

use super::value::at_most;

/// Limit of the name of a user or group in bytes.
pub const MAX_OWNER_NAME: usize = 256;
/// Limit of the name of an extended attribute in bytes: Linux's `XATTR_NAME_MAX`.
pub const MAX_XATTR_NAME: usize = 255;
/// Limit of all extended attributes of an entry in bytes: names, values, and [`XATTR_OVERHEAD`] for each. ext4 stores half as
/// much.
pub const MAX_XATTR_BYTES: usize = 8 << 10;
/// Bytes that an extended attribute counts in addition to its name and value.
pub const XATTR_OVERHEAD: usize = 16;

/// Owner and group, by number and, if known, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Owner {
    /// Number of the user.
    #[n(0)]
    pub user: u32,
    /// Number of the group.
    #[n(1)]
    pub group: u32,
    /// Name of the user; at most [`MAX_OWNER_NAME`] bytes.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub user_name: Option<Vec<u8>>,
    /// Name of the group; at most [`MAX_OWNER_NAME`] bytes.
    #[cbor(n(3), with = "minicbor::bytes")]
    pub group_name: Option<Vec<u8>>,
}

impl Owner {
    pub(super) fn validate(&self) -> Result<(), String> {
        // chown(2) reads this number as "no change".
        if self.user == u32::MAX || self.group == u32::MAX {
            return Err("an invalid user or group number".into());
        }
        let names = [&self.user_name, &self.group_name];
        names
            .into_iter()
            .flatten()
            .try_for_each(|name| at_most("name", name.len(), MAX_OWNER_NAME))
    }
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(map)]
pub struct Xattr {
    /// Its name, namespace included; 1 to [`MAX_XATTR_NAME`] bytes without NUL.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub name: Vec<u8>,
    /// Its value.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub value: Vec<u8>,
}

impl Xattr {
    /// The bytes that it counts against [`MAX_XATTR_BYTES`].
    pub fn bytes(&self) -> usize {
        self.name.len() + self.value.len() + XATTR_OVERHEAD
    }

    pub(super) fn validate(all: &[Self]) -> Result<(), String> {
        at_most("xattrs", all.iter().map(Self::bytes).sum(), MAX_XATTR_BYTES)?;
        let is_valid =
            |name: &[u8]| !name.is_empty() && name.len() <= MAX_XATTR_NAME && !name.contains(&0);
        if !all.iter().all(|xattr| is_valid(&xattr.name)) {
            return Err("an invalid name of an extended attribute".into());
        }
        if all.windows(2).all(|two| two[0].name < two[1].name) {
            Ok(())
        } else {
            Err("xattrs out of order".into())
        }
    }
}
