//! The stream of one transfer: plan, body and trailer go out, and the receipt comes back.

use std::convert::Infallible;
use std::future::pending;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::{BufMut, Bytes, BytesMut};

use super::run::Run;
use crate::error::{Code, Reason, Result};
use crate::net::stream::{Direction, MessageReader, MessageWriter, StreamError, silence};
use crate::protocol::{
    Committed, Failed, Frame, Message, StreamType, Withdraw, Working, put_varint,
};
use crate::transfer::sampler::Stage;

/// The stream of one transfer.
pub(super) struct TransferStream<'a> {
    run: &'a Run,
    writer: MessageWriter,
    receipt: ReceiptReader,
}

/// The receiver's half of a transfer stream: `Working` messages, then the receipt.
struct ReceiptReader {
    stream: MessageReader,
    /// The last message that arrived while listening.
    last: Option<Result<Option<Frame>, StreamError>>,
}

impl ReceiptReader {
    /// Counts `Working` messages as long as it is polled. Keeps any other message.
    async fn listen(&mut self, working: &AtomicU64) -> Infallible {
        while self.last.is_none() {
            match self.stream.frame(Failed::LIMIT).await {
                Ok(Some(frame))
                    if frame.kind == Working::TYPE && frame.decode::<Working>().is_ok() =>
                {
                    working.fetch_add(1, Relaxed);
                }
                other => self.last = Some(other),
            }
        }
        pending().await
    }

    async fn frame(&mut self) -> Result<Option<Frame>, StreamError> {
        match self.last.take() {
            Some(last) => last,
            None => self.stream.frame(Failed::LIMIT).await,
        }
    }
}

impl<'a> TransferStream<'a> {
    pub(super) async fn open(run: &'a Run) -> Result<Self, Reason> {
        let opened = run.sending.connection.open_bi().await;
        let (send, receive) = opened.map_err(StreamError::from)?;
        Ok(Self {
            run,
            writer: MessageWriter::new(send),
            receipt: ReceiptReader {
                stream: MessageReader::new(receive),
                last: None,
            },
        })
    }

    /// Returns the head of a stream that begins with this message.
    pub(super) fn head<M: Message>(&self, first: &M) -> Bytes {
        let mut head = BytesMut::new();
        head.put_u8(StreamType::Transfer as u8);
        put_varint(&mut head, self.run.sending.handle);
        first.put(&mut head);
        head.freeze()
    }

    /// Writes chunks within the rate limits. If the receiver has stopped the stream, its receipt gives the reason.
    pub(super) async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), Reason> {
        match self.write_chunks(chunks).await {
            Ok(()) => Ok(()),
            Err(StreamError::Stopped(code)) => match self.read_receipt().await {
                Ok(Err(reason)) => Err(reason),
                Ok(Ok(_)) | Err(_) => Err(Reason::from(code)),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// Writes chunks within the rate limits. Fails if the whole connection sends nothing until the deadline. Waiting
    /// for a rate limit is not held against the peer.
    async fn write_chunks(&mut self, chunks: &mut [Bytes]) -> Result<(), StreamError> {
        let run = self.run;
        tokio::select! {
            biased;
            written = write_limited(run, &mut self.writer, chunks) => written,
            never = self.receipt.listen(&run.working) => match never {},
        }
    }

    /// Resolves when the receiver ends the stream before it has everything.
    pub(super) fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        self.writer.delivered()
    }

    /// Returns the reason of a receiver that ended the transfer before the input did.
    pub(super) async fn reason_of_early_end(&mut self) -> Reason {
        match self.read_receipt().await {
            Ok(Err(reason)) => reason,
            Ok(Ok(_)) => Reason::new(
                Code::Protocol,
                "the receiver committed the file before its end",
            ),
            Err(error) => error.into(),
        }
    }

    /// Ends a started transfer. A reset may overtake the plan, so that the receiver knows no transfer to fail. The
    /// file is therefore withdrawn too.
    pub(super) async fn give_up(self, id: u64, reason: Reason) -> Result<(), Reason> {
        let Self {
            run,
            writer,
            receipt: _receipt,
        } = self;
        writer.reset(reason.code);
        or_withdraw(run, id, Err(reason)).await
    }

    /// Ends the stream, and waits for the receipt of a file of `size` bytes.
    pub(super) async fn finish(self, size: u64) -> Result<(), Reason> {
        let Self {
            run,
            writer,
            mut receipt,
        } = self;
        let delivered = writer.delivered();
        writer.finish();
        let stage_counters = &run.sending.stage_counters;
        let under_way = stage_counters.at(Stage::UnderWay);
        let receipt = read_receipt(run, &mut receipt);
        tokio::pin!(receipt);
        let receipt = tokio::select! {
            biased;
            receipt = &mut receipt => receipt,
            () = delivered => {
                drop(under_way);
                let _committing = stage_counters.at(Stage::Committing);
                receipt.await
            }
        };
        match receipt?? {
            committed if committed.bytes == size => Ok(()),
            committed => Err(Reason::new(
                Code::Corrupt,
                format!(
                    "the receiver committed {} of {size} bytes; send it again",
                    committed.bytes
                ),
            )),
        }
    }

    async fn read_receipt(&mut self) -> Result<Result<Committed, Reason>, StreamError> {
        read_receipt(self.run, &mut self.receipt).await
    }
}

/// Passes on what was read. If reading failed, tells the receiver that the wanted file cannot be sent, so that it
/// does not wait.
pub(super) async fn or_withdraw<T>(
    run: &Run,
    id: u64,
    read: Result<T, Reason>,
) -> Result<T, Reason> {
    if let Err(reason) = &read {
        let mut stream = TransferStream::open(run).await?;
        let withdraw = Withdraw {
            id,
            why: reason.clone().into(),
        };
        let head = stream.head(&withdraw);
        stream.write_chunks(&mut [head]).await?;
        stream.writer.finish();
    }
    read
}

async fn write_limited(
    run: &Run,
    writer: &mut MessageWriter,
    chunks: &mut [Bytes],
) -> Result<(), StreamError> {
    let limits = &run.sending.limits;
    let stage_counters = &run.sending.stage_counters;
    if limits.rate().is_none() {
        let _writing = stage_counters.at(Stage::Writing);
        return or_timeout_on_silence(run, writer.write_all_chunks(chunks)).await?;
    }
    for chunk in chunks {
        for part in parts(std::mem::take(chunk), limits.block()) {
            let limited = stage_counters.at(Stage::Limited);
            limits.take(part.len()).await;
            drop(limited);
            let _writing = stage_counters.at(Stage::Writing);
            or_timeout_on_silence(run, writer.write_bytes(part)).await??;
        }
    }
    Ok(())
}

async fn read_receipt(
    run: &Run,
    receipt: &mut ReceiptReader,
) -> Result<Result<Committed, Reason>, StreamError> {
    loop {
        // Written data may still be in flight. The receiver sends `Working` while it causes the wait.
        let frame = or_timeout_on_silence(run, receipt.frame())
            .await??
            .ok_or(StreamError::Ended)?;
        match frame.kind {
            Working::TYPE => {
                frame.decode::<Working>()?;
                run.working.fetch_add(1, Relaxed);
            }
            Failed::TYPE => return Ok(Err(frame.decode::<Failed>()?.why.into())),
            _ => return Ok(Ok(frame.decode::<Committed>()?)),
        }
    }
}

/// Waits for the receiver. Fails if nothing is sent until the deadline and the receiver sends no `Working` message for
/// any file. A stalled disk consumes the credit of all files, even those that it has not seen yet.
async fn or_timeout_on_silence<T>(
    run: &Run,
    wait: impl Future<Output = T>,
) -> Result<T, StreamError> {
    let silence = async {
        loop {
            let before = run.working.load(Relaxed);
            silence(
                &run.sending.connection,
                Direction::Sending,
                run.sending.deadline,
            )
            .await;
            if run.working.load(Relaxed) == before {
                return;
            }
        }
    };
    tokio::select! {
        biased;
        done = wait => Ok(done),
        () = silence => Err(StreamError::TimedOut),
    }
}

/// Splits bytes into parts of at most `most` bytes, without copying.
pub(super) fn parts(mut bytes: Bytes, most: usize) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || (!bytes.is_empty()).then(|| bytes.split_to(bytes.len().min(most))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_split_into_parts_of_the_limit() {
        let split = |bytes: &'static [u8], most| -> Vec<Bytes> {
            parts(Bytes::from_static(bytes), most).collect()
        };
        assert_eq!(split(b"abcde", 2), [&b"ab"[..], b"cd", b"e"]);
        assert_eq!(split(b"ab", 2), [&b"ab"[..]]);
        assert!(split(b"", 2).is_empty());
    }
}
