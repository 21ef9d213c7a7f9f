//! A listing at the client, which reads it at its own pace.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::request::{WORKING_INTERVAL, answer, ask};
use crate::error::{Error, Reason, Result};
use crate::net::stream::{MessageReader, MessageStream, StreamError};
use crate::protocol::path::RelativePath;
use crate::protocol::{Components, End, Frame, List, Listed, Message, Unsendable, Working};
use crate::transfer::context::Context;

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
    pub(crate) async fn begin(context: &Context, list: &List) -> Result<Self> {
        let deadline = context.config.deadline;
        let MessageStream {
            mut reader,
            mut writer,
        } = MessageStream::open(context.connection.quic(), deadline).await?;
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
