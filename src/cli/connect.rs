//! Connects to a server, and asks the user to confirm its key at first contact.

use haul::pairing::pair;
use haul::{
    Client, Config, Error, Home, Host, Identity, KeyId, Petname, ServerTrust, Target, known_hosts,
    peers,
};

use super::addresses::own_addresses;
use super::output;
use super::relay_choice::RelayChoice;

/// Connects with the identity and the known hosts of HAUL_HOME. At first contact it asks on the terminal whether the
/// server's key is the right one.
pub(crate) async fn connect(
    target: &Target,
    pin: Option<KeyId>,
    config: &Config,
) -> anyhow::Result<Client> {
    let home = Home::from_env()?;
    let identity = home.identity()?;
    let (name, port) = match &target.host {
        Host::Address { name, port } => (name, *port),
        Host::Peer(name) => {
            return connect_to_peer(name, target, pin, &home, &identity, config).await;
        }
    };
    let trust = ServerTrust::of_home(&home, pin)?;
    let (host, key_id) = match Client::connect(&identity, &trust, name, port, config).await {
        Err(Error::UnknownHost { host, key_id }) => (host, key_id),
        connected => return Ok(connected?),
    };
    confirm_key(&host, &key_id, &home)?;
    let confirmed: KeyId = key_id.parse().map_err(|_| Error::UnknownHost {
        host: host.clone(),
        key_id,
    })?;
    known_hosts::add(&home.known_hosts(), &host, &confirmed)?;
    // The new connection must have the key that the user confirmed, because another host may answer now.
    let pinned = ServerTrust {
        pin: Some(confirmed),
        ..ServerTrust::default()
    };
    Ok(Client::connect(&identity, &pinned, name, port, config).await?)
}

/// Asks whether an unknown server has the right key.
///
/// # Errors
/// [`Error::UnknownHost`] if the user does not trust the key, and with advice if there is no terminal.
fn confirm_key(host: &str, key_id: &str, home: &Home) -> anyhow::Result<()> {
    let question = format!(
        "This is the first contact with {host}. Its key id is\n  {key_id}\nIt is the right server if `haul id` prints the same \
         there.\nTrust it from now on? [y/N]"
    );
    let unknown = Error::UnknownHost {
        host: host.into(),
        key_id: key_id.into(),
    };
    match output::ask(&question).as_deref() {
        Some("y" | "Y" | "yes") => Ok(()),
        Some(_) => Err(unknown.into()),
        None => {
            let file = output::printable_path(&home.known_hosts());
            Err(anyhow::Error::from(unknown).context(format!(
                "cannot trust {host}: its key is not known, and there is no terminal to ask on. If `haul id` on the \
                 server prints {key_id}, add --pin {key_id}, or add the line `{host} {key_id}` to {file}"
            )))
        }
    }
}

/// Connects to the server of a paired machine.
async fn connect_to_peer(
    name: &Petname,
    target: &Target,
    pin: Option<KeyId>,
    home: &Home,
    identity: &Identity,
    config: &Config,
) -> anyhow::Result<Client> {
    let shown = target.to_string();
    let peer = peers::named(home, name).map_err(|error| match error {
        // The user may have meant a host for scp, or a local file.
        Error::Usage(why) => {
            let path = shown.split_once(':').map_or("", |(_, path)| path);
            Error::Usage(format!(
                "{shown}: {why}. Write a haul server as haul://{name}/{path}, and a local file as ./{shown}; haul cannot \
                 copy over an ssh login yet"
            ))
        }
        other => other,
    })?;
    if pin.is_some_and(|pin| pin != peer.key_id) {
        return Err(Error::Usage(format!(
            "cannot use --pin for {name}: it is paired with the key {}; leave out --pin",
            peer.key_id
        ))
        .into());
    }
    let relay = RelayChoice::default().relay(home)?;
    let relayed = relay.is_some();
    let connected = pair::connect(&peer, relay, own_addresses(), identity, config).await;
    connected.map_err(|error| match error {
        Error::Lost(_) => {
            let elsewhere = if relayed { ", nor at the relay" } else { "" };
            let how = format!(
                "cannot find {name} on this network{elsewhere}. Check that `haul serve` runs there; between networks, both \
                 ends need the same relay (HAUL_RELAY)"
            );
            anyhow::Error::from(error).context(how)
        }
        other => other.into(),
    })
}
