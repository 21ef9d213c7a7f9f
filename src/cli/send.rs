//! `haul send`.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clap::Args;
use haul::pairing::discovery;
use haul::pairing::discovery::Announcement;
use haul::pairing::offer::Content;
use haul::pairing::send::{Met, Offering, SendOptions};
use haul::peers;
use haul::{Error, Event, Home, Observer, Petname, Pipe, printable};

use super::addresses::own_addresses;
use super::exit::{DONE, FAILED, INTERRUPTED, NO_CONNECTION, NOT_TRUSTED, code_of_outcome};
use super::options::{
    OutputOptions, PeerSessionOptions, SourceOptions, parse_listen_address, parse_time,
};
use super::output::{self, Display, OtherEnd, Screen, Style};
use super::relay_choice::RelayChoice;

/// Send files to another machine, by a short code.
#[derive(Args)]
#[command(after_help = "\
Examples: haul send photos/ notes.txt
          tar c photos | haul send - --name photos.tar
Type the code into `haul receive` on the other machine. One wrong guess burns
the code. Ctrl-C cancels.
Also: --limit, --exclude and the like, --allow-growing, --specials, --retry-for.")]
pub(crate) struct Send {
    /// Files and directories; - is standard input
    #[arg(value_name = "PATH", required_unless_present = "text")]
    sources: Vec<OsString>,
    /// Send a text instead of files
    #[arg(long, conflicts_with = "sources")]
    text: Option<String>,
    /// Name of standard input at the receiver
    #[arg(long, value_name = "NAME", hide = true, default_value = "stdin")]
    name: OsString,
    /// Send to a paired machine, without a code
    #[arg(long, value_name = "NAME", conflicts_with = "ticket")]
    to: Option<Petname>,
    /// Show a ticket to copy or scan
    #[arg(long)]
    ticket: bool,
    /// A new code for each receiver, until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// How long a code lasts
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "1h")]
    expires: Duration,
    #[command(flatten)]
    relayed: RelayChoice,
    #[arg(long, hide = true, value_name = "ADDR", value_parser = parse_listen_address, default_value = "[::]:0")]
    listen: SocketAddr,
    #[command(flatten)]
    session: PeerSessionOptions,
    #[command(flatten)]
    source_options: SourceOptions,
    #[command(flatten)]
    output: OutputOptions,
}

pub(crate) async fn run(send: Send) -> anyhow::Result<u8> {
    let json = send.output.style() == Style::Json;
    let stage = Stage::new(send.output.style());
    let mut offering = begin(&send, &stage)
        .await
        .inspect_err(|error| output::report_start_failure(json, error))?;
    let ended = tokio::select! {
        ended = offer(&mut offering, &send, &stage) => ended,
        _ = tokio::signal::ctrl_c() => {
            output::note("haul: interrupted; the code is no longer valid. A receiver keeps what it has.");
            offering.stop().await;
            return Ok(INTERRUPTED);
        }
    };
    offering.close().await;
    ended
}

async fn begin(send: &Send, stage: &Stage) -> anyhow::Result<Offering> {
    let home = Home::from_env()?;
    let config = send.session.config(&home);
    let options = SendOptions {
        content: content(send)?,
        to: send
            .to
            .as_ref()
            .map(|name| peers::named(&home, name))
            .transpose()?,
        walk: send.source_options.walk_options(false)?,
        from: machine(),
        listen: vec![send.listen],
        expires: send.expires,
        relay: send.relayed.relay(&home)?,
        own: own_addresses(),
    };
    Ok(Offering::begin(options, home.identity()?, config, stage.observer()).await?)
}

fn content(send: &Send) -> Result<Content, Error> {
    let input = send.sources.iter().any(|source| source == "-");
    Ok(match &send.text {
        Some(text) => Content::Text(text.clone()),
        None if input && (send.sources.len() > 1 || send.keep) => {
            let why = "cannot send - with other sources or --keep: it is standard input; write a file of that name as ./-";
            return Err(Error::Usage(why.into()));
        }
        None if input => Content::Pipe(
            send.name.as_encoded_bytes().to_vec(),
            Pipe::new(std::io::stdin()),
        ),
        None => Content::Files(send.sources.iter().map(Into::into).collect()),
    })
}

/// Returns the name of this machine, for offers.
pub(super) fn machine() -> String {
    let name = haul::pairing::machine_name();
    if name.is_empty() {
        "an unnamed machine".into()
    } else {
        printable(name.as_bytes())
    }
}

async fn offer(offering: &mut Offering, send: &Send, stage: &Stage) -> anyhow::Result<u8> {
    loop {
        // The announcement lasts while a receiver is served. A receiver that was killed looks for the number again.
        let announcement = announce(offering, &Asking::of(send)).await?;
        match offering.meet().await? {
            Met::Accepted { from } => {
                let ended = served(offering, send, stage, from).await;
                if !send.keep {
                    return ended;
                }
                if let Err(error) = ended {
                    output::failure(&error);
                }
            }
            // `haul send` offers no pairing.
            Met::Paired(_) => {}
            Met::Declined { from } => {
                output::note(&format!(
                    "haul: the receiver at {from} declined; nothing was sent"
                ));
                if !send.keep {
                    output::code::report_refused(send.output.style(), "the receiver declined");
                    return Ok(FAILED);
                }
            }
            Met::Burnt { from } => {
                let what = format!(
                    "haul: a wrong guess from {from} has burnt the code.\nNothing was sent or shown."
                );
                if !wants_another(send, &what).await {
                    output::code::report_refused(
                        send.output.style(),
                        "a wrong guess has burnt the code",
                    );
                    return Ok(NOT_TRUSTED);
                }
            }
            Met::Expired => {
                let what = if send.to.is_some() {
                    "haul: no receiver came in time."
                } else {
                    EXPIRED
                };
                if !wants_another(send, what).await {
                    output::code::report_refused(send.output.style(), "no receiver came in time");
                    return Ok(NO_CONNECTION);
                }
            }
        }
        drop(announcement);
        offering.renew().await?;
    }
}

/// Says that a code has expired.
pub(super) const EXPIRED: &str = "haul: the code has expired; no receiver came.";
/// How long `--keep` waits before it replaces a burnt code, so that a guesser cannot fill the screen.
const WAIT_AFTER_GUESS: Duration = Duration::from_secs(1);

/// Reports why a code ended. Returns whether to show another one.
async fn wants_another(send: &Send, what: &str) -> bool {
    if !send.keep {
        return another(what).await;
    }
    output::note(what);
    tokio::time::sleep(WAIT_AFTER_GUESS).await;
    true
}

/// How to show a code, a ticket or a wait for a paired machine.
pub(super) struct Asking<'a> {
    pub(super) style: Style,
    pub(super) ticket: bool,
    /// The paired machine that is waited for, which needs no code.
    pub(super) to: Option<&'a Petname>,
    /// The command to type on the other machine.
    pub(super) command: &'a str,
}

impl<'a> Asking<'a> {
    fn of(send: &'a Send) -> Self {
        Self {
            style: send.output.style(),
            ticket: send.ticket,
            to: send.to.as_ref(),
            command: "haul receive",
        }
    }
}

/// The most numbers that are drawn while each is in use on this network.
const DRAWS: usize = 3;

/// Shows the code, and announces its number on the local network. Returns `None` if nothing is announced.
///
/// # Errors
/// The errors of [`Offering::renew`], which draws a new number if another sender on this network uses it.
pub(super) async fn announce(
    offering: &mut Offering,
    asking: &Asking<'_>,
) -> anyhow::Result<Option<Announcement>> {
    for _ in 0..DRAWS {
        match offering.code() {
            Some(code) if !code.is_of_relay() && discovery::is_taken(code.number()).await => {
                offering.renew().await?
            }
            _ => break,
        }
    }
    let Some(number) = offering.number() else {
        return Ok(None);
    };
    let port = offering.addresses().first().map_or(0, SocketAddr::port);
    if let Some(error) = offering.relay_failure() {
        output::note(&format!(
            "haul: cannot use the relay: {error}\nThe code works on this network only:"
        ));
    }
    match (offering.ticket(), offering.code()) {
        (Some(ticket), _) if asking.ticket => {
            output::code::print_ticket(asking.style, &ticket.to_string())
        }
        (_, Some(code)) => {
            output::code::print_code(asking.style, &code.to_string(), port, asking.command)
        }
        _ => output::code::print_waiting(asking.style, asking.to.map_or("", Petname::as_str), port),
    }
    Ok(match Announcement::of(number, port) {
        Ok(announcement) => Some(announcement),
        Err(error) => {
            output::note(&format!(
                "haul: {error}; the receiver needs --at HOST:{port}"
            ));
            None
        }
    })
}

/// Serves one receiver until it has the offer.
async fn served(
    offering: &mut Offering,
    send: &Send,
    stage: &Stage,
    from: SocketAddr,
) -> anyhow::Result<u8> {
    if send.text.is_some() {
        if !matches!(send.output.style(), Style::Quiet | Style::Json) {
            output::note(&format!("{from} has received the text."));
        }
        output::code::report_done(send.output.style());
        return Ok(DONE);
    }
    let screen = Screen::new(Display {
        style: send.output.style(),
        dry_run: false,
        other_end: OtherEnd::Receiver,
    });
    stage.show(screen.observer());
    let ended = offering.serve().await;
    if let Some((from, route)) = offering.route() {
        screen.set_route(from, route);
    }
    stage.clear();
    screen.end(&ended);
    let outcome = ended?;
    Ok(match outcome.summary.failed {
        0 => code_of_outcome(&outcome),
        _ => FAILED,
    })
}

/// Passes events to the screen of the receiver that is served. Earlier events are kept until a screen exists.
#[derive(Clone)]
struct Stage {
    style: Style,
    showing: Arc<Mutex<Showing>>,
}

#[derive(Default)]
struct Showing {
    on: Option<Observer>,
    before: Vec<Event>,
}

impl Stage {
    fn new(style: Style) -> Self {
        Self {
            style,
            showing: Arc::default(),
        }
    }

    fn observer(&self) -> Observer {
        let stage = self.clone();
        Arc::new(move |event| {
            match &event {
                Event::Asked { address } => {
                    return output::code::report_asked(stage.style, *address);
                }
                Event::Left { address } => {
                    return output::code::report_left(stage.style, *address);
                }
                _ => {}
            }
            let mut showing = stage.showing();
            match &showing.on {
                Some(screen) => screen(event),
                None => showing.before.push(event),
            }
        })
    }

    fn show(&self, screen: Observer) {
        let mut showing = self.showing();
        showing.before.drain(..).for_each(|event| screen(event));
        showing.on = Some(screen);
    }

    fn clear(&self) {
        *self.showing() = Showing::default();
    }

    fn showing(&self) -> MutexGuard<'_, Showing> {
        self.showing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks whether to show another code. Returns false without a terminal.
pub(super) async fn another(what: &str) -> bool {
    let question = format!("{what}\nPress Enter for a new code, Ctrl-C to end.");
    let asked = tokio::task::spawn_blocking(move || output::ask(&question)).await;
    let answer = asked.ok().flatten();
    if answer.is_none() {
        output::note(what);
    }
    answer.is_some()
}
