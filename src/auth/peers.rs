//! The file of machines that this one was paired with: `NAME SHA256:... SECRET NUMBER`, one a line, `#` before comments.
//!
//! It is private, since the secrets in it let two machines meet without a code. Without the keys, which TLS asks for as
//! well, they are worth nothing.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;

use crate::auth::identity::{Home, KeyId, check_private};
use crate::error::{Error, Result};
use crate::protocol::target::Petname;

/// A machine that this one was paired with. Its `Debug` does not show the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Peer {
    /// What this user calls it.
    pub name: Petname,
    /// Its key.
    pub key_id: KeyId,
    /// What only the two know.
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
            STANDARD_NO_PAD.encode(self.secret),
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
            return Err("there are four fields".into());
        };
        let secret = STANDARD_NO_PAD
            .decode(secret)
            .ok()
            .and_then(|secret| secret.try_into().ok());
        Ok(Self {
            name: name.parse()?,
            key_id: key_id
                .parse()
                .map_err(|bad: crate::auth::identity::BadKeyId| bad.to_string())?,
            secret: secret.ok_or("the third field is no secret")?,
            number: number
                .parse()
                .map_err(|_| "the fourth field is no number")?,
        })
    }
}

/// All of a file, in its order; none when there is no such file.
///
/// # Errors
/// [`Error::Home`] when it cannot be read, when others can read it, or with the number of a line that makes no sense.
pub fn all(file: &Path) -> Result<Vec<Peer>> {
    let bad = |why| Error::Home {
        path: file.to_owned(),
        why,
    };
    let text = match fs::read_to_string(file) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(|e| bad(format!("cannot be read: {e}")))?,
    };
    let metadata = fs::metadata(file).map_err(|e| bad(format!("cannot be read: {e}")))?;
    check_private(file, &metadata, 0o600)?;
    let mut peers = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line
            .split_once('#')
            .map_or(line, |(before, _)| before)
            .trim();
        if !line.is_empty() {
            // What the line says is not shown: it has a secret in it.
            peers.push(
                line.parse()
                    .map_err(|why| bad(format!("line {number} makes no sense: {why}")))?,
            );
        }
    }
    Ok(peers)
}

/// Whoever has a name.
///
/// # Errors
/// [`Error::Usage`] when nobody has, saying what to do; as [`all`].
pub fn named(home: &Home, name: &Petname) -> Result<Peer> {
    all(&home.peers())?.into_iter().find(|peer| peer.name == *name).ok_or_else(|| {
        Error::Usage(format!("no machine is known here as {name}: `haul pair {name}` on both makes it known, once"))
    })
}

/// Adds a machine. Whatever had its key or its name is replaced.
///
/// # Errors
/// As [`all`]; [`Error::Io`] when the system refuses.
pub fn add(home: &Home, peer: &Peer) -> Result<()> {
    let _lock = home.lock()?;
    let mut peers = all(&home.peers())?;
    peers.retain(|there| there.key_id != peer.key_id && there.name != peer.name);
    peers.push(peer.clone());
    write(&home.peers(), &peers)
}

/// Removes a machine; `false` when it was not there.
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
    peers.retain(|there| there.name != *name);
    if peers.len() == before {
        return Ok(false);
    }
    write(&home.peers(), &peers).map(|()| true)
}

/// The whole file anew, so that a crash leaves one or the other. Comments go.
fn write(file: &Path, peers: &[Peer]) -> Result<()> {
    let new = file.with_extension("new");
    let write = || -> io::Result<()> {
        let mut writing = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        for peer in peers {
            writeln!(writing, "{peer}")?;
        }
        writing.sync_all()?;
        fs::rename(&new, file)
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
    fn who_is_added_is_found_by_name_until_removed() {
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
    fn only_the_owner_may_read_it_and_no_message_shows_a_secret() {
        use std::os::unix::fs::PermissionsExt;
        let (_directory, home) = home();
        add(&home, &peer("bob", 7)).unwrap();
        assert_eq!(
            fs::metadata(home.peers()).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let secret = STANDARD_NO_PAD.encode([107; 32]);
        assert!(!format!("{:?}", peer("bob", 7)).contains(&secret));
        fs::write(home.peers(), format!("# ours\n\nbob SHA256:x {secret} 1\n")).unwrap();
        let error = all(&home.peers()).unwrap_err().to_string();
        assert!(
            error.contains("line 3") && !error.contains(&secret),
            "{error}"
        );
    }
}
