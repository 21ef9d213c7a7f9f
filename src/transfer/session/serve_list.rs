//! A listing at the server, which walks a directory as fast as the client reads.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::timeout;

use super::request::refuse;
use super::server_context::{ServerContext, hex};
use crate::error::{Code, Error, Reason, Result};
use crate::net::share::{ShareLimits, Shares};
use crate::net::stream::{MessageReader, MessageStream, MessageWriter, StreamError};
use crate::protocol::path::RelativePath;
use crate::protocol::{Components, End, List, Message, Ready, Unsendable, Working};
use crate::storage::listing::{ListingItem, ListingWalk};
use crate::transfer::blocking::blocking;
use crate::transfer::context::Context;

/// Listings that a server serves at the same time. Their names are counted in the memory of sessions. A key gets a quarter, because a client may
/// hold a listing for [`READER_TIMEOUT`].
const LISTINGS: ShareLimits = ShareLimits {
    all: 32,
    key: 8,
    network: 16,
    site: 24,
};
/// Names that one blocking task walks.
const WALK_BATCH: usize = 256;
/// How long a client that sends `Working` may read nothing, for example with an abandoned pager.
const READER_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// Returns the shares of a server's listings.
pub(crate) fn listings() -> Arc<Shares> {
    Shares::new(LISTINGS)
}

/// Serves a listing.
pub(super) async fn serve_list(
    server: &ServerContext,
    list: List,
    control: MessageStream,
) -> Result<()> {
    let deadline = server.context.config.deadline;
    let MessageStream { reader, mut writer } = control;
    if let Err(why) = server.check_read().and_then(|()| server.check_running()) {
        return refuse(writer, why, deadline).await;
    }
    let Some(_share) = server.listings.take(server.holder) else {
        let text = "too many listings at the same time; try again later";
        return refuse(writer, Reason::new(Code::Busy, text), deadline).await;
    };
    tracing::info!(id = %hex(&list.session), recursive = list.recursive, "list");
    let store = server.store.clone();
    let memory = server.context.connection.kept().clone();
    let begun = blocking("list", move || {
        store.check_root()?;
        let path = RelativePath::from_components(&list.path.0)?;
        ListingWalk::begin(store, &path, list.recursive, memory)
    });
    let walk = match begun.await {
        Ok(walk) => walk,
        Err(why) => return refuse(writer, why, deadline).await,
    };
    writer.write_within(&Ready::default(), deadline).await?;
    let mut lost = pin!(silence(reader, deadline));
    let end = send_entries(&server.context, walk, &mut writer, lost.as_mut()).await?;
    writer.write_within(&end, deadline).await?;
    // A stopping server closes the connection when no session runs, which would discard undelivered data.
    tokio::select! {
        biased;
        () = writer.deliver(READER_TIMEOUT) => {}
        // The client has the end, or wants no more.
        _ = &mut lost => {}
    }
    Ok(())
}

/// Walks and sends, until the end of the walk or until the server stops. Fails with the error of `lost` if that is first.
async fn send_entries(
    context: &Context,
    mut walk: ListingWalk,
    writer: &mut MessageWriter,
    mut lost: Pin<&mut impl Future<Output = Error>>,
) -> Result<End> {
    let limits = &context.limits;
    let mut end = End::default();
    loop {
        if context.stopping.is_cancelled() {
            end.interrupted = Some(Reason::from(Code::Stopping).into());
            return Ok(end);
        }
        let walked = blocking("list", move || {
            let part: Vec<_> = walk.by_ref().take(WALK_BATCH).collect();
            Ok((part, walk))
        });
        let (part, rest) = walked.await.map_err(Error::Refused)?;
        walk = rest;
        if part.is_empty() {
            return Ok(end);
        }
        let mut buffer = put_entries(part, &mut end);
        while !buffer.is_empty() {
            let part = buffer.split_to(buffer.len().min(limits.block())).freeze();
            limits.take(part.len()).await;
            tokio::select! {
                written = timeout(READER_TIMEOUT, writer.write_bytes(part)) => written.map_err(|_| StreamError::TimedOut)??,
                error = &mut lost => return Err(error),
            }
        }
    }
}

/// Encodes entries, and counts them in `end`.
fn put_entries(entries: Vec<ListingItem>, end: &mut End) -> BytesMut {
    let mut buffer = BytesMut::new();
    for found in entries {
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
    buffer
}

/// Waits until the client stops sending `Working`, and returns the cause.
async fn silence(mut reader: MessageReader, deadline: Duration) -> Error {
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
