//! `haul pair`.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;
use haul::pairing::offer::Content;
use haul::pairing::pair::Paired;
use haul::pairing::send::{Met, Offering, SendOptions};
use haul::peers;
use haul::peers::Peer;
use haul::{Config, Error, Home, Petname, Reason, WalkOptions};

use super::receive::{By, meet};
use super::send::{Asking, EXPIRED, announce, another, machine};
use super::settings::{Relayed, own_addresses};
use super::{
    DONE, FAILED, INTERRUPTED, NO_CONNECTION, NOT_TRUSTED, Output, listen_address, output, prompt,
    time,
};

/// Get to know another machine for good, by one code.
#[derive(Args)]
#[command(after_help = "\
Example: haul pair bob      here, which shows a code
         haul pair alice    over there, and type the code
Each remembers the other's key under the name given (HAUL_HOME/peers). From then
on, without a code: haul send --to bob FILE here and haul receive --from alice
there; and while `haul serve` runs there, which then admits this machine to read
and write: haul cp FILE bob:, haul ls bob:. haul peers lists and removes.")]
pub(super) struct Pair {
    /// What the other machine is called here
    #[arg(value_name = "NAME")]
    name: Petname,
    /// The code that it shows; better typed when asked for
    #[arg(value_name = "CODE")]
    code: Vec<String>,
    /// Let it take the place of a machine that has this name
    #[arg(long)]
    replace: bool,
    /// Where the other machine is, if it is not found
    #[arg(long, value_name = "HOST:PORT")]
    at: Option<String>,
    /// How long a code lasts
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "1h")]
    expires: Duration,
    #[command(flatten)]
    relayed: Relayed,
    #[arg(long, hide = true, value_name = "ADDR", value_parser = listen_address, default_value = "[::]:0")]
    listen: SocketAddr,
}

/// What goes on.
enum Ended {
    Paired(Paired),
    With(u8),
}

pub(super) async fn run(pair: Pair) -> anyhow::Result<u8> {
    let home = Home::from_env()?;
    let name = &pair.name;
    if let Some(there) = peers::all(&home.peers())?
        .iter()
        .find(|peer| peer.name == *name && !pair.replace)
    {
        let why = format!(
            "{name} is known already, as {}; choose another name, or --replace it",
            there.key_id
        );
        return Err(Error::Usage(why).into());
    }
    let Some(code) = code(&pair).await? else {
        return Ok(INTERRUPTED);
    };
    let ended = match code {
        Some(by) => Ended::Paired(by_code(&pair, &by, &home).await?),
        None => by_showing(&pair, &home).await?,
    };
    let Paired {
        key_id,
        secret,
        number,
    } = match ended {
        Ended::Paired(paired) => paired,
        Ended::With(code) => return Ok(code),
    };
    if key_id == home.identity()?.key_id() {
        return Err(Error::Usage(
            "that is this very machine, or one with the same key; nothing was paired".into(),
        )
        .into());
    }
    let before = peers::all(&home.peers())?
        .into_iter()
        .find(|peer| peer.key_id == key_id && peer.name != *name);
    peers::add(
        &home,
        &Peer {
            name: name.clone(),
            key_id,
            secret,
            number,
        },
    )?;
    output::line(&format!("Paired: {name} is {key_id}"));
    if let Some(before) = before {
        output::note(&format!(
            "It was known as {}, and is called {name} from now on.",
            before.name
        ));
    }
    output::note(&format!(
        "Now: haul send --to {name} FILE, haul receive --from {name}, and while\n`haul serve` runs there: haul cp FILE {name}:"
    ));
    Ok(DONE)
}

/// The code of the other machine; the inner `None` to show one here, the outer for Ctrl-C.
async fn code(pair: &Pair) -> anyhow::Result<Option<Option<By>>> {
    if !pair.code.is_empty() {
        return Ok(Some(Some(By::parse(&pair.code.join(" "))?)));
    }
    if !std::io::stdin().is_terminal() {
        return Ok(Some(None));
    }
    loop {
        let Some(text) =
            tokio::task::spawn_blocking(|| prompt::code("Its code, or Enter to show one here: "))
                .await?
        else {
            return Ok(None);
        };
        if text.trim().is_empty() {
            return Ok(Some(None));
        }
        match By::parse(&text) {
            Ok(by) => return Ok(Some(Some(by))),
            Err(bad) => output::note(&format!("{bad}.")),
        }
    }
}

async fn by_code(pair: &Pair, by: &By, home: &Home) -> anyhow::Result<Paired> {
    let relay = pair.relayed.relay(home)?;
    let relay = (relay, pair.relayed.none());
    let met = meet(by, pair.at.as_deref(), relay, home, &Config::default()).await?;
    output::note(&format!("Met \"{}\".", met.offer().from));
    Ok(met.pair().await?)
}

async fn by_showing(pair: &Pair, home: &Home) -> anyhow::Result<Ended> {
    let options = SendOptions {
        content: Content::Pair,
        to: None,
        walk: WalkOptions::default(),
        from: machine(),
        listen: vec![pair.listen],
        expires: pair.expires,
        relay: pair.relayed.relay(home)?,
        own: own_addresses(),
    };
    let begun = Offering::begin(options, home.identity()?, Config::default(), haul::ignore()).await;
    let mut offering = begun?;
    let ended = tokio::select! {
        ended = shown(&mut offering) => ended,
        _ = tokio::signal::ctrl_c() => {
            output::note("haul: interrupted; the code is void.");
            offering.stop().await;
            return Ok(Ended::With(INTERRUPTED));
        }
    };
    offering.close().await;
    ended
}

/// Until somebody has typed the code.
async fn shown(offering: &mut Offering) -> anyhow::Result<Ended> {
    let output = Output {
        quiet: false,
        verbose: true,
        json: false,
        dry_run: false,
        peer: "the other machine",
    };
    let asking = Asking {
        output,
        ticket: false,
        to: None,
        command: "haul pair NAME   (what this machine is to be called there)",
    };
    if std::io::stdin().is_terminal() {
        output::note(
            "(If the other machine shows a code as well: Ctrl-C here, and type that one.)",
        );
    }
    loop {
        let _announcement = announce(offering, &asking).await?;
        match offering.meet().await? {
            Met::Paired(paired) => return Ok(Ended::Paired(paired)),
            // It takes nothing here, so it was no `haul pair`.
            Met::Declined { .. } | Met::Accepted { .. } => {
                let why = Reason::new(haul::Code::Cancelled, "the other machine did not pair");
                output::failure(&Error::Refused(why).into());
                return Ok(Ended::With(FAILED));
            }
            Met::Burnt { from } => {
                if !another(&format!(
                    "haul: a wrong guess from {from} has burnt the code."
                ))
                .await
                {
                    return Ok(Ended::With(NOT_TRUSTED));
                }
            }
            Met::Expired => {
                if !another(EXPIRED).await {
                    return Ok(Ended::With(NO_CONNECTION));
                }
            }
        }
        offering.renew().await?;
    }
}
