//! Clients that introduce themselves: they want to prove that they know a code.

use quinn::Connection;
use tokio::sync::mpsc;

use crate::error::Code;
use crate::net::stream::{MessageReader, MessageStream, MessageWriter};

/// A client that wants to prove that it knows a code.
pub struct Introduction {
    /// The client's connection. It lasts as long as the streams.
    pub connection: Connection,
    /// The client's messages.
    pub reader: MessageReader,
    /// The answers to the client.
    pub writer: MessageWriter,
}

/// Passes a client to the task that checks codes, and waits until that task is done with it.
pub(super) async fn introduce(
    introductions: Option<&mpsc::Sender<Introduction>>,
    connection: Connection,
    stream: MessageStream,
) {
    let Some(introductions) = introductions else {
        return stream.reject(Code::Unsupported);
    };
    let MessageStream { reader, writer } = stream;
    let done = writer.delivered();
    match introductions.try_send(Introduction {
        connection,
        reader,
        writer,
    }) {
        Ok(()) => done.await,
        Err(full) => {
            let Introduction { reader, writer, .. } = full.into_inner();
            MessageStream { reader, writer }.reject(Code::Busy);
        }
    }
}
