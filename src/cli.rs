//! The command line. This file lists the commands and runs one; each command is in a file of its own, with its options.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use haul::Error;

mod addresses;
mod bench;
mod connect;
mod cp;
mod demo;
mod exit;
mod filter;
mod id;
mod invitation;
mod ls;
mod options;
mod output;
mod pair;
mod peers;
mod prompt;
mod receive;
mod relay;
mod relay_choice;
mod send;
mod sender_lookup;
mod serve;
mod signals;
mod sync;

const EXAMPLES: &str = "\
Try it: haul demo. By a code: haul send photos/ here, and haul receive there.
Exit: 0 done; 1 some failed; 2 usage; 3 no connection; 4 no trust; 24 vanished.";

/// Moves files between machines over QUIC: verified, atomic, many at a time.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES, max_term_width = 80, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Serve(serve::Serve),
    Send(send::Send),
    Receive(receive::Receive),
    Pair(pair::Pair),
    Peers(peers::Peers),
    Relay(relay::RelayCommand),
    Cp(cp::Cp),
    Ls(ls::Ls),
    Sync(sync::Sync),
    Bench(bench::Bench),
    Id(id::Id),
    Demo(demo::Demo),
}

impl Cli {
    /// Returns the log filter for when HAUL_LOG is not set. Servers and relays log connections and sessions, because their
    /// operators read the log. Other commands log nothing.
    pub(crate) fn default_log(&self) -> &'static str {
        match self.command {
            Command::Serve(_) | Command::Relay(_) => "haul=info",
            _ => "off",
        }
    }

    /// Runs the command.
    pub(crate) async fn run(self) -> ExitCode {
        let ended = match self.command {
            Command::Serve(serve) => serve::run(serve).await,
            Command::Send(send) => send::run(send).await,
            Command::Receive(receive) => receive::run(receive).await,
            Command::Pair(pair) => pair::run(pair).await,
            Command::Peers(peers) => peers::run(&peers),
            Command::Relay(relay) => relay::run(relay).await,
            Command::Cp(cp) => cp::run(cp).await,
            Command::Ls(ls) => ls::run(ls).await,
            Command::Sync(sync) => sync::run(sync).await,
            Command::Bench(bench) => bench::run(bench).await,
            Command::Id(_) => id::run(),
            Command::Demo(demo) => demo::run(demo).await,
        };
        ExitCode::from(ended.unwrap_or_else(|error| {
            output::failure(&error);
            exit::code_of_error(&error)
        }))
    }
}

/// Reports that the system could not start threads, and returns the exit code.
pub(crate) fn failed_to_start_threads(error: std::io::Error) -> ExitCode {
    output::failure(&Error::io("cannot start threads")(error).into());
    ExitCode::from(exit::FAILED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn clap_accepts_the_definitions_of_all_commands() {
        Cli::command().debug_assert();
    }
}
