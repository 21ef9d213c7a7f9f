//! `haul receive`.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::time::Duration;

use haul::client::PullOptions;
use haul::config::{Config, written};
use haul::error::Error;
use haul::identity::Home;
use haul::index::Index;
use haul::path::printable;
use haul::peer::code::ShortCode;
use haul::peer::discovery;
use haul::peer::receive::{self, Met};
use haul::wire::{Durability, Offer, Take};

use super::output::{self, Screen, shown};
use super::{DONE, FAILED, INTERRUPTED, NO_CONNECTION, Receive, Taking, prompt};

/// How long the sender is looked for.
const SEARCH: Duration = Duration::from_secs(15);
/// Names that are shown one a line.
const NAMED: usize = 8;

pub(super) async fn run(receive: Receive) -> anyhow::Result<u8> {
    let json = receive.output.json;
    let config = Config {
        limit: receive.limit,
        congestion: receive.expert.congestion,
        qlog: receive.expert.qlog.clone(),
        index: Some(Index::new(Home::from_env()?.index())),
        retry_for: receive.retry_for,
        ..Config::default()
    };
    let met = meet(&receive, &config).await.inspect_err(|error| output::never_began(json, error))?;
    let Some(met) = met else { return Ok(NO_CONNECTION) };
    if !accepted(&receive, &met).await {
        met.decline().await;
        output::note("haul: declined; nothing was received");
        return Ok(FAILED);
    }
    take(&receive, met).await
}

/// Finds the sender and shows it that the code is known.
async fn meet(receive: &Receive, config: &Config) -> anyhow::Result<Option<Met>> {
    let code = code(receive).await?;
    let addresses = match &receive.at {
        Some(at) => resolve(at).await?,
        None => {
            let found = discovery::find(code.number(), SEARCH).await?;
            if found.is_empty() {
                let number = code.number();
                let time = written(SEARCH);
                output::note(&format!(
                    "haul: nobody on this network offered {number} within {time}. Is `haul send` still running, and on the \
                     same network? Where that blocks multicast, add --at HOST:PORT, as the sender shows it."
                ));
                return Ok(None);
            }
            found
        }
    };
    let identity = Home::from_env()?.identity()?;
    Ok(Some(receive::meet(&code, &addresses, &identity, config).await?))
}

/// The code: as given, or asked for, so that it does not stand in the list of processes.
async fn code(receive: &Receive) -> anyhow::Result<ShortCode> {
    let parse = |text: &str| text.parse::<ShortCode>().map_err(|bad| Error::Usage(bad.to_string()));
    if !receive.code.is_empty() {
        return Ok(parse(&receive.code.join(" "))?);
    }
    loop {
        let asked = tokio::task::spawn_blocking(prompt::code).await?;
        match asked {
            None => return Err(Error::Usage("which code? There is no terminal to ask on".into()).into()),
            Some(text) if text.trim().is_empty() => return Err(Error::Usage("no code was given".into()).into()),
            Some(text) => match parse(&text) {
                Ok(code) => return Ok(code),
                // Nothing was tried with it, so nothing is burnt.
                Err(bad) if std::io::stdin().is_terminal() => output::note(&format!("{bad}.")),
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
        output::offer(offer, met.names(), met.address(), free);
    } else if offer.text.is_none() {
        described(offer, met).iter().for_each(|line| output::note(line));
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

/// What there is, in lines.
fn described(offer: &Offer, met: &Met) -> Vec<String> {
    let total = format!("{}, {}", output::count(offer.files, "file"), output::bytes(offer.bytes));
    match met.names() {
        [one] if offer.directory => vec![format!("{one}/  {total}")],
        [one] => vec![format!("{one}  {}", output::bytes(offer.bytes))],
        names => {
            let mut lines: Vec<_> = names.iter().take(NAMED).map(|name| format!("  {name}")).collect();
            if names.len() > NAMED {
                lines.push(format!("  and {} more", names.len() - NAMED));
            }
            lines.push(format!("{} names, {total}", names.len()));
            lines
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
        // It is the sender's, and may steer a terminal; where it goes into a file, it is what it is.
        let text = text.unwrap_or_default();
        output::text(&text);
        return Ok(DONE);
    };
    let screen = Screen::new(super::Output { dry_run, peer: "the sender", ..receive.output });
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
    client.close().await;
    let outcome = ended?;
    Ok(if outcome.sent.failed == 0 && outcome.sent.interrupted.is_none() { DONE } else { FAILED })
}
