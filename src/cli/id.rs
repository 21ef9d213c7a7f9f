//! `haul id`.

use haul::Home;

use super::exit::DONE;
use super::output;

pub(super) fn run() -> anyhow::Result<u8> {
    let identity = Home::from_env()?.identity()?;
    output::line(&identity.key_id().to_string());
    Ok(DONE)
}
