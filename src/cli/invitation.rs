//! Shows the other machine how to get an offer: by a code, a ticket or a pairing. Announces it on the local network.

use std::net::SocketAddr;

use haul::pairing::discovery;
use haul::pairing::discovery::Announcement;
use haul::pairing::send::Offering;
use haul::{Petname, printable};

use super::output::{self, Style};

/// Says that a code has expired.
pub(crate) const EXPIRED: &str = "haul: the code has expired; no receiver came.";
/// The most numbers that are drawn while each is in use on this network.
const MAX_DRAWS: usize = 3;

/// How the other machine is invited.
pub(crate) struct Invitation<'a> {
    pub(crate) style: Style,
    /// Whether to show a ticket instead of a code.
    pub(crate) ticket: bool,
    /// The paired machine that is waited for, which needs no code.
    pub(crate) to: Option<&'a Petname>,
    /// The command to type on the other machine.
    pub(crate) command: &'a str,
}

impl Invitation<'_> {
    /// Shows the code, and announces its number on the local network until the result is dropped. Returns `None` if
    /// nothing is announced.
    ///
    /// # Errors
    /// The errors of [`Offering::renew`], which draws a new number if another sender on this network uses it.
    pub(crate) async fn show_and_announce(
        &self,
        offering: &mut Offering,
    ) -> anyhow::Result<Option<Announcement>> {
        draw_free_number(offering).await?;
        let Some(number) = offering.number() else {
            return Ok(None);
        };
        let port = offering.addresses().first().map_or(0, SocketAddr::port);
        if let Some(error) = offering.relay_failure() {
            output::note(&format!(
                "haul: cannot use the relay: {error}\nThe code works on this network only:"
            ));
        }
        self.show(offering, port);
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

    fn show(&self, offering: &Offering, port: u16) {
        match (offering.ticket(), offering.code()) {
            (Some(ticket), _) if self.ticket => {
                output::code::print_ticket(self.style, &ticket.to_string());
            }
            (_, Some(code)) => {
                output::code::print_code(self.style, &code.to_string(), port, self.command);
            }
            _ => {
                let name = self.to.map_or("", Petname::as_str);
                output::code::print_waiting(self.style, name, port);
            }
        }
    }
}

/// Draws new codes while another sender on this network uses the number.
async fn draw_free_number(offering: &mut Offering) -> anyhow::Result<()> {
    for _ in 0..MAX_DRAWS {
        match offering.code() {
            Some(code) if !code.is_of_relay() && discovery::is_taken(code.number()).await => {
                offering.renew().await?;
            }
            _ => break,
        }
    }
    Ok(())
}

/// Asks whether to show another code, and says what became of the last one. Returns false without a terminal.
pub(crate) async fn ask_for_another_code(what: &str) -> bool {
    let question = format!("{what}\nPress Enter for a new code, Ctrl-C to end.");
    let asked = tokio::task::spawn_blocking(move || output::ask(&question)).await;
    let answer = asked.ok().flatten();
    if answer.is_none() {
        output::note(what);
    }
    answer.is_some()
}

/// Returns the name of this machine, for offers.
pub(crate) fn machine_name() -> String {
    let name = haul::pairing::machine_name();
    if name.is_empty() {
        "an unnamed machine".into()
    } else {
        printable(name.as_bytes())
    }
}
