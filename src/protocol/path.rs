//! [`RelativePath`]: the only type for names from the wire.
//!
//! A name is sent as a list of byte-string components, never as a path string. This file refuses everything that could lead out of
//! a directory, so that no other room needs to check it.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::text::printable;
use crate::error::{Code, Reason};

/// Limit of a component in bytes: `NAME_MAX` of every common file system.
pub const MAX_COMPONENT: usize = 255;
/// Limit of a path in bytes, separators included: Linux's `PATH_MAX` (4096) less the closing NUL.
pub const MAX_PATH: usize = 4095;
/// A partial's name is this prefix, [`PARTIAL_DIGITS`] hex digits and [`PARTIAL_SUFFIX`].
pub(crate) const PARTIAL_PREFIX: &[u8] = b".haul-";
pub(crate) const PARTIAL_SUFFIX: &[u8] = b".partial";
/// Hex digits in a partial's name: 16 bytes, so that two claims never get the same name.
pub(crate) const PARTIAL_DIGITS: usize = 32;

/// A character that has several Unicode normal forms. A file that tests how a file system treats names has it after the
/// digits.
pub(crate) const PARTIAL_ACCENT: &str = "\u{e9}";

/// A path below a directory: no `..`, no `.`, no empty component, no NUL, never absolute.
///
/// The empty path is the directory itself. Paths are ordered by their bytes.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelativePath {
    /// Components joined by `/`; valid by construction.
    joined: Vec<u8>,
}

/// Why a name was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// A component of no bytes.
    #[error("a component is empty")]
    Empty,
    /// A component `.` or `..`.
    #[error("a component is `.` or `..`")]
    Dots,
    /// A component with a `/` in it.
    #[error("a component contains `/`")]
    Separator,
    /// A component with a NUL byte in it.
    #[error("a component contains a NUL byte")]
    Nul,
    /// A component of more than [`MAX_COMPONENT`] bytes.
    #[error("a component is longer than {MAX_COMPONENT} bytes")]
    LongComponent,
    /// A path of more than [`MAX_PATH`] bytes.
    #[error("the path is longer than {MAX_PATH} bytes")]
    LongPath,
    /// A name of the form that is reserved for partials.
    #[error("names of the form .haul-<32 hex digits>.partial are reserved for unfinished files")]
    Reserved,
}

impl RelativePath {
    /// The empty path: the directory itself.
    pub fn root() -> Self {
        Self::default()
    }

    /// Makes a path from a list of components, as in a message.
    ///
    /// # Errors
    /// The first [`BadName`] found. Nothing is repaired.
    pub fn from_components<C: AsRef<[u8]>>(
        components: impl IntoIterator<Item = C>,
    ) -> Result<Self, BadName> {
        let mut path = Self::root();
        for component in components {
            path.push(component.as_ref())?;
        }
        Ok(path)
    }

    /// Appends one component.
    ///
    /// # Errors
    /// [`BadName`]; the path is unchanged then.
    pub fn push(&mut self, component: &[u8]) -> Result<(), BadName> {
        match component {
            b"" => return Err(BadName::Empty),
            b"." | b".." => return Err(BadName::Dots),
            c if c.contains(&b'/') => return Err(BadName::Separator),
            c if c.contains(&0) => return Err(BadName::Nul),
            c if c.len() > MAX_COMPONENT => return Err(BadName::LongComponent),
            c if is_reserved(c) => return Err(BadName::Reserved),
            _ => {}
        }
        if self.joined.len() + 1 + component.len() > MAX_PATH {
            return Err(BadName::LongPath);
        }
        if !self.joined.is_empty() {
            self.joined.push(b'/');
        }
        self.joined.extend_from_slice(component);
        Ok(())
    }

    /// This path with one more component.
    ///
    /// # Errors
    /// [`BadName`], as [`push`](Self::push).
    pub fn join(&self, component: &[u8]) -> Result<Self, BadName> {
        let mut path = self.clone();
        path.push(component)?;
        Ok(path)
    }

    /// This path followed by all components of another.
    ///
    /// # Errors
    /// [`BadName::LongPath`].
    pub fn join_path(&self, below: &RelativePath) -> Result<Self, BadName> {
        let mut path = self.clone();
        for component in below.components() {
            path.push(component)?;
        }
        Ok(path)
    }

    /// The components in order; none for the root.
    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.joined.split(|&b| b == b'/').filter(|c| !c.is_empty())
    }

    /// The first component and what is below it.
    pub fn split_first(&self) -> Option<(&[u8], RelativePath)> {
        if self.is_root() {
            return None;
        }
        match self.joined.iter().position(|&b| b == b'/') {
            Some(at) => Some((
                &self.joined[..at],
                Self {
                    joined: self.joined[at + 1..].to_vec(),
                },
            )),
            None => Some((&self.joined, Self::root())),
        }
    }

    /// The last component.
    pub fn name(&self) -> Option<&[u8]> {
        (!self.is_root()).then(|| {
            self.joined
                .rsplit(|&b| b == b'/')
                .next()
                .unwrap_or_default()
        })
    }

    /// The path without its last component; `None` for the root.
    pub fn parent(&self) -> Option<RelativePath> {
        if self.is_root() {
            return None;
        }
        let end = self.joined.iter().rposition(|&b| b == b'/').unwrap_or(0);
        Some(Self {
            joined: self.joined[..end].to_vec(),
        })
    }

    /// Whether this is the empty path.
    pub fn is_root(&self) -> bool {
        self.joined.is_empty()
    }

    /// The components joined by `/`, as a path for the system; empty for the root.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.joined))
    }

    /// The components joined by `/`, as bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.joined
    }
}

/// Whether a name is that of a partial. Partials are hidden, never served, and swept when they are old. A name that is only
/// similar, such as `.haul-notes.partial`, is the user's own.
pub(crate) fn is_partial_name(name: &[u8]) -> bool {
    name.strip_prefix(PARTIAL_PREFIX)
        .and_then(|rest| rest.strip_suffix(PARTIAL_SUFFIX))
        .is_some_and(|rest| {
            let digits = rest.strip_suffix(PARTIAL_ACCENT.as_bytes()).unwrap_or(rest);
            digits.len() == PARTIAL_DIGITS
                && digits
                    .iter()
                    .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
        })
}

/// Whether no entry may have this name: a file system that folds case finds a partial by its name in capitals too.
fn is_reserved(name: &[u8]) -> bool {
    // The length first, so that ordinary names are not copied.
    let length = PARTIAL_PREFIX.len() + PARTIAL_DIGITS + PARTIAL_SUFFIX.len();
    (length..=length + PARTIAL_ACCENT.len()).contains(&name.len())
        && is_partial_name(&name.to_ascii_lowercase())
}

impl From<BadName> for Reason {
    fn from(bad: BadName) -> Self {
        Self::new(Code::BadName, bad.to_string())
    }
}

impl fmt::Display for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&if self.is_root() {
            ".".to_owned()
        } else {
            printable(&self.joined)
        })
    }
}

impl fmt::Debug for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", printable(&self.joined))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path(components: &[&[u8]]) -> Result<RelativePath, BadName> {
        RelativePath::from_components(components)
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        assert_eq!(path(&[b".."]), Err(BadName::Dots));
        assert_eq!(path(&[b"a", b"."]), Err(BadName::Dots));
        assert_eq!(path(&[b""]), Err(BadName::Empty));
        assert_eq!(path(&[b"/etc"]), Err(BadName::Separator));
        assert_eq!(path(&[b"a/../b"]), Err(BadName::Separator));
        assert_eq!(path(&[b"a\0b"]), Err(BadName::Nul));
        assert_eq!(path(&[&[b'x'; 256]]), Err(BadName::LongComponent));
        assert_eq!(
            RelativePath::from_components(vec![[b'x'; 255]; 17]),
            Err(BadName::LongPath)
        );
    }

    #[test]
    fn only_the_exact_form_of_a_partial_is_reserved() {
        let digits = "0123456789abcdef0123456789abcdef";
        let partial = format!(".haul-{digits}.partial");
        assert!(is_partial_name(partial.as_bytes()));
        for reserved in [partial.clone(), partial.to_uppercase()] {
            assert_eq!(path(&[reserved.as_bytes()]), Err(BadName::Reserved));
        }
        let longer = format!(".haul-{digits}0.partial");
        let other = format!(".haul-{}.partial", digits.replace('f', "g"));
        for own in [".haul-notes.partial", ".haul-.partial", &longer, &other] {
            assert!(!is_partial_name(own.as_bytes()));
            assert!(path(&[own.as_bytes()]).is_ok(), "{own}");
        }
    }

    #[test]
    fn ordinary_and_odd_names_are_kept_unchanged() {
        let p = path(&[b"...", b"a b?#%", b"\xff\xfe", "ä".as_bytes()]).unwrap();
        assert_eq!(p.components().count(), 4);
        assert_eq!(p.name(), Some("ä".as_bytes()));
        assert_eq!(
            p.parent().unwrap().parent().unwrap().to_string(),
            ".../a b?#%"
        );
        assert_eq!(p.split_first().unwrap().0, b"...");
        assert!(path(&[&[b'x'; 255]]).is_ok());
    }

    #[test]
    fn printed_names_cannot_control_a_terminal() {
        assert_eq!(printable(b"a\n\x1b[2Jb\xff"), "a\\n\\u{1b}[2Jb\\xff");
        assert_eq!(
            printable("x\u{202e}gpj.exe".as_bytes()),
            "x\\u{202e}gpj.exe"
        );
    }

    proptest! {
        #[test]
        fn a_path_never_leaves_its_directory(components in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..20)) {
            if let Ok(p) = RelativePath::from_components(&components) {
                prop_assert!(p.as_path().is_relative());
                prop_assert!(p.as_path().components().all(|c| matches!(c, std::path::Component::Normal(_))));
                prop_assert_eq!(p.components().map(<[u8]>::to_vec).collect::<Vec<_>>(), components);
                prop_assert!(p.as_bytes().len() <= MAX_PATH);
            }
        }

        #[test]
        fn printing_never_emits_a_control_character(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(!printable(&bytes).chars().any(char::is_control));
        }
    }
}
