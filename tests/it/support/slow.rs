//! A store that is slow, or pauses until the test lets it continue, and that keeps a log of its calls.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use haul::{
    Attributes, Code, Durability, Metadata, MetadataWarnings, PartialKey, Reason, RelativePath,
    Source, Store, Upload,
};
use rustix::io::Errno;

/// A wrapper of another store whose writes can be paused. Clones share their state.
#[derive(Clone)]
pub(crate) struct SlowStore {
    inner: Arc<dyn Store>,
    disk: Arc<SlowDisk>,
}

#[derive(Default)]
struct SlowDisk {
    /// Bytes a second, or as fast as the other store.
    rate: Option<u64>,
    /// The error of writes beyond this many bytes of a file.
    full: Option<(u64, Errno)>,
    held: Mutex<bool>,
    released: Condvar,
    taken: AtomicU64,
    /// Number of calls of stat.
    looks: AtomicU64,
    /// Remaining attempts at which a partial belongs to another process.
    busy: AtomicU64,
    /// Remaining syncs that fail.
    failing_syncs: AtomicU64,
    /// No sync ends while this is set.
    sync_held: Mutex<bool>,
    log: Mutex<Vec<String>>,
}

impl SlowDisk {
    fn wait(&self, bytes: usize) {
        if let Some(rate) = self.rate {
            std::thread::sleep(Duration::from_secs_f64(bytes as f64 / rate as f64));
        }
        self.wait_while(&self.held);
    }

    fn wait_while(&self, held: &Mutex<bool>) {
        let held = held.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.released.wait_while(held, |held| *held));
    }

    fn note(&self, what: String) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.push(what);
    }
}

fn less(tries: u64) -> Option<u64> {
    tries.checked_sub(1)
}

impl SlowStore {
    /// A store that writes this many bytes a second of each upload.
    pub(crate) fn around(inner: impl Store, rate: Option<u64>) -> Self {
        Self {
            inner: Arc::new(inner),
            disk: Arc::new(SlowDisk {
                rate,
                ..SlowDisk::default()
            }),
        }
    }

    /// The same, where no file can be longer than this.
    pub(crate) fn full_after(mut self, bytes: u64, error: Errno) -> Self {
        Arc::get_mut(&mut self.disk).unwrap().full = Some((bytes, error));
        self
    }

    /// The same, where another process has every partial open for this many attempts.
    pub(crate) fn busy(mut self, tries: u64) -> Self {
        Arc::get_mut(&mut self.disk).unwrap().busy = tries.into();
        self
    }

    /// The same, where the next syncs fail.
    pub(crate) fn failing_syncs(mut self, times: u64) -> Self {
        Arc::get_mut(&mut self.disk).unwrap().failing_syncs = times.into();
        self
    }

    /// Pauses all writes until the guard is dropped.
    pub(crate) fn hold(&self) -> impl Drop + use<> {
        Hold::of(self, |disk| &disk.held)
    }

    /// Lets no sync end until the guard is dropped.
    pub(crate) fn hold_syncs(&self) -> impl Drop + use<> {
        Hold::of(self, |disk| &disk.sync_held)
    }

    /// The completed calls, in order: `made`, `set` or `removed` and the path; `sync` and `synced`.
    pub(crate) fn log(&self) -> Vec<String> {
        let log = self.disk.log.lock();
        log.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds a line of the test's own.
    pub(crate) fn note(&self, what: String) {
        self.disk.note(what);
    }

    /// Bytes written so far.
    pub(crate) fn taken(&self) -> u64 {
        self.disk.taken.load(Ordering::SeqCst)
    }

    /// Number of calls of stat so far.
    pub(crate) fn looks(&self) -> u64 {
        self.disk.looks.load(Ordering::SeqCst)
    }
}

/// Lets the store continue when dropped.
struct Hold(Arc<SlowDisk>, fn(&SlowDisk) -> &Mutex<bool>);

impl Hold {
    fn of(store: &SlowStore, what: fn(&SlowDisk) -> &Mutex<bool>) -> Self {
        let hold = Self(store.disk.clone(), what);
        hold.set(true);
        hold
    }

    fn set(&self, held: bool) {
        let what = (self.1)(&self.0);
        *what.lock().unwrap_or_else(PoisonError::into_inner) = held;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.set(false);
        self.0.released.notify_all();
    }
}

impl Store for SlowStore {
    fn stat(&self, path: &RelativePath) -> Result<Option<Metadata>, Reason> {
        self.disk.looks.fetch_add(1, Ordering::SeqCst);
        self.inner.stat(path)
    }

    fn names(&self, directory: &RelativePath) -> Result<Vec<Vec<u8>>, Reason> {
        self.inner.names(directory)
    }

    fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Reason> {
        self.inner.read_link(path)
    }

    fn open(&self, path: &RelativePath) -> Result<Box<dyn Source>, Reason> {
        self.inner.open(path)
    }

    fn create(&self, path: &RelativePath, claim: &PartialKey) -> Result<Box<dyn Upload>, Reason> {
        if self
            .disk
            .busy
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
            .is_ok()
        {
            return Err(Reason::from(Code::Busy));
        }
        Ok(Box::new(SlowUpload {
            inner: self.inner.create(path, claim)?,
            disk: self.disk.clone(),
            path: path.clone(),
        }))
    }

    fn make_directory(&self, path: &RelativePath) -> Result<(), Reason> {
        self.inner.make_directory(path)?;
        self.note(format!("made {path}"));
        Ok(())
    }

    fn set_attributes(
        &self,
        path: &RelativePath,
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        let lapses = self.inner.set_attributes(path, attributes)?;
        self.note(format!("set {path}"));
        Ok(lapses)
    }

    fn make_symlink(
        &self,
        path: &RelativePath,
        target: &[u8],
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        let lapses = self.inner.make_symlink(path, target, attributes)?;
        self.note(format!("made {path}"));
        Ok(lapses)
    }

    fn link(&self, existing: &RelativePath, new: &RelativePath) -> Result<(), Reason> {
        self.inner.link(existing, new)?;
        self.note(format!("made {new}"));
        Ok(())
    }

    fn remove(&self, path: &RelativePath) -> Result<(), Reason> {
        self.inner.remove(path)?;
        self.note(format!("removed {path}"));
        Ok(())
    }

    fn sync(&self) -> Result<(), Reason> {
        self.note("sync".into());
        self.disk.wait_while(&self.disk.sync_held);
        let failing = &self.disk.failing_syncs;
        if failing
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
            .is_ok()
        {
            return Err(Reason::new(Code::Io, "the disk does not answer"));
        }
        self.inner.sync()?;
        self.note("synced".into());
        Ok(())
    }

    fn sweep(&self, age: Duration) -> Result<u64, Reason> {
        self.inner.sweep(age)
    }
}

struct SlowUpload {
    inner: Box<dyn Upload>,
    disk: Arc<SlowDisk>,
    path: RelativePath,
}

impl Upload for SlowUpload {
    fn held(&self) -> io::Result<Vec<Range<u64>>> {
        self.inner.held()
    }

    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        self.disk.wait(data.len());
        if let Some((_, error)) = self
            .disk
            .full
            .filter(|(bytes, _)| offset + data.len() as u64 > *bytes)
        {
            return Err(error.into());
        }
        self.inner.write_at(data, offset)?;
        self.disk
            .taken
            .fetch_add(data.len() as u64, Ordering::SeqCst);
        Ok(())
    }

    fn make_hole(&mut self, part: Range<u64>) -> io::Result<()> {
        self.inner.make_hole(part)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inner.read_at(buffer, offset)
    }

    fn commit(
        self: Box<Self>,
        attributes: &Attributes,
        durability: Durability,
    ) -> Result<MetadataWarnings, Reason> {
        let lapses = self.inner.commit(attributes, durability)?;
        self.disk.note(format!("made {}", self.path));
        Ok(lapses)
    }

    fn discard(self: Box<Self>) {
        self.inner.discard();
    }
}
