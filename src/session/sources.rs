//! What a pull asks for, as trees.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Code, Result, Why};
use crate::listing::{Effort, expand};
use crate::manifest::Tree;
use crate::path::{RelativePath, printable};
use crate::store::Store;
use crate::store::fault::refusal;
use crate::wire::{Components, Kind};

/// The sources of a pull.
pub(super) struct Looked {
    pub(super) trees: Vec<Tree>,
    /// Those that cannot be sent: they do not keep the others from it.
    pub(super) unsendable: Vec<(RelativePath, Why)>,
    /// What the only one is, if it was named without a pattern.
    pub(super) only: Option<Kind>,
}

/// Looks at what is asked for. Blocks.
///
/// # Errors
/// Why the only source cannot be sent, or that two would fall on each other.
pub(super) fn look(store: &Arc<dyn Store>, sources: &[Components]) -> Result<Looked, Why> {
    let mut looked = Looked { trees: Vec::new(), unsendable: Vec::new(), only: None };
    let mut paths = HashMap::<Vec<u8>, RelativePath>::new();
    let mut effort = Effort::default();
    for source in sources {
        let path = RelativePath::from_components(&source.0)?;
        let expanded = expand(&**store, &path, &mut effort).and_then(|expanded| {
            let trees = expanded.paths.iter().map(|path| tree(store, path)).collect::<Result<Vec<_>, _>>()?;
            Ok((trees, expanded.by_pattern))
        });
        let (trees, by_pattern) = match expanded {
            Ok(expanded) => expanded,
            Err(why) if sources.len() == 1 => return Err(why),
            Err(why) => {
                looked.unsendable.push((path, why));
                continue;
            }
        };
        for (tree, kind) in trees {
            looked.only = kind.filter(|_| sources.len() == 1 && !by_pattern);
            match paths.insert(tree.name.clone(), tree.path.clone()) {
                None => looked.trees.push(tree),
                // Asked for twice.
                Some(other) if other == tree.path => {}
                Some(_) => {
                    let name = printable(&tree.name);
                    let text = format!("two sources are named {name}; they would fall on each other");
                    return Err(Why::new(Code::BadName, text));
                }
            }
        }
    }
    Ok(looked)
}

fn tree(store: &Arc<dyn Store>, path: &RelativePath) -> Result<(Tree, Option<Kind>), Why> {
    let there = store.stat(path)?.ok_or_else(|| refusal(Code::NotFound, path))?;
    let directory = there.kind == Some(Kind::Directory);
    let name = path.name().unwrap_or_default().to_vec();
    Ok((Tree { store: store.clone(), path: path.clone(), name, directory }, there.kind))
}
