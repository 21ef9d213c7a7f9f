//! What a transfer says to its peer, and how long it waits for the peer.

use std::time::Duration;

use quinn::RecvStream;
use tokio::time::timeout;
use tracing::debug;

use crate::error::{Code, Reason, Result};
use crate::net::stream::{MessageWriter, StreamError, varint_of};
use crate::protocol::{Committed, Failed, Working};
use crate::transfer::receive::session::Session;
use crate::transfer::receive::streams::{ExpectedStream, OpenTransfer};
use crate::transfer::receive::wanted::WantedFile;

/// Interval of `Working` messages during long disk work.
pub(super) const WORKING_INTERVAL: Duration = Duration::from_secs(5);

/// Waits for the peer, or fails if the connection is silent until the deadline.
pub(super) async fn or_timeout_on_silence<T>(
    session: &Session,
    wait: impl Future<Output = T>,
) -> Result<T, StreamError> {
    let context = &session.context;
    let deadline = context.config.deadline;
    context
        .flow_control
        .or_timeout_on_silence(deadline, wait)
        .await
}

/// Waits for the stream of a wanted file. A newer connection of the session ends the wait. Reports the transfer as
/// failed if there is no stream.
pub(super) async fn arrival(
    session: &Session,
    file: &WantedFile,
    stream: ExpectedStream,
    superseded: impl Future<Output = ()>,
) -> Option<OpenTransfer> {
    let connection = session.context.flow_control.connection();
    let failure = tokio::select! {
        () = superseded => Reason::from(Code::Superseded),
        incoming = or_timeout_on_silence(session, stream) => match incoming {
            Ok(Ok(Ok(incoming))) => return Some(incoming.open()),
            Ok(Ok(Err(withdrawn))) => withdrawn,
            _ => Reason::new(Code::TimedOut, "the sender did not send the file in time; send it again"),
        },
        lost = connection.closed() => StreamError::from(lost).into(),
    };
    session.streams.forget(file.id);
    session.transfer_ended(file, Err(failure));
    None
}

/// Runs disk work, or waits for a permit, and sends `Working` messages on the receipt stream meanwhile.
pub(super) async fn while_working<T>(
    session: &Session,
    receipt: &mut MessageWriter,
    work: impl Future<Output = Result<T, Reason>>,
) -> Result<T, Reason> {
    let _at_work = session.context.flow_control.start_work();
    tokio::pin!(work);
    loop {
        match timeout(WORKING_INTERVAL, &mut work).await {
            Ok(done) => return done,
            Err(_) => send_working(receipt).await,
        }
    }
}

/// Tells the peer that this end works. A peer that does not read this will not read the receipt either.
pub(super) async fn send_working(receipt: &mut MessageWriter) {
    let _ = timeout(WORKING_INTERVAL, receipt.write(&Working {})).await;
}

/// Writes the receipt, finishes the stream, and reports the result. Only then does it stop a failed sender, so that the
/// sender can read why.
pub(super) async fn give_receipt(
    session: &Session,
    file: &WantedFile,
    mut stream: RecvStream,
    mut receipt: MessageWriter,
    result: Result<u64, Reason>,
) {
    let deadline = session.context.config.deadline;
    let sent = match &result {
        Ok(bytes) => {
            // The sender may announce hard links to it as soon as it has the receipt.
            let first_names = &session.tables.first_names;
            first_names.insert(file.id, file.hard_link, &file.path);
            let committed = Committed {
                bytes: *bytes,
                durability: session.policy.durability,
            };
            timeout(deadline, receipt.write(&committed)).await
        }
        Err(reason) => {
            debug!(why = %reason, "transfer failed");
            let failed = Failed {
                why: reason.clone().into(),
            };
            timeout(deadline, receipt.write(&failed)).await
        }
    };
    if matches!(sent, Ok(Ok(()))) {
        let delivered = receipt.delivered();
        receipt.finish();
        session.receipts.spawn(delivered);
    }
    if let Err(reason) = &result {
        // Fails only if the stream has ended.
        let _ = stream.stop(varint_of(reason.code));
    }
    session.transfer_ended(file, result);
}
