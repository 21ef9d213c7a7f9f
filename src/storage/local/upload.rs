//! An unfinished file on disk, from its partial to the final name.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FileType, Mode, Stat, fstat};

use super::descriptor::open_for_changes;
use super::directory::Directory;
use super::holes::{self, next_data};
use super::lock::{Lock, unlock};
use super::names::{is_named, partial_name_of, remove, rename_into_place, stat_of_new_file};
use super::partial::{LockedPartial, open_partial, restore};
use super::root::Root;
use super::source::read_full_at;
use super::stat::{mode_of, type_of};
use super::sync::{sync_file, sync_names};
use super::{attributes, xattr};
use crate::error::{Code, Reason};
use crate::protocol::Durability;
use crate::protocol::path::RelativePath;
use crate::storage::io_errors::fault;
use crate::storage::metadata::{Attributes, MetadataWarnings, PERMISSIONS};
use crate::storage::source::Source;
use crate::storage::upload::{PartialKey, Upload};

/// Mode that programs request for a new file, by Unix convention (0666).
const NEW_FILE_MODE: Mode = Mode::RUSR
    .union(Mode::WUSR)
    .union(Mode::RGRP)
    .union(Mode::WGRP)
    .union(Mode::ROTH)
    .union(Mode::WOTH);
/// The owner's bits of a mode.
const OWNER_BITS: u32 = 0o700;
/// Most ranges reported for a partial (256 KiB of them): a peer decides how scattered it is, and a
/// [`Want`](crate::protocol::Want) holds only 1,024.
const MAX_RANGES: usize = 16_384;

/// An unfinished file on disk. Holds one descriptor; the directory is opened again when it is needed.
pub(super) struct LocalUpload {
    root: Arc<Root>,
    path: RelativePath,
    name: String,
    // Field order matters: once the file is closed, another file may get its inode.
    _lock: Lock,
    file: File,
    size: u64,
    /// Whether a thread is writing back.
    writing_back: Arc<AtomicBool>,
}

impl LocalUpload {
    pub(super) fn create(
        root: &Arc<Root>,
        path: &RelativePath,
        key: &PartialKey,
    ) -> Result<Self, Reason> {
        let (directory, _) = root.make_parent(path)?;
        let name = partial_name_of(path, key);
        let LockedPartial { lock, file } = open_partial(root, &directory, name.as_bytes(), path)?;
        let upload = Self {
            root: Arc::clone(root),
            path: path.clone(),
            name,
            _lock: lock,
            file,
            size: key.size,
            writing_back: Arc::default(),
        };
        let stat =
            fstat(&upload.file).map_err(|e| fault(path, "read the metadata of its partial", e))?;
        root.record_device(&stat);
        if stat.st_size as u64 > key.useful_size() {
            upload
                .file
                .set_len(key.useful_size())
                .map_err(|e| fault(path, "truncate its partial", e))?;
        }
        Ok(upload)
    }

    /// Sets the final metadata, syncs the file and gives it its final name; returns its directory.
    fn finish(
        &self,
        attributes: &Attributes,
        durability: Durability,
    ) -> Result<(Directory<'_>, MetadataWarnings), Reason> {
        self.root.check_not_moved(&self.path)?;
        let mode = match attributes.mode {
            None => Some(self.usual_mode()?),
            announced => announced,
        };
        let warnings = attributes::set(
            &self.file,
            &self.path,
            &Attributes {
                mode,
                ..attributes.clone()
            },
        )?;
        if durability == Durability::Synced {
            sync_file(&self.file).map_err(|e| fault(&self.path, "sync it to disk", e))?;
        }
        let Some((directory, _)) = self.root.parent(&self.path)? else {
            return Err(self.partial_is_gone());
        };
        let name = self.name.as_bytes();
        if !is_named(&directory, name, &self.file)
            .map_err(|e| fault(&self.path, "read the metadata of its partial", e))?
        {
            return Err(self.partial_is_gone());
        }
        let what = "rename it into place";
        let exclusive = attributes.exclusive;
        rename_into_place(&self.root, &directory, name, &self.path, exclusive, what)?;
        Ok((directory, warnings))
    }

    /// Returns the mode for a file if the sender gives none: that of the replaced file, with its access control list,
    /// or that of any new file in the directory.
    fn usual_mode(&self) -> Result<u32, Reason> {
        let cannot = |e| fault(&self.path, "determine its mode", e);
        let Some((directory, last)) = self.root.parent(&self.path)? else {
            return Err(self.partial_is_gone());
        };
        match directory.stat(last).map_err(cannot)? {
            Some(there) if type_of(&there) == FileType::RegularFile => {
                let mode = permissions(&there);
                let replaced = open_for_changes(&directory, last).map_err(cannot)?;
                // Without the list, the group bits would grant more than before.
                let kept = xattr::copy_access_list(&replaced, &self.file);
                Ok(if kept.is_ok() {
                    mode
                } else {
                    mode & OWNER_BITS
                })
            }
            _ => {
                let new = stat_of_new_file(&self.root, &directory, NEW_FILE_MODE);
                Ok(permissions(&new.map_err(cannot)?))
            }
        }
    }

    fn partial_is_gone(&self) -> Reason {
        let text = format!(
            "{}: another program removed or moved its partial; send it again",
            self.path
        );
        Reason::new(Code::NotFound, text)
    }

    /// Removes the partial, unless its name is gone or refers to another file by now.
    fn remove(&self) {
        if let Ok(Some((directory, _))) = self.root.parent(&self.path)
            && is_named(&directory, self.name.as_bytes(), &self.file) == Ok(true)
        {
            let _ = remove(&self.root, &directory, self.name.as_bytes());
        }
    }
}

/// The permission bits of a file.
fn permissions(stat: &Stat) -> u32 {
    mode_of(stat) & PERMISSIONS
}

impl Upload for LocalUpload {
    fn held(&self) -> io::Result<Vec<Range<u64>>> {
        let end = self.file.metadata()?.len().min(self.size);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        while ranges.len() < MAX_RANGES
            && let Some(data) = next_data(&self.file, at, end)?
        {
            at = data.end;
            ranges.push(data);
        }
        Ok(ranges)
    }

    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn write_back(&mut self) {
        if self.writing_back.load(Ordering::Acquire) {
            return;
        }
        // Uses a separate open file: it holds no lock, and does not consume an error that the commit must see (Linux
        // reports each error once per open file). Without /proc, the commit does all the work.
        let Ok(file) = File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd())) else {
            return;
        };
        let writing_back = self.writing_back.clone();
        writing_back.store(true, Ordering::Release);
        let work = move || {
            let _ = file.sync_data();
            writing_back.store(false, Ordering::Release);
        };
        if std::thread::Builder::new()
            .name("write-back".into())
            .spawn(work)
            .is_err()
        {
            self.writing_back.store(false, Ordering::Release);
        }
    }

    fn share(&mut self, source: &dyn Source) -> io::Result<bool> {
        #[cfg(target_os = "linux")]
        if let Some(source) = source.descriptor() {
            return Ok(rustix::fs::ioctl_ficlone(&self.file, source).is_ok());
        }
        let _ = source;
        Ok(false)
    }

    fn make_hole(&mut self, part: Range<u64>) -> io::Result<()> {
        holes::make_hole(&self.file, part)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        read_full_at(&self.file, buffer, offset)
    }

    fn commit(
        self: Box<Self>,
        attributes: &Attributes,
        durability: Durability,
    ) -> Result<MetadataWarnings, Reason> {
        let (directory, warnings) = self.finish(attributes, durability).inspect_err(|_| {
            // It stays a partial, and the next attempt resumes it.
            let _ = restore(&self.file);
        })?;
        if durability == Durability::Synced {
            let parent = self.path.parent().unwrap_or_default();
            sync_names(&self.root, &directory, &parent).map_err(|why| {
                let text = format!(
                    "{} is complete, but may not survive a crash: {}",
                    self.path, why
                );
                Reason::new(why.code, text)
            })?;
        }
        Ok(warnings)
    }

    fn discard(self: Box<Self>) {
        self.remove();
    }
}

impl Drop for LocalUpload {
    /// Keeps written content for resume, and removes an empty partial.
    fn drop(&mut self) {
        let holds_nothing =
            |m: std::fs::Metadata| matches!(next_data(&self.file, 0, m.len()), Ok(None));
        if self.file.metadata().is_ok_and(holds_nothing) {
            self.remove();
        }
        unlock(&self.file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_partial_is_unlocked_although_a_child_shares_it() {
        let directory = tempfile::tempdir().unwrap();
        let root = Arc::new(Root::open(directory.path()).unwrap());
        let path = RelativePath::from_components(["f"]).unwrap();
        let key = PartialKey {
            owner: [0; 32],
            size: 5,
            modified: None,
        };
        let mut upload = LocalUpload::create(&root, &path, &key).unwrap();
        upload.write_at(b"12345", 0).unwrap();
        // As in a child between fork and exec.
        let shared = upload.file.try_clone().unwrap();
        assert!(LocalUpload::create(&root, &path, &key).is_err());
        drop(upload);
        let again = LocalUpload::create(&root, &path, &key);
        assert_eq!(again.unwrap().held().unwrap().len(), 1);
        drop(shared);
    }
}
