//! The load itself: bytes that mean nothing, written and read as fast as the way takes them.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::task::consume_budget;
use tokio::time::{Instant, timeout_at};

use crate::net::flow_control::FlowControl;
use crate::net::rate_limit::RateLimits;
use crate::net::stream::{MessageReader, MessageWriter, StreamError};
use crate::protocol::Malformed;

/// One block of filler in bytes. It is sent over and over without being copied, so that a load takes no memory.
const BLOCK: usize = 64 << 10;
/// Bytes that are read between two settlements with the window, which cost a lock.
const SETTLE: usize = 64 << 10;
/// Gaps in what has come, over which the peer is not honest: 16,384 lost packets in one window are no link.
const MAX_GAPS: usize = 16_384;

/// Bytes that nothing on the way can compress.
fn block() -> Bytes {
    static BLOCK_OF_ALL: OnceLock<Bytes> = OnceLock::new();
    let made = BLOCK_OF_ALL.get_or_init(|| {
        let mut block = vec![0; BLOCK];
        blake3::Hasher::new().finalize_xof().fill(&mut block);
        block.into()
    });
    made.clone()
}

/// Writes filler for so long, within the limits. A peer that grants no credit does not prolong it.
pub(super) async fn fill(
    writer: &mut MessageWriter,
    time: Duration,
    limits: &RateLimits,
) -> Result<(), StreamError> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        let part = block().slice(..BLOCK.min(limits.block()));
        let write = async {
            limits.take(part.len()).await;
            writer.write_bytes(part).await
        };
        match timeout_at(end, write).await {
            Ok(written) => written?,
            Err(_) => break,
        }
        // On a way that always takes more nothing else here would make room for others.
        consume_budget().await;
    }
    Ok(())
}

/// Reads filler to its end, throws it away, and counts it. In any order: one lost packet holds up nothing, and an ordered
/// reader's connection dies of 1,024 of them.
pub(super) async fn drain(
    reader: MessageReader,
    window: &FlowControl,
    bytes: &AtomicU64,
) -> Result<(), StreamError> {
    let (mut stream, rest, start) = reader.into_parts();
    bytes.fetch_add(rest.len() as u64, Ordering::Relaxed);
    let mut come = Come {
        frontier: start + rest.len() as u64,
        beyond: BTreeMap::new(),
    };
    let mut unsettled = 0;
    while let Some(chunk) = stream.read_chunk(usize::MAX, false).await? {
        come.mark(chunk.offset, chunk.bytes.len() as u64)?;
        bytes.fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
        unsettled += chunk.bytes.len();
        if unsettled >= SETTLE {
            // Nothing is kept; it lets the window grow with the rate.
            window.hold(unsettled);
            window.release(unsettled);
            unsettled = 0;
        }
        consume_budget().await;
    }
    Ok(())
}

/// What of a stream has come.
struct Come {
    /// All before it.
    frontier: u64,
    /// Beyond the frontier: start and end of each part. None touches another.
    beyond: BTreeMap<u64, u64>,
}

impl Come {
    /// QUIC never delivers a byte twice.
    fn mark(&mut self, offset: u64, length: u64) -> Result<(), StreamError> {
        let mut start = offset;
        let mut end = offset + length;
        if let Some(joined) = self.beyond.remove(&end) {
            end = joined;
        }
        if start == self.frontier {
            self.frontier = end;
            return Ok(());
        }
        if let Some((&before, &touching)) = self.beyond.range(..start).next_back()
            && touching == start
        {
            start = before;
        }
        self.beyond.insert(start, end);
        if self.beyond.len() > MAX_GAPS {
            return Err(Malformed::Payload {
                name: "filler",
                reason: format!("over {MAX_GAPS} gaps"),
            }
            .into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn come() -> Come {
        Come {
            frontier: 0,
            beyond: BTreeMap::new(),
        }
    }

    #[test]
    fn what_comes_in_any_order_leaves_no_gap() {
        let mut come = come();
        for offset in [10, 30, 20, 50, 0, 40] {
            come.mark(offset, 10).unwrap();
        }
        assert_eq!((come.frontier, come.beyond.len()), (60, 0));
    }

    #[test]
    fn a_peer_that_sends_only_every_other_byte_is_found_out() {
        let mut come = come();
        let gaps = (1..).find(|i| come.mark(2 * i, 1).is_err()).unwrap();
        assert_eq!(gaps, MAX_GAPS as u64 + 1);
    }
}
