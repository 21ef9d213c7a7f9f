//! The control stream: push, pull and their summary, for both roles.
//!
//! A connection may carry several sessions, each with a control stream of its own, whose stream id is the session's
//! *handle*: it stands at the head of the session's other streams.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::error::{Code, Error, Result, Why};
use crate::manifest::{MAX_UNANSWERED, MAX_UNANSWERED_BYTES, Tree};
use crate::path::RelativePath;
use crate::progress::{Event, Observer};
use crate::receiver::{Place, Receiver};
use crate::sender::{Sending, Sent, send};
use crate::store::Store;
use crate::store::fault::refusal;
use crate::stream::{MessageReader, MessageWriter, StreamError};
use crate::wire::{
    Components, End, Frame, GoAway, Hello, Kind, Malformed, Message, Plan, Pull, Push, Ready, Refused, StreamType,
    Summary, Working,
};

/// How often a receiver says that it is alive, while entries wait for their turn or the last writes for the disk.
const WORKING: Duration = Duration::from_secs(5);

/// How a session ended.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// The sender's account.
    pub sent: Sent,
    /// The receiver's account.
    pub summary: Summary,
}

/// The two halves of a stream.
pub(crate) type Bi = (MessageReader, MessageWriter);

/// The sessions of a connection in which this end receives, by handle.
pub(crate) struct Sessions {
    receiving: Mutex<HashMap<u64, Registered>>,
    /// Bounds the long plans that are being read.
    long_plans: Semaphore,
}

/// A plan up to this size is read at once, in bytes; only one that leaves out much of what is held is longer.
const SHORT_PLAN: usize = 1 << 10;
/// Longer plans that are read at the same time on a connection: each may take 64 KiB, and nothing else counts them.
const LONG_PLANS: usize = 16;

impl Default for Sessions {
    fn default() -> Self {
        Self { receiving: Mutex::default(), long_plans: Semaphore::new(LONG_PLANS) }
    }
}

struct Registered {
    receiver: Arc<Receiver>,
    manifest: Option<oneshot::Sender<Bi>>,
}

/// A session's place in the table; it leaves it when dropped.
pub(crate) struct Registration {
    sessions: Arc<Sessions>,
    handle: u64,
    manifest: oneshot::Receiver<Bi>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.sessions.table().remove(&self.handle);
    }
}

impl Sessions {
    fn table(&self) -> MutexGuard<'_, HashMap<u64, Registered>> {
        self.receiving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a receiver known, so that its streams find it.
    pub(crate) fn register(self: &Arc<Self>, handle: u64, receiver: Arc<Receiver>) -> Registration {
        let (to, manifest) = oneshot::channel();
        self.table().insert(handle, Registered { receiver, manifest: Some(to) });
        Registration { sessions: self.clone(), handle, manifest }
    }

    /// Reads the head of a stream that the peer opened, and hands it to its session. A control stream comes back.
    pub(crate) async fn dispatch(&self, stream: (SendStream, RecvStream), deadline: Duration) -> Option<(u64, Bi)> {
        let id = quinn::VarInt::from(stream.1.id()).into_inner();
        let (mut reader, writer) = (MessageReader::new(stream.1), MessageWriter::new(stream.0));
        let code = match timeout(deadline, self.head(&mut reader)).await {
            Ok(Ok(Head::Control)) => return Some((id, (reader, writer))),
            Ok(Ok(Head::Manifest(to))) => {
                // Fails only when the session has just ended.
                let _ = to.send((reader, writer));
                return None;
            }
            Ok(Ok(Head::Transfer(receiver, plan))) => {
                receiver.incoming(plan, reader, writer);
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
        let code = |error: StreamError| Why::from(error).code;
        let kind = StreamType::from_byte(reader.byte().await.map_err(code)?).ok_or(Code::Unsupported)?;
        if kind == StreamType::Control {
            return Ok(Head::Control);
        }
        let handle = reader.varint().await.map_err(code)?;
        if kind == StreamType::Manifest {
            let to = self.table().get_mut(&handle).and_then(|session| session.manifest.take());
            return to.map(Head::Manifest).ok_or(Code::NotWanted);
        }
        let receiver = self.table().get(&handle).map(|session| session.receiver.clone()).ok_or(Code::NotWanted)?;
        let plan = match reader.frame(SHORT_PLAN).await {
            Err(StreamError::Malformed(Malformed::TooLong { .. })) => {
                let _long = self.long_plans.acquire().await;
                reader.frame(Plan::LIMIT).await
            }
            plan => plan,
        };
        let plan = plan.and_then(|plan| plan.ok_or(StreamError::Ended)).map_err(code)?;
        Ok(Head::Transfer(receiver, plan.decode().map_err(|bad| code(bad.into()))?))
    }
}

enum Head {
    Control,
    Manifest(oneshot::Sender<Bi>),
    Transfer(Arc<Receiver>, Plan),
}

/// Accepts the streams of a connection. Never reads itself: quinn yields streams by id, also those on which nothing has
/// come yet, so each is read in a task of its own. Control streams go to `control`. Returns when the connection is lost.
pub(crate) async fn accept_streams(
    connection: &Connection,
    sessions: &Arc<Sessions>,
    deadline: Duration,
    control: impl Fn(u64, Bi) + Clone + Send + 'static,
) -> ConnectionError {
    loop {
        match connection.accept_bi().await {
            Ok(stream) => {
                let (sessions, control) = (sessions.clone(), control.clone());
                tokio::spawn(async move {
                    if let Some((handle, bi)) = sessions.dispatch(stream, deadline).await {
                        control(handle, bi);
                    }
                });
            }
            Err(lost) => return lost,
        }
    }
}

/// Says hello in both directions and asks for something; the answer is [`Ready`] or an error.
async fn request<M: Message>(
    connection: &Connection,
    request: &M,
    deadline: Duration,
    register: impl FnOnce(u64),
) -> Result<(u64, Bi, Ready)> {
    // A peer that grants no stream or no credit is as silent as one that does not answer.
    let opened = timeout(deadline, connection.open_bi()).await.map_err(|_| Error::from(StreamError::TimedOut))?;
    let (send, receive) = opened.map_err(StreamError::from)?;
    let handle = quinn::VarInt::from(send.id()).into_inner();
    register(handle);
    let (mut reader, mut writer) = (MessageReader::new(receive), MessageWriter::new(send));
    let mut head = BytesMut::new();
    head.put_u8(StreamType::Control as u8);
    hello().put(&mut head);
    request.put(&mut head);
    writer.write_chunks(&mut [head.freeze()], deadline).await?;
    let answer = async {
        reader.read::<Hello>().await?;
        let frame = reader.frame(Refused::LIMIT).await?.ok_or(StreamError::Ended)?;
        match frame.kind {
            Refused::TYPE => {
                let refused: Refused = frame.decode().map_err(StreamError::from)?;
                Err(Error::from(Why::from(refused.why)))
            }
            _ => Ok(frame.decode::<Ready>().map_err(StreamError::from)?),
        }
    };
    let ready = timeout(deadline, answer).await.map_err(|_| Error::from(StreamError::TimedOut))??;
    Ok((handle, (reader, writer), ready))
}

fn hello() -> Hello {
    Hello { features: Vec::new(), agent: concat!("haul/", env!("CARGO_PKG_VERSION")).into() }
}

/// What a sender brings to a session, whichever end it is.
pub(crate) struct Outgoing {
    pub(crate) connection: Connection,
    pub(crate) trees: Vec<Tree>,
    /// Sources that could not even be looked at.
    pub(crate) unsendable: Vec<(RelativePath, Why)>,
    pub(crate) parallel: usize,
    pub(crate) config: Config,
    pub(crate) observer: Observer,
}

/// The client's side of a push.
pub(crate) async fn push(outgoing: Outgoing, push: &Push) -> Result<Outcome> {
    let (handle, control, ready) = request(&outgoing.connection, push, outgoing.config.deadline, |_| {}).await?;
    send_all(outgoing, handle, control, ready, &CancellationToken::new()).await
}

/// The client's side of a pull.
pub(crate) async fn pull(
    connection: &Connection,
    pull: &Pull,
    sessions: &Arc<Sessions>,
    receiver: Arc<Receiver>,
    config: &Config,
) -> Result<Summary> {
    let mut registration = None;
    let register = |handle| registration = Some(sessions.register(handle, receiver.clone()));
    let (_, control, _) = request(connection, pull, config.deadline, register).await?;
    let registration = registration.ok_or_else(|| Error::Protocol("no session".into()))?;
    receive_all(registration, receiver, control, config.deadline, &CancellationToken::new()).await
}

/// Sends everything, then [`End`], and reads the [`Summary`].
async fn send_all(
    outgoing: Outgoing,
    handle: u64,
    (mut reader, mut writer): Bi,
    ready: Ready,
    own_stop: &CancellationToken,
) -> Result<Outcome> {
    let stopping = own_stop.child_token();
    let (deadline, observer) = (outgoing.config.deadline, outgoing.observer.clone());
    let sending = Sending {
        connection: outgoing.connection,
        handle,
        ready,
        parallel: outgoing.parallel,
        deadline,
        observer: outgoing.observer,
        stopping: stopping.clone(),
    };
    let mut away = None;
    let mut sent = {
        let work = send(sending, outgoing.trees, outgoing.unsendable);
        tokio::pin!(work);
        loop {
            tokio::select! {
                sent = &mut work => break sent?,
                frame = timeout(deadline, reader.frame(GoAway::LIMIT)) => {
                    if let Some(why) = aside(frame.map_err(|_| StreamError::TimedOut)??)? {
                        observer(Event::GoingAway { why: why.clone() });
                        away = Some(why);
                        stopping.cancel();
                    }
                }
            }
        }
    };
    sent.interrupted = away.or(sent.interrupted);
    writer.write_within(&End { entries: sent.entries, failed: sent.failed }, deadline).await?;
    writer.finish();
    loop {
        let frame = timeout(deadline, reader.frame(GoAway::LIMIT)).await.map_err(|_| StreamError::TimedOut)??;
        match frame {
            Some(frame) if frame.kind == Summary::TYPE => {
                return Ok(Outcome { sent, summary: frame.decode().map_err(StreamError::from)? });
            }
            frame => drop(aside(frame)?),
        }
    }
}

/// What the receiver may say beside the work: that it goes away, or that it is alive.
fn aside(frame: Option<Frame>) -> Result<Option<Why>> {
    let frame = frame.ok_or(StreamError::Ended)?;
    Ok(match frame.kind {
        Working::TYPE => frame.decode::<Working>().map(|_| None),
        _ => frame.decode::<GoAway>().map(|away| Some(away.why.into())),
    }
    .map_err(StreamError::from)?)
}

/// Receives until the sender has ended, and writes the [`Summary`].
async fn receive_all(
    mut registration: Registration,
    receiver: Arc<Receiver>,
    (mut reader, mut writer): Bi,
    deadline: Duration,
    stopping: &CancellationToken,
) -> Result<Summary> {
    let (entries, verdicts) = timeout(deadline, &mut registration.manifest)
        .await
        .map_err(|_| StreamError::TimedOut)?
        .map_err(|_| StreamError::Ended)?;
    let work = async {
        // Either failure ends the session: a peer that breaks the protocol on one stream may never end the other.
        tokio::try_join!(receiver.run(entries, verdicts), async { Ok(reader.read::<End>().await?) })?;
        Ok::<_, Error>(())
    };
    tokio::pin!(work);
    let mut said = false;
    loop {
        tokio::select! {
            done = &mut work => break done?,
            () = stopping.cancelled(), if !said => {
                said = true;
                writer.write_within(&GoAway { why: Why::from(Code::Stopping).into() }, deadline).await?;
            }
            // An entry may wait long for its turn; only this tells the sender that somebody is there.
            () = sleep(WORKING) => writer.write_within(&Working {}, deadline).await?,
        }
    }
    let summary = receiver.summary();
    tokio::pin!(summary);
    let summary = loop {
        match timeout(WORKING, &mut summary).await {
            Ok(summary) => break summary.map_err(Error::Refused)?,
            Err(_) => writer.write_within(&Working {}, deadline).await?,
        }
    };
    writer.write_within(&summary, deadline).await?;
    writer.finish();
    Ok(summary)
}

/// Serves one control stream: hello, request, and the session it asks for if there is room for one.
pub(crate) async fn serve(server: &ServerSession, handle: u64, (mut reader, mut writer): Bi, room: bool) -> Result<()> {
    let deadline = server.config.deadline;
    let frame = async {
        reader.read::<Hello>().await?;
        reader.frame(Pull::LIMIT).await?.ok_or(StreamError::Ended)
    };
    let frame = timeout(deadline, frame).await.map_err(|_| StreamError::TimedOut)??;
    writer.write_within(&hello(), deadline).await?;
    match frame.kind {
        _ if !room => refuse(server, writer, Why::new(Code::Busy, "too many sessions on this connection")).await,
        Push::TYPE => {
            let push: Push = frame.decode().map_err(StreamError::from)?;
            serve_push(server, handle, push, (reader, writer)).await
        }
        Pull::TYPE => {
            let pull: Pull = frame.decode().map_err(StreamError::from)?;
            serve_pull(server, handle, pull, (reader, writer)).await
        }
        _ => refuse(server, writer, Why::new(Code::Unsupported, "this server does not know the request")).await,
    }
}

/// The server's surroundings of a session.
pub(crate) struct ServerSession {
    pub(crate) connection: Connection,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) may_read: bool,
    pub(crate) may_write: bool,
    pub(crate) config: Config,
    pub(crate) observer: Observer,
    pub(crate) stopping: CancellationToken,
    /// Makes the receiver of a push whose place is settled.
    pub(crate) receiver: MakeReceiver,
}

/// Makes the receiver of a push whose place is settled.
pub(crate) type MakeReceiver = Box<dyn Fn(&Push, Place) -> Arc<Receiver> + Send + Sync>;

async fn serve_push(server: &ServerSession, handle: u64, push: Push, (reader, mut writer): Bi) -> Result<()> {
    if !server.may_write {
        return refuse(server, writer, Why::new(Code::NotAllowed, "this key may not write on this server")).await;
    }
    if server.stopping.is_cancelled() {
        return refuse(server, writer, Code::Stopping.into()).await;
    }
    let (store, asked) = (server.store.clone(), push.clone());
    let settled = tokio::task::spawn_blocking(move || settle(&*store, &asked)).await;
    let place = match settled.unwrap_or_else(|_| Err(Code::Internal.into())) {
        Ok(place) => place,
        Err(why) => return refuse(server, writer, why).await,
    };
    tracing::info!(id = %hex(&push.session), ?place, "push");
    let shown = match &place {
        Place::Into(path) | Place::As(path) => Some(path.into()),
        Place::Only(_) => None,
    };
    let receiver = (server.receiver)(&push, place);
    let registration = server.sessions.register(handle, receiver.clone());
    writer.write_within(&ready(shown), server.config.deadline).await?;
    let bi = (reader, writer);
    let summary = receive_all(registration, receiver, bi, server.config.deadline, &server.stopping).await?;
    let Summary { committed, bytes, skipped, failed, .. } = summary;
    tracing::info!(committed, bytes, skipped, failed, "done");
    Ok(())
}

/// The answer to a push. The place is for people only: one so long that it would not fit stays out.
fn ready(place: Option<Components>) -> Ready {
    let ready = Ready { entries: MAX_UNANSWERED, entry_bytes: MAX_UNANSWERED_BYTES, place };
    if ready.fits() { ready } else { Ready { place: None, ..ready } }
}

async fn serve_pull(server: &ServerSession, handle: u64, pull: Pull, (reader, mut writer): Bi) -> Result<()> {
    if !server.may_read {
        return refuse(server, writer, Why::new(Code::NotAllowed, "this key may not read on this server")).await;
    }
    let ready = Ready { entries: pull.entries, entry_bytes: pull.entry_bytes, place: None };
    let store = server.store.clone();
    let trees = tokio::task::spawn_blocking(move || trees(&store, &pull)).await;
    let trees = match trees.unwrap_or_else(|_| Err(Code::Internal.into())) {
        Ok(trees) => trees,
        Err(why) => return refuse(server, writer, why).await,
    };
    writer.write_within(&Ready::default(), server.config.deadline).await?;
    let outgoing = Outgoing {
        connection: server.connection.clone(),
        trees,
        unsendable: Vec::new(),
        parallel: server.config.parallel,
        config: server.config.clone(),
        observer: server.observer.clone(),
    };
    send_all(outgoing, handle, (reader, writer), ready, &server.stopping).await.map(drop)
}

async fn refuse(server: &ServerSession, mut writer: MessageWriter, why: Why) -> Result<()> {
    writer.write_within(&Refused { why: why.into() }, server.config.deadline).await?;
    writer.finish();
    Ok(())
}

/// Settles where the sources of a push come to stand, once for the session, such that a rerun is the same command: a
/// directory becomes exactly what was named, unless that is the served root, ends in `/`, or there are several sources;
/// a file goes into a directory that is there. Blocks.
fn settle(store: &dyn Store, push: &Push) -> Result<Place, Why> {
    let destination = RelativePath::from_components(&push.destination.0)?;
    if destination.is_root() {
        return Ok(Place::Into(destination));
    }
    let there = store.stat(&destination)?.map(|metadata| metadata.kind);
    let is_directory = there == Some(Some(Kind::Directory));
    let into = push.into || push.sources > 1 || (is_directory && !push.directory);
    if (into || push.directory) && there.is_some() && !is_directory {
        return Err(refusal(Code::NotDirectory, &destination));
    }
    Ok(if into { Place::Into(destination) } else { Place::As(destination) })
}

/// What a pull asks for, as trees. Blocks.
fn trees(store: &Arc<dyn Store>, pull: &Pull) -> Result<Vec<Tree>, Why> {
    let tree = |components: &crate::wire::Components| {
        let path = RelativePath::from_components(&components.0)?;
        let name = path.name().ok_or_else(|| Why::new(Code::BadName, "the served directory has no name"))?.to_vec();
        let there = store.stat(&path)?.ok_or_else(|| Why::new(Code::NotFound, format!("{path} is not there")))?;
        Ok(Tree { store: store.clone(), path, name, directory: there.kind == Some(Kind::Directory) })
    };
    pull.sources.iter().map(tree).collect()
}

fn hex(id: &[u8; 16]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;
    use crate::wire::{Components, Durability};

    fn place(destination: &str, into: bool, sources: u32, directory: bool) -> Result<Place, Code> {
        let store = MemoryStore::new();
        let path = |name: &str| RelativePath::from_components(name.split('/').filter(|c| !c.is_empty())).unwrap();
        store.make_directory(&path("dir")).unwrap();
        let claim = crate::store::Claim { owner: [0; 32], size: 0, modified: None };
        store.create(&path("file"), &claim).unwrap().commit(&Default::default(), Durability::Visible).unwrap();
        let destination = Components::from(&path(destination));
        let push = Push { session: [0; 16], destination, into, sources, directory, durability: Durability::Visible };
        settle(&store, &push).map_err(|why| why.code)
    }

    #[test]
    fn placement_is_such_that_a_rerun_is_the_same_command() {
        let path = |name: &str| RelativePath::from_components([name]).unwrap();
        let (as_, into) = (|name| Ok(Place::As(path(name))), |name| Ok(Place::Into(path(name))));
        // A directory becomes exactly what was named, there or not.
        assert_eq!(place("new", false, 1, true), as_("new"));
        assert_eq!(place("dir", false, 1, true), as_("dir"));
        assert_eq!(place("dir", true, 1, true), into("dir"));
        assert_eq!(place("new", false, 2, false), into("new"));
        assert_eq!(place("", false, 1, true), Ok(Place::Into(RelativePath::root())));
        // A file goes into a directory that is there, else becomes what was named.
        assert_eq!(place("new", false, 1, false), as_("new"));
        assert_eq!(place("file", false, 1, false), as_("file"));
        assert_eq!(place("dir", false, 1, false), into("dir"));
        assert_eq!(place("new", true, 1, false), into("new"));
        // Nothing goes into a file, and no directory takes a file's place.
        assert_eq!(place("file", true, 1, false), Err(Code::NotDirectory));
        assert_eq!(place("file", false, 2, false), Err(Code::NotDirectory));
        assert_eq!(place("file", false, 1, true), Err(Code::NotDirectory));
    }
}
