//! HAUL_HOME: the directory of this machine's key and of the peers that it trusts.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use etcetera::BaseStrategy;

use super::identity::{Identity, self_signed};
use crate::error::{Error, Result, knows_no_flock};

/// Permission bits of group and others, which a private key and its directory must not have.
const GROUP_AND_OTHERS: u32 = 0o077;
/// Largest key or certificate file in bytes. A handshake limits a chain to 16 KiB anyway.
const MAX_PEM_SIZE: u64 = 1 << 20;

/// HAUL_HOME: the directory with this machine's key and the peers that it trusts.
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

/// Waits for the lock of an open file. If the filesystem does not support locks, it continues without one: then only
/// one process at a time may change files in HAUL_HOME.
pub(crate) fn lock_exclusively(file: &File) -> io::Result<()> {
    match rustix::io::retry_on_intr(|| {
        rustix::fs::flock(file, rustix::fs::FlockOperation::LockExclusive)
    }) {
        Err(e) if knows_no_flock(e) => Ok(()),
        other => Ok(other?),
    }
}

impl Home {
    /// Returns `$HAUL_HOME`, or else `haul/` in the platform's config directory (`$XDG_CONFIG_HOME`, `~/.config`).
    ///
    /// # Errors
    /// [`Error::Usage`] when neither HAUL_HOME nor a home directory is set.
    pub fn from_env() -> Result<Self> {
        if let Some(path) = std::env::var_os("HAUL_HOME").filter(|p| !p.is_empty()) {
            return Ok(Self::at(path));
        }
        let strategy = etcetera::choose_base_strategy().map_err(|_| {
            Error::Usage(
                "cannot find a home directory; set HAUL_HOME to the directory for the key".into(),
            )
        })?;
        Ok(Self::at(strategy.config_dir().join("haul")))
    }

    /// Uses this directory. [`identity`](Self::identity) creates it with private mode.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        // Messages contain the path, which must hold in any working directory.
        Self {
            path: std::path::absolute(&path).unwrap_or(path),
        }
    }

    /// Returns the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file of servers that clients know: one `HOST:PORT SHA256:...` a line.
    pub fn known_hosts(&self) -> PathBuf {
        self.path.join("known_hosts")
    }

    /// The file of clients that servers admit: one `SHA256:... [NAME]` a line.
    pub fn authorized_keys(&self) -> PathBuf {
        self.path.join("authorized_keys")
    }

    /// The file of paired machines; see [`peers`](crate::auth::peers).
    pub fn peers(&self) -> PathBuf {
        self.path.join("peers")
    }

    /// The [`Index`](crate::storage::digest_index::Index) of digests: a cache that may be deleted.
    pub fn index(&self) -> PathBuf {
        self.path.join("index.redb")
    }

    /// The file of defaults for the commands' options.
    pub fn config(&self) -> PathBuf {
        self.path.join("config.toml")
    }

    /// The file of authorities' certificates, as PEM.
    pub fn authorities(&self) -> PathBuf {
        self.path.join("authorities.pem")
    }

    fn key(&self) -> PathBuf {
        self.path.join("key.pem")
    }

    fn certificate(&self) -> PathBuf {
        self.path.join("cert.pem")
    }

    /// Loads this machine's key and certificate, and generates them at first use. Concurrent processes get the same
    /// ones, and existing files are never overwritten. Blocks on the disk.
    ///
    /// # Errors
    /// [`Error::Home`] when another user could read the key, when one of the two files is missing, or when they
    /// cannot be read or do not belong together; [`Error::Io`] when the system refuses.
    pub fn identity(&self) -> Result<Identity> {
        self.make_directory()?;
        // No lock when both files exist, so that a home on a read-only disk works.
        if !(self.key().exists() && self.certificate().exists()) {
            let _lock = self.lock()?;
            if !self.key().exists() && !self.certificate().exists() {
                return self.make_identity();
            }
        }
        self.load_identity()
    }

    fn make_directory(&self) -> Result<()> {
        let context = || format!("cannot create {}", self.path.display());
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .map_err(Error::io(context()))?;
        let metadata = fs::metadata(&self.path).map_err(Error::io(context()))?;
        check_private(&self.path, &metadata, 0o700)
    }

    /// Locks the home while the identity or the peers are written; the lock ends on drop.
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
        let key = self.open_file(&self.key(), &self.certificate())?;
        let metadata = key
            .metadata()
            .map_err(Error::io(format!("cannot read {}", self.key().display())))?;
        // Checks the open file, so that it cannot be exchanged in between.
        check_private(&self.key(), &metadata, 0o600)?;
        let key = read_pem(key, &self.key())?;
        let chain = read_pem(
            self.open_file(&self.certificate(), &self.key())?,
            &self.certificate(),
        )?;
        Identity::parse(&chain, &key).map_err(|why| Error::Home {
            path: self.key(),
            why: format!(
                "{why}; restore the {} that belongs to it, or move both files away to generate a new pair (then \
                 give peers the new key)",
                self.certificate().display()
            ),
        })
    }

    fn make_identity(&self) -> Result<Identity> {
        let (chain, key) = self_signed()?;
        create_private_file(&self.certificate(), chain.as_bytes())?;
        // The key is last: when it exists, so does its certificate.
        create_private_file(&self.key(), key.as_bytes())?;
        let synced = File::open(&self.path).and_then(|directory| directory.sync_all());
        synced.map_err(Error::io(format!("cannot sync {}", self.path.display())))?;
        Identity::from_pem(chain.as_bytes(), key.as_bytes())
    }

    /// Opens one of the two files of an identity.
    fn open_file(&self, path: &Path, other: &Path) -> Result<File> {
        File::open(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::Home {
                path: path.to_owned(),
                why: format!(
                    "the file is missing, but {} exists; restore it, or move the other away too to generate a new pair \
                     (then give peers the new key)",
                    other.display()
                ),
            },
            _ => Error::io(format!("cannot open {}", path.display()))(e),
        })
    }
}

fn read_pem(file: File, path: &Path) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    file.take(MAX_PEM_SIZE)
        .read_to_end(&mut content)
        .map_err(Error::io(format!("cannot read {}", path.display())))?;
    Ok(content)
}

/// Creates a private file completely, synced, and only if none exists: link(2) never replaces. The caller holds the
/// lock.
fn create_private_file(path: &Path, content: &[u8]) -> Result<()> {
    let temporary = path.with_extension("new");
    let create = || -> io::Result<()> {
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::hard_link(&temporary, path)?;
        fs::remove_file(&temporary)
    };
    create().map_err(Error::io(format!("cannot write {}", path.display())))
}

/// Refuses a file or directory that another user owns or may access.
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
            "belongs to user {}, not to you ({me}), and its owner could replace the key: use a HAUL_HOME of your own",
            metadata.uid()
        ));
    }
    if metadata.mode() & GROUP_AND_OTHERS != 0 {
        return refuse(format!(
            "other users have access (mode {:04o}), which exposes the private key; run: chmod {mode:o} '{}'",
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
    fn concurrent_first_uses_get_the_same_key() {
        let (_directory, home) = new_home();
        let start = std::sync::Barrier::new(8);
        let ids: std::collections::BTreeSet<_> = std::thread::scope(|scope| {
            let load = || {
                start.wait();
                home.identity().unwrap().key_id()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(load)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(ids.len(), 1);
    }

    #[test]
    fn a_key_or_home_open_to_others_is_refused_with_a_chmod() {
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
    fn half_an_identity_is_refused_and_not_overwritten() {
        let (_directory, home) = new_home();
        home.identity().unwrap();
        for (missing, left) in [
            (home.key(), home.certificate()),
            (home.certificate(), home.key()),
        ] {
            let away = missing.with_extension("away");
            let before = fs::read(&left).unwrap();
            fs::rename(&missing, &away).unwrap();
            let error = home.identity().unwrap_err();
            assert!(
                matches!(&error, Error::Home { path, .. } if *path == missing),
                "{error}"
            );
            assert_eq!(fs::read(&left).unwrap(), before);
            assert!(!missing.exists());
            fs::rename(&away, &missing).unwrap();
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
    fn an_unfinished_file_after_a_crash_is_replaced() {
        let (_directory, home) = new_home();
        home.make_directory().unwrap();
        fs::write(home.key().with_extension("new"), "half").unwrap();
        home.identity().unwrap();
    }
}
