//! Listings: the server walks a directory, and the client reads at its own pace.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::serve::{ServerSession, hex, refuse};
use super::{WORKING_INTERVAL, answer, ask};
use crate::error::{Code, Error, Reason, Result};
use crate::net::rate_limit::RateLimits;
use crate::net::stream::{MessageReader, MessageStream, StreamError};
use crate::protocol::path::RelativePath;
use crate::protocol::{Components, End, Frame, List, Listed, Message, Ready, Unsendable, Working};
use crate::storage::listing::ListingWalk;
use crate::transfer::blocking::blocking;

/// Listings that a server serves at the same time. Each may hold 4 MiB of names.
const LISTING_LIMIT: usize = 32;
/// Names that one blocking task walks.
const WALK_BATCH: usize = 256;
/// How long a client that sends `Working` may read nothing, for example with an abandoned pager.
const READER_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// Returns the semaphore that limits a server's listings.
pub(crate) fn listings() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(LISTING_LIMIT))
}

/// Serves a listing.
pub(super) async fn serve(
    server: &ServerSession,
    list: List,
    control: MessageStream,
) -> Result<()> {
    let MessageStream { reader, mut writer } = control;
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
            Reason::new(
                Code::Busy,
                "too many listings at the same time; try again later",
            ),
        )
        .await;
    };
    tracing::info!(id = %hex(&list.session), recursive = list.recursive, "list");
    let store = server.store.clone();
    let deadline = server.config.deadline;
    let begun = blocking("list", move || {
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
        let walked = blocking("list", move || {
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
    // A stopping server closes the connection when no session runs, which would discard undelivered data.
    tokio::select! {
        biased;
        () = writer.deliver(READER_TIMEOUT) => {}
        // The client has the end, or wants no more.
        _ = &mut alive => {}
    }
    Ok(())
}

/// Waits until the client stops sending `Working`, and returns the cause.
async fn alive(mut reader: MessageReader, deadline: Duration) -> Error {
    loop {
        let frame = match timeout(deadline, reader.frame(Working::LIMIT)).await {
            Ok(Ok(Some(frame))) => frame,
            Ok(Ok(None)) => return Error::Lost("the client ended the listing".into()),
            Ok(Err(error)) => return error.into(),
            Err(_) => return StreamError::TimedOut.into(),
        };
        if let Err(malformed) = frame.decode::<Working>() {
            return StreamError::from(malformed).into();
        }
    }
}

/// An item of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListItem {
    /// An existing file or directory. Its path is valid on this machine too.
    Listed(RelativePath, Listed),
    /// An entry whose metadata cannot be read.
    Failed(RelativePath, Reason),
}

/// A listing in progress. Unread items stay at the server, so a person can page through them. Dropping it ends the
/// listing.
pub struct Listing {
    reader: MessageReader,
    deadline: Duration,
    alive: JoinHandle<()>,
    ended: bool,
}

impl Listing {
    /// Requests a listing.
    pub(crate) async fn begin(
        connection: &quinn::Connection,
        list: &List,
        deadline: Duration,
    ) -> Result<Self> {
        let MessageStream {
            mut reader,
            mut writer,
        } = MessageStream::open(connection, deadline).await?;
        ask(&mut writer, list, deadline).await?;
        answer(&mut reader, deadline).await?;
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

    /// Returns the next item; `None` at the end. Cancelling loses nothing.
    ///
    /// [`Error::Lost`] if the connection is lost or the server is silent; [`Error::Stopping`] if the server stops;
    /// [`Error::Protocol`] if it breaks the protocol.
    pub async fn next(&mut self) -> Result<Option<ListItem>> {
        if self.ended {
            return Ok(None);
        }
        let frame = timeout(self.deadline, self.reader.frame(Listed::LIMIT)).await;
        let frame: Frame = frame
            .map_err(|_| StreamError::TimedOut)??
            .ok_or(StreamError::Ended)?;
        let path = |path: &Components| {
            RelativePath::from_components(&path.0).map_err(|bad| {
                Error::Protocol(format!("the server lists an invalid name: {bad}").into())
            })
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
