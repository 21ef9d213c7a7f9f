//! Receives a small file into reserved memory, then writes it under a permit.

use std::future::pending;
use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use quinn::RecvStream;
use tracing::Instrument;

use super::exchange::{arrival, give_receipt, or_timeout_on_silence, while_working};
use crate::error::{Code, Reason, Result};
use crate::net::flow_control::Reservation;
use crate::net::stream::StreamError;
use crate::protocol::{
    ENCODING_RANGES, Frame, Malformed, Message, Plan, Range, Trailer, content_hasher,
};
use crate::storage::Upload;
use crate::storage::io_errors::fault;
use crate::transfer::blocking::blocking;
use crate::transfer::receive::body_reader::RUN_SIZE;
use crate::transfer::receive::commit::{CompleteFile, commit, open};
use crate::transfer::receive::plan_check::kept_ranges;
use crate::transfer::receive::session::Session;
use crate::transfer::receive::streams::{ExpectedStream, OpenTransfer};
use crate::transfer::receive::turn::{is_committed_by_other, take_lock};
use crate::transfer::receive::wanted::WantedFile;

/// A received small file that is not yet written.
struct SmallBody {
    /// The bytes of the plan's ranges in order.
    content: BytesMut,
    trailer: Trailer,
}

/// Receives a whole file into reserved memory, then writes it under a permit.
pub(in crate::transfer::receive) async fn receive_small(
    session: Arc<Session>,
    file: WantedFile,
    stream: ExpectedStream,
    memory: Reservation,
) {
    let span = tracing::debug_span!("transfer", id = file.id, path = %file.path, size = file.size);
    receive(session, file, stream, memory)
        .instrument(span)
        .await;
}

async fn receive(
    session: Arc<Session>,
    file: WantedFile,
    stream: ExpectedStream,
    memory: Reservation,
) {
    session.transfer_started(&file, 0);
    let Some(transfer) = arrival(&session, &file, stream, pending()).await else {
        return;
    };
    let OpenTransfer {
        plan,
        mut stream,
        begun,
        mut receipt,
        ..
    } = transfer;
    let result = match read_body(&session, &file, &plan, &mut stream, &begun).await {
        Ok(body) => {
            session.received(file.id, body.content.len() as u64);
            let written = write(&session, &file, plan, body);
            while_working(&session, &mut receipt, written)
                .await
                .map(|()| file.known_size())
        }
        Err(reason) => Err(reason),
    };
    drop(memory);
    give_receipt(&session, &file, stream, receipt, result).await;
}

/// Reads the body and trailer.
async fn read_body(
    session: &Session,
    file: &WantedFile,
    plan: &Plan,
    stream: &mut RecvStream,
    begun: &[u8],
) -> Result<SmallBody, Reason> {
    if plan.encoding != ENCODING_RANGES {
        return Err(Reason::new(
            Code::Unsupported,
            format!("encoding {} is not supported", plan.encoding),
        ));
    }
    // The receiver offered no held ranges for it.
    kept_ranges(plan, &[], file.known_size())?;
    let size: u64 = plan.ranges.iter().map(|range| range.length).sum();
    let mut content = BytesMut::with_capacity(size as usize + Trailer::LIMIT);
    content.extend_from_slice(begun);
    loop {
        if content.len() > size as usize + Trailer::LIMIT {
            return Err(Reason::new(
                Code::Protocol,
                "the stream continues after its trailer",
            ));
        }
        let chunk = stream.read_chunk(RUN_SIZE, true);
        let chunk = or_timeout_on_silence(session, chunk).await?;
        match chunk.map_err(StreamError::from)? {
            Some(chunk) => content.extend_from_slice(&chunk.bytes),
            None => break,
        }
    }
    if content.len() < size as usize {
        return Err(Reason::new(Code::Protocol, "the body ended too early"));
    }
    let trailer = decode_trailer(content.split_off(size as usize))?;
    Ok(SmallBody { content, trailer })
}

/// Decodes the trailer, which must be all that follows the body.
fn decode_trailer(mut bytes: BytesMut) -> Result<Trailer, Reason> {
    let bad = |malformed: Malformed| Reason::new(Code::Protocol, malformed.to_string());
    match Frame::take(&mut bytes, Trailer::LIMIT).map_err(bad)? {
        Some(frame) if bytes.is_empty() => frame.decode().map_err(bad),
        _ => Err(Reason::new(
            Code::Protocol,
            "the body is not followed by its trailer alone",
        )),
    }
}

/// Writes and commits the file in its turn.
async fn write(
    session: &Arc<Session>,
    file: &WantedFile,
    plan: Plan,
    body: SmallBody,
) -> Result<(), Reason> {
    let lock = take_lock(session, file).await?;
    if is_committed_by_other(session, file, &lock).await? {
        return Ok(());
    }
    let slot = async { Ok(session.context.permits.small.open().await) };
    let slot = lock.or_superseded(slot).await?;
    let session = session.clone();
    let path = file.path.clone();
    let attributes = file.attributes.clone();
    let durability = session.policy.durability;
    let source = file.committed_source(durability);
    blocking("write", move || {
        // The lock and the permit are held until the disk work ends, even if the caller is cancelled.
        let _slot = slot;
        let mut hasher = content_hasher(source.key.size, plan.holes());
        if hasher.update(&body.content).finalize() != body.trailer.digest {
            return Err(Reason::new(
                Code::Corrupt,
                "the content does not match its digest; send it again",
            ));
        }
        let mut upload = open(&session, &path, &source.key)?;
        if let Err(error) = write_parts(&mut *upload, &plan, &body.content) {
            upload.discard();
            return Err(fault(&path, "write it", error));
        }
        let file = CompleteFile {
            upload,
            path: &path,
            attributes: &attributes,
            durability,
            resumable: false,
        };
        commit(&session, file)?;
        lock.committed(source);
        Ok(())
    })
    .await
}

/// Writes the ranges of the plan in order, and its holes.
fn write_parts(upload: &mut dyn Upload, plan: &Plan, content: &[u8]) -> io::Result<()> {
    let in_order = upload.in_order();
    let holes = plan.holes().iter().map(|hole| (*hole, true));
    let ranges = plan.ranges.iter().map(|range| (*range, false));
    let mut parts: Vec<(Range, bool)> = ranges.chain(holes).collect();
    parts.sort_unstable_by_key(|(range, _)| range.offset);
    let mut rest = content;
    for (range, is_hole) in parts {
        if is_hole && in_order {
            upload.write_at(&vec![0; range.length as usize], range.offset)?;
        } else if is_hole {
            upload.make_hole(range.offset..range.offset + range.length)?;
        } else {
            let (part, after) = rest.split_at(rest.len().min(range.length as usize));
            upload.write_at(part, range.offset)?;
            rest = after;
        }
    }
    Ok(())
}
