//! `haul://HOST[:PORT]/[PATH]` and `NAME:[PATH]`: a place on a server, and how it is told from a local file.

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
/// What a message shows where nothing better can be made of what was typed.
const EXAMPLE: &str = "haul://host:4433/photos/";

/// A place on a server.
///
/// What stands behind the host is literal: `%`, `?`, `#` and spaces are ordinary characters, and any bytes may occur.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Which server.
    pub host: Host,
    /// Below the served directory.
    pub path: RelativePath,
    /// It ends in `/` or is the served directory: sources go into it.
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
    /// `NAME:`, a machine that this one was paired with.
    Peer(Petname),
}

/// Most bytes of a petname.
const MAX_PETNAME: usize = 64;

/// What a user calls a machine that this one was paired with: letters, digits, `-`, `_` and `.`, as in host names.
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
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let good = (1..=MAX_PETNAME).contains(&text.len())
            && text.chars().all(plain)
            && !text.starts_with(['-', '.']);
        // `haul:` and a path is the scheme with a slash too few.
        match good && text != SCHEME_NAME {
            true => Ok(Self(text.to_owned())),
            false => Err(format!(
                "a name has up to {MAX_PETNAME} letters, digits, - and _, as in bob or office-nas"
            )),
        }
    }
}

impl fmt::Display for Petname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What an argument of `haul cp` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Argument {
    /// A local file or directory.
    Local(PathBuf),
    /// A place on a server.
    Remote(Target),
}

impl Argument {
    /// Tells the two apart as scp does: a colon before the first slash is no local name. `NAME:PATH` is on a machine that this one
    /// was paired with, whether or not there is one of that name.
    ///
    /// # Errors
    /// [`Error::Usage`] for what is neither, saying how it is written.
    pub fn parse(argument: &OsStr) -> Result<Self> {
        let bytes = argument.as_bytes();
        if bytes.starts_with(SCHEME) {
            return Target::parse(argument).map(Self::Remote);
        }
        let shown = printable(bytes);
        if bytes.is_empty() {
            return Err(Error::Usage("an empty name is no file".into()));
        }
        let head = bytes.split(|&b| b == b'/').next().unwrap_or_default();
        let Some(at) = head.iter().position(|&b| b == b':') else {
            return Ok(Self::Local(argument.into()));
        };
        let name = &bytes[..at];
        let behind = &bytes[at + 1..];
        if behind.starts_with(b"//") {
            return Err(Error::Usage(format!(
                "{shown}: only haul://HOST/PATH is a place to copy to; a local file of that name is written ./{shown}"
            )));
        }
        if let Some(name) = petname(name) {
            let path = Place::parse(behind);
            let Place { path, into } =
                path.map_err(|why| Error::Usage(format!("{shown}: {why}")))?;
            return Ok(Self::Remote(Target {
                host: Host::Peer(name),
                path,
                into,
            }));
        }
        Err(Error::Usage(format!(
            "{shown}: copies over an ssh login come with a later version. A haul server is written {}, and a local \
             file with a colon ./{shown}",
            as_target(name, behind),
        )))
    }
}

/// What `user@host:path` most likely is as a target; an example where that would be none.
fn as_target(login: &[u8], path: &[u8]) -> String {
    let host = login.rsplit(|&b| b == b'@').next().unwrap_or_default();
    let path = &path[path.iter().take_while(|&&b| b == b'/').count()..];
    let target = [SCHEME, host, b"/", path].concat();
    // `haul:` and a path is the scheme with a slash too few, not a host of that name.
    match Target::parse(OsStr::from_bytes(&target)) {
        Ok(target) if host != b"haul" => target.to_string(),
        _ => EXAMPLE.to_owned(),
    }
}

impl Target {
    /// Reads `haul://HOST[:PORT]/[PATH]`. Repeated slashes count once, and components `.` not at all.
    ///
    /// # Errors
    /// [`Error::Usage`] saying what is wrong.
    pub fn parse(target: &OsStr) -> Result<Self> {
        let bytes = target.as_bytes();
        let bad = |why: &str| Error::Usage(format!("{}: {why}, as in {EXAMPLE}", printable(bytes)));
        let rest = bytes
            .strip_prefix(SCHEME)
            .ok_or_else(|| bad("a server is written haul://HOST[:PORT]/[PATH]"))?;
        let end = rest.iter().position(|&b| b == b'/').unwrap_or(rest.len());
        let authority =
            std::str::from_utf8(&rest[..end]).map_err(|_| bad("the host is no text"))?;
        let (host, port) = split_authority(authority).map_err(bad)?;
        let Place { path, into } = Place::parse(&rest[end..]).map_err(|why| bad(&why))?;
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

/// What stands behind the host.
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
                    "`..` would lead out of the served directory; write the path without it".into(),
                );
            }
            components.push(component).map_err(|why| why.to_string())?;
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

/// Host and port; IPv6 addresses stand in brackets. What is wrong is said with the way out.
fn split_authority(authority: &str) -> Result<(&str, u16), &'static str> {
    const FORM: &str = "host and port are written HOST[:PORT]";
    let bracketed = authority.starts_with('[');
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => rest
            .split_once(']')
            .ok_or("the bracket of the address is not closed")?,
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    if authority.contains('@') {
        return Err(
            "there are no user names: a server knows you by your key (`haul id`). Write the host alone",
        );
    }
    if !bracketed && authority.matches(':').count() > 1 {
        return Err("an IPv6 address stands in brackets ([::1]), and the port behind them");
    }
    let plain = |c: char| {
        c.is_alphanumeric() || matches!(c, '.' | '-' | '_') || (bracketed && matches!(c, ':' | '%'))
    };
    if host.is_empty() || !host.chars().all(plain) {
        return Err(FORM);
    }
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => DEFAULT_PORT,
        // `parse` alone would take `+99`.
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
    /// How a place on it begins.
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

/// As it can be typed again, except that a name with control characters or without an encoding is escaped.
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn target(text: &str) -> Option<(String, u16, String, bool)> {
        let target: Target = text.parse().ok()?;
        let Host::Address { name, port } = target.host else {
            return None;
        };
        Some((
            name,
            port,
            String::from_utf8_lossy(target.path.as_bytes()).into_owned(),
            target.into,
        ))
    }

    #[test]
    fn the_path_is_literal() {
        let is = |host: &str, port, path: &str, into| {
            Some((host.to_owned(), port, path.to_owned(), into))
        };
        assert_eq!(
            target("haul://h/a b/%41?x#y@z:1"),
            is("h", 4433, "a b/%41?x#y@z:1", false)
        );
        assert_eq!(target("haul://h"), is("h", 4433, "", true));
        assert_eq!(target("haul://h:99/"), is("h", 99, "", true));
        assert_eq!(target("haul://h/a//b/./"), is("h", 4433, "a/b", true));
        assert_eq!(target("haul://[::1]:5/x"), is("::1", 5, "x", false));
        assert_eq!(
            target("haul://[fe80::1%eth0]/x"),
            is("fe80::1%eth0", 4433, "x", false)
        );
        for wrong in [
            "haul://",
            "haul:///x",
            "haul://h/../x",
            "haul://h:0/",
            "haul://h:99999/",
            "haul://h:/x",
            "haul://::1/x",
            "haul://[::1/x",
            "haul://[::1]x/",
            "haul://[::1]:/x",
            "haul://[]/x",
            "haul://h:+99/",
            "haul://user@h/x",
            "haul://a b/x",
            "http://h/x",
        ] {
            assert_eq!(target(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_host_is_said_with_the_way_out() {
        let why = |text: &str| text.parse::<Target>().unwrap_err().to_string();
        assert!(why("haul://::1/x").contains("[::1]"));
        assert!(why("haul://bob@h/x").contains("haul id"));
        assert!(why("haul://h:http/x").contains("65535"));
        assert!(why("haul://h:99999/x").contains("65535"));
        assert!(why("haul://[::1/x").contains("not closed"));
        assert!(why("haul://h/../x").contains("`..`"));
    }

    #[test]
    fn what_is_suggested_can_be_typed() {
        let said = |text: &str| Argument::parse(OsStr::new(text)).unwrap_err().to_string();
        assert!(
            said("bob@h:a/b").contains("haul://h/a/b, "),
            "{}",
            said("bob@h:a/b")
        );
        assert!(said("bob@h:/srv/a").contains("haul://h/srv/a, "));
        assert!(said("bob@h:").contains("haul://h/, "));
        assert!(said("bob@h:../a").contains(EXAMPLE));
        assert!(said("[::1]:a").contains(EXAMPLE));
        assert!(said("haul:/h/a").contains(EXAMPLE));
    }

    #[test]
    fn a_colon_before_a_slash_is_no_local_name() {
        let parse = |text: &str| Argument::parse(OsStr::new(text));
        assert_eq!(parse("./a:b").unwrap(), Argument::Local("./a:b".into()));
        assert_eq!(parse("d/a:b").unwrap(), Argument::Local("d/a:b".into()));
        assert!(matches!(parse("haul://h/x").unwrap(), Argument::Remote(_)));
        for (text, name, path, into, again) in [
            ("bob:", "bob", "", true, "bob:"),
            ("bob:a/b", "bob", "a/b", false, "bob:a/b"),
            (
                "office-nas:/a//b/",
                "office-nas",
                "a/b",
                true,
                "office-nas:a/b/",
            ),
        ] {
            let Argument::Remote(target) = parse(text).unwrap() else {
                panic!("{text}")
            };
            assert_eq!(target.host, Host::Peer(name.parse().unwrap()));
            assert_eq!(
                (target.path.as_bytes(), target.into),
                (path.as_bytes(), into)
            );
            assert_eq!(target.to_string(), again);
        }
        assert!(parse("bob:../a").unwrap_err().to_string().contains("`..`"));
        assert!(parse("-bob:a").is_err());
        assert!(
            parse("http://h/x")
                .unwrap_err()
                .to_string()
                .contains("haul://")
        );
        assert!(parse("").is_err());
    }

    #[test]
    fn petnames_are_plain() {
        for good in ["bob", "office-nas", "a.b_c", "7"] {
            assert_eq!(good.parse::<Petname>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            "haul",
            "-bob",
            ".",
            "..",
            "a b",
            "a/b",
            "a:b",
            "b\u{f6}b",
            "a@b",
            &"x".repeat(65),
        ] {
            assert!(bad.parse::<Petname>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_argument_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = Argument::parse(OsStr::from_bytes(&bytes));
            let _ = Target::parse(OsStr::from_bytes(&[SCHEME, &bytes[..]].concat()));
        }

        #[test]
        fn what_is_shown_can_be_pasted(host in r"[a-z0-9.-]{1,20}|\[[0-9a-f:]{1,20}(%[a-z0-9]{1,8})?\]", port in 1u16.., path in "(/[a-zA-Z0-9 %?#:@]{1,9}){0,5}/?") {
            let target: Target = format!("haul://{host}:{port}{path}").parse().unwrap();
            prop_assert_eq!(target.to_string().parse::<Target>().unwrap(), target);
        }
    }
}
