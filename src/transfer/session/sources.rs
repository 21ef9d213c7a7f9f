//! Finds the sources of a session as trees: local paths, or the sources that a pull requests.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::text::printable;
use crate::error::{Code, Error, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Components, Kind};
use crate::storage::expand::{Effort, expand};
use crate::storage::io_errors::refusal;
use crate::storage::walk::{Follow, LocalTrees, Tree};
use crate::storage::{Held, KeptShare, Store};

/// A source that cannot be sent, and the reason.
pub(crate) type Unsendable = (RelativePath, Reason);

/// Opens local sources. A missing source does not prevent sending the others. Blocks.
///
/// [`Error::Usage`] if two sources have the same name, or one has none.
pub(crate) fn local_sources(
    sources: &[PathBuf],
    follow: Follow,
) -> Result<(Vec<Tree>, Vec<Unsendable>), Error> {
    let mut trees = Vec::<Tree>::new();
    let mut unsendable = Vec::new();
    let mut local = LocalTrees::default();
    let mut names = HashSet::new();
    for source in sources {
        match local.open(source, follow) {
            Ok(tree) if !names.insert(tree.name.clone()) => {
                let name = printable(&tree.name);
                return Err(Error::Usage(format!(
                    "cannot send two sources named {name}: one would replace the other; rename one of them"
                )));
            }
            Ok(tree) => trees.push(tree),
            Err(Error::Io {
                what: _,
                source: error,
            }) => {
                let name = source.components().filter_map(|c| match c {
                    std::path::Component::Normal(name) => Some(name.as_encoded_bytes()),
                    _ => None,
                });
                let path = RelativePath::from_components(name).unwrap_or_default();
                // Use the name as typed: a relative path alone would not identify the file.
                let typed = printable(source.as_os_str().as_encoded_bytes());
                let code = Reason::from_io(&error).code;
                unsendable.push((path, Reason::new(code, format!("{typed}: {error}"))));
            }
            Err(other) => return Err(other),
        }
    }
    Ok((trees, unsendable))
}

/// The sources that a pull requests.
pub(super) struct FoundSources {
    pub(super) trees: Vec<Tree>,
    /// Sources that cannot be sent. They do not prevent sending the others.
    pub(super) unsendable: Vec<Unsendable>,
    /// The kind of the only source, if it was named without a pattern.
    pub(super) only: Option<Kind>,
    /// Counts the memory of the trees.
    pub(super) held: Held,
}

/// Finds the sources that a pull requests. Blocks.
///
/// Fails if the only source cannot be sent, or if two sources have the same name.
pub(super) fn find_sources(
    store: &Arc<dyn Store>,
    sources: &[Components],
    memory: &KeptShare,
) -> Result<FoundSources, Reason> {
    let mut found_sources = FoundSources {
        trees: Vec::new(),
        unsendable: Vec::new(),
        only: None,
        held: memory.hold(),
    };
    let mut paths = HashMap::<Vec<u8>, RelativePath>::new();
    let mut effort = Effort::within(memory);
    for source in sources {
        let path = RelativePath::from_components(&source.0)?;
        let expanded = expand(&**store, &path, &mut effort).and_then(|expanded| {
            let trees = expanded
                .paths
                .iter()
                .map(|path| tree(store, path))
                .collect::<Result<Vec<_>, _>>()?;
            Ok((trees, expanded.by_pattern))
        });
        let (trees, by_pattern) = match expanded {
            Ok(expanded) => expanded,
            Err(why) if sources.len() == 1 => return Err(why),
            Err(why) => {
                found_sources.unsendable.push((path, why));
                continue;
            }
        };
        for (tree, kind) in trees {
            found_sources.only = kind.filter(|_| sources.len() == 1 && !by_pattern);
            match paths.insert(tree.name.clone(), tree.path.clone()) {
                None => found_sources.trees.push(tree),
                // The same source was requested twice.
                Some(other) if other == tree.path => {}
                Some(_) => {
                    let name = printable(&tree.name);
                    let text = format!(
                        "cannot send two sources named {name}: one would replace the other; rename one of them"
                    );
                    return Err(Reason::new(Code::BadName, text));
                }
            }
        }
    }
    found_sources.held = effort.into_held();
    Ok(found_sources)
}

fn tree(store: &Arc<dyn Store>, path: &RelativePath) -> Result<(Tree, Option<Kind>), Reason> {
    let there = store
        .stat(path)?
        .ok_or_else(|| refusal(Code::NotFound, path))?;
    let directory = there.kind == Some(Kind::Directory);
    let name = path.name().unwrap_or_default().to_vec();
    Ok((
        Tree {
            store: store.clone(),
            path: path.clone(),
            name,
            directory,
        },
        there.kind,
    ))
}
