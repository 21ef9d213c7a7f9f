//! `haul cp`.

use std::path::PathBuf;

use haul::client::{Client, PushOptions};
use haul::config::Config;
use haul::error::Error;
use haul::identity::{Home, Identity, KeyId};
use haul::target::{Argument, Target};
use haul::trust::{ServerTrust, known_hosts};
use haul::wire::Durability;

use super::output::{self, Screen};
use super::{Cp, DONE, FAILED, INTERRUPTED};

pub(super) async fn run(cp: Cp) -> anyhow::Result<u8> {
    let (client, options) = begin(&cp).await.inspect_err(|error| output::never_began(cp.output, error))?;
    let screen = Screen::new(cp.output);
    let pushed = tokio::select! {
        pushed = client.push(&options, screen.observer()) => pushed,
        _ = tokio::signal::ctrl_c() => {
            screen.end(&Err(Error::Lost("interrupted".into())));
            client.close().await;
            output::note("haul: interrupted; what is committed stays. Run the same command again to go on.");
            return Ok(INTERRUPTED);
        }
    };
    screen.end(&pushed);
    client.close().await;
    match pushed {
        Ok(outcome) if outcome.sent.failed == 0 && outcome.sent.interrupted.is_none() => Ok(DONE),
        Ok(_) => Ok(FAILED),
        Err(error @ Error::Lost(_)) => {
            let how = format!("{error}. What is committed stays; run the same command again to go on");
            Err(anyhow::Error::from(error).context(how))
        }
        Err(error) => Err(error.into()),
    }
}

/// All that comes before the session.
async fn begin(cp: &Cp) -> anyhow::Result<(Client, PushOptions)> {
    if cp.port.is_some() {
        return Err(usage("the port goes into the destination, as in haul://host:4433/"));
    }
    let (sources, target) = split(cp)?;
    let home = Home::from_env()?;
    let identity = home.identity()?;
    let trust = ServerTrust::of_home(&home, cp.pin)?;
    let config = Config { parallel: cp.parallel as usize, congestion: cp.congestion, ..Config::default() };
    let client = connect(&identity, &trust, &home, &target, &config).await?;
    let options = PushOptions {
        sources,
        destination: target.path,
        into: target.into,
        durability: if cp.no_fsync { Durability::Visible } else { Durability::Synced },
    };
    Ok((client, options))
}

/// Tells sources from the destination.
fn split(cp: &Cp) -> anyhow::Result<(Vec<PathBuf>, Target)> {
    let sources = cp.sources.iter().map(|source| Argument::parse(source)).collect::<Result<Vec<_>, _>>()?;
    let local = |argument: &Argument| match argument {
        Argument::Local(path) => Some(path.clone()),
        Argument::Remote(_) => None,
    };
    let from_here: Option<Vec<_>> = sources.iter().map(local).collect();
    match (from_here, Argument::parse(&cp.destination)?) {
        (Some(paths), Argument::Remote(target)) => Ok((paths, target)),
        (None, Argument::Remote(_)) => {
            Err(usage("from server to server haul does not copy; run it on one of the two, with a local name"))
        }
        (None, Argument::Local(_)) => {
            Err(usage("copying from a server comes with a later version; today the destination is haul://HOST/PATH"))
        }
        (Some(_), Argument::Local(path)) => {
            let path = output::shown(&path);
            let example = path.trim_start_matches(['.', '/']);
            Err(usage(&format!("{path} is no server; the destination comes last, as in haul://host/{example}")))
        }
    }
}

/// Connects; at a first contact it asks on the terminal whether the server's key is the right one.
async fn connect(
    identity: &Identity,
    trust: &ServerTrust,
    home: &Home,
    target: &Target,
    config: &Config,
) -> anyhow::Result<Client> {
    let (host, key_id) = match Client::connect(identity, trust, &target.host, target.port, config).await {
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
    Ok(Client::connect(identity, &pinned, &target.host, target.port, config).await?)
}

fn usage(why: &str) -> anyhow::Error {
    Error::Usage(why.into()).into()
}
