//! A store whose disk takes its time, or stands still until it is told to go on.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use haul::error::{Code, Why};
use haul::path::RelativePath;
use haul::store::{Attributes, Claim, Lapses, Metadata, Source, Store, Upload};
use haul::wire::Durability;
use rustix::io::Errno;

/// Another store, of which the writes can be paused. Clones are the same one.
#[derive(Clone)]
pub(crate) struct SlowStore {
    inner: Arc<dyn Store>,
    disk: Arc<SlowDisk>,
}

#[derive(Default)]
struct SlowDisk {
    /// Bytes a second, or as fast as the other store.
    rate: Option<u64>,
    /// What writes beyond so many bytes of a file fail with.
    full: Option<(u64, Errno)>,
    held: Mutex<bool>,
    released: Condvar,
    taken: AtomicU64,
    /// Times that it was asked what is at a path.
    looks: AtomicU64,
    /// Times yet that a partial is somebody else's.
    busy: AtomicU64,
}

impl SlowDisk {
    fn wait(&self, bytes: usize) {
        if let Some(rate) = self.rate {
            std::thread::sleep(Duration::from_secs_f64(bytes as f64 / rate as f64));
        }
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.released.wait_while(held, |held| *held));
    }
}

impl SlowStore {
    /// A store that takes so many bytes a second of each upload.
    pub(crate) fn around(inner: impl Store, rate: Option<u64>) -> Self {
        Self {
            inner: Arc::new(inner),
            disk: Arc::new(SlowDisk {
                rate,
                ..SlowDisk::default()
            }),
        }
    }

    /// The same, where no file gets longer than that.
    pub(crate) fn full_after(mut self, bytes: u64, error: Errno) -> Self {
        Arc::get_mut(&mut self.disk).unwrap().full = Some((bytes, error));
        self
    }

    /// The same, where another process has every partial open for so many tries.
    pub(crate) fn busy(mut self, tries: u64) -> Self {
        Arc::get_mut(&mut self.disk).unwrap().busy = tries.into();
        self
    }

    /// No write goes on until the guard is dropped.
    pub(crate) fn hold(&self) -> impl Drop + use<> {
        struct Hold(Arc<SlowDisk>);
        impl Drop for Hold {
            fn drop(&mut self) {
                *self.0.held.lock().unwrap_or_else(PoisonError::into_inner) = false;
                self.0.released.notify_all();
            }
        }
        *self
            .disk
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        Hold(self.disk.clone())
    }

    /// Bytes written so far.
    pub(crate) fn taken(&self) -> u64 {
        self.disk.taken.load(Ordering::SeqCst)
    }

    /// Times that it was asked so far what is at a path.
    pub(crate) fn looks(&self) -> u64 {
        self.disk.looks.load(Ordering::SeqCst)
    }
}

impl Store for SlowStore {
    fn stat(&self, path: &RelativePath) -> Result<Option<Metadata>, Why> {
        self.disk.looks.fetch_add(1, Ordering::SeqCst);
        self.inner.stat(path)
    }

    fn names(&self, directory: &RelativePath) -> Result<Vec<Vec<u8>>, Why> {
        self.inner.names(directory)
    }

    fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Why> {
        self.inner.read_link(path)
    }

    fn open(&self, path: &RelativePath) -> Result<Box<dyn Source>, Why> {
        self.inner.open(path)
    }

    fn create(&self, path: &RelativePath, claim: &Claim) -> Result<Box<dyn Upload>, Why> {
        let less = |tries: u64| tries.checked_sub(1);
        if self
            .disk
            .busy
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
            .is_ok()
        {
            return Err(Why::from(Code::Busy));
        }
        Ok(Box::new(SlowUpload {
            inner: self.inner.create(path, claim)?,
            disk: self.disk.clone(),
        }))
    }

    fn make_directory(&self, path: &RelativePath) -> Result<(), Why> {
        self.inner.make_directory(path)
    }

    fn set_attributes(&self, path: &RelativePath, attributes: &Attributes) -> Result<Lapses, Why> {
        self.inner.set_attributes(path, attributes)
    }

    fn make_symlink(
        &self,
        path: &RelativePath,
        target: &[u8],
        attributes: &Attributes,
    ) -> Result<Lapses, Why> {
        self.inner.make_symlink(path, target, attributes)
    }

    fn link(&self, existing: &RelativePath, new: &RelativePath) -> Result<(), Why> {
        self.inner.link(existing, new)
    }

    fn remove(&self, path: &RelativePath) -> Result<(), Why> {
        self.inner.remove(path)
    }

    fn sync(&self) -> Result<(), Why> {
        self.inner.sync()
    }

    fn sweep(&self, age: Duration) -> Result<u64, Why> {
        self.inner.sweep(age)
    }
}

struct SlowUpload {
    inner: Box<dyn Upload>,
    disk: Arc<SlowDisk>,
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
    ) -> Result<Lapses, Why> {
        self.inner.commit(attributes, durability)
    }

    fn discard(self: Box<Self>) {
        self.inner.discard();
    }
}
