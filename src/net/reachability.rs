//! Finds out early whether a server can be reached: what the system reports, and whether the server has replied.

use crate::error::lock::lock;
use std::convert::Infallible;
use std::future::pending;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::net::UdpSocket;
use tokio::time::Instant;

/// Datagram that makes the system report a closed port. A first byte of zero is neither a long header nor, without
/// the fixed bit, a short one, so QUIC endpoints drop it (RFC 9000, section 17.3.1).
const PROBE: [u8; 1] = [0];
/// Bit set in the first byte of every handshake packet (RFC 8999, section 5.1). A reply without it is a stateless
/// reset: the server has stopped.
const LONG_HEADER: u8 = 0x80;

pub(super) fn unspecified(family_of: SocketAddr) -> SocketAddr {
    match family_of {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// Resolves to the reason when the system reports that the address cannot be reached; otherwise never.
///
/// quinn's socket is unconnected and never learns of ICMP "port unreachable". A connected socket does.
pub(super) async fn refusal(address: SocketAddr) -> String {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable, PermissionDenied};
    let error = probe(address).await;
    match error.kind() {
        ConnectionRefused => format!(
            "nothing listens there: is `haul serve` running, and on port {}?",
            address.port()
        ),
        HostUnreachable | NetworkUnreachable | PermissionDenied => error.to_string(),
        // Other errors, such as too many open files, say nothing about the server.
        _ => pending().await,
    }
}

/// Resolves when the system reports that no process has this port open; otherwise never.
pub(crate) async fn port_is_closed(address: SocketAddr) {
    if probe(address).await.kind() != io::ErrorKind::ConnectionRefused {
        pending().await
    }
}

/// Sends probes to an address from a connected socket, and resolves to the system's error.
async fn probe(address: SocketAddr) -> io::Error {
    let probe = async || -> io::Result<Infallible> {
        let socket = UdpSocket::bind(unspecified(address)).await?;
        socket.connect(address).await?;
        socket.send(&PROBE).await?;
        loop {
            // Replies to the probe are ignored.
            socket.recv(&mut [0]).await?;
        }
    };
    let Err(error) = probe().await;
    error
}

/// A UDP socket that records when the last handshake packet arrived from the server.
#[derive(Debug)]
pub(super) struct ReplySocket {
    pub(super) inner: Arc<dyn AsyncUdpSocket>,
    pub(super) server: SocketAddr,
    pub(super) last_reply: Mutex<Option<Instant>>,
}

impl ReplySocket {
    pub(super) fn last_reply(&self) -> Option<Instant> {
        *lock(&self.last_reply)
    }
}

impl AsyncUdpSocket for ReplySocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let received = ready!(self.inner.poll_recv(cx, bufs, meta))?;
        let replied = bufs.iter().zip(&meta[..received]).any(|(packet, meta)| {
            let from_server =
                (meta.addr.ip(), meta.addr.port()) == (self.server.ip(), self.server.port());
            from_server && packet.first().is_some_and(|first| first & LONG_HEADER != 0)
        });
        // Packets after the handshake have a short header.
        if replied {
            *lock(&self.last_reply) = Some(Instant::now());
        }
        Poll::Ready(Ok(received))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
