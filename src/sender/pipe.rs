//! A transfer whose length nobody knows beforehand: pieces, until the input ends.

use std::time::Duration;

use bytes::{BufMut, BytesMut};
use tokio::time::sleep;

use super::transfer::Receipt;
use super::{Run, Station};
use crate::error::{Code, Result, Why};
use crate::manifest::Announce;
use crate::pipe::{Piece, Pipe};
use crate::progress::Event;
use crate::wire::{ENCODING_PIECES, Message, PIECE, Plan, Trailer, Working, put_varint};

/// How often an input that gives nothing is said to be alive.
const WORKING: Duration = Duration::from_secs(5);

impl Run {
    pub(super) async fn transfer_pipe(
        &self,
        id: u64,
        announce: &Announce,
        pipe: &Pipe,
    ) -> Result<(), Why> {
        let begun = pipe
            .begin()
            .ok_or_else(|| Why::new(Code::Unreadable, "the input cannot be read a second time"));
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
            let reading = self.sending.meter.at(Station::Reading);
            let stopped = stream.delivered();
            let piece = tokio::select! {
                piece = pieces.recv() => piece,
                // An input may give nothing for hours, and nobody should wait so long to learn of a full disk.
                () = stopped => return self.ended_early(&mut receipt).await,
                () = sleep(WORKING) => {
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
                    let why = Why::new(
                        Code::Unreadable,
                        format!("the input cannot be read: {error}"),
                    );
                    return self.give_up(id, stream, why).await;
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
            pipe.moved(moved);
            self.state().found_more(moved);
            self.report_found(false);
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
        self.report_found(true);
        self.sent(id);
        let delivered = stream.delivered();
        stream.finish();
        self.receipt(&mut receipt, size, delivered).await
    }

    /// The receiver has ended the transfer before the input did, and says why.
    async fn ended_early(&self, receipt: &mut Receipt) -> Result<(), Why> {
        match self.read_receipt(receipt).await? {
            Err(why) => Err(why),
            Ok(_) => Err(Why::new(Code::Protocol, "it was committed before its end")),
        }
    }
}
