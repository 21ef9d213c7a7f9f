//! `haul receive`.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use haul::pairing::code::{Credential, ShortCode, without_label};
use haul::pairing::pair;
use haul::pairing::receive;
use haul::pairing::receive::Met;
use haul::pairing::rendezvous::RelayAt;
use haul::pairing::route::Whereabouts;
use haul::pairing::ticket::{BadTicket, Ticket};
use haul::peers;
use haul::peers::Peer;
use haul::{
    AcceptedQuota, Client, Config, Durability, Error, Home, LocalStore, Observer, Offer, Outcome,
    PeerText, Petname, PullOptions,
};

use super::addresses::own_addresses;
use super::exit::{DONE, FAILED, INTERRUPTED, code_of_outcome};
use super::options::{ExistingOptions, OutputOptions, PeerSessionOptions};
use super::output::offer::OfferedName;
use super::output::{self, Display, OtherEnd, Screen, Style, printable_path};
use super::prompt;
use super::relay_choice::RelayChoice;

/// Receive what another machine sends, by its code.
#[derive(Args)]
#[command(after_help = "\
Example: haul receive --to ~/Downloads    asks for the code; Tab completes words
It shows names, number and size before it writes. To resume, run both again, or
only this one with the same code. Also: -c, --existing HOW, --retry-for,
--limit, as in haul cp.")]
pub(crate) struct Receive {
    /// Code or ticket; safer to type when asked
    #[arg(value_name = "CODE", conflicts_with_all = ["from", "ticket_file"])]
    code: Vec<String>,
    /// Receive from a paired machine, without a code
    #[arg(long, value_name = "NAME", conflicts_with = "ticket_file")]
    from: Option<Petname>,
    /// Read the ticket from FILE; - is standard input
    #[arg(long, value_name = "FILE")]
    ticket_file: Option<PathBuf>,
    /// Destination; - is standard output
    #[arg(long, value_name = "DIR", default_value = ".")]
    to: PathBuf,
    /// Accept without a question
    #[arg(short, long)]
    yes: bool,
    /// Address of the sender, if it is not found
    #[arg(long, value_name = "HOST:PORT")]
    at: Option<String>,
    #[command(flatten)]
    relayed: RelayChoice,
    #[command(flatten)]
    session: PeerSessionOptions,
    #[command(flatten)]
    existing: ExistingOptions,
    #[command(flatten)]
    output: OutputOptions,
}

/// What the user gave to find the sender.
pub(super) enum By {
    Code(ShortCode),
    Ticket(Ticket),
    Peer(Peer),
}

impl By {
    /// Parses a pasted code or ticket.
    pub(super) fn parse(text: &str) -> Result<Self, Error> {
        let text = without_label(text);
        match Ticket::has_prefix(text) {
            true => text
                .parse()
                .map(Self::Ticket)
                .map_err(|bad| Error::Usage(bad.to_string())),
            false => text
                .parse()
                .map(Self::Code)
                .map_err(|bad| Error::Usage(bad.to_string())),
        }
    }

    fn credential(&self) -> Credential {
        match self {
            Self::Code(code) => code.into(),
            Self::Ticket(ticket) => ticket.credential(),
            Self::Peer(peer) => pair::sent_by(peer),
        }
    }

    /// Returns where to look for the sender if no `--at` is given.
    fn whereabouts(&self, relay: Option<RelayAt>, no_relay: bool) -> Whereabouts {
        let own = own_addresses();
        match self {
            Self::Ticket(ticket) if no_relay => Whereabouts {
                relay: None,
                ..ticket.whereabouts(None, own)
            },
            Self::Ticket(ticket) => ticket.whereabouts(relay, own),
            Self::Code(_) | Self::Peer(_) => Whereabouts {
                relay,
                own,
                ..Whereabouts::default()
            },
        }
    }
}

pub(crate) async fn run(receive: Receive) -> anyhow::Result<u8> {
    let json = receive.output.style() == Style::Json;
    let begun = tokio::select! {
        begun = begin(&receive) => begun.inspect_err(|error| output::report_start_failure(json, error))?,
        _ = tokio::signal::ctrl_c() => None,
    };
    let Some(met) = begun else {
        return Ok(INTERRUPTED);
    };
    if let Err(why) = check_offer(&receive, &met) {
        met.decline().await;
        return Err(why.into());
    }
    let accepted = tokio::select! {
        accepted = accepted(&receive, &met) => Some(accepted),
        _ = tokio::signal::ctrl_c() => None,
    };
    match accepted {
        Some(true) => return receive_accepted(&receive, met).await,
        Some(false) => output::note("haul: declined; nothing was received"),
        None => output::note("\nhaul: interrupted; nothing was received"),
    }
    met.decline().await;
    output::code::report_refused(receive.output.style(), "declined");
    Ok(if accepted.is_some() {
        FAILED
    } else {
        INTERRUPTED
    })
}

/// Checks the options before the code is used, because an attempt may burn it.
fn check_options(receive: &Receive) -> Result<(), Error> {
    let why = match () {
        () if !receive.yes && !output::can_ask() => {
            "cannot ask: there is no terminal; --yes accepts without a question"
        }
        () if receive.to.as_os_str() != "-" && receive.to.exists() && !receive.to.is_dir() => {
            "cannot receive into --to: it is not a directory"
        }
        () => return Ok(()),
    };
    Err(Error::Usage(why.into()))
}

/// Checks that the offer fits the destination.
fn check_offer(receive: &Receive, met: &Met) -> Result<(), Error> {
    let offer = met.offer();
    let output = receive.to.as_os_str() == "-";
    let why = match offer {
        Offer { pair: Some(_), .. } => {
            "cannot receive: the other machine wants to pair; type a new code of it into haul pair NAME here"
        }
        Offer {
            text: None,
            directory,
            ..
        } if output && (*directory || met.names().len() != 1) => {
            "cannot write the offer to standard output: it is not one file; add --to DIR"
        }
        _ if output && receive.output.style() == Style::Json => {
            "cannot use --json and --to - together: both write to standard output"
        }
        _ => return Ok(()),
    };
    Err(Error::Usage(why.into()))
}

/// Asks for the code if needed, and meets the sender. Returns `None` if the user gave up.
async fn begin(receive: &Receive) -> anyhow::Result<Option<Met>> {
    let home = Home::from_env()?;
    let Some(by) = by(receive, &home).await? else {
        return Ok(None);
    };
    check_options(receive)?;
    // Creates HAUL_HOME if it does not exist.
    home.identity()?;
    if receive.to.is_dir() {
        // Refuses destinations inside HAUL_HOME before the code is used.
        LocalStore::open_reserving(&receive.to, home.path())?;
    }
    let config = Config {
        reserved: Some(home.path().to_owned()),
        ..receive.session.config(&home)
    };
    let relay = receive.relayed.relay(&home)?;
    meet(
        &by,
        receive.at.as_deref(),
        (relay, receive.relayed.is_disabled()),
        &home,
        &config,
    )
    .await
    .map(Some)
}

/// Finds the sender and proves to it that this end knows the code.
///
/// # Errors
/// [`Error::Lost`] with advice when the sender was not found, and the errors of [`receive::meet`].
pub(super) async fn meet(
    by: &By,
    at: Option<&str>,
    (relay, no_relay): (Option<RelayAt>, bool),
    home: &Home,
    config: &Config,
) -> anyhow::Result<Met> {
    let at = match at {
        Some(at) => Whereabouts {
            addresses: resolve(at).await?,
            ..Whereabouts::default()
        },
        None => by.whereabouts(relay, no_relay),
    };
    let nowhere = at.addresses.is_empty() && at.relay.is_none();
    let met = receive::meet(&by.credential(), at, &home.identity()?, config).await;
    met.map_err(|error| match (error, by) {
        (Error::Lost(why), By::Code(code)) if nowhere => {
            anyhow::Error::from(Error::Lost(why.clone())).context(not_found_advice(&why, code))
        }
        (error @ Error::Lost(_), By::Peer(Peer { name, .. })) => {
            let how = format!(
                "cannot find {name}. Check that `haul send --to NAME` runs there, with its name for this machine. Between \
                 networks, both ends need the same relay (HAUL_RELAY). If one end has paired again, pair both again"
            );
            anyhow::Error::from(error).context(how)
        }
        (error, _) => error.into(),
    })
}

/// Says why no sender was found, and what the user can do.
fn not_found_advice(why: &PeerText, code: &ShortCode) -> String {
    match code.is_of_relay() {
        true => format!(
            "{why}, and the sender uses a relay: set HAUL_RELAY=HOST as on its machine, or add --relay HOST"
        ),
        false => format!(
            "{why}. Check that `haul send` still runs, on the same network. If that blocks multicast, add --at \
             HOST:PORT, as `haul send -v` shows it; between networks, use a relay: haul relay --help"
        ),
    }
}

/// Returns the given code, ticket or peer, or asks for a code. A typed code does not appear in the list of processes.
/// Returns `None` for Ctrl-C.
async fn by(receive: &Receive, home: &Home) -> anyhow::Result<Option<By>> {
    if let Some(name) = &receive.from {
        return Ok(Some(By::Peer(peers::named(home, name)?)));
    }
    if let Some(file) = &receive.ticket_file {
        let text = ticket_in(file)?;
        return Ok(Some(By::Ticket(
            text.parse()
                .map_err(|bad: BadTicket| Error::Usage(bad.to_string()))?,
        )));
    }
    if !receive.code.is_empty() {
        return Ok(Some(By::parse(&receive.code.join(" "))?));
    }
    let on_terminal = std::io::stdin().is_terminal();
    loop {
        match tokio::task::spawn_blocking(|| prompt::code("Code: ")).await? {
            None if on_terminal => return Ok(None),
            None => {
                return Err(
                    Error::Usage("cannot ask for the code: there is no terminal; give it as an argument or on standard input".into()).into(),
                );
            }
            Some(text) => match By::parse(&text) {
                Ok(by) => return Ok(Some(by)),
                // The code was not used, so it is not burnt, and the user may type it again.
                Err(bad) if on_terminal => output::note(&format!("{bad}.")),
                Err(bad) => return Err(bad.into()),
            },
        }
    }
}

/// The most bytes that are read of a file with a ticket.
const MAX_TICKET_FILE: u64 = 16 << 10;

fn ticket_in(file: &Path) -> Result<String, Error> {
    let failed = || Error::io(format!("cannot read {}", printable_path(file)));
    let mut text = String::new();
    let read = match file.as_os_str() == "-" {
        true => std::io::stdin()
            .take(MAX_TICKET_FILE)
            .read_to_string(&mut text),
        false => File::open(file)
            .map_err(failed())?
            .take(MAX_TICKET_FILE)
            .read_to_string(&mut text),
    };
    read.map(|_| text).map_err(failed())
}

async fn resolve(at: &str) -> anyhow::Result<Vec<SocketAddr>> {
    let found = tokio::net::lookup_host(at)
        .await
        .map_err(|error| Error::Resolve {
            host: at.into(),
            why: format!("{error}; write it as HOST:PORT").into(),
        })?;
    Ok(found.collect())
}

/// Shows the offer, and asks the user to accept it.
async fn accepted(receive: &Receive, met: &Met) -> bool {
    let offer = met.offer();
    let output = receive.to.as_os_str() == "-";
    let free = if output {
        None
    } else {
        receive::free_space(&receive.to)
    };
    let from = &offer.from;
    let names = OfferedName::look_up(met.names(), (!output).then_some(&*receive.to));
    let listed = output::offer::describe(offer, &names);
    if receive.output.style() == Style::Json {
        output::offer::print_json(offer, &names, met.address(), free);
    } else if offer.text.is_none() {
        listed.lines.iter().for_each(|line| output::note(line));
    }
    let missing = offer
        .bytes
        .saturating_sub(receive::held(&receive.to, met.names()));
    let small = free.filter(|free| *free < missing);
    if let Some(free) = small {
        let free = output::bytes(free);
        let to = printable_path(&receive.to);
        let missing = output::bytes(missing);
        output::note(&format!(
            "haul: not enough space in {to}: {missing} would be received, {free} are free"
        ));
    }
    if receive.yes {
        // With --yes there is no question, so too little space means no.
        return small.is_none();
    }
    let what = if offer.text.is_some() {
        format!("A text from \"{from}\"")
    } else {
        format!("From \"{from}\"")
    };
    // Enter alone accepts only if every risky name was shown.
    let accept_by_default = small.is_none() && !listed.cut;
    let default = if accept_by_default { "[Y/n]" } else { "[y/N]" };
    let question = format!("{what} - accept? {default}");
    let asked = tokio::task::spawn_blocking(move || output::ask(&question)).await;
    match asked.ok().flatten().as_deref() {
        Some("y" | "Y" | "yes") => true,
        Some("") => accept_by_default,
        Some(_) => false,
        None => {
            output::note("");
            false
        }
    }
}

async fn receive_accepted(receive: &Receive, met: Met) -> anyhow::Result<u8> {
    let options = PullOptions {
        sources: met.names().to_vec(),
        destination: receive.to.clone(),
        into: true,
        durability: Durability::Synced,
        take: receive.existing.receive_options(),
        literal: true,
        quota: Some(AcceptedQuota::of(met.offer())),
        ..PullOptions::default()
    };
    let text = met.offer().text.clone();
    let Some(client) = met.accept().await? else {
        if receive.output.style() != Style::Json {
            output::offer::print_text(&text.unwrap_or_default());
        }
        output::code::report_done(receive.output.style());
        return Ok(DONE);
    };
    let output = receive.to.as_os_str() == "-";
    let screen = Screen::new(Display {
        style: receive.output.style(),
        dry_run: false,
        other_end: OtherEnd::Sender,
    });
    let ended = tokio::select! {
        ended = pull(&client, &options, output, screen.observer()) => ended,
        _ = tokio::signal::ctrl_c() => {
            screen.end(&Err(Error::Lost("interrupted".into())));
            client.cancel().await;
            output::note("haul: interrupted; committed files remain. Run it again with the same code to resume.");
            return Ok(INTERRUPTED);
        }
    };
    screen.end(&ended);
    match &ended {
        Ok(_) => client.close_after_server().await,
        Err(_) => client.close().await,
    }
    let code = ended.as_ref().map_or(FAILED, code_of_outcome);
    let whole = code == DONE;
    if output && !whole {
        output::note("haul: the output is incomplete");
    }
    ended?;
    Ok(if output && !whole { FAILED } else { code })
}

async fn pull(
    client: &Client,
    options: &PullOptions,
    output: bool,
    observer: Observer,
) -> Result<Outcome, Error> {
    match output {
        true => {
            client
                .pull_to(output::unbuffered_standard_output()?, options, observer)
                .await
        }
        false => client.pull(options, observer).await,
    }
}
