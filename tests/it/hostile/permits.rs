//! Peers that take permits and do not use them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use haul::Config;

use crate::hostile::peer::*;

/// Permits for large files of the server in these tests; it has as many for small ones.
const PERMITS: usize = 4;

/// The server never returns a stalled transfer's permit on its own: only another transfer's right to it does.
fn config() -> Config {
    Config {
        max_transfers: 2 * PERMITS,
        stall: Duration::from_secs(3600),
        ..patient()
    }
}

/// A peer with transfers that have begun and then stand still. They are kept open as long as this is.
struct SlowPeer {
    _peer: Peer,
    session: Session,
    streams: Vec<(
        quinn::SendStream,
        haul::internal::net::stream::MessageReader,
    )>,
}

impl SlowPeer {
    async fn with_transfers(arena: &Arena, transfers: u64) -> Self {
        let peer = Peer::connect(&arena.host).await;
        let mut session = peer.session().await;
        let mut streams = Vec::new();
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        for id in 0..transfers {
            let name = format!("slow{}", NUMBER.fetch_add(1, Ordering::Relaxed));
            session.wanted(id, &name, 1 << 20).await;
            streams.push(session.transfer(&plan(id, &[(0, 1 << 20)]), b"x").await);
        }
        Self {
            _peer: peer,
            session,
            streams,
        }
    }

    /// Sends a byte of each transfer, which then needs a permit again.
    async fn trickle(&mut self) {
        for (stream, _) in &mut self.streams {
            within(stream.write_all(b"y")).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_transfers_hold_up_no_file_of_another_key() {
    let arena = Arena::new(config());
    let mut slow = SlowPeer::with_transfers(&arena, PERMITS as u64).await;
    for id in 100..120 {
        let waiting = file(id, &format!("waiting{id}"), 1 << 20);
        slow.session.announce(&waiting).await;
    }
    arena.honest().await;
    slow.trickle().await;
    arena.honest().await;
    drop(slow);
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_transfers_of_many_keys_take_turns() {
    let arena = Arena::new(config());
    let mut slow = Vec::new();
    for _ in 0..2 * PERMITS {
        // Each is admitted although those before it have taken all permits.
        slow.push(SlowPeer::with_transfers(&arena, 1).await);
    }
    arena.honest().await;
    for peer in &mut slow {
        peer.trickle().await;
    }
    arena.honest().await;
    // The slow ones lose nothing: each can still end its transfer.
    for mut peer in slow {
        let (mut stream, mut receipt) = peer.streams.pop().unwrap();
        let mut content = b"xy".to_vec();
        content.resize(1 << 20, b'z');
        within(stream.write_all(&content[2..])).await.unwrap();
        within(stream.write_all(&trailer(&content))).await.unwrap();
        stream.finish().unwrap();
        let committed = within(async {
            loop {
                match receipt.frame(4096).await.unwrap().unwrap() {
                    frame if frame.decode::<haul::internal::protocol::Working>().is_ok() => {}
                    frame => return frame.decode::<haul::internal::protocol::Committed>(),
                }
            }
        });
        assert_eq!(committed.await.unwrap().bytes, 1 << 20);
    }
    arena.unharmed().await;
}
