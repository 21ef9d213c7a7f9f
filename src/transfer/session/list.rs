//! A listing: the server walks, the client reads as fast as it likes.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::serve::{ServerSession, hex, refuse};
use super::{Bi, WORKING_INTERVAL, answer, ask};
use crate::error::{Code, Error, Reason, Result};
use crate::net::rate_limit::RateLimits;
use crate::net::stream::{MessageReader, StreamError};
use crate::protocol::path::RelativePath;
use crate::protocol::{Components, End, Frame, List, Listed, Message, Ready, Unsendable, Working};
use crate::storage::listing::ListingWalk;

/// Listings that a server has open at the same time; each may keep 4 MiB of names.
const LISTING_LIMIT: usize = 32;
/// Names looked at in one go off the network threads.
const WALK_BATCH: usize = 256;
/// A client that reads nothing for so long, though it says that it is alive, has left its pager open and gone home.
const READER_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// Room for a server's listings.
pub(crate) fn listings() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(LISTING_LIMIT))
}

/// The server's side.
pub(super) async fn serve(
    server: &ServerSession,
    list: List,
    (reader, mut writer): Bi,
) -> Result<()> {
    if !server.may_read {
        return refuse(
            server,
            writer,
            Reason::new(Code::NotAllowed, "this key may not read on this server"),
        )
        .await;
    }
    if server.stopping.is_cancelled() {
        return refuse(server, writer, Code::Stopping.into()).await;
    }
    let Ok(_room) = server.listings.clone().try_acquire_owned() else {
        return refuse(
            server,
            writer,
            Reason::new(Code::Busy, "too many listings at a time; try again later"),
        )
        .await;
    };
    tracing::info!(id = %hex(&list.session), recursive = list.recursive, "list");
    let store = server.store.clone();
    let deadline = server.config.deadline;
    let begun = blocking(move || {
        store.check_root()?;
        ListingWalk::begin(
            store,
            &RelativePath::from_components(&list.path.0)?,
            list.recursive,
        )
    });
    let mut walk = match begun.await {
        Ok(walk) => walk,
        Err(why) => return refuse(server, writer, why).await,
    };
    writer.write_within(&Ready::default(), deadline).await?;
    let limits = RateLimits::new(server.limit.clone());
    let mut end = End::default();
    let mut alive = pin!(alive(reader, deadline));
    loop {
        if server.stopping.is_cancelled() {
            end.interrupted = Some(Reason::from(Code::Stopping).into());
            break;
        }
        let walked = blocking(move || {
            let part: Vec<_> = walk.by_ref().take(WALK_BATCH).collect();
            Ok((part, walk))
        });
        let (part, rest) = walked.await.map_err(Error::Refused)?;
        walk = rest;
        if part.is_empty() {
            break;
        }
        let mut buffer = BytesMut::new();
        for found in part {
            match found {
                Ok(listed) => {
                    end.entries += 1;
                    listed.put(&mut buffer);
                }
                Err((path, why)) => {
                    end.failed += 1;
                    Unsendable {
                        path: Components::from(&path),
                        why: why.into(),
                        omitted: None,
                    }
                    .put(&mut buffer);
                }
            }
        }
        while !buffer.is_empty() {
            let part = buffer.split_to(buffer.len().min(limits.block())).freeze();
            limits.take(part.len()).await;
            tokio::select! {
                written = timeout(READER_TIMEOUT, writer.write_bytes(part)) => written.map_err(|_| StreamError::TimedOut)??,
                gone = &mut alive => return Err(gone),
            }
        }
    }
    writer.write_within(&end, deadline).await?;
    // A server that stops closes the connection once no session runs, and what is not delivered then is lost.
    tokio::select! {
        biased;
        () = writer.deliver(READER_TIMEOUT) => {}
        // It has the end, or wants no more.
        _ = &mut alive => {}
    }
    Ok(())
}

/// Ends when the client says no more that it is alive.
async fn alive(mut reader: MessageReader, deadline: Duration) -> Error {
    loop {
        let frame = match timeout(deadline, reader.frame(Working::LIMIT)).await {
            Ok(Ok(Some(frame))) => frame,
            Ok(Ok(None)) => return Error::Lost("the client wants no more of it".into()),
            Ok(Err(error)) => return error.into(),
            Err(_) => return StreamError::TimedOut.into(),
        };
        if let Err(malformed) = frame.decode::<Working>() {
            return StreamError::from(malformed).into();
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Reason> + Send + 'static,
) -> Result<T, Reason> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| {
        Err(Reason::new(
            Code::Internal,
            "a fault inside haul while listing",
        ))
    })
}

/// What a listing brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListItem {
    /// Something stands there. Its path is one that could stand here too.
    Listed(RelativePath, Listed),
    /// Something could not be looked at.
    Failed(RelativePath, Reason),
}

/// A listing that is being read. What is not read yet stays at the server, so that it may be read as slowly as a person
/// does. Dropping it ends it.
pub struct Listing {
    reader: MessageReader,
    deadline: Duration,
    alive: JoinHandle<()>,
    ended: bool,
}

impl Listing {
    /// Asks for a listing.
    pub(crate) async fn begin(
        connection: &quinn::Connection,
        list: &List,
        deadline: Duration,
    ) -> Result<Self> {
        let (_, (mut reader, mut writer)) = ask(connection, list, deadline, |_| {}).await?;
        timeout(deadline, answer(&mut reader))
            .await
            .map_err(|_| Error::from(StreamError::TimedOut))??;
        let alive = tokio::spawn(async move {
            loop {
                sleep(WORKING_INTERVAL).await;
                if writer.write_within(&Working {}, deadline).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            reader,
            deadline,
            alive,
            ended: false,
        })
    }

    /// The next of what is found; `None` when there is no more. Cancelling loses nothing.
    ///
    /// # Errors
    /// [`Error::Lost`] with the connection, or when the server is silent; [`Error::Stopping`] when it stops;
    /// [`Error::Protocol`] when it breaks the protocol.
    pub async fn next(&mut self) -> Result<Option<ListItem>> {
        if self.ended {
            return Ok(None);
        }
        let frame = timeout(self.deadline, self.reader.frame(Listed::LIMIT)).await;
        let frame: Frame = frame
            .map_err(|_| StreamError::TimedOut)??
            .ok_or(StreamError::Ended)?;
        let path = |path: &Components| {
            RelativePath::from_components(&path.0)
                .map_err(|bad| Error::Protocol(format!("it lists a name: {bad}").into()))
        };
        Ok(match frame.kind {
            Listed::TYPE => {
                let listed: Listed = frame.decode().map_err(StreamError::from)?;
                Some(ListItem::Listed(path(&listed.path)?, listed))
            }
            Unsendable::TYPE => {
                let Unsendable {
                    path: name, why, ..
                } = frame.decode().map_err(StreamError::from)?;
                Some(ListItem::Failed(path(&name)?, why.into()))
            }
            _ => {
                let end: End = frame.decode().map_err(StreamError::from)?;
                self.ended = true;
                self.alive.abort();
                match end.interrupted {
                    Some(why) => return Err(Reason::from(why).into()),
                    None => None,
                }
            }
        })
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        self.alive.abort();
    }
}
