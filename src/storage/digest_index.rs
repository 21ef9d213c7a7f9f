//! The digest index: digests of large files, and where content is stored. It is only a cache: losing it costs time, and
//! no entry is trusted without a look at the content.
//!
//! One process at a time has it open; others work without it. A file is identified by device, inode, size and
//! modification time, as in rsync's quick check, so another name makes no difference. Its time of change (ctime), which
//! no program can set, shows whether it may have been written to since. A rename changes the ctime too, so a renamed
//! file is hashed once more.

mod database;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use redb::TableDefinition;

use self::database::{CacheDatabase, Table};
use super::file_id::{FileId, FileKey};
use crate::protocol::Time;
use crate::protocol::path::RelativePath;

/// Smallest size of a file in the index, in bytes: sending a smaller file costs little more than a round trip.
pub const LARGE_FILE: u64 = 16 << 20;

/// Digests and times of change, by file.
const DIGESTS: Table = TableDefinition::new("digests by change");
/// Files by store and digest.
const LOCATIONS: Table = TableDefinition::new("places");
/// Length of a file's key: device, inode, size, and the seconds and nanoseconds of its time.
const FILE_KEY: usize = 36;
/// Length of a row of [`DIGESTS`]: digest, seconds and nanoseconds of the time of change.
const DIGEST_ROW: usize = 32 + 12;

/// What the index knows about a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Its digest.
    Digest([u8; 32]),
    /// The file was hashed before, and may have been written to or only renamed since: it is worth hashing again.
    Touched,
}

/// A digest index in a file. Cheap to clone; the file is opened, or created, at first use. All calls block, and none
/// fails: on an error, the answer is unknown.
#[derive(Clone)]
pub struct Index(Arc<CacheDatabase>);

impl fmt::Debug for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Index").field(&self.0.path()).finish()
    }
}

impl Index {
    /// Creates an index in this file.
    pub fn new(path: PathBuf) -> Self {
        Self(Arc::new(CacheDatabase::new(path)))
    }

    /// Returns what is known of a file that was hashed before; `changed` is its current time of change.
    pub fn known(&self, key: &FileKey, changed: Time) -> Option<Known> {
        let row: [u8; DIGEST_ROW] = self.0.get(DIGESTS, &encode(key))?.try_into().ok()?;
        let digest: [u8; 32] = row[..32].try_into().ok()?;
        Some(if row == digest_row(changed, &digest) {
            Known::Digest(digest)
        } else {
            Known::Touched
        })
    }

    /// Stores the digest of a file. The file must have been settled when hashing began: see [`FileKey::is_settled`].
    pub fn remember(&self, key: &FileKey, changed: Time, digest: &[u8; 32]) {
        self.0
            .put(DIGESTS, &encode(key), &digest_row(changed, digest));
    }

    /// Returns a file that had this content once, and its path. `store` identifies the root of the store.
    pub fn location(&self, store: FileId, digest: &[u8; 32]) -> Option<(FileKey, RelativePath)> {
        let row = self.0.get(LOCATIONS, &location_key(store, digest))?;
        let (key, path) = row.split_at_checked(FILE_KEY)?;
        let path = RelativePath::from_components(path.split(|&byte| byte == b'/')).ok()?;
        Some((decode(key)?, path))
    }

    /// Records that a file with this content exists in a store.
    pub fn record_location(
        &self,
        store: FileId,
        digest: &[u8; 32],
        key: &FileKey,
        path: &RelativePath,
    ) {
        let row = [&encode(key), path.as_bytes()].concat();
        self.0.put(LOCATIONS, &location_key(store, digest), &row);
    }

    /// Forgets where this content was stored.
    pub fn forget_location(&self, store: FileId, digest: &[u8; 32]) {
        self.0.remove(LOCATIONS, &location_key(store, digest));
    }
}

fn encode(key: &FileKey) -> [u8; FILE_KEY] {
    let mut bytes = [0; FILE_KEY];
    let numbers = [
        key.file.device,
        key.file.inode,
        key.size,
        key.modified.seconds as u64,
    ];
    for (part, number) in bytes.chunks_exact_mut(8).zip(numbers) {
        part.copy_from_slice(&number.to_le_bytes());
    }
    bytes[32..].copy_from_slice(&key.modified.nanoseconds.to_le_bytes());
    bytes
}

/// Reads what [`encode`] wrote.
fn decode(bytes: &[u8]) -> Option<FileKey> {
    let number = |at: usize| {
        let bytes = bytes.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    Some(FileKey {
        file: FileId {
            device: number(0)?,
            inode: number(8)?,
        },
        size: number(16)?,
        modified: Time {
            seconds: number(24)? as i64,
            nanoseconds: u32::from_le_bytes(bytes.get(32..)?.try_into().ok()?),
        },
    })
}

fn digest_row(changed: Time, digest: &[u8; 32]) -> [u8; DIGEST_ROW] {
    let mut row = [0; DIGEST_ROW];
    row[..32].copy_from_slice(digest);
    row[32..40].copy_from_slice(&changed.seconds.to_le_bytes());
    row[40..].copy_from_slice(&changed.nanoseconds.to_le_bytes());
    row
}

/// The key includes the store, so that two stores with the same content do not evict each other.
fn location_key(store: FileId, digest: &[u8; 32]) -> [u8; 48] {
    let mut key = [0; 48];
    key[..8].copy_from_slice(&store.device.to_le_bytes());
    key[8..16].copy_from_slice(&store.inode.to_le_bytes());
    key[16..].copy_from_slice(digest);
    key
}

#[cfg(test)]
mod tests {
    use redb::Database;
    use tempfile::tempdir;

    use super::database::{OLD_DIGESTS, TIME_STAMP_LENGTH};
    use super::*;

    fn key(inode: u64) -> FileKey {
        FileKey {
            file: FileId { device: 7, inode },
            size: LARGE_FILE,
            modified: Time {
                seconds: -5,
                nanoseconds: 3,
            },
        }
    }

    const CHANGED: Time = Time {
        seconds: 9,
        nanoseconds: 1,
    };

    #[test]
    fn a_file_whose_time_of_change_differs_has_no_known_digest() {
        let home = tempdir().unwrap();
        let index = Index::new(home.path().join("index"));
        index.remember(&key(1), CHANGED, &[1; 32]);
        for later in [(9, 2), (10, 1), (8, 1)] {
            let (seconds, nanoseconds) = later;
            let changed = Time {
                seconds,
                nanoseconds,
            };
            assert_eq!(index.known(&key(1), changed), Some(Known::Touched));
        }
        assert_eq!(index.known(&key(2), CHANGED), None);
    }

    #[test]
    fn rows_of_an_index_without_times_of_change_are_ignored() {
        let home = tempdir().unwrap();
        let file = home.path().join("index");
        let database = Database::create(&file).unwrap();
        let writing = database.begin_write().unwrap();
        {
            let row = [&[1; 32][..], &[0; TIME_STAMP_LENGTH]].concat();
            let mut rows = writing.open_table(OLD_DIGESTS).unwrap();
            rows.insert(&encode(&key(1))[..], &row[..]).unwrap();
        }
        writing.commit().unwrap();
        drop(database);
        let index = Index::new(file.clone());
        assert_eq!(index.known(&key(1), CHANGED), None);
        index.remember(&key(1), CHANGED, &[2; 32]);
        assert_eq!(index.known(&key(1), CHANGED), Some(Known::Digest([2; 32])));
        drop(index);
        let database = Database::create(&file).unwrap();
        let tables = database.begin_read().unwrap();
        assert_eq!(tables.list_tables().unwrap().count(), 1, "the old one went");
    }

    #[test]
    fn rows_persist_and_one_process_at_a_time_has_them() {
        let home = tempdir().unwrap();
        let file = home.path().join("index");
        let index = Index::new(file.clone());
        assert_eq!(index.known(&key(1), CHANGED), None);
        index.remember(&key(1), CHANGED, &[1; 32]);
        let path = RelativePath::from_components([b"a\xff", &b"b"[..]]).unwrap();
        let store = FileId {
            device: 1,
            inode: 2,
        };
        let other_store = FileId { inode: 3, ..store };
        index.record_location(store, &[1; 32], &key(2), &path);
        let other = Index::new(file.clone());
        assert_eq!(other.known(&key(1), CHANGED), None);
        drop(index);
        // It does not try again: the other process has the file until it ends.
        assert_eq!(other.known(&key(1), CHANGED), None);
        let next = Index::new(file);
        assert_eq!(next.known(&key(1), CHANGED), Some(Known::Digest([1; 32])));
        assert_eq!(next.known(&FileKey { size: 1, ..key(1) }, CHANGED), None);
        assert_eq!(next.location(store, &[1; 32]), Some((key(2), path)));
        assert_eq!(next.location(other_store, &[1; 32]), None);
        next.forget_location(store, &[1; 32]);
        assert_eq!(next.location(store, &[1; 32]), None);
    }

    #[test]
    fn a_corrupt_index_is_recreated_and_a_missing_one_is_no_error() {
        let home = tempdir().unwrap();
        let file = home.path().join("index");
        std::fs::write(&file, vec![0xa5; 100_000]).unwrap();
        let index = Index::new(file.clone());
        index.remember(&key(1), CHANGED, &[1; 32]);
        assert_eq!(index.known(&key(1), CHANGED), Some(Known::Digest([1; 32])));
        drop(index);
        // Damaged in the middle: nothing may fail, whatever the index returns.
        let mut bytes = std::fs::read(&file).unwrap();
        let length = bytes.len();
        bytes[1000..length]
            .iter_mut()
            .step_by(3)
            .for_each(|byte| *byte ^= 0x5a);
        std::fs::write(&file, bytes).unwrap();
        let index = Index::new(file);
        let _ = index.known(&key(1), CHANGED);
        index.remember(&key(1), CHANGED, &[1; 32]);
        let unusable = Index::new(home.path().join("none/index"));
        unusable.remember(&key(1), CHANGED, &[1; 32]);
        assert_eq!(unusable.known(&key(1), CHANGED), None);
    }
}
