//! Measures the path to a server without touching a disk: rate, idle and loaded round trips, loss, jitter.
//!
//! Streams of filler load the path in one direction after the other; an echo stream stays open throughout. Idle round
//! trips are timed on the echo stream. Under load a message may wait in this end's own queue or be lost and sent
//! again. So loaded round trips are QUIC's smoothed estimate (RFC 9002, section 5.3) at the sending end, sampled
//! every [`SAMPLE_INTERVAL`]; a server reports its own with each pong. The same end counts packets sent and lost.

mod filler;
mod measurement;
mod serve;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use quinn::Connection;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::error::{Code, Error, Reason, Result};
use crate::net::rate_limit::RateLimits;
use crate::net::stream::{MessageReader, MessageStream, StreamError};
use crate::protocol::{Measure, Message, Ping, Pong, Received, StreamType};
use crate::transfer::context::Context;
use crate::transfer::events::Event;

pub use crate::protocol::Probe;
use filler::{drain, fill};
use measurement::Samples;
pub use measurement::{Load, Measurement, RoundTrips};
pub(crate) use serve::{MeasurementPermits, serve};

/// Time between two samples under load.
pub const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);
/// Default time for which each direction is loaded: some seconds of full rate at 100 ms.
const DEFAULT_TIME: Duration = Duration::from_secs(5);
/// The same in round trips, for long paths: a sender needs some ten to find the rate, and only later ones count.
const MIN_ROUND_TRIPS: u32 = 30;
/// Shortest load that gives a useful figure.
const MIN_TIME: Duration = Duration::from_secs(1);
/// Number of idle round trips.
const MAX_IDLE_TRIPS: usize = 20;
/// Longest time for them, so that a long path does not take long.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3);
/// Idle round trips that are measured even if they take longer.
const MIN_IDLE_TRIPS: usize = 3;

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeasureOptions {
    /// Measure from this end to the server.
    pub up: bool,
    /// Measure from the server to this end.
    pub down: bool,
    /// Load time of each direction, 1 s to [`Config::max_measurement`](crate::config::Config::max_measurement). `None` is
    /// 5 s, or 30 round trips if that is longer.
    pub time: Option<Duration>,
}

impl Default for MeasureOptions {
    fn default() -> Self {
        Self {
            up: true,
            down: true,
            time: None,
        }
    }
}

/// Runs a measurement as the client.
pub(crate) async fn measure(context: &Context, options: &MeasureOptions) -> Result<Measurement> {
    let longest = context.config.max_measurement;
    let allowed = MIN_TIME..=longest;
    if options.time.is_some_and(|time| !allowed.contains(&time)) {
        let min = MIN_TIME.as_secs();
        let max = longest.as_secs();
        return Err(Error::Usage(format!(
            "cannot measure for this long: choose {min} to {max} seconds for each direction"
        )));
    }
    let mut probe = PathProbe::open(context).await.map_err(refused)?;
    let (idle, jitter) = probe.idle().await.map_err(refused)?;
    let usual = (idle.median * MIN_ROUND_TRIPS)
        .max(DEFAULT_TIME)
        .min(longest);
    let time = options.time.unwrap_or(usual);
    let mut measured = Measurement {
        idle,
        jitter,
        up: None,
        down: None,
    };
    if options.up {
        measured.up = Some(probe.load(Probe::Up, time).await.map_err(refused)?);
    }
    if options.down {
        measured.down = Some(probe.load(Probe::Down, time).await.map_err(refused)?);
    }
    probe.echo.writer.finish();
    Ok(measured)
}

/// Translates the error with which the server gave up a stream.
fn refused(error: StreamError) -> Error {
    let code = match error {
        StreamError::Reset(code) | StreamError::Stopped(code) => code,
        error => return error.into(),
    };
    Error::from(match code {
        Code::Unsupported => Reason::new(code, "the server's haul is too old to measure"),
        Code::Busy => Reason::new(
            code,
            "the server is busy with other measurements; try again in a minute",
        ),
        Code::TimedOut => return StreamError::TimedOut.into(),
        code => code.into(),
    })
}

/// A path under measurement, and its echo stream.
struct PathProbe<'a> {
    context: &'a Context,
    echo: MessageStream,
    next_id: u64,
}

impl<'a> PathProbe<'a> {
    async fn open(context: &'a Context) -> Result<Self, StreamError> {
        // The server applies its own limit; this end finishes the stream long before.
        let echo = open(context, Probe::Echo, Duration::MAX).await?;
        echo.writer.prioritize();
        Ok(Self {
            context,
            echo,
            next_id: 0,
        })
    }

    /// Measures one round trip.
    async fn ping(&mut self) -> Result<(Duration, Pong), StreamError> {
        let deadline = self.context.config.deadline;
        let id = self.next_id;
        let sent = Instant::now();
        self.next_id += 1;
        // It waits for credit behind other data, which moves.
        self.echo
            .writer
            .write_within(&Ping { id }, deadline)
            .await?;
        let pong = self
            .context
            .connection
            .flow_control()
            .or_timeout_on_silence(deadline, self.echo.reader.read::<Pong>())
            .await??;
        // There is only one ping at a time.
        if pong.id == id {
            Ok((sent.elapsed(), pong))
        } else {
            Err(StreamError::Ended)
        }
    }

    /// Measures idle round trips and their jitter.
    async fn idle(&mut self) -> Result<(RoundTrips, Duration), StreamError> {
        let started = Instant::now();
        let mut trips = Vec::new();
        while trips.len() < MIN_IDLE_TRIPS
            || (trips.len() < MAX_IDLE_TRIPS && started.elapsed() < IDLE_TIMEOUT)
        {
            trips.push(self.ping().await?.0);
        }
        Ok((RoundTrips::of(&trips), measurement::jitter(&trips)))
    }

    /// Returns the sending end's statistics of the path.
    async fn sender(&mut self, probe: Probe) -> Result<Pong, StreamError> {
        match probe {
            Probe::Down => Ok(self.ping().await?.1),
            Probe::Up | Probe::Echo => Ok(pong(self.context.connection.quic(), 0)),
        }
    }

    /// Loads one direction for `time`.
    async fn load(&mut self, probe: Probe, time: Duration) -> Result<Load, StreamError> {
        let before = self.sender(probe).await?;
        let over = CancellationToken::new();
        let context = self.context;
        let on_sample = |elapsed, bytes| {
            (context.observer)(Event::Measuring {
                probe,
                bytes,
                elapsed,
            })
        };
        let load = async {
            // A load has a time limit, even if the peer keeps sending.
            let _over = over.clone().drop_guard();
            let load = async {
                match probe {
                    Probe::Down => down(context, time, on_sample).await,
                    Probe::Up | Probe::Echo => up(context, time, on_sample).await,
                }
            };
            timeout(time + context.config.deadline, load)
                .await
                .map_err(|_| StreamError::TimedOut)?
        };
        let trips = async {
            let mut trips = Vec::new();
            // A ping is never cancelled half way: its pong would be taken for the next one's.
            while !over.is_cancelled() {
                tokio::select! {
                    () = over.cancelled() => {}
                    () = sleep(SAMPLE_INTERVAL) => trips.push(Duration::from_micros(self.sender(probe).await?.rtt)),
                }
            }
            Ok(trips)
        };
        let (samples, trips) = tokio::try_join!(load, trips)?;
        let after = self.sender(probe).await?;
        Ok(samples.load(&trips, &before, &after))
    }
}

/// Returns this end's statistics of the path.
fn pong(connection: &Connection, id: u64) -> Pong {
    let path = connection.stats().path;
    let rtt = u64::try_from(path.rtt.as_micros()).unwrap_or(u64::MAX);
    Pong {
        id,
        packets_sent: path.sent_packets,
        packets_lost: path.lost_packets,
        rtt,
    }
}

async fn open(
    context: &Context,
    probe: Probe,
    time: Duration,
) -> Result<MessageStream, StreamError> {
    let deadline = context.config.deadline;
    let mut stream = MessageStream::open(context.connection.quic(), deadline).await?;
    let milliseconds = u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
    let mut head = BytesMut::new();
    head.put_u8(StreamType::Measurement as u8);
    Measure {
        probe,
        milliseconds,
    }
    .put(&mut head);
    stream
        .writer
        .write_chunks(&mut [head.freeze()], deadline)
        .await?;
    Ok(stream)
}

/// Sends filler, and receives the server's counts of it.
async fn up(
    context: &Context,
    time: Duration,
    on_sample: impl Fn(Duration, u64),
) -> Result<Samples, StreamError> {
    let deadline = context.config.deadline;
    let flow_control = context.connection.flow_control();
    let MessageStream {
        mut reader,
        mut writer,
    } = open(context, Probe::Up, time).await?;
    let filling = async {
        // The server reports its reason on the other half of the stream.
        let _ = fill(&mut writer, time, &RateLimits::default()).await;
        // Does not wait for bytes in flight: on a slow link they may take a minute.
        writer.reset(Code::Done);
    };
    let counting = async {
        let mut samples = Samples::default();
        let next = async |reader: &mut MessageReader| {
            flow_control
                .or_timeout_on_silence(deadline, reader.frame(Received::LIMIT))
                .await?
        };
        while let Some(frame) = next(&mut reader).await? {
            let Received {
                bytes,
                microseconds,
            } = frame.decode()?;
            let elapsed = Duration::from_micros(microseconds);
            samples.push(elapsed, bytes);
            on_sample(elapsed, bytes);
        }
        Ok(samples)
    };
    tokio::pin!(filling, counting);
    // If the server ends first, that ends the filling too.
    tokio::select! {
        counted = &mut counting => return counted,
        () = filling => {}
    }
    counting.await
}

/// Receives filler, and counts it.
async fn down(
    context: &Context,
    time: Duration,
    on_sample: impl Fn(Duration, u64),
) -> Result<Samples, StreamError> {
    let deadline = context.config.deadline;
    let flow_control = context.connection.flow_control();
    let MessageStream { reader, writer } = open(context, Probe::Down, time).await?;
    writer.finish();
    let started = Instant::now();
    let bytes = AtomicU64::new(0);
    let mut samples = Samples::default();
    let sampling = async {
        let mut tick = interval(SAMPLE_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let elapsed = started.elapsed();
            let bytes = bytes.load(Ordering::Relaxed);
            samples.push(elapsed, bytes);
            on_sample(elapsed, bytes);
        }
    };
    let ended = tokio::select! {
        ended = flow_control.or_timeout_on_silence(deadline, drain(reader, flow_control, &bytes)) => ended?,
        () = sampling => Ok(()),
    };
    match ended {
        Ok(()) | Err(StreamError::Reset(Code::Done)) => {}
        Err(error) => return Err(error),
    }
    samples.push(started.elapsed(), bytes.into_inner());
    Ok(samples)
}
