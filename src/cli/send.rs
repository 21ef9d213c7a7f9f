//! `haul send`.

mod event_router;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;
use haul::pairing::offer::Content;
use haul::pairing::send::{Met, Offering, SendOptions};
use haul::{Error, Home, Petname, Pipe, peers};

use self::event_router::EventRouter;
use super::addresses::own_addresses;
use super::exit::{DONE, FAILED, INTERRUPTED, NO_CONNECTION, NOT_TRUSTED, code_of_outcome};
use super::invitation::{EXPIRED, Invitation, ask_for_another_code, machine_name};
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
    relay: RelayChoice,
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
    let style = send.output.style();
    let events = EventRouter::new(style);
    let mut offering = begin(&send, &events)
        .await
        .inspect_err(|error| output::report_start_failure(style == Style::Json, error))?;
    let ended = tokio::select! {
        ended = offer(&mut offering, &send, &events) => ended,
        _ = tokio::signal::ctrl_c() => {
            output::note("haul: interrupted; the code is no longer valid. A receiver keeps what it has.");
            offering.stop().await;
            return Ok(INTERRUPTED);
        }
    };
    offering.close().await;
    ended
}

async fn begin(send: &Send, events: &EventRouter) -> anyhow::Result<Offering> {
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
        from: machine_name(),
        listen: vec![send.listen],
        expires: send.expires,
        relay: send.relay.relay(&home)?,
        own: own_addresses(),
    };
    Ok(Offering::begin(options, home.identity()?, config, events.observer()).await?)
}

fn content(send: &Send) -> Result<Content, Error> {
    let from_input = send.sources.iter().any(|source| source == "-");
    Ok(match &send.text {
        Some(text) => Content::Text(text.clone()),
        None if from_input && (send.sources.len() > 1 || send.keep) => {
            let why = "cannot send - with other sources or --keep: it is standard input; write a file of that name as ./-";
            return Err(Error::Usage(why.into()));
        }
        None if from_input => Content::Pipe(
            send.name.as_encoded_bytes().to_vec(),
            Pipe::new(std::io::stdin()),
        ),
        None => Content::Files(send.sources.iter().map(Into::into).collect()),
    })
}

/// Offers the content to one receiver, or with `--keep` to one after the other.
async fn offer(offering: &mut Offering, send: &Send, events: &EventRouter) -> anyhow::Result<u8> {
    let style = send.output.style();
    let invitation = Invitation {
        style,
        ticket: send.ticket,
        to: send.to.as_ref(),
        command: "haul receive",
    };
    loop {
        // The announcement lasts while a receiver is served. A receiver that was killed looks for the number again.
        let announcement = invitation.show_and_announce(offering).await?;
        match offering.meet().await? {
            Met::Accepted { from } => {
                let ended = serve_receiver(offering, send, events, from).await;
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
                    output::code::report_refused(style, "the receiver declined");
                    return Ok(FAILED);
                }
            }
            Met::Burnt { from } => {
                let what = format!(
                    "haul: a wrong guess from {from} has burnt the code.\nNothing was sent or shown."
                );
                if !wants_another_code(send, &what).await {
                    output::code::report_refused(style, "a wrong guess has burnt the code");
                    return Ok(NOT_TRUSTED);
                }
            }
            Met::Expired => {
                let what = match send.to {
                    Some(_) => "haul: no receiver came in time.",
                    None => EXPIRED,
                };
                if !wants_another_code(send, what).await {
                    output::code::report_refused(style, "no receiver came in time");
                    return Ok(NO_CONNECTION);
                }
            }
        }
        drop(announcement);
        offering.renew().await?;
    }
}

/// How long `--keep` waits before it replaces a burnt code, so that a guesser cannot fill the screen.
const WAIT_AFTER_GUESS: Duration = Duration::from_secs(1);

/// Reports why a code ended. Returns whether to show another one.
async fn wants_another_code(send: &Send, what: &str) -> bool {
    if !send.keep {
        return ask_for_another_code(what).await;
    }
    output::note(what);
    tokio::time::sleep(WAIT_AFTER_GUESS).await;
    true
}

/// Serves one receiver until it has the offer, and returns the exit code.
async fn serve_receiver(
    offering: &mut Offering,
    send: &Send,
    events: &EventRouter,
    from: SocketAddr,
) -> anyhow::Result<u8> {
    let style = send.output.style();
    if send.text.is_some() {
        if !matches!(style, Style::Quiet | Style::Json) {
            output::note(&format!("{from} has received the text."));
        }
        output::code::report_done(style);
        return Ok(DONE);
    }
    let screen = Screen::new(Display {
        style,
        dry_run: false,
        other_end: OtherEnd::Receiver,
    });
    events.start(screen.observer());
    let ended = offering.serve().await;
    if let Some((from, route)) = offering.route() {
        screen.set_route(from, route);
    }
    events.stop();
    screen.end(&ended);
    let outcome = ended?;
    Ok(match outcome.summary.failed {
        0 => code_of_outcome(&outcome),
        _ => FAILED,
    })
}
