//! `haul pair`.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;
use haul::pairing::offer::Content;
use haul::pairing::pair::Paired;
use haul::pairing::send::{Met, Offering, SendOptions};
use haul::peers::Peer;
use haul::{Config, Error, Home, Petname, Reason, WalkOptions, peers};

use super::addresses::own_addresses;
use super::exit::{DONE, FAILED, INTERRUPTED, NO_CONNECTION, NOT_TRUSTED};
use super::invitation::{EXPIRED, Invitation, ask_for_another_code, machine_name};
use super::options::{parse_listen_address, parse_time};
use super::output::{self, Style};
use super::prompt::ask_for_code;
use super::relay_choice::RelayChoice;
use super::sender_lookup::SenderLookup;

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
    relay: RelayChoice,
    #[arg(long, hide = true, value_name = "ADDR", value_parser = parse_listen_address, default_value = "[::]:0")]
    listen: SocketAddr,
}

/// How the exchange ended.
enum Ended {
    Paired(Paired),
    /// Without a pairing, with this exit code.
    Unpaired(u8),
}

pub(crate) async fn run(pair: Pair) -> anyhow::Result<u8> {
    let home = Home::from_env()?;
    check_name(&pair, &home)?;
    let ended = match ask(&pair).await? {
        Answer::Code(code) => Ended::Paired(pair_by_code(&pair, &code, &home).await?),
        Answer::ShowCode => pair_by_showing_code(&pair, &home).await?,
        Answer::Interrupted => Ended::Unpaired(INTERRUPTED),
    };
    match ended {
        Ended::Paired(paired) => store(&pair.name, paired, &home),
        Ended::Unpaired(code) => Ok(code),
    }
}

/// Checks that the name is free, unless it may be replaced.
fn check_name(pair: &Pair, home: &Home) -> Result<(), Error> {
    let name = &pair.name;
    let known = peers::all(&home.peers())?;
    match known.iter().find(|peer| peer.name == *name) {
        Some(there) if !pair.replace => Err(Error::Usage(format!(
            "cannot pair {name}: the name is in use for {}; choose another name, or add --replace",
            there.key_id
        ))),
        _ => Ok(()),
    }
}

/// Stores the other machine, and says what can be done now.
fn store(name: &Petname, paired: Paired, home: &Home) -> anyhow::Result<u8> {
    let Paired {
        key_id,
        secret,
        number,
    } = paired;
    if key_id == home.identity()?.key_id() {
        return Err(Error::Usage(
            "cannot pair this machine with itself: the other end has the same key".into(),
        )
        .into());
    }
    let before = peers::all(&home.peers())?
        .into_iter()
        .find(|peer| peer.key_id == key_id && peer.name != *name);
    let peer = Peer {
        name: name.clone(),
        key_id,
        secret,
        number,
    };
    peers::add(home, &peer)?;
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

/// What the user wants after the question for a code.
enum Answer {
    Code(SenderLookup),
    /// Shows a code here.
    ShowCode,
    Interrupted,
}

/// Asks for the code of the other machine, if it is not an argument.
async fn ask(pair: &Pair) -> anyhow::Result<Answer> {
    if !pair.code.is_empty() {
        return Ok(Answer::Code(SenderLookup::parse(&pair.code.join(" "))?));
    }
    if !std::io::stdin().is_terminal() {
        return Ok(Answer::ShowCode);
    }
    loop {
        let asked =
            tokio::task::spawn_blocking(|| ask_for_code("Its code, or Enter to show one here: "));
        let Some(text) = asked.await? else {
            return Ok(Answer::Interrupted);
        };
        if text.trim().is_empty() {
            return Ok(Answer::ShowCode);
        }
        match SenderLookup::parse(&text) {
            Ok(code) => return Ok(Answer::Code(code)),
            Err(bad) => output::note(&format!("{bad}.")),
        }
    }
}

async fn pair_by_code(pair: &Pair, code: &SenderLookup, home: &Home) -> anyhow::Result<Paired> {
    let at = pair.at.as_deref();
    let met = code.meet(at, &pair.relay, home, &Config::default()).await?;
    output::note(&format!("Met \"{}\".", met.offer().from));
    Ok(met.pair().await?)
}

async fn pair_by_showing_code(pair: &Pair, home: &Home) -> anyhow::Result<Ended> {
    let options = SendOptions {
        content: Content::Pair,
        to: None,
        walk: WalkOptions::default(),
        from: machine_name(),
        listen: vec![pair.listen],
        expires: pair.expires,
        relay: pair.relay.relay(home)?,
        own: own_addresses(),
    };
    let begun = Offering::begin(options, home.identity()?, Config::default(), haul::ignore()).await;
    let mut offering = begun?;
    let ended = tokio::select! {
        ended = show_codes(&mut offering) => ended,
        _ = tokio::signal::ctrl_c() => {
            output::note("haul: interrupted; the code is no longer valid.");
            offering.stop().await;
            return Ok(Ended::Unpaired(INTERRUPTED));
        }
    };
    offering.close().await;
    ended
}

/// Shows codes until the other machine has paired, or the user gives up.
///
/// Dropping the future withdraws the announcement on the local network.
async fn show_codes(offering: &mut Offering) -> anyhow::Result<Ended> {
    let invitation = Invitation {
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
        let _announcement = invitation.show_and_announce(offering).await?;
        match offering.meet().await? {
            Met::Paired(paired) => return Ok(Ended::Paired(paired)),
            // A `haul receive` answered, which cannot pair.
            Met::Declined { .. } | Met::Accepted { .. } => {
                let why = Reason::new(haul::Code::Cancelled, "the other machine did not pair");
                output::failure(&Error::Refused(why).into());
                return Ok(Ended::Unpaired(FAILED));
            }
            Met::Burnt { from } => {
                let what = format!("haul: a wrong guess from {from} has burnt the code.");
                if !ask_for_another_code(&what).await {
                    return Ok(Ended::Unpaired(NOT_TRUSTED));
                }
            }
            Met::Expired => {
                if !ask_for_another_code(EXPIRED).await {
                    return Ok(Ended::Unpaired(NO_CONNECTION));
                }
            }
        }
        offering.renew().await?;
    }
}
