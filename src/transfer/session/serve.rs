//! The server side of a session: reads the request, checks permissions, and decides the placement.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::{Connection, ConnectionError};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::nesting;
use super::sources::{self, FoundSources};
use super::{Outcome, Sessions, hello, list, receive_all, send_all};
use crate::auth::Guests;
use crate::auth::identity::KeyId;
use crate::config::Config;
use crate::error::{Code, Error, Reason, Result};
use crate::net::rate_limit::{RateLimits, TokenBucket};
use crate::net::stream::{MessageStream, MessageWriter, StreamError, varint_of};
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
use crate::transfer::blocking::blocking;
use crate::transfer::events::Observer;
use crate::transfer::receive::{Claimant, FileLocks, Placement, Receiver, Sources};
use crate::transfer::sampler::Sampler;
use crate::transfer::send::{Allowed, Sender, Sending, TransferStats};

/// Time between two samples of a pull. A server may have many sessions; a client samples more often.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// Serves one control stream: hello, request, and the requested session if `room` allows one more.
pub(crate) async fn serve(
    server: &ServerSession,
    control: MessageStream,
    room: bool,
) -> Result<()> {
    let MessageStream {
        mut reader,
        mut writer,
    } = control;
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
                Reason::new(
                    Code::Busy,
                    "too many sessions on this connection; try again later",
                ),
            )
            .await
        }
        Push::TYPE => {
            let push: Push = frame.decode().map_err(StreamError::from)?;
            serve_push(server, push, MessageStream { reader, writer }).await
        }
        Pull::TYPE => {
            let pull: Pull = frame.decode().map_err(StreamError::from)?;
            serve_pull(server, pull, MessageStream { reader, writer }).await
        }
        List::TYPE => {
            let list: List = frame.decode().map_err(StreamError::from)?;
            list::serve(server, list, MessageStream { reader, writer }).await
        }
        _ => {
            refuse(
                server,
                writer,
                Reason::new(
                    Code::Unsupported,
                    "this server does not know the request; update haul on the server",
                ),
            )
            .await
        }
    }
}

/// The context of a session at the server.
pub(crate) struct ServerSession {
    pub(crate) connection: Connection,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) store: Arc<dyn Store>,
    /// Content that is sent instead of the store.
    pub(crate) offered: Option<Arc<OfferedContent>>,
    /// The client's key.
    pub(crate) owner: [u8; 32],
    /// Running pushes by session id, over all connections.
    pub(crate) pushes: Arc<FileLocks<[u8; 16]>>,
    pub(crate) may_read: bool,
    pub(crate) may_write: bool,
    pub(crate) config: Config,
    /// Limits the listings.
    pub(crate) listings: Arc<Semaphore>,
    /// The rate limit of everything that this server sends.
    pub(crate) limit: Option<Arc<TokenBucket>>,
    pub(crate) observer: Observer,
    pub(crate) stopping: CancellationToken,
    /// Creates the receiver of a push after its placement is decided.
    pub(crate) receiver: MakeReceiver,
}

/// Content that a server offers instead of a store to peers that may read.
pub struct OfferedContent {
    /// The content.
    pub content: OfferedSource,
    /// Options for announcing the content.
    pub walk: WalkOptions,
    /// The peers that may receive it, checked at each request and not when they connected.
    pub guests: Arc<Guests>,
    /// Receives the events of the offer, with the key id of the peer.
    pub told: mpsc::Sender<(KeyId, OfferEvent)>,
}

/// Events of an offer. Each session has one connection.
pub enum OfferEvent {
    /// A session has begun.
    Begun {
        /// The peer's address.
        from: SocketAddr,
    },
    /// A started session has ended.
    Ended(Result<Box<Outcome>>),
}

/// The content of an offer.
pub enum OfferedSource {
    /// Files and directories by their names.
    Trees(Vec<Tree>),
    /// The data of a pipe, under a name; it can be sent once.
    Pipe(Vec<u8>, Arc<Pipe>),
}

impl OfferedContent {
    /// Selects the requested content. The user at the sender has chosen it; the client only chooses whether to compare
    /// by content.
    fn look(
        &self,
        pull: &Pull,
        parallel: usize,
        observer: Observer,
    ) -> Result<(Ready, Sender), Reason> {
        let asked = |name: &[u8]| pull.sources.iter().any(|source| source.0 == [name]);
        let nothing = || Reason::new(Code::NotFound, "nothing with this name is offered");
        match &self.content {
            OfferedSource::Pipe(name, _) if !asked(name) => Err(nothing()),
            OfferedSource::Pipe(_, pipe) if pipe.is_spent() => Err(Reason::new(
                Code::Unreadable,
                "cannot send the data of a pipe a second time; the sender must run haul send again",
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

/// Returns the answer to a pull, and its sender.
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

/// Creates the receiver of a push from its placement and the filter of paths that a mirror keeps.
pub(crate) type MakeReceiver = Box<dyn Fn(&Push, Placement, Filter) -> Arc<Receiver> + Send + Sync>;

async fn serve_push(server: &ServerSession, push: Push, control: MessageStream) -> Result<()> {
    let MessageStream { reader, mut writer } = control;
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
    // The client has reconnected. Its earlier connection is dead and must release its locks.
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
    let settled = blocking("settle the destination", move || settle(&*store, &asked)).await;
    let (place, spared) = match settled {
        Ok(settled) => settled,
        Err(why) => return refuse(server, writer, why).await,
    };
    tracing::info!(id = %hex(&push.session), ?place, "push");
    let (Placement::Into(shown) | Placement::As(shown)) = &place;
    let ready = ready(shown.into());
    let receiver = (server.receiver)(&push, place, spared);
    let registration = server.sessions.register(reader.id());
    writer.write_within(&ready, server.config.deadline).await?;
    let received = receive_all(
        registration,
        receiver,
        MessageStream { reader, writer },
        server.config.deadline,
        &server.stopping,
    );
    let (summary, delivered) = tokio::select! {
        received = received => received?,
        () = claim.superseded() => {
            let why = Reason::new(Code::Superseded, "the session continues over another connection");
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
    // A stopping server closes the connection when no session runs, which would discard undelivered data.
    let _ = timeout(server.config.deadline, delivered).await;
    Ok(())
}

/// Checks whether the client may use these options.
fn permitted(server: &ServerSession, take: &ReceiveOptions) -> Result<(), Reason> {
    let text = match take {
        ReceiveOptions {
            delete: Some(_), ..
        } if !server.config.allow_delete => {
            "this server removes nothing; start it with --allow-delete"
        }
        // A comparison and the list of removed paths reveal what the store holds.
        ReceiveOptions { checksum: true, .. }
        | ReceiveOptions {
            delete: Some(_), ..
        } if !server.may_read => {
            "this key may not read on this server, so it can neither compare content nor mirror"
        }
        _ => return Ok(()),
    };
    Err(Reason::new(Code::NotAllowed, text))
}

/// Returns the answer to a push. The place is only shown to people, and is left out if the message would be too long.
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

async fn serve_pull(server: &ServerSession, pull: Pull, control: MessageStream) -> Result<()> {
    let MessageStream { reader, mut writer } = control;
    let refused = match &server.offered {
        Some(offered) if offered.guests.has(KeyId(server.owner)) => None,
        Some(_) => Some("the offer was not accepted or has ended; run haul receive again"),
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
    let (ready, mut sender) = match blocking("find the sources", look).await {
        Ok(found_sources) => found_sources,
        Err(why) => return refuse(server, writer, why).await,
    };
    writer.write_within(&ready, server.config.deadline).await?;
    let sending = Sending {
        connection: server.connection.clone(),
        handle: reader.id(),
        allowed: Arc::new(allowed),
        // The limit of the client comes first, so that waiting for it does not delay other sessions.
        limits: RateLimits::new(asked.into_iter().chain(server.limit.clone())),
        deadline: server.config.deadline,
        meter: Arc::default(),
        // A stopping server announces nothing new.
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
    let sampler =
        Mutex::new(Sampler::begin(server.connection.clone(), sending.meter.clone()).await);
    let lock = || sampler.lock().unwrap_or_else(PoisonError::into_inner);
    let spent = || Some(lock().spent());
    let sampling = async {
        loop {
            tokio::time::sleep(SAMPLE_INTERVAL).await;
            lock().tick();
        }
    };
    let ended = tokio::select! {
        ended = send_all(&mut sender, sending, async { Ok(reader) }, spent, writer) => ended,
        () = sampling => return Ok(()),
    };
    let ended = match (ended, server.connection.close_reason()) {
        // The close of the client has overtaken its summary: quinn discards unread data.
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
    let sampler = sampler.into_inner().unwrap_or_else(PoisonError::into_inner);
    if ended.is_ok() {
        // The guest has everything and waits for this close. Closing from its side would discard data that is unread
        // here.
        server.connection.close(varint_of(Code::Done), b"");
    }
    // Fails only if the receiving end is gone.
    let _ = offered
        .told
        .send((
            KeyId(server.owner),
            OfferEvent::Ended(outcome(sampler, sent, ended).await.map(Box::new)),
        ))
        .await;
    Ok(())
}

/// Returns the outcome of a session for the sender.
async fn outcome(sampler: Sampler, sent: TransferStats, ended: Result<Summary>) -> Result<Outcome> {
    let summary = ended?;
    let (path, account) = sampler
        .end(summary.held_up.map(Duration::from_millis))
        .await;
    let mut outcome = Outcome {
        sent,
        summary,
        ..Outcome::default()
    };
    outcome.saw(&path, &account);
    outcome.bound = outcome.account.bound();
    Ok(outcome)
}

/// Returns the walk options of a pull.
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
    // A stopping server closes the connection when no session runs.
    writer.deliver(server.config.deadline).await;
    Ok(())
}

/// Decides the placement of a push, and the filter of paths that a mirror keeps. Blocks.
fn settle(store: &dyn Store, push: &Push) -> Result<(Placement, Filter), Reason> {
    store.check_root()?;
    let destination = RelativePath::from_components(&push.destination.0)?;
    let mirror = push.take.is_some_and(|take| take.delete.is_some());
    if mirror && (push.sources != 1 || !push.directory) {
        return Err(Reason::new(
            Code::NotDirectory,
            "cannot mirror: a mirror needs exactly one directory",
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
