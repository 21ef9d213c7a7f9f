//! `haul peers`.

use clap::Args;
use haul::peers;
use haul::peers::Peer;
use haul::{Error, Home, Petname};
use serde_json::json;

use super::{DONE, output};

/// List the machines that were paired, or remove some.
#[derive(Args)]
#[command(after_help = "\
Example: haul peers --remove bob
Whoever is removed is not admitted here from then on; connections that it has
stay. The other machine still knows and finds this one: remove it there too.")]
pub(super) struct Peers {
    /// Forget this machine; may be given several times
    #[arg(long, value_name = "NAME")]
    remove: Vec<Petname>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

pub(super) fn run(command: &Peers) -> anyhow::Result<u8> {
    let home = Home::from_env()?;
    for name in &command.remove {
        if !peers::remove(&home, name)? {
            return Err(Error::Usage(format!(
                "no machine is known here as {name}; haul peers lists them"
            ))
            .into());
        }
        output::note(&format!("{name} is forgotten here."));
    }
    if !command.remove.is_empty() {
        return Ok(DONE);
    }
    let all = peers::all(&home.peers())?;
    if all.is_empty() && !command.json {
        output::note("No machine was paired yet: haul pair NAME");
    }
    for Peer { name, key_id, .. } in &all {
        if command.json {
            output::json_line(
                &json!({"type": "peer", "name": name.as_str(), "key_id": key_id.to_string()}),
            );
        } else {
            output::line(&format!("{name}  {key_id}"));
        }
    }
    Ok(DONE)
}
