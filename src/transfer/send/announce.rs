//! Announces entries on the manifest stream.

use bytes::{BufMut, BytesMut};
use tokio::sync::watch;

use super::entry_credit::UnansweredLimit;
use super::entry_table::EntryTable;
use super::hard_links::MAX_WAITING;
use super::run::Run;
use super::walk_queue::{Ended, WalkQueue};
use crate::error::{Code, Result};
use crate::net::stream::MessageWriter;
use crate::protocol::path::RelativePath;
use crate::protocol::{Complete, Components, Kind, Message, StreamType, Unsendable, put_varint};
use crate::storage::walk::WalkItem;
use crate::transfer::events::Settled;

/// Bytes of entries that are gathered into one write.
const MANIFEST_WRITE_SIZE: usize = 16 << 10;

/// The manifest of a session on its current connection.
pub(super) struct Manifest<'a> {
    run: &'a Run,
    queue: &'a mut WalkQueue,
    stream: MessageWriter,
    /// Entries that are gathered for one write.
    buffer: BytesMut,
    limit: watch::Receiver<UnansweredLimit>,
}

impl<'a> Manifest<'a> {
    pub(super) fn new(run: &'a Run, queue: &'a mut WalkQueue, stream: MessageWriter) -> Self {
        let mut buffer = BytesMut::new();
        buffer.put_u8(StreamType::Manifest as u8);
        put_varint(&mut buffer, run.sending.handle);
        Self {
            run,
            queue,
            stream,
            buffer,
            limit: run.sending.allowed.subscribe(),
        }
    }

    /// Announces the entries that an earlier connection left and all that the walk finds. Ends the manifest when
    /// everything is sent, and returns when everything is settled.
    pub(super) async fn announce(mut self) -> Result<()> {
        self.announce_again().await?;
        self.announce_found().await?;
        self.write_entries().await?;
        let run = self.run;
        // Completely sent files only wait for their receipts. The receiver may get the end together with the last
        // file.
        run.until(EntryTable::all_sent).await;
        self.stream.finish();
        run.sending.all_sent.cancel();
        run.until(EntryTable::is_empty).await;
        Ok(())
    }

    async fn announce_again(&mut self) -> Result<()> {
        // Wait for room before taking an entry: entries held by this future are lost with the connection.
        loop {
            self.wait_for_room().await?;
            if self.is_stopping() || !self.run.entries().put_reannounced(&mut self.buffer) {
                return Ok(());
            }
        }
    }

    async fn announce_found(&mut self) -> Result<()> {
        let run = self.run;
        loop {
            self.wait_for_room().await?;
            let changed = run.shared.changed.notified();
            if !self.is_stopping() && run.entries().put_waiting(&mut self.buffer) {
                continue;
            }
            let waiting_names = run.entries().waiting_names();
            if self.queue.is_over() && waiting_names == 0 {
                run.entries().complete();
                return Ok(());
            }
            let found = tokio::select! {
                biased;
                () = run.sending.stopping.cancelled() => {
                    run.entries().stop(Code::Stopping.into());
                    return Ok(());
                }
                found = self.queue.next(waiting_names < MAX_WAITING) => found,
                // Nothing else is ready: write the gathered entries before waiting.
                () = std::future::ready(()), if !self.buffer.is_empty() => {
                    self.write_entries().await?;
                    continue;
                }
                () = changed, if waiting_names > 0 => continue,
            };
            match found {
                Ok(item) => self.put(item),
                Err(Ended::Directories) => {}
                Err(Ended::Walk) => {
                    Complete {}.put(&mut self.buffer);
                    run.entries().end_walk();
                    run.report_found();
                }
            }
        }
    }

    fn is_stopping(&self) -> bool {
        self.run.sending.stopping.is_cancelled()
    }

    /// Puts an item of the walk into the buffer.
    fn put(&mut self, item: WalkItem) {
        match item {
            WalkItem::Entry(announce) => {
                let is_directory = announce.kind == Kind::Directory;
                self.run.entries().put_found(announce, &mut self.buffer);
                if !is_directory {
                    self.run.report_found();
                }
            }
            WalkItem::Failed(path, reason) => {
                let omitted = (reason.code == Code::Special).then_some(false);
                self.put_unsendable(path, Settled::Failed(reason), omitted);
            }
            WalkItem::Omitted(path, reason) => {
                self.put_unsendable(path, Settled::Omitted(reason), Some(true));
            }
            WalkItem::Excluded(count) => self.run.entries().exclude(count),
        }
    }

    /// Reports a source that never becomes an entry.
    fn put_unsendable(&mut self, path: RelativePath, result: Settled, omitted: Option<bool>) {
        if let Settled::Failed(reason) | Settled::Omitted(reason) = &result {
            Unsendable {
                path: Components::from(&path),
                why: reason.clone().into(),
                omitted,
            }
            .put(&mut self.buffer);
        }
        self.run.shared.report(None, path, Kind::File, 0, result);
    }

    /// Writes the gathered entries within the rate limits.
    async fn write_entries(&mut self) -> Result<()> {
        let limits = &self.run.sending.limits;
        while !self.buffer.is_empty() {
            let part = self.buffer.split_to(self.buffer.len().min(limits.block()));
            limits.take(part.len()).await;
            self.stream.write_bytes(part.freeze()).await?;
        }
        Ok(())
    }

    /// Waits until one more entry may be unanswered. Writes all gathered entries before it waits.
    async fn wait_for_room(&mut self) -> Result<()> {
        let run = self.run;
        loop {
            let limit = *self.limit.borrow_and_update();
            let has_room = run.entries().has_room(limit);
            if !has_room || self.buffer.len() >= MANIFEST_WRITE_SIZE {
                self.write_entries().await?;
            }
            if has_room {
                return Ok(());
            }
            tokio::select! {
                () = run.until(|entries| entries.has_room(limit)) => return Ok(()),
                // Cannot fail: the run owns the sending end.
                _ = self.limit.changed() => {}
            }
        }
    }
}
