//! Reads the entries of a manifest, and writes the verdicts.

use std::sync::Arc;

use bytes::BytesMut;
use tokio::sync::mpsc;

use super::admit::Admission;
use super::batch::settle_batch;
use super::entry_credit::EntryCredit;
use super::session::Session;
use super::wanted::WantedFile;
use crate::error::{Code, Error, Reason, Result};
use crate::net::stream::{MessageReader, MessageWriter, StreamError};
use crate::protocol::path::RelativePath;
use crate::protocol::{Complete, Entry, Frame, Kind, Message, Unsendable, Verdict};
use crate::transfer::blocking::blocking;
use crate::transfer::events::Settled;
use crate::transfer::stats::EntryResult;

/// Entries decided in one blocking task.
const ENTRY_BATCH: usize = 256;

/// Where the wanted files of a manifest go.
pub(super) struct WantedQueues {
    /// Files to compare by content first.
    pub(super) compare: mpsc::UnboundedSender<WantedFile>,
    pub(super) admission: Admission,
}

impl WantedQueues {
    fn add(&self, file: WantedFile) {
        match file.compare {
            // Fails only when the session is over.
            Some(_) => drop(self.compare.send(file)),
            None => self.admission.add(file),
        }
    }
}

/// Reads entries and settles them in batches, until the sender ends the manifest.
pub(super) async fn read_entries(
    session: &Arc<Session>,
    mut entries: MessageReader,
    credit: Arc<EntryCredit>,
    wanted: WantedQueues,
) -> Result<()> {
    let mut last_id = None;
    while let Some(first) = entries.frame(Entry::LIMIT).await? {
        let mut batch = Vec::new();
        let mut next = Some(first);
        while let Some(frame) = next {
            if frame.kind == Entry::TYPE {
                batch.push(read_entry(session, &frame, &credit, &mut last_id)?);
            } else {
                read_notice(session, &frame)?;
            }
            next = if batch.len() < ENTRY_BATCH {
                entries.buffered(Entry::LIMIT)?
            } else {
                None
            };
        }
        if batch.is_empty() {
            continue;
        }
        session.observe(session.context.stats.found_event());
        let shared = session.clone();
        let files = blocking("write", move || Ok(settle_batch(&shared, batch)))
            .await
            .map_err(Error::Refused)?;
        files.into_iter().for_each(|file| wanted.add(file));
    }
    credit.end();
    Ok(())
}

/// Decodes and counts an entry.
fn read_entry(
    session: &Session,
    frame: &Frame,
    credit: &EntryCredit,
    last_id: &mut Option<u64>,
) -> Result<Entry> {
    let entry: Entry = frame.decode().map_err(StreamError::from)?;
    let stats = &session.context.stats;
    stats.found(entry.kind, entry.size.unwrap_or(0));
    if let Some(last) = last_id.filter(|&last| entry.id <= last) {
        return Err(Error::Protocol(
            format!(
                "the ids do not ascend: entry {} follows entry {last}",
                entry.id
            )
            .into(),
        ));
    }
    *last_id = Some(entry.id);
    credit.add(entry.id, frame.payload.len())?;
    Ok(entry)
}

/// Handles a message between the entries of a manifest: `Complete` or `Unsendable`.
fn read_notice(session: &Session, frame: &Frame) -> Result<()> {
    let stats = &session.context.stats;
    if frame.kind == Complete::TYPE {
        frame.decode::<Complete>().map_err(StreamError::from)?;
        stats.complete();
        session.observe(stats.found_event());
        return Ok(());
    }
    let Unsendable { path, why, omitted } = frame.decode().map_err(StreamError::from)?;
    let path = RelativePath::from_components(&path.0)
        .map_err(|bad| Error::Protocol(bad.to_string().into()))?;
    let reason = Reason::from(why);
    let result = if is_omitted(reason.code, omitted, session.policy.fail_specials) {
        // An omission does not stop a mirror from removing other paths. The path itself stays, whatever its kind.
        let is_mirror = session.policy.options.delete.is_some();
        if let Ok(place) = session.target.placement.of(&path)
            && is_mirror
        {
            session.tables.announced.insert_omitted(&place);
        }
        Settled::Omitted(reason)
    } else {
        Settled::Failed(reason)
    };
    session.report(EntryResult {
        id: None,
        path,
        kind: Kind::File,
        size: 0,
        committed: None,
        result,
    });
    Ok(())
}

/// Returns whether an unsendable source counts as omitted. Senders of older versions do not say; there only special
/// files were omitted.
fn is_omitted(code: Code, said: Option<bool>, fail_specials: bool) -> bool {
    match code {
        Code::Special => said.unwrap_or(true) && !fail_specials,
        Code::Vanished => said.unwrap_or(false),
        _ => false,
    }
}

/// Writes verdicts in batches until every entry is answered and the sender has ended the manifest.
pub(super) async fn write_verdicts(
    session: &Session,
    mut stream: MessageWriter,
    mut verdicts: mpsc::UnboundedReceiver<Verdict>,
    credit: Arc<EntryCredit>,
) -> Result<()> {
    let deadline = session.context.config.deadline;
    let mut gathered = Vec::new();
    loop {
        let ended = tokio::select! {
            biased;
            _ = verdicts.recv_many(&mut gathered, ENTRY_BATCH) => false,
            () = credit.ended() => true,
        };
        if ended {
            stream.finish();
            return Ok(());
        }
        let mut buffer = BytesMut::new();
        let ids: Vec<u64> = gathered.iter().map(Verdict::id).collect();
        for verdict in gathered.drain(..) {
            verdict.put(&mut buffer);
        }
        stream
            .write_chunks(&mut [buffer.freeze()], deadline)
            .await?;
        credit.remove(&ids);
    }
}
