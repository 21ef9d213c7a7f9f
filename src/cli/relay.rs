//! `haul relay`.

use std::net::{AddrParseError, IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use haul::internal::protocol::MAX_RELAY_TOKEN;
use haul::pairing::rendezvous::RELAY_PORT;
use haul::{Allowance, Home, Rate, Relay, RelayOptions};

use super::addresses::own_addresses;
use super::exit::DONE;
use super::options::parse_time;
use super::output;
use super::signals::handle_stop_signals;

/// Help machines on different networks meet, and forward.
#[derive(Args)]
#[command(after_help = "\
Example: haul relay                    on a host with a public address
         HAUL_RELAY=that.host haul send photos/    same for haul receive
It needs UDP ports 4440 to 4448: the first for clients, the others to forward if
no direct path opens. It sees addresses and volume, but no content, names or
codes. Without --token-file anyone may use it. Ctrl-C stops it.")]
pub(crate) struct RelayCommand {
    /// Address and port; the next ports forward
    #[arg(long, value_name = "ADDR", value_parser = parse_relay_address, default_value = "[::]:4440")]
    listen: SocketAddr,
    /// Admit only clients with the token in FILE
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Ports to forward on; a receiver needs one
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    ports: u16,
    /// Most rate for each pair; 20M is bits
    #[arg(long, value_name = "RATE", default_value = "100M")]
    limit: Rate,
    /// Most gigabytes for each pair
    #[arg(long, value_name = "GB", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    quota: u64,
    /// Most time for each pair
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "24h")]
    time: Duration,
    /// Most pairs at the same time
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pairs: u32,
    /// Most senders that wait
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    places: u32,
    /// Most connections at the same time
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    connections: u32,
    /// Factor for the limits of one network
    #[arg(long, value_name = "N", default_value = "1")]
    per_network: NonZeroU32,
}

/// Parses an address with or without a port.
fn parse_relay_address(text: &str) -> Result<SocketAddr, String> {
    let ip = text.parse().map(|ip| SocketAddr::new(ip, RELAY_PORT));
    ip.or_else(|_: AddrParseError| text.parse())
        .map_err(|_| "write an address as 192.0.2.1:4440 or [::]:4440".into())
}

pub(crate) async fn run(command: RelayCommand) -> anyhow::Result<u8> {
    let token = command.token_file.as_deref().map(read_token).transpose()?;
    let admits = if token.is_some() {
        "clients with the token"
    } else {
        "everyone"
    };
    let identity = Home::from_env()?.identity()?;
    let key_id = identity.key_id();
    let relay = Relay::bind(RelayOptions {
        listen: command.listen,
        forward: forwarding_address(command.listen),
        ports: command.ports,
        identity,
        token,
        connections: command.connections as usize,
        places: command.places as usize,
        per_network: command.per_network,
        allowance: Allowance {
            pairs: command.pairs as usize,
            rate: Some(command.limit),
            bytes: command.quota.saturating_mul(1_000_000_000),
            time: command.time,
        },
    })?;
    let signals = handle_stop_signals()?;
    let at = relay.address()?;
    let ports = relay.forwarding_ports();
    let first = ports.first().copied().unwrap_or_default();
    let last = ports.last().copied().unwrap_or_default();
    output::line(&format!(
        "Relaying on {at}, forwarding on UDP {first} to {last}"
    ));
    output::line(&format!("  key id  {key_id}"));
    output::line(&format!("  admits  {admits}"));
    output::line(&format!(
        "Use it on both machines with:\n  export HAUL_RELAY={}",
        example(at)
    ));
    output::line("Ctrl-C stops it.");
    relay.run(signals.first.cancelled_owned()).await;
    output::line("Stopped.");
    Ok(DONE)
}

/// Returns the address of the first port to forward on: the next one, or any if the relay listens on any.
fn forwarding_address(listen: SocketAddr) -> SocketAddr {
    let next = listen.port().checked_add(u16::from(listen.port() != 0));
    SocketAddr::new(listen.ip(), next.unwrap_or(1))
}

/// Reads the token, without white space at both ends, because editors add a line end.
fn read_token(file: &Path) -> anyhow::Result<String> {
    let name = output::printable_path(file);
    let token = std::fs::read_to_string(file).with_context(|| format!("cannot read {name}"))?;
    let token = token.trim().to_owned();
    anyhow::ensure!(!token.is_empty(), "cannot use {name}: it holds no token");
    anyhow::ensure!(
        token.len() <= MAX_RELAY_TOKEN,
        "cannot use the token in {name}: it is longer than {MAX_RELAY_TOKEN} bytes"
    );
    Ok(token)
}

/// Returns the relay's address as other machines may write it.
fn example(at: SocketAddr) -> String {
    let ip = if at.ip().is_unspecified() {
        own_addresses().into_iter().next().unwrap_or(at.ip())
    } else {
        at.ip()
    };
    match (ip, at.port()) {
        (ip, RELAY_PORT) => ip.to_string(),
        (IpAddr::V6(ip), port) => format!("[{ip}]:{port}"),
        (ip, port) => format!("{ip}:{port}"),
    }
}
