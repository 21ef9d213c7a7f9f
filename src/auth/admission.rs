//! Which clients a server admits, and with which rights.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;

use crate::error::lock::lock;
use crate::error::text::printable;
use crate::error::{Code, Reason};
use crate::protocol::target::Petname;

use super::home::Home;
use super::identity::{BadKeyId, KeyId, provider};
use super::peers;
use super::trust::{read_authorities, roots};

/// Rights of every key, known or not. The default is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Anyone {
    /// Every key may read.
    pub read: bool,
    /// Every key may write.
    pub write: bool,
}

/// Keys that may read since they proved a code. While a server has guests, other keys may connect too, but only to
/// prove a code.
#[derive(Debug, Default)]
pub struct Guests(Mutex<HashSet<KeyId>>);

impl Guests {
    /// Lets this key read.
    pub fn admit(&self, key_id: KeyId) {
        lock(&self.0).insert(key_id);
    }

    /// Removes all guests; connections that exist are not affected.
    pub fn clear(&self) {
        lock(&self.0).clear();
    }

    /// Whether this key is a guest.
    pub(crate) fn has(&self, key_id: KeyId) -> bool {
        lock(&self.0).contains(&key_id)
    }
}

/// Rights of a client. Without any, a client is not admitted, unless it can still become a [guest](Guests).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rights {
    /// May read.
    pub read: bool,
    /// May write.
    pub write: bool,
    /// Whether the administrator knows the key: it is listed, paired, signed by an authority, or has proved a code. Others can
    /// make such keys at will, so a server gives them less.
    pub known: bool,
    /// Its name: from authorized_keys, or the common name in a certificate that an authority signed. Escaped, so that
    /// printing it is safe.
    pub name: Option<String>,
}

/// The clients that a server admits. The default is none.
#[derive(Debug, Clone, Default)]
pub struct Admission {
    /// The file of keys that may read and write: one `SHA256:... [NAME]` a line, `#` starts a comment. Read for each
    /// client; a missing file admits no one.
    pub authorized_keys: Option<PathBuf>,
    /// The file of [paired](super::peers) machines, which may read and write. Read for each client.
    pub peers: Option<PathBuf>,
    /// Certificates of authorities: a client may read and write if its certificate is valid now and leads to one.
    pub authorities: Vec<CertificateDer<'static>>,
    /// Rights of every other key.
    pub anyone: Anyone,
    /// Keys that may read since they proved a code. An [`Offering`](crate::pairing::send::Offering) sets it.
    #[doc(hidden)]
    pub guests: Option<Arc<Guests>>,
}

impl Admission {
    /// Reads the settings in HAUL_HOME.
    ///
    /// # Errors
    /// [`Error::Home`](crate::error::Error::Home) when the authorities cannot be read.
    pub fn of_home(home: &Home, anyone: Anyone) -> crate::error::Result<Self> {
        let authorities = read_authorities(&home.authorities())?;
        let authorized_keys = Some(home.authorized_keys());
        let peers = Some(home.peers());
        Ok(Self {
            authorized_keys,
            peers,
            authorities,
            anyone,
            guests: None,
        })
    }

    /// Returns the rights of a client that presented this chain in a handshake, and so proved that it holds the key
    /// of the first certificate. Reads small files.
    ///
    /// # Errors
    /// A [`Reason`] for the client, with [`Code::NotAdmitted`], its key id, and the line that would admit it.
    pub fn rights_of(&self, chain: &[CertificateDer<'_>]) -> Result<Rights, Reason> {
        let (certificate, others) = chain.split_first().ok_or(Code::NotAdmitted)?;
        let key_id = KeyId::of_certificate(certificate)
            .map_err(|e| Reason::new(Code::NotAdmitted, e.to_string()))?;
        if let Some(guests) = &self.guests {
            let known = guests.has(key_id);
            return Ok(Rights {
                read: known,
                write: false,
                known,
                name: None,
            });
        }
        let listed = match self
            .authorized_keys
            .as_deref()
            .map(|file| find(file, key_id))
        {
            None => Ok(None),
            Some(found) => found,
        };
        if let Some(peer) = self.paired(key_id) {
            return Ok(Rights {
                read: true,
                write: true,
                known: true,
                name: Some(peer.to_string()),
            });
        }
        if let Ok(Some(name)) = listed {
            return Ok(Rights {
                read: true,
                write: true,
                known: true,
                name,
            });
        }
        if self.is_signed_by_authority(certificate, others) {
            return Ok(Rights {
                read: true,
                write: true,
                known: true,
                name: common_name(certificate),
            });
        }
        let Anyone { read, write } = self.anyone;
        match listed {
            _ if read || write => Ok(Rights {
                read,
                write,
                known: false,
                name: None,
            }),
            Err(e) => {
                let file = self.authorized_keys.as_deref().unwrap_or(Path::new(""));
                tracing::error!(%key_id, file = %file.display(), "cannot look up a client's key, so it was refused: {e}");
                let text = "the server cannot look up keys now; its log has the reason";
                Err(Reason::new(Code::NotAdmitted, text))
            }
            Ok(_) => Err(Reason::new(
                Code::NotAdmitted,
                format!(
                    "the server does not know the key {key_id}. Its owner can admit it with this line in authorized_keys: \
                     {key_id} NAME"
                ),
            )),
        }
    }

    /// Returns the local name of a paired key. An invalid file admits no one.
    fn paired(&self, key_id: KeyId) -> Option<Petname> {
        let file = self.peers.as_deref()?;
        let peers = peers::all(file)
            .inspect_err(
                |error| tracing::warn!(%error, "cannot read the paired machines; none is admitted"),
            )
            .ok()?;
        peers
            .into_iter()
            .find(|peer| peer.key_id == key_id)
            .map(|peer| peer.name)
    }

    /// Whether a chain is valid now and leads to an authority.
    fn is_signed_by_authority(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
    ) -> bool {
        let verifier = match roots(&self.authorities) {
            Ok(roots) if roots.is_empty() => return false,
            Ok(roots) => {
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider().clone())
                    .build()
            }
            Err(e) => {
                tracing::error!("{e}");
                return false;
            }
        };
        verifier.is_ok_and(|v| {
            v.verify_client_cert(certificate, others, UnixTime::now())
                .is_ok()
        })
    }
}

/// Returns a key's entry in the file: its name, if it has one. An invalid line admits no one and affects no other
/// line.
fn find(file: &Path, key_id: KeyId) -> io::Result<Option<Option<String>>> {
    let text = match std::fs::read(file) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let mut found = None;
    for (line, text) in (1..).zip(String::from_utf8_lossy(&text).lines()) {
        match parse(text) {
            Ok(Some((id, name))) if id == key_id => found = found.or(Some(name)),
            Ok(_) => {}
            Err(e) => tracing::warn!(file = %file.display(), line, "invalid line ignored: {e}"),
        }
    }
    Ok(found)
}

/// Parses a line into key and name; `None` for a blank line or a comment.
fn parse(line: &str) -> Result<Option<(KeyId, Option<String>)>, BadKeyId> {
    let line = line
        .split_once('#')
        .map_or(line, |(before, _)| before)
        .trim();
    if line.is_empty() {
        return Ok(None);
    }
    let (key_id, name) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let name = Some(name.trim())
        .filter(|n| !n.is_empty())
        .map(|n| printable(n.as_bytes()));
    Ok(Some((key_id.parse()?, name)))
}

/// Returns the common name in a certificate, for logs only: the first short string after the attribute's type in the
/// subject.
fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    /// OBJECT IDENTIFIER 2.5.4.3 in DER.
    const COMMON_NAME: &[u8] = &[0x06, 0x03, 0x55, 0x04, 0x03];
    // rustls exposes the subject of trust anchors only.
    let mut anchors = RootCertStore::empty();
    anchors.add(certificate.clone()).ok()?;
    let subject = anchors.roots.first()?.subject.to_vec();
    let at = subject
        .windows(COMMON_NAME.len())
        .position(|w| w == COMMON_NAME)?
        + COMMON_NAME.len();
    // Tag and length; one byte of length goes up to 127, and RFC 5280 allows 64.
    let (&length, text) = subject.get(at + 1..)?.split_first()?;
    text.get(..usize::from(length)).map(printable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::identity::Identity;

    struct Server {
        _directory: tempfile::TempDir,
        admission: Admission,
    }

    impl Server {
        fn new(anyone: Anyone) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let authorized_keys = Some(directory.path().join("authorized_keys"));
            Self {
                _directory: directory,
                admission: Admission {
                    authorized_keys,
                    anyone,
                    ..Admission::default()
                },
            }
        }

        fn write(&self, text: &str) {
            std::fs::write(self.admission.authorized_keys.as_ref().unwrap(), text).unwrap();
        }
    }

    #[test]
    fn the_line_in_a_refusal_admits_the_client() {
        let server = Server::new(Anyone::default());
        let client = Identity::generate().unwrap();
        let reason = server.admission.rights_of(client.chain()).unwrap_err();
        assert_eq!(reason.code, Code::NotAdmitted);
        let (_, line) = reason
            .text
            .raw()
            .split_once("in authorized_keys: ")
            .unwrap();
        assert_eq!(line, format!("{} NAME", client.key_id()));
        server.write(line);
        let name = Some("NAME".to_owned());
        assert_eq!(
            server.admission.rights_of(client.chain()),
            Ok(Rights {
                read: true,
                write: true,
                known: true,
                name
            })
        );
        server.write("");
        assert!(
            server.admission.rights_of(client.chain()).is_err(),
            "the file was not read again"
        );
    }

    #[test]
    fn an_invalid_line_affects_no_other_line() {
        let server = Server::new(Anyone::default());
        let client = Identity::generate().unwrap();
        let id = client.key_id();
        server.write(&format!(
            "# ours\nSHA256:nonsense eve\n{id}x mallory\n\n  {id}=  a \x1b[2J b # laptop\n{id} second\n"
        ));
        let rights = server.admission.rights_of(client.chain()).unwrap();
        assert_eq!(rights.name.as_deref(), Some("a \\u{1b}[2J b"));
        let other = Identity::generate().unwrap();
        assert!(server.admission.rights_of(other.chain()).is_err());
    }

    #[test]
    fn an_unreadable_list_admits_none_and_reveals_nothing() {
        let client = Identity::generate().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let authorized_keys = Some(directory.path().to_owned());
        let reason = Admission {
            authorized_keys,
            ..Admission::default()
        }
        .rights_of(client.chain())
        .unwrap_err();
        assert_eq!(reason.code, Code::NotAdmitted);
        assert!(
            !reason.text.contains(&directory.path().to_string_lossy()),
            "{reason}"
        );
        assert!(reason.text.contains("cannot look up keys"), "{reason}");
    }

    #[test]
    fn anyone_has_exactly_the_given_rights() {
        let client = Identity::generate().unwrap();
        for (read, write) in [(true, false), (false, true), (true, true)] {
            let server = Server::new(Anyone { read, write });
            assert_eq!(
                server.admission.rights_of(client.chain()),
                Ok(Rights {
                    read,
                    write,
                    known: false,
                    name: None
                })
            );
            server.write(&format!("{} alice", client.key_id()));
            let rights = server.admission.rights_of(client.chain()).unwrap();
            assert!(rights.read && rights.write, "a listed key may do both");
        }
    }

    #[test]
    fn a_client_without_certificate_is_refused() {
        assert!(
            Admission {
                anyone: Anyone {
                    read: true,
                    write: true
                },
                ..Admission::default()
            }
            .rights_of(&[])
            .is_err()
        );
    }
}
