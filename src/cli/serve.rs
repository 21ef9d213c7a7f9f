//! `haul serve`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use haul::pairing::pair;
use haul::{
    Admission, Anyone, Config, DEFAULT_PORT, Home, Index, KeyId, LocalStore, Server, ServerOptions,
    peers, printable,
};

use super::addresses::own_addresses;
use super::exit::DONE;
use super::signals::handle_stop_signals;
use super::{AnyoneMay, Serve, output};

pub(super) async fn run(serve: Serve) -> anyhow::Result<u8> {
    let home = Home::from_env()?;
    let identity = home.identity()?;
    let key_id = identity.key_id();
    let anyone = Anyone {
        read: matches!(serve.anyone, Some(AnyoneMay::Read | AnyoneMay::Both)),
        write: matches!(serve.anyone, Some(AnyoneMay::Write | AnyoneMay::Both)),
    };
    let admission = Admission::of_home(&home, anyone)?;
    let shown = serve
        .dir
        .canonicalize()
        .unwrap_or_else(|_| serve.dir.clone());
    let keys = home.path().canonicalize().ok();
    let keys = keys.filter(|keys| keys.starts_with(&shown));
    let shown = printable(shown.as_os_str().as_encoded_bytes());
    let store = LocalStore::open_reserving(&serve.dir, home.path())?;
    if serve.anyone != Some(AnyoneMay::Read) {
        store.check_writable()?;
    }
    let config = Config {
        max_transfers: serve.max_transfers as usize,
        congestion: serve.expert.congestion,
        limit: serve.limit,
        allow_delete: serve.allow_delete,
        qlog: serve.expert.qlog,
        allow_owner: serve.allow_owner,
        keep_partials: serve.keep_partials,
        index: (!serve.no_dedupe).then(|| Index::new(home.index())),
        ..Config::default()
    };
    let observer = haul::ignore();
    let listen = serve.listen;
    let relay = serve.relayed.relay(&home)?;
    let paired = peers::all(&home.peers())?.len();
    let known = identity.clone();
    let asking = config.clone();
    let server = Server::bind(ServerOptions {
        listen,
        identity,
        admission,
        store: Arc::new(store),
        config,
        observer,
    })?;

    // Signals are handled before the first line is printed, because a script may send one as soon as it reads it.
    let signals = handle_stop_signals()?;
    let addresses = server.local_addresses();
    output::line(&format!("Serving {shown}"));
    for url in addresses.iter().flat_map(urls) {
        output::line(&format!("  at      {url}"));
    }
    output::line(&format!("  key id  {key_id}"));
    output::line(&format!("  admits  {}", admits(serve.anyone, &home)));
    if let Some(keys) = keys {
        output::line(&format!(
            "  hides   {}, which holds this machine's keys",
            output::printable_path(&keys)
        ));
    }
    if paired > 0 {
        output::line(&format!(
            "  and     {}, without an address (haul peers)",
            machines(paired)
        ));
    }
    output::line(&format!(
        "Send files here with:\n  {}",
        example(&addresses, &key_id)
    ));
    output::line("Ctrl-C stops it.");

    let port = server.ports()[0].clone();
    let found = tokio::spawn(async move {
        loop {
            until_paired(&home, true).await;
            let be_found = pair::be_found(
                port.clone(),
                relay.clone(),
                own_addresses(),
                known.clone(),
                asking.clone(),
            );
            tokio::select! {
                () = be_found => {}
                () = until_paired(&home, false) => {}
            }
        }
    });
    server
        .run(
            signals.first.cancelled_owned(),
            signals.second.cancelled_owned(),
        )
        .await;
    found.abort();
    output::line("Stopped.");
    Ok(DONE)
}

fn machines(paired: usize) -> String {
    if paired == 1 {
        "a paired machine".into()
    } else {
        format!("{paired} paired machines")
    }
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

fn example(addresses: &[SocketAddr], key_id: &KeyId) -> String {
    let place = addresses
        .iter()
        .flat_map(urls)
        .next()
        .unwrap_or_else(|| "haul://HOST/".into());
    format!("haul cp --pin {key_id} FILE... {place}")
}

fn admits(anyone: Option<AnyoneMay>, home: &Home) -> String {
    let file = printable(home.authorized_keys().as_os_str().as_encoded_bytes());
    match anyone {
        None => format!("the keys in {file}"),
        Some(AnyoneMay::Read) => format!("every key, to read; the keys in {file} to write too"),
        Some(AnyoneMay::Write) => format!("every key, to write; the keys in {file} to read too"),
        Some(AnyoneMay::Both) => "every key, to read and to write".into(),
    }
}
