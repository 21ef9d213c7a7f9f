//! Finds the machine that sends or pairs: by a code, a ticket, or a pairing.

use std::net::SocketAddr;

use haul::pairing::code::{Credential, ShortCode, without_label};
use haul::pairing::pair;
use haul::pairing::receive::{self, Met};
use haul::pairing::rendezvous::RelayAt;
use haul::pairing::route::Whereabouts;
use haul::pairing::ticket::Ticket;
use haul::peers::Peer;
use haul::{Config, Error, Home, PeerText};

use super::addresses::own_addresses;
use super::relay_choice::RelayChoice;

/// What the user gave to find the sender.
pub(crate) enum SenderLookup {
    Code(ShortCode),
    Ticket(Ticket),
    Peer(Peer),
}

impl SenderLookup {
    /// Parses a typed or pasted code or ticket.
    ///
    /// # Errors
    /// [`Error::Usage`] when it is neither.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
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

    /// Finds the sender and proves to it that this end knows the code. With `at`, it looks only there.
    ///
    /// # Errors
    /// [`Error::Lost`] with advice when the sender was not found; [`Error::Usage`] when the relay cannot be used; the
    /// errors of [`receive::meet`].
    pub(crate) async fn meet(
        &self,
        at: Option<&str>,
        relay: &RelayChoice,
        home: &Home,
        config: &Config,
    ) -> anyhow::Result<Met> {
        let chosen = relay.relay(home)?;
        let whereabouts = match at {
            Some(at) => Whereabouts {
                addresses: resolve(at).await?,
                ..Whereabouts::default()
            },
            None => self.whereabouts(chosen, relay.is_disabled()),
        };
        let nowhere = whereabouts.addresses.is_empty() && whereabouts.relay.is_none();
        let identity = home.identity()?;
        let met = receive::meet(&self.credential(), whereabouts, &identity, config).await;
        met.map_err(|error| self.add_advice(error, nowhere))
    }

    /// Adds to the error of a sender that was not found what the user can do. `nowhere` means that only this network was
    /// searched.
    fn add_advice(&self, error: Error, nowhere: bool) -> anyhow::Error {
        let advice = match (&error, self) {
            (Error::Lost(why), Self::Code(code)) if nowhere => advice_for_code(why, code),
            (Error::Lost(_), Self::Peer(Peer { name, .. })) => format!(
                "cannot find {name}. Check that `haul send --to NAME` runs there, with its name for this machine. Between \
                 networks, both ends need the same relay (HAUL_RELAY). If one end has paired again, pair both again"
            ),
            _ => return error.into(),
        };
        anyhow::Error::from(error).context(advice)
    }
}

/// Says why no sender was found for a code, and what the user can do.
fn advice_for_code(why: &PeerText, code: &ShortCode) -> String {
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

async fn resolve(at: &str) -> anyhow::Result<Vec<SocketAddr>> {
    let found = tokio::net::lookup_host(at)
        .await
        .map_err(|error| Error::Resolve {
            host: at.into(),
            why: format!("{error}; write it as HOST:PORT").into(),
        })?;
    Ok(found.collect())
}
