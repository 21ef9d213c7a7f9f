//! Reads and writes messages on quinn's streams.

mod error;

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::{RecvStream, SendStream};
use tokio::sync::Semaphore;

pub use error::{StreamError, close_error, code_of, lost_connection, varint_of};

use crate::error::Code;
use crate::protocol::{Frame, Malformed, Message, Verdict, Want, peek_varint};

/// Bytes of one read. Bytes buffered beyond a message do not count as unflushed, and a connection may have a thousand
/// streams.
const READ_SIZE: usize = 4 << 10;

/// Bytes that are read of a stream before its purpose is known, and longest frame that needs no room. Reading returns
/// credit, so 1,100 streams of a connection that never end such a frame keep 275 KiB. Most requests and plans are
/// shorter.
const HEAD_SIZE: usize = 256;

/// Room in bytes for the longer frames of a connection that are read at the same time: four of the longest. A thousand
/// connections keep 256 MiB.
const FRAME_ROOM: usize = 256 << 10;

/// Priority of streams that go first; all others have quinn's default, 0.
const HIGH_PRIORITY: i32 = 1;

/// The direction whose silence ends a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// No stream data comes from the peer.
    Receiving,
    /// No stream data goes to the peer: it grants no credit, or nothing reaches it.
    Sending,
}

/// Waits until no stream data has moved on the whole connection for `time`, and up to twice as long.
///
/// A quiet stream alone is no fault: on a slow link a thousand others come first. The peer is silent only when
/// nothing moves on the connection.
pub async fn silence(connection: &quinn::Connection, direction: Direction, time: Duration) {
    let stream_frames = || {
        let stats = connection.stats();
        match direction {
            Direction::Receiving => stats.frame_rx.stream,
            Direction::Sending => stats.frame_tx.stream,
        }
    };
    let mut before = stream_frames();
    loop {
        tokio::time::sleep(time).await;
        match stream_frames() {
            now if now == before => return,
            now => before = now,
        }
    }
}

/// Room for the frames that a connection's streams have begun and not yet ended, before anything else counts them. A
/// stream that finds none waits, and is not read meanwhile: its bytes stay within the receive window.
pub(crate) struct FrameRoom(Semaphore);

impl Default for FrameRoom {
    fn default() -> Self {
        Self(Semaphore::new(FRAME_ROOM))
    }
}

/// Both halves of a bidirectional stream, for messages.
pub struct MessageStream {
    /// The receiving half.
    pub reader: MessageReader,
    /// The sending half.
    pub writer: MessageWriter,
}

impl MessageStream {
    /// Joins the halves of a stream that was not read from yet.
    pub fn new(send: SendStream, receive: RecvStream) -> Self {
        Self {
            reader: MessageReader::new(receive),
            writer: MessageWriter::new(send),
        }
    }

    /// Joins the halves of a stream that the peer opened. Little of it is read before its purpose is known.
    pub(crate) fn opened_by_peer(send: SendStream, receive: RecvStream) -> Self {
        let mut stream = Self::new(send, receive);
        stream.reader.read_size = HEAD_SIZE;
        stream
    }

    /// Opens a stream. A peer that grants none before the deadline is as silent as one that does not answer.
    pub async fn open(
        connection: &quinn::Connection,
        deadline: Duration,
    ) -> Result<Self, StreamError> {
        let opened = tokio::time::timeout(deadline, connection.open_bi()).await;
        let (send, receive) = opened.map_err(|_| StreamError::TimedOut)??;
        Ok(Self::new(send, receive))
    }

    /// The stream's id.
    pub fn id(&self) -> u64 {
        self.reader.id()
    }

    /// Refuses the stream: the peer shall send no more, and gets no answer.
    pub fn reject(mut self, code: Code) {
        self.reader.stop(code);
        self.writer.reset(code);
    }
}

/// The receiving half of a stream, read message by message.
pub struct MessageReader {
    stream: RecvStream,
    buffer: BytesMut,
    /// Bytes read from the stream so far, including the buffer.
    bytes_read: u64,
    /// Most bytes of one read.
    read_size: usize,
}

impl MessageReader {
    /// The stream's id.
    pub fn id(&self) -> u64 {
        quinn::VarInt::from(self.stream.id()).into_inner()
    }

    /// Resolves when the peer has reset the stream or the connection is lost; reads a little ahead meanwhile. (A
    /// cancelled `received_reset` of quinn leaves a waker behind, against which quinn's own drop asserts.)
    pub(crate) async fn reset_by_peer(&mut self, room: &FrameRoom) {
        let room = room.0.try_acquire_many(READ_SIZE as u32);
        let ahead = if room.is_ok() { READ_SIZE } else { HEAD_SIZE };
        while self.buffer.len() < ahead {
            match self.fill().await {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => return,
            }
        }
        std::future::pending().await
    }

    /// Reads messages from a stream that was not read from yet.
    pub fn new(stream: RecvStream) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
            bytes_read: 0,
            read_size: READ_SIZE,
        }
    }

    /// Reads in large pieces from now on: the stream has a purpose, and what it brings is counted elsewhere.
    pub(crate) fn read_in_large_pieces(&mut self) {
        self.read_size = READ_SIZE;
    }

    /// Reads a frame of a stream that waits for its purpose. A frame over [`HEAD_SIZE`] waits for `room` before it is
    /// read. `None` at a clean end. Cancelling loses nothing.
    pub(crate) async fn head_frame(
        &mut self,
        limit: usize,
        room: &FrameRoom,
    ) -> Result<Option<Frame>, StreamError> {
        let length = match self.frame(limit.min(HEAD_SIZE)).await {
            Err(StreamError::Malformed(Malformed::TooLong { length, .. }))
                if length <= limit as u64 =>
            {
                length as u32
            }
            read => return read,
        };
        // The semaphore is never closed.
        let _room = room.0.acquire_many(length).await;
        self.frame(limit).await
    }

    /// Reads the next frame; `None` at a clean end. Cancelling loses nothing.
    pub async fn frame(&mut self, limit: usize) -> Result<Option<Frame>, StreamError> {
        loop {
            if let Some(frame) = Frame::take(&mut self.buffer, limit)? {
                return Ok(Some(frame));
            }
            if !self.fill().await? {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(StreamError::Ended)
                };
            }
        }
    }

    /// Returns the next frame if it is buffered completely.
    pub fn buffered(&mut self, limit: usize) -> Result<Option<Frame>, StreamError> {
        Ok(Frame::take(&mut self.buffer, limit)?)
    }

    /// Reads the next message, which must be an `M`.
    pub async fn read<M: Message>(&mut self) -> Result<M, StreamError> {
        let frame = self.frame(M::LIMIT).await?.ok_or(StreamError::Ended)?;
        Ok(frame.decode()?)
    }

    /// Reads the next verdict; `None` at a clean end.
    pub async fn verdict(&mut self) -> Result<Option<Verdict>, StreamError> {
        let Some(frame) = self.frame(Want::LIMIT).await? else {
            return Ok(None);
        };
        Ok(Some(Verdict::decode(&frame)?))
    }

    /// Reads the next byte, such as the stream's type.
    pub async fn byte(&mut self) -> Result<u8, StreamError> {
        while self.buffer.is_empty() {
            if !self.fill().await? {
                return Err(StreamError::Ended);
            }
        }
        Ok(self.buffer.split_to(1)[0])
    }

    /// Reads the next QUIC variable-length integer.
    pub async fn varint(&mut self) -> Result<u64, StreamError> {
        loop {
            if let Some((value, length)) = peek_varint(&self.buffer) {
                let _ = self.buffer.split_to(length);
                return Ok(value);
            }
            if !self.fill().await? {
                return Err(StreamError::Ended);
            }
        }
    }

    /// Returns the stream, the bytes read beyond the last message, and their offset in the stream.
    pub fn into_parts(self) -> (RecvStream, Bytes, u64) {
        let start = self.bytes_read - self.buffer.len() as u64;
        (self.stream, self.buffer.freeze(), start)
    }

    /// Tells the peer to send no more.
    pub fn stop(&mut self, code: Code) {
        // Fails only if the stream has ended.
        let _ = self.stream.stop(varint_of(code));
    }

    async fn fill(&mut self) -> Result<bool, StreamError> {
        match self.stream.read_chunk(self.read_size, true).await? {
            Some(chunk) => {
                self.bytes_read += chunk.bytes.len() as u64;
                self.buffer.extend_from_slice(&chunk.bytes);
                Ok(true)
            }
            None => Ok(false),
        }
    }
}

/// The sending half of a stream. Without [`finish`](Self::finish), dropping it resets the stream. quinn would finish
/// it, and the receiver of half a message would see a clean end.
pub struct MessageWriter {
    stream: SendStream,
    finished: bool,
}

impl MessageWriter {
    /// Writes messages to a stream.
    pub fn new(stream: SendStream) -> Self {
        Self {
            stream,
            finished: false,
        }
    }

    /// Sends its messages before those of other streams.
    pub fn prioritize(&self) {
        // Fails only if the stream has ended.
        let _ = self.stream.set_priority(HIGH_PRIORITY);
    }

    /// Writes one message.
    pub async fn write<M: Message>(&mut self, message: &M) -> Result<(), StreamError> {
        self.write_bytes(message.to_bytes()).await
    }

    /// Writes one message, and gives up at the deadline if the peer grants no credit for it.
    pub async fn write_within<M: Message>(
        &mut self,
        message: &M,
        deadline: Duration,
    ) -> Result<(), StreamError> {
        self.write_chunks(&mut [message.to_bytes()], deadline).await
    }

    /// Writes encoded bytes without copying them; an empty buffer is not written.
    pub async fn write_bytes(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        if bytes.is_empty() {
            return Ok(());
        }
        Ok(self.stream.write_chunk(bytes).await?)
    }

    /// Writes chunks without copying them. The deadline restarts with each part that the connection takes.
    pub async fn write_chunks(
        &mut self,
        mut chunks: &mut [Bytes],
        deadline: Duration,
    ) -> Result<(), StreamError> {
        while !chunks.is_empty() {
            let written = tokio::time::timeout(deadline, self.stream.write_chunks(chunks));
            let written = written.await.map_err(|_| StreamError::TimedOut)??;
            chunks = &mut chunks[written.chunks..];
        }
        Ok(())
    }

    /// Writes chunks without copying them.
    pub async fn write_all_chunks(&mut self, chunks: &mut [Bytes]) -> Result<(), StreamError> {
        Ok(self.stream.write_all_chunks(chunks).await?)
    }

    /// Resolves once the peer's QUIC has acknowledged all of a [`finish`](Self::finish)ed stream (its application may
    /// not have read it), or once the stream's fate cannot be known.
    pub fn delivered(&self) -> impl Future<Output = ()> + Send + use<> {
        let stopped = self.stream.stopped();
        async { drop(stopped.await) }
    }

    /// Ends the stream cleanly.
    pub fn finish(mut self) {
        self.finished = true;
        // Fails only if the peer has stopped the stream, and then it does not wait for the end.
        let _ = self.stream.finish();
    }

    /// Ends the stream cleanly, and waits until the peer's QUIC has acknowledged all of it, at most `limit`. Closing a
    /// connection discards undelivered data, so call this before every close that may follow a last message.
    pub async fn deliver(self, limit: Duration) {
        let delivered = self.delivered();
        self.finish();
        let _ = tokio::time::timeout(limit, delivered).await;
    }

    /// Resets the stream: the peer sees the code, and no clean end.
    pub fn reset(mut self, code: Code) {
        self.finished = true;
        let _ = self.stream.reset(varint_of(code));
    }
}

impl Drop for MessageWriter {
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.stream.reset(varint_of(Code::Cancelled));
        }
    }
}
