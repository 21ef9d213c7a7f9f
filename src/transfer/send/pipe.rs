//! Sends a transfer of unknown length: pieces, until the input ends.

use std::io::{self, Read};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::file_reader::vanished;
use super::run::Run;
use super::transfer_stream::{TransferStream, or_withdraw};
use crate::error::{Code, Reason, Result};
use crate::protocol::{ENCODING_PIECES, Message, PIECE, Plan, Trailer, Working, put_varint};
use crate::storage::Source;
use crate::storage::pipe::{Piece, Pipe};
use crate::storage::walk::Announce;
use crate::transfer::blocking::blocking;
use crate::transfer::sampler::Stage;

/// Interval of `Working` messages while the input is idle.
const WORKING_INTERVAL: Duration = Duration::from_secs(5);

/// A file that reports the size 0, read to its end.
struct UnsizedFile {
    source: Box<dyn Source>,
    /// The size that it reports.
    size: u64,
    at: u64,
}

impl Read for UnsizedFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read_at(buffer, self.at)?;
        if read == 0 && self.source.metadata()?.size != self.size {
            return Err(io::Error::other("changed while it was being sent"));
        }
        self.at += read as u64;
        Ok(read)
    }
}

/// Starts reading the announced pipe or file.
async fn begin(announce: &Announce, pipe: &Pipe) -> Result<mpsc::Receiver<Piece>, Reason> {
    if !pipe.is_file() {
        return pipe
            .begin()
            .ok_or_else(|| Reason::new(Code::Unreadable, "cannot read the input a second time"));
    }
    let tree = announce.tree.clone();
    let path = announce.source.clone();
    let open = move || {
        let source = tree.store.open(&path).map_err(vanished)?;
        let size = source.metadata().map_err(|e| Reason::from_io(&e))?.size;
        Ok(UnsizedFile {
            source,
            size,
            at: 0,
        })
    };
    Ok(pipe.begin_with(blocking::<_, Reason>("read the file", open).await?))
}

fn unreadable(pipe: &Pipe, error: &io::Error) -> Reason {
    let object = if pipe.is_file() {
        "the file"
    } else {
        "the input"
    };
    Reason::new(Code::Unreadable, format!("cannot read {object}: {error}"))
}

/// Sends a file with the data of a pipe, and waits for the receipt.
pub(super) async fn send_pipe(
    run: &Run,
    id: u64,
    announce: &Announce,
    pipe: &Pipe,
) -> Result<(), Reason> {
    let _open = match pipe.is_file() {
        true => Some(run.shared.permits.open_files.acquire().await),
        false => None,
    };
    let begun = begin(announce, pipe).await;
    let mut pieces = or_withdraw(run, id, begun).await?;
    run.report_started(id, announce, 0);
    let mut stream = TransferStream::open(run).await?;
    let head = stream.head(&Plan {
        id,
        encoding: ENCODING_PIECES,
        ranges: Vec::new(),
        holes: None,
    });
    stream.write(&mut [head]).await?;
    let (digest, size) = loop {
        let bytes = match next_piece(run, &mut stream, &mut pieces).await? {
            Some(Piece::Bytes(bytes)) => bytes,
            Some(Piece::End(digest, size)) => break (digest, size),
            Some(Piece::Failed(error)) => {
                return stream.give_up(id, unreadable(pipe, &error)).await;
            }
            None => return stream.give_up(id, Code::Internal.into()).await,
        };
        let moved = bytes.len() as u64;
        let mut head = BytesMut::new();
        head.put_u8(PIECE);
        put_varint(&mut head, moved);
        stream.write(&mut [head.freeze(), bytes]).await?;
        run.entries().add_found_bytes(pipe.moved(moved));
        run.report_found();
        run.report_moved(id, moved);
    };
    let trailer = Trailer {
        digest,
        size: Some(size),
    };
    stream.write(&mut [trailer.to_bytes()]).await?;
    pipe.end();
    run.report_found();
    run.sent_whole(id);
    stream.finish(size).await
}

/// Waits for the next piece of the input; `None` if its reader panicked. While the input is idle, the receiver learns
/// that this end is alive. An input may be idle for hours, and the user should learn of a full disk before that: fails
/// when the receiver ends the transfer.
async fn next_piece(
    run: &Run,
    stream: &mut TransferStream<'_>,
    pieces: &mut mpsc::Receiver<Piece>,
) -> Result<Option<Piece>, Reason> {
    let _reading = run.sending.stage_counters.at(Stage::Reading);
    loop {
        tokio::select! {
            piece = pieces.recv() => return Ok(piece),
            () = stream.stopped() => return Err(stream.reason_of_early_end().await),
            () = sleep(WORKING_INTERVAL) => stream.write(&mut [Working {}.to_bytes()]).await?,
        }
    }
}
