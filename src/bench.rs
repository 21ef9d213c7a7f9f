//! The way to a server, measured without touching a disk: rate, round trips idle and loaded, loss, jitter.
//!
//! Streams of filler load the way, one direction after the other; an echo stream lives as long as all of it. Idle round
//! trips are timed on the echo stream. Under load a message may wait in this end's own queue, or be lost and sent again,
//! so there the round trips are the smoothed estimate of QUIC (RFC 9002, section 5.3) of the end that sends, sampled every
//! [`SAMPLE_INTERVAL`]; a server tells its own with each pong. Packets sent and lost are counted by the same end.

mod filler;
mod serve;
mod sums;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use quinn::Connection;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::error::{Code, Error, Reason, Result};
use crate::net::flow_control::FlowControl;
use crate::net::rate_limit::RateLimits;
use crate::net::stream::{MessageReader, MessageWriter, StreamError};
use crate::protocol::{Measure, Message, Ping, Pong, Probe, Received, StreamType};
use crate::transfer::events::{Event, Observer};

use filler::{drain, fill};
pub(crate) use serve::{Places, serve};
use sums::Samples;
pub use sums::{Load, Measurement, RoundTrips};

/// Time between two samples under load.
pub const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);
/// How long each direction is loaded at least, unless it is said: some seconds of full rate at 100 ms.
const DEFAULT_TIME: Duration = Duration::from_secs(5);
/// The same in round trips, for long ways: a sender needs some ten to find the rate, and only what follows counts.
const ROUND_TRIPS: u32 = 30;
/// Shortest load that is worth a figure.
const MIN_TIME: Duration = Duration::from_secs(1);
/// Idle round trips, and how long they may take, so that a long way does not take long.
const IDLE_TRIPS: usize = 20;
const IDLE_TIME: Duration = Duration::from_secs(3);
/// Idle round trips that are taken however long they take.
const LEAST_TRIPS: usize = 3;

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeasureOptions {
    /// The way from this end to the server.
    pub up: bool,
    /// The way back.
    pub down: bool,
    /// How long to load each, 1 s to [`Config::max_measurement`]. `None` is 5 s, or 30 round trips where that is longer.
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

/// The client's side.
pub(crate) async fn measure(
    window: &FlowControl,
    options: &MeasureOptions,
    config: &Config,
    observer: &Observer,
) -> Result<Measurement> {
    let allowed = MIN_TIME..=config.max_measurement;
    if options.time.is_some_and(|time| !allowed.contains(&time)) {
        let least = MIN_TIME.as_secs();
        let most = config.max_measurement.as_secs();
        return Err(Error::Usage(format!(
            "each direction is measured for {least} to {most} seconds"
        )));
    }
    let mut way = Way::open(window, config, observer).await.map_err(refused)?;
    let (idle, jitter) = way.idle().await.map_err(refused)?;
    let usual = (idle.median * ROUND_TRIPS)
        .max(DEFAULT_TIME)
        .min(config.max_measurement);
    let time = options.time.unwrap_or(usual);
    let mut measured = Measurement {
        idle,
        jitter,
        up: None,
        down: None,
    };
    if options.up {
        measured.up = Some(way.load(Probe::Up, time).await.map_err(refused)?);
    }
    if options.down {
        measured.down = Some(way.load(Probe::Down, time).await.map_err(refused)?);
    }
    way.writer.finish();
    Ok(measured)
}

/// What it means that the server gave a stream of ours up.
fn refused(error: StreamError) -> Error {
    let why = match error {
        StreamError::Reset(code) | StreamError::Stopped(code) => code,
        error => return error.into(),
    };
    Error::from(match why {
        Code::Unsupported => Reason::new(
            why,
            "the server's haul is too old for this: it cannot measure",
        ),
        Code::Busy => Reason::new(
            why,
            "the server is busy with other measurements; try again in a minute",
        ),
        Code::TimedOut => return StreamError::TimedOut.into(),
        code => code.into(),
    })
}

/// A way that is being measured: its echo stream, and what the loads need.
struct Way<'a> {
    window: &'a FlowControl,
    deadline: Duration,
    observer: &'a Observer,
    reader: MessageReader,
    writer: MessageWriter,
    next: u64,
}

impl<'a> Way<'a> {
    async fn open(
        window: &'a FlowControl,
        config: &Config,
        observer: &'a Observer,
    ) -> Result<Self, StreamError> {
        let deadline = config.deadline;
        // The server's own bound; the stream is finished long before.
        let (reader, writer) =
            open(window.connection(), Probe::Echo, Duration::MAX, deadline).await?;
        writer.hurry();
        Ok(Self {
            window,
            deadline,
            observer,
            reader,
            writer,
            next: 0,
        })
    }

    /// One round trip.
    async fn ping(&mut self) -> Result<(Duration, Pong), StreamError> {
        let id = self.next;
        let sent = Instant::now();
        self.next += 1;
        // It waits for credit behind what is under way, and that moves.
        self.writer
            .write_within(&Ping { id }, self.deadline)
            .await?;
        let pong = self
            .window
            .or_timeout_on_silence(self.deadline, self.reader.read::<Pong>())
            .await??;
        // Nobody else is asked in between.
        if pong.id == id {
            Ok((sent.elapsed(), pong))
        } else {
            Err(StreamError::Ended)
        }
    }

    /// Round trips while nothing else moves, and their jitter.
    async fn idle(&mut self) -> Result<(RoundTrips, Duration), StreamError> {
        let begun = Instant::now();
        let mut trips = Vec::new();
        while trips.len() < LEAST_TRIPS || (trips.len() < IDLE_TRIPS && begun.elapsed() < IDLE_TIME)
        {
            trips.push(self.ping().await?.0);
        }
        Ok((RoundTrips::of(&trips), sums::jitter(&trips)))
    }

    /// What the end that sends knows of the path.
    async fn sender(&mut self, probe: Probe) -> Result<Pong, StreamError> {
        match probe {
            Probe::Down => Ok(self.ping().await?.1),
            Probe::Up | Probe::Echo => Ok(pong(self.window.connection(), 0)),
        }
    }

    /// Loads one direction for so long.
    async fn load(&mut self, probe: Probe, time: Duration) -> Result<Load, StreamError> {
        let before = self.sender(probe).await?;
        let over = CancellationToken::new();
        let window = self.window;
        let deadline = self.deadline;
        let observer = self.observer;
        let told = |elapsed, bytes| {
            observer(Event::Measuring {
                probe,
                bytes,
                elapsed,
            })
        };
        let load = async {
            // However alive the peer is, it does not go on for ever.
            let _over = over.clone().drop_guard();
            let load = async {
                match probe {
                    Probe::Down => down(window, time, deadline, told).await,
                    Probe::Up | Probe::Echo => up(window, time, deadline, told).await,
                }
            };
            timeout(time + deadline, load)
                .await
                .map_err(|_| StreamError::TimedOut)?
        };
        let trips = async {
            let mut trips = Vec::new();
            // A ping is never given up half way: its pong would be taken for the next one's.
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

/// What this end, as a sender, knows of the path.
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
    connection: &Connection,
    probe: Probe,
    time: Duration,
    deadline: Duration,
) -> Result<(MessageReader, MessageWriter), StreamError> {
    // A peer that grants no stream is as silent as one that does not answer.
    let (send, receive) = timeout(deadline, connection.open_bi())
        .await
        .map_err(|_| StreamError::TimedOut)??;
    let reader = MessageReader::new(receive);
    let mut writer = MessageWriter::new(send);
    let milliseconds = u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
    let mut head = BytesMut::new();
    head.put_u8(StreamType::Measurement as u8);
    Measure {
        probe,
        milliseconds,
    }
    .put(&mut head);
    writer.write_chunks(&mut [head.freeze()], deadline).await?;
    Ok((reader, writer))
}

/// Sends filler, and hears from the server what of it has come.
async fn up(
    window: &FlowControl,
    time: Duration,
    deadline: Duration,
    told: impl Fn(Duration, u64),
) -> Result<Samples, StreamError> {
    let (mut reader, mut writer) = open(window.connection(), Probe::Up, time, deadline).await?;
    let filling = async {
        // Why a server stopped it, it says on the other half.
        let _ = fill(&mut writer, time, &RateLimits::default()).await;
        // What is still under way is not waited for: on a slow link it may be a minute's worth.
        writer.reset(Code::Done);
    };
    let counting = async {
        let mut samples = Samples::default();
        let next = async |reader: &mut MessageReader| {
            window
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
            told(elapsed, bytes);
        }
        Ok(samples)
    };
    tokio::pin!(filling, counting);
    // A server that has enough before this end has, ends the filling too.
    tokio::select! {
        counted = &mut counting => return counted,
        () = filling => {}
    }
    counting.await
}

/// Takes filler, and counts it.
async fn down(
    window: &FlowControl,
    time: Duration,
    deadline: Duration,
    told: impl Fn(Duration, u64),
) -> Result<Samples, StreamError> {
    let (reader, writer) = open(window.connection(), Probe::Down, time, deadline).await?;
    writer.finish();
    let begun = Instant::now();
    let bytes = AtomicU64::new(0);
    let mut samples = Samples::default();
    let sampling = async {
        let mut tick = interval(SAMPLE_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let elapsed = begun.elapsed();
            let bytes = bytes.load(Ordering::Relaxed);
            samples.push(elapsed, bytes);
            told(elapsed, bytes);
        }
    };
    let ended = tokio::select! {
        ended = window.or_timeout_on_silence(deadline, drain(reader, window, &bytes)) => ended?,
        () = sampling => Ok(()),
    };
    match ended {
        Ok(()) | Err(StreamError::Reset(Code::Done)) => {}
        Err(error) => return Err(error),
    }
    samples.push(begun.elapsed(), bytes.into_inner());
    Ok(samples)
}
