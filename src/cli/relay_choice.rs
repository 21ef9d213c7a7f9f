//! Chooses the relay: from an option, HAUL_RELAY, or config.toml in HAUL_HOME, in this order.

use clap::Args;
use haul::pairing::rendezvous::RelayAt;
use haul::{Error, Home, printable};

/// Options that choose a relay.
#[derive(Args, Default)]
pub(crate) struct RelayChoice {
    /// Relay between networks (or HAUL_RELAY)
    #[arg(long, value_name = "HOST[:PORT]")]
    relay: Option<String>,
    /// Use no relay
    #[arg(long, hide = true, conflicts_with = "relay")]
    no_relay: bool,
}

/// The settings of config.toml.
#[derive(Default)]
struct Settings {
    relay: Option<String>,
    relay_pin: Option<String>,
    relay_token: Option<String>,
}

/// The names of all settings.
const KEYS: [&str; 3] = ["relay", "relay_pin", "relay_token"];

impl RelayChoice {
    /// Whether `--no-relay` was given. It overrides the settings and a ticket.
    pub(crate) fn is_disabled(&self) -> bool {
        self.no_relay
    }

    /// Returns the relay, or `None` if none is set.
    ///
    /// # Errors
    /// [`Error::Usage`] when a setting is invalid, or config.toml cannot be read.
    pub(crate) fn relay(&self, home: &Home) -> Result<Option<RelayAt>, Error> {
        if self.no_relay {
            return Ok(None);
        }
        let settings = Settings::read(home)?;
        let configured: Option<RelayAt> = settings.relay.map(|at| at.parse()).transpose()?;
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let named = self
            .relay
            .clone()
            .or_else(|| variable("HAUL_RELAY"))
            .map(|at| at.parse())
            .transpose()?;
        let Some(mut relay) = named.or_else(|| configured.clone()) else {
            return Ok(None);
        };
        // The pin and the token of the file belong to its relay. No other relay may learn the token.
        let its_own = configured.as_ref() == Some(&relay);
        let pin = settings.relay_pin.filter(|_| its_own);
        let token = settings.relay_token.filter(|_| its_own);
        relay.token = variable("HAUL_RELAY_TOKEN").or(token);
        relay.pin = pin.map(|pin| pin.parse()).transpose().map_err(|bad| {
            Error::Usage(format!("cannot use relay_pin in {}: {bad}", file(home)))
        })?;
        Ok(Some(relay))
    }
}

fn file(home: &Home) -> String {
    printable(home.config().as_os_str().as_encoded_bytes())
}

impl Settings {
    /// Reads the settings. A file that does not exist has none.
    fn read(home: &Home) -> Result<Self, Error> {
        let path = home.config();
        let wrong = |why: String| Error::Usage(format!("cannot use {}: {why}", file(home)));
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(wrong(error.to_string())),
        };
        let table: toml::Table = text
            .parse()
            .map_err(|bad: toml::de::Error| wrong(bad.message().to_owned()))?;
        if let Some(unknown) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
            let unknown = printable(unknown.as_bytes());
            let known = KEYS.join(", ");
            return Err(wrong(format!(
                "unknown setting {unknown}; the settings are {known}"
            )));
        }
        let value = |key: &str| match table.get(key) {
            None => Ok(None),
            Some(toml::Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(wrong(format!("{key} must be a text in quotes"))),
        };
        let [relay, relay_pin, relay_token] = KEYS;
        Ok(Self {
            relay: value(relay)?,
            relay_pin: value(relay_pin)?,
            relay_token: value(relay_token)?,
        })
    }
}
