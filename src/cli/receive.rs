//! `haul receive`.

mod consent;

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::Args;
use haul::pairing::receive::Met;
use haul::pairing::ticket::BadTicket;
use haul::{
    AcceptedQuota, Client, Config, Durability, Error, Home, LocalStore, Observer, Offer, Outcome,
    Petname, PullOptions, peers,
};

use self::consent::Consent;
use super::exit::{DONE, FAILED, INTERRUPTED, code_of_outcome};
use super::options::{ExistingOptions, OutputOptions, PeerSessionOptions};
use super::output::{self, Display, OtherEnd, Screen, Style, printable_path};
use super::prompt::ask_for_code;
use super::relay_choice::RelayChoice;
use super::sender_lookup::SenderLookup;

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
    relay: RelayChoice,
    #[command(flatten)]
    session: PeerSessionOptions,
    #[command(flatten)]
    existing: ExistingOptions,
    #[command(flatten)]
    output: OutputOptions,
}

impl Receive {
    /// Returns the destination directory; `None` is standard output.
    fn directory(&self) -> Option<&Path> {
        (self.to.as_os_str() != "-").then_some(&*self.to)
    }
}

pub(crate) async fn run(receive: Receive) -> anyhow::Result<u8> {
    let style = receive.output.style();
    let begun = tokio::select! {
        begun = meet_sender(&receive) => begun
            .inspect_err(|error| output::report_start_failure(style == Style::Json, error))?,
        _ = tokio::signal::ctrl_c() => None,
    };
    let Some(met) = begun else {
        return Ok(INTERRUPTED);
    };
    if let Err(why) = check_offer(&receive, &met) {
        met.decline().await;
        return Err(why.into());
    }
    let consent = Consent {
        directory: receive.directory(),
        style,
        yes: receive.yes,
    };
    let accepted = tokio::select! {
        accepted = consent.ask(&met) => Some(accepted),
        _ = tokio::signal::ctrl_c() => None,
    };
    let code = match accepted {
        Some(true) => return receive_accepted(&receive, met).await,
        Some(false) => {
            output::note("haul: declined; nothing was received");
            FAILED
        }
        None => {
            output::note("\nhaul: interrupted; nothing was received");
            INTERRUPTED
        }
    };
    met.decline().await;
    output::code::report_refused(style, "declined");
    Ok(code)
}

/// Asks for the code if needed, and meets the sender. Returns `None` if the user gave up.
async fn meet_sender(receive: &Receive) -> anyhow::Result<Option<Met>> {
    let home = Home::from_env()?;
    let Some(lookup) = sender_lookup(receive, &home).await? else {
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
    let met = lookup.meet(receive.at.as_deref(), &receive.relay, &home, &config);
    met.await.map(Some)
}

/// Checks the options before the code is used, because an attempt may burn it.
fn check_options(receive: &Receive) -> Result<(), Error> {
    let not_a_directory = |to: &Path| to.exists() && !to.is_dir();
    let why = if !receive.yes && !output::can_ask() {
        "cannot ask: there is no terminal; --yes accepts without a question"
    } else if receive.directory().is_some_and(not_a_directory) {
        "cannot receive into --to: it is not a directory"
    } else {
        return Ok(());
    };
    Err(Error::Usage(why.into()))
}

/// Checks that the offer fits the destination.
fn check_offer(receive: &Receive, met: &Met) -> Result<(), Error> {
    let to_output = receive.directory().is_none();
    let why = match met.offer() {
        Offer { pair: Some(_), .. } => {
            "cannot receive: the other machine wants to pair; type a new code of it into haul pair NAME here"
        }
        Offer {
            text: None,
            directory,
            ..
        } if to_output && (*directory || met.names().len() != 1) => {
            "cannot write the offer to standard output: it is not one file; add --to DIR"
        }
        _ if to_output && receive.output.style() == Style::Json => {
            "cannot use --json and --to - together: both write to standard output"
        }
        _ => return Ok(()),
    };
    Err(Error::Usage(why.into()))
}

/// Returns the given code, ticket or peer, or asks for a code. A typed code does not appear in the list of processes.
/// Returns `None` for Ctrl-C.
async fn sender_lookup(receive: &Receive, home: &Home) -> anyhow::Result<Option<SenderLookup>> {
    if let Some(name) = &receive.from {
        return Ok(Some(SenderLookup::Peer(peers::named(home, name)?)));
    }
    if let Some(file) = &receive.ticket_file {
        let ticket = read_ticket(file)?
            .parse()
            .map_err(|bad: BadTicket| Error::Usage(bad.to_string()))?;
        return Ok(Some(SenderLookup::Ticket(ticket)));
    }
    if !receive.code.is_empty() {
        return Ok(Some(SenderLookup::parse(&receive.code.join(" "))?));
    }
    let on_terminal = std::io::stdin().is_terminal();
    loop {
        match tokio::task::spawn_blocking(|| ask_for_code("Code: ")).await? {
            None if on_terminal => return Ok(None),
            None => {
                return Err(
                    Error::Usage("cannot ask for the code: there is no terminal; give it as an argument or on standard input".into()).into(),
                );
            }
            Some(text) => match SenderLookup::parse(&text) {
                Ok(lookup) => return Ok(Some(lookup)),
                // The code was not used, so it is not burnt, and the user may type it again.
                Err(bad) if on_terminal => output::note(&format!("{bad}.")),
                Err(bad) => return Err(bad.into()),
            },
        }
    }
}

/// The most bytes that are read of a file with a ticket.
const MAX_TICKET_FILE: u64 = 16 << 10;

/// Reads a ticket from a file, or from standard input for `-`.
fn read_ticket(file: &Path) -> Result<String, Error> {
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

async fn receive_accepted(receive: &Receive, met: Met) -> anyhow::Result<u8> {
    let style = receive.output.style();
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
        if style != Style::Json {
            output::offer::print_text(&text.unwrap_or_default());
        }
        output::code::report_done(style);
        return Ok(DONE);
    };
    let to_output = receive.directory().is_none();
    let screen = Screen::new(Display {
        style,
        dry_run: false,
        other_end: OtherEnd::Sender,
    });
    let ended = tokio::select! {
        ended = pull(&client, &options, to_output, screen.observer()) => ended,
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
    let incomplete = to_output && code != DONE;
    if incomplete {
        output::note("haul: the output is incomplete");
    }
    ended?;
    Ok(if incomplete { FAILED } else { code })
}

async fn pull(
    client: &Client,
    options: &PullOptions,
    to_output: bool,
    observer: Observer,
) -> Result<Outcome, Error> {
    match to_output {
        true => {
            let output = output::unbuffered_standard_output()?;
            client.pull_to(output, options, observer).await
        }
        false => client.pull(options, observer).await,
    }
}
