//! `haul peers`.

use clap::Args;
use haul::peers;
use haul::peers::Peer;
use haul::{Error, Home, Petname};
use serde_json::json;

use super::exit::DONE;
use super::output;

/// List or remove paired machines.
#[derive(Args)]
#[command(after_help = "\
Example: haul peers --remove bob
A removed machine is no longer admitted here; its open connections stay. The
other machine still knows and finds this one: remove it there too.")]
pub(crate) struct Peers {
    /// Remove this machine; may be given several times
    #[arg(long, value_name = "NAME")]
    remove: Vec<Petname>,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: &Peers) -> anyhow::Result<u8> {
    let home = Home::from_env()?;
    for name in &command.remove {
        if !peers::remove(&home, name)? {
            return Err(Error::Usage(format!(
                "cannot remove {name}: no paired machine has this name; haul peers lists them"
            ))
            .into());
        }
        output::note(&format!("Removed {name}."));
    }
    if !command.remove.is_empty() {
        return Ok(DONE);
    }
    let all = peers::all(&home.peers())?;
    if all.is_empty() && !command.json {
        output::note("No machine is paired yet. To pair one: haul pair NAME");
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
