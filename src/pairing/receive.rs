//! The receiver's end: it finds the sender by a code, sees what there is, and asks for it.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use tokio::time::timeout;

use super::code::Credential;
use super::pair::{self, Paired};
use super::pake::{Confirmation, Exchange, Parties, Role};
use super::route::{Ways, Whereabouts};
use crate::auth::identity::{Identity, KeyId};
use crate::auth::trust::{ServerTrust, trust_any_key};
use crate::client::{Client, Dialed};
use crate::config::Config;
use crate::error::{Code, Error, Reason, Result};
use crate::net::connect::Connected;
use crate::net::endpoint;
use crate::net::stream::{MessageReader, MessageWriter, StreamError};
use crate::protocol::path::{RelativePath, is_partial_name};
use crate::protocol::{
    Accept, Confirm, Hello, Introduce, Introduced, Message, Offer, Refused, StreamType, Working,
};
use crate::transfer::events::Route;
use crate::transfer::session::hello;

/// Time for each answer of the sender.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// A sender that knew the code, and what it offers.
pub struct Met {
    offer: Offer,
    names: Vec<RelativePath>,
    key_id: KeyId,
    ways: Arc<Ways>,
    connected: Connected,
    route: Route,
    reader: MessageReader,
    writer: MessageWriter,
    confirmation: Confirmation,
    identity: Identity,
    config: Config,
}

/// Goes to whoever is at one of these places, and shows that it knows the code; the first that answers counts. Nothing is
/// said about this machine but its key, and no name of a file is read, before both have shown that they know the words.
///
/// # Errors
/// [`Error::Unreachable`] when nothing answers at any; [`Error::Refused`] with [`Code::NotAdmitted`] when a word was wrong,
/// which has burnt the code, and with [`Code::NotFound`] when the code is not in use there; what ends a connection.
pub async fn meet(
    credential: &Credential,
    at: Whereabouts,
    identity: &Identity,
    config: &Config,
) -> Result<Met> {
    let ways = Ways::new(at, credential.number, identity, config)?;
    let trust = trust_any_key(credential.key_id);
    let Dialed {
        connected, route, ..
    } = ways.connect(&trust).await?;
    let (sender, _) = endpoint::peer(&connected.connection)
        .ok_or_else(|| nobody("it presented no certificate"))?;
    let parties = Parties::of(&connected.connection, sender, identity.key_id())
        .ok_or_else(|| nobody("no TLS"))?;
    let opened = timeout(ANSWER_TIMEOUT, connected.connection.open_bi())
        .await
        .map_err(|_| silent())?;
    let (send, receive) = opened.map_err(StreamError::from)?;
    let mut reader = MessageReader::new(receive);
    let mut writer = MessageWriter::new(send);
    let (exchange, ours) = Exchange::begin(Role::Receiver, credential, &parties);
    let mut head = BytesMut::new();
    head.put_u8(StreamType::Introduction as u8);
    hello().put(&mut head);
    Introduce {
        number: credential.number,
        exchange: ours,
    }
    .put(&mut head);
    writer
        .write_chunks(&mut [head.freeze()], ANSWER_TIMEOUT)
        .await?;
    timeout(ANSWER_TIMEOUT, reader.read::<Hello>())
        .await
        .map_err(|_| silent())?
        .map_err(busy)?;
    let theirs: Introduced = answer(&mut reader, false).await?;
    let confirmation = exchange
        .finish(&theirs.exchange)
        .ok_or_else(|| Error::Protocol("no exchange".into()))?;
    writer
        .write_within(
            &Confirm {
                tag: confirmation.ours(),
            },
            ANSWER_TIMEOUT,
        )
        .await?;
    let confirm: Confirm = answer(&mut reader, false).await?;
    if !confirmation.is_right(confirm.tag) {
        let text = "whoever answered does not know the code; it is burnt, so ask for a new one";
        return Err(Error::Refused(Reason::new(Code::NotAdmitted, text)));
    }
    let offer: Offer = answer(&mut reader, true).await?;
    let name = |name: &Vec<u8>| RelativePath::from_components([name]);
    let names = offer.names.0.iter().map(name).collect::<Result<_, _>>();
    let names = names.map_err(|bad| {
        Error::Protocol(format!("it offers something under a bad name: {bad}").into())
    })?;
    let identity = identity.clone();
    let config = config.clone();
    Ok(Met {
        offer,
        names,
        key_id: sender,
        ways,
        connected,
        route,
        reader,
        writer,
        confirmation,
        identity,
        config,
    })
}

impl Met {
    /// What there is. Print it escaped: it is the sender's.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// The names of the sources.
    pub fn names(&self) -> &[RelativePath] {
        &self.names
    }

    /// The sender's key.
    pub fn key_id(&self) -> KeyId {
        self.key_id
    }

    /// Where the sender is.
    pub fn address(&self) -> SocketAddr {
        let remote = self.connected.connection.remote_address();
        SocketAddr::new(remote.ip().to_canonical(), remote.port())
    }

    /// How it is reached.
    pub fn route(&self) -> Route {
        self.route
    }

    /// Takes it. A text is all that there is then; files are pulled from the client, by their [`names`](Self::names) and
    /// [`literal`](crate::client::PullOptions::literal)ly, so that nothing comes under another name, and the
    /// connection is closed [after the sender's](Client::close_after_server).
    ///
    /// # Errors
    /// What ends a connection.
    pub async fn accept(self) -> Result<Option<Client>> {
        agree((self.reader, self.writer), &self.connected, None).await?;
        if self.offer.text.is_some() {
            return Ok(None);
        }
        let trust = ServerTrust {
            pin: Some(self.key_id),
            ..ServerTrust::default()
        };
        let again = self.ways.connect(&trust).await?;
        Client::over(again, self.ways.dial(trust), &self.config).map(Some)
    }

    /// Agrees that the two know each other from here on, where that is what is offered.
    ///
    /// # Errors
    /// [`Error::Usage`] when something else is offered; what ends a connection.
    pub async fn pair(self) -> Result<Paired> {
        let Some(number) = self.offer.pair else {
            self.decline().await;
            return Err(Error::Usage(
                "the other machine sends something; it does not run `haul pair`".into(),
            ));
        };
        let own = pair::number_of_server(&self.identity);
        agree((self.reader, self.writer), &self.connected, Some(own)).await?;
        Ok(Paired {
            key_id: self.key_id,
            secret: self.confirmation.pair(),
            number,
        })
    }

    /// Does not take it, and says so.
    pub async fn decline(mut self) {
        let refused = Refused {
            why: Reason::new(Code::Cancelled, "declined").into(),
        };
        if self
            .writer
            .write_within(&refused, ANSWER_TIMEOUT)
            .await
            .is_ok()
        {
            self.writer.deliver(ANSWER_TIMEOUT).await;
        }
        endpoint::close_and_flush(
            &self.connected.endpoint,
            &self.connected.connection,
            Code::Done,
        )
        .await;
    }
}

/// Says yes, and waits until the sender has heard it.
async fn agree(
    (mut reader, mut writer): (MessageReader, MessageWriter),
    connected: &Connected,
    pair: Option<u32>,
) -> Result<()> {
    writer
        .write_within(&Accept { pair }, ANSWER_TIMEOUT)
        .await?;
    writer.finish();
    // The sender ends it once it has admitted this key.
    timeout(ANSWER_TIMEOUT, reader.frame(Refused::LIMIT))
        .await
        .map_err(|_| silent())??;
    endpoint::close_and_flush(&connected.endpoint, &connected.connection, Code::Done).await;
    Ok(())
}

/// Bytes that are free for this user where a directory stands, or would; `None` when the system does not say.
pub fn free_space(directory: &Path) -> Option<u64> {
    let there = directory
        .ancestors()
        .find(|path| path.exists())
        .filter(|path| !path.as_os_str().is_empty());
    let stats = rustix::fs::statvfs(there.unwrap_or(Path::new("."))).ok()?;
    stats.f_bavail.checked_mul(stats.f_frsize)
}

/// Bytes on the disk of what stands in a directory under some names already, partials among them: what a transfer need not find
/// room for again. Blocks.
pub fn held(directory: &Path, names: &[RelativePath]) -> u64 {
    let own = names
        .iter()
        .map(|name| directory.join(OsStr::from_bytes(name.as_bytes())));
    let beside = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let partials = beside
        .map(|entry| entry.path())
        .filter(|path| is_partial(path));
    own.chain(partials).map(|path| on_disk(&path)).sum()
}

fn is_partial(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| is_partial_name(name.as_bytes()))
}

/// Bytes that a file, or all in a directory, takes. What cannot be read is not counted.
fn on_disk(path: &Path) -> u64 {
    let Ok(metadata) = path.symlink_metadata() else {
        return 0;
    };
    if !metadata.is_dir() {
        return metadata.blocks() * STAT_BLOCK;
    }
    std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| on_disk(&entry.path()))
        .sum()
}

/// Bytes in a block of `st_blocks` (POSIX, sys/stat.h, as Linux has it).
const STAT_BLOCK: u64 = 512;

/// The next message, or why there is none. Who `may_work` still counts what there is.
async fn answer<M: Message>(reader: &mut MessageReader, may_work: bool) -> Result<M> {
    loop {
        let frame = timeout(ANSWER_TIMEOUT, reader.frame(M::LIMIT.max(Refused::LIMIT)))
            .await
            .map_err(|_| silent())?;
        let frame = frame.map_err(busy)?;
        let frame = frame.ok_or_else(|| Error::from(StreamError::Ended))?;
        match frame.kind {
            Working::TYPE if may_work => {
                frame.decode::<Working>().map_err(StreamError::from)?;
            }
            Refused::TYPE => {
                let refused: Refused = frame.decode().map_err(StreamError::from)?;
                return Err(Error::Refused(refused.why.into()));
            }
            _ => return Ok(frame.decode().map_err(StreamError::from)?),
        }
    }
}

/// A sender that has no time for another turns its stream away.
fn busy(error: StreamError) -> Error {
    match error {
        StreamError::Reset(Code::Busy) => Error::Refused(Reason::new(
            Code::Busy,
            "the sender is busy with somebody else; try again in a moment",
        )),
        other => other.into(),
    }
}

fn silent() -> Error {
    StreamError::TimedOut.into()
}

fn nobody(why: &str) -> Error {
    Error::NotTrusted {
        host: "the sender".into(),
        why: why.into(),
    }
}
