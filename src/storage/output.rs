//! A store that writes one file's content to a writer, such as standard output.

use std::io::{self, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::io_errors::{fault, refusal};
use super::metadata::{Attributes, Metadata, MetadataWarnings};
use super::source::Source;
use super::store::Store;
use super::upload::{PartialKey, Upload};
use crate::error::lock::lock;
use crate::error::{Code, Reason};
use crate::protocol::Durability;
use crate::protocol::path::RelativePath;

/// A writer as a [`Store`] that takes one file, once, in order. Written content cannot be taken back: the caller must
/// tell the reader when the transfer fails.
#[derive(Clone)]
pub struct OutputStore {
    shared: Arc<OutputShared>,
}

struct OutputShared {
    /// The only accepted name.
    name: RelativePath,
    /// `None` once the upload has started.
    writer: Mutex<Option<Box<dyn Write + Send>>>,
    written: AtomicU64,
}

impl OutputStore {
    /// Creates a store that takes one file of this name.
    pub fn new(name: RelativePath, writer: impl Write + Send + 'static) -> Self {
        let writer: Box<dyn Write + Send> = Box::new(writer);
        Self {
            shared: Arc::new(OutputShared {
                name,
                writer: Mutex::new(Some(writer)),
                written: AtomicU64::new(0),
            }),
        }
    }

    /// Bytes passed to the writer so far.
    pub fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// Whether an upload has started; no other can.
    pub fn is_taken(&self) -> bool {
        self.writer().is_none()
    }

    fn writer(&self) -> MutexGuard<'_, Option<Box<dyn Write + Send>>> {
        lock(&self.shared.writer)
    }
}

fn refuse_directory<T>(path: &RelativePath) -> Result<T, Reason> {
    Err(Reason::new(
        Code::NotDirectory,
        format!("{path}: this output takes only the content of a file"),
    ))
}

impl Store for OutputStore {
    fn stat(&self, _: &RelativePath) -> Result<Option<Metadata>, Reason> {
        Ok(None)
    }

    fn names(&self, directory: &RelativePath) -> Result<Vec<Vec<u8>>, Reason> {
        refuse_directory(directory)
    }

    fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Reason> {
        Err(refusal(Code::NotFound, path))
    }

    fn open(&self, path: &RelativePath) -> Result<Box<dyn Source>, Reason> {
        Err(refusal(Code::NotFound, path))
    }

    fn create(&self, path: &RelativePath, _: &PartialKey) -> Result<Box<dyn Upload>, Reason> {
        if *path != self.shared.name {
            return Err(Reason::new(
                Code::NotWanted,
                format!("{path} was not requested"),
            ));
        }
        let Some(writer) = self.writer().take() else {
            return Err(refusal(Code::Busy, path));
        };
        Ok(Box::new(OutputUpload {
            shared: self.shared.clone(),
            writer,
        }))
    }

    fn make_directory(&self, path: &RelativePath) -> Result<(), Reason> {
        refuse_directory(path)
    }

    fn set_attributes(
        &self,
        path: &RelativePath,
        _: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        Err(refusal(Code::NotFound, path))
    }

    fn link(&self, _: &RelativePath, new: &RelativePath) -> Result<(), Reason> {
        refuse_directory(new)
    }

    fn make_symlink(
        &self,
        path: &RelativePath,
        _: &[u8],
        _: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        refuse_directory(path)
    }

    fn remove(&self, path: &RelativePath) -> Result<(), Reason> {
        Err(refusal(Code::NotFound, path))
    }

    fn sync(&self) -> Result<(), Reason> {
        Ok(())
    }

    fn sweep(&self, _: Duration) -> Result<u64, Reason> {
        Ok(0)
    }
}

struct OutputUpload {
    shared: Arc<OutputShared>,
    writer: Box<dyn Write + Send>,
}

impl Upload for OutputUpload {
    fn in_order(&self) -> bool {
        true
    }

    fn held(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(Vec::new())
    }

    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        if offset != self.shared.written.load(Ordering::Relaxed) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the output takes bytes in order only",
            ));
        }
        self.shared
            .written
            .fetch_add(data.len() as u64, Ordering::Relaxed);
        self.writer.write_all(data)
    }

    fn make_hole(&mut self, _: Range<u64>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn commit(
        mut self: Box<Self>,
        _: &Attributes,
        _: Durability,
    ) -> Result<MetadataWarnings, Reason> {
        self.writer
            .flush()
            .map_err(|e| fault(&self.shared.name, "write it", e))?;
        Ok(MetadataWarnings::new())
    }

    fn discard(self: Box<Self>) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A writer that keeps its input.
    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(data);
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn takes_one_file_in_order() {
        let path = |name: &str| RelativePath::from_components([name]).unwrap();
        let buffer = Buffer::default();
        let key = PartialKey {
            owner: [0; 32],
            size: 5,
            modified: None,
        };
        let store = OutputStore::new(path("f"), buffer.clone());
        let code = |path: &RelativePath| store.create(path, &key).err().map(|why| why.code);
        assert_eq!(code(&path("other")), Some(Code::NotWanted));
        let mut upload = store.create(&path("f"), &key).unwrap();
        assert_eq!(code(&path("f")), Some(Code::Busy));
        upload.write_at(b"he", 0).unwrap();
        assert!(upload.write_at(b"o", 4).is_err());
        upload.write_at(b"llo", 2).unwrap();
        upload
            .commit(&Attributes::default(), Durability::Synced)
            .unwrap();
        assert_eq!(
            (&buffer.0.lock().unwrap()[..], store.written()),
            (&b"hello"[..], 5)
        );
        assert!(store.is_taken() && code(&path("f")) == Some(Code::Busy));
        assert!(store.make_directory(&path("d")).is_err() && store.stat(&path("f")) == Ok(None));
    }
}
