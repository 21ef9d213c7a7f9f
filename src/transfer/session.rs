//! The control stream: push, pull and their summary, for both roles.
//!
//! A connection may carry several sessions, each with a control stream of its own, whose stream id is the session's
//! *handle*: it stands at the head of the session's other streams.

mod list;
pub(crate) mod nesting;
mod serve;
mod sources;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::error::{Code, Error, Reason, Result};
use crate::net::flow_control::FlowControl;
use crate::net::rate_limit::RateLimits;
use crate::net::stream::{MessageReader, MessageWriter, StreamError};
use crate::protocol::{
    Components, End, Frame, GoAway, Hello, Malformed, Message, Plan, Pull, Push, Ready, Refused,
    Removed, SenderTime, StreamType, Summary, Withdraw, Working,
};
use crate::transfer::bottleneck::{Bottleneck, PathStats, TimeBreakdown};
use crate::transfer::receive::Receiver;
use crate::transfer::sampler::{Sampler, Stage, StageCounters};
use crate::transfer::send::{Allowed, Sender, Sending, TransferStats};

pub(crate) use list::listings;
pub use list::{ListItem, Listing};
pub(crate) use serve::{MakeReceiver, ServerSession, serve};
pub use serve::{OfferEvent, OfferedContent, OfferedSource};
pub(crate) use sources::local_sources;

/// Things that a mirror may have removed and not yet told of.
const REMOVED_QUEUE_LIMIT: usize = 256;
/// How often a receiver says that it is alive, while entries wait for their turn or the last writes for the disk.
const WORKING_INTERVAL: Duration = Duration::from_secs(5);

/// How a session ended.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// The sender's account.
    pub sent: TransferStats,
    /// The receiver's account of the last connection.
    pub summary: Summary,
    /// What the path was like, over all connections.
    pub path: PathStats,
    /// What bound the transfer, while there was a connection.
    pub bound: Bottleneck,
    /// Where the time went, while there was a connection.
    pub account: TimeBreakdown,
    /// Whether the sender was the server.
    pub pulled: bool,
}

impl Outcome {
    /// Adds what was seen over one connection.
    fn saw(&mut self, path: &PathStats, account: &TimeBreakdown) {
        self.path.join(path, self.account.elapsed, account.elapsed);
        self.account.join(account);
    }
}

/// Done once the peer has this end's last messages.
pub(crate) type Delivered = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The two halves of a stream.
pub(crate) type Bi = (MessageReader, MessageWriter);

/// The sessions of a connection in which this end receives, by handle.
pub(crate) struct Sessions {
    receiving: Mutex<HashMap<u64, Registered>>,
    /// Told when there is another.
    registered: Notify,
    /// Whether a manifest may come before its session is known, as it does where the sender is who asks.
    early: bool,
    /// Bounds the long plans that are being read.
    long_plans: Semaphore,
}

/// A plan up to this size is read at once, in bytes; only one that leaves out much of what is held is longer.
const SHORT_PLAN_LIMIT: usize = 1 << 10;
/// Longer plans that are read at the same time on a connection: each may take 64 KiB, and nothing else counts them.
const LONG_PLAN_LIMIT: usize = 16;

struct Registered {
    /// A client's is made once the server has answered.
    receiver: Option<Arc<Receiver>>,
    manifest: Option<oneshot::Sender<Bi>>,
}

/// A session's place in the table; it leaves it when dropped.
pub(crate) struct Registration {
    sessions: Arc<Sessions>,
    handle: u64,
    manifest: oneshot::Receiver<Bi>,
}

impl Registration {
    /// From here on its transfers find their receiver.
    fn attach(&self, receiver: &Arc<Receiver>) {
        if let Some(session) = self.sessions.table().get_mut(&self.handle) {
            session.receiver = Some(receiver.clone());
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.sessions.table().remove(&self.handle);
    }
}

impl Sessions {
    /// A connection's sessions at the server.
    pub(crate) fn of_server() -> Arc<Self> {
        Self::new(true)
    }

    /// A connection's sessions at the client, which knows of each before it asks for it.
    pub(crate) fn of_client() -> Arc<Self> {
        Self::new(false)
    }

    fn new(early: bool) -> Arc<Self> {
        let long_plans = Semaphore::new(LONG_PLAN_LIMIT);
        Arc::new(Self {
            receiving: Mutex::default(),
            registered: Notify::new(),
            early,
            long_plans,
        })
    }

    fn table(&self) -> MutexGuard<'_, HashMap<u64, Registered>> {
        self.receiving
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a session known, so that its streams find it.
    pub(crate) fn register(self: &Arc<Self>, handle: u64) -> Registration {
        let (to, manifest) = oneshot::channel();
        self.table().insert(
            handle,
            Registered {
                receiver: None,
                manifest: Some(to),
            },
        );
        self.registered.notify_waiters();
        Registration {
            sessions: self.clone(),
            handle,
            manifest,
        }
    }

    /// Reads the head of a stream that the peer opened, and hands it to its session. What the client opens comes back.
    pub(crate) async fn dispatch(
        &self,
        window: &FlowControl,
        stream: (SendStream, RecvStream),
        deadline: Duration,
    ) -> Option<(Opened, Bi)> {
        let id = quinn::VarInt::from(stream.1.id()).into_inner();
        let mut reader = MessageReader::new(stream.1);
        let writer = MessageWriter::new(stream.0);
        let head = window
            .or_timeout_on_silence(deadline, self.head(&mut reader))
            .await;
        let code = match head {
            Ok(Ok(Head::Control)) => return Some((Opened::Session(id), (reader, writer))),
            Ok(Ok(Head::Introduction)) => return Some((Opened::Introduction, (reader, writer))),
            Ok(Ok(Head::Measurement)) => return Some((Opened::Measurement, (reader, writer))),
            Ok(Ok(Head::Manifest(to))) => {
                // Fails only when the session has just ended.
                let _ = to.send((reader, writer));
                return None;
            }
            Ok(Ok(Head::Transfer(receiver, plan))) => {
                receiver.incoming(plan, reader, writer);
                return None;
            }
            Ok(Ok(Head::Withdrawn(receiver, withdraw))) => {
                receiver.withdrawn(withdraw);
                writer.finish();
                return None;
            }
            Ok(Err(code)) => code,
            Err(_) => Code::TimedOut,
        };
        reader.stop(code);
        writer.reset(code);
        None
    }

    async fn head(&self, reader: &mut MessageReader) -> Result<Head, Code> {
        let code = |error: StreamError| Reason::from(error).code;
        let kind =
            StreamType::from_byte(reader.byte().await.map_err(code)?).ok_or(Code::Unsupported)?;
        match kind {
            StreamType::Control => return Ok(Head::Control),
            StreamType::Measurement => return Ok(Head::Measurement),
            StreamType::Introduction => return Ok(Head::Introduction),
            StreamType::Manifest | StreamType::Transfer => {}
        }
        let handle = reader.varint().await.map_err(code)?;
        if kind == StreamType::Manifest {
            // Whose control stream was not opened before it never comes.
            let early = self.early && handle < reader.id();
            return tokio::select! {
                to = self.manifest_of(handle, early) => to.map(Head::Manifest).ok_or(Code::NotWanted),
                // Its sender has given it up, most often since the session was refused.
                () = reader.reset_by_peer() => Err(Code::NotWanted),
            };
        }
        let receiver = self
            .table()
            .get(&handle)
            .and_then(|session| session.receiver.clone())
            .ok_or(Code::NotWanted)?;
        let plan = match reader.frame(SHORT_PLAN_LIMIT).await {
            Err(StreamError::Malformed(Malformed::TooLong { .. })) => {
                let _long = self.long_plans.acquire().await;
                reader.frame(Plan::LIMIT).await
            }
            plan => plan,
        };
        let plan = plan
            .and_then(|plan| plan.ok_or(StreamError::Ended))
            .map_err(code)?;
        if plan.kind == Withdraw::TYPE {
            return Ok(Head::Withdrawn(
                receiver,
                plan.decode().map_err(|bad| code(bad.into()))?,
            ));
        }
        Ok(Head::Transfer(
            receiver,
            plan.decode().map_err(|bad| code(bad.into()))?,
        ))
    }

    /// Where a session's manifest goes. It may come before the request has been looked at, or overtake it.
    async fn manifest_of(&self, handle: u64, early: bool) -> Option<oneshot::Sender<Bi>> {
        loop {
            let registered = self.registered.notified();
            match self.table().get_mut(&handle) {
                Some(session) => return session.manifest.take(),
                None if !early => return None,
                None => {}
            }
            registered.await;
        }
    }
}

/// What a client opens a stream for.
pub(crate) enum Opened {
    /// A session, by its handle.
    Session(u64),
    /// A measurement.
    Measurement,
    /// To show that it knows a code.
    Introduction,
}

enum Head {
    Control,
    Measurement,
    Introduction,
    Manifest(oneshot::Sender<Bi>),
    Transfer(Arc<Receiver>, Plan),
    Withdrawn(Arc<Receiver>, Withdraw),
}

/// Accepts the streams of a connection. Never reads itself: quinn yields streams by id, also those on which nothing has
/// come yet, so each is read in a task of its own. What a client opens goes to `opened`. Returns when the connection is lost.
pub(crate) async fn accept_streams(
    window: &Arc<FlowControl>,
    sessions: &Arc<Sessions>,
    deadline: Duration,
    opened: impl Fn(Opened, Bi) + Clone + Send + 'static,
) -> ConnectionError {
    loop {
        match window.connection().accept_bi().await {
            Ok(stream) => {
                let window = window.clone();
                let sessions = sessions.clone();
                let opened = opened.clone();
                tokio::spawn(async move {
                    if let Some((what, bi)) = sessions.dispatch(&window, stream, deadline).await {
                        opened(what, bi);
                    }
                });
            }
            Err(lost) => return lost,
        }
    }
}

/// Says hello and asks for something, on a stream whose id is the session's handle.
async fn ask<M: Message>(
    connection: &Connection,
    request: &M,
    deadline: Duration,
    register: impl FnOnce(u64),
) -> Result<(u64, Bi)> {
    // A peer that grants no stream or no credit is as silent as one that does not answer.
    let opened = timeout(deadline, connection.open_bi())
        .await
        .map_err(|_| Error::from(StreamError::TimedOut))?;
    let (send, receive) = opened.map_err(StreamError::from)?;
    let handle = quinn::VarInt::from(send.id()).into_inner();
    register(handle);
    let mut writer = MessageWriter::new(send);
    let mut head = BytesMut::new();
    head.put_u8(StreamType::Control as u8);
    hello().put(&mut head);
    request.put(&mut head);
    writer.write_chunks(&mut [head.freeze()], deadline).await?;
    Ok((handle, (MessageReader::new(receive), writer)))
}

/// The answer to a request.
async fn answer(reader: &mut MessageReader) -> Result<Ready> {
    reader.read::<Hello>().await?;
    let frame = reader
        .frame(Refused::LIMIT)
        .await?
        .ok_or(StreamError::Ended)?;
    match frame.kind {
        Refused::TYPE => {
            let refused: Refused = frame.decode().map_err(StreamError::from)?;
            Err(Error::from(Reason::from(refused.why)))
        }
        _ => Ok(frame.decode::<Ready>().map_err(StreamError::from)?),
    }
}

pub(crate) fn hello() -> Hello {
    Hello {
        features: Vec::new(),
        agent: concat!("haul/", env!("CARGO_PKG_VERSION")).into(),
    }
}

/// The client's side of a push, over one connection, until `gone` says why that one is lost. `begun` is called once the
/// server is ready. What was seen on the way, and the summary, are added to the outcome.
pub(crate) async fn push(
    (connection, limits): (&Connection, &RateLimits),
    push: &Push,
    sender: &mut Sender,
    deadline: Duration,
    begun: impl FnOnce(),
    gone: impl Future<Output = String>,
    outcome: &mut Outcome,
) -> Result<()> {
    let (handle, (mut reader, writer)) = ask(connection, push, deadline, |_| {}).await?;
    let connection = connection.clone();
    let limits = limits.clone();
    let stopping = CancellationToken::new();
    let meter = Arc::<StageCounters>::default();
    let allowed = Arc::<Allowed>::default();
    let mut watch = Sampler::begin(connection.clone(), meter.clone()).await;
    let answered = async {
        let ready = timeout(deadline, answer(&mut reader))
            .await
            .map_err(|_| Error::from(StreamError::TimedOut))??;
        allowed.set(&ready);
        begun();
        Ok(reader)
    };
    let all_sent = CancellationToken::new();
    let allowed = allowed.clone();
    let sending = Sending {
        connection,
        handle,
        allowed,
        limits,
        deadline,
        meter,
        stopping,
        all_sent,
    };
    let ended = tokio::select! {
        // The first entries go with the request.
        ended = send_all(sender, sending, (answered, || None), writer) => ended,
        why = gone => Err(Error::Lost(why.into())),
        never = watch.run() => match never {},
    };
    let held_up = ended
        .as_ref()
        .ok()
        .and_then(|summary| summary.held_up)
        .map(Duration::from_millis);
    let (path, account) = watch.end(held_up).await;
    outcome.saw(&path, &account);
    outcome.summary = ended?;
    Ok(())
}

/// The client's side of a pull, over one connection, until `gone` says why that one is lost. `receiver` makes the receiver
/// once the server is ready. What was seen on the way, and the summary, are added to the outcome. Returns what is done once
/// the server has the summary and every receipt: closing the connection before that would discard them.
pub(crate) async fn pull(
    (connection, sessions): (&Connection, &Arc<Sessions>),
    pull: &Pull,
    receiver: impl AsyncFnOnce(&Ready) -> Result<Arc<Receiver>>,
    deadline: Duration,
    gone: impl Future<Output = String>,
    outcome: &mut Outcome,
) -> Result<Delivered> {
    let mut watch = Sampler::begin(connection.clone(), Arc::default()).await;
    outcome.pulled = true;
    let mut spent = None;
    let session = async {
        let mut registration = None;
        let register = |handle| registration = Some(sessions.register(handle));
        let (_, mut control) = ask(connection, pull, deadline, register).await?;
        let ready = timeout(deadline, answer(&mut control.0))
            .await
            .map_err(|_| Error::from(StreamError::TimedOut))??;
        let registration = registration.ok_or_else(|| Error::Protocol("no session".into()))?;
        let receiver = GivenUp(receiver(&ready).await?);
        let stopping = CancellationToken::new();
        let received = receive_all(
            registration,
            receiver.0.clone(),
            control,
            deadline,
            &stopping,
        )
        .await;
        spent = receiver.0.spent();
        received
    };
    let ended = tokio::select! {
        ended = session => ended,
        why = gone => Err(Error::Lost(why.into())),
        never = watch.run() => match never {},
    };
    let held_up = ended
        .as_ref()
        .ok()
        .and_then(|(summary, _)| summary.held_up)
        .map(Duration::from_millis);
    let (mut path, mut account) = watch.end(held_up).await;
    if let Some(spent) = spent {
        path.tell(&mut account, &spent);
    }
    path.rate =
        (path.received_bytes as f64 / account.elapsed.as_secs_f64().max(f64::EPSILON)) as u64;
    outcome.saw(&path, &account);
    let (summary, delivered) = ended?;
    outcome.summary = summary;
    Ok(Box::pin(delivered))
}

/// A receiver that nobody waits for any more once this is dropped.
struct GivenUp(Arc<Receiver>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

/// Sends everything, says [`End`], and reads the [`Summary`], once the receiver has answered.
async fn send_all(
    sender: &mut Sender,
    sending: Sending,
    (answered, spent): (
        impl Future<Output = Result<MessageReader>>,
        impl FnOnce() -> Option<SenderTime>,
    ),
    writer: MessageWriter,
) -> Result<Summary> {
    let deadline = sending.deadline;
    let stopping = sending.stopping.clone();
    let meter = sending.meter.clone();
    let all_sent = sending.all_sent.clone();
    let tally = sender.tally();
    let work = async {
        sender.run(sending).await?;
        // Held until the summary is there.
        Ok(meter.at(Stage::Committing))
    };
    let end = async {
        all_sent.cancelled().await;
        let mut writer = writer;
        writer.write_within(&tally.end(spent()), deadline).await?;
        writer.finish();
        Ok::<_, Error>(())
    };
    let summary = async {
        let mut reader = answered.await?;
        loop {
            let frame = timeout(deadline, reader.frame(Removed::LIMIT))
                .await
                .map_err(|_| StreamError::TimedOut)??;
            match frame {
                Some(frame) if frame.kind == Summary::TYPE && all_sent.is_cancelled() => {
                    return Ok(frame.decode().map_err(StreamError::from)?);
                }
                Some(frame) if frame.kind == Removed::TYPE => {
                    let removed: Removed = frame.decode().map_err(StreamError::from)?;
                    tally.removed(&removed);
                }
                frame => {
                    if let Some(why) = control_notice(frame)? {
                        tally.interrupted(why);
                        stopping.cancel();
                    }
                }
            }
        }
    };
    let (_, (), summary) = tokio::try_join!(work, end, summary)?;
    Ok(summary)
}

/// What the receiver may say beside the work: that it goes away, or that it is alive.
fn control_notice(frame: Option<Frame>) -> Result<Option<Reason>> {
    let frame = frame.ok_or(StreamError::Ended)?;
    Ok(match frame.kind {
        Working::TYPE => frame.decode::<Working>().map(|_| None),
        _ => frame.decode::<GoAway>().map(|away| Some(away.why.into())),
    }
    .map_err(StreamError::from)?)
}

/// Receives until the sender has ended, and writes the [`Summary`]; with it comes what waits until that and every receipt
/// are delivered.
async fn receive_all(
    mut registration: Registration,
    receiver: Arc<Receiver>,
    (mut reader, mut writer): Bi,
    deadline: Duration,
    stopping: &CancellationToken,
) -> Result<(Summary, impl Future<Output = ()> + Send + use<>)> {
    registration.attach(&receiver);
    let (entries, verdicts) = timeout(deadline, &mut registration.manifest)
        .await
        .map_err(|_| StreamError::TimedOut)?
        .map_err(|_| StreamError::Ended)?;
    let work = async {
        // Either failure ends the session: a peer that breaks the protocol on one stream may never end the other.
        let (_, end) = tokio::try_join!(receiver.run(entries, verdicts), async {
            Ok(reader.read::<End>().await?)
        })?;
        receiver.ended(end);
        Ok::<_, Error>(())
    };
    tokio::pin!(work);
    let mut said = false;
    loop {
        tokio::select! {
            done = &mut work => break done?,
            () = stopping.cancelled(), if !said => {
                said = true;
                writer.write_within(&GoAway { why: Reason::from(Code::Stopping).into() }, deadline).await?;
            }
            // An entry may wait long for its turn; only this tells the sender that somebody is there.
            () = sleep(WORKING_INTERVAL) => writer.write_within(&Working {}, deadline).await?,
        }
    }
    let (tell, mut removed) = mpsc::channel(REMOVED_QUEUE_LIMIT);
    let mirror = receiver.mirror(tell);
    tokio::pin!(mirror);
    let mut mirroring = true;
    let mut telling = true;
    while mirroring || telling {
        tokio::select! {
            () = &mut mirror, if mirroring => mirroring = false,
            path = removed.recv(), if telling => match path {
                Some(path) => writer.write_within(&Removed { path: Components::from(&path) }, deadline).await?,
                None => telling = false,
            },
            () = sleep(WORKING_INTERVAL) => writer.write_within(&Working {}, deadline).await?,
        }
    }
    let summary = receiver.summary();
    tokio::pin!(summary);
    let summary = loop {
        match timeout(WORKING_INTERVAL, &mut summary).await {
            Ok(summary) => break summary.map_err(Error::Refused)?,
            Err(_) => writer.write_within(&Working {}, deadline).await?,
        }
    };
    writer.write_within(&summary, deadline).await?;
    let summary_delivered = writer.delivered();
    let receipts_delivered = receiver.receipts_delivered();
    writer.finish();
    let delivered = async {
        summary_delivered.await;
        receipts_delivered.await;
    };
    Ok((summary, delivered))
}
