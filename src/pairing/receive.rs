//! The receiver's end: it finds the sender by a code, reads the offer, and accepts it.

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
use super::pake::{Exchange, Parties, Role};
use super::route::{PeerDialer, Whereabouts};
use crate::auth::identity::{Identity, KeyId};
use crate::auth::trust::{ServerTrust, trust_any_key};
use crate::client::{Client, Dialed};
use crate::config::Config;
use crate::error::{Code, Error, Reason, Result};
use crate::net::address::canonical;
use crate::net::connect::Connected;
use crate::net::endpoint;
use crate::net::stream::{MessageReader, MessageWriter, StreamError};
use crate::protocol::path::{RelativePath, is_partial_name};
use crate::protocol::{
    Accept, Confirm, Hello, Introduce, Introduced, Message, Offer, Refused, StreamType, Working,
};
use crate::transfer::events::Route;
use crate::transfer::session::hello;

/// Time for each answer of the sender. While it counts files, the sender sends `Working` every 5 s.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// A sender that knew the code, and its offer.
pub struct Met {
    offer: Offer,
    names: Vec<RelativePath>,
    dialer: Arc<PeerDialer>,
    introduction: Introduction,
    route: Route,
    identity: Identity,
    config: Config,
}

/// An introduction at the sender, from the first message to the answer.
struct Introduction {
    connected: Connected,
    reader: MessageReader,
    writer: MessageWriter,
    /// The sender's key.
    key_id: KeyId,
    /// Known only to the two ends, once each has confirmed the other.
    secret: [u8; 32],
}

/// Connects to the sender at one of several places and proves that it knows the code. The first sender that answers counts.
/// Until both ends have proved that they know the words, the sender learns only this machine's key, and no file name is read.
///
/// # Errors
/// [`Error::Unreachable`] when no place answers; [`Error::Refused`] with [`Code::NotAdmitted`] when a word was wrong, which
/// has burnt the code, and with [`Code::NotFound`] when the code is not in use there; the errors of a lost connection.
pub async fn meet(
    credential: &Credential,
    whereabouts: Whereabouts,
    identity: &Identity,
    config: &Config,
) -> Result<Met> {
    let dialer = PeerDialer::new(whereabouts, credential.number, identity, config)?;
    let trust = trust_any_key(credential.key_id);
    let Dialed {
        connected, route, ..
    } = dialer.connect(&trust).await?;
    let mut introduction = Introduction::run(connected, credential, identity.key_id()).await?;
    let offer: Offer = answer(&mut introduction.reader, true).await?;
    let name = |name: &Vec<u8>| RelativePath::from_components([name]);
    let names = offer.names.0.iter().map(name).collect::<Result<_, _>>();
    let names = names
        .map_err(|bad| Error::Protocol(format!("the offer contains a bad name: {bad}").into()))?;
    Ok(Met {
        offer,
        names,
        dialer,
        introduction,
        route,
        identity: identity.clone(),
        config: config.clone(),
    })
}

impl Introduction {
    /// Exchanges the proofs with the sender on a new stream.
    async fn run(connected: Connected, credential: &Credential, own_key_id: KeyId) -> Result<Self> {
        let (key_id, _) = endpoint::peer(&connected.connection)
            .ok_or_else(|| not_trusted("it presented no certificate"))?;
        let parties = Parties::of(&connected.connection, key_id, own_key_id)
            .ok_or_else(|| not_trusted("TLS exports no keying material"))?;
        let opened = timeout(ANSWER_TIMEOUT, connected.connection.open_bi())
            .await
            .map_err(|_| timed_out())?;
        let (send, receive) = opened.map_err(StreamError::from)?;
        let mut reader = MessageReader::new(receive);
        let mut writer = MessageWriter::new(send);
        let (exchange, message) = Exchange::begin(Role::Receiver, credential, &parties);
        let mut head = BytesMut::new();
        head.put_u8(StreamType::Introduction as u8);
        hello().put(&mut head);
        Introduce {
            number: credential.number,
            exchange: message,
        }
        .put(&mut head);
        writer
            .write_chunks(&mut [head.freeze()], ANSWER_TIMEOUT)
            .await?;
        timeout(ANSWER_TIMEOUT, reader.read::<Hello>())
            .await
            .map_err(|_| timed_out())?
            .map_err(refused_or_lost)?;
        let introduced: Introduced = answer(&mut reader, false).await?;
        let confirmation = exchange
            .finish(&introduced.exchange)
            .ok_or_else(|| Error::Protocol("the sender's SPAKE2 message is invalid".into()))?;
        let confirm = Confirm {
            tag: confirmation.ours(),
        };
        writer.write_within(&confirm, ANSWER_TIMEOUT).await?;
        let confirm: Confirm = answer(&mut reader, false).await?;
        if !confirmation.is_right(confirm.tag) {
            let text = "the sender does not know the code, which is burnt now; ask for a new one";
            return Err(Error::Refused(Reason::new(Code::NotAdmitted, text)));
        }
        Ok(Self {
            connected,
            reader,
            writer,
            key_id,
            secret: confirmation.shared_secret(),
        })
    }

    /// Accepts the offer, waits until the sender has read it, and closes the connection.
    async fn accept(mut self, accept: &Accept) -> Result<()> {
        self.writer.write_within(accept, ANSWER_TIMEOUT).await?;
        self.writer.finish();
        // The sender ends the stream once it has admitted this key.
        timeout(ANSWER_TIMEOUT, self.reader.frame(Refused::LIMIT))
            .await
            .map_err(|_| timed_out())??;
        close(&self.connected).await;
        Ok(())
    }

    /// Declines the offer and closes the connection.
    async fn decline(mut self) {
        let refused = Refused {
            why: Reason::new(Code::Cancelled, "declined").into(),
        };
        let written = self.writer.write_within(&refused, ANSWER_TIMEOUT).await;
        if written.is_ok() {
            self.writer.deliver(ANSWER_TIMEOUT).await;
        }
        close(&self.connected).await;
    }
}

async fn close(connected: &Connected) {
    endpoint::close_and_flush(&connected.endpoint, &connected.connection, Code::Done).await;
}

impl Met {
    /// The offer. Its texts are the sender's, so they are printed only escaped.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// The names of the sources.
    pub fn names(&self) -> &[RelativePath] {
        &self.names
    }

    /// The sender's key.
    pub fn key_id(&self) -> KeyId {
        self.introduction.key_id
    }

    /// The sender's address.
    pub fn address(&self) -> SocketAddr {
        canonical(self.introduction.connected.connection.remote_address())
    }

    /// The route to the sender.
    pub fn route(&self) -> Route {
        self.route
    }

    /// Accepts the offer. For a text there is nothing more to do, and the result is `None`. Files are pulled with the returned
    /// client: by their [`names`](Self::names) and [`literal`](crate::client::PullOptions::literal)ly, so that nothing arrives
    /// under another name. Close the client with [`close_after_server`](Client::close_after_server).
    ///
    /// # Errors
    /// The errors of a lost connection.
    pub async fn accept(self) -> Result<Option<Client>> {
        let trust = ServerTrust {
            pin: Some(self.introduction.key_id),
            ..ServerTrust::default()
        };
        let accept = Accept {
            addresses: self.dialer.own_addresses(),
            ..Accept::default()
        };
        self.introduction.accept(&accept).await?;
        if self.offer.text.is_some() {
            return Ok(None);
        }
        if let Some(addresses) = &self.offer.addresses {
            self.dialer.add_reported(addresses).await;
        }
        let dialed = self.dialer.connect(&trust).await?;
        Client::over(dialed, self.dialer.dial(trust), &self.config).map(Some)
    }

    /// Accepts an offer to pair the two machines.
    ///
    /// # Errors
    /// [`Error::Usage`] for any other offer, which is declined; the errors of a lost connection.
    pub async fn pair(self) -> Result<Paired> {
        let Some(number) = self.offer.pair else {
            self.decline().await;
            return Err(Error::Usage(
                "cannot pair: the other machine sends files; run `haul pair` on both machines"
                    .into(),
            ));
        };
        let paired = Paired {
            key_id: self.introduction.key_id,
            secret: self.introduction.secret,
            number,
        };
        let own_number = pair::number_of_server(&self.identity);
        let accept = Accept {
            pair: Some(own_number),
            ..Accept::default()
        };
        self.introduction.accept(&accept).await?;
        Ok(paired)
    }

    /// Declines the offer and tells the sender.
    pub async fn decline(self) {
        self.introduction.decline().await;
    }
}

/// Bytes free for this user on the file system of a directory, which need not exist yet; `None` when the system does not report
/// them.
pub fn free_space(directory: &Path) -> Option<u64> {
    let existing = directory
        .ancestors()
        .find(|path| path.exists())
        .filter(|path| !path.as_os_str().is_empty());
    let stats = rustix::fs::statvfs(existing.unwrap_or(Path::new("."))).ok()?;
    stats.f_bavail.checked_mul(stats.f_frsize)
}

/// Disk space in bytes that the named entries of a directory and its partials use already. A transfer needs that much less.
/// Blocks.
pub fn held(directory: &Path, names: &[RelativePath]) -> u64 {
    let named = names
        .iter()
        .map(|name| directory.join(OsStr::from_bytes(name.as_bytes())));
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let partials = entries
        .map(|entry| entry.path())
        .filter(|path| is_partial(path));
    named.chain(partials).map(|path| on_disk(&path)).sum()
}

fn is_partial(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| is_partial_name(name.as_bytes()))
}

/// Disk space in bytes of a file, or of everything in a directory. Unreadable entries are not counted.
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

/// Bytes in a block of `st_blocks` on Linux (stat(2)). POSIX leaves the unit open.
const STAT_BLOCK: u64 = 512;

/// Reads the next message, or the sender's refusal. With `may_work`, the sender may still count files and send `Working`.
async fn answer<M: Message>(reader: &mut MessageReader, may_work: bool) -> Result<M> {
    loop {
        let frame = timeout(ANSWER_TIMEOUT, reader.frame(M::LIMIT.max(Refused::LIMIT)))
            .await
            .map_err(|_| timed_out())?;
        let frame = frame.map_err(refused_or_lost)?;
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

/// A sender that is busy with another receiver resets the stream.
fn refused_or_lost(error: StreamError) -> Error {
    match error {
        StreamError::Reset(Code::Busy) => Error::Refused(Reason::new(
            Code::Busy,
            "the sender is busy with another receiver; try again in a moment",
        )),
        other => other.into(),
    }
}

fn timed_out() -> Error {
    StreamError::TimedOut.into()
}

fn not_trusted(reason: &str) -> Error {
    Error::NotTrusted {
        host: "the sender".into(),
        why: reason.into(),
    }
}
