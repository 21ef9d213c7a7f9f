//! A list of names to send: everything outside of it is excluded.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::protocol::path::{BadName, RelativePath};

/// A list of names below a source to send, with the directories on the way to them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Only {
    names: Arc<BTreeSet<RelativePath>>,
    recursive: bool,
}

impl Only {
    /// Parses names relative to the source, one on each line or each ended by a NUL. A leading `/` or `./` is ignored.
    /// Without NULs, empty lines and lines that begin with `#` or `;` are skipped, as in rsync. A directory in the list
    /// includes its content only if `recursive` is set.
    ///
    /// # Errors
    /// The first name that is invalid, or that contains `..`.
    pub fn parse(text: &[u8], by_nul: bool, recursive: bool) -> Result<Self, (Vec<u8>, BadName)> {
        let end = if by_nul { 0 } else { b'\n' };
        let mut names = BTreeSet::new();
        for name in text.split(|&byte| byte == end) {
            let name = if by_nul {
                name
            } else {
                name.strip_suffix(b"\r").unwrap_or(name)
            };
            if name.is_empty() || !by_nul && matches!(name[0], b'#' | b';') {
                continue;
            }
            let components = name
                .split(|&byte| byte == b'/')
                .filter(|part| !matches!(*part, b"" | b"."));
            names.insert(
                RelativePath::from_components(components).map_err(|bad| (name.to_vec(), bad))?,
            );
        }
        Ok(Self {
            names: Arc::new(names),
            recursive,
        })
    }

    /// Returns the names to look at in a directory; `None` for all. The directory is relative to the source.
    pub fn within(&self, directory: &RelativePath) -> Option<Vec<Vec<u8>>> {
        let mut above = Some(directory.clone());
        while let Some(path) = above.filter(|_| self.recursive) {
            if self.names.contains(&path) {
                return None;
            }
            above = path.parent();
        }
        // In byte order, all paths below a directory are adjacent.
        let prefix = if directory.is_root() {
            Vec::new()
        } else {
            [directory.as_bytes(), b"/"].concat()
        };
        let below = self
            .names
            .range(directory.clone()..)
            .map(RelativePath::as_bytes);
        let below = below.skip_while(|path| *path < prefix.as_slice());
        let below = below.map_while(|path| path.strip_prefix(prefix.as_slice()));
        let names = below.filter_map(|path| {
            path.split(|&byte| byte == b'/')
                .next()
                .filter(|name| !name.is_empty())
        });
        // A name may recur after others, as in `a`, `a-b`, `a/c`.
        let names: BTreeSet<Vec<u8>> = names.map(<[u8]>::to_vec).collect();
        Some(names.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_names_is_parsed_as_in_rsync() {
        let names = |only: &Only, directory: &str| {
            let directory =
                RelativePath::from_components(directory.split('/').filter(|c| !c.is_empty()))
                    .unwrap();
            let names = only.within(&directory)?.into_iter();
            Some(
                names
                    .map(|name| String::from_utf8(name).unwrap())
                    .collect::<Vec<_>>(),
            )
        };
        let text = b"# no name\n; nor this\n/a/b//c\r\n./d\na-b\na/e\na\n\na0/x";
        let only = Only::parse(text, false, false).unwrap();
        assert_eq!(names(&only, "").unwrap(), ["a", "a-b", "a0", "d"]);
        assert_eq!(names(&only, "a").unwrap(), ["b", "e"]);
        assert_eq!(names(&only, "a/b").unwrap(), ["c"]);
        assert_eq!(names(&only, "d").unwrap(), [""; 0]);
        let only = Only::parse(text, false, true).unwrap();
        assert_eq!((names(&only, "a"), names(&only, "a/b")), (None, None));
        assert_eq!(names(&only, "").unwrap(), ["a", "a-b", "a0", "d"]);
        let only = Only::parse(b"#x\0a\nb\0", true, false).unwrap();
        assert_eq!(names(&only, "").unwrap(), ["#x", "a\nb"]);
        assert_eq!(
            Only::parse(b"a/../b", false, false).unwrap_err().1,
            BadName::Dots
        );
    }
}
