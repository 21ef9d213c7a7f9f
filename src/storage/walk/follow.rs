//! Resolves symbolic links component by component: the store itself follows none.

use super::options::Follow;
use crate::error::text::printable;
use crate::error::{Code, Reason};
use crate::protocol::Kind;
use crate::protocol::path::RelativePath;
use crate::storage::metadata::Metadata;
use crate::storage::store::Store;

/// Most links on one path, as in Linux.
const MAX_LINKS: u32 = 40;

/// Resolves a symbolic link to its final target, which is not a link. A concurrent change causes an error at worst: the
/// store is never left.
pub(super) fn resolve(
    store: &dyn Store,
    link: &RelativePath,
    follow: Follow,
) -> Result<(RelativePath, Metadata), Reason> {
    let mut here = link.parent().unwrap_or_default();
    // Remaining components, last first.
    let mut remaining: Vec<Vec<u8>> = link.name().map(<[u8]>::to_vec).into_iter().collect();
    let mut links = 0;
    while let Some(component) = remaining.pop() {
        match component.as_slice() {
            b"" | b"." => continue,
            b".." => {
                here = match (here.parent(), follow) {
                    (Some(above), _) => above,
                    (None, Follow::Anywhere) => here,
                    (None, _) => return Err(leads_out()),
                };
                continue;
            }
            _ => {}
        }
        let next = here.join(&component)?;
        let metadata = store.stat(&next)?.ok_or_else(|| {
            let end = store.read_link(link).unwrap_or_default();
            Reason::new(
                Code::NotFound,
                format!("it points to {}, which does not exist", printable(&end)),
            )
        })?;
        if metadata.kind != Some(Kind::Symlink) {
            here = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(Reason::new(Code::Symlink, "a loop: it leads to itself"));
        }
        let target = store.read_link(&next)?;
        if target.starts_with(b"/") {
            if follow != Follow::Anywhere {
                return Err(leads_out());
            }
            here = RelativePath::root();
        }
        remaining.extend(target.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec));
    }
    let metadata = store
        .stat(&here)?
        .ok_or_else(|| Reason::from(Code::NotFound))?;
    Ok((here, metadata))
}

fn leads_out() -> Reason {
    Reason::new(
        Code::Symlink,
        "it leads out of the served directory, so it is not followed",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Attributes, MemoryStore};

    fn path(path: &str) -> RelativePath {
        RelativePath::from_components(path.split('/').filter(|c| !c.is_empty())).unwrap()
    }

    #[test]
    fn links_are_resolved_stepwise_and_never_leave_the_store() {
        let store = MemoryStore::new();
        store.make_directory(&path("a/b")).unwrap();
        let link = |name: &str, target: &str| {
            store
                .make_symlink(&path(name), target.as_bytes(), &Attributes::default())
                .unwrap();
        };
        link("a/up", "../a/./b/");
        link("a/b/again", "../up");
        link("top", "a/..");
        link("out", "a/../../x");
        link("absolute", "/a/b");
        link("self", "./self");
        link("gone", "a/none");
        let resolved = |name: &str, follow| {
            resolve(&store, &path(name), follow).map(|(path, _)| path.to_string())
        };
        let within = |name: &str| resolved(name, Follow::Within);
        assert_eq!(within("a/up").unwrap(), "a/b");
        assert_eq!(within("a/b/again").unwrap(), "a/b");
        assert_eq!(within("top").unwrap(), ".");
        assert!(within("out").unwrap_err().text.contains("leads out"));
        assert!(within("absolute").unwrap_err().text.contains("leads out"));
        assert!(within("self").unwrap_err().text.contains("a loop"));
        let gone = within("gone").unwrap_err();
        assert!(
            gone.code == Code::NotFound && gone.text.contains("a/none"),
            "{gone}"
        );
        assert_eq!(resolved("absolute", Follow::Anywhere).unwrap(), "a/b");
        // As the system resolves `..` at the root of the file system.
        assert!(
            resolved("out", Follow::Anywhere)
                .unwrap_err()
                .text
                .contains("does not exist")
        );
    }
}
