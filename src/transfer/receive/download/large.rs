//! Receives a large file with a permit in hand: opens the partial, offers the ranges it holds, and receives the rest.

use std::sync::Arc;

use tracing::Instrument;

use super::exchange::{arrival, give_receipt, while_working};
use super::pump::{Pump, Turn};
use crate::error::{Code, Reason, Result};
use crate::protocol::{Held, Verdict};
use crate::transfer::blocking::blocking;
use crate::transfer::permits::Slot;
use crate::transfer::receive::body_reader::BodyReader;
use crate::transfer::receive::commit::{CompleteFile, commit, open};
use crate::transfer::receive::dedupe::{copy_existing_content, index_received};
use crate::transfer::receive::file_locks::FileLock;
use crate::transfer::receive::file_writer::FileWriter;
use crate::transfer::receive::session::Session;
use crate::transfer::receive::streams::OpenTransfer;
use crate::transfer::receive::wanted::WantedFile;

/// Makes a large file from existing content, or receives it. Sends its `Want` or `Done`.
pub(in crate::transfer::receive) async fn receive_large(
    session: Arc<Session>,
    file: WantedFile,
    slot: Slot,
    lock: FileLock,
) {
    let span = tracing::debug_span!("transfer", id = file.id, path = %file.path, size = file.size);
    receive(session, file, slot, lock).instrument(span).await;
}

async fn receive(session: Arc<Session>, file: WantedFile, slot: Slot, lock: FileLock) {
    if copy_existing_content(&session, &file, &lock).await {
        lock.committed(file.committed_source(session.policy.durability));
        drop((slot, lock));
        session.transfer_ended(&file, Ok(file.known_size()));
        return session.answer(Verdict::Done(file.id));
    }
    let begun = begin(&session, &file).await;
    let (writer, held) = match begun {
        Ok(begun) => begun,
        Err(reason) => return session.refuse(file.label(), reason),
    };
    session.transfer_started(&file, held.iter().map(|held| held.range.length).sum());
    let stream = session.streams.expect(file.id);
    lock.asked();
    session.answer(Verdict::Want(file.id, held.clone()));
    let mut turn = Turn {
        session: &session,
        file: &file,
        lock: &lock,
        slot,
    };
    // A peer that never opens the stream must not hold the permit for long.
    let arrival = arrival(&session, &file, stream, lock.superseded());
    let Some(mut transfer) = turn.wait_or_park(arrival).await else {
        return;
    };
    let result = receive_body(&mut turn, writer, &held, &mut transfer).await;
    drop(turn);
    // The disk work has ended, and a newer session need not wait until this peer reads the receipt.
    drop(lock);
    let OpenTransfer {
        stream, receipt, ..
    } = transfer;
    give_receipt(&session, &file, stream, receipt, result).await;
}

/// Opens or resumes the partial. Returns the ranges to offer as held.
async fn begin(
    session: &Arc<Session>,
    file: &WantedFile,
) -> Result<(FileWriter, Vec<Held>), Reason> {
    let session = session.clone();
    let path = file.path.clone();
    let key = file.partial_key.clone();
    blocking("write", move || {
        let upload = open(&session, &path, &key)?;
        let (mut writer, held) = FileWriter::begin(upload, &path, key.size)?;
        writer.write_back_for(session.policy.durability);
        Ok((writer, held))
    })
    .await
}

/// Receives the body and trailer, and commits. The partial stays for resume unless it is useless.
async fn receive_body(
    turn: &mut Turn<'_>,
    mut writer: FileWriter,
    held: &[Held],
    transfer: &mut OpenTransfer,
) -> Result<u64, Reason> {
    let session = turn.session;
    let file = turn.file;
    let plan = transfer.plan.clone();
    let body = BodyReader::new(&plan, transfer.start, file.size, writer.in_order())?;
    let offered = held.to_vec();
    // The caller holds the lock and permit beyond this call, and it cannot be cancelled otherwise.
    let keep = blocking("write", move || {
        writer.keep(&plan, &offered).map(|()| writer)
    });
    let writer = while_working(session, &mut transfer.receipt, keep).await?;
    let mut pump = Pump::new(turn, body, writer, transfer);
    pump.take_begun()?;
    let moved = pump.run().await;
    // The disk work must end before the lock and permit pass to another transfer.
    let end = pump.end().await;
    // Returns the credit of unwritten bytes when the file has ended.
    let _credit = end.credit;
    let mut body = end.body;
    let mut idle = end.writer;
    let result = match moved {
        Ok(()) => commit_large(turn, &mut body, &mut idle, transfer).await,
        Err(reason) => Err(reason),
    };
    if let Err(reason) = &result
        && let Some(writer) = idle
        && is_useless(file, reason)
    {
        let discard = move || {
            writer.discard();
            Ok(())
        };
        let _ = blocking::<_, Reason>("remove a partial", discard).await;
    }
    result
}

/// Returns whether the partial of a failed file cannot be resumed.
fn is_useless(file: &WantedFile, reason: &Reason) -> bool {
    file.size.is_none()
        || matches!(
            reason.code,
            Code::Changed | Code::Vanished | Code::Corrupt | Code::Protocol | Code::NoSpace
        )
}

/// Verifies and commits the file under a permit. Returns its size.
async fn commit_large(
    turn: &mut Turn<'_>,
    body: &mut BodyReader,
    writer: &mut Option<FileWriter>,
    transfer: &mut OpenTransfer,
) -> Result<u64, Reason> {
    let session = turn.session;
    let file = turn.file;
    let trailer = body.trailer()?;
    let writer = writer.take().ok_or_else(|| Reason::from(Code::Internal))?;
    while_working(session, &mut transfer.receipt, turn.resume()).await?;
    let path = file.path.clone();
    let attributes = file.attributes.clone();
    let durability = session.policy.durability;
    let shared = session.clone();
    let committed = blocking("write", move || {
        let verified = writer.verify(trailer)?;
        let file = CompleteFile {
            upload: verified.upload,
            path: &path,
            attributes: &attributes,
            durability,
            resumable: true,
        };
        commit(&shared, file)?;
        Ok(verified.size)
    });
    let size = while_working(session, &mut transfer.receipt, committed).await?;
    turn.lock.committed(file.committed_source(durability));
    index_received(session, file, &transfer.plan, trailer).await;
    Ok(size)
}
