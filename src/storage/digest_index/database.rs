//! The database of the digest index. It is only a cache: a broken one is removed and created again, and one that another
//! process has open is not used.

use crate::error::lock::lock;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{Database, DatabaseError, ReadableTable, ReadableTableMetadata, TableDefinition};

/// Most rows in each table, of some 100 bytes each; above it the oldest are evicted.
const MAX_ROWS: u64 = 100_000;
/// Rows evicted at a time, because finding the oldest reads all rows.
const EVICTED_ROWS: usize = 10_000;
/// Memory for the pages of the database, in bytes. The library's default is 1 GiB.
const CACHE_SIZE: usize = 1 << 20;
/// Length of the time stamp at the end of each row: its creation, in nanoseconds since 1970.
pub(super) const TIME_STAMP_LENGTH: usize = 8;
/// A table that earlier versions wrote: digests without the time of change. They are not reliable.
pub(super) const OLD_DIGESTS: Table = TableDefinition::new("digests");

/// A table of the database: keys and rows are bytes.
pub(super) type Table = TableDefinition<'static, &'static [u8], &'static [u8]>;

/// Result of a database operation.
type DatabaseResult<T> = Result<T, Box<dyn std::error::Error>>;

/// A database in a file, which is opened, or created, at first use. All calls block, and none fails: on an error, there
/// is no row.
pub(super) struct CacheDatabase {
    path: PathBuf,
    state: Mutex<State>,
}

enum State {
    Closed,
    Open(Database),
    /// Another process has the file open, or it cannot be used.
    Unusable,
}

impl CacheDatabase {
    /// Creates a database in this file.
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            state: Mutex::new(State::Closed),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns a row.
    pub(super) fn get(&self, table: Table, key: &[u8]) -> Option<Vec<u8>> {
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

    /// Inserts or replaces a row.
    pub(super) fn put(&self, table: Table, key: &[u8], value: &[u8]) {
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

    /// Removes a row.
    pub(super) fn remove(&self, table: Table, key: &[u8]) {
        self.with_database(|database| {
            let writing = database.begin_write()?;
            writing.open_table(table)?.remove(key)?;
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
                tracing::debug!(path = ?self.path, why, "the digest index is unusable and was given up");
                let broken = std::mem::replace(&mut *state, State::Unusable);
                let _ = catch_unwind(AssertUnwindSafe(|| drop(broken)));
                let _ = std::fs::remove_file(&self.path);
                None
            }
        }
    }

    fn open(&self) -> State {
        let open = || {
            let create = || {
                Database::builder()
                    .set_cache_size(CACHE_SIZE)
                    .create(&self.path)
            };
            catch_unwind(AssertUnwindSafe(create)).unwrap_or(Err(DatabaseError::RepairAborted))
        };
        let opened = match open() {
            Err(DatabaseError::DatabaseAlreadyOpen) => return State::Unusable,
            Err(error) => {
                tracing::debug!(path = ?self.path, %error, "cannot open the digest index; creating a new one");
                let _ = std::fs::remove_file(&self.path);
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
        lock(&self.state)
    }
}

fn delete_table(database: &Database, table: Table) -> DatabaseResult<()> {
    if let Err(redb::TableError::TableDoesNotExist(_)) = database.begin_read()?.open_table(table) {
        return Ok(());
    }
    let writing = database.begin_write()?;
    writing.delete_table(table)?;
    Ok(writing.commit()?)
}

/// Removes the oldest rows.
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

    #[test]
    fn the_oldest_rows_are_evicted() {
        let home = tempfile::tempdir().unwrap();
        let database = Database::create(home.path().join("index")).unwrap();
        let writing = database.begin_write().unwrap();
        {
            let mut rows = writing.open_table(OLD_DIGESTS).unwrap();
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
