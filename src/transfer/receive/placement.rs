//! Where entries come to stand, and which of them were asked for.

use std::collections::HashSet;

use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Entry, Kind};
use crate::storage::Store;
use crate::storage::filter::{BadRules, Patterns, is_pattern};
use crate::storage::io_errors::refusal;

/// Where the sources of a session come to stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// Each source goes into this directory, under its own name.
    Into(RelativePath),
    /// The only source becomes exactly this.
    As(RelativePath),
}

/// What is to be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sources {
    /// What the user wrote of the destination ends in `/`.
    pub into: bool,
    /// There are several.
    pub several: bool,
    /// The only one is a directory.
    pub directory: bool,
    /// The only one is a directory whose content becomes that of the destination.
    pub mirror: bool,
}

impl Placement {
    /// Settles where sources come to stand, once for the session, such that a rerun is the same command: a directory
    /// becomes exactly what was named, unless that is the root of the store, ends in `/`, or there are several sources; a
    /// file goes into a directory that is there. Blocks.
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

    /// The directory that all of it goes into, or the name that it gets.
    pub fn directory(&self) -> &RelativePath {
        match self {
            Self::Into(place) | Self::As(place) => place,
        }
    }

    /// Where an entry of this name comes to stand.
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

/// The sources that a receiver takes, by their names: the first component of each entry.
#[derive(Debug, Clone)]
pub enum RequestedNames {
    /// Of any name: whoever sends names them.
    Any,
    /// Only those that were asked for: a server could send anything under any name, such as a .profile.
    Only {
        /// Their names as they were written.
        names: HashSet<Vec<u8>>,
        /// Those that may be patterns.
        patterns: Patterns,
    },
}

impl RequestedNames {
    /// What a pull asks for. All of the served directory is of any name.
    ///
    /// # Errors
    /// [`BadRules`] for patterns past the limits.
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

    /// Takes patterns for nothing but the names that they are.
    pub fn without_patterns(self) -> Self {
        match self {
            Self::Any => Self::Any,
            Self::Only { names, .. } => Self::Only {
                names,
                patterns: Patterns::default(),
            },
        }
    }

    /// The path of an entry, if that was asked for.
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
                format!("{path} was not asked for"),
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
    fn placement_is_such_that_a_rerun_is_the_same_command() {
        let path = |name: &str| RelativePath::from_components([name]).unwrap();
        let as_ = |name| Ok(Placement::As(path(name)));
        let into = |name| Ok(Placement::Into(path(name)));
        // A directory becomes exactly what was named, there or not.
        assert_eq!(place("new", false, false, true), as_("new"));
        assert_eq!(place("dir", false, false, true), as_("dir"));
        assert_eq!(place("dir", true, false, true), into("dir"));
        assert_eq!(place("new", false, true, false), into("new"));
        assert_eq!(
            place("", false, false, true),
            Ok(Placement::Into(RelativePath::root()))
        );
        // A file goes into a directory that is there, else becomes what was named.
        assert_eq!(place("new", false, false, false), as_("new"));
        assert_eq!(place("file", false, false, false), as_("file"));
        assert_eq!(place("dir", false, false, false), into("dir"));
        assert_eq!(place("new", true, false, false), into("new"));
        // Nothing goes into a file, and no directory takes a file's place.
        assert_eq!(place("file", true, false, false), Err(Code::NotDirectory));
        assert_eq!(place("file", false, true, false), Err(Code::NotDirectory));
        assert_eq!(place("file", false, false, true), Err(Code::NotDirectory));
    }
}
