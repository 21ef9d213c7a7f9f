//! The server's side of a session: what is asked for, whether it may be, and where it goes.

use std::sync::Arc;

use quinn::Connection;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{Bi, Sessions, hello, receive_all, send_all};
use crate::bucket::{Bucket, Limits};
use crate::config::Config;
use crate::error::{Code, Error, Result, Why};
use crate::manifest::{MAX_UNANSWERED, MAX_UNANSWERED_BYTES, Tree, WalkOptions};
use crate::path::RelativePath;
use crate::progress::Observer;
use crate::rate::Rate;
use crate::receiver::{Claims, Place, Receiver};
use crate::sender::{Allowed, Sender, Sending};
use crate::store::Store;
use crate::store::fault::refusal;
use crate::stream::{MessageWriter, StreamError, varint_of};
use crate::wire::{Components, Hello, Kind, Message, Pull, Push, Ready, Refused, Summary};

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
    /// The client's key.
    pub(crate) owner: [u8; 32],
    /// The pushes that run, by session id, over all connections.
    pub(crate) pushes: Arc<Claims<[u8; 16]>>,
    pub(crate) may_read: bool,
    pub(crate) may_write: bool,
    pub(crate) config: Config,
    /// The limit of all that this server sends.
    pub(crate) limit: Option<Arc<Bucket>>,
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
    // The client has come back over another connection: the one before is dead, and holds nothing up from here on.
    let claim = match server.pushes.take(server.owner, &push.session, server.pushes.age()).await {
        Ok(claim) => claim,
        Err(why) => return refuse(server, writer, why).await,
    };
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
    let received = receive_all(registration, receiver, (reader, writer), server.config.deadline, &server.stopping);
    let summary = tokio::select! {
        received = received => received?,
        () = claim.superseded() => {
            let why = Why::new(Code::Superseded, "the session goes on over another connection");
            server.connection.close(varint_of(why.code), why.text.as_bytes());
            return Err(Error::Refused(why));
        }
    };
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
    let allowed = Allowed::by(&Ready { entries: pull.entries, entry_bytes: pull.entry_bytes, place: None });
    let asked = pull.limit.and_then(Rate::from_bytes).map(|rate| Arc::new(Bucket::new(rate)));
    let store = server.store.clone();
    let trees = tokio::task::spawn_blocking(move || trees(&store, &pull)).await;
    let trees = match trees.unwrap_or_else(|_| Err(Code::Internal.into())) {
        Ok(trees) => trees,
        Err(why) => return refuse(server, writer, why).await,
    };
    writer.write_within(&Ready::default(), server.config.deadline).await?;
    let mut sender =
        Sender::new(trees, Vec::new(), WalkOptions::default(), server.config.parallel, server.observer.clone());
    let sending = Sending {
        connection: server.connection.clone(),
        handle,
        allowed: Arc::new(allowed),
        // First its own, so that it does not hold up other sessions.
        limits: Limits::new(asked.into_iter().chain(server.limit.clone())),
        deadline: server.config.deadline,
        meter: Arc::default(),
        // A server that stops announces nothing new.
        stopping: server.stopping.child_token(),
        all_sent: CancellationToken::new(),
    };
    send_all(&mut sender, sending, async { Ok(reader) }, writer).await.map(drop)
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
        let push = Push {
            session: [0; 16],
            destination,
            into,
            sources,
            directory,
            durability: Durability::Visible,
            take: None,
        };
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
