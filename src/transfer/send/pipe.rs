//! Sends a transfer of unknown length: pieces, until the input ends.

use std::io::{self, Read};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::file_reader::vanished;
use super::upload::Receipt;
use super::{Run, blocking};
use crate::error::{Code, Reason, Result};
use crate::protocol::{ENCODING_PIECES, Message, PIECE, Plan, Trailer, Working, put_varint};
use crate::storage::Source;
use crate::storage::pipe::{Piece, Pipe};
use crate::storage::walk::Announce;
use crate::transfer::events::Event;
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
    Ok(pipe.begin_with(blocking(open).await?))
}

fn unreadable(pipe: &Pipe, error: &io::Error) -> Reason {
    let object = if pipe.is_file() {
        "the file"
    } else {
        "the input"
    };
    Reason::new(Code::Unreadable, format!("cannot read {object}: {error}"))
}

impl Run {
    pub(super) async fn transfer_pipe(
        &self,
        id: u64,
        announce: &Announce,
        pipe: &Pipe,
    ) -> Result<(), Reason> {
        let _open = match pipe.is_file() {
            true => Some(self.shared.files.acquire().await),
            false => None,
        };
        let begun = begin(announce, pipe).await;
        let mut pieces = self.withdraw(id, begun).await?;
        self.started(id, announce, 0);
        let (mut stream, mut receipt) = self.open_transfer().await?;
        let mut head = self.header();
        Plan {
            id,
            encoding: ENCODING_PIECES,
            ranges: Vec::new(),
            holes: None,
        }
        .put(&mut head);
        if let Err(error) = self
            .write((&mut stream, &mut receipt), &mut [head.freeze()])
            .await
        {
            return self.stopped(error, &mut receipt).await;
        }
        let (digest, size) = loop {
            let reading = self.sending.meter.at(Stage::Reading);
            let stopped = stream.delivered();
            let piece = tokio::select! {
                piece = pieces.recv() => piece,
                // An input may be idle for hours, and the user should learn of a full disk before that.
                () = stopped => return self.ended_early(&mut receipt).await,
                () = sleep(WORKING_INTERVAL) => {
                    if let Err(error) = self.write((&mut stream, &mut receipt), &mut [Working {}.to_bytes()]).await {
                        return self.stopped(error, &mut receipt).await;
                    }
                    continue;
                }
            };
            drop(reading);
            let bytes = match piece {
                Some(Piece::Bytes(bytes)) => bytes,
                Some(Piece::End(digest, size)) => break (digest, size),
                Some(Piece::Failed(error)) => {
                    return self.give_up(id, stream, unreadable(pipe, &error)).await;
                }
                None => return self.give_up(id, stream, Code::Internal.into()).await,
            };
            let moved = bytes.len() as u64;
            let mut head = BytesMut::new();
            head.put_u8(PIECE);
            put_varint(&mut head, moved);
            if let Err(error) = self
                .write((&mut stream, &mut receipt), &mut [head.freeze(), bytes])
                .await
            {
                return self.stopped(error, &mut receipt).await;
            }
            self.state().found_more(pipe.moved(moved));
            self.report_found();
            (self.shared.observer)(Event::Moved { id, bytes: moved });
        };
        if let Err(error) = self
            .write(
                (&mut stream, &mut receipt),
                &mut [Trailer {
                    digest,
                    size: Some(size),
                }
                .to_bytes()],
            )
            .await
        {
            return self.stopped(error, &mut receipt).await;
        }
        pipe.end();
        self.report_found();
        self.sent(id);
        let delivered = stream.delivered();
        stream.finish();
        self.receipt(&mut receipt, size, delivered).await
    }

    /// Handles a transfer that the receiver ended before the input did, and returns its reason.
    async fn ended_early(&self, receipt: &mut Receipt) -> Result<(), Reason> {
        match self.read_receipt(receipt).await? {
            Err(why) => Err(why),
            Ok(_) => Err(Reason::new(
                Code::Protocol,
                "the receiver committed the file before its end",
            )),
        }
    }
}
