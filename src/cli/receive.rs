//! `haul receive`.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use haul::client::PullOptions;
use haul::config::Config;
use haul::error::Error;
use haul::identity::Home;
use haul::index::Index;
use haul::path::printable;
use haul::peer::code::ShortCode;
use haul::peer::receive::{self, Met};
use haul::peer::route::Whereabouts;
use haul::rate::Rate;
use haul::wire::{Durability, Take};

use super::output::{self, Screen, shown};
use super::settings::{Relayed, own_addresses};
use super::{DONE, Expert, FAILED, INTERRUPTED, Output, Taking, prompt, time};

/// Receive what another machine sends, by its code.
#[derive(Args)]
#[command(after_help = "\
Examples: haul receive                    asks for the code; Tab completes words
          haul receive --to ~/Downloads 417-maple-canyon-orbit
You see names, number and size before anything is written. What is interrupted
goes on when both run again, or here alone with the same code. Also: --existing
HOW, -c, -n, --retry-for and --limit, as in haul cp.")]
pub(super) struct Receive {
    /// The code; better typed at the prompt, which no list of processes shows
    #[arg(value_name = "CODE")]
    code: Vec<String>,
    /// Where it goes
    #[arg(long, value_name = "DIR", default_value = ".")]
    to: PathBuf,
    /// Accept without being asked
    #[arg(short, long)]
    yes: bool,
    /// Where the sender is, for a network on which it cannot be found
    #[arg(long, value_name = "HOST:PORT")]
    at: Option<String>,
    #[command(flatten)]
    relayed: Relayed,
    #[arg(long, hide = true, value_name = "RATE", allow_hyphen_values = true)]
    limit: Option<Rate>,
    #[arg(long, hide = true, value_name = "TIME", value_parser = time, default_value = "10m")]
    retry_for: Duration,
    #[command(flatten)]
    taking: Taking,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    expert: Expert,
}

pub(super) async fn run(receive: Receive) -> anyhow::Result<u8> {
    let json = receive.output.json;
    let Some(code) = code(&receive).await.inspect_err(|error| output::never_began(json, error))? else {
        return Ok(INTERRUPTED);
    };
    let home = Home::from_env()?;
    let config = Config {
        limit: receive.limit,
        congestion: receive.expert.congestion,
        qlog: receive.expert.qlog.clone(),
        index: Some(Index::new(home.index())),
        retry_for: receive.retry_for,
        ..Config::default()
    };
    let met = meet(&receive, &code, &home, &config).await;
    let met = met.inspect_err(|error| output::never_began(json, error))?;
    if !accepted(&receive, &met).await {
        met.decline().await;
        output::note("haul: declined; nothing was received");
        return Ok(FAILED);
    }
    take(&receive, met).await
}

/// Finds the sender and shows it that the code is known.
async fn meet(receive: &Receive, code: &ShortCode, home: &Home, config: &Config) -> anyhow::Result<Met> {
    let relay = receive.relayed.relay(home)?;
    let at = match &receive.at {
        Some(at) => Whereabouts { addresses: resolve(at).await?, ..Whereabouts::default() },
        None => Whereabouts { relay: relay.clone(), own: own_addresses(), ..Whereabouts::default() },
    };
    let nowhere = at.addresses.is_empty() && relay.is_none();
    let met = receive::meet(code, at, &home.identity()?, config).await;
    met.map_err(|error| match error {
        Error::Lost(why) if nowhere => anyhow::Error::from(Error::Lost(why.clone())).context(nobody(&why, code)),
        error => error.into(),
    })
}

/// Why nobody was found, and what to do.
fn nobody(why: &str, code: &ShortCode) -> String {
    match code.is_of_relay() {
        true => format!("{why}, and the sender uses a relay: set HAUL_RELAY=HOST as it does there, or --relay HOST"),
        false => format!(
            "{why}. Is `haul send` still running, and on the same network? Where that blocks multicast, add --at \
             HOST:PORT, as `haul send -v` shows it; between networks, a relay helps: haul relay --help"
        ),
    }
}

/// The code: as given, or asked for, so that it does not stand in the list of processes. `None` for Ctrl-C.
async fn code(receive: &Receive) -> anyhow::Result<Option<ShortCode>> {
    let parse = |text: &str| text.parse::<ShortCode>().map_err(|bad| Error::Usage(bad.to_string()));
    if !receive.code.is_empty() {
        return Ok(Some(parse(&receive.code.join(" "))?));
    }
    let on_terminal = std::io::stdin().is_terminal();
    loop {
        match tokio::task::spawn_blocking(prompt::code).await? {
            None if on_terminal => return Ok(None),
            None => return Err(Error::Usage("which code? There is no terminal to ask on".into()).into()),
            Some(text) => match parse(&text) {
                Ok(code) => return Ok(Some(code)),
                // Nothing was tried with it, so nothing is burnt.
                Err(bad) if on_terminal => output::note(&format!("{bad}.")),
                Err(bad) => return Err(bad.into()),
            },
        }
    }
}

async fn resolve(at: &str) -> anyhow::Result<Vec<SocketAddr>> {
    let found = tokio::net::lookup_host(at).await.map_err(|error| Error::Resolve {
        host: printable(at.as_bytes()),
        why: format!("{error}; it is written HOST:PORT"),
    })?;
    Ok(found.collect())
}

/// Shows what there is, and asks.
async fn accepted(receive: &Receive, met: &Met) -> bool {
    let (offer, free) = (met.offer(), receive::free_space(&receive.to));
    let from = printable(offer.from.as_bytes());
    if receive.output.json {
        output::offer::json(offer, met.names(), met.address(), free);
    } else if offer.text.is_none() {
        output::offer::lines(offer, met.names()).iter().for_each(|line| output::note(line));
    }
    let small = free.filter(|free| *free < offer.bytes);
    if let Some(free) = small {
        let (free, to) = (output::bytes(free), shown(&receive.to));
        output::note(&format!(
            "haul: only {free} are free in {to}; unless much of it is there already, it will not fit"
        ));
    }
    if receive.yes {
        return true;
    }
    let what = if offer.text.is_some() { format!("A text from \"{from}\"") } else { format!("From \"{from}\"") };
    let default = if small.is_some() { "[y/N]" } else { "[Y/n]" };
    let question = format!("{what} - accept? {default}");
    let asked = tokio::task::spawn_blocking(move || output::ask(&question)).await;
    match asked.ok().flatten().as_deref() {
        Some("y" | "Y" | "yes") => true,
        Some("") => small.is_none(),
        Some(_) => false,
        None => {
            output::note("haul: there is no terminal to ask on; --yes accepts");
            false
        }
    }
}

async fn take(receive: &Receive, met: Met) -> anyhow::Result<u8> {
    let Taking { dry_run, checksum, existing, .. } = receive.taking;
    let options = PullOptions {
        sources: met.names().to_vec(),
        destination: receive.to.clone(),
        into: true,
        durability: Durability::Synced,
        take: Take { existing, checksum, dry_run, ..Take::default() },
        literal: true,
        ..PullOptions::default()
    };
    let text = met.offer().text.clone();
    let Some(client) = met.accept().await? else {
        output::offer::text(&text.unwrap_or_default());
        return Ok(DONE);
    };
    let screen = Screen::new(Output { dry_run, peer: "the sender", ..receive.output });
    let ended = tokio::select! {
        ended = client.pull(&options, screen.observer()) => ended,
        _ = tokio::signal::ctrl_c() => {
            screen.end(&Err(Error::Lost("interrupted".into())));
            client.close().await;
            output::note("haul: interrupted; what is committed stays. Run it again with the same code to go on.");
            return Ok(INTERRUPTED);
        }
    };
    screen.end(&ended);
    match &ended {
        Ok(_) => client.close_after_server().await,
        Err(_) => client.close().await,
    }
    let outcome = ended?;
    Ok(if outcome.sent.failed == 0 && outcome.sent.interrupted.is_none() { DONE } else { FAILED })
}
