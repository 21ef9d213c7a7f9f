//! The server's end of a measurement: few streams at once, each for a limited time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::filler::{drain, fill};
use super::{SAMPLE_INTERVAL, pong};
use crate::error::{Code, Result};
use crate::net::share::{Holder, Share, ShareLimits, Shares};
use crate::net::stream::{MessageReader, MessageStream, MessageWriter, StreamError};
use crate::protocol::{Measure, Message, Ping, Probe, Received};
use crate::transfer::context::Context;

/// Measurement streams at the same time on all connections: too many clients would measure each other. A key gets those of two
/// connections.
const STREAMS: ShareLimits = ShareLimits {
    all: 8,
    key: 4,
    network: 6,
    site: 6,
};
/// The same on one connection: an echo and one load.
const MAX_CONNECTION_STREAMS: usize = 2;
/// Longest time of an echo stream, in loads: both directions, and the time between them.
const ECHO_LIMIT: u32 = 3;

/// The permits of measurement streams.
pub(crate) struct MeasurementPermits {
    server: Arc<Shares>,
    holder: Holder,
    connection: Arc<Semaphore>,
}

/// The permits of one stream, until dropped.
struct StreamPermits {
    _server: Share,
    _connection: OwnedSemaphorePermit,
}

impl MeasurementPermits {
    /// Permits of all connections together.
    pub(crate) fn of_server() -> Arc<Shares> {
        Shares::new(STREAMS)
    }

    /// Permits of one connection.
    pub(crate) fn of_connection(server: Arc<Shares>, holder: Holder) -> Self {
        Self {
            server,
            holder,
            connection: Arc::new(Semaphore::new(MAX_CONNECTION_STREAMS)),
        }
    }

    fn take(&self) -> Option<StreamPermits> {
        let connection = self.connection.clone().try_acquire_owned().ok()?;
        Some(StreamPermits {
            _server: self.server.take(self.holder)?,
            _connection: connection,
        })
    }
}

/// Serves one measurement stream, whose type byte was read.
pub(crate) async fn serve(
    context: &Context,
    permits: &MeasurementPermits,
    stream: MessageStream,
) -> Result<()> {
    let deadline = context.config.deadline;
    let Some(permit) = permits.take() else {
        stream.reject(Code::Busy);
        return Ok(());
    };
    let MessageStream { reader, mut writer } = stream;
    let ended = tokio::select! {
        ended = run(context, reader, &mut writer) => ended,
        () = context.stopping.cancelled() => Err(StreamError::Stopped(Code::Stopping)),
    };
    // Returned before the client can know, since it may open its next stream at once.
    drop(permit);
    match ended {
        Ok(Some(last)) => {
            writer.write_within(&last, deadline).await?;
            // A server that stops closes the connection once nothing runs on it.
            writer.deliver(deadline).await;
        }
        Ok(None) => writer.reset(Code::Done),
        // The client or this end has stopped.
        Err(StreamError::Reset(code) | StreamError::Stopped(code)) => writer.reset(code),
        Err(StreamError::TimedOut) => writer.reset(Code::TimedOut),
        // Reported where the connection ends; a client that has its figures closes it at once.
        Err(StreamError::Lost(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Performs the requested probe, and returns the last message to send, if any.
async fn run(
    context: &Context,
    mut reader: MessageReader,
    writer: &mut MessageWriter,
) -> Result<Option<Received>, StreamError> {
    let deadline = context.config.deadline;
    let longest = context.config.max_measurement;
    let Measure {
        probe,
        milliseconds,
    } = context
        .connection
        .flow_control()
        .or_timeout_on_silence(deadline, reader.read())
        .await??;
    let requested = Duration::from_millis(milliseconds.into());
    let time = requested.min(longest);
    tracing::info!(?probe, ?time, "measuring");
    match probe {
        Probe::Echo => {
            writer.prioritize();
            tokio::select! {
                ended = echo(context, reader, writer) => ended?,
                () = sleep(requested.min(ECHO_LIMIT * (longest + deadline))) => {}
            }
            Ok(None)
        }
        Probe::Up => Ok(Some(up(context, reader, writer, time).await?)),
        Probe::Down => {
            fill(writer, time, &context.limits).await?;
            Ok(None)
        }
    }
}

async fn echo(
    context: &Context,
    mut reader: MessageReader,
    writer: &mut MessageWriter,
) -> Result<(), StreamError> {
    let deadline = context.config.deadline;
    let flow_control = context.connection.flow_control();
    loop {
        let frame = flow_control
            .or_timeout_on_silence(deadline, reader.frame(Ping::LIMIT))
            .await??;
        let Some(frame) = frame else { return Ok(()) };
        let Ping { id } = frame.decode()?;
        writer
            .write_within(&pong(flow_control.connection(), id), deadline)
            .await?;
    }
}

/// Receives filler until the client resets it, and reports every [`SAMPLE_INTERVAL`] how much has arrived.
async fn up(
    context: &Context,
    reader: MessageReader,
    writer: &mut MessageWriter,
    time: Duration,
) -> Result<Received, StreamError> {
    let deadline = context.config.deadline;
    let flow_control = context.connection.flow_control();
    let started = Instant::now();
    let bytes = AtomicU64::new(0);
    let received = || Received {
        bytes: bytes.load(Ordering::Relaxed),
        microseconds: u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
    };
    let reporting = async {
        let mut tick = interval(SAMPLE_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            if let Err(error) = writer.write_within(&received(), deadline).await {
                return error;
            }
        }
    };
    tokio::select! {
        ended = drain(reader, flow_control, &bytes) => match ended {
            Ok(()) | Err(StreamError::Reset(_)) => {}
            Err(error) => return Err(error),
        },
        error = reporting => return Err(error),
        () = flow_control.silence(deadline) => return Err(StreamError::TimedOut),
        // Bytes sent in time may arrive until the deadline.
        () = sleep(time + deadline) => {}
    }
    Ok(received())
}
