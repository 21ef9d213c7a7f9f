//! Parses `haul://HOST[:PORT]/[PATH]` and `NAME:[PATH]`, and distinguishes them from local files.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::error::text::printable;
use crate::error::{Error, Result};
use crate::protocol::DEFAULT_PORT;
use crate::protocol::path::RelativePath;

const SCHEME: &[u8] = b"haul://";
const SCHEME_NAME: &str = "haul";
/// Example in error messages that cannot suggest anything closer to the input.
const EXAMPLE: &str = "haul://host:4433/photos/";

/// A place on a server.
///
/// The path is literal: `%`, `?`, `#` and spaces are ordinary characters, and any bytes may occur.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The server.
    pub host: Host,
    /// The path below the served directory.
    pub path: RelativePath,
    /// Whether sources go into it: it ends in `/` or is the served directory.
    pub into: bool,
}

/// A server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// `haul://HOST[:PORT]/`.
    Address {
        /// Name or address; IPv6 without brackets.
        name: String,
        /// UDP port.
        port: u16,
    },
    /// `NAME:`, a paired machine.
    Peer(Petname),
}

/// Limit of a petname in bytes.
const MAX_PETNAME: usize = 64;

/// The user's name for a paired machine: letters, digits, `-`, `_` and `.`, as in host names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Petname(String);

impl Petname {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for Petname {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let valid = (1..=MAX_PETNAME).contains(&text.len())
            && text.chars().all(is_allowed)
            && !text.starts_with(['-', '.']);
        // `haul:` and a path is the scheme with a slash missing.
        match valid && text != SCHEME_NAME {
            true => Ok(Self(text.to_owned())),
            false => Err(format!(
                "a name has up to {MAX_PETNAME} letters, digits, ., - and _, as in bob or office-nas"
            )),
        }
    }
}

impl fmt::Display for Petname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An argument of `haul cp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Argument {
    /// A local file or directory.
    Local(PathBuf),
    /// A place on a server.
    Remote(Target),
}

impl Argument {
    /// Distinguishes the two as scp does: an argument with a colon before the first slash is not local. `NAME:PATH` is on a paired
    /// machine, whether or not one of that name exists.
    ///
    /// # Errors
    /// [`Error::Usage`] for an invalid argument, with the right form.
    pub fn parse(argument: &OsStr) -> Result<Self> {
        let bytes = argument.as_bytes();
        if bytes.starts_with(SCHEME) {
            return Target::parse(argument).map(Self::Remote);
        }
        let shown = printable(bytes);
        if bytes.is_empty() {
            return Err(Error::Usage(
                "cannot use an empty name; name a file or a directory".into(),
            ));
        }
        let head = bytes.split(|&b| b == b'/').next().unwrap_or_default();
        let Some(at) = head.iter().position(|&b| b == b':') else {
            return Ok(Self::Local(argument.into()));
        };
        let name = &bytes[..at];
        let path = &bytes[at + 1..];
        if path.starts_with(b"//") {
            return Err(Error::Usage(format!(
                "cannot use {shown}: write haul://HOST/PATH for a server, or ./{shown} for a local file"
            )));
        }
        if let Some(name) = petname(name) {
            let place = Place::parse(path);
            let Place { path, into } =
                place.map_err(|reason| Error::Usage(format!("cannot use {shown}: {reason}")))?;
            return Ok(Self::Remote(Target {
                host: Host::Peer(name),
                path,
                into,
            }));
        }
        Err(Error::Usage(format!(
            "cannot use {shown}: this version does not copy over an ssh login; write {}, or ./{shown} for a local file",
            suggested_target(name, path),
        )))
    }
}

/// The target that `user@host:path` most likely means; an example if that is not valid.
fn suggested_target(login: &[u8], path: &[u8]) -> String {
    let host = login.rsplit(|&b| b == b'@').next().unwrap_or_default();
    let path = &path[path.iter().take_while(|&&b| b == b'/').count()..];
    let target = [SCHEME, host, b"/", path].concat();
    // `haul:` and a path is the scheme with a slash missing, not a host of that name.
    match Target::parse(OsStr::from_bytes(&target)) {
        Ok(target) if host != b"haul" => target.to_string(),
        _ => EXAMPLE.to_owned(),
    }
}

impl Target {
    /// Reads `haul://HOST[:PORT]/[PATH]`. Repeated slashes count once, and components `.` not at all.
    ///
    /// # Errors
    /// [`Error::Usage`] with the reason and an example.
    pub fn parse(target: &OsStr) -> Result<Self> {
        let bytes = target.as_bytes();
        let bad = |reason: &str| {
            let shown = printable(bytes);
            Error::Usage(format!("cannot use {shown}: {reason}, as in {EXAMPLE}"))
        };
        let rest = bytes
            .strip_prefix(SCHEME)
            .ok_or_else(|| bad("write haul://HOST[:PORT]/[PATH] for a server"))?;
        let end = rest.iter().position(|&b| b == b'/').unwrap_or(rest.len());
        let authority =
            std::str::from_utf8(&rest[..end]).map_err(|_| bad("the host is not UTF-8 text"))?;
        let (host, port) = split_authority(authority).map_err(bad)?;
        let Place { path, into } = Place::parse(&rest[end..]).map_err(|reason| bad(&reason))?;
        Ok(Self {
            host: Host::Address {
                name: host.to_owned(),
                port,
            },
            path,
            into,
        })
    }
}

/// The part of a target after the host.
struct Place {
    path: RelativePath,
    into: bool,
}

impl Place {
    fn parse(path: &[u8]) -> Result<Self, String> {
        let mut components = RelativePath::root();
        for component in path
            .split(|&b| b == b'/')
            .filter(|c| !c.is_empty() && *c != b".")
        {
            if component == b".." {
                return Err(
                    "`..` could leave the served directory; write the path without it".into(),
                );
            }
            components.push(component).map_err(|bad| bad.to_string())?;
        }
        let into = components.is_root() || path.ends_with(b"/") || path.ends_with(b"/.");
        Ok(Self {
            path: components,
            into,
        })
    }
}

fn petname(name: &[u8]) -> Option<Petname> {
    std::str::from_utf8(name).ok()?.parse().ok()
}

impl std::str::FromStr for Target {
    type Err = Error;

    fn from_str(target: &str) -> Result<Self> {
        Self::parse(OsStr::new(target))
    }
}

/// Splits host and port. IPv6 addresses need brackets.
///
/// # Errors
/// The reason, with what to write instead.
fn split_authority(authority: &str) -> Result<(&str, u16), &'static str> {
    const FORM: &str = "write host and port as HOST[:PORT]";
    let bracketed = authority.starts_with('[');
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => rest
            .split_once(']')
            .ok_or("the bracket of the address is not closed")?,
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    if authority.contains('@') {
        return Err(
            "there are no user names, because a server knows you by your key (`haul id`); write the host alone",
        );
    }
    if !bracketed && authority.matches(':').count() > 1 {
        return Err("write an IPv6 address in brackets ([::1]), and the port after them");
    }
    let is_allowed = |c: char| {
        c.is_alphanumeric() || matches!(c, '.' | '-' | '_') || (bracketed && matches!(c, ':' | '%'))
    };
    if host.is_empty() || !host.chars().all(is_allowed) {
        return Err(FORM);
    }
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => DEFAULT_PORT,
        // `parse` alone would accept `+99`.
        Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => digits
            .parse()
            .ok()
            .filter(|&port| port != 0)
            .ok_or("a port is a number from 1 to 65535")?,
        Some(_) => return Err("a port is a number from 1 to 65535"),
        None => return Err(FORM),
    };
    Ok((host, port))
}

impl Host {
    /// The part of a target before the path.
    fn prefix(&self) -> String {
        match self {
            Self::Peer(name) => format!("{name}:"),
            Self::Address { name, port } => {
                let (open, close) = if name.contains([':', '%']) {
                    ("[", "]")
                } else {
                    ("", "")
                };
                let port = if *port == DEFAULT_PORT {
                    String::new()
                } else {
                    format!(":{port}")
                };
                format!("haul://{open}{name}{close}{port}/")
            }
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { name, .. } => f.write_str(name),
            Self::Peer(name) => name.fmt(f),
        }
    }
}

/// Prints a target in a form that parses back. Control characters and invalid UTF-8 are escaped.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slash = if self.into && !self.path.is_root() {
            "/"
        } else {
            ""
        };
        write!(
            f,
            "{}{}{slash}",
            self.host.prefix(),
            printable(self.path.as_bytes())
        )
    }
}

#[cfg(test)]
mod tests;
