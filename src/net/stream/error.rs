//! Errors of streams and connections, and what they mean to a user or a peer.

use quinn::{ConnectionError, ReadError, TransportErrorCode, VarInt, WriteError};

use crate::error::text::PeerText;
use crate::error::{Code, Error, Reason};
use crate::protocol::Malformed;

/// Why reading from or writing to a stream has failed.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer reset the stream that it was writing.
    #[error("the peer reset the stream: {}", Reason::from(*.0))]
    Reset(Code),
    /// The peer stopped the stream that it was reading.
    #[error("the peer stopped the stream: {}", Reason::from(*.0))]
    Stopped(Code),
    /// The stream ended within a message, or where one was expected.
    #[error("the stream ended too early")]
    Ended,
    /// The peer violated the protocol.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The connection was lost.
    #[error("the connection was lost: {}", PeerText::from(.0.to_string()))]
    Lost(#[from] ConnectionError),
    /// The peer was silent until the deadline.
    #[error("no data moved until the deadline")]
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
            // The peer's session has ended, most often with its connection: not a protocol error.
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

/// Translates the end of a connection for its user.
pub fn lost_connection(lost: &ConnectionError) -> Error {
    match lost {
        ConnectionError::ApplicationClosed(close) => close_error(close),
        // QUIC hides an application code before the handshake has ended (RFC 9000, section 10.2.3), and a peer that
        // closes so early is stopping.
        ConnectionError::ConnectionClosed(close)
            if close.error_code == TransportErrorCode::APPLICATION_ERROR =>
        {
            Error::Stopping
        }
        ConnectionError::TimedOut => Error::Lost("the peer was silent for too long".into()),
        ConnectionError::Reset => Error::Lost("the peer has restarted".into()),
        ConnectionError::LocallyClosed => Error::Lost("this end closed it".into()),
        // The reason is the peer's text.
        other => Error::Lost(other.to_string().into()),
    }
}

/// Translates an application close with one of our [`Code`]s.
pub fn close_error(close: &quinn::ApplicationClose) -> Error {
    Reason::new(
        code_of(close.error_code),
        String::from_utf8_lossy(&close.reason),
    )
    .into()
}

/// Converts a QUIC application error code to haul's.
pub fn code_of(code: VarInt) -> Code {
    Code::from_number(u32::try_from(code.into_inner()).unwrap_or(u32::MAX))
}

/// Converts haul's code to QUIC's.
pub fn varint_of(code: Code) -> VarInt {
    VarInt::from_u32(code.number())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn an_early_close_without_a_code_means_stopping() {
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
    fn a_peers_close_reason_is_escaped() {
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
