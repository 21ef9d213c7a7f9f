//! An unfinished file in memory.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use rustix::io::Errno;

use super::behaviour::NEW_FILE_MODE;
use super::content::Content;
use super::nodes::NodeContent;
use super::shared::{PartialSlot, Shared};
use crate::error::{Code, Reason};
use crate::protocol::path::RelativePath;
use crate::protocol::{Durability, Kind};
use crate::storage::io_errors::refusal;
use crate::storage::metadata::{Attributes, MetadataWarnings, PERMISSIONS};
use crate::storage::upload::{PartialKey, Upload};

pub(super) struct MemoryUpload {
    shared: Arc<Shared>,
    slot: PartialSlot,
    /// Committed or discarded: a partial of this key now belongs to another upload.
    finished: bool,
}

impl MemoryUpload {
    /// Opens the partial of a stored path, or creates it.
    pub(super) fn create(
        shared: &Arc<Shared>,
        path: &RelativePath,
        key: &PartialKey,
    ) -> Result<Self, Reason> {
        let parent = path
            .parent()
            .ok_or_else(|| refusal(Code::IsDirectory, path))?;
        let mut state = shared.lock();
        let state = &mut *state;
        state.nodes.make_directory(&parent)?;
        let slot = PartialSlot {
            path: path.clone(),
            key: key.clone(),
        };
        let partial = state.partials.entry(slot.clone()).or_default();
        if std::mem::replace(&mut partial.open, true) {
            return Err(refusal(Code::Busy, path));
        }
        state.nodes.used -= partial.content.truncate(key.useful_size());
        Ok(Self {
            shared: Arc::clone(shared),
            slot,
            finished: false,
        })
    }

    /// Extends the content to `end` if it is shorter, then changes it.
    fn change(&self, end: u64, change: impl FnOnce(&mut Content)) -> io::Result<()> {
        let mut state = self.shared.lock();
        let state = &mut *state;
        let Some(partial) = state.partials.get_mut(&self.slot) else {
            return Err(Errno::NOENT.into());
        };
        let more = end.saturating_sub(partial.content.size());
        if more > self.shared.capacity.saturating_sub(state.nodes.used) {
            return Err(Errno::NOSPC.into());
        }
        state.nodes.used += more;
        partial.content.extend(more);
        partial.written = Some(SystemTime::now());
        change(&mut partial.content);
        Ok(())
    }
}

impl Upload for MemoryUpload {
    fn held(&self) -> io::Result<Vec<Range<u64>>> {
        let state = self.shared.lock();
        let partial = state.partials.get(&self.slot);
        Ok(partial.map_or_else(Vec::new, |partial| partial.content.written().to_vec()))
    }

    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        let _writing = self.shared.writing();
        let delay = self.shared.behaviour.write_delay;
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        if data.is_empty() {
            return Ok(());
        }
        let end = offset.checked_add(data.len() as u64).ok_or(Errno::FBIG)?;
        self.change(end, |content| content.write(data, offset))
    }

    fn make_hole(&mut self, part: Range<u64>) -> io::Result<()> {
        self.change(part.end, |content| content.make_hole(&part))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.shared.lock();
        let partial = state.partials.get(&self.slot);
        Ok(partial.map_or(0, |partial| partial.content.copy_at(buffer, offset)))
    }

    fn commit(
        mut self: Box<Self>,
        attributes: &Attributes,
        _: Durability,
    ) -> Result<MetadataWarnings, Reason> {
        let shared = Arc::clone(&self.shared);
        let _writing = shared.writing();
        let mut state = shared.lock();
        let path = self.slot.path.clone();
        state.nodes.prepare_name_for(&path, attributes)?;
        self.finished = true;
        let partial = state.partials.remove(&self.slot).unwrap_or_default();
        let (attributes, warnings) = shared.behaviour.split_attributes(attributes);
        let there = state.nodes.find(&path)?.map(|node| node.metadata);
        let replaced = there.filter(|there| there.kind == Some(Kind::File));
        let usual = replaced.map_or(NEW_FILE_MODE, |there| there.mode);
        let mode = attributes.mode.map_or(usual, |mode| mode & PERMISSIONS);
        let content = NodeContent::File(Arc::new(partial.content));
        state.nodes.put(&path, content, mode, attributes.modified);
        Ok(warnings)
    }

    fn discard(mut self: Box<Self>) {
        self.finished = true;
        let mut state = self.shared.lock();
        if let Some(partial) = state.partials.remove(&self.slot) {
            state.nodes.used -= partial.content.size();
        }
    }
}

impl Drop for MemoryUpload {
    /// Closes the partial, and removes it if it is empty.
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let mut state = self.shared.lock();
        if let Some(partial) = state.partials.get_mut(&self.slot) {
            partial.open = false;
            if partial.content.written().is_empty() {
                let size = partial.content.size();
                state.nodes.used -= size;
                state.partials.remove(&self.slot);
            }
        }
    }
}
