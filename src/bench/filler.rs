//! The load: meaningless bytes, written and read as fast as the path takes them.

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

/// One block of filler in bytes. It is sent repeatedly without being copied, so that a load needs no memory.
const BLOCK_SIZE: usize = 64 << 10;
/// Bytes read between two updates of flow control, which take a lock.
const FLOW_CONTROL_STEP: usize = 64 << 10;
/// Limit of gaps in the received bytes: 16,384 lost packets in one window are no real link.
const MAX_GAPS: usize = 16_384;

/// Returns a block that cannot be compressed on the path.
fn block() -> Bytes {
    static SHARED_BLOCK: OnceLock<Bytes> = OnceLock::new();
    let made = SHARED_BLOCK.get_or_init(|| {
        let mut block = vec![0; BLOCK_SIZE];
        blake3::Hasher::new().finalize_xof().fill(&mut block);
        block.into()
    });
    made.clone()
}

/// Writes filler for `time`, within the rate limits. A peer that grants no credit does not prolong it.
pub(super) async fn fill(
    writer: &mut MessageWriter,
    time: Duration,
    limits: &RateLimits,
) -> Result<(), StreamError> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        let part = block().slice(..BLOCK_SIZE.min(limits.block()));
        let write = async {
            limits.take(part.len()).await;
            writer.write_bytes(part).await
        };
        match timeout_at(end, write).await {
            Ok(written) => written?,
            Err(_) => break,
        }
        // On a path that always takes more, nothing else in this loop yields.
        consume_budget().await;
    }
    Ok(())
}

/// Reads filler to its end, discards and counts it. It reads unordered: a lost packet blocks nothing, and quinn ends
/// a connection whose ordered stream has 1,024 gaps.
pub(super) async fn drain(
    reader: MessageReader,
    flow_control: &FlowControl,
    bytes: &AtomicU64,
) -> Result<(), StreamError> {
    let (mut stream, rest, start) = reader.into_parts();
    bytes.fetch_add(rest.len() as u64, Ordering::Relaxed);
    let mut received = ReceivedRanges {
        frontier: start + rest.len() as u64,
        beyond: BTreeMap::new(),
    };
    let mut unreported = 0;
    while let Some(chunk) = stream.read_chunk(usize::MAX, false).await? {
        received.add(chunk.offset, chunk.bytes.len() as u64)?;
        bytes.fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
        unreported += chunk.bytes.len();
        if unreported >= FLOW_CONTROL_STEP {
            // Nothing is kept; this lets the window grow with the rate.
            flow_control.add_unflushed(unreported);
            flow_control.release(unreported);
            unreported = 0;
        }
        consume_budget().await;
    }
    Ok(())
}

/// The received ranges of a stream.
struct ReceivedRanges {
    /// All bytes before this offset were received.
    frontier: u64,
    /// Beyond the frontier: start and end of each part. None touches another.
    beyond: BTreeMap<u64, u64>,
}

impl ReceivedRanges {
    /// Adds a range. QUIC never delivers a byte twice.
    fn add(&mut self, offset: u64, length: u64) -> Result<(), StreamError> {
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

    fn received() -> ReceivedRanges {
        ReceivedRanges {
            frontier: 0,
            beyond: BTreeMap::new(),
        }
    }

    #[test]
    fn ranges_in_any_order_leave_no_gap() {
        let mut received = received();
        for offset in [10, 30, 20, 50, 0, 40] {
            received.add(offset, 10).unwrap();
        }
        assert_eq!((received.frontier, received.beyond.len()), (60, 0));
    }

    #[test]
    fn a_peer_that_skips_every_other_byte_is_refused() {
        let mut received = received();
        let gaps = (1..).find(|i| received.add(2 * i, 1).is_err()).unwrap();
        assert_eq!(gaps, MAX_GAPS as u64 + 1);
    }
}
