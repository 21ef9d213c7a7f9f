//! To a server, and the question at a first contact.

use haul::pairing::pair;
use haul::{
    Client, Config, Error, Home, Host, Identity, KeyId, Petname, ServerTrust, Target, known_hosts,
    peers,
};

use super::output;
use super::settings::{Relayed, own_addresses};

/// Connects as HAUL_HOME has it; at a first contact it asks on the terminal whether the server's key is the right one.
pub(super) async fn connect(
    target: &Target,
    pin: Option<KeyId>,
    config: &Config,
) -> anyhow::Result<Client> {
    let home = Home::from_env()?;
    let identity = home.identity()?;
    let (name, port) = match &target.host {
        Host::Address { name, port } => (name, *port),
        Host::Peer(name) => return to_peer(name, target, pin, (&home, &identity), config).await,
    };
    let trust = ServerTrust::of_home(&home, pin)?;
    let (host, key_id) = match Client::connect(&identity, &trust, name, port, config).await {
        Err(Error::UnknownHost { host, key_id }) => (host, key_id),
        connected => return Ok(connected?),
    };
    let question = format!(
        "This is the first contact with {host}. Its key id is\n  {key_id}\nIt is the right server if `haul id` there says the \
         same.\nTrust it from now on? [y/N]"
    );
    match output::ask(&question).as_deref() {
        Some("y" | "Y" | "yes") => {}
        Some(_) => return Err(Error::UnknownHost { host, key_id }.into()),
        None => {
            let file = output::shown(&home.known_hosts());
            return Err(anyhow::Error::from(Error::UnknownHost { host: host.clone(), key_id: key_id.clone() }).context(
                format!(
                    "the key of {host} is not known, and there is no terminal to ask on. If `haul id` on the server says \
                     {key_id}, add --pin {key_id}, or the line `{host} {key_id}` to {file}"
                ),
            ));
        }
    }
    let parsed: KeyId = key_id.parse().map_err(|_| Error::UnknownHost {
        host: host.clone(),
        key_id,
    })?;
    known_hosts::add(&home.known_hosts(), &host, &parsed)?;
    // Connected with the very key that was shown, whoever answers now.
    let pinned = ServerTrust {
        pin: Some(parsed),
        ..ServerTrust::default()
    };
    Ok(Client::connect(&identity, &pinned, name, port, config).await?)
}

/// To the server of a machine that this one was paired with.
async fn to_peer(
    name: &Petname,
    target: &Target,
    pin: Option<KeyId>,
    (home, identity): (&Home, &Identity),
    config: &Config,
) -> anyhow::Result<Client> {
    let shown = target.to_string();
    let peer = peers::named(home, name).map_err(|error| match error {
        // It may have been meant for scp.
        Error::Usage(why) => {
            let path = shown.split_once(':').map_or("", |(_, path)| path);
            Error::Usage(format!(
                "{shown}: {why}. A haul server is written haul://{name}/{path}, a local file with a colon ./{shown}; \
                 copies over an ssh login come with a later version"
            ))
        }
        other => other,
    })?;
    if pin.is_some_and(|pin| pin != peer.key_id) {
        return Err(Error::Usage(format!(
            "{name} was paired with the key {}; leave out --pin",
            peer.key_id
        ))
        .into());
    }
    let relay = Relayed::default().relay(home)?;
    let relayed = relay.is_some();
    pair::connect(&peer, relay, own_addresses(), identity, config).await.map_err(|error| match error {
        Error::Lost(_) => {
            let elsewhere = if relayed { ", nor did the relay know of it" } else { "" };
            let how = format!(
                "{name} was not found on this network{elsewhere}. Does `haul serve` run there? Between networks both ends need \
                 the same relay (HAUL_RELAY)"
            );
            anyhow::Error::from(error).context(how)
        }
        other => other.into(),
    })
}
