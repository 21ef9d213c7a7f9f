//! The file of paired machines: one `NAME SHA256:... SECRET NUMBER` a line, `#` starts a comment.
//!
//! It is private, since two machines meet without a code by the secrets in it. The secrets are worthless without the
//! keys, which TLS requires too.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::str::FromStr;

use data_encoding::BASE64_NOPAD;

use super::home::{Home, check_private};
use super::identity::{BadKeyId, KeyId};
use crate::error::{Error, Result};
use crate::protocol::target::Petname;

/// A paired machine. Its `Debug` does not show the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Peer {
    /// The local name.
    pub name: Petname,
    /// Its key.
    pub key_id: KeyId,
    /// The secret that only the two machines know.
    pub secret: [u8; 32],
    /// The number under which its server can be found.
    pub number: u32,
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Peer({} {})", self.name, self.key_id)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} {} {}",
            self.name,
            self.key_id,
            BASE64_NOPAD.encode(&self.secret),
            self.number
        )
    }
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut fields = line.split_whitespace();
        let (Some(name), Some(key_id), Some(secret), Some(number), None) = (
            fields.next(),
            fields.next(),
            fields.next(),
            fields.next(),
            fields.next(),
        ) else {
            return Err("expected four fields".into());
        };
        let secret = BASE64_NOPAD
            .decode(secret.as_bytes())
            .ok()
            .and_then(|secret| secret.try_into().ok());
        Ok(Self {
            name: name.parse()?,
            key_id: key_id.parse().map_err(|bad: BadKeyId| bad.to_string())?,
            secret: secret.ok_or("the third field is not a secret")?,
            number: number
                .parse()
                .map_err(|_| "the fourth field is not a number")?,
        })
    }
}

/// Reads all peers of a file, in order; none when the file is missing.
///
/// # Errors
/// [`Error::Home`] when it cannot be read, when others can read it, or with the number of an invalid line.
pub fn all(file: &Path) -> Result<Vec<Peer>> {
    let bad = |why| Error::Home {
        path: file.to_owned(),
        why,
    };
    let text = match fs::read_to_string(file) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(|e| bad(format!("cannot read the file: {e}")))?,
    };
    let metadata = fs::metadata(file).map_err(|e| bad(format!("cannot read the file: {e}")))?;
    check_private(file, &metadata, 0o600)?;
    let mut peers = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line
            .split_once('#')
            .map_or(line, |(before, _)| before)
            .trim();
        if !line.is_empty() {
            // The message leaves out the line, which has a secret in it.
            peers.push(
                line.parse()
                    .map_err(|why| bad(format!("line {number} is invalid: {why}")))?,
            );
        }
    }
    Ok(peers)
}

/// Finds a peer by name.
///
/// # Errors
/// [`Error::Usage`] with the command to run when there is none; as [`all`].
pub fn named(home: &Home, name: &Petname) -> Result<Peer> {
    all(&home.peers())?.into_iter().find(|peer| peer.name == *name).ok_or_else(|| {
        Error::Usage(format!("cannot find a paired machine named {name}; run `haul pair {name}` on both machines once"))
    })
}

/// Adds a machine. Peers with the same key or the same name are replaced.
///
/// # Errors
/// As [`all`]; [`Error::Io`] when the system refuses.
pub fn add(home: &Home, peer: &Peer) -> Result<()> {
    let _lock = home.lock()?;
    let mut peers = all(&home.peers())?;
    peers.retain(|existing| existing.key_id != peer.key_id && existing.name != peer.name);
    peers.push(peer.clone());
    write(&home.peers(), &peers)
}

/// Removes a machine; `false` when it was not listed.
///
/// # Errors
/// As [`add`].
pub fn remove(home: &Home, name: &Petname) -> Result<bool> {
    if !home.peers().exists() {
        return Ok(false);
    }
    let _lock = home.lock()?;
    let mut peers = all(&home.peers())?;
    let before = peers.len();
    peers.retain(|existing| existing.name != *name);
    if peers.len() == before {
        return Ok(false);
    }
    write(&home.peers(), &peers).map(|()| true)
}

/// Replaces the whole file, so that a crash leaves the old or the new one. Comments are lost.
fn write(file: &Path, peers: &[Peer]) -> Result<()> {
    let temporary = file.with_extension("new");
    let write = || -> io::Result<()> {
        let mut temporary_file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        for peer in peers {
            writeln!(temporary_file, "{peer}")?;
        }
        temporary_file.sync_all()?;
        fs::rename(&temporary, file)
    };
    write().map_err(Error::io(format!("cannot write {}", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::at(directory.path());
        (directory, home)
    }

    fn peer(name: &str, key: u8) -> Peer {
        Peer {
            name: name.parse().unwrap(),
            key_id: KeyId([key; 32]),
            secret: [key + 100; 32],
            number: 12_345_678,
        }
    }

    #[test]
    fn an_added_peer_is_found_by_name_until_removed() {
        let (_directory, home) = home();
        assert_eq!(all(&home.peers()).unwrap(), []);
        for peer in [peer("bob", 1), peer("carol", 2)] {
            add(&home, &peer).unwrap();
            assert_eq!(named(&home, &peer.name).unwrap(), peer);
        }
        assert!(
            named(&home, &"dave".parse().unwrap())
                .unwrap_err()
                .to_string()
                .contains("haul pair dave")
        );
        assert!(remove(&home, &"bob".parse().unwrap()).unwrap());
        assert!(!remove(&home, &"bob".parse().unwrap()).unwrap());
        assert_eq!(all(&home.peers()).unwrap(), [peer("carol", 2)]);
    }

    #[test]
    fn a_key_has_one_name_and_a_name_one_key() {
        let (_directory, home) = home();
        for peer in [peer("bob", 1), peer("robert", 1), peer("robert", 2)] {
            add(&home, &peer).unwrap();
            assert_eq!(all(&home.peers()).unwrap(), [peer]);
        }
    }

    #[test]
    fn the_file_is_private_and_messages_hide_secrets() {
        use std::os::unix::fs::PermissionsExt;
        let (_directory, home) = home();
        add(&home, &peer("bob", 7)).unwrap();
        assert_eq!(
            fs::metadata(home.peers()).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let secret = BASE64_NOPAD.encode(&[107; 32]);
        assert!(!format!("{:?}", peer("bob", 7)).contains(&secret));
        fs::write(home.peers(), format!("# ours\n\nbob SHA256:x {secret} 1\n")).unwrap();
        let error = all(&home.peers()).unwrap_err().to_string();
        assert!(
            error.contains("line 3") && !error.contains(&secret),
            "{error}"
        );
    }
}
