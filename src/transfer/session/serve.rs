//! The server's side of a session: what is asked for, whether it may be, and where it goes.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::{Connection, ConnectionError};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::nesting;
use super::sources::{self, FoundSources};
use super::{Bi, Outcome, Sessions, hello, list, receive_all, send_all};
use crate::auth::Guests;
use crate::auth::identity::KeyId;
use crate::config::Config;
use crate::error::{Code, Error, Reason, Result};
use crate::net::rate_limit::{RateLimits, TokenBucket};
use crate::net::stream::{MessageWriter, StreamError, varint_of};
use crate::protocol::path::RelativePath;
use crate::protocol::rate::Rate;
use crate::protocol::{
    Components, Hello, Kind, List, Message, Pull, Push, Ready, ReceiveOptions, Refused, Summary,
    WireFilter,
};
use crate::protocol::{MAX_UNANSWERED, MAX_UNANSWERED_BYTES};
use crate::storage::Store;
use crate::storage::filter::{Filter, Rules};
use crate::storage::pipe::Pipe;
use crate::storage::walk::{Follow, Tree, WalkOptions};
use crate::transfer::events::Observer;
use crate::transfer::receive::{Claimant, FileLocks, Placement, Receiver, Sources};
use crate::transfer::sampler::Sampler;
use crate::transfer::send::{Allowed, Sender, Sending, TransferStats};

/// Time between two samples of where a pull stands. There may be many; a client samples its own more often.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// Serves one control stream: hello, request, and the session it asks for if there is room for one.
pub(crate) async fn serve(
    server: &ServerSession,
    handle: u64,
    (mut reader, mut writer): Bi,
    room: bool,
) -> Result<()> {
    let deadline = server.config.deadline;
    let frame = async {
        reader.read::<Hello>().await?;
        reader.frame(Pull::LIMIT).await?.ok_or(StreamError::Ended)
    };
    let frame = timeout(deadline, frame)
        .await
        .map_err(|_| StreamError::TimedOut)??;
    writer.write_within(&hello(), deadline).await?;
    match frame.kind {
        _ if !room => {
            refuse(
                server,
                writer,
                Reason::new(Code::Busy, "too many sessions on this connection"),
            )
            .await
        }
        Push::TYPE => {
            let push: Push = frame.decode().map_err(StreamError::from)?;
            serve_push(server, handle, push, (reader, writer)).await
        }
        Pull::TYPE => {
            let pull: Pull = frame.decode().map_err(StreamError::from)?;
            serve_pull(server, handle, pull, (reader, writer)).await
        }
        List::TYPE => {
            let list: List = frame.decode().map_err(StreamError::from)?;
            list::serve(server, list, (reader, writer)).await
        }
        _ => {
            refuse(
                server,
                writer,
                Reason::new(Code::Unsupported, "this server does not know the request"),
            )
            .await
        }
    }
}

/// The server's surroundings of a session.
pub(crate) struct ServerSession {
    pub(crate) connection: Connection,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) store: Arc<dyn Store>,
    /// What is sent in the place of what the store has.
    pub(crate) offered: Option<Arc<OfferedContent>>,
    /// The client's key.
    pub(crate) owner: [u8; 32],
    /// The pushes that run, by session id, over all connections.
    pub(crate) pushes: Arc<FileLocks<[u8; 16]>>,
    pub(crate) may_read: bool,
    pub(crate) may_write: bool,
    pub(crate) config: Config,
    /// Bounds the listings.
    pub(crate) listings: Arc<Semaphore>,
    /// The limit of all that this server sends.
    pub(crate) limit: Option<Arc<TokenBucket>>,
    pub(crate) observer: Observer,
    pub(crate) stopping: CancellationToken,
    /// Makes the receiver of a push whose place is settled.
    pub(crate) receiver: MakeReceiver,
}

/// What a server sends to whoever may read, in the place of a store.
pub struct OfferedContent {
    /// What there is.
    pub content: OfferedSource,
    /// What is announced of them.
    pub walk: WalkOptions,
    /// Who may have it, now and not when it connected.
    pub guests: Arc<Guests>,
    /// Takes what becomes of it, and who it is that takes it.
    pub told: mpsc::Sender<(KeyId, OfferEvent)>,
}

/// What becomes of an offer. Each session has one connection.
pub enum OfferEvent {
    /// A session has begun.
    Begun {
        /// Where it is asked for.
        from: SocketAddr,
    },
    /// One that had begun has ended.
    Ended(Result<Box<Outcome>>),
}

/// What is offered.
pub enum OfferedSource {
    /// Files and directories, by their names.
    Trees(Vec<Tree>),
    /// What comes out of a pipe, under a name; once.
    Pipe(Vec<u8>, Arc<Pipe>),
}

impl OfferedContent {
    /// What is asked for of it. The sender's user has said what goes; the client only whether to compare.
    fn look(
        &self,
        pull: &Pull,
        parallel: usize,
        observer: Observer,
    ) -> Result<(Ready, Sender), Reason> {
        let asked = |name: &[u8]| pull.sources.iter().any(|source| source.0 == [name]);
        let nothing = || Reason::new(Code::NotFound, "nothing of that name is offered");
        match &self.content {
            OfferedSource::Pipe(name, _) if !asked(name) => Err(nothing()),
            OfferedSource::Pipe(_, pipe) if pipe.is_spent() => Err(Reason::new(
                Code::Unreadable,
                "what comes out of a pipe cannot be sent a second time",
            )),
            OfferedSource::Pipe(name, pipe) => {
                let sender = Sender::of_pipe(name, pipe.clone(), observer)?;
                Ok((
                    Ready {
                        only: Some(Kind::File),
                        ..Ready::default()
                    },
                    sender,
                ))
            }
            OfferedSource::Trees(trees) => {
                let trees: Vec<_> = trees
                    .iter()
                    .filter(|tree| asked(&tree.name))
                    .cloned()
                    .collect();
                let only = match &trees[..] {
                    [] => return Err(nothing()),
                    [one] => Some(if one.directory {
                        Kind::Directory
                    } else {
                        Kind::File
                    }),
                    _ => None,
                };
                let walk = WalkOptions {
                    checksum: pull.checksum.unwrap_or(false),
                    ..self.walk.clone()
                };
                let found_sources = FoundSources {
                    only,
                    trees,
                    unsendable: Vec::new(),
                };
                Ok(found(found_sources, walk, pull, parallel, observer))
            }
        }
    }
}

/// The answer to a pull, and who sends.
fn found(
    found_sources: FoundSources,
    walk: WalkOptions,
    pull: &Pull,
    parallel: usize,
    observer: Observer,
) -> (Ready, Sender) {
    let FoundSources {
        trees,
        unsendable,
        only,
    } = found_sources;
    let ready = Ready {
        only,
        origin: nesting::origin(&trees, &pull.session),
        ..Ready::default()
    };
    (
        ready,
        Sender::new(trees, unsendable, walk, parallel, observer),
    )
}

/// Makes the receiver of a push whose place is settled, as is what it spares.
pub(crate) type MakeReceiver = Box<dyn Fn(&Push, Placement, Filter) -> Arc<Receiver> + Send + Sync>;

async fn serve_push(
    server: &ServerSession,
    handle: u64,
    push: Push,
    (reader, mut writer): Bi,
) -> Result<()> {
    if !server.may_write {
        return refuse(
            server,
            writer,
            Reason::new(Code::NotAllowed, "this key may not write on this server"),
        )
        .await;
    }
    if server.stopping.is_cancelled() {
        return refuse(server, writer, Code::Stopping.into()).await;
    }
    if let Err(why) = permitted(server, &push.take.unwrap_or_default()) {
        return refuse(server, writer, why).await;
    }
    // The client has come back over another connection: the one before is dead, and holds nothing up from here on.
    let claimant = Claimant {
        session: push.session,
        age: server.pushes.age(),
        window: None,
        stall: server.config.stall,
    };
    let claim = match server
        .pushes
        .take(server.owner, &push.session, &claimant)
        .await
    {
        Ok(claim) => claim,
        Err(why) => return refuse(server, writer, why).await,
    };
    let store = server.store.clone();
    let asked = push.clone();
    let settled = tokio::task::spawn_blocking(move || settle(&*store, &asked)).await;
    let (place, spared) = match settled.unwrap_or_else(|_| Err(Code::Internal.into())) {
        Ok(settled) => settled,
        Err(why) => return refuse(server, writer, why).await,
    };
    tracing::info!(id = %hex(&push.session), ?place, "push");
    let (Placement::Into(shown) | Placement::As(shown)) = &place;
    let ready = ready(shown.into());
    let receiver = (server.receiver)(&push, place, spared);
    let registration = server.sessions.register(handle);
    writer.write_within(&ready, server.config.deadline).await?;
    let received = receive_all(
        registration,
        receiver,
        (reader, writer),
        server.config.deadline,
        &server.stopping,
    );
    let (summary, delivered) = tokio::select! {
        received = received => received?,
        () = claim.superseded() => {
            let why = Reason::new(Code::Superseded, "the session goes on over another connection");
            server.connection.close(varint_of(why.code), why.text.raw().as_bytes());
            return Err(Error::Refused(why));
        }
    };
    let Summary {
        committed,
        bytes,
        skipped,
        failed,
        ..
    } = summary;
    tracing::info!(committed, bytes, skipped, failed, "done");
    // A server that stops closes the connection once no session runs, and what is under way then is lost.
    let _ = timeout(server.config.deadline, delivered).await;
    Ok(())
}

/// Whether the client may ask for entries to be taken so.
fn permitted(server: &ServerSession, take: &ReceiveOptions) -> Result<(), Reason> {
    let text = match take {
        ReceiveOptions {
            delete: Some(_), ..
        } if !server.config.allow_delete => {
            "this server removes nothing: it was not started with --allow-delete"
        }
        // Whether a guess is right, and what is removed, tell of what stands there.
        ReceiveOptions { checksum: true, .. }
        | ReceiveOptions {
            delete: Some(_), ..
        } if !server.may_read => {
            "this key may not read on this server, so it may neither compare with what is there nor mirror"
        }
        _ => return Ok(()),
    };
    Err(Reason::new(Code::NotAllowed, text))
}

/// The answer to a push. The place is for people only: one so long that it would not fit stays out.
fn ready(place: Components) -> Ready {
    let ready = Ready {
        entries: MAX_UNANSWERED,
        entry_bytes: MAX_UNANSWERED_BYTES,
        place: Some(place),
        ..Ready::default()
    };
    if ready.fits() {
        ready
    } else {
        Ready {
            place: None,
            ..ready
        }
    }
}

async fn serve_pull(
    server: &ServerSession,
    handle: u64,
    pull: Pull,
    (reader, mut writer): Bi,
) -> Result<()> {
    let refused = match &server.offered {
        Some(offered) if offered.guests.has(KeyId(server.owner)) => None,
        Some(_) => {
            Some("what is offered here was not accepted, or it is over; run haul receive again")
        }
        None if server.may_read => None,
        None => Some("this key may not read on this server"),
    };
    if let Some(text) = refused {
        return refuse(server, writer, Reason::new(Code::NotAllowed, text)).await;
    }
    if server.stopping.is_cancelled() {
        return refuse(server, writer, Code::Stopping.into()).await;
    }
    let allowed = Allowed::by(pull.entries, pull.entry_bytes);
    let asked = pull
        .limit
        .and_then(Rate::from_bytes)
        .map(|rate| Arc::new(TokenBucket::new(rate)));
    let store = server.store.clone();
    let offered = server.offered.clone();
    let parallel = server.config.parallel;
    let observer = server.observer.clone();
    tracing::info!(id = %hex(&pull.session), sources = pull.sources.len(), "pull");
    let look = move || match &offered {
        Some(offered) => offered.look(&pull, parallel, observer),
        None => {
            store.check_root()?;
            let found_sources = sources::look(&store, &pull.sources)?;
            Ok(found(
                found_sources,
                walk_options(&pull)?,
                &pull,
                parallel,
                observer,
            ))
        }
    };
    let found_sources = tokio::task::spawn_blocking(look).await;
    let (ready, mut sender) = match found_sources.unwrap_or_else(|_| Err(Code::Internal.into())) {
        Ok(found_sources) => found_sources,
        Err(why) => return refuse(server, writer, why).await,
    };
    writer.write_within(&ready, server.config.deadline).await?;
    let sending = Sending {
        connection: server.connection.clone(),
        handle,
        allowed: Arc::new(allowed),
        // First its own, so that it does not hold up other sessions.
        limits: RateLimits::new(asked.into_iter().chain(server.limit.clone())),
        deadline: server.config.deadline,
        meter: Arc::default(),
        // A server that stops announces nothing new.
        stopping: server.stopping.child_token(),
        all_sent: CancellationToken::new(),
    };
    if let Some(offered) = &server.offered {
        let from = server.connection.remote_address();
        let _ = offered
            .told
            .send((KeyId(server.owner), OfferEvent::Begun { from }))
            .await;
    }
    let watch = Mutex::new(Sampler::begin(server.connection.clone(), sending.meter.clone()).await);
    let lock = || watch.lock().unwrap_or_else(PoisonError::into_inner);
    let spent = || Some(lock().spent());
    let sampling = async {
        loop {
            tokio::time::sleep(SAMPLE_INTERVAL).await;
            lock().tick();
        }
    };
    let ended = tokio::select! {
        ended = send_all(&mut sender, sending, (async { Ok(reader) }, spent), writer) => ended,
        () = sampling => return Ok(()),
    };
    let ended = match (ended, server.connection.close_reason()) {
        // Its goodbye has overtaken its summary: quinn discards what was not read yet.
        (Err(_), Some(ConnectionError::ApplicationClosed(close)))
            if close.error_code == varint_of(Code::Done) && sender.is_settled() =>
        {
            Ok(Summary::default())
        }
        (ended, _) => ended,
    };
    let sent = sender.sent();
    if ended.is_ok() {
        let TransferStats {
            files,
            bytes,
            skipped,
            failed,
            ..
        } = sent;
        tracing::info!(committed = files, bytes, skipped, failed, "done");
    }
    let Some(offered) = &server.offered else {
        return ended.map(drop);
    };
    let watch = watch.into_inner().unwrap_or_else(PoisonError::into_inner);
    if ended.is_ok() {
        // A guest has what it came for, and waits for this: its own goodbye would discard what has not been read here.
        server.connection.close(varint_of(Code::Done), b"");
    }
    // Fails only when nobody waits for it any more.
    let _ = offered
        .told
        .send((
            KeyId(server.owner),
            OfferEvent::Ended(outcome(watch, sent, ended).await.map(Box::new)),
        ))
        .await;
    Ok(())
}

/// How a session has ended for the sender.
async fn outcome(watch: Sampler, sent: TransferStats, ended: Result<Summary>) -> Result<Outcome> {
    let summary = ended?;
    let (path, account) = watch.end(summary.held_up.map(Duration::from_millis)).await;
    let mut outcome = Outcome {
        sent,
        summary,
        ..Outcome::default()
    };
    outcome.saw(&path, &account);
    outcome.bound = outcome.account.bound();
    Ok(outcome)
}

/// How a pull wants the server to walk.
fn walk_options(pull: &Pull) -> Result<WalkOptions, Reason> {
    Ok(WalkOptions {
        filter: filter(pull.filter.as_ref())?,
        follow: if pull.follow == Some(true) {
            Follow::Within
        } else {
            Follow::Never
        },
        checksum: pull.checksum.unwrap_or(false),
        xattrs: pull.xattrs.unwrap_or(false),
        owner: pull.owner.unwrap_or(false),
        allow_growing: pull.growing.unwrap_or(false),
        ..WalkOptions::default()
    })
}

fn filter(asked: Option<&WireFilter>) -> Result<Filter, Reason> {
    let asked = asked.cloned().unwrap_or_default();
    let rules = Rules::new(asked.rules.into_iter().map(Vec::from).collect());
    let rules = rules.map_err(|bad| Reason::new(Code::Unsupported, bad.to_string()))?;
    Ok(Filter {
        rules,
        gitignore: asked.gitignore,
        only: None,
    })
}

pub(super) async fn refuse(
    server: &ServerSession,
    mut writer: MessageWriter,
    why: Reason,
) -> Result<()> {
    writer
        .write_within(&Refused { why: why.into() }, server.config.deadline)
        .await?;
    // A server that stops closes the connection once no session runs.
    writer.deliver(server.config.deadline).await;
    Ok(())
}

/// Settles where the sources of a push come to stand, and what a mirror spares there. Blocks.
fn settle(store: &dyn Store, push: &Push) -> Result<(Placement, Filter), Reason> {
    store.check_root()?;
    let destination = RelativePath::from_components(&push.destination.0)?;
    let mirror = push.take.is_some_and(|take| take.delete.is_some());
    if mirror && (push.sources != 1 || !push.directory) {
        return Err(Reason::new(
            Code::NotDirectory,
            "only one directory can be mirrored",
        ));
    }
    let sources = Sources {
        into: push.into,
        several: push.sources > 1,
        directory: push.directory,
        mirror,
    };
    let place = Placement::settle(store, destination, sources)?;
    nesting::check(store, &place, push.origin.as_ref(), &push.session, mirror)?;
    Ok((place, filter(push.filter.as_ref())?))
}

pub(super) fn hex(id: &[u8; 16]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}
