//! The client: connect, run a session.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use quinn::Connection;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::bucket::{Bucket, Limits};
use crate::budget::{Budget, Window};
use crate::config::Config;
use crate::endpoint::{self, Connected};
use crate::error::{Code, Error, Result, Why};
use crate::identity::{Identity, KeyId};
use crate::limits::within_open_files;
use crate::manifest::{MAX_UNANSWERED, MAX_UNANSWERED_BYTES, Tree};
use crate::measure::{self, MeasureOptions, Measured};
use crate::path::{RelativePath, printable};
use crate::progress::{Event, Observer};
use crate::rate::Rate;
use crate::receiver::{Permits, Place, Receiver, Receiving};
use crate::sender::Sent;
use crate::session::{self, Outcome, Outgoing, Sessions, accept_streams};
use crate::store::Store;
use crate::stream::varint_of;
use crate::trust::ServerTrust;
use crate::upkeep::{SendMemory, Upkeep};
use crate::wire::{Components, Durability, Message, Pull, Push, Summary};

/// How long closing waits for its last packet to go out.
const GOODBYE: Duration = Duration::from_secs(1);

/// A connection to a server.
pub struct Client {
    endpoint: quinn::Endpoint,
    connection: Connection,
    key_id: KeyId,
    sessions: Arc<Sessions>,
    window: Arc<Window>,
    config: Config,
    limits: Limits,
    streams: JoinHandle<()>,
    _upkeep: Upkeep,
}

/// What to send, where to, and how.
pub struct PushOptions {
    /// Local files and directories. Symbolic links among them are followed; those found in directories are not.
    pub sources: Vec<PathBuf>,
    /// Where below the served directory.
    pub destination: RelativePath,
    /// The destination is a directory to put the sources into, as a trailing `/` says.
    pub into: bool,
    /// How durable a commit has to be.
    pub durability: Durability,
}

impl Client {
    /// Connects to a server and makes sure that it is the right one.
    ///
    /// # Errors
    /// [`Error::Resolve`] and [`Error::Unreachable`] when no connection comes about;
    /// [`Error::UnknownHost`] at a first contact without a pin: if its key id is the right one,
    /// [`add`](crate::trust::known_hosts::add) it to the known hosts and connect again; [`Error::ChangedHost`], [`Error::WrongPin`] and
    /// [`Error::NotTrusted`] when it is another than it should be. Nothing was sent then.
    pub async fn connect(
        identity: &Identity,
        trust: &ServerTrust,
        host: &str,
        port: u16,
        config: &Config,
    ) -> Result<Self> {
        let Connected { endpoint, connection } = endpoint::connect(identity, trust, host, port, config).await?;
        let (key_id, _) = endpoint::peer(&connection)
            .ok_or_else(|| Error::NotTrusted { host: host.into(), why: "it presented no certificate".into() })?;
        let window = Window::open(connection.clone(), &Budget::new(config.memory))
            .ok_or_else(|| Error::Usage("no memory is allowed for a connection".into()))?;
        // A client has but this connection; its send window is all that bounds it.
        let most = config.limited_send_window();
        let upkeep = Upkeep::begin(connection.clone(), &SendMemory::new(most), most);
        let sessions = Arc::new(Sessions::default());
        let streams = {
            let (connection, sessions, deadline) = (connection.clone(), sessions.clone(), config.deadline);
            // A server opens no control streams; one that does sees them reset.
            tokio::spawn(async move { drop(accept_streams(&connection, &sessions, deadline, |_, _| {}).await) })
        };
        let limits = Limits::new(config.limit.map(|rate| Arc::new(Bucket::new(rate))));
        Ok(Self {
            endpoint,
            connection,
            key_id,
            sessions,
            window,
            config: config.clone(),
            limits,
            streams,
            _upkeep: upkeep,
        })
    }

    /// The server's key.
    pub fn key_id(&self) -> KeyId {
        self.key_id
    }

    /// The connection itself, for its address and statistics.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Sends files and directories, and waits until the server says that each is committed, or why not. What the observer
    /// hears of is counted in the outcome too. Dropping the future cancels: files that are committed stay, of the rest
    /// the server keeps partials.
    ///
    /// # Errors
    /// What ends the session as a whole. Files that fail do not: see [`Sent::failures`](crate::sender::Sent::failures).
    pub async fn push(&self, options: &PushOptions, observer: Observer) -> Result<Outcome> {
        observer(Event::Connected { address: self.connection.remote_address(), key_id: self.key_id.to_string() });
        let (trees, unsendable) = look_at(options.sources.clone()).await?;
        let Some(first) = trees.first() else {
            // Nothing to ask the server for.
            return Ok(Outcome { sent: Sent::of_failures(unsendable, &observer), ..Outcome::default() });
        };
        let push = Push {
            session: session_id()?,
            destination: Components::from(&options.destination),
            into: options.into,
            sources: u32::try_from(options.sources.len()).unwrap_or(u32::MAX),
            directory: options.sources.len() == 1 && first.directory,
            durability: options.durability,
        };
        let outgoing = Outgoing {
            connection: self.connection.clone(),
            trees,
            unsendable,
            parallel: self.config.parallel,
            limits: self.limits.clone(),
            meter: Arc::default(),
            config: self.config.clone(),
            observer,
        };
        self.honest(session::push(outgoing, &push).await)
    }

    /// A server that breaks the protocol is told so, and left.
    fn honest<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(Error::Protocol(why)) = &result {
            self.connection.close(varint_of(Code::Protocol), why.as_bytes());
        }
        result
    }

    /// Receives files and directories from the server into a store, each under its own name.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub async fn pull(
        &self,
        sources: &[RelativePath],
        store: Arc<dyn Store>,
        durability: Durability,
        observer: Observer,
    ) -> Result<Summary> {
        let permits = Arc::new(Semaphore::new(within_open_files(self.config.max_transfers)));
        let receiver = Receiver::new(Receiving {
            store,
            // A server could send anything under any name, such as a .profile.
            place: Place::Only(sources.iter().filter_map(|source| source.name().map(<[u8]>::to_vec)).collect()),
            owner: self.key_id.0,
            durability,
            permits: Arc::new(Permits::new(permits)),
            window: self.window.clone(),
            claims: Arc::default(),
            config: self.config.clone(),
            observer,
            stopping: CancellationToken::new(),
        });
        let pull = Pull {
            session: session_id()?,
            sources: sources.iter().map(Components::from).collect(),
            entries: MAX_UNANSWERED,
            entry_bytes: MAX_UNANSWERED_BYTES,
            limit: self.config.limit.map(Rate::bytes),
        };
        if !pull.fits() {
            return Err(Error::Usage("so many sources do not fit into one request; pull them in parts".into()));
        }
        self.honest(session::pull(&self.connection, &pull, &self.sessions, receiver, &self.config).await)
    }

    /// Measures the way to the server and back, without touching a disk at either end. What the observer hears of is
    /// [`Event::Measuring`]. Dropping the future ends it at both ends.
    ///
    /// # Errors
    /// [`Error::Usage`] for a time that is out of bounds; [`Error::Refused`] with [`Code::Unsupported`] by a server that is
    /// too old for it, and with [`Code::Busy`] by one that is measuring for others; what ends a connection.
    pub async fn measure(&self, options: &MeasureOptions, observer: Observer) -> Result<Measured> {
        observer(Event::Connected { address: self.connection.remote_address(), key_id: self.key_id.to_string() });
        self.honest(measure::measure(&self.window, options, &self.config, &observer).await)
    }

    /// Closes the connection and waits until the server can know, for a second at most.
    pub async fn close(self) {
        self.connection.close(varint_of(Code::Done), b"");
        let _ = timeout(GOODBYE, self.endpoint.wait_idle()).await;
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.streams.abort();
    }
}

/// A source that could not be looked at, and why.
type Unsendable = (RelativePath, Why);

/// Looks at the sources, off the network threads. One that is missing does not keep the others from being sent.
async fn look_at(sources: Vec<PathBuf>) -> Result<(Vec<Tree>, Vec<Unsendable>)> {
    let looked = tokio::task::spawn_blocking(move || {
        let (mut trees, mut unsendable) = (Vec::<Tree>::new(), Vec::new());
        for source in sources {
            match Tree::local(&source) {
                Ok(tree) if trees.iter().any(|other| other.name == tree.name) => {
                    let name = printable(&tree.name);
                    return Err(Error::Usage(format!("two sources are named {name}; they would fall on each other")));
                }
                Ok(tree) => trees.push(tree),
                Err(Error::Io { what: _, source: error }) => {
                    let name = source.components().filter_map(|c| match c {
                        std::path::Component::Normal(name) => Some(name.as_encoded_bytes()),
                        _ => None,
                    });
                    let path = RelativePath::from_components(name).unwrap_or_default();
                    // The name as it was typed: a relative path alone would not tell which file of that name.
                    let typed = printable(source.as_os_str().as_encoded_bytes());
                    let code = Why::from_io(&error).code;
                    unsendable.push((path, Why::new(code, format!("{typed}: {error}"))));
                }
                Err(other) => return Err(other),
            }
        }
        Ok((trees, unsendable))
    });
    looked.await.map_err(|_| Error::Usage("a fault inside haul while looking at the sources".into()))?
}

fn session_id() -> Result<[u8; 16]> {
    let mut id = [0; 16];
    aws_lc_rs::rand::fill(&mut id).map_err(|_| Error::Usage("the system gives no random numbers".into()))?;
    Ok(id)
}
