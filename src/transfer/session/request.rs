//! The first messages of a control stream: `Hello`, the request, and the answer to it.

use std::time::Duration;

use bytes::{BufMut, BytesMut};
use tokio::time::timeout;

use crate::error::{Code, Error, Reason, Result};
use crate::net::stream::{MessageReader, MessageWriter, StreamError};
use crate::protocol::{Hello, Message, Ready, Refused, StreamType, WireFilter};
use crate::storage::KeptShare;
use crate::storage::filter::{Filter, Rules};

/// Interval of `Working` messages. They show that an end is alive while it has nothing else to say: its entries wait for
/// admission, its last writes for the disk, or its user for the next page.
pub(super) const WORKING_INTERVAL: Duration = Duration::from_secs(5);

pub(crate) fn hello() -> Hello {
    Hello {
        features: Vec::new(),
        agent: concat!("haul/", env!("CARGO_PKG_VERSION")).into(),
    }
}

/// Sends `Hello` and a request on a new control stream.
pub(super) async fn ask<M: Message>(
    writer: &mut MessageWriter,
    request: &M,
    deadline: Duration,
) -> Result<()> {
    let mut head = BytesMut::new();
    head.put_u8(StreamType::Control as u8);
    hello().put(&mut head);
    request.put(&mut head);
    Ok(writer.write_chunks(&mut [head.freeze()], deadline).await?)
}

/// Reads the answer to a request.
pub(super) async fn answer(reader: &mut MessageReader, deadline: Duration) -> Result<Ready> {
    let answer = async {
        reader.read::<Hello>().await?;
        let frame = reader.frame(Refused::LIMIT).await?;
        frame.ok_or(StreamError::Ended)
    };
    let frame = timeout(deadline, answer)
        .await
        .map_err(|_| StreamError::TimedOut)??;
    match frame.kind {
        Refused::TYPE => {
            let refused: Refused = frame.decode().map_err(StreamError::from)?;
            Err(Error::from(Reason::from(refused.why)))
        }
        _ => Ok(frame.decode::<Ready>().map_err(StreamError::from)?),
    }
}

/// Refuses a request.
pub(super) async fn refuse(
    mut writer: MessageWriter,
    why: Reason,
    deadline: Duration,
) -> Result<()> {
    let refused = Refused { why: why.into() };
    writer.write_within(&refused, deadline).await?;
    // A stopping server closes the connection when no session runs, which would discard undelivered data.
    writer.deliver(deadline).await;
    Ok(())
}

/// Reads the filter of a request, and counts the memory of its rules.
pub(super) fn requested_filter(
    filter: Option<&WireFilter>,
    memory: &KeptShare,
) -> Result<Filter, Reason> {
    let filter = filter.cloned().unwrap_or_default();
    let rules = Rules::within(filter.rules.into_iter().map(Vec::from).collect(), memory);
    let rules = rules.map_err(|bad| Reason::new(Code::Unsupported, bad.to_string()))?;
    Ok(Filter {
        rules,
        gitignore: filter.gitignore,
        only: None,
    })
}
