//! Random numbers from the operating system.

use crate::error::{Error, Result};

/// Draws unpredictable bytes.
///
/// # Errors
/// [`Error::NoRandomness`] when the system provides none.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Error::NoRandomness)?;
    Ok(bytes)
}
