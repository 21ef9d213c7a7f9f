//! Who this machine is: a key pair with its certificate, and the directory that keeps both.
//!
//! What names a peer is its key, not its certificate: a [`KeyId`] stays the same when a team's authority signs a new
//! certificate for the same key.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use etcetera::BaseStrategy;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;

use crate::error::{Error, Result, knows_no_flock};

/// What a key id begins with: the digest's name, as ssh writes it.
const PREFIX: &str = "SHA256:";
/// Base64 as ssh shows fingerprints: standard alphabet, unpadded; padding that somebody added is no fault.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_encode_padding(false)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);
/// The name in certificates made at first use. Nothing checks it: such a certificate is known by its key.
const CERTIFICATE_NAME: &str = "haul";
/// Group and others: whom neither a private key nor its directory may be open to.
const OTHERS: u32 = 0o077;
/// Longest key or certificate file in bytes. A chain must fit 16 KiB in a handshake anyway.
const MAX_PEM: u64 = 1 << 20;

/// The cryptography behind every handshake, with its order of preference (X25519MLKEM768 first).
pub(crate) fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    &PROVIDER
}

/// Names a key: SHA-256 of the certificate's SubjectPublicKeyInfo (RFC 5280, section 4.1) in DER.
///
/// Written and read as `SHA256:` and 43 characters of base64, as ssh writes fingerprints.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 32]);

impl KeyId {
    /// The key id of a certificate. It says nothing about whether the peer holds the key: TLS does.
    ///
    /// # Errors
    /// [`Error::Protocol`] when this is no X.509 certificate.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self> {
        let parsed = ParsedCertificate::try_from(certificate).map_err(|e| {
            Error::Protocol(format!("a certificate that cannot be read: {e}").into())
        })?;
        let hash = digest(&SHA256, &parsed.subject_public_key_info());
        let mut id = [0; 32];
        id.copy_from_slice(hash.as_ref());
        Ok(Self(id))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", BASE64.encode(self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Not a key id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a key id: it should be SHA256: and 43 letters, digits, + and /, as `haul id` prints it"
)]
pub struct BadKeyId;

impl FromStr for KeyId {
    type Err = BadKeyId;

    fn from_str(text: &str) -> Result<Self, BadKeyId> {
        let encoded = text.strip_prefix(PREFIX).ok_or(BadKeyId)?;
        let decoded = BASE64.decode(encoded).map_err(|_| BadKeyId)?;
        decoded.try_into().map(Self).map_err(|_| BadKeyId)
    }
}

/// A private key and the certificate chain that goes with it.
#[derive(Clone)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
    key_id: KeyId,
}

impl Identity {
    /// A new key with a self-signed certificate.
    ///
    /// ECDSA on P-256, since every implementation of TLS 1.3 must have it (RFC 8446, section 9.1). The certificate never
    /// expires, since what peers trust is the key.
    ///
    /// # Errors
    /// [`Error::Io`] when the system gives no randomness.
    pub fn generate() -> Result<Self> {
        let (chain, key) = self_signed()?;
        Self::from_pem(chain.as_bytes(), key.as_bytes())
    }

    /// A key and its chain, own certificate first, as PEM.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no certificate or key in the PEM, or they do not belong together.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self> {
        Self::parse(chain, key).map_err(Error::Usage)
    }

    fn parse(chain: &[u8], key: &[u8]) -> Result<Self, String> {
        let chain = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| format!("the certificate cannot be read: {e}"))?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|e| format!("the private key cannot be read: {e}"))?;
        let first = chain.first().ok_or("there is no certificate")?;
        let key_id = KeyId::of_certificate(first).map_err(|e| e.to_string())?;
        let signing = provider()
            .key_provider
            .load_private_key(key.clone_key())
            .map_err(|e| format!("the private key cannot be used: {e}"))?;
        CertifiedKey::new(chain.clone(), signing)
            .keys_match()
            .map_err(|_| "the private key does not belong to the certificate")?;
        Ok(Self {
            chain,
            key: Arc::new(key),
            key_id,
        })
    }

    /// What peers know this machine by.
    pub fn key_id(&self) -> KeyId {
        self.key_id
    }

    /// The certificates shown to peers, own one first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// A copy of the private key.
    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

/// A self-signed certificate and its new key, as PEM.
fn self_signed() -> Result<(String, String)> {
    use rcgen::{
        CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
        date_time_ymd,
    };
    let make = || -> Result<_, rcgen::Error> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::new([CERTIFICATE_NAME.to_owned()])?;
        params
            .distinguished_name
            .push(DnType::CommonName, CERTIFICATE_NAME);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        // 99991231235959Z is what a certificate without an end carries (RFC 5280, section 4.1.2.5). A begin long ago
        // spares machines whose clock lags.
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(9999, 12, 31) + Duration::from_secs(24 * 60 * 60 - 1);
        Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
    };
    make().map_err(|e| Error::io("cannot make a key pair")(io::Error::other(e)))
}

/// HAUL_HOME: the directory that keeps this machine's key and whom it trusts.
///
/// | file | content |
/// |---|---|
/// | `key.pem`, `cert.pem` | this machine's [`Identity`]; made at first use |
/// | `known_hosts` | servers that this machine's clients know |
/// | `authorized_keys` | clients that this machine's servers admit |
/// | `index.redb` | the digests of large files; a cache |
/// | `authorities.pem` | certificates whose holders may vouch for servers and clients |
#[derive(Debug, Clone)]
pub struct Home {
    path: PathBuf,
}

/// Waits for the lock of an open file. Where the filesystem knows no locks it goes on without: then only one process may
/// change what is in HAUL_HOME at a time.
pub(crate) fn lock_exclusively(file: &File) -> io::Result<()> {
    match rustix::io::retry_on_intr(|| {
        rustix::fs::flock(file, rustix::fs::FlockOperation::LockExclusive)
    }) {
        Err(e) if knows_no_flock(e) => Ok(()),
        other => Ok(other?),
    }
}

impl Home {
    /// `$HAUL_HOME`, or else `haul/` in the platform's config directory (`$XDG_CONFIG_HOME`, `~/.config`).
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no home directory to find it in.
    pub fn from_env() -> Result<Self> {
        if let Some(path) = std::env::var_os("HAUL_HOME").filter(|p| !p.is_empty()) {
            return Ok(Self::at(path));
        }
        let strategy = etcetera::choose_base_strategy().map_err(|_| {
            Error::Usage(
                "there is no home directory; say with HAUL_HOME where to keep the key".into(),
            )
        })?;
        Ok(Self::at(strategy.config_dir().join("haul")))
    }

    /// A directory of one's own choice. It is made, private, when [`identity`](Self::identity) is first asked for.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        // Messages name the file, and should hold wherever they are read.
        Self {
            path: std::path::absolute(&path).unwrap_or(path),
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Servers that clients know: `HOST:PORT SHA256:...` one a line.
    pub fn known_hosts(&self) -> PathBuf {
        self.path.join("known_hosts")
    }

    /// Clients that servers admit: `SHA256:... [NAME]` one a line.
    pub fn authorized_keys(&self) -> PathBuf {
        self.path.join("authorized_keys")
    }

    /// Machines that this one was paired with; see [`peers`](crate::auth::peers).
    pub fn peers(&self) -> PathBuf {
        self.path.join("peers")
    }

    /// The [`Index`](crate::storage::digest_index::Index) of digests; a cache, of which nothing is lost with it.
    pub fn index(&self) -> PathBuf {
        self.path.join("index.redb")
    }

    /// What the commands use unless an option says otherwise.
    pub fn config(&self) -> PathBuf {
        self.path.join("config.toml")
    }

    /// Certificates of authorities, as PEM.
    pub fn authorities(&self) -> PathBuf {
        self.path.join("authorities.pem")
    }

    fn key(&self) -> PathBuf {
        self.path.join("key.pem")
    }

    fn certificate(&self) -> PathBuf {
        self.path.join("cert.pem")
    }

    /// This machine's key and certificate, made at first use. Processes that come at once end with the same ones, and
    /// what is there already is never overwritten. Blocks on the disk.
    ///
    /// # Errors
    /// [`Error::Home`] when somebody else could read the key, when one of the two files is missing, or when they cannot
    /// be read or do not belong together; [`Error::Io`] when the system refuses.
    pub fn identity(&self) -> Result<Identity> {
        self.make_directory()?;
        // Without a lock where both are there, so that a home on a read-only disk serves.
        if !(self.key().exists() && self.certificate().exists()) {
            let _lock = self.lock()?;
            if !self.key().exists() && !self.certificate().exists() {
                return self.make_identity();
            }
        }
        self.load_identity()
    }

    fn make_directory(&self) -> Result<()> {
        let what = || format!("cannot make {}", self.path.display());
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .map_err(Error::io(what()))?;
        let metadata = fs::metadata(&self.path).map_err(Error::io(what()))?;
        check_private(&self.path, &metadata, 0o700)
    }

    /// Held while the identity is made, or peers are; released when dropped.
    pub(crate) fn lock(&self) -> Result<File> {
        let path = self.path.join("lock");
        let lock = || -> io::Result<File> {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&path)?;
            lock_exclusively(&file)?;
            Ok(file)
        };
        lock().map_err(Error::io(format!("cannot lock {}", path.display())))
    }

    fn load_identity(&self) -> Result<Identity> {
        let key = self.open_half(&self.key(), &self.certificate())?;
        let metadata = key
            .metadata()
            .map_err(Error::io(format!("cannot read {}", self.key().display())))?;
        // Of the file that is open, so that nobody can exchange it in between.
        check_private(&self.key(), &metadata, 0o600)?;
        let key = read_pem(key, &self.key())?;
        let chain = read_pem(
            self.open_half(&self.certificate(), &self.key())?,
            &self.certificate(),
        )?;
        Identity::parse(&chain, &key).map_err(|why| Error::Home {
            path: self.key(),
            why: format!(
                "{why}. Put back the {} that belongs to it, or move both away to have a new pair made (peers that know \
                 the old key must then be told the new one)",
                self.certificate().display()
            ),
        })
    }

    fn make_identity(&self) -> Result<Identity> {
        let (chain, key) = self_signed()?;
        put(&self.certificate(), chain.as_bytes())?;
        // The key last: where it stands, its certificate does too.
        put(&self.key(), key.as_bytes())?;
        let synced = File::open(&self.path).and_then(|directory| directory.sync_all());
        synced.map_err(Error::io(format!("cannot sync {}", self.path.display())))?;
        Identity::from_pem(chain.as_bytes(), key.as_bytes())
    }

    /// Opens one of the two files of an identity.
    fn open_half(&self, path: &Path, other: &Path) -> Result<File> {
        File::open(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::Home {
                path: path.to_owned(),
                why: format!(
                    "missing, while {} is there. Put it back, or move the other away too to have a new pair made (peers \
                     that know the old key must then be told the new one)",
                    other.display()
                ),
            },
            _ => Error::io(format!("cannot open {}", path.display()))(e),
        })
    }
}

fn read_pem(file: File, path: &Path) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    file.take(MAX_PEM)
        .read_to_end(&mut content)
        .map_err(Error::io(format!("cannot read {}", path.display())))?;
    Ok(content)
}

/// Makes a private file appear whole, on the disk, and only where none is: link(2) never replaces. Needs the lock.
fn put(path: &Path, content: &[u8]) -> Result<()> {
    let unfinished = path.with_extension("new");
    let put = || -> io::Result<()> {
        match fs::remove_file(&unfinished) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(&unfinished)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::hard_link(&unfinished, path)?;
        fs::remove_file(&unfinished)
    };
    put().map_err(Error::io(format!("cannot write {}", path.display())))
}

/// Refuses what belongs to somebody else or is open to others.
pub(crate) fn check_private(path: &Path, metadata: &fs::Metadata, mode: u32) -> Result<()> {
    let refuse = |why| {
        Err(Error::Home {
            path: path.to_owned(),
            why,
        })
    };
    let me = rustix::process::geteuid().as_raw();
    if metadata.uid() != me {
        return refuse(format!(
            "belongs to user {}, not to you ({me}). Whoever owns it could exchange the key: use a HAUL_HOME of your own",
            metadata.uid()
        ));
    }
    if metadata.mode() & OTHERS != 0 {
        return refuse(format!(
            "open to others (mode {:04o}), and the private key must not be. Mend it with: chmod {mode:o} '{}'",
            metadata.mode() & 0o7777,
            path.display()
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_id_reads_as_it_is_written_and_as_ssh_and_openssl_write_it() {
        let id = Identity::generate().unwrap().key_id();
        let text = id.to_string();
        assert_eq!(text.len(), PREFIX.len() + 43);
        assert_eq!(text.parse(), Ok(id));
        assert_eq!(format!("{text}=").parse(), Ok(id));
        for bad in [
            "",
            "SHA256:",
            "sha256:",
            &text[PREFIX.len()..],
            &text[..40],
            &format!("{text}AAAA"),
            "SHA256:!!!!",
        ] {
            assert_eq!(bad.parse::<KeyId>(), Err(BadKeyId), "{bad}");
        }
    }

    #[test]
    fn a_key_id_is_the_digest_of_the_whole_public_key_info() {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new([])
            .unwrap()
            .self_signed(&key)
            .unwrap();
        let info = rcgen::PublicKeyData::subject_public_key_info(&key);
        assert_eq!(
            KeyId::of_certificate(certificate.der()).unwrap().0,
            digest(&SHA256, &info).as_ref()
        );
        assert!(KeyId::of_certificate(&CertificateDer::from(vec![0x30, 0])).is_err());
    }

    #[test]
    fn a_key_never_shows_in_debug_output() {
        let identity = Identity::generate().unwrap();
        assert_eq!(
            format!("{identity:?}"),
            format!("Identity {{ key_id: {}, .. }}", identity.key_id())
        );
    }

    #[test]
    fn a_key_without_its_certificate_is_no_identity() {
        let (chain, _) = self_signed().unwrap();
        let (_, other) = self_signed().unwrap();
        let error = Identity::from_pem(chain.as_bytes(), other.as_bytes()).unwrap_err();
        assert!(error.to_string().contains("does not belong"), "{error}");
        assert!(Identity::from_pem(b"", other.as_bytes()).is_err());
        assert!(Identity::from_pem(chain.as_bytes(), b"").is_err());
    }

    fn new_home() -> (tempfile::TempDir, Home) {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::at(directory.path().join("config/haul"));
        (directory, home)
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn the_first_use_makes_a_private_key_and_the_next_finds_it() {
        let (_directory, home) = new_home();
        let id = home.identity().unwrap().key_id();
        assert_eq!(home.identity().unwrap().key_id(), id);
        assert_eq!((mode(home.path()), mode(&home.key())), (0o700, 0o600));
        let names = fs::read_dir(home.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        assert_eq!(names, ["cert.pem", "key.pem", "lock"]);
    }

    #[test]
    fn all_who_come_at_once_get_the_same_key() {
        let (_directory, home) = new_home();
        let start = std::sync::Barrier::new(8);
        let ids: std::collections::BTreeSet<_> = std::thread::scope(|scope| {
            let come = || {
                start.wait();
                home.identity().unwrap().key_id()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(come)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(ids.len(), 1);
    }

    #[test]
    fn a_key_or_home_open_to_others_is_refused_with_the_way_to_mend_it() {
        let (_directory, home) = new_home();
        home.identity().unwrap();
        for (path, open, private) in [
            (home.key(), 0o640, 0o600),
            (home.path().to_owned(), 0o711, 0o700),
        ] {
            fs::set_permissions(&path, fs::Permissions::from_mode(open)).unwrap();
            let error = home.identity().unwrap_err().to_string();
            assert!(
                error.contains(&format!("chmod {private:o} '{}'", path.display())),
                "{error}"
            );
            fs::set_permissions(&path, fs::Permissions::from_mode(private)).unwrap();
            home.identity().unwrap();
        }
    }

    #[test]
    fn half_an_identity_is_an_error_and_nothing_is_overwritten() {
        let (_directory, home) = new_home();
        home.identity().unwrap();
        for (gone, left) in [
            (home.key(), home.certificate()),
            (home.certificate(), home.key()),
        ] {
            let away = gone.with_extension("away");
            let before = fs::read(&left).unwrap();
            fs::rename(&gone, &away).unwrap();
            let error = home.identity().unwrap_err();
            assert!(
                matches!(&error, Error::Home { path, .. } if *path == gone),
                "{error}"
            );
            assert_eq!(fs::read(&left).unwrap(), before);
            assert!(!gone.exists());
            fs::rename(&away, &gone).unwrap();
        }
    }

    #[test]
    fn a_pair_that_does_not_belong_together_is_refused() {
        let (_directory, home) = new_home();
        home.identity().unwrap();
        fs::write(home.certificate(), self_signed().unwrap().0).unwrap();
        let error = home.identity().unwrap_err().to_string();
        assert!(
            error.contains("does not belong to the certificate"),
            "{error}"
        );
    }

    #[test]
    fn what_a_crash_left_unfinished_is_no_hindrance() {
        let (_directory, home) = new_home();
        home.make_directory().unwrap();
        fs::write(home.key().with_extension("new"), "half").unwrap();
        home.identity().unwrap();
    }
}
