//! The control stream of a push or pull up to its summary, for both roles.
//!
//! A connection may carry several sessions, each with its own control stream. The id of that stream is the *handle* of
//! the session. The other streams of the session begin with the handle.

mod list;
pub(crate) mod nesting;
mod serve;
mod sources;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use quinn::{Connection, ConnectionError};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::error::{Code, Error, Reason, Result};
use crate::net::flow_control::FlowControl;
use crate::net::rate_limit::RateLimits;
use crate::net::stream::{MessageReader, MessageStream, MessageWriter, StreamError};
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

/// Paths that a mirror has removed and not yet reported.
const REMOVED_QUEUE_LIMIT: usize = 256;
/// Interval of `Working` messages from a receiver, while entries wait for admission or the last writes for the disk.
const WORKING_INTERVAL: Duration = Duration::from_secs(5);

/// The result of a session.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// The sender's statistics.
    pub sent: TransferStats,
    /// The receiver's summary of the last connection.
    pub summary: Summary,
    /// The statistics of the path, over all connections.
    pub path: PathStats,
    /// The bottleneck of the transfer, while it was connected.
    pub bound: Bottleneck,
    /// The time in each stage, while it was connected.
    pub account: TimeBreakdown,
    /// Whether the sender was the server (a pull).
    pub pulled: bool,
}

impl Outcome {
    /// Adds the measurements of one connection.
    fn saw(&mut self, path: &PathStats, account: &TimeBreakdown) {
        self.path.join(path, self.account.elapsed, account.elapsed);
        self.account.join(account);
    }
}

/// Completes when the peer has this end's last messages.
pub(crate) type Delivered = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The sessions of a connection in which this end is the receiver, by handle.
pub(crate) struct Sessions {
    receiving: Mutex<HashMap<u64, Registered>>,
    /// Notified when a session is registered.
    registered: Notify,
    /// Whether a manifest may arrive before its session is registered. True at a server, where the sender makes the
    /// request.
    early: bool,
    /// Limits the long plans that are read at the same time.
    long_plans: Semaphore,
}

/// Largest plan that is read without a permit, in bytes. Only a plan that omits many held ranges is longer.
const SHORT_PLAN_LIMIT: usize = 1 << 10;
/// Longer plans that are read at the same time on a connection. Each may take 64 KiB, which no other limit counts.
const LONG_PLAN_LIMIT: usize = 16;

struct Registered {
    /// A client creates its receiver after the server has answered.
    receiver: Option<Arc<Receiver>>,
    manifest: Option<oneshot::Sender<MessageStream>>,
}

/// A registered session. Dropping it removes the session from the table.
pub(crate) struct Registration {
    sessions: Arc<Sessions>,
    handle: u64,
    manifest: oneshot::Receiver<MessageStream>,
}

impl Registration {
    /// Sets the receiver. From now on, transfers of the session reach it.
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
    /// Creates the table of a server connection.
    pub(crate) fn of_server() -> Arc<Self> {
        Self::new(true)
    }

    /// Creates the table of a client connection. A client registers each session before it makes the request.
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

    /// Registers a session, so that its streams find it.
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

    /// Reads the head of a stream that the peer opened, and passes the stream to its session. Returns a stream that
    /// starts a session, measurement or introduction.
    pub(crate) async fn dispatch(
        &self,
        window: &FlowControl,
        mut stream: MessageStream,
        deadline: Duration,
    ) -> Option<(Opened, MessageStream)> {
        let head = window
            .or_timeout_on_silence(deadline, self.head(&mut stream.reader))
            .await;
        match head {
            Ok(Ok(Head::Control)) => return Some((Opened::Session, stream)),
            Ok(Ok(Head::Introduction)) => return Some((Opened::Introduction, stream)),
            Ok(Ok(Head::Measurement)) => return Some((Opened::Measurement, stream)),
            // Fails only if the session has just ended.
            Ok(Ok(Head::Manifest(to))) => drop(to.send(stream)),
            Ok(Ok(Head::Transfer(receiver, plan))) => {
                receiver.incoming(plan, stream.reader, stream.writer);
            }
            Ok(Ok(Head::Withdrawn(receiver, withdraw))) => {
                receiver.withdrawn(withdraw);
                stream.writer.finish();
            }
            Ok(Err(code)) => stream.reject(code),
            Err(_) => stream.reject(Code::TimedOut),
        }
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
            // If the control stream was not opened earlier, it will never come.
            let early = self.early && handle < reader.id();
            return tokio::select! {
                to = self.manifest_of(handle, early) => to.map(Head::Manifest).ok_or(Code::NotWanted),
                // The sender abandoned it, usually because the session was refused.
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

    /// Returns the channel for a session's manifest. The manifest may overtake the request, or arrive before the
    /// request is handled.
    async fn manifest_of(
        &self,
        handle: u64,
        early: bool,
    ) -> Option<oneshot::Sender<MessageStream>> {
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

/// The purpose of a stream that a client opened.
pub(crate) enum Opened {
    /// A session. The stream's id is its handle.
    Session,
    /// A measurement.
    Measurement,
    /// An introduction: a proof that the client knows a code.
    Introduction,
}

enum Head {
    Control,
    Measurement,
    Introduction,
    Manifest(oneshot::Sender<MessageStream>),
    Transfer(Arc<Receiver>, Plan),
    Withdrawn(Arc<Receiver>, Withdraw),
}

/// Accepts the streams of a connection until the connection is lost, and returns the cause. The accept loop never
/// reads: quinn yields streams by id, even those without data yet, so a separate task reads each stream. Streams that
/// start something are passed to `opened`.
pub(crate) async fn accept_streams(
    window: &Arc<FlowControl>,
    sessions: &Arc<Sessions>,
    deadline: Duration,
    opened: impl Fn(Opened, MessageStream) + Clone + Send + 'static,
) -> ConnectionError {
    loop {
        match window.connection().accept_bi().await {
            Ok((send, receive)) => {
                let stream = MessageStream::new(send, receive);
                let window = window.clone();
                let sessions = sessions.clone();
                let opened = opened.clone();
                tokio::spawn(async move {
                    if let Some((what, stream)) = sessions.dispatch(&window, stream, deadline).await
                    {
                        opened(what, stream);
                    }
                });
            }
            Err(lost) => return lost,
        }
    }
}

/// Sends `Hello` and a request on a new control stream.
async fn ask<M: Message>(
    writer: &mut MessageWriter,
    request: &M,
    deadline: Duration,
) -> Result<()> {
    let mut head = BytesMut::new();
    head.put_u8(StreamType::Control as u8);
    hello().put(&mut head);
    request.put(&mut head);
    Ok(writer.write_chunks(&mut [head.freeze()], deadline).await?)
}

/// Reads the answer to a request.
async fn answer(reader: &mut MessageReader, deadline: Duration) -> Result<Ready> {
    let answer = async {
        reader.read::<Hello>().await?;
        reader
            .frame(Refused::LIMIT)
            .await?
            .ok_or(StreamError::Ended)
    };
    let frame = timeout(deadline, answer)
        .await
        .map_err(|_| StreamError::TimedOut)??;
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

/// Runs the client side of a push over one connection, until `gone` reports the loss of that connection. Calls `begun`
/// when the server is ready. Adds the measurements and the summary to the outcome.
pub(crate) async fn push(
    (connection, limits): (&Connection, &RateLimits),
    push: &Push,
    sender: &mut Sender,
    deadline: Duration,
    begun: impl FnOnce(),
    gone: impl Future<Output = String>,
    outcome: &mut Outcome,
) -> Result<()> {
    let mut control = MessageStream::open(connection, deadline).await?;
    let handle = control.id();
    ask(&mut control.writer, push, deadline).await?;
    let connection = connection.clone();
    let limits = limits.clone();
    let stopping = CancellationToken::new();
    let meter = Arc::<StageCounters>::default();
    let allowed = Arc::<Allowed>::default();
    let mut sampler = Sampler::begin(connection.clone(), meter.clone()).await;
    let MessageStream { mut reader, writer } = control;
    let answered = async {
        allowed.set(&answer(&mut reader, deadline).await?);
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
        // Send the first entries together with the request.
        ended = send_all(sender, sending, answered, || None, writer) => ended,
        why = gone => Err(Error::Lost(why.into())),
        never = sampler.run() => match never {},
    };
    let held_up = ended
        .as_ref()
        .ok()
        .and_then(|summary| summary.held_up)
        .map(Duration::from_millis);
    let (path, account) = sampler.end(held_up).await;
    outcome.saw(&path, &account);
    outcome.summary = ended?;
    Ok(())
}

/// Runs the client side of a pull over one connection, until `gone` reports the loss of that connection. `receiver`
/// creates the receiver when the server is ready. Adds the measurements and the summary to the outcome. The returned
/// future completes when the server has the summary and every receipt; closing the connection earlier would discard
/// them.
pub(crate) async fn pull(
    (connection, sessions): (&Connection, &Arc<Sessions>),
    pull: &Pull,
    receiver: impl AsyncFnOnce(&Ready) -> Result<Arc<Receiver>>,
    deadline: Duration,
    gone: impl Future<Output = String>,
    outcome: &mut Outcome,
) -> Result<Delivered> {
    let mut sampler = Sampler::begin(connection.clone(), Arc::default()).await;
    outcome.pulled = true;
    let mut spent = None;
    let session = async {
        let mut control = MessageStream::open(connection, deadline).await?;
        // Registered before the request, because the manifest may arrive with the answer.
        let registration = sessions.register(control.id());
        ask(&mut control.writer, pull, deadline).await?;
        let ready = answer(&mut control.reader, deadline).await?;
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
        never = sampler.run() => match never {},
    };
    let held_up = ended
        .as_ref()
        .ok()
        .and_then(|(summary, _)| summary.held_up)
        .map(Duration::from_millis);
    let (mut path, mut account) = sampler.end(held_up).await;
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

/// Abandons its receiver when dropped.
struct GivenUp(Arc<Receiver>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

/// Sends everything, writes [`End`], and reads the [`Summary`] after the receiver has answered.
async fn send_all(
    sender: &mut Sender,
    sending: Sending,
    answered: impl Future<Output = Result<MessageReader>>,
    spent: impl FnOnce() -> Option<SenderTime>,
    writer: MessageWriter,
) -> Result<Summary> {
    let deadline = sending.deadline;
    let stopping = sending.stopping.clone();
    let meter = sending.meter.clone();
    let all_sent = sending.all_sent.clone();
    let tally = sender.tally();
    let work = async {
        sender.run(sending).await?;
        // Counts the stage as committing until the summary arrives.
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

/// Handles a message from the receiver that is not part of the work: `Working`, or `GoAway`, whose reason it returns.
fn control_notice(frame: Option<Frame>) -> Result<Option<Reason>> {
    let frame = frame.ok_or(StreamError::Ended)?;
    Ok(match frame.kind {
        Working::TYPE => frame.decode::<Working>().map(|_| None),
        _ => frame.decode::<GoAway>().map(|away| Some(away.why.into())),
    }
    .map_err(StreamError::from)?)
}

/// Receives until the sender has ended, and writes the [`Summary`]. The returned future completes when the summary and
/// all receipts are delivered.
async fn receive_all(
    mut registration: Registration,
    receiver: Arc<Receiver>,
    control: MessageStream,
    deadline: Duration,
    stopping: &CancellationToken,
) -> Result<(Summary, impl Future<Output = ()> + Send + use<>)> {
    let MessageStream {
        mut reader,
        mut writer,
    } = control;
    registration.attach(&receiver);
    let manifest = timeout(deadline, &mut registration.manifest)
        .await
        .map_err(|_| StreamError::TimedOut)?
        .map_err(|_| StreamError::Ended)?;
    let work = async {
        // Either failure ends the session, because a peer that breaks the protocol on one stream may never end the
        // other.
        let run = receiver.run(manifest.reader, manifest.writer);
        let (_, end) = tokio::try_join!(run, async { Ok(reader.read::<End>().await?) })?;
        receiver.ended(end);
        Ok::<_, Error>(())
    };
    tokio::pin!(work);
    let mut announced_stop = false;
    loop {
        tokio::select! {
            done = &mut work => break done?,
            () = stopping.cancelled(), if !announced_stop => {
                announced_stop = true;
                writer.write_within(&GoAway { why: Reason::from(Code::Stopping).into() }, deadline).await?;
            }
            // An entry may wait long for admission. This message shows the sender that the receiver is alive.
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
