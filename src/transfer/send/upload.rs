//! Sends one transfer: plan, body and trailer, and reads the receipt.

use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::sync::OwnedSemaphorePermit;

use super::file_reader::{BLOCK, FileReader};
use super::{Run, blocking};
use crate::error::{Code, Reason, Result};
use crate::net::stream::{Direction, MessageReader, MessageWriter, StreamError, silence};
use crate::protocol::{
    Committed, Failed, Frame, Held, Message, StreamType, Trailer, Withdraw, Working, put_varint,
};
use crate::storage::digest_index::LARGE_FILE;
use crate::storage::walk::Announce;
use crate::transfer::events::Event;
use crate::transfer::sampler::Stage;

/// Largest file that is read whole before its stream is opened, in bytes.
const SMALL_BODY: u64 = BLOCK as u64;

/// The receiver's half of a transfer stream: `Working` messages, then the receipt.
pub(super) struct Receipt {
    stream: MessageReader,
    /// The last message that arrived while listening.
    last: Option<Result<Option<Frame>, StreamError>>,
}

impl Receipt {
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

impl Run {
    /// Sends one wanted file, reads the receipt and settles the entry. Holds the `parallel` permit until then.
    pub(super) async fn transfer(
        self: Arc<Self>,
        id: u64,
        announce: Arc<Announce>,
        held: Vec<Held>,
        _open: OwnedSemaphorePermit,
    ) {
        let result = if let Some(pipe) = &announce.pipe {
            self.transfer_pipe(id, &announce, pipe).await
        } else if announce.metadata.size <= SMALL_BODY {
            self.started(id, &announce, 0);
            self.transfer_small(id, &announce).await
        } else {
            let _writer = self.shared.large.acquire().await;
            self.transfer_large(id, &announce, held).await
        };
        self.settle_transfer(id, result);
    }

    /// If reading failed, tells the receiver that the wanted file cannot be sent, so that it does not wait.
    pub(super) async fn withdraw<T>(&self, id: u64, read: Result<T, Reason>) -> Result<T, Reason> {
        if let Err(why) = &read {
            let (mut stream, mut receipt) = self.open_transfer().await?;
            let mut head = self.header();
            Withdraw {
                id,
                why: why.clone().into(),
            }
            .put(&mut head);
            self.write((&mut stream, &mut receipt), &mut [head.freeze()])
                .await?;
            stream.finish();
        }
        read
    }

    pub(super) fn started(&self, id: u64, announce: &Announce, held: u64) {
        let path = announce.path.clone();
        let size = announce.metadata.size;
        (self.shared.observer)(Event::Started {
            id,
            path,
            size,
            held,
        });
    }

    async fn transfer_small(&self, id: u64, announce: &Announce) -> Result<(), Reason> {
        let size = announce.metadata.size;
        let kib = size.div_ceil(1024) as u32;
        let _memory = self.shared.memory.acquire_many(kib.max(1)).await;
        let reading = self.sending.meter.at(Stage::Reading);
        let open = self.shared.files.clone().acquire_owned().await;
        let mut reader = FileReader::open(announce, Vec::new(), self.shared.may_grow);
        let plan = reader.plan(id);
        let read = blocking(move || {
            let _open = open;
            let mut content = BytesMut::with_capacity(size as usize);
            while let Some(block) = reader.next()? {
                content.extend_from_slice(&block);
            }
            Ok((content.freeze(), reader.finish()?))
        })
        .await;
        drop(reading);
        let (content, digest) = self.withdraw(id, read).await?;
        let (mut stream, mut receipt) = self.open_transfer().await?;
        let mut head = self.header();
        plan.put(&mut head);
        let mut chunks = [
            head.freeze(),
            content,
            Trailer { digest, size: None }.to_bytes(),
        ];
        if let Err(error) = self.write((&mut stream, &mut receipt), &mut chunks).await {
            return self.stopped(error, &mut receipt).await;
        }
        (self.shared.observer)(Event::Moved { id, bytes: size });
        self.sent(id);
        let delivered = stream.delivered();
        stream.finish();
        self.receipt(&mut receipt, size, delivered).await
    }

    async fn transfer_large(
        &self,
        id: u64,
        announce: &Announce,
        held: Vec<Held>,
    ) -> Result<(), Reason> {
        let size = announce.metadata.size;
        let _open = self.shared.files.acquire().await;
        let reading = self.sending.meter.at(Stage::Reading);
        let reader = FileReader::open(announce, held, self.shared.may_grow);
        let mut reader = self
            .withdraw(id, blocking(move || reader.compare()).await)
            .await?;
        drop(reading);
        let plan = reader.plan(id);
        let key = announce.metadata.version.key();
        let changed = announce.metadata.version.changed;
        // A digest that covers holes is not the digest of the content alone.
        let lasts = size >= LARGE_FILE && plan.holes().is_empty() && key.is_settled(changed);
        // Held ranges and holes are not sent.
        self.started(
            id,
            announce,
            size - plan.ranges.iter().map(|r| r.length).sum::<u64>(),
        );
        let (mut stream, mut receipt) = self.open_transfer().await?;
        let mut head = self.header();
        plan.put(&mut head);
        if let Err(error) = self
            .write((&mut stream, &mut receipt), &mut [head.freeze()])
            .await
        {
            return self.stopped(error, &mut receipt).await;
        }
        let digest = loop {
            // Read the next block while this one is written.
            let reading = self.sending.meter.at(Stage::Reading);
            let (block, next) = match read_block(reader).await {
                Ok(read) => read,
                Err(why) => return self.give_up(id, stream, why).await,
            };
            drop(reading);
            reader = next;
            let Some(block) = block else {
                match blocking(move || reader.finish()).await {
                    Ok(digest) => break digest,
                    Err(why) => return self.give_up(id, stream, why).await,
                }
            };
            // Write in parts, so that progress shows even under a low limit.
            for part in parts(block, self.sending.limits.block()) {
                let bytes = part.len() as u64;
                if let Err(error) = self.write((&mut stream, &mut receipt), &mut [part]).await {
                    return self.stopped(error, &mut receipt).await;
                }
                (self.shared.observer)(Event::Moved { id, bytes });
            }
        };
        if let Err(error) = self
            .write(
                (&mut stream, &mut receipt),
                &mut [Trailer { digest, size: None }.to_bytes()],
            )
            .await
        {
            return self.stopped(error, &mut receipt).await;
        }
        self.sent(id);
        let delivered = stream.delivered();
        stream.finish();
        self.receipt(&mut receipt, size, delivered).await?;
        if let Some(index) = self.shared.index.clone().filter(|_| lasts) {
            let remembered = blocking(move || {
                index.remember(&key, changed, &digest);
                Ok(())
            });
            remembered.await?;
        }
        Ok(())
    }

    /// Ends a started transfer. A reset may overtake the plan, so that the receiver knows no transfer to fail. The
    /// file is therefore withdrawn too.
    pub(super) async fn give_up(
        &self,
        id: u64,
        stream: MessageWriter,
        why: Reason,
    ) -> Result<(), Reason> {
        stream.reset(why.code);
        self.withdraw(id, Err(why)).await
    }

    pub(super) async fn open_transfer(&self) -> Result<(MessageWriter, Receipt), Reason> {
        let (send, receive) = self
            .sending
            .connection
            .open_bi()
            .await
            .map_err(StreamError::from)?;
        Ok((
            MessageWriter::new(send),
            Receipt {
                stream: MessageReader::new(receive),
                last: None,
            },
        ))
    }

    pub(super) fn header(&self) -> BytesMut {
        let mut head = BytesMut::new();
        head.put_u8(StreamType::Transfer as u8);
        put_varint(&mut head, self.sending.handle);
        head
    }

    /// Writes chunks within the rate limits. Fails if the whole connection sends nothing until the deadline. Waiting
    /// for a rate limit is not held against the peer.
    pub(super) async fn write(
        &self,
        (stream, receipt): (&mut MessageWriter, &mut Receipt),
        chunks: &mut [Bytes],
    ) -> Result<(), StreamError> {
        tokio::select! {
            biased;
            written = self.write_limited(stream, chunks) => written,
            never = receipt.listen(&self.working) => match never {},
        }
    }

    async fn write_limited(
        &self,
        stream: &mut MessageWriter,
        chunks: &mut [Bytes],
    ) -> Result<(), StreamError> {
        let limits = &self.sending.limits;
        let meter = &self.sending.meter;
        if limits.rate().is_none() {
            let _writing = meter.at(Stage::Writing);
            return self
                .or_timeout_on_silence(stream.write_all_chunks(chunks))
                .await?;
        }
        for chunk in chunks {
            for part in parts(std::mem::take(chunk), limits.block()) {
                let limited = meter.at(Stage::Limited);
                limits.take(part.len()).await;
                drop(limited);
                let _writing = meter.at(Stage::Writing);
                self.or_timeout_on_silence(stream.write_bytes(part))
                    .await??;
            }
        }
        Ok(())
    }

    /// Waits for the receiver. Fails if nothing is sent until the deadline and the receiver sends no `Working` message
    /// for any file. A stalled disk consumes the credit of all files, even those that it has not seen yet.
    async fn or_timeout_on_silence<T>(
        &self,
        wait: impl Future<Output = T>,
    ) -> Result<T, StreamError> {
        let silence = async {
            loop {
                let before = self.working.load(Relaxed);
                silence(
                    &self.sending.connection,
                    Direction::Sending,
                    self.sending.deadline,
                )
                .await;
                if self.working.load(Relaxed) == before {
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

    /// Handles a write error. If the receiver stopped the stream, the receipt gives the reason.
    pub(super) async fn stopped(
        &self,
        error: StreamError,
        receipt: &mut Receipt,
    ) -> Result<(), Reason> {
        match error {
            StreamError::Stopped(code) => match self.read_receipt(receipt).await {
                Ok(Err(why)) => Err(why),
                Ok(Ok(_)) | Err(_) => Err(Reason::from(code)),
            },
            other => Err(other.into()),
        }
    }

    pub(super) async fn receipt(
        &self,
        receipt: &mut Receipt,
        size: u64,
        delivered: impl Future<Output = ()>,
    ) -> Result<(), Reason> {
        let meter = &self.sending.meter;
        let under_way = meter.at(Stage::UnderWay);
        let receipt = self.read_receipt(receipt);
        tokio::pin!(receipt);
        let receipt = tokio::select! {
            biased;
            receipt = &mut receipt => receipt,
            () = delivered => {
                drop(under_way);
                let _committing = meter.at(Stage::Committing);
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

    pub(super) async fn read_receipt(
        &self,
        receipt: &mut Receipt,
    ) -> Result<Result<Committed, Reason>, StreamError> {
        loop {
            // Written data may still be in flight. The receiver sends `Working` while it causes the wait.
            let frame = self
                .or_timeout_on_silence(receipt.frame())
                .await??
                .ok_or(StreamError::Ended)?;
            match frame.kind {
                Working::TYPE => {
                    frame.decode::<Working>()?;
                    self.working.fetch_add(1, Relaxed);
                }
                Failed::TYPE => return Ok(Err(frame.decode::<Failed>()?.why.into())),
                _ => return Ok(Ok(frame.decode::<Committed>()?)),
            }
        }
    }
}

/// Splits bytes into parts of at most `most` bytes, without copying.
fn parts(mut bytes: Bytes, most: usize) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || (!bytes.is_empty()).then(|| bytes.split_to(bytes.len().min(most))))
}

async fn read_block(mut reader: FileReader) -> Result<(Option<Bytes>, FileReader), Reason> {
    blocking(move || Ok((reader.next()?, reader))).await
}
