//! Connects a client to a server: tries every address of the host, and reports an error as early as possible.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use quinn::Connection;
use tokio::net::lookup_host;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

pub use super::attempt::Connected;
use super::attempt::{Attempt, without_brackets};
use super::reachability::unspecified;
use super::socket::udp_socket;
use crate::auth::identity::Identity;
use crate::auth::trust::ServerTrust;
use crate::config::Config;
use crate::error::{Error, Result};

/// Time between the attempts on a host's addresses (RFC 8305, section 5).
const ATTEMPT_INTERVAL: Duration = Duration::from_millis(250);
/// Limit of the addresses tried for one host; their attempts run concurrently.
const MAX_ADDRESSES: usize = 8;

/// Connects to a host. Its addresses are tried 250 ms apart until one works. Cancelling ends all attempts.
///
/// The server checks this client's key only after the handshake. If it does not admit the key, it closes the
/// connection with [`Code::NotAdmitted`](crate::error::Code::NotAdmitted); see
/// [`close_error`](super::stream::close_error).
///
/// # Errors
/// - [`Error::Resolve`]: the host has no address.
/// - [`Error::Unreachable`]: at once when the system reports that the port is closed; after `config.first_reply`
///   without any reply; after `config.handshake` in any case; also when the server is full or does not speak haul.
/// - [`Error::UnknownHost`], [`Error::ChangedHost`], [`Error::WrongPin`], [`Error::NotTrusted`]: the server is not
///   the expected one. Nothing was sent to it.
/// - [`Error::Usage`] and [`Error::Home`]: `identity`, `trust` or `config` cannot be used.
pub async fn connect(
    identity: &Identity,
    trust: &ServerTrust,
    host: &str,
    port: u16,
    config: &Config,
) -> Result<Connected> {
    let verifier = trust.verifier(host, port)?;
    if let Some(directory) = &config.qlog {
        crate::net::qlog::prepare(directory)?;
    }
    let mut addresses = resolve(host, port, config.handshake).await?;
    let started = Instant::now();
    let mut attempts = JoinSet::new();
    let mut failure = None;
    loop {
        if let Some(address) = addresses.pop_front() {
            let attempt = Attempt {
                host: host.to_owned(),
                address,
                identity: Some(identity.clone()),
                verifier: verifier.clone(),
                config: config.clone(),
                started,
            };
            attempts.spawn(attempt.run());
        }
        tokio::select! {
            Some(ended) = attempts.join_next() => match ended {
                Ok(Ok(connected)) => return Ok(connected),
                Ok(Err(error @ (Error::Unreachable { .. } | Error::Io { .. }))) => failure = Some(error),
                // The server is wrong, or it refuses: another address would not help.
                Ok(Err(error)) => return Err(error),
                Err(_) => {}
            },
            () = sleep(ATTEMPT_INTERVAL), if !addresses.is_empty() => {}
            else => return Err(failure.unwrap_or_else(|| no_address(host, "no address"))),
        }
    }
}

/// Connects to a peer that may be at any of these addresses, over an existing endpoint. All addresses are tried at
/// once, and the first connection wins.
///
/// # Errors
/// As [`connect`]; [`Error::Unreachable`] also when no address works within the time for a handshake.
pub(crate) async fn connect_over(
    endpoint: &quinn::Endpoint,
    identity: &Identity,
    trust: &ServerTrust,
    addresses: &[SocketAddr],
    config: &Config,
) -> Result<Connected> {
    let started = Instant::now();
    let mut attempts = JoinSet::new();
    let mut failure = None;
    for &address in addresses {
        let host = address.ip().to_string();
        let verifier = trust.verifier(&host, address.port())?;
        let config = Config {
            qlog: None,
            ..config.clone()
        };
        let attempt = Attempt {
            host,
            address,
            identity: Some(identity.clone()),
            verifier,
            config,
            started,
        };
        let endpoint = endpoint.clone();
        attempts.spawn(async move { attempt.connect_over(&endpoint).await });
    }
    while let Some(ended) = attempts.join_next().await {
        match ended {
            Ok(Ok(connected)) => return Ok(connected),
            Ok(Err(error)) => failure = Some(error),
            Err(_) => {}
        }
    }
    Err(failure.unwrap_or_else(|| no_address("the other machine", "no address of it is known")))
}

/// Connects to a relay, over an existing endpoint. Its addresses are tried 250 ms apart, as [`connect`] does.
///
/// # Errors
/// As [`connect`].
pub(crate) async fn connect_relay(
    endpoint: &quinn::Endpoint,
    trust: &ServerTrust,
    host: &str,
    port: u16,
    config: &Config,
) -> Result<Connection> {
    let addresses = resolve(host, port, config.handshake).await?;
    connect_relay_at(endpoint, trust, host, port, addresses, config).await
}

/// Connects to a relay at one of these addresses; the first connection wins.
async fn connect_relay_at(
    endpoint: &quinn::Endpoint,
    trust: &ServerTrust,
    host: &str,
    port: u16,
    mut addresses: VecDeque<SocketAddr>,
    config: &Config,
) -> Result<Connection> {
    let verifier = trust.verifier(host, port)?;
    let is_ipv6 = endpoint.local_addr().is_ok_and(|local| local.is_ipv6());
    addresses.retain(|address| is_ipv6 || address.is_ipv4());
    let config = Config {
        qlog: None,
        handshake: config.first_reply,
        ..config.clone()
    };
    let mut attempts = JoinSet::new();
    let mut failure = None;
    loop {
        if let Some(address) = addresses.pop_front() {
            let attempt = Attempt {
                host: host.to_owned(),
                address,
                identity: None,
                verifier: verifier.clone(),
                config: config.clone(),
                started: Instant::now(),
            };
            let endpoint = endpoint.clone();
            attempts.spawn(async move { attempt.connect_over(&endpoint).await });
        }
        tokio::select! {
            Some(ended) = attempts.join_next() => match ended {
                Ok(Ok(connected)) => return Ok(connected.connection),
                Ok(Err(error @ (Error::Unreachable { .. } | Error::Io { .. }))) => failure = Some(error),
                // The relay is wrong, or it refuses: another address would not help.
                Ok(Err(error)) => return Err(error),
                Err(_) => {}
            },
            () = sleep(ATTEMPT_INTERVAL), if !addresses.is_empty() => {}
            else => return Err(failure.unwrap_or_else(|| no_address(host, "no address"))),
        }
    }
}

/// Resolves a host: addresses in the resolver's order, with IPv6 and IPv4 alternating (RFC 8305, section 4).
async fn resolve(host: &str, port: u16, limit: Duration) -> Result<VecDeque<SocketAddr>> {
    let bare = without_brackets(host);
    let resolved: Vec<_> = match timeout(limit, lookup_host((bare, port))).await {
        Ok(resolved) => resolved
            .map_err(|e| no_address(host, &e.to_string()))?
            .collect(),
        Err(_) => return Err(no_address(host, "the resolver does not answer")),
    };
    let mut addresses = interleave(resolved);
    addresses.truncate(MAX_ADDRESSES);
    Ok(addresses)
}

/// Alternates IPv6 and IPv4, starting with the family that came first. Each family keeps its order.
fn interleave(resolved: Vec<SocketAddr>) -> VecDeque<SocketAddr> {
    let first_is_ipv6 = resolved.first().is_some_and(SocketAddr::is_ipv6);
    let (next, other): (Vec<_>, Vec<_>) = resolved
        .into_iter()
        .partition(|a| a.is_ipv6() == first_is_ipv6);
    let mut next = VecDeque::from(next);
    let mut other = VecDeque::from(other);
    let mut addresses = VecDeque::new();
    while let Some(address) = next.pop_front() {
        addresses.push_back(address);
        if !other.is_empty() {
            std::mem::swap(&mut next, &mut other);
        }
    }
    addresses
}

fn no_address(host: &str, reason: &str) -> Error {
    Error::Resolve {
        host: host.into(),
        why: reason.into(),
    }
}

/// Moves an endpoint to another UDP port (RFC 9000, section 9.3.1), for a path whose state was lost in the network,
/// such as a NAT mapping. Connections stay, and packets that still arrive at the old port are received.
///
/// # Errors
/// [`Error::Io`] when the system gives no port; then nothing has changed.
pub fn rebind(endpoint: &quinn::Endpoint, remote: SocketAddr) -> Result<()> {
    let unspecified = unspecified(remote);
    endpoint
        .rebind(udp_socket(unspecified)?)
        .map_err(Error::io(format!(
            "cannot open a UDP socket on {unspecified}"
        )))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::auth::trust::trust_any_key;

    #[test]
    fn ipv6_and_ipv4_addresses_alternate() {
        let list = |text: &str| -> Vec<SocketAddr> {
            text.split(' ').map(|a| a.parse().unwrap()).collect()
        };
        let found = list("[::1]:1 [::2]:1 [::3]:1 1.1.1.1:1");
        assert_eq!(interleave(found), list("[::1]:1 1.1.1.1:1 [::2]:1 [::3]:1"));
        let found = list("1.1.1.1:1 [::1]:1 [::2]:1");
        assert_eq!(interleave(found), list("1.1.1.1:1 [::1]:1 [::2]:1"));
        assert_eq!(interleave(vec![]), []);
    }

    #[tokio::test]
    async fn dead_relay_addresses_do_not_delay_a_live_one() {
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let config = Config {
            first_reply: Duration::from_secs(600),
            ..Config::default()
        };
        let relay =
            crate::net::endpoint::relay_server_config(&Identity::generate().unwrap(), &config);
        let relay = quinn::Endpoint::server(relay.unwrap(), loopback).unwrap();
        let silent = [(); 2].map(|()| std::net::UdpSocket::bind(loopback).unwrap());
        let mut addresses: VecDeque<_> = silent.iter().map(|s| s.local_addr().unwrap()).collect();
        addresses.push_back(relay.local_addr().unwrap());
        let accepted = tokio::spawn(async move { relay.accept().await.unwrap().await });
        let endpoint = quinn::Endpoint::client(loopback).unwrap();
        let trust = trust_any_key(None);
        let connected = connect_relay_at(&endpoint, &trust, "relay", 1, addresses, &config);
        let connected = timeout(Duration::from_secs(60), connected).await;
        connected.expect("it waits for the dead addresses").unwrap();
        accepted.await.unwrap().unwrap();
    }
}
