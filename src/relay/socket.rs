//! A UDP socket that receives and sends several datagrams with one system call (GRO and GSO on Linux): one call for
//! each datagram would cost a relay more than everything else.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;

use quinn::udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use crate::error::{Error, Result};
use crate::net::socket;

/// Receive buffer in bytes: the limit of one datagram, and of several together.
const RECEIVE_SIZE: usize = 65_535;
/// Bytes sent at once: the same without the headers of IPv6 and UDP.
const MAX_SEND_SIZE: usize = RECEIVE_SIZE - 48;

/// Datagrams received together from one address. All have the length of the first, except the last, which may be
/// shorter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Datagrams<'a> {
    pub(super) bytes: &'a [u8],
    /// The length of each datagram; not 0.
    pub(super) length: usize,
    /// The congestion mark that all have (RFC 3168).
    pub(super) ecn: Option<EcnCodepoint>,
}

impl<'a> Datagrams<'a> {
    /// The number of datagrams.
    pub(super) fn count(&self) -> usize {
        self.bytes.len().div_ceil(self.length)
    }

    /// The first `count` datagrams.
    pub(super) fn first(self, count: usize) -> Self {
        Self {
            bytes: &self.bytes[..self.bytes.len().min(count * self.length)],
            ..self
        }
    }

    /// All datagrams, in parts of up to this many bytes, or of one datagram.
    pub(super) fn parts(self, bytes: usize) -> impl Iterator<Item = Self> {
        let part = (bytes / self.length).max(1) * self.length;
        self.bytes
            .chunks(part)
            .map(move |bytes| Self { bytes, ..self })
    }

    /// All datagrams, with each that has exactly this length in a part of its own.
    pub(super) fn isolate(self, isolated: usize) -> impl Iterator<Item = Self> {
        let last = self.bytes.len() - (self.count() - 1) * self.length;
        let (before, last) = self
            .bytes
            .split_at(self.bytes.len() - if last == isolated { last } else { 0 });
        let part = if self.length == isolated {
            isolated
        } else {
            before.len().max(1)
        };
        before
            .chunks(part)
            .chain(last.chunks(isolated))
            .map(move |bytes| Self { bytes, ..self })
    }
}

/// A receive buffer.
pub(super) struct Buffer(Vec<u8>);

impl Buffer {
    pub(super) fn new() -> Self {
        Self(vec![0; RECEIVE_SIZE])
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
        let failed = || Error::io(format!("cannot open UDP {address} for forwarding"));
        let socket = socket::udp_socket(address)?;
        let offload = UdpSocketState::new((&socket).into()).map_err(failed())?;
        let socket = UdpSocket::from_std(socket).map_err(failed())?;
        let port = socket.local_addr().map_err(failed())?.port();
        Ok(Self {
            socket,
            offload,
            port,
        })
    }

    /// Receives the next datagrams and their source. Skips empty ones.
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
            // An error here is an ICMP message about an earlier datagram of some receiver.
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
                        length: stride,
                        ecn,
                    },
                    addr,
                );
            }
        }
    }

    /// Sends datagrams. If the system's buffer is full, they are lost.
    pub(super) fn send(&self, datagrams: Datagrams<'_>, to: SocketAddr) {
        let send_size = MAX_SEND_SIZE.min(datagrams.length * self.offload.max_gso_segments());
        for part in datagrams.parts(send_size) {
            let transmit = Transmit {
                destination: to,
                ecn: part.ecn,
                contents: part.bytes,
                segment_size: (part.count() > 1).then_some(part.length),
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

    fn datagrams(bytes: &[u8], length: usize) -> Datagrams<'_> {
        Datagrams {
            bytes,
            length,
            ecn: None,
        }
    }

    fn lengths(parts: impl Iterator<Item = Datagrams<'static>>) -> Vec<usize> {
        parts.map(|part| part.bytes.len()).collect()
    }

    #[test]
    fn datagrams_of_token_length_are_isolated() {
        assert_eq!(lengths(datagrams(&[0; 103], 50).isolate(3)), [100, 3]);
        assert_eq!(lengths(datagrams(&[0; 102], 50).isolate(3)), [102]);
        assert_eq!(lengths(datagrams(&[0; 8], 3).isolate(3)), [3, 3, 2]);
        assert_eq!(lengths(datagrams(&[0; 9], 3).isolate(3)), [3, 3, 3]);
        assert_eq!(lengths(datagrams(&[0; 3], 3).isolate(3)), [3]);
        assert_eq!(lengths(datagrams(&[0; 2], 2).isolate(3)), [2]);
    }

    #[test]
    fn parts_contain_whole_datagrams() {
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
