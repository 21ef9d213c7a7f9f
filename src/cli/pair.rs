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

use super::addresses::own_addresses;
use super::exit::{DONE, FAILED, INTERRUPTED, NO_CONNECTION, NOT_TRUSTED};
use super::options::{parse_listen_address, parse_time};
use super::output::{self, Style};
use super::prompt;
use super::receive::{By, meet};
use super::relay_choice::RelayChoice;
use super::send::{Asking, EXPIRED, announce, another, machine};

/// Pair with another machine, by one code.
#[derive(Args)]
#[command(after_help = "\
Example: haul pair bob      here, which shows a code
         haul pair alice    over there, and type the code
Each stores the other's key under the given name (HAUL_HOME/peers). From then on
you need no code: haul send --to bob FILE, and haul receive --from alice there.
`haul serve` on bob then admits this machine to read and write: haul cp FILE
bob:, haul ls bob:. haul peers lists and removes machines.")]
pub(crate) struct Pair {
    /// Name for the other machine
    #[arg(value_name = "NAME")]
    name: Petname,
    /// The code it shows; safer to type when asked
    #[arg(value_name = "CODE")]
    code: Vec<String>,
    /// Replace a machine that has this name
    #[arg(long)]
    replace: bool,
    /// Address of the other machine, if it is not found
    #[arg(long, value_name = "HOST:PORT")]
    at: Option<String>,
    /// How long a code lasts
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "1h")]
    expires: Duration,
    #[command(flatten)]
    relayed: RelayChoice,
    #[arg(long, hide = true, value_name = "ADDR", value_parser = parse_listen_address, default_value = "[::]:0")]
    listen: SocketAddr,
}

/// How the exchange ended.
enum Ended {
    Paired(Paired),
    With(u8),
}

pub(crate) async fn run(pair: Pair) -> anyhow::Result<u8> {
    let home = Home::from_env()?;
    let name = &pair.name;
    if let Some(there) = peers::all(&home.peers())?
        .iter()
        .find(|peer| peer.name == *name && !pair.replace)
    {
        let why = format!(
            "cannot pair {name}: the name is in use for {}; choose another name, or add --replace",
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
            "cannot pair this machine with itself: the other end has the same key".into(),
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
            "It had the name {}, and now has the name {name}.",
            before.name
        ));
    }
    output::note(&format!(
        "Now: haul send --to {name} FILE, haul receive --from {name}, and if\n`haul serve` runs there: haul cp FILE {name}:"
    ));
    Ok(DONE)
}

/// Asks for the code of the other machine. The inner `None` means to show one here, the outer `None` means Ctrl-C.
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
    let relay = (relay, pair.relayed.is_disabled());
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
            output::note("haul: interrupted; the code is no longer valid.");
            offering.stop().await;
            return Ok(Ended::With(INTERRUPTED));
        }
    };
    offering.close().await;
    ended
}

/// Shows codes until the other machine has paired, or the user gives up.
///
/// Dropping the future withdraws the announcement on the local network.
async fn shown(offering: &mut Offering) -> anyhow::Result<Ended> {
    let asking = Asking {
        style: Style::Verbose,
        ticket: false,
        to: None,
        command: "haul pair NAME   (a name for this machine)",
    };
    if std::io::stdin().is_terminal() {
        output::note(
            "(If the other machine shows a code too: press Ctrl-C here, and type that code.)",
        );
    }
    loop {
        let _announcement = announce(offering, &asking).await?;
        match offering.meet().await? {
            Met::Paired(paired) => return Ok(Ended::Paired(paired)),
            // A `haul receive` answered, which cannot pair.
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
