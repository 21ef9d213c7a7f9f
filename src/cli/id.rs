//! `haul id`.

use clap::Args;
use haul::Home;

use super::{exit, output};

/// Print this machine's key id; the first use makes the key.
#[derive(Args)]
#[command(after_help = "\
Example: haul id | ssh server 'cat >> ~/.config/haul/authorized_keys'")]
pub(crate) struct Id {}

pub(crate) fn run() -> anyhow::Result<u8> {
    let identity = Home::from_env()?.identity()?;
    output::line(&identity.key_id().to_string());
    Ok(exit::DONE)
}
