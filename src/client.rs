//! The client: connect, run a session, reconnect and go on with it.

mod destination;
mod link;
mod operation;
mod retry;
mod watch;

use std::future::pending;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::{Connection, ConnectionError};
use tokio::time::{Instant, sleep, timeout};

use crate::auth::identity::{Identity, KeyId};
use crate::auth::trust::ServerTrust;
use crate::bench::{self, MeasureOptions, Measurement};
use crate::config::{Config, display_duration};
use crate::error::{Code, Error, Reason, Result};
use crate::net::connect;
use crate::net::endpoint;
use crate::net::rate_limit::{RateLimits, TokenBucket};
use crate::net::stream::varint_of;
use crate::protocol::path::RelativePath;
use crate::protocol::{Components, Durability, List, Push, ReceiveOptions};
use crate::storage::OutputStore;
use crate::storage::pipe::Pipe;
use crate::storage::walk::WalkOptions;
use crate::transfer::events::{Event, Observer, Route};
use crate::transfer::receive::AcceptedQuota;
use crate::transfer::send::{Sender, TransferStats};
use crate::transfer::session::nesting::origin;
use crate::transfer::session::{Listing, Outcome, local_sources};

use link::Link;
pub(crate) use link::{Dial, Dialed, Dialing};
use operation::{Operation, Pulling, wire_filter};
use retry::{Retry, passes, reason};

/// How long a server that offers by a code may take to say goodbye.
const SERVER_CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a relay is used before a direct way is looked for again: at first, and at most.
const DIRECT_RETRY_INTERVAL: Duration = Duration::from_secs(2);
const MAX_DIRECT_RETRY_INTERVAL: Duration = Duration::from_secs(60);
/// How often it is looked whether anything comes.
const ROUTE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// A client of one server, and its connection there.
pub struct Client {
    /// Connects again, to the very key that the first connection had.
    dial: Dial,
    /// Whether there are several ways, so that users want to know which it is.
    routed: bool,
    key_id: KeyId,
    config: Config,
    limits: RateLimits,
    link: Mutex<Arc<Link>>,
    /// Sessions that lost the same connection wait for one new one.
    reconnecting: tokio::sync::Mutex<()>,
}

/// What to send, where to, and how.
#[derive(Debug, Clone, Default)]
pub struct PushOptions {
    /// Local files and directories. Symbolic links among them are followed; those found in directories are not.
    pub sources: Vec<PathBuf>,
    /// Where below the served directory.
    pub destination: RelativePath,
    /// The destination is a directory to put the sources into, as a trailing `/` says.
    pub into: bool,
    /// How durable a commit has to be.
    pub durability: Durability,
    /// What is announced of the sources.
    pub walk: WalkOptions,
    /// How the server takes it.
    pub take: ReceiveOptions,
}

/// What to receive, where to, and how.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    /// Below the served directory; the empty path is all that is in it.
    pub sources: Vec<RelativePath>,
    /// Where on this machine. Symbolic links on the way there are followed, those in it are not.
    pub destination: PathBuf,
    /// The destination is a directory to put the sources into, as a trailing `/` says.
    pub into: bool,
    /// How durable a commit has to be.
    pub durability: Durability,
    /// What the server announces of the sources.
    pub walk: WalkOptions,
    /// How this machine takes it.
    pub take: ReceiveOptions,
    /// The sources are names and no patterns.
    pub literal: bool,
    /// The most that is taken, for whoever has agreed to so much.
    pub most: Option<AcceptedQuota>,
}

impl Client {
    /// Connects to a server and makes sure that it is the right one.
    ///
    /// # Errors
    /// [`Error::Resolve`] and [`Error::Unreachable`] when no connection comes about;
    /// [`Error::UnknownHost`] at a first contact without a pin: if its key id is the right one,
    /// [`add`](crate::auth::known_hosts::add) it to the known hosts and connect again; [`Error::ChangedHost`], [`Error::WrongPin`] and
    /// [`Error::NotTrusted`] when it is another than it should be. Nothing was sent then.
    pub async fn connect(
        identity: &Identity,
        trust: &ServerTrust,
        host: &str,
        port: u16,
        config: &Config,
    ) -> Result<Self> {
        let dialed = |connected| Dialed {
            connected,
            route: Route::Direct,
            own_port: true,
        };
        let first = connect::connect(identity, trust, host, port, config).await?;
        let (key_id, _) = endpoint::peer(&first.connection).ok_or_else(|| Error::NotTrusted {
            host: host.into(),
            why: "it presented no certificate".into(),
        })?;
        let again = (identity.clone(), host.to_owned(), config.clone());
        let any = Box::new(move || -> Dialing {
            let (identity, host, config) = again.clone();
            let trust = ServerTrust {
                pin: Some(key_id),
                ..ServerTrust::default()
            };
            Box::pin(async move {
                connect::connect(&identity, &trust, &host, port, &config)
                    .await
                    .map(dialed)
            })
        });
        Ok(Self {
            routed: false,
            ..Self::over(dialed(first), Dial { any, direct: None }, config)?
        })
    }

    /// A client over a connection that is there already, and that can be made again.
    ///
    /// # Errors
    /// As [`connect`](Self::connect), of what comes after the connection.
    pub(crate) fn over(first: Dialed, dial: Dial, config: &Config) -> Result<Self> {
        let (link, key_id) = Link::over(first, config)?;
        Ok(Self {
            dial,
            routed: true,
            key_id,
            config: config.clone(),
            limits: RateLimits::new(config.limit.map(|rate| Arc::new(TokenBucket::new(rate)))),
            link: Mutex::new(Arc::new(link)),
            reconnecting: tokio::sync::Mutex::default(),
        })
    }

    /// The server's key.
    pub fn key_id(&self) -> KeyId {
        self.key_id
    }

    /// The connection itself as it is now, for its address and statistics.
    pub fn connection(&self) -> Connection {
        self.link().connection.clone()
    }

    /// Goes on from another UDP port of this machine: for a program that is told of a change in the network. Sessions
    /// go on, and a change of address alone does not need it.
    ///
    /// # Errors
    /// [`Error::Io`] when the system gives no port; then everything stays as it was.
    pub fn rebind(&self) -> Result<()> {
        let link = self.link();
        connect::rebind(&link.endpoint, link.connection.remote_address())
    }

    fn tell_route(&self, link: &Link, observer: &Observer) {
        if self.routed {
            observer(Event::Routed {
                address: link.address(),
                route: link.route,
            });
        }
    }

    fn link(&self) -> Arc<Link> {
        self.link
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Sends files and directories, and waits until the server says that each is committed, or why not. What the observer
    /// hears of is counted in the outcome too. Dropping the future cancels: files that are committed stay, of the rest
    /// the server keeps partials.
    ///
    /// A connection that is lost does not end the session: for [`Config::retry_for`] others are tried, to a server with the
    /// same key, and the session goes on over them. What is settled stays settled, and of an unfinished file only what the
    /// server does not hold is sent.
    ///
    /// # Errors
    /// What ends the session as a whole. Files that fail do not: see [`TransferStats::failures`](crate::transfer::send::TransferStats::failures).
    pub async fn push(&self, options: &PushOptions, observer: Observer) -> Result<Outcome> {
        unlisted_mirror(&options.take, &options.walk)?;
        let link = self.link();
        observer(Event::Connected {
            address: link.address(),
            key_id: self.key_id.to_string(),
        });
        self.tell_route(&link, &observer);
        let sources = options.sources.clone();
        let follow = options.walk.follow;
        let (trees, unsendable) = blocking(move || local_sources(&sources, follow)).await??;
        let Some(first) = trees.first() else {
            // Nothing to ask the server for.
            return Ok(Outcome {
                sent: TransferStats::of_failures(unsendable, &observer),
                ..Outcome::default()
            });
        };
        let session = session_id()?;
        let directory = options.sources.len() == 1 && first.directory;
        let (trees, origin) = blocking(move || {
            let origin = origin(&trees, &session);
            (trees, origin)
        })
        .await?;
        let push = Push {
            session,
            destination: Components::from(&options.destination),
            into: options.into,
            sources: u32::try_from(options.sources.len()).unwrap_or(u32::MAX),
            directory,
            durability: options.durability,
            take: Some(options.take).filter(|take| *take != ReceiveOptions::default()),
            origin,
            filter: if options.take.delete.is_some() {
                wire_filter(&options.walk.filter)?
            } else {
                None
            },
        };
        let index = self
            .config
            .index
            .clone()
            .filter(|_| !options.take.no_dedupe);
        let walk = WalkOptions {
            index,
            ..options.walk.clone()
        };
        let sender = Sender::new(
            trees,
            unsendable,
            walk,
            self.config.parallel,
            observer.clone(),
        );
        self.persist(
            link,
            Operation::Push {
                push,
                sender: Box::new(sender),
            },
            &observer,
        )
        .await
    }

    /// Sends what a reader gives as the content of one file, until it ends. The destination is the file's own name, and
    /// sources are not looked at. The file appears once the reader has ended and all of it has arrived; it has the time of
    /// that. At most some MiB are read ahead. The reader has a thread of its own, which outlives this while a read lasts.
    ///
    /// # Errors
    /// [`Error::Usage`] when the destination is a directory; else as [`push`](Self::push), and a lost connection too once
    /// reading has begun, since nothing can be read a second time. Where a directory turns out to stand, that failure is
    /// in [`Outcome::sent`].
    pub async fn push_from(
        &self,
        input: impl Read + Send + 'static,
        options: &PushOptions,
        observer: Observer,
    ) -> Result<Outcome> {
        let link = self.link();
        let name = options
            .destination
            .name()
            .filter(|_| !options.into)
            .ok_or_else(|| {
                Error::Usage(
                    "what comes out of a pipe needs a name there, as in haul://host/dir/name.tar"
                        .into(),
                )
            })?;
        observer(Event::Connected {
            address: link.address(),
            key_id: self.key_id.to_string(),
        });
        let push = Push {
            session: session_id()?,
            destination: Components::from(&options.destination),
            into: false,
            sources: 1,
            directory: false,
            durability: options.durability,
            take: Some(options.take).filter(|take| *take != ReceiveOptions::default()),
            filter: None,
            origin: None,
        };
        let sender = Sender::of_pipe(name, Arc::new(Pipe::new(input)), observer.clone())
            .map_err(Error::Refused)?;
        self.persist(
            link,
            Operation::Push {
                push,
                sender: Box::new(sender),
            },
            &observer,
        )
        .await
    }

    /// Receives files and directories from the server, and waits until each is committed on this machine, or has failed.
    /// Where they come to stand is settled as in a push, once the server has said what the source is: see
    /// [`Placement::settle`](crate::transfer::receive::Placement::settle). All else is as in [`push`](Self::push), with the roles turned
    /// about: what the server could not send is counted among the failures, and a lost connection is followed by others,
    /// over which the server looks for everything anew.
    ///
    /// # Errors
    /// What ends the session as a whole; [`Error::Usage`] for sources that cannot be asked for together; [`Error::Io`] when
    /// the destination cannot be made or opened.
    pub async fn pull(&self, options: &PullOptions, observer: Observer) -> Result<Outcome> {
        unlisted_mirror(&options.take, &options.walk)?;
        let link = self.link();
        observer(Event::Connected {
            address: link.address(),
            key_id: self.key_id.to_string(),
        });
        self.tell_route(&link, &observer);
        let pulling = Pulling::new(options.clone(), self.key_id, &self.config, observer.clone())?;
        self.persist(link, Operation::Pull(Box::new(pulling)), &observer)
            .await
    }

    /// Receives one file, and writes its content to a writer, in order and as it comes: it is verified when all of it is
    /// out. If this fails in whatever way, [`Outcome::sent`] included, what came out is not the whole file. The destination
    /// is not looked at. A writer that takes nothing holds back what comes; some MiB wait here.
    ///
    /// # Errors
    /// [`Error::Usage`] for any other number of sources; [`Error::Refused`] with [`Code::IsDirectory`] for a directory; else
    /// as [`pull`](Self::pull), and a lost connection too once anything has come.
    pub async fn pull_to(
        &self,
        output: impl Write + Send + 'static,
        options: &PullOptions,
        observer: Observer,
    ) -> Result<Outcome> {
        let link = self.link();
        let name = match &options.sources[..] {
            [source] => source
                .name()
                .and_then(|name| RelativePath::from_components([name]).ok()),
            _ => None,
        };
        let name = name.ok_or_else(|| {
            Error::Usage("one file can be written to a pipe, and no other number".into())
        })?;
        observer(Event::Connected {
            address: link.address(),
            key_id: self.key_id.to_string(),
        });
        let pulling = Pulling::new(options.clone(), self.key_id, &self.config, observer.clone())?;
        let pulling = pulling.with_output(OutputStore::new(name, output));
        self.persist(link, Operation::Pull(Box::new(pulling)), &observer)
            .await
    }

    /// Lists what stands under a path, as it is read from the result: see [`Listing::next`]. A directory stands for what is in
    /// it, with `recursive` also for all below; anything else, and what a pattern matches, for itself. Names of a directory
    /// come in the order of their bytes.
    ///
    /// # Errors
    /// [`Error::Refused`] when there is no such thing, or it cannot be read, or this key may not; what ends a connection.
    pub async fn list(&self, path: &RelativePath, recursive: bool) -> Result<Listing> {
        let list = List {
            session: session_id()?,
            path: Components::from(path),
            recursive,
        };
        let link = self.link();
        link.close_on_protocol_error(
            Listing::begin(&link.connection, &list, self.config.deadline).await,
        )
    }

    /// Runs an operation to its end, over as many connections as it takes.
    async fn persist(
        &self,
        mut link: Arc<Link>,
        mut operation: Operation,
        observer: &Observer,
    ) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut retry = None;
        let mut stopped_mirroring = false;
        let mut moved = false;
        loop {
            let mut begun = false;
            let over_another = std::mem::take(&mut moved);
            let begin = || {
                begun = true;
                if retry.is_some() && !over_another {
                    observer(Event::Reconnected {
                        address: link.address(),
                    });
                    self.tell_route(&link, observer);
                }
            };
            let was_open = link.connection.close_reason().is_none();
            let moves = operation.moves();
            let ended = {
                let run = operation.run((&link, &self.limits, &self.config), begin, &mut outcome);
                tokio::pin!(run);
                tokio::select! {
                    ended = &mut run => ended,
                    () = self.move_to_better_route(&link, observer), if moves => run.await,
                }
            };
            outcome.sent = operation.sent();
            outcome.bound = outcome.account.bound();
            let lost = match (ended, outcome.sent.interrupted.clone().map(Error::from)) {
                (Err(lost), _) => lost,
                // The server goes away, and something is left to send.
                (Ok(()), Some(stopping))
                    if passes(&stopping) && !self.config.retry_for.is_zero() =>
                {
                    stopping
                }
                (Ok(()), _) => {
                    if stopped_mirroring {
                        let text = "the connection was lost meanwhile; run the same command again";
                        outcome.summary.unremoved = Some(Reason::new(Code::Cancelled, text).into());
                    }
                    return Ok(outcome);
                }
            };
            let now = self.link();
            if moves && !Arc::ptr_eq(&now, &link) && !matches!(lost, Error::Protocol(_)) {
                link = now;
                moved = true;
                stopped_mirroring |= operation.stop_mirroring();
                continue;
            }
            let closed = link.connection.close_reason();
            let on_purpose = matches!(closed, Some(ConnectionError::LocallyClosed));
            // What a server answers to begin with is its answer; a connection that is lost before is no answer. Nor is one that a
            // stopping server closes under the session: that discards answers which have come and were not read yet.
            let unanswered = match lost {
                Error::Lost(_) => true,
                Error::Stopping => was_open && closed.is_some(),
                _ => false,
            };
            let answered = !begun && retry.is_none() && !unanswered;
            if !passes(&lost) || on_purpose || self.config.retry_for.is_zero() || answered {
                return Err(lost);
            }
            if let Some(spent) = operation.spent() {
                return Err(Error::Lost(format!("{}; {spent}", reason(&lost)).into()));
            }
            if begun || retry.is_none() {
                observer(Event::Lost {
                    why: reason(&lost),
                    retry_for: self.config.retry_for,
                });
            }
            let progress = operation.progress();
            let retry = retry.get_or_insert_with(|| Retry::new(self.config.retry_for, progress));
            retry.lost(progress);
            stopped_mirroring |= operation.stop_mirroring();
            link = self.reconnect(&link, &lost, retry, observer).await?;
        }
    }

    /// Ends once there is a better way, and the session has been moved there: one that needs no relay, or any where nothing comes by this
    /// one, as after a NAT has given one end another address. The connection of before is closed then.
    async fn move_to_better_route(&self, link: &Arc<Link>, observer: &Observer) {
        let Some(direct) = &self.dial.direct else {
            return pending().await;
        };
        let arrived = || link.connection.stats().udp_rx.datagrams;
        let mut wait = DIRECT_RETRY_INTERVAL;
        let mut due = Instant::now() + DIRECT_RETRY_INTERVAL;
        let mut before = arrived();
        let mut since = Instant::now();
        loop {
            sleep(ROUTE_CHECK_INTERVAL).await;
            let now = arrived();
            if now != before {
                before = now;
                since = Instant::now();
            }
            let silent = since.elapsed() > self.config.keep_alive + ROUTE_CHECK_INTERVAL;
            let dialed = if silent {
                (self.dial.any)().await
            } else if link.route == Route::Relayed && Instant::now() >= due {
                let dialed = direct().await;
                wait = (wait * 2).min(MAX_DIRECT_RETRY_INTERVAL);
                due = Instant::now() + wait;
                dialed
            } else {
                continue;
            };
            // What has come meanwhile says that the way is as good as any other.
            if silent && arrived() != before {
                continue;
            }
            let Ok((move_to_better_route, _)) =
                dialed.and_then(|dialed| Link::over(dialed, &self.config))
            else {
                continue;
            };
            self.tell_route(&move_to_better_route, observer);
            *self.link.lock().unwrap_or_else(PoisonError::into_inner) =
                Arc::new(move_to_better_route);
            link.connection
                .close(varint_of(Code::Cancelled), b"there is a better way");
            return;
        }
    }

    /// Waits and tries until there is another connection.
    async fn reconnect(
        &self,
        old: &Arc<Link>,
        lost: &Error,
        retry: &mut Retry,
        observer: &Observer,
    ) -> Result<Arc<Link>> {
        let mut why = reason(lost);
        while let Some((attempt, wait)) = retry.next()? {
            observer(Event::Reconnecting { attempt, wait });
            sleep(wait).await;
            match self.connect_anew(old).await {
                Err(error) if passes(&error) => why = reason(&error),
                ended => return ended,
            }
        }
        let first = reason(lost);
        let limit = display_duration(self.config.retry_for);
        let last = if why == first {
            String::new()
        } else {
            format!(" (at last: {why})")
        };
        Err(Error::Lost(
            format!("{first}. For {limit} it could not be made again{last}").into(),
        ))
    }

    /// Another connection in the place of one that is lost; one for all sessions that lost it.
    async fn connect_anew(&self, old: &Arc<Link>) -> Result<Arc<Link>> {
        let _one = self.reconnecting.lock().await;
        let now = self.link();
        if !Arc::ptr_eq(&now, old) && now.connection.close_reason().is_none() {
            return Ok(now);
        }
        let link = Arc::new(Link::over((self.dial.any)().await?, &self.config)?.0);
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = link.clone();
        Ok(link)
    }

    /// Measures the way to the server and back, without touching a disk at either end. What the observer hears of is
    /// [`Event::Measuring`]. Dropping the future ends it at both ends.
    ///
    /// # Errors
    /// [`Error::Usage`] for a time that is out of bounds; [`Error::Refused`] with [`Code::Unsupported`] by a server that is
    /// too old for it, and with [`Code::Busy`] by one that is measuring for others; what ends a connection.
    pub async fn measure(
        &self,
        options: &MeasureOptions,
        observer: Observer,
    ) -> Result<Measurement> {
        let link = self.link();
        observer(Event::Connected {
            address: link.address(),
            key_id: self.key_id.to_string(),
        });
        link.close_on_protocol_error(
            bench::measure(&link.window, options, &self.config, &observer).await,
        )
    }

    /// Waits until the server has closed the connection, as whoever offers by a code does once it has read how a pull went, for
    /// some seconds at most; then closes it. QUIC lets a goodbye overtake what the server has not read yet.
    pub async fn close_after_server(self) {
        let connection = self.connection();
        if timeout(SERVER_CLOSE_TIMEOUT, connection.closed())
            .await
            .is_err()
        {
            self.close().await;
        }
    }

    /// Waits until the server has heard how pulls have ended, for some seconds at most, as closing would discard that. Then
    /// closes the connection and waits until that has gone out, for a second at most. Whether the server has heard of the
    /// close is not waited for: a connection that nobody speaks on ends by itself.
    pub async fn close(self) {
        self.link().delivered().await;
        self.close_with(Code::Done).await;
    }

    /// The same in the middle of something, which is told to the server.
    pub async fn cancel(self) {
        self.close_with(Code::Cancelled).await;
    }

    async fn close_with(self, code: Code) {
        let link = self.link();
        endpoint::close_and_flush(&link.endpoint, &link.connection, code).await;
    }
}

/// What a list does not name would go.
fn unlisted_mirror(take: &ReceiveOptions, walk: &WalkOptions) -> Result<()> {
    match take.delete.is_some() && walk.filter.only.is_some() {
        true => Err(Error::Usage(
            "a mirror takes no list of names: all that is not on it would go; use rules".into(),
        )),
        false => Ok(()),
    }
}

/// Off the network threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::Usage("a fault inside haul; please report it".into()))
}

fn session_id() -> Result<[u8; 16]> {
    let mut id = [0; 16];
    aws_lc_rs::rand::fill(&mut id)
        .map_err(|_| Error::Usage("the system gives no random numbers".into()))?;
    Ok(id)
}
