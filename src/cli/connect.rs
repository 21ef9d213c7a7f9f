//! To a server, and the question at a first contact.

use haul::client::Client;
use haul::config::Config;
use haul::error::Error;
use haul::identity::{Home, KeyId};
use haul::target::Target;
use haul::trust::{ServerTrust, known_hosts};

use super::output;

/// Connects as HAUL_HOME has it; at a first contact it asks on the terminal whether the server's key is the right one.
pub(super) async fn connect(target: &Target, pin: Option<KeyId>, config: &Config) -> anyhow::Result<Client> {
    let home = Home::from_env()?;
    let identity = home.identity()?;
    let trust = ServerTrust::of_home(&home, pin)?;
    let (host, key_id) = match Client::connect(&identity, &trust, &target.host, target.port, config).await {
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
    let parsed: KeyId = key_id.parse().map_err(|_| Error::UnknownHost { host: host.clone(), key_id })?;
    known_hosts::add(&home.known_hosts(), &host, &parsed)?;
    // Connected with the very key that was shown, whoever answers now.
    let pinned = ServerTrust { pin: Some(parsed), ..ServerTrust::default() };
    Ok(Client::connect(&identity, &pinned, &target.host, target.port, config).await?)
}
