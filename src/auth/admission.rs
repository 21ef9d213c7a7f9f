//! Whom a server admits, and for what.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;

use crate::auth::identity::{BadKeyId, Home, KeyId, provider};
use crate::error::text::printable;
use crate::error::{Code, Reason};
use crate::protocol::target::Petname;

use super::peers;
use super::trust::{read_authorities, roots};

/// What every key may do, known or not. The default is nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Anyone {
    /// Every key may read.
    pub read: bool,
    /// Every key may write.
    pub write: bool,
}

/// Keys that a code has admitted, to read. Others connect too where there are guests, but only to introduce themselves.
#[derive(Debug, Default)]
pub struct Guests(Mutex<HashSet<KeyId>>);

impl Guests {
    /// From here on this key may read.
    pub fn admit(&self, key_id: KeyId) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key_id);
    }

    /// Nobody may any more, on new connections.
    pub fn clear(&self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// Whether this key may.
    pub(crate) fn has(&self, key_id: KeyId) -> bool {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&key_id)
    }
}

/// What a client may do. A client that may do neither is not admitted, unless it may still [introduce itself](Guests).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rights {
    /// May read.
    pub read: bool,
    /// May write.
    pub write: bool,
    /// Its name: from authorized_keys, or the common name in a certificate that an authority signed. Escaped, so that
    /// it is safe to print.
    pub name: Option<String>,
}

/// Whom a server admits. The default is nobody.
#[derive(Debug, Clone, Default)]
pub struct Admission {
    /// The file of keys that may read and write: `SHA256:... [NAME]` one a line, `#` before comments. Read afresh for
    /// each client; nobody when there is no such file.
    pub authorized_keys: Option<PathBuf>,
    /// The file of machines that this one was [paired](super::peers) with: they may read and write. Read afresh too.
    pub peers: Option<PathBuf>,
    /// Certificates of authorities: a client whose certificate is valid now and leads to one may read and write.
    pub authorities: Vec<CertificateDer<'static>>,
    /// What every other key may do.
    pub anyone: Anyone,
    /// Who may read since it knew a code.
    pub guests: Option<Arc<Guests>>,
}

impl Admission {
    /// What HAUL_HOME says.
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

    /// What a client may do that has shown this chain in a handshake and so proved that it holds the key of the first
    /// certificate. Reads a small file.
    ///
    /// # Errors
    /// A [`Reason`] for the client, with [`Code::NotAdmitted`]: its key id, and the line that would admit it.
    pub fn judge(&self, chain: &[CertificateDer<'_>]) -> Result<Rights, Reason> {
        let (certificate, others) = chain.split_first().ok_or(Code::NotAdmitted)?;
        let key_id = KeyId::of_certificate(certificate)
            .map_err(|e| Reason::new(Code::NotAdmitted, e.to_string()))?;
        if let Some(guests) = &self.guests {
            return Ok(Rights {
                read: guests.has(key_id),
                write: false,
                name: None,
            });
        }
        let on_file = match self
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
                name: Some(peer.to_string()),
            });
        }
        if let Ok(Some(name)) = on_file {
            return Ok(Rights {
                read: true,
                write: true,
                name,
            });
        }
        if self.is_vouched_for(certificate, others) {
            return Ok(Rights {
                read: true,
                write: true,
                name: common_name(certificate),
            });
        }
        let Anyone { read, write } = self.anyone;
        match on_file {
            _ if read || write => Ok(Rights {
                read,
                write,
                name: None,
            }),
            Err(e) => {
                let file = self.authorized_keys.as_deref().unwrap_or(Path::new(""));
                tracing::error!(%key_id, file = %file.display(), "a client was turned away, since its key cannot be looked up: {e}");
                let text =
                    "the server cannot look up keys now; its owner finds the reason in its log";
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

    /// What this machine calls a key that it was paired with. A file that makes no sense admits nobody.
    fn paired(&self, key_id: KeyId) -> Option<Petname> {
        let file = self.peers.as_deref()?;
        let peers = peers::all(file)
            .inspect_err(|error| tracing::warn!(%error, "no paired machine is admitted"))
            .ok()?;
        peers
            .into_iter()
            .find(|peer| peer.key_id == key_id)
            .map(|peer| peer.name)
    }

    /// Whether a chain, valid now, leads to an authority.
    fn is_vouched_for(
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

/// Whether the file has a key, and its name if it has one there. A line that makes no sense admits nobody and harms no
/// other line.
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
            Err(e) => tracing::warn!(file = %file.display(), line, "passed over: {e}"),
        }
    }
    Ok(found)
}

/// The key and name of a line; none in a blank line or comment.
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

/// The common name in a certificate, for logs only: the first short string after the attribute's type in the subject.
fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    /// OBJECT IDENTIFIER 2.5.4.3 in DER.
    const COMMON_NAME: &[u8] = &[0x06, 0x03, 0x55, 0x04, 0x03];
    // As an anchor, since that is what rustls tells the subject of.
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

    struct Bench {
        _directory: tempfile::TempDir,
        admission: Admission,
    }

    impl Bench {
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
    fn the_line_that_a_refused_client_is_told_admits_it() {
        let bench = Bench::new(Anyone::default());
        let client = Identity::generate().unwrap();
        let why = bench.admission.judge(client.chain()).unwrap_err();
        assert_eq!(why.code, Code::NotAdmitted);
        let (_, line) = why.text.raw().split_once("in authorized_keys: ").unwrap();
        assert_eq!(line, format!("{} NAME", client.key_id()));
        bench.write(line);
        let name = Some("NAME".to_owned());
        assert_eq!(
            bench.admission.judge(client.chain()),
            Ok(Rights {
                read: true,
                write: true,
                name
            })
        );
        bench.write("");
        assert!(
            bench.admission.judge(client.chain()).is_err(),
            "the file was not read afresh"
        );
    }

    #[test]
    fn a_line_that_makes_no_sense_harms_no_other() {
        let bench = Bench::new(Anyone::default());
        let client = Identity::generate().unwrap();
        let id = client.key_id();
        bench.write(&format!(
            "# ours\nSHA256:nonsense eve\n{id}x mallory\n\n  {id}=  a \x1b[2J b # laptop\n{id} second\n"
        ));
        let rights = bench.admission.judge(client.chain()).unwrap();
        assert_eq!(rights.name.as_deref(), Some("a \\u{1b}[2J b"));
        let other = Identity::generate().unwrap();
        assert!(bench.admission.judge(other.chain()).is_err());
    }

    #[test]
    fn a_list_that_cannot_be_read_admits_nobody_and_tells_strangers_nothing() {
        let client = Identity::generate().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let authorized_keys = Some(directory.path().to_owned());
        let why = Admission {
            authorized_keys,
            ..Admission::default()
        }
        .judge(client.chain())
        .unwrap_err();
        assert_eq!(why.code, Code::NotAdmitted);
        assert!(
            !why.text.contains(&directory.path().to_string_lossy()),
            "{why}"
        );
        assert!(why.text.contains("cannot look up keys"), "{why}");
    }

    #[test]
    fn anyone_may_do_what_is_named_and_no_more() {
        let client = Identity::generate().unwrap();
        for (read, write) in [(true, false), (false, true), (true, true)] {
            let bench = Bench::new(Anyone { read, write });
            assert_eq!(
                bench.admission.judge(client.chain()),
                Ok(Rights {
                    read,
                    write,
                    name: None
                })
            );
            bench.write(&format!("{} alice", client.key_id()));
            let rights = bench.admission.judge(client.chain()).unwrap();
            assert!(rights.read && rights.write, "a key on file may do both");
        }
    }

    #[test]
    fn who_shows_no_certificate_is_nobody() {
        assert!(
            Admission {
                anyone: Anyone {
                    read: true,
                    write: true
                },
                ..Admission::default()
            }
            .judge(&[])
            .is_err()
        );
    }
}
