//! A server's UDP socket that keeps the limit on amplification: to an address that has proved nothing it sends at most three
//! times what came from there (RFC 9000, section 8.1).
//!
//! quinn checks that some of the limit is left, and then sends a whole datagram, so that it exceeds the limit by up to 1,200
//! bytes: 3.23 times 1,200 bytes with haul's certificate, measured. An honest client notices nothing, because the whole first
//! answer of a server is below the limit; only repetitions to a silent address are dropped.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

use crate::error::lock::lock;

/// How many times what was received may be sent (RFC 9000, section 8.1).
const LIMIT: usize = 3;
/// Addresses whose bytes are counted: some times more than handshakes are under way. A server asks a client whose place in the
/// table is in use to prove its address.
const SLOTS: usize = 1 << 12;

/// The bytes of addresses that have lately sent a first datagram.
pub(crate) struct UnprovenAddresses {
    /// An address has one place in the table, which forged addresses cannot choose.
    hasher: RandomState,
    slots: Mutex<Vec<Option<Slot>>>,
    /// Places whose address is limited. Usually none is, and then sending needs no lock.
    limited: AtomicUsize,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    address: SocketAddr,
    received: usize,
    sent: usize,
    /// Handshakes that limit the address now.
    handshakes: usize,
}

/// Limits what is sent to an address, until dropped.
#[derive(Debug)]
pub(crate) struct Unproven {
    addresses: Arc<UnprovenAddresses>,
    address: SocketAddr,
}

impl fmt::Debug for UnprovenAddresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limited = self.limited.load(Ordering::Relaxed);
        f.debug_struct("UnprovenAddresses")
            .field("limited", &limited)
            .finish_non_exhaustive()
    }
}

impl UnprovenAddresses {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            hasher: RandomState::new(),
            slots: Mutex::new(vec![None; SLOTS]),
            limited: AtomicUsize::new(0),
        })
    }

    /// Limits an address from which a first datagram came, until its handshake ends; `None` if it cannot be counted.
    pub(crate) fn limit(self: &Arc<Self>, address: SocketAddr) -> Option<Unproven> {
        let mut slots = lock(&self.slots);
        let slot = slots[self.place(address)].as_mut();
        let slot = slot.filter(|slot| slot.address == address)?;
        slot.handshakes += 1;
        if slot.handshakes == 1 {
            self.limited.fetch_add(1, Ordering::Relaxed);
        }
        Some(Unproven {
            addresses: self.clone(),
            address,
        })
    }

    fn place(&self, address: SocketAddr) -> usize {
        self.hasher.hash_one(address) as usize % SLOTS
    }

    /// Counts what came from an address.
    fn received(&self, address: SocketAddr, bytes: usize) {
        let mut slots = lock(&self.slots);
        match &mut slots[self.place(address)] {
            Some(slot) if slot.address == address && slot.handshakes > 0 => slot.received += bytes,
            // Another address holds the place, and its handshake is under way.
            Some(slot) if slot.handshakes > 0 => {}
            // What an earlier handshake left is not used for the next one, except what arrived with it.
            Some(slot) if slot.address == address && slot.sent == 0 => slot.received += bytes,
            slot => {
                *slot = Some(Slot {
                    address,
                    received: bytes,
                    sent: 0,
                    handshakes: 0,
                });
            }
        }
    }

    /// Counts bytes to an address that are sent in any case. They may belong to a connection that exists there: a forged first
    /// datagram must not stop it. quinn sends one such datagram of 138 bytes in the first answer of a handshake.
    fn sent(&self, address: SocketAddr, bytes: usize) {
        if self.limited.load(Ordering::Relaxed) > 0
            && let Some(slot) = &mut lock(&self.slots)[self.place(address)]
            && slot.address == address
        {
            slot.sent += bytes;
        }
    }

    /// Counts bytes to an address, in datagrams of this size, and returns how many of them may be sent.
    fn allowed(&self, address: SocketAddr, bytes: usize, datagram: usize) -> usize {
        if self.limited.load(Ordering::Relaxed) == 0 {
            return bytes;
        }
        let mut slots = lock(&self.slots);
        let slot = slots[self.place(address)].as_mut();
        let Some(slot) = slot.filter(|slot| slot.address == address && slot.handshakes > 0) else {
            return bytes;
        };
        let left = (slot.received * LIMIT).saturating_sub(slot.sent);
        let allowed = match bytes <= left {
            true => bytes,
            false => left / datagram.max(1) * datagram,
        };
        slot.sent += allowed;
        allowed
    }
}

impl Drop for Unproven {
    fn drop(&mut self) {
        let mut slots = lock(&self.addresses.slots);
        let slot = slots[self.addresses.place(self.address)].as_mut();
        if let Some(slot) = slot.filter(|slot| slot.address == self.address) {
            slot.handshakes -= 1;
            if slot.handshakes == 0 {
                self.addresses.limited.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

/// Whether a datagram begins with a packet of a handshake. Others belong to connections that exist.
fn is_of_handshake(datagram: &[u8]) -> bool {
    datagram.first().is_some_and(|first| first & 0x80 != 0)
}

/// A socket that keeps the limit.
#[derive(Debug)]
pub(super) struct LimitedSocket {
    socket: Arc<dyn AsyncUdpSocket>,
    addresses: Arc<UnprovenAddresses>,
}

impl LimitedSocket {
    pub(super) fn new(
        socket: Arc<dyn AsyncUdpSocket>,
        addresses: Arc<UnprovenAddresses>,
    ) -> Arc<Self> {
        Arc::new(Self { socket, addresses })
    }
}

impl AsyncUdpSocket for LimitedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit) -> io::Result<()> {
        let bytes = transmit.contents.len();
        if !is_of_handshake(transmit.contents) {
            self.addresses.sent(transmit.destination, bytes);
            return self.socket.try_send(transmit);
        }
        let datagram = transmit.segment_size.unwrap_or(bytes);
        match self
            .addresses
            .allowed(transmit.destination, bytes, datagram)
        {
            // To quinn it looks like a loss on the path.
            0 => Ok(()),
            allowed => self.socket.try_send(&Transmit {
                contents: &transmit.contents[..allowed],
                destination: transmit.destination,
                ecn: transmit.ecn,
                segment_size: transmit.segment_size,
                src_ip: transmit.src_ip,
            }),
        }
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(self.socket.poll_recv(context, buffers, meta))?;
        for (buffer, meta) in buffers.iter().zip(meta.iter()).take(count) {
            if is_of_handshake(buffer) {
                self.addresses.received(meta.addr, meta.len);
            }
        }
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unproven_address_gets_whole_datagrams_within_the_limit() {
        let addresses = UnprovenAddresses::new();
        let address = SocketAddr::from(([192, 0, 2, 1], 5));
        assert!(
            addresses.limit(address).is_none(),
            "nothing came from there"
        );
        addresses.received(address, 1_200);
        let unproven = addresses.limit(address).unwrap();
        assert_eq!(addresses.allowed(address, 2_400, 1_200), 2_400);
        assert_eq!(addresses.allowed(address, 700, 700), 700);
        assert_eq!(addresses.allowed(address, 1_200, 600), 0);
        assert_eq!(addresses.allowed(address, 900, 300), 300);
        addresses.received(address, 100);
        addresses.sent(address, 400);
        assert_eq!(addresses.allowed(address, 200, 200), 0);
        assert_eq!(addresses.allowed(address, 100, 100), 100);
        drop(unproven);
        assert_eq!(addresses.allowed(address, 9_000, 1_200), 9_000);
        assert_eq!(addresses.limited.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_second_handshake_is_not_paid_by_the_first() {
        let addresses = UnprovenAddresses::new();
        let address = SocketAddr::from(([192, 0, 2, 1], 5));
        for _ in 0..3 {
            addresses.received(address, 1_200);
            let _unproven = addresses.limit(address).unwrap();
            assert_eq!(addresses.allowed(address, 6_000, 1_200), 3_600);
        }
    }
}
