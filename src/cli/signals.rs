//! The signals that stop a server or a relay.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Tokens that are cancelled by the first and the second Ctrl-C or SIGTERM.
pub(crate) struct StopSignals {
    pub(crate) first: CancellationToken,
    pub(crate) second: CancellationToken,
}

/// Handles Ctrl-C and SIGTERM from now on.
///
/// # Errors
/// When a signal handler cannot be installed.
pub(crate) fn handle_stop_signals() -> anyhow::Result<StopSignals> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let first = CancellationToken::new();
    let second = CancellationToken::new();
    let tokens = [first.clone(), second.clone()];
    tokio::spawn(async move {
        for token in tokens {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            token.cancel();
        }
    });
    Ok(StopSignals { first, second })
}
