//! The `haul` command.

mod cli;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tracing_subscriber::EnvFilter;

/// How long the program waits at its end for blocking work, such as disk writes. The limit exists because a write to a
/// pipe without a reader never ends.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let filter =
        EnvFilter::try_from_env("HAUL_LOG").unwrap_or_else(|_| EnvFilter::new(cli.default_log()));
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    log.with_ansi(colours).with_target(false).init();
    haul::internal::storage::open_files::raise_open_files();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return cli::failed_to_start_threads(error),
    };
    let code = runtime.block_on(cli.run());
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    code
}
