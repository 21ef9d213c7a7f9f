//! The digest index: digests of large files, and where content is stored. It is only a cache: losing it costs time, and
//! no entry is trusted without a look at the content.
//!
//! One process at a time has it open; others work without it. A file is identified by device, inode, size and
//! modification time, as in rsync's quick check, so another name makes no difference. Its time of change (ctime), which
//! no program can set, shows whether it may have been written to since. A rename changes the ctime too, so a renamed
//! file is hashed once more.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{Database, DatabaseError, ReadableTable, ReadableTableMetadata, TableDefinition};

use super::file_id::{FileId, FileKey};
use crate::protocol::Time;
use crate::protocol::path::RelativePath;

/// Smallest size of a file in the index, in bytes: sending a smaller file costs little more than a round trip.
pub const LARGE_FILE: u64 = 16 << 20;
/// Most rows in each table, of some 100 bytes each; above it the oldest are evicted.
const MAX_ROWS: u64 = 100_000;
/// Rows evicted at a time, because finding the oldest reads all rows.
const EVICTED_ROWS: usize = 10_000;
/// Memory for the pages of the database, in bytes. The library's default is 1 GiB.
const CACHE_SIZE: usize = 1 << 20;
/// Digests and times of change, by file.
const DIGESTS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("digests by change");
/// Rows without the time of change, which earlier versions wrote.
const OLD_DIGESTS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("digests");
/// Files by digest.
const LOCATIONS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("places");
/// Length of the time stamp at the end of each row: its creation, in nanoseconds since 1970.
const TIME_STAMP_LENGTH: usize = 8;

/// Length of a file's key: device, inode, size, and the seconds and nanoseconds of its time.
const FILE_KEY: usize = 36;

/// What the index knows about a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Its digest.
    Digest([u8; 32]),
    /// The file was hashed before, and may have been written to or only renamed since: it is worth hashing again.
    Touched,
}

/// Length of a row of [`DIGESTS`]: digest, seconds and nanoseconds of the time of change.
const DIGEST_ROW: usize = 32 + 12;

fn digest_row(changed: Time, digest: &[u8; 32]) -> [u8; DIGEST_ROW] {
    let mut row = [0; DIGEST_ROW];
    row[..32].copy_from_slice(digest);
    row[32..40].copy_from_slice(&changed.seconds.to_le_bytes());
    row[40..].copy_from_slice(&changed.nanoseconds.to_le_bytes());
    row
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

/// Result of a database operation.
type DatabaseResult<T> = Result<T, Box<dyn std::error::Error>>;

/// A digest index in a file. Cheap to clone; the file is opened, or created, at first use. All calls block, and none
/// fails: on an error, the answer is unknown.
#[derive(Clone)]
pub struct Index(Arc<Inner>);

struct Inner {
    path: PathBuf,
    state: Mutex<State>,
}

enum State {
    Closed,
    Open(Database),
    /// Another process has the file open, or it cannot be used.
    Unusable,
}

impl fmt::Debug for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Index").field(&self.0.path).finish()
    }
}

impl Index {
    /// Creates an index in this file.
    pub fn new(path: PathBuf) -> Self {
        Self(Arc::new(Inner {
            path,
            state: Mutex::new(State::Closed),
        }))
    }

    /// Returns what is known of a file that was hashed before; `changed` is its current time of change.
    pub fn known(&self, key: &FileKey, changed: Time) -> Option<Known> {
        let row: [u8; DIGEST_ROW] = self.row(DIGESTS, &encode(key))?.try_into().ok()?;
        let digest: [u8; 32] = row[..32].try_into().ok()?;
        Some(if row == digest_row(changed, &digest) {
            Known::Digest(digest)
        } else {
            Known::Touched
        })
    }

    /// Stores the digest of a file. The file must have been settled when hashing began: see [`FileKey::is_settled`].
    pub fn remember(&self, key: &FileKey, changed: Time, digest: &[u8; 32]) {
        self.put(DIGESTS, &encode(key), &digest_row(changed, digest));
    }

    /// Returns a file that had this content once, and its path. `store` identifies the root of the store.
    pub fn location(&self, store: FileId, digest: &[u8; 32]) -> Option<(FileKey, RelativePath)> {
        let row = self.row(LOCATIONS, &location_key(store, digest))?;
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
        self.put(
            LOCATIONS,
            &location_key(store, digest),
            &[&encode(key), path.as_bytes()].concat(),
        );
    }

    /// Forgets where this content was stored.
    pub fn forget_location(&self, store: FileId, digest: &[u8; 32]) {
        let key = location_key(store, digest);
        self.with_database(|database| {
            let writing = database.begin_write()?;
            writing.open_table(LOCATIONS)?.remove(&key[..])?;
            Ok(writing.commit()?)
        });
    }

    fn row(&self, table: TableDefinition<&[u8], &[u8]>, key: &[u8]) -> Option<Vec<u8>> {
        self.with_database(|database| {
            let table = match database.begin_read()?.open_table(table) {
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
                table => table?,
            };
            let row = table.get(key)?;
            Ok(row.map(|row| {
                row.value()[..row.value().len().saturating_sub(TIME_STAMP_LENGTH)].to_vec()
            }))
        })?
    }

    fn put(&self, table: TableDefinition<&[u8], &[u8]>, key: &[u8], value: &[u8]) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_nanos() as u64;
        self.with_database(|database| {
            let mut writing = database.begin_write()?;
            // A crash may lose this row, and nothing else.
            writing.set_durability(redb::Durability::Eventual);
            {
                let mut rows = writing.open_table(table)?;
                rows.insert(key, &[value, &now.to_le_bytes()].concat()[..])?;
                if rows.len()? > MAX_ROWS {
                    evict(&mut rows, EVICTED_ROWS)?;
                }
            }
            Ok(writing.commit()?)
        });
    }

    /// Runs an operation on the database, if there is a usable one. Removes a database that fails.
    fn with_database<T>(&self, work: impl FnOnce(&Database) -> DatabaseResult<T>) -> Option<T> {
        let mut state = self.state();
        if let State::Closed = *state {
            *state = self.open();
        }
        let State::Open(database) = &*state else {
            return None;
        };
        // The library trusts its file in places, and panics on a corrupted one.
        let result = catch_unwind(AssertUnwindSafe(|| work(database)));
        match result {
            Ok(Ok(done)) => Some(done),
            failed => {
                let why = failed
                    .ok()
                    .and_then(Result::err)
                    .map_or_else(|| "a panic".into(), |error| error.to_string());
                tracing::debug!(path = ?self.0.path, why, "the digest index is unusable and was given up");
                let broken = std::mem::replace(&mut *state, State::Unusable);
                let _ = catch_unwind(AssertUnwindSafe(|| drop(broken)));
                let _ = std::fs::remove_file(&self.0.path);
                None
            }
        }
    }

    fn open(&self) -> State {
        let open = || {
            let create = || {
                Database::builder()
                    .set_cache_size(CACHE_SIZE)
                    .create(&self.0.path)
            };
            catch_unwind(AssertUnwindSafe(create)).unwrap_or(Err(DatabaseError::RepairAborted))
        };
        let opened = match open() {
            Err(DatabaseError::DatabaseAlreadyOpen) => return State::Unusable,
            Err(error) => {
                tracing::debug!(path = ?self.0.path, %error, "cannot open the digest index; creating a new one");
                let _ = std::fs::remove_file(&self.0.path);
                open()
            }
            opened => opened,
        };
        let Ok(database) = opened else {
            return State::Unusable;
        };
        // Rows of earlier versions are not reliable. If deleting them fails, they do no harm: nothing reads them.
        let _ = catch_unwind(AssertUnwindSafe(|| delete_table(&database, OLD_DIGESTS)));
        State::Open(database)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn delete_table(database: &Database, table: TableDefinition<&[u8], &[u8]>) -> DatabaseResult<()> {
    if let Err(redb::TableError::TableDoesNotExist(_)) = database.begin_read()?.open_table(table) {
        return Ok(());
    }
    let writing = database.begin_write()?;
    writing.delete_table(table)?;
    Ok(writing.commit()?)
}

/// The key includes the store, so that two stores with the same content do not evict each other.
fn location_key(store: FileId, digest: &[u8; 32]) -> [u8; 48] {
    let mut key = [0; 48];
    key[..8].copy_from_slice(&store.device.to_le_bytes());
    key[8..16].copy_from_slice(&store.inode.to_le_bytes());
    key[16..].copy_from_slice(digest);
    key
}

fn evict(rows: &mut redb::Table<'_, &[u8], &[u8]>, count: usize) -> DatabaseResult<()> {
    let stamp = |row: &[u8]| {
        let stamp = row
            .len()
            .checked_sub(TIME_STAMP_LENGTH)
            .and_then(|at| row[at..].try_into().ok());
        stamp.map_or(0, u64::from_le_bytes)
    };
    let mut stamps = Vec::new();
    for row in rows.iter()? {
        stamps.push(stamp(row?.1.value()));
    }
    let nth = count.min(stamps.len() - 1);
    let (_, &mut last, _) = stamps.select_nth_unstable(nth);
    rows.retain(|_, row| stamp(row) > last)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::tempdir;

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

    #[test]
    fn the_oldest_rows_are_evicted() {
        let home = tempdir().unwrap();
        let database = Database::create(home.path().join("index")).unwrap();
        let writing = database.begin_write().unwrap();
        {
            let mut rows = writing.open_table(DIGESTS).unwrap();
            let count = 105_u64;
            for at in 0..count {
                rows.insert(&at.to_be_bytes()[..], &(count - at).to_le_bytes()[..])
                    .unwrap();
            }
            evict(&mut rows, 100).unwrap();
            assert_eq!(rows.len().unwrap(), 4);
            assert!(rows.get(&0u64.to_be_bytes()[..]).unwrap().is_some());
        }
    }
}
