//! Messages over quinn's streams.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::{
    ConnectionError, ReadError, RecvStream, SendStream, TransportErrorCode, VarInt, WriteError,
};

use crate::error::text::PeerText;
use crate::error::{Code, Error, Reason};
use crate::net::endpoint;
use crate::protocol::{Frame, Malformed, Message, Verdict, Want, peek_varint};

/// Most bytes that one read takes off a stream: what stands in the buffer beyond a message is not counted as held, and a
/// connection may have a thousand streams.
const READ_SIZE: usize = 4 << 10;

/// The priority of streams that go first; that of all others is quinn's default, 0.
const URGENT: i32 = 1;

/// What can end the reading or writing of a stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer reset the stream it was writing.
    #[error("the peer gave up the stream: {}", Reason::from(*.0))]
    Reset(Code),
    /// The peer stopped the stream it was reading.
    #[error("the peer stopped the stream: {}", Reason::from(*.0))]
    Stopped(Code),
    /// The stream ended in the middle of a message, or where one was due.
    #[error("the stream ended too early")]
    Ended,
    /// The peer sent what no honest peer sends.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The connection is gone.
    #[error("the connection was lost: {}", PeerText::from(.0.to_string()))]
    Lost(#[from] ConnectionError),
    /// The peer was silent past the deadline.
    #[error("nothing moved until the deadline")]
    TimedOut,
}

impl From<ReadError> for StreamError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => Self::Reset(code_of(code)),
            ReadError::ConnectionLost(lost) => Self::Lost(lost),
            ReadError::ClosedStream
            | ReadError::IllegalOrderedRead
            | ReadError::ZeroRttRejected => Self::Ended,
        }
    }
}

impl From<WriteError> for StreamError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => Self::Stopped(code_of(code)),
            WriteError::ConnectionLost(lost) => Self::Lost(lost),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => Self::Ended,
        }
    }
}

impl From<StreamError> for Error {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Lost(lost) => lost_connection(&lost),
            StreamError::Reset(Code::Stopping) | StreamError::Stopped(Code::Stopping) => {
                Self::Stopping
            }
            // Whoever gives up is no liar: the peer's side of the session has ended, most often with its connection.
            StreamError::Reset(Code::Cancelled | Code::TimedOut)
            | StreamError::Stopped(Code::Cancelled | Code::TimedOut) => {
                Self::Lost(error.to_string().into())
            }
            StreamError::TimedOut => Self::Lost("the peer was silent for too long".into()),
            other => Self::Protocol(other.to_string().into()),
        }
    }
}

impl From<StreamError> for Reason {
    fn from(error: StreamError) -> Self {
        let code = match &error {
            StreamError::Reset(code) | StreamError::Stopped(code) => *code,
            StreamError::Ended | StreamError::Malformed(_) => Code::Protocol,
            StreamError::Lost(_) | StreamError::TimedOut => Code::TimedOut,
        };
        Reason::new(code, error.to_string())
    }
}

/// What the end of a connection means to its user.
pub fn lost_connection(lost: &ConnectionError) -> Error {
    match lost {
        ConnectionError::ApplicationClosed(close) => endpoint::closed(close),
        // Closing with a code of ours before the handshake is over hides the code (RFC 9000, section 10.2.3), and who closes
        // so early is stopping.
        ConnectionError::ConnectionClosed(close)
            if close.error_code == TransportErrorCode::APPLICATION_ERROR =>
        {
            Error::Stopping
        }
        ConnectionError::TimedOut => Error::Lost("nothing came from the peer for too long".into()),
        ConnectionError::Reset => Error::Lost("the peer has restarted".into()),
        ConnectionError::LocallyClosed => Error::Lost("it was closed on this side".into()),
        // Its reason is the peer's text.
        other => Error::Lost(other.to_string().into()),
    }
}

/// A QUIC application error code as haul's.
pub fn code_of(code: VarInt) -> Code {
    Code::from_number(u32::try_from(code.into_inner()).unwrap_or(u32::MAX))
}

/// haul's code as QUIC's.
pub fn varint_of(code: Code) -> VarInt {
    VarInt::from_u32(code.number())
}

/// Whose silence ends a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// No stream data comes from the peer.
    Receiving,
    /// No stream data goes out to the peer, so it grants no credit or nothing reaches it.
    Sending,
}

/// Waits until no stream data has moved on the whole connection for `time`, and up to as long again.
///
/// One stream may be quiet for long without anybody being at fault: on a slow link a thousand others come first. Only a
/// connection on which nothing moves has a peer that is silent.
pub async fn silence(connection: &quinn::Connection, direction: Direction, time: Duration) {
    let moved = || {
        let stats = connection.stats();
        match direction {
            Direction::Receiving => stats.frame_rx.stream,
            Direction::Sending => stats.frame_tx.stream,
        }
    };
    let mut before = moved();
    loop {
        tokio::time::sleep(time).await;
        match moved() {
            now if now == before => return,
            now => before = now,
        }
    }
}

/// The receiving half of a stream, read message by message.
pub struct MessageReader {
    stream: RecvStream,
    buffer: BytesMut,
    /// Bytes taken off the stream so far, those in the buffer included.
    taken: u64,
}

impl MessageReader {
    /// The stream's id.
    pub fn id(&self) -> u64 {
        quinn::VarInt::from(self.stream.id()).into_inner()
    }

    /// Ends when the peer has reset the stream, or the connection is lost; a little is read ahead meanwhile. (quinn's
    /// `received_reset` leaves a waker behind when it is cancelled, against which quinn's own drop asserts.)
    pub async fn reset_by_peer(&mut self) {
        while self.buffer.len() < READ_SIZE {
            match self.fill().await {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => return,
            }
        }
        std::future::pending().await
    }

    /// Reads messages from a stream of which nothing has been read yet.
    pub fn new(stream: RecvStream) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
            taken: 0,
        }
    }

    /// The next frame, or `None` at a clean end. Cancelling loses nothing.
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

    /// The next frame if all of it is here already.
    pub fn buffered(&mut self, limit: usize) -> Result<Option<Frame>, StreamError> {
        Ok(Frame::take(&mut self.buffer, limit)?)
    }

    /// The next message, which must be an `M`.
    pub async fn read<M: Message>(&mut self) -> Result<M, StreamError> {
        let frame = self.frame(M::LIMIT).await?.ok_or(StreamError::Ended)?;
        Ok(frame.decode()?)
    }

    /// The next verdict, or `None` at a clean end.
    pub async fn verdict(&mut self) -> Result<Option<Verdict>, StreamError> {
        let Some(frame) = self.frame(Want::LIMIT).await? else {
            return Ok(None);
        };
        Ok(Some(Verdict::decode(&frame)?))
    }

    /// The next byte, such as the stream's type.
    pub async fn byte(&mut self) -> Result<u8, StreamError> {
        while self.buffer.is_empty() {
            if !self.fill().await? {
                return Err(StreamError::Ended);
            }
        }
        Ok(self.buffer.split_to(1)[0])
    }

    /// The next QUIC variable-length integer.
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

    /// Ends the reading of messages: the stream, what was read of it beyond the last message, and the offset in the
    /// stream at which that begins.
    pub fn into_parts(self) -> (RecvStream, Bytes, u64) {
        let start = self.taken - self.buffer.len() as u64;
        (self.stream, self.buffer.freeze(), start)
    }

    /// Tells the peer that nothing more will be read.
    pub fn stop(&mut self, code: Code) {
        // Fails only when the stream is over already.
        let _ = self.stream.stop(varint_of(code));
    }

    async fn fill(&mut self) -> Result<bool, StreamError> {
        match self.stream.read_chunk(READ_SIZE, true).await? {
            Some(chunk) => {
                self.taken += chunk.bytes.len() as u64;
                self.buffer.extend_from_slice(&chunk.bytes);
                Ok(true)
            }
            None => Ok(false),
        }
    }
}

/// The sending half of a stream. Unless [`finish`](Self::finish)ed it is reset when dropped: quinn alone would finish it,
/// and the receiver of half a message would see a clean end.
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

    /// Lets its messages go out before what other streams send.
    pub fn hurry(&self) {
        // Fails only when the stream is over.
        let _ = self.stream.set_priority(URGENT);
    }

    /// Writes one message.
    pub async fn write<M: Message>(&mut self, message: &M) -> Result<(), StreamError> {
        self.write_bytes(message.to_bytes()).await
    }

    /// Writes one message to a peer that may grant no credit for it; not beyond a deadline.
    pub async fn write_within<M: Message>(
        &mut self,
        message: &M,
        deadline: Duration,
    ) -> Result<(), StreamError> {
        self.write_chunks(&mut [message.to_bytes()], deadline).await
    }

    /// Writes bytes that are encoded already, without copying them; none at all are no write.
    pub async fn write_bytes(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        if bytes.is_empty() {
            return Ok(());
        }
        Ok(self.stream.write_chunk(bytes).await?)
    }

    /// Writes chunks without copying them; the deadline runs anew with each part that the connection takes.
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

    /// Done once the peer's QUIC has all of a [`finish`](Self::finish)ed stream, whether or not its application has; or
    /// once nothing more is to be known of it.
    pub fn delivered(&self) -> impl Future<Output = ()> + Send + use<> {
        let stopped = self.stream.stopped();
        async { drop(stopped.await) }
    }

    /// Ends the stream cleanly.
    pub fn finish(mut self) {
        self.finished = true;
        // Fails only when the peer has stopped the stream, and then nobody waits for its end.
        let _ = self.stream.finish();
    }

    /// Ends the stream cleanly, and waits until the peer's QUIC has all of it, for so long at most. Closing the connection
    /// discards what is not delivered, so this goes before every close that may follow a last message.
    pub async fn deliver(self, within: Duration) {
        let delivered = self.delivered();
        self.finish();
        let _ = tokio::time::timeout(within, delivered).await;
    }

    /// Gives the stream up: the peer sees the code, and no clean end.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_stops_before_the_handshake_is_over_is_stopping() {
        let error_code = TransportErrorCode::APPLICATION_ERROR;
        let close = quinn::ConnectionClose {
            error_code,
            frame_type: None,
            reason: Bytes::new(),
        };
        assert!(matches!(
            lost_connection(&ConnectionError::ConnectionClosed(close)),
            Error::Stopping
        ));
    }

    #[test]
    fn a_peers_reason_for_closing_is_escaped_whichever_layer_it_comes_by() {
        let reason = Bytes::from_static(b"\x1b[2J");
        let error_code = TransportErrorCode::NO_ERROR;
        let transport = quinn::ConnectionClose {
            error_code,
            frame_type: None,
            reason: reason.clone(),
        };
        let application = quinn::ApplicationClose {
            error_code: 1_u8.into(),
            reason,
        };
        for lost in [
            ConnectionError::ConnectionClosed(transport),
            ConnectionError::ApplicationClosed(application),
        ] {
            let text = lost_connection(&lost).to_string();
            assert!(!text.contains('\x1b') && text.contains("[2J"), "{text}");
        }
    }
}
