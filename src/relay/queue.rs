//! The queue of a pair that has a rate limit.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::udp::EcnCodepoint;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::socket::Datagrams;
use crate::protocol::rate::Rate;

/// Longest time that a datagram waits for the rate of its pair. A short queue slows both ends down like any
/// bottleneck; dropping all excess would lose a third.
const QUEUE_INTERVAL: Duration = Duration::from_millis(50);
/// Smallest size of a queue in bytes: 32 usual datagrams.
const MIN_QUEUE_SIZE: usize = 32 * 1_328;
/// Largest size of a queue in bytes: 1,024 usual datagrams.
const MAX_QUEUE_SIZE: usize = 1_024 * 1_328;
/// Bytes that a datagram takes in a queue in addition to its own, so that empty ones are not free.
const DATAGRAM_OVERHEAD: usize = 128;

/// The input of a pair's queue. The queue's task ends when this is dropped.
pub(super) struct Queue {
    room: Arc<Semaphore>,
    to: mpsc::UnboundedSender<Waiting>,
}

/// Datagrams that wait for their turn.
pub(super) struct Waiting {
    pub(super) bytes: Vec<u8>,
    /// See [`Datagrams`].
    pub(super) length: usize,
    pub(super) ecn: Option<EcnCodepoint>,
    pub(super) to: SocketAddr,
    pub(super) _room: OwnedSemaphorePermit,
}

impl Queue {
    /// A queue for a pair with this rate, and its output.
    pub(super) fn new(rate: Rate) -> (Self, mpsc::UnboundedReceiver<Waiting>) {
        let bytes = (rate.bytes() as f64 * QUEUE_INTERVAL.as_secs_f64()) as usize;
        let room = Arc::new(Semaphore::new(bytes.clamp(MIN_QUEUE_SIZE, MAX_QUEUE_SIZE)));
        let (to, waiting) = mpsc::unbounded_channel();
        (Self { room, to }, waiting)
    }

    /// Queues the datagrams that fit; the others are lost, as on any congested path.
    pub(super) fn put(&self, datagrams: Datagrams<'_>, to: SocketAddr) {
        // Only one task queues datagrams, so the room cannot shrink meanwhile.
        let fitting =
            datagrams.first(self.room.available_permits() / (datagrams.length + DATAGRAM_OVERHEAD));
        let Datagrams { bytes, length, ecn } = fitting;
        let count = fitting.count();
        let cost = u32::try_from(bytes.len() + count * DATAGRAM_OVERHEAD).unwrap_or(u32::MAX);
        if count > 0
            && let Ok(room) = self.room.clone().try_acquire_many_owned(cost)
        {
            // Fails only when the process ends.
            let _ = self.to.send(Waiting {
                bytes: bytes.to_vec(),
                length,
                ecn,
                to,
                _room: room,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn queues_are_limited_in_bytes_with_datagram_overhead() {
        let (to, mut waiting) = mpsc::unbounded_channel();
        let queue = Queue {
            room: Arc::new(Semaphore::new(MIN_QUEUE_SIZE)),
            to,
        };
        let peer = SocketAddr::from(([192, 0, 2, 2], 7));
        // Of datagrams received together, those that fit are queued.
        queue.put(
            Datagrams {
                bytes: &[0; 60_000],
                length: 1_200,
                ecn: None,
            },
            peer,
        );
        let short = Datagrams {
            bytes: &[0],
            length: 1,
            ecn: None,
        };
        (0..1_000).for_each(|_| queue.put(short, peer));
        drop(queue);
        let mut queued = 0;
        let mut lengths = Vec::new();
        while let Some(Waiting { bytes, length, .. }) = waiting.recv().await {
            queued += bytes.len() + bytes.len().div_ceil(length) * DATAGRAM_OVERHEAD;
            lengths.push(bytes.len());
        }
        assert!(
            queued <= MIN_QUEUE_SIZE && lengths.len() <= MIN_QUEUE_SIZE / DATAGRAM_OVERHEAD,
            "{queued}"
        );
        assert_eq!(lengths[0], 32 * 1_200);
    }
}
