//! The command line: commands, options and exit codes.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use haul::{Code, Congestion, DEFAULT_PORT, Delete, Error, Existing, KeyId, Outcome, Rate};

mod bench;
mod connect;
mod cp;
mod demo;
mod filter;
mod id;
mod ls;
mod output;
mod pair;
mod peers;
mod prompt;
mod receive;
mod relay;
mod send;
mod serve;
mod settings;

/// Everything was done.
const DONE: u8 = 0;
/// Some files failed; each was reported with its reason.
const FAILED: u8 = 1;
/// The command line is invalid, or a file of HAUL_HOME cannot be used.
const USAGE: u8 = 2;
/// No connection could be made, or it was lost and not made again in time.
const NO_CONNECTION: u8 = 3;
/// The server is not trusted, or it does not admit this machine's key.
const NOT_TRUSTED: u8 = 4;
/// Everything was done except for sources that vanished before their turn. rsync uses the same number.
const VANISHED: u8 = 24;
/// Ctrl-C ended the command: 128 plus the number of SIGINT, as in shells.
const INTERRUPTED: u8 = 130;

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
    Serve(Serve),
    Send(send::Send),
    Receive(receive::Receive),
    Pair(pair::Pair),
    Peers(peers::Peers),
    Relay(relay::RelayCommand),
    Cp(Cp),
    Ls(Ls),
    Sync(Sync),
    Bench(Bench),
    Id(Id),
    Demo(Demo),
}

/// Serve a directory for uploads and downloads, many at once.
#[derive(Args)]
#[command(after_help = "\
Example: haul serve ~/inbox
HAUL_HOME/authorized_keys lists the admitted keys, one a line. A refused client
shows the line that would admit it. --anyone admits every key.
The first Ctrl-C waits for running transfers (30 s at most); a second stops now.
Also: --keep-partials 7d, --no-dedupe, --congestion NAME, --qlog DIR (a trace).")]
struct Serve {
    /// The directory to serve
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Address and UDP port; may be given several times
    #[arg(long, value_name = "ADDR", value_parser = listen_address, default_value = "[::]:4433")]
    listen: Vec<SocketAddr>,
    /// Most transfers that write at once
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_transfers: u32,
    /// Admit every key to read, to write or both
    #[arg(long, value_name = "WHAT", hide_possible_values = true)]
    anyone: Option<AnyoneMay>,
    /// Send at most RATE a second: 20M bits, 2.5MB bytes
    #[arg(long, value_name = "RATE", allow_hyphen_values = true)]
    limit: Option<Rate>,
    /// Set owners and set-user-ID for clients; as root
    #[arg(long)]
    allow_owner: bool,
    #[arg(long, hide = true)]
    no_dedupe: bool,
    #[arg(long, hide = true, value_name = "TIME", value_parser = time, default_value = "7d")]
    keep_partials: Duration,
    /// Let keys that may write also remove (haul sync)
    #[arg(long)]
    allow_delete: bool,
    #[command(flatten)]
    relayed: settings::Relayed,
    #[command(flatten)]
    expert: Expert,
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
enum AnyoneMay {
    Read,
    Write,
    Both,
}

/// Copy files and directories to or from a server.
#[derive(Args)]
#[command(after_help = "\
Examples: haul cp photos haul://server/2026    -> 2026/... there
          haul cp haul://server/2026 photos/   -> photos/2026/... here
Unchanged files (same size and time) are skipped; the same command resumes what
was interrupted. Write a local a:b as ./a:b. Also: -c (compare content),
--existing HOW, --no-fsync, --follow, --xattrs, --owner, --exclude, --include,
--files-from, --gitignore, --allow-growing, --specials: see README.md.")]
struct Cp {
    /// Files and directories; - is standard input
    #[arg(value_name = "SRC", required = true)]
    sources: Vec<OsString>,
    /// Destination: haul://HOST/PATH, NAME:PATH, local, or - (stdout)
    #[arg(value_name = "DST", required = true)]
    destination: OsString,
    #[command(flatten)]
    how: How,
}

/// Options of commands that copy.
#[derive(Args)]
struct How {
    /// The key id that the server must have
    #[arg(long, value_name = "SHA256:...")]
    pin: Option<KeyId>,
    /// Transfers open at the same time
    #[arg(long, hide = true, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1000))]
    parallel: u32,
    /// Keep trying when the connection is lost
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "10m")]
    retry_for: Duration,
    #[arg(long, hide = true)]
    no_fsync: bool,
    /// Send at most RATE: 20M is bits a second, 2.5MB bytes
    #[arg(long, value_name = "RATE", allow_hyphen_values = true)]
    limit: Option<Rate>,
    #[arg(long, hide = true)]
    xattrs: bool,
    #[arg(long, hide = true)]
    owner: bool,
    #[arg(long, hide = true)]
    numeric_ids: bool,
    #[command(flatten)]
    taking: Taking,
    #[command(flatten)]
    unruly: Unruly,
    #[command(flatten)]
    filter: filter::FilterArgs,
    #[arg(long, hide = true)]
    no_dedupe: bool,
    #[arg(short = 'L', long, visible_alias = "copy-links", hide = true)]
    follow: bool,
    #[command(flatten)]
    expert: Expert,
    #[command(flatten)]
    output: Output,
    // Options that users of scp, cp and rsync type by habit. haul does the same without them.
    #[arg(short = 'r', visible_short_alias = 'R', long, hide = true)]
    recursive: bool,
    #[arg(short = 'a', long, hide = true)]
    archive: bool,
    #[arg(short = 'p', hide = true)]
    preserve: bool,
    #[arg(short = 'P', hide = true, value_name = "PORT")]
    port: Option<OsString>,
    // The rate limits of scp and rsync have other units. They are refused with the same rate in haul's units.
    #[arg(short = 'l', hide = true, value_name = "KBIT")]
    scp_limit: Option<OsString>,
    #[arg(long, hide = true, value_name = "RATE")]
    bwlimit: Option<OsString>,
}

/// Options for entries that exist at the destination.
#[derive(Args, Clone, Copy, Default)]
struct Taking {
    /// Show what would be done; write nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    #[arg(short, long, hide = true)]
    checksum: bool,
    #[arg(long, hide = true, value_name = "HOW", default_value_t)]
    existing: Existing,
    #[arg(long, hide = true, value_name = "SECONDS")]
    modify_window: Option<u32>,
    #[arg(skip)]
    delete: Option<Delete>,
}

/// Options for sources that change or are not regular files.
#[derive(Args, Clone, Copy)]
struct Unruly {
    #[arg(long, hide = true)]
    allow_growing: bool,
    #[arg(long, hide = true, value_name = "HOW", default_value = "skip")]
    specials: Specials,
}

/// What to do with FIFOs, sockets and devices in directories.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
enum Specials {
    Skip,
    Fail,
}

/// Options that few users need. The last lines of a command's help name them.
#[derive(Args)]
struct Expert {
    #[arg(long, hide = true, value_name = "NAME", default_value_t)]
    congestion: Congestion,
    #[arg(long, hide = true, value_name = "DIR")]
    qlog: Option<PathBuf>,
}

#[derive(Args, Clone, Copy)]
#[group(multiple = false)]
struct Output {
    /// Print only failures
    #[arg(short, long)]
    quiet: bool,
    /// Name every file; end with statistics of the path
    #[arg(short, long)]
    verbose: bool,
    /// Print one JSON object a line on standard output
    #[arg(long)]
    json: bool,
    #[arg(skip)]
    dry_run: bool,
    /// The name of the other end in messages.
    #[arg(skip = "the server")]
    peer: &'static str,
}

/// Make a directory equal to another, and remove the rest.
#[derive(Args)]
#[command(after_help = "\
Examples: haul sync photos haul://server/photos
          haul sync --dry-run haul://server/photos photos
Entries that the source does not have are removed at the destination, after all
others have arrived. A server removes only if it runs with --allow-delete. An
empty source needs --max-delete. The options of haul cp work as well.")]
struct Sync {
    /// The directory to copy: local, haul://HOST/PATH or NAME:PATH
    #[arg(value_name = "SRC")]
    source: OsString,
    /// The directory to make equal
    #[arg(value_name = "DST")]
    destination: OsString,
    /// Remove nothing if more than N would be removed
    #[arg(long, value_name = "N")]
    max_delete: Option<u64>,
    #[command(flatten)]
    how: How,
}

impl Sync {
    fn into_cp(self) -> Cp {
        let mut cp = Cp {
            sources: vec![self.source],
            destination: self.destination,
            how: self.how,
        };
        cp.how.taking.delete = Some(Delete {
            most: self.max_delete,
        });
        cp
    }
}

/// List files on a server.
#[derive(Args)]
#[command(after_help = "\
Examples: haul ls haul://server/               the served directory
          haul ls -lR haul://server/photos     all below, with sizes and times
          haul ls 'haul://server/logs/*.gz'    matches, expanded on the server
Hidden names are listed too; directories end in /. Characters that could control
the terminal are escaped; --json has the bytes. Times are UTC. Entries that
cannot be read are reported on standard error, and the exit code is 1.")]
struct Ls {
    /// haul://HOST[:PORT]/[PATH], or NAME:[PATH]
    #[arg(value_name = "PLACE")]
    place: OsString,
    /// Print mode, size, time and the targets of links
    #[arg(short, long)]
    long: bool,
    /// List everything below, too
    #[arg(short = 'R', short_alias = 'r', long)]
    recursive: bool,
    /// The key id that the server must have
    #[arg(long, value_name = "SHA256:...")]
    pin: Option<KeyId>,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    expert: Expert,
    // An option that users of ls type by habit. haul lists hidden names without it.
    #[arg(short = 'a', short_alias = 'A', hide = true)]
    all: bool,
}

/// Measure the path to a server, without touching disks.
#[derive(Args)]
#[command(after_help = "\
Example: haul bench haul://server
It loads the path with dummy bytes, first up, then down. The idle RTT is that of
small messages; the RTT under load and the loss are the sender's estimates.
Other users of the same path will notice the load.")]
struct Bench {
    /// The server: haul://HOST[:PORT], or NAME:
    #[arg(value_name = "SERVER")]
    server: OsString,
    /// How long to load each direction; 5, or more if round trips are long
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=60))]
    time: Option<u64>,
    /// Measure only the direction to the server
    #[arg(long, conflicts_with = "down")]
    up: bool,
    /// Measure only the direction back
    #[arg(long)]
    down: bool,
    /// The key id that the server must have
    #[arg(long, value_name = "SHA256:...")]
    pin: Option<KeyId>,
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    expert: Expert,
}

/// Print this machine's key id; the first use makes the key.
#[derive(Args)]
#[command(after_help = "\
Example: haul id | ssh server 'cat >> ~/.config/haul/authorized_keys'")]
struct Id {}

/// Try haul: a server and a client in one, on this machine.
#[derive(Args)]
#[command(after_help = "\
Example: haul demo ~/photos
Sends PATH to a server on a loopback port, into a new directory, compares every
file byte by byte, and prints the speed. It changes no settings, and nothing
keeps running.")]
struct Demo {
    /// What to send; by default a small tree is made
    path: Option<PathBuf>,
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
            Command::Sync(sync) => cp::run(sync.into_cp()).await,
            Command::Bench(bench) => bench::run(bench).await,
            Command::Id(_) => id::run(),
            Command::Demo(demo) => demo::run(demo).await,
        };
        ExitCode::from(ended.unwrap_or_else(|error| {
            output::failure(&error);
            exit_code(&error)
        }))
    }
}

/// Returns the exit code of a session that ran to its end.
fn exit_code_of(outcome: &Outcome) -> u8 {
    let Outcome { sent, summary, .. } = outcome;
    let failed = sent.failed > 0 || sent.interrupted.is_some() || summary.unremoved.is_some();
    match sent.vanished {
        _ if failed => FAILED,
        0 => DONE,
        _ => VANISHED,
    }
}

/// Reports that the system could not start threads, and returns the exit code.
pub(crate) fn failed_to_begin(error: std::io::Error) -> ExitCode {
    output::failure(&Error::io("cannot start threads")(error).into());
    ExitCode::from(FAILED)
}

/// Returns the exit code of an error.
fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<Error>() {
        Some(Error::Usage(_) | Error::Home { .. } | Error::Internal(_) | Error::NoRandomness) => {
            USAGE
        }
        Some(
            Error::Resolve { .. } | Error::Unreachable { .. } | Error::Lost(_) | Error::Stopping,
        ) => NO_CONNECTION,
        Some(
            Error::UnknownHost { .. }
            | Error::ChangedHost { .. }
            | Error::WrongPin { .. }
            | Error::NotTrusted { .. }
            | Error::NotAdmitted(_),
        ) => NOT_TRUSTED,
        Some(Error::Refused(why)) if matches!(why.code, Code::NotAllowed | Code::NotAdmitted) => {
            NOT_TRUSTED
        }
        Some(Error::Refused(why)) if why.code == Code::Busy => NO_CONNECTION,
        _ => FAILED,
    }
}

/// Parses `30s`, `10m`, `2h`, `7d`, or a number of seconds.
fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(
        text.find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len()),
    );
    let unit = match unit {
        "" | "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        "d" => Some(24 * 3600),
        _ => None,
    };
    let seconds = unit.and_then(|unit| number.parse::<u64>().ok()?.checked_mul(unit));
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| "write a time as 30s, 10m, 2h or 7d".into())
}

/// Parses `ADDR:PORT`, `ADDR`, `:PORT` or `PORT`.
fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let bare = text
        .strip_prefix('[')
        .and_then(|t| t.strip_suffix(']'))
        .unwrap_or(text);
    if let Ok(address) = text.parse() {
        Ok(address)
    } else if let Ok(ip) = bare.parse() {
        Ok(SocketAddr::new(ip, DEFAULT_PORT))
    } else if let Ok(port) = text.strip_prefix(':').unwrap_or(text).parse() {
        Ok(SocketAddr::new(any, port))
    } else {
        Err("write an address as 192.0.2.1:4433, [::]:4433 or 4433".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn clap_accepts_the_definitions_of_all_commands() {
        Cli::command().debug_assert();
    }

    #[test]
    fn errors_have_the_exit_codes_that_the_help_lists() {
        let code = |error: Error| exit_code(&anyhow::Error::from(error));
        assert_eq!(code(Error::Usage(String::new())), USAGE);
        assert_eq!(code(Error::Internal("continue")), USAGE);
        assert_eq!(code(Error::Lost("".into())), NO_CONNECTION);
        assert_eq!(
            code(Error::Resolve {
                host: "h".into(),
                why: "".into()
            }),
            NO_CONNECTION
        );
        assert_eq!(
            code(Error::NotAdmitted(Code::NotAdmitted.into())),
            NOT_TRUSTED
        );
        assert_eq!(code(Error::Refused(Code::NotAllowed.into())), NOT_TRUSTED);
        assert_eq!(code(Error::Refused(Code::NoSpace.into())), FAILED);
        assert_eq!(exit_code(&anyhow::anyhow!("other")), FAILED);
    }

    #[test]
    fn times_are_numbers_with_an_optional_unit() {
        for (text, seconds) in [
            ("30s", 30),
            ("10m", 600),
            ("2h", 7200),
            ("7d", 604_800),
            ("45", 45),
            ("0", 0),
        ] {
            assert_eq!(time(text), Ok(Duration::from_secs(seconds)));
        }
        for text in [
            "",
            "s",
            "-1",
            "1.5h",
            "10 m",
            "5w",
            "99999999999999999999",
            "18446744073709551615h",
        ] {
            assert!(time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn listen_takes_an_address_a_port_or_both() {
        for (text, address) in [
            ("[::]:4433", "[::]:4433"),
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("127.0.0.1", "127.0.0.1:4433"),
            ("[::1]", "[::1]:4433"),
            ("::1", "[::1]:4433"),
            ("5000", "[::]:5000"),
            (":5000", "[::]:5000"),
        ] {
            assert_eq!(listen_address(text).unwrap().to_string(), address);
        }
        assert!(listen_address("host:1").is_err());
    }
}
