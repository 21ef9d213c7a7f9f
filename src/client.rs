//! The client: connects and runs sessions, which reconnect and resume after a loss.

mod connector;
mod destination;
mod link;
mod operation;
mod options;
mod retry;
mod watch;

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use quinn::Connection;
use tokio::time::timeout;

use crate::auth::identity::{Identity, KeyId};
use crate::auth::random::random;
use crate::auth::trust::ServerTrust;
use crate::bench::{self, MeasureOptions, Measurement};
use crate::config::Config;
use crate::error::{Code, Error, Result};
use crate::net::connect;
use crate::net::endpoint;
use crate::protocol::path::RelativePath;
use crate::protocol::{Components, List, Push, ReceiveOptions};
use crate::storage::OutputStore;
use crate::storage::pipe::Pipe;
use crate::storage::walk::WalkOptions;
use crate::transfer::blocking::blocking;
use crate::transfer::events::{Observer, Route, ignore};
use crate::transfer::send::{Sender, TransferStats};
use crate::transfer::session::nesting::origin;
use crate::transfer::session::{Listing, Outcome, local_sources};

use connector::Connector;
pub(crate) use link::{Dial, Dialed, Dialing};
use operation::{Operation, PullSession};
pub use options::{PullOptions, PushOptions};
use options::{check_mirror, wire_filter};

/// Time for a server that offers by a code to close the connection.
const SERVER_CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// A client of one server, with a connection to it.
pub struct Client {
    connector: Connector,
}

impl Client {
    /// Connects to a server and verifies its key.
    ///
    /// # Errors
    /// [`Error::Resolve`] and [`Error::Unreachable`] when no connection is possible; [`Error::UnknownHost`] at a first contact
    /// without a pin: if its key id is the right one, [`add`](crate::auth::known_hosts::add) it to the known hosts and connect
    /// again; [`Error::ChangedHost`], [`Error::WrongPin`] and [`Error::NotTrusted`] for a wrong key. Nothing was sent then.
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
        let identity = identity.clone();
        let host = host.to_owned();
        let config = Arc::new(config.clone());
        let dial_config = config.clone();
        let any = Box::new(move || -> Dialing {
            let identity = identity.clone();
            let host = host.clone();
            let config = dial_config.clone();
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
        let dial = Dial { any, direct: None };
        Ok(Self {
            connector: Connector::new(dialed(first), dial, false, config)?,
        })
    }

    /// Makes a client from an open connection and a way to connect again. Its route is reported.
    ///
    /// # Errors
    /// [`Error::NotTrusted`] without a certificate; [`Error::Usage`] when the configuration allows no memory.
    pub(crate) fn over(first: Dialed, dial: Dial, config: &Config) -> Result<Self> {
        Ok(Self {
            connector: Connector::new(first, dial, true, Arc::new(config.clone()))?,
        })
    }

    /// The server's key.
    pub fn key_id(&self) -> KeyId {
        self.connector.key_id
    }

    /// The current connection, for its address and statistics.
    pub fn connection(&self) -> Connection {
        self.connector.link().quic().clone()
    }

    /// Moves the connection to another UDP port of this machine, for programs that the system informs of network changes. Sessions
    /// continue. A change of address alone does not need it.
    ///
    /// # Errors
    /// [`Error::Io`] when the system provides no port; nothing changes then.
    pub fn rebind(&self) -> Result<()> {
        let link = self.connector.link();
        connect::rebind(&link.endpoint, link.quic().remote_address())
    }

    /// Sends files and directories, and waits until the server has reported for each that it is committed, or why not. The outcome
    /// counts what the observer's events report. Dropping the future cancels: committed files stay, and the server keeps
    /// partials of the rest.
    ///
    /// A lost connection does not end the session. For [`Config::retry_for`] the client tries to connect to a server with the
    /// same key, and resumes the session there. Settled entries stay settled, and of an unfinished file only the bytes that the
    /// server does not hold are sent.
    ///
    /// # Errors
    /// Errors that end the whole session. Files that fail do not: see
    /// [`TransferStats::failures`](crate::transfer::send::TransferStats::failures).
    pub async fn push(&self, options: &PushOptions, observer: Observer) -> Result<Outcome> {
        check_mirror(&options.take, &options.walk)?;
        let link = self.connector.link();
        self.connector.report_connected(&link, &observer);
        self.connector.report_route(&link, &observer);
        let sources = options.sources.clone();
        let follow = options.walk.follow;
        let (trees, unsendable) =
            blocking("open the sources", move || local_sources(&sources, follow)).await?;
        let Some(first) = trees.first() else {
            // All sources have failed, so there is no session to begin.
            return Ok(Outcome {
                sent: TransferStats::of_failures(unsendable, &observer),
                ..Outcome::default()
            });
        };
        let session = random()?;
        let directory = options.sources.len() == 1 && first.directory;
        let (trees, origin) = blocking("look at the sources", move || {
            let origin = origin(&trees, &session);
            Ok::<_, Error>((trees, origin))
        })
        .await?;
        let request = Push {
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
            .connector
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
            self.connector.config.parallel,
            observer.clone(),
        );
        let sender = Box::new(sender);
        let operation = Operation::Push { request, sender };
        self.connector.run(link, operation, &observer).await
    }

    /// Sends a reader's output as the content of one file, until the reader ends. The destination is the name of the file; the
    /// sources in the options are ignored. The file appears once the reader has ended and everything has arrived, with that time
    /// as its modification time. A few MiB at most are read ahead. The reader runs on a thread of its own, which outlives this
    /// future until a pending read returns.
    ///
    /// # Errors
    /// [`Error::Usage`] when the destination is a directory; otherwise as [`push`](Self::push). A lost connection is an error too
    /// once reading has begun, because nothing can be read twice. If a directory of that name exists, [`Outcome::sent`] holds
    /// the failure.
    pub async fn push_from(
        &self,
        input: impl Read + Send + 'static,
        options: &PushOptions,
        observer: Observer,
    ) -> Result<Outcome> {
        let link = self.connector.link();
        let name = options
            .destination
            .name()
            .filter(|_| !options.into)
            .ok_or_else(|| {
                Error::Usage(
                    "cannot send from a pipe without a file name; add one, as in haul://host/dir/name.tar"
                        .into(),
                )
            })?;
        self.connector.report_connected(&link, &observer);
        let request = Push {
            session: random()?,
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
        let sender = Box::new(sender);
        let operation = Operation::Push { request, sender };
        self.connector.run(link, operation, &observer).await
    }

    /// Receives files and directories, and waits until each is committed on this machine or has failed. Their place is settled as
    /// in a push, once the server has reported the kind of the source: see
    /// [`Placement::settle`](crate::transfer::receive::Placement::settle). Everything else is as in [`push`](Self::push) with the
    /// roles exchanged. Files that the server could not send count as failures. After a lost connection the server walks all
    /// sources again.
    ///
    /// # Errors
    /// Errors that end the whole session; [`Error::Usage`] for sources that cannot be pulled together; [`Error::Io`] when the
    /// destination cannot be created or opened.
    pub async fn pull(&self, options: &PullOptions, observer: Observer) -> Result<Outcome> {
        check_mirror(&options.take, &options.walk)?;
        let link = self.connector.link();
        self.connector.report_connected(&link, &observer);
        self.connector.report_route(&link, &observer);
        let pull = PullSession::new(options.clone(), self.key_id(), &self.connector.config)?;
        let operation = Operation::Pull(Box::new(pull));
        self.connector.run(link, operation, &observer).await
    }

    /// Receives one file and writes its content to a writer, in order and as it arrives. The content is verified after the last
    /// byte was written: after an error, or a failure in [`Outcome::sent`], the output is not the whole file. The destination in
    /// the options is ignored. A writer that blocks holds the server back; a few MiB wait in memory.
    ///
    /// # Errors
    /// [`Error::Usage`] for any other number of sources; [`Error::Refused`] with [`Code::IsDirectory`] for a directory; otherwise
    /// as [`pull`](Self::pull). A lost connection is an error too once something was written.
    pub async fn pull_to(
        &self,
        output: impl Write + Send + 'static,
        options: &PullOptions,
        observer: Observer,
    ) -> Result<Outcome> {
        let link = self.connector.link();
        let name = match &options.sources[..] {
            [source] => source
                .name()
                .and_then(|name| RelativePath::from_components([name]).ok()),
            _ => None,
        };
        let name = name.ok_or_else(|| {
            Error::Usage("cannot write several sources to a pipe; name one file".into())
        })?;
        self.connector.report_connected(&link, &observer);
        let pull = PullSession::new(options.clone(), self.key_id(), &self.connector.config)?
            .with_output(OutputStore::new(name, output));
        let operation = Operation::Pull(Box::new(pull));
        self.connector.run(link, operation, &observer).await
    }

    /// Lists a path. The entries arrive while the result is read: see [`Listing::next`]. For a directory the list has its entries,
    /// with `recursive` also those of all directories below; for anything else, and for matches of a pattern, the entry itself.
    /// The entries of a directory are ordered by the bytes of their names.
    ///
    /// # Errors
    /// [`Error::Refused`] when the path does not exist or cannot be read, or this key may not read; the errors of a lost
    /// connection.
    pub async fn list(&self, path: &RelativePath, recursive: bool) -> Result<Listing> {
        let list = List {
            session: random()?,
            path: Components::from(path),
            recursive,
        };
        let link = self.connector.link();
        let context = self.connector.context(&link, ignore());
        let begun = Listing::begin(&context, &list).await;
        link.connection.close_on_protocol_error(begun)
    }

    /// Measures the path to the server in both directions, without a disk at either end. The observer gets
    /// [`Event::Measuring`](crate::transfer::events::Event::Measuring). Dropping the future ends the measurement at both ends.
    ///
    /// # Errors
    /// [`Error::Usage`] for a time that is out of bounds; [`Error::Refused`] with [`Code::Unsupported`] by a server of an older
    /// version, and with [`Code::Busy`] by a server that measures for others; the errors of a lost connection.
    pub async fn measure(
        &self,
        options: &MeasureOptions,
        observer: Observer,
    ) -> Result<Measurement> {
        let link = self.connector.link();
        self.connector.report_connected(&link, &observer);
        let context = self.connector.context(&link, observer);
        let measured = bench::measure(&context, options).await;
        link.connection.close_on_protocol_error(measured)
    }

    /// Waits up to 10 s until the server has closed the connection, then closes it. A sender that offers by a code closes it once
    /// it has read the result of the pull. Closing earlier could discard data that the sender has not read yet.
    pub async fn close_after_server(self) {
        let connection = self.connection();
        if timeout(SERVER_CLOSE_TIMEOUT, connection.closed())
            .await
            .is_err()
        {
            self.close().await;
        }
    }

    /// Waits some seconds at most until the server has received how pulls ended, because a close discards that. Then closes the
    /// connection and waits up to a second until the close frame is sent. It does not wait until the server has received the
    /// close: an idle connection times out.
    pub async fn close(self) {
        self.connector.link().delivered().await;
        self.close_with(Code::Done).await;
    }

    /// Closes the connection in the middle of a session, and reports that to the server.
    pub async fn cancel(self) {
        self.close_with(Code::Cancelled).await;
    }

    async fn close_with(self, code: Code) {
        let link = self.connector.link();
        endpoint::close_and_flush(&link.endpoint, link.quic(), code).await;
    }
}
