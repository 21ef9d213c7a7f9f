//! UDP sockets with large buffers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

use crate::error::{Error, Result};

/// Socket buffer requested for each direction, in bytes: 30 ms of 1 Gbit/s. Linux gives 208 KiB by default and at
/// most `net.core.rmem_max`.
const SOCKET_BUFFER_SIZE: usize = 4 << 20;

/// Opens a UDP socket with large buffers. `[::]` includes IPv4.
pub(crate) fn udp_socket(address: SocketAddr) -> Result<std::net::UdpSocket> {
    use io::ErrorKind::{AddrInUse, AddrNotAvailable, Unsupported};
    let unspecified_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
    match open_socket(address) {
        Err(e)
            if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
                && (matches!(e.kind(), AddrNotAvailable | Unsupported) || is_no_ipv6(&e)) =>
        {
            tracing::debug!("cannot use IPv6 ({e}); opening {unspecified_v4} instead of {address}");
            open_socket(unspecified_v4)
        }
        socket => socket,
    }
    .map_err(|e| match e.kind() {
        AddrInUse => Error::io(format!(
            "cannot listen on {address}: another server may use this port; choose another with --listen"
        ))(e),
        _ => Error::io(format!("cannot open UDP {address}"))(e),
    })
}

fn is_no_ipv6(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
}

fn open_socket(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    let requested = socket
        .set_recv_buffer_size(SOCKET_BUFFER_SIZE)
        .and(socket.set_send_buffer_size(SOCKET_BUFFER_SIZE));
    socket.bind(&address.into())?;
    let receive = socket.recv_buffer_size()?;
    let send = socket.send_buffer_size()?;
    tracing::debug!(%address, receive, send, ?requested, "socket buffers in bytes; {SOCKET_BUFFER_SIZE} were requested");
    Ok(socket.into())
}
