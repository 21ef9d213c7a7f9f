//! `haul serve`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use haul::pairing::pair;
use haul::{
    Admission, Anyone, Config, DEFAULT_PORT, Home, Index, KeyId, LocalStore, Rate, Server,
    ServerOptions, peers,
};

use super::addresses::own_addresses;
use super::exit::DONE;
use super::options::{ExpertOptions, parse_listen_address, parse_time};
use super::output::{self, printable_path};
use super::relay_choice::RelayChoice;
use super::signals::handle_stop_signals;

/// Serve a directory for uploads and downloads, many at once.
#[derive(Args)]
#[command(after_help = "\
Example: haul serve ~/inbox
HAUL_HOME/authorized_keys lists the admitted keys, one a line. A refused client
shows the line that would admit it. --anyone admits every key.
The first Ctrl-C waits for running transfers (30 s at most); a second stops now.
Also: --keep-partials 7d, --no-dedupe, --max-connections N, --congestion NAME,
--qlog DIR (a trace).")]
pub(crate) struct Serve {
    /// The directory to serve
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Address and UDP port; may be given several times
    #[arg(long, value_name = "ADDR", value_parser = parse_listen_address, default_value = "[::]:4433")]
    listen: Vec<SocketAddr>,
    /// Most transfers that write at once
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_transfers: u32,
    #[arg(long, hide = true, value_name = "N", default_value_t = 1_024, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_connections: u32,
    /// Admit every key to read, to write or both
    #[arg(long, value_name = "WHAT", hide_possible_values = true)]
    anyone: Option<AnyoneMay>,
    /// Send at most RATE a second: 20M bits, 2.5MB bytes
    #[arg(long, value_name = "RATE", allow_hyphen_values = true)]
    limit: Option<Rate>,
    /// Set owners and set-user-ID for clients; as root
    #[arg(long)]
    allow_owner: bool,
    #[arg(long, hide = true)]
    no_dedupe: bool,
    #[arg(long, hide = true, value_name = "TIME", value_parser = parse_time, default_value = "7d")]
    keep_partials: Duration,
    /// Memory in MiB of what all clients together make the server keep
    #[arg(long, hide = true, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(8..=65_536))]
    session_memory: u32,
    /// Let keys that may write also remove (haul sync)
    #[arg(long)]
    allow_delete: bool,
    #[command(flatten)]
    relay: RelayChoice,
    #[command(flatten)]
    expert: ExpertOptions,
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
enum AnyoneMay {
    Read,
    Write,
    Both,
}

pub(crate) async fn run(serve: Serve) -> anyhow::Result<u8> {
    let home = Home::from_env()?;
    let identity = home.identity()?;
    let anyone = Anyone {
        read: matches!(serve.anyone, Some(AnyoneMay::Read | AnyoneMay::Both)),
        write: matches!(serve.anyone, Some(AnyoneMay::Write | AnyoneMay::Both)),
    };
    let admission = Admission::of_home(&home, anyone)?;
    let store = LocalStore::open_reserving(&serve.dir, home.path())?;
    if serve.anyone != Some(AnyoneMay::Read) {
        store.check_writable()?;
    }
    let config = serve.config(&home);
    let relay = serve.relay.relay(&home)?;
    let paired = peers::all(&home.peers())?.len();
    let server = Server::bind(ServerOptions {
        listen: serve.listen.clone(),
        identity: identity.clone(),
        admission,
        store: Arc::new(store),
        config: config.clone(),
        observer: haul::ignore(),
    })?;

    // Signals are handled before the first line is printed, because a script may send one as soon as it reads it.
    let signals = handle_stop_signals()?;
    let addresses = server.local_addresses();
    first_lines(&serve, &home, &addresses, &identity.key_id(), paired)
        .iter()
        .for_each(|text| output::line(text));

    let port = server.ports()[0].clone();
    let found = tokio::spawn(async move {
        loop {
            until_paired(&home, true).await;
            let be_found = pair::be_found(
                port.clone(),
                relay.clone(),
                own_addresses(),
                identity.clone(),
                config.clone(),
            );
            tokio::select! {
                () = be_found => {}
                () = until_paired(&home, false) => {}
            }
        }
    });
    let stop = signals.first.cancelled_owned();
    let stop_now = signals.second.cancelled_owned();
    server.run(stop, stop_now).await;
    found.abort();
    output::line("Stopped.");
    Ok(DONE)
}

impl Serve {
    fn config(&self, home: &Home) -> Config {
        Config {
            max_transfers: self.max_transfers as usize,
            max_connections: self.max_connections as usize,
            limit: self.limit,
            allow_delete: self.allow_delete,
            allow_owner: self.allow_owner,
            keep_partials: self.keep_partials,
            session_memory: (self.session_memory as usize) << 20,
            index: (!self.no_dedupe).then(|| Index::new(home.index())),
            ..self.expert.config()
        }
    }
}

/// Formats what is printed once the server listens: what it serves, where, and to whom.
fn first_lines(
    serve: &Serve,
    home: &Home,
    addresses: &[SocketAddr],
    key_id: &KeyId,
    paired: usize,
) -> Vec<String> {
    let directory = serve.dir.canonicalize();
    let directory = directory.unwrap_or_else(|_| serve.dir.clone());
    let mut lines = vec![format!("Serving {}", printable_path(&directory))];
    let urls = addresses.iter().flat_map(urls);
    lines.extend(urls.map(|url| format!("  at      {url}")));
    lines.push(format!("  key id  {key_id}"));
    lines.push(format!("  admits  {}", admitted_keys(serve.anyone, home)));
    if let Ok(keys) = home.path().canonicalize()
        && keys.starts_with(&directory)
    {
        lines.push(format!(
            "  hides   {}, which holds this machine's keys",
            printable_path(&keys)
        ));
    }
    if paired > 0 {
        let machines = match paired {
            1 => "a paired machine".into(),
            _ => format!("{paired} paired machines"),
        };
        lines.push(format!(
            "  and     {machines}, without an address (haul peers)"
        ));
    }
    lines.push(format!(
        "Send files here with:\n  {}",
        example(addresses, key_id)
    ));
    lines.push("Ctrl-C stops it.".into());
    lines
}

/// How often to check whether this machine was paired meanwhile.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Waits until a paired machine exists (`paired`), or until none does. A server without paired machines does not announce
/// itself.
async fn until_paired(home: &Home, paired: bool) {
    loop {
        let file = home.peers();
        let known = tokio::task::spawn_blocking(move || peers::all(&file)).await;
        if matches!(known, Ok(Ok(known)) if known.is_empty() != paired) {
            return;
        }
        tokio::time::sleep(CHECK_INTERVAL).await;
    }
}

/// Returns the URLs of an address that the server listens on. The wildcard address becomes the addresses of this machine.
fn urls(address: &SocketAddr) -> Vec<String> {
    let port = if address.port() == DEFAULT_PORT {
        String::new()
    } else {
        format!(":{}", address.port())
    };
    let url = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => format!("haul://{ip}{port}/"),
        IpAddr::V6(ip) => format!("haul://[{ip}]{port}/"),
    };
    if !address.ip().is_unspecified() {
        return vec![url(address.ip())];
    }
    let own = own_addresses()
        .into_iter()
        .filter(|ip| address.is_ipv6() || ip.is_ipv4());
    own.map(url).collect()
}

/// Returns the command with which another machine sends files here.
fn example(addresses: &[SocketAddr], key_id: &KeyId) -> String {
    let place = addresses
        .iter()
        .flat_map(urls)
        .next()
        .unwrap_or_else(|| "haul://HOST/".into());
    format!("haul cp --pin {key_id} FILE... {place}")
}

fn admitted_keys(anyone: Option<AnyoneMay>, home: &Home) -> String {
    let file = printable_path(&home.authorized_keys());
    match anyone {
        None => format!("the keys in {file}"),
        Some(AnyoneMay::Read) => format!("every key, to read; the keys in {file} to write too"),
        Some(AnyoneMay::Write) => format!("every key, to write; the keys in {file} to read too"),
        Some(AnyoneMay::Both) => "every key, to read and to write".into(),
    }
}
