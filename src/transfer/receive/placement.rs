//! Decides the destination paths of entries, and which names were requested.

use std::collections::HashSet;

use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Entry, Kind};
use crate::storage::Store;
use crate::storage::filter::{BadRules, Patterns, is_pattern};
use crate::storage::io_errors::refusal;

/// The destination of the sources of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// Each source is written into this directory under its own name.
    Into(RelativePath),
    /// The only source is written to exactly this path.
    As(RelativePath),
}

/// Properties of the sources that decide the placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sources {
    /// The destination ends in `/`.
    pub into: bool,
    /// There is more than one source.
    pub several: bool,
    /// The only source is a directory.
    pub directory: bool,
    /// The only source is a directory that is mirrored to the destination.
    pub mirror: bool,
}

impl Placement {
    /// Decides the placement once for a session, so that repeating a command has the same result. A directory gets
    /// exactly the given name, unless the name is the root, ends in `/`, or there are several sources. A file is
    /// written into an existing directory. Blocks.
    pub fn settle(
        store: &dyn Store,
        destination: RelativePath,
        sources: Sources,
    ) -> Result<Self, Reason> {
        if destination.is_root() && sources.mirror {
            return Ok(Self::As(destination));
        }
        if destination.is_root() {
            return Ok(Self::Into(destination));
        }
        let there = store.stat(&destination)?.map(|metadata| metadata.kind);
        let is_directory = there == Some(Some(Kind::Directory));
        let into = (sources.into && !sources.mirror)
            || sources.several
            || (is_directory && !sources.directory);
        if (into || sources.directory) && there.is_some() && !is_directory {
            return Err(refusal(Code::NotDirectory, &destination));
        }
        Ok(if into {
            Self::Into(destination)
        } else {
            Self::As(destination)
        })
    }

    /// Returns the target directory, or the target path of the only source.
    pub fn directory(&self) -> &RelativePath {
        match self {
            Self::Into(place) | Self::As(place) => place,
        }
    }

    /// Returns the destination path of an entry.
    pub fn of(&self, path: &RelativePath) -> Result<RelativePath, Reason> {
        match self {
            Self::Into(directory) => Ok(directory.join_path(path)?),
            Self::As(place) => {
                let (_, below) = path
                    .split_first()
                    .ok_or_else(|| Reason::from(Code::BadName))?;
                Ok(place.join_path(&below)?)
            }
        }
    }
}

/// The names that a receiver accepts as the first component of an entry.
#[derive(Debug, Clone)]
pub enum RequestedNames {
    /// Any name: the sender chooses.
    Any,
    /// Only requested names. Otherwise a server could send any file, such as a .profile.
    Only {
        /// The names as requested.
        names: HashSet<Vec<u8>>,
        /// The names that may be patterns.
        patterns: Patterns,
    },
}

impl RequestedNames {
    /// Returns the names that a pull requests. If it requests the served directory itself, any name is accepted.
    ///
    /// [`BadRules`] if the patterns exceed the limits.
    pub fn of(sources: &[RelativePath]) -> Result<Self, BadRules> {
        let names: Option<HashSet<_>> = sources
            .iter()
            .map(|source| source.name().map(<[u8]>::to_vec))
            .collect();
        let Some(names) = names else {
            return Ok(Self::Any);
        };
        let patterns = Patterns::new(
            names
                .iter()
                .map(Vec::as_slice)
                .filter(|name| is_pattern(name)),
        )?;
        Ok(Self::Only { names, patterns })
    }

    /// Treats patterns as literal names.
    pub fn without_patterns(self) -> Self {
        match self {
            Self::Any => Self::Any,
            Self::Only { names, .. } => Self::Only {
                names,
                patterns: Patterns::default(),
            },
        }
    }

    /// Returns the path of an entry if its name was requested.
    pub fn check(&self, entry: &Entry) -> Result<RelativePath, Reason> {
        let path = RelativePath::from_components(&entry.path.0)?;
        match (self, path.split_first()) {
            (Self::Any, _) => Ok(path),
            (Self::Only { names, patterns }, Some((name, _)))
                if names.contains(name) || patterns.matches(name) =>
            {
                Ok(path)
            }
            _ => Err(Reason::new(
                Code::NotWanted,
                format!("{path} was not requested"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Durability;
    use crate::storage::{MemoryStore, PartialKey};

    fn place(
        destination: &str,
        into: bool,
        several: bool,
        directory: bool,
    ) -> Result<Placement, Code> {
        let store = MemoryStore::new();
        let path = |name: &str| {
            RelativePath::from_components(name.split('/').filter(|c| !c.is_empty())).unwrap()
        };
        store.make_directory(&path("dir")).unwrap();
        let claim = PartialKey {
            owner: [0; 32],
            size: 0,
            modified: None,
        };
        store
            .create(&path("file"), &claim)
            .unwrap()
            .commit(&Default::default(), Durability::Visible)
            .unwrap();
        let sources = Sources {
            into,
            several,
            directory,
            mirror: false,
        };
        Placement::settle(&store, path(destination), sources).map_err(|why| why.code)
    }

    #[test]
    fn placement_is_the_same_when_a_command_is_repeated() {
        let path = |name: &str| RelativePath::from_components([name]).unwrap();
        let as_ = |name| Ok(Placement::As(path(name)));
        let into = |name| Ok(Placement::Into(path(name)));
        // A directory gets exactly the given name, existing or not.
        assert_eq!(place("new", false, false, true), as_("new"));
        assert_eq!(place("dir", false, false, true), as_("dir"));
        assert_eq!(place("dir", true, false, true), into("dir"));
        assert_eq!(place("new", false, true, false), into("new"));
        assert_eq!(
            place("", false, false, true),
            Ok(Placement::Into(RelativePath::root()))
        );
        // A file is written into an existing directory, or gets the given name.
        assert_eq!(place("new", false, false, false), as_("new"));
        assert_eq!(place("file", false, false, false), as_("file"));
        assert_eq!(place("dir", false, false, false), into("dir"));
        assert_eq!(place("new", true, false, false), into("new"));
        // A file cannot contain entries, and a directory does not replace a file.
        assert_eq!(place("file", true, false, false), Err(Code::NotDirectory));
        assert_eq!(place("file", false, true, false), Err(Code::NotDirectory));
        assert_eq!(place("file", false, false, true), Err(Code::NotDirectory));
    }
}
