//! The server's side: streams of a client that measures, each for a bounded time, and few at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use super::filler::{drain, fill};
use super::{SAMPLE_INTERVAL, pong};
use crate::config::Config;
use crate::error::{Code, Result};
use crate::net::flow_control::FlowControl;
use crate::net::rate_limit::RateLimits;
use crate::net::stream::{MessageReader, MessageWriter, StreamError};
use crate::protocol::{Measure, Message, Ping, Probe, Received};

/// Streams of measurements at the same time on all connections: some clients at once would measure each other.
const STREAMS: usize = 8;
/// The same on one connection: an echo and one load.
const STREAMS_EACH: usize = 2;
/// An echo lasts as long as so many loads may: both directions, and what is between them.
const ECHO: u32 = 3;

/// Room for the streams of measurements.
pub(crate) struct Places {
    server: Arc<Semaphore>,
    connection: Arc<Semaphore>,
}

/// A stream's room, until it is dropped.
type Place = (OwnedSemaphorePermit, OwnedSemaphorePermit);

impl Places {
    /// Room on all connections together.
    pub(crate) fn of_server() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(STREAMS))
    }

    /// Room on one connection.
    pub(crate) fn of_connection(server: Arc<Semaphore>) -> Self {
        Self {
            server,
            connection: Arc::new(Semaphore::new(STREAMS_EACH)),
        }
    }

    fn take(&self) -> Option<Place> {
        let connection = self.connection.clone().try_acquire_owned().ok()?;
        Some((self.server.clone().try_acquire_owned().ok()?, connection))
    }
}

/// Serves one measurement stream, of which the type byte has been read.
pub(crate) async fn serve(
    window: &FlowControl,
    places: &Places,
    (mut reader, mut writer): (MessageReader, MessageWriter),
    (config, limits): (&Config, &RateLimits),
    stopping: &CancellationToken,
) -> Result<()> {
    let Some(place) = places.take() else {
        reader.stop(Code::Busy);
        writer.reset(Code::Busy);
        return Ok(());
    };
    let ended = tokio::select! {
        ended = run(window, reader, &mut writer, (config, limits)) => ended,
        () = stopping.cancelled() => Err(StreamError::Stopped(Code::Stopping)),
    };
    // Given back before the client can know, since it may come at once with its next stream.
    drop(place);
    match ended {
        Ok(Some(last)) => {
            writer.write_within(&last, config.deadline).await?;
            // A server that stops closes the connection once nothing runs on it.
            writer.deliver(config.deadline).await;
        }
        Ok(None) => writer.reset(Code::Done),
        // The client has had enough, or this end has.
        Err(StreamError::Reset(code) | StreamError::Stopped(code)) => writer.reset(code),
        Err(StreamError::TimedOut) => writer.reset(Code::TimedOut),
        // Told where the connection ends; a client that has its figures closes it at once.
        Err(StreamError::Lost(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Does what is asked for, and returns what is still to be said, if anything.
async fn run(
    window: &FlowControl,
    mut reader: MessageReader,
    writer: &mut MessageWriter,
    (config, limits): (&Config, &RateLimits),
) -> Result<Option<Received>, StreamError> {
    let deadline = config.deadline;
    let Measure {
        probe,
        milliseconds,
    } = window
        .or_timeout_on_silence(deadline, reader.read())
        .await??;
    let asked = Duration::from_millis(milliseconds.into());
    let time = asked.min(config.max_measurement);
    tracing::info!(?probe, ?time, "measuring");
    match probe {
        Probe::Echo => {
            writer.hurry();
            tokio::select! {
                ended = echo(window, reader, writer, deadline) => ended?,
                () = sleep(asked.min(ECHO * (config.max_measurement + deadline))) => {}
            }
            Ok(None)
        }
        Probe::Up => Ok(Some(up(window, reader, writer, time, deadline).await?)),
        Probe::Down => {
            fill(writer, time, limits).await?;
            Ok(None)
        }
    }
}

async fn echo(
    window: &FlowControl,
    mut reader: MessageReader,
    writer: &mut MessageWriter,
    deadline: Duration,
) -> Result<(), StreamError> {
    loop {
        let frame = window
            .or_timeout_on_silence(deadline, reader.frame(Ping::LIMIT))
            .await??;
        let Some(frame) = frame else { return Ok(()) };
        let Ping { id } = frame.decode()?;
        writer
            .write_within(&pong(window.connection(), id), deadline)
            .await?;
    }
}

/// Takes filler until the client resets it, and tells every [`SAMPLE_INTERVAL`] what has come.
async fn up(
    window: &FlowControl,
    reader: MessageReader,
    writer: &mut MessageWriter,
    time: Duration,
    deadline: Duration,
) -> Result<Received, StreamError> {
    let begun = Instant::now();
    let bytes = AtomicU64::new(0);
    let received = || Received {
        bytes: bytes.load(Ordering::Relaxed),
        microseconds: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
    };
    let telling = async {
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
        ended = drain(reader, window, &bytes) => match ended {
            Ok(()) | Err(StreamError::Reset(_)) => {}
            Err(error) => return Err(error),
        },
        error = telling => return Err(error),
        () = window.silence(deadline) => return Err(StreamError::TimedOut),
        // What was sent in time may still be under way for as long as anything may.
        () = sleep(time + deadline) => {}
    }
    Ok(received())
}
