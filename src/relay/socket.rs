//! A socket that takes datagrams together and gives them on together, as the kernel offers it (on Linux GRO and GSO): a call for
//! each datagram costs a relay more than all else.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;

use quinn::udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use crate::error::{Error, Result};
use crate::net::endpoint;

/// What comes at once, at most: no datagram, and no number of them together, is longer.
const AT_ONCE: usize = 65_535;
/// What goes out at once, at most: the same without the headers of IPv6 and UDP.
const OUT_AT_ONCE: usize = AT_ONCE - 48;

/// Datagrams that came together from one address: each as long as the first, but the last, which may be shorter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Datagrams<'a> {
    pub(super) bytes: &'a [u8],
    /// The length of each; not 0.
    pub(super) each: usize,
    /// The mark of congestion that all have (RFC 3168).
    pub(super) ecn: Option<EcnCodepoint>,
}

impl<'a> Datagrams<'a> {
    /// How many.
    pub(super) fn count(&self) -> usize {
        self.bytes.len().div_ceil(self.each)
    }

    /// The first of them, so many at most.
    pub(super) fn first(self, count: usize) -> Self {
        Self {
            bytes: &self.bytes[..self.bytes.len().min(count * self.each)],
            ..self
        }
    }

    /// All of them, in parts of so many bytes at most, or of one.
    pub(super) fn parts(self, bytes: usize) -> impl Iterator<Item = Self> {
        let part = (bytes / self.each).max(1) * self.each;
        self.bytes
            .chunks(part)
            .map(move |bytes| Self { bytes, ..self })
    }

    /// All of them, but each that has just this length alone.
    pub(super) fn with_alone(self, length: usize) -> impl Iterator<Item = Self> {
        let last = self.bytes.len() - (self.count() - 1) * self.each;
        let (before, last) = self
            .bytes
            .split_at(self.bytes.len() - if last == length { last } else { 0 });
        let part = if self.each == length {
            length
        } else {
            before.len().max(1)
        };
        before
            .chunks(part)
            .chain(last.chunks(length))
            .map(move |bytes| Self { bytes, ..self })
    }
}

/// What is received into.
pub(super) struct Buffer(Vec<u8>);

impl Buffer {
    pub(super) fn new() -> Self {
        Self(vec![0; AT_ONCE])
    }
}

pub(super) struct Socket {
    socket: UdpSocket,
    offload: UdpSocketState,
    pub(super) port: u16,
}

impl Socket {
    /// Must be called within a tokio runtime.
    pub(super) fn bind(address: SocketAddr) -> Result<Self> {
        let failed = || Error::io(format!("cannot forward on UDP {address}"));
        let socket = endpoint::udp_socket(address)?;
        let offload = UdpSocketState::new((&socket).into()).map_err(failed())?;
        let socket = UdpSocket::from_std(socket).map_err(failed())?;
        let port = socket.local_addr().map_err(failed())?.port();
        Ok(Self {
            socket,
            offload,
            port,
        })
    }

    /// What comes next, and from where. Empty datagrams are not told of.
    pub(super) async fn receive<'a>(&self, buffer: &'a mut Buffer) -> (Datagrams<'a>, SocketAddr) {
        let mut meta = [RecvMeta::default()];
        loop {
            if self.socket.readable().await.is_err() {
                continue;
            }
            let receive = || {
                self.offload.recv(
                    (&self.socket).into(),
                    &mut [IoSliceMut::new(&mut buffer.0)],
                    &mut meta,
                )
            };
            // What a receiver's port refused is told here, and concerns nobody else.
            if self.socket.try_io(Interest::READABLE, receive).is_ok() && meta[0].len > 0 {
                let [
                    RecvMeta {
                        addr,
                        len,
                        stride,
                        ecn,
                        ..
                    },
                ] = meta;
                return (
                    Datagrams {
                        bytes: &buffer.0[..len],
                        each: stride,
                        ecn,
                    },
                    addr,
                );
            }
        }
    }

    /// Sends them. What the system has no room for is lost like any datagram.
    pub(super) fn send(&self, datagrams: Datagrams<'_>, to: SocketAddr) {
        let at_once = OUT_AT_ONCE.min(datagrams.each * self.offload.max_gso_segments());
        for part in datagrams.parts(at_once) {
            let transmit = Transmit {
                destination: to,
                ecn: part.ecn,
                contents: part.bytes,
                segment_size: (part.count() > 1).then_some(part.each),
                src_ip: None,
            };
            let send =
                || -> io::Result<()> { self.offload.try_send((&self.socket).into(), &transmit) };
            let _ = self.socket.try_io(Interest::WRITABLE, send);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagrams(bytes: &[u8], each: usize) -> Datagrams<'_> {
        Datagrams {
            bytes,
            each,
            ecn: None,
        }
    }

    fn lengths(parts: impl Iterator<Item = Datagrams<'static>>) -> Vec<usize> {
        parts.map(|part| part.bytes.len()).collect()
    }

    #[test]
    fn what_is_as_long_as_a_token_stands_alone() {
        assert_eq!(lengths(datagrams(&[0; 103], 50).with_alone(3)), [100, 3]);
        assert_eq!(lengths(datagrams(&[0; 102], 50).with_alone(3)), [102]);
        assert_eq!(lengths(datagrams(&[0; 8], 3).with_alone(3)), [3, 3, 2]);
        assert_eq!(lengths(datagrams(&[0; 9], 3).with_alone(3)), [3, 3, 3]);
        assert_eq!(lengths(datagrams(&[0; 3], 3).with_alone(3)), [3]);
        assert_eq!(lengths(datagrams(&[0; 2], 2).with_alone(3)), [2]);
    }

    #[test]
    fn no_datagram_is_cut_in_two() {
        assert_eq!(lengths(datagrams(&[0; 107], 50).parts(120)), [100, 7]);
        assert_eq!(lengths(datagrams(&[0; 107], 50).parts(1)), [50, 50, 7]);
        let few = datagrams(&[0; 107], 50);
        assert_eq!(
            (
                few.count(),
                few.first(2).bytes.len(),
                few.first(9).bytes.len(),
                few.first(0).count()
            ),
            (3, 100, 107, 0)
        );
    }
}
