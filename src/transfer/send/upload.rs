//! Sends one wanted file: plan, body and trailer, and waits for the receipt.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::OwnedSemaphorePermit;

use super::file_reader::{BLOCK, FileReader};
use super::pipe::send_pipe;
use super::run::Run;
use super::transfer_stream::{TransferStream, or_withdraw, parts};
use crate::error::{Reason, Result};
use crate::protocol::{Held, Message, Plan, Trailer};
use crate::storage::digest_index::LARGE_FILE;
use crate::storage::walk::Announce;
use crate::transfer::blocking::blocking;
use crate::transfer::events::Settled;
use crate::transfer::sampler::Stage;

/// Largest file that is read whole before its stream is opened, in bytes.
const SMALL_BODY: u64 = BLOCK as u64;

/// A file that the receiver wants.
pub(super) struct Wanted {
    pub(super) id: u64,
    pub(super) announce: Arc<Announce>,
    /// The ranges that the receiver holds.
    pub(super) held: Vec<Held>,
}

/// Sends one wanted file, reads the receipt and settles the entry. Holds the permit until then.
pub(super) async fn upload(run: Arc<Run>, wanted: Wanted, _permit: OwnedSemaphorePermit) {
    let Wanted { id, announce, held } = wanted;
    let result = if let Some(pipe) = &announce.pipe {
        send_pipe(&run, id, &announce, pipe).await
    } else if announce.metadata.size <= SMALL_BODY {
        send_small(&run, id, &announce).await
    } else {
        let _writer = run.shared.permits.large_writers.acquire().await;
        send_large(&run, id, &announce, held).await
    };
    // After a connection loss, the loss ended the session; no single file failed.
    if run.sending.connection.close_reason().is_none() {
        let result = result.map_or_else(Settled::from_failure, |()| Settled::Committed);
        run.settle(id, result);
    }
}

/// Sends a file that fits into one write.
async fn send_small(run: &Run, id: u64, announce: &Announce) -> Result<(), Reason> {
    let size = announce.metadata.size;
    run.report_started(id, announce, 0);
    let kib = size.div_ceil(1024) as u32;
    let _memory = run
        .shared
        .permits
        .small_memory
        .acquire_many(kib.max(1))
        .await;
    let reading = run.sending.stage_counters.at(Stage::Reading);
    let open = run.shared.permits.open_files.clone().acquire_owned().await;
    let mut reader = FileReader::open(announce, Vec::new(), run.shared.may_grow);
    let plan = reader.plan(id);
    let read = blocking("read the file", move || {
        let _open = open;
        let mut content = BytesMut::with_capacity(size as usize);
        while let Some(block) = reader.next()? {
            content.extend_from_slice(&block);
        }
        Ok((content.freeze(), reader.finish()?))
    })
    .await;
    drop(reading);
    let (content, digest) = or_withdraw(run, id, read).await?;
    let mut stream = TransferStream::open(run).await?;
    let head = stream.head(&plan);
    let trailer = Trailer { digest, size: None };
    stream
        .write(&mut [head, content, trailer.to_bytes()])
        .await?;
    run.report_moved(id, size);
    run.sent_whole(id);
    stream.finish(size).await
}

/// Sends a file block by block, without the ranges that the receiver holds.
async fn send_large(
    run: &Run,
    id: u64,
    announce: &Announce,
    held: Vec<Held>,
) -> Result<(), Reason> {
    let size = announce.metadata.size;
    let _open = run.shared.permits.open_files.acquire().await;
    let reading = run.sending.stage_counters.at(Stage::Reading);
    let reader = FileReader::open(announce, held, run.shared.may_grow);
    let compared = blocking("read the file", move || reader.compare().map(Box::new)).await;
    let mut reader = or_withdraw(run, id, compared).await?;
    drop(reading);
    let plan = reader.plan(id);
    let lasts = digest_lasts(announce, &plan);
    // Held ranges and holes are not sent.
    let planned: u64 = plan.ranges.iter().map(|range| range.length).sum();
    run.report_started(id, announce, size - planned);
    let mut stream = TransferStream::open(run).await?;
    let head = stream.head(&plan);
    stream.write(&mut [head]).await?;
    let digest = loop {
        // quinn sends the last block while the next one is read.
        let reading = run.sending.stage_counters.at(Stage::Reading);
        let read = read_block(reader).await;
        drop(reading);
        let block = match read {
            Ok(BlockRead::Block(block, rest)) => {
                reader = rest;
                block
            }
            Ok(BlockRead::End(digest)) => break digest,
            Err(reason) => return stream.give_up(id, reason).await,
        };
        // Write in parts, so that progress shows even under a low limit.
        for part in parts(block, run.sending.limits.block()) {
            let bytes = part.len() as u64;
            stream.write(&mut [part]).await?;
            run.report_moved(id, bytes);
        }
    };
    let trailer = Trailer { digest, size: None };
    stream.write(&mut [trailer.to_bytes()]).await?;
    run.sent_whole(id);
    stream.finish(size).await?;
    if let Some(index) = run.shared.index.clone().filter(|_| lasts) {
        let version = announce.metadata.version;
        let remember = move || {
            index.remember(&version.key(), version.changed, &digest);
            Ok(())
        };
        blocking::<_, Reason>("record a digest", remember).await?;
    }
    Ok(())
}

enum BlockRead {
    Block(Bytes, Box<FileReader>),
    /// The digest of the whole file.
    End([u8; 32]),
}

async fn read_block(mut reader: Box<FileReader>) -> Result<BlockRead, Reason> {
    let read = move || match reader.next()? {
        Some(block) => Ok(BlockRead::Block(block, reader)),
        None => reader.finish().map(BlockRead::End),
    };
    blocking("read the file", read).await
}

/// Returns whether the digest of a file is worth remembering: the file is large, any later change of it will show,
/// and the digest covers no holes, which the content alone would not give.
fn digest_lasts(announce: &Announce, plan: &Plan) -> bool {
    let version = &announce.metadata.version;
    announce.metadata.size >= LARGE_FILE
        && plan.holes().is_empty()
        && version.key().is_settled(version.changed)
}
