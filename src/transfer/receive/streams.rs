//! The streams of wanted files, which the peer opens.

use std::collections::HashMap;
use std::sync::Mutex;

use bytes::Bytes;
use quinn::RecvStream;
use tokio::sync::oneshot;

use crate::error::lock::lock;
use crate::error::{Code, Reason, Result};
use crate::net::stream::{MessageReader, MessageWriter};
use crate::protocol::Plan;

/// A transfer's stream, with its plan already read.
pub(super) struct IncomingTransfer {
    pub(super) plan: Plan,
    pub(super) stream: MessageReader,
    pub(super) receipt: MessageWriter,
}

/// A transfer's stream while its body is read.
pub(super) struct OpenTransfer {
    pub(super) plan: Plan,
    pub(super) stream: RecvStream,
    /// The first bytes of the body, read together with the plan.
    pub(super) begun: Bytes,
    /// The offset of the body in the stream.
    pub(super) start: u64,
    pub(super) receipt: MessageWriter,
}

impl IncomingTransfer {
    /// Gives up the framing: the body has none.
    pub(super) fn open(self) -> OpenTransfer {
        let (stream, begun, start) = self.stream.into_parts();
        OpenTransfer {
            plan: self.plan,
            stream,
            begun,
            start,
            receipt: self.receipt,
        }
    }
}

/// The stream of a wanted file when it arrives, or the sender's reason if it does not.
pub(super) type ExpectedStream = oneshot::Receiver<Result<IncomingTransfer, Reason>>;

/// Wanted transfers whose stream has not arrived, by entry id.
#[derive(Default)]
pub(super) struct ExpectedStreams(
    Mutex<HashMap<u64, oneshot::Sender<Result<IncomingTransfer, Reason>>>>,
);

impl ExpectedStreams {
    /// Expects the stream of a file. Call it before the file's `Want` is sent.
    pub(super) fn expect(&self, id: u64) -> ExpectedStream {
        let (arrived, stream) = oneshot::channel();
        lock(&self.0).insert(id, arrived);
        stream
    }

    /// Passes a stream to its transfer, or rejects it with [`Code::NotWanted`].
    pub(super) fn deliver(&self, mut incoming: IncomingTransfer) {
        let expected = lock(&self.0).remove(&incoming.plan.id);
        match expected {
            // Fails only if the transfer was abandoned; dropping the writer then resets the stream.
            Some(expected) => drop(expected.send(Ok(incoming))),
            None => {
                incoming.stream.stop(Code::NotWanted);
                incoming.receipt.reset(Code::NotWanted);
            }
        }
    }

    /// Ends the wait for a file that the sender cannot send.
    pub(super) fn withdraw(&self, id: u64, reason: Reason) {
        if let Some(expected) = lock(&self.0).remove(&id) {
            // Fails only if the transfer was abandoned.
            let _ = expected.send(Err(reason));
        }
    }

    /// Expects a stream no longer.
    pub(super) fn forget(&self, id: u64) {
        lock(&self.0).remove(&id);
    }
}
