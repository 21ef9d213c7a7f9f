//! The command line: what can be typed, and what the exit code says.

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

/// All done.
const DONE: u8 = 0;
/// Some files failed, each named with its reason.
const FAILED: u8 = 1;
/// The command cannot be understood, or something of this machine's cannot be used.
const USAGE: u8 = 2;
/// No connection, or it was lost for good.
const NO_CONNECTION: u8 = 3;
/// The server is not trusted, or does not admit this machine's key.
const NOT_TRUSTED: u8 = 4;
/// All done but for what vanished before its turn; the number is rsync's.
const VANISHED: u8 = 24;
/// Ended by Ctrl-C, as shells have it: 128 and SIGINT's number.
const INTERRUPTED: u8 = 130;

const EXAMPLES: &str = "\
Try it: haul demo. Hand over: haul send photos/ here, and haul receive there.
Exit: 0 done; 1 some failed; 2 usage; 3 no connection; 4 no trust; 24 some gone.";

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

/// Serve a directory: take uploads and give downloads, many at once.
#[derive(Args)]
#[command(after_help = "\
Example: haul serve ~/inbox
Who may connect: the key ids in HAUL_HOME/authorized_keys, one a line. A client
that is refused is told the line that would admit it. --anyone admits every key.
The first Ctrl-C lets transfers under way end (30 s at most); a second stops.
Also: --keep-partials 7d, --no-dedupe, --congestion NAME, --qlog DIR (a trace).")]
struct Serve {
    /// The directory to serve
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Address and UDP port; several times for several
    #[arg(long, value_name = "ADDR", value_parser = listen_address, default_value = "[::]:4433")]
    listen: Vec<SocketAddr>,
    /// Transfers that write at a time
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_transfers: u32,
    /// Admit every key to read, to write or both
    #[arg(long, value_name = "WHAT", hide_possible_values = true)]
    anyone: Option<AnyoneMay>,
    /// Send at most: 20M is bits a second, 2.5MB is bytes
    #[arg(long, value_name = "RATE", allow_hyphen_values = true)]
    limit: Option<Rate>,
    /// Set owners and set-user-ID as clients say; needs root
    #[arg(long)]
    allow_owner: bool,
    #[arg(long, hide = true)]
    no_dedupe: bool,
    #[arg(long, hide = true, value_name = "TIME", value_parser = time, default_value = "7d")]
    keep_partials: Duration,
    /// Let whoever may write remove, too (haul sync)
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

/// Copy files and directories to a server, or from one.
#[derive(Args)]
#[command(after_help = "\
Examples: haul cp photos haul://server/2026    -> 2026/... there
          haul cp haul://server/2026 photos/   -> photos/2026/... here
Unchanged files (same size and time) are skipped; the same command goes on with
what was interrupted. A local a:b is written ./a:b. Also: -c (compare content),
--existing HOW, --no-fsync, --follow, --xattrs, --owner, --exclude, --include,
--files-from, --gitignore, --allow-growing, --specials: README has them all.")]
struct Cp {
    /// Files and directories; - is standard input, as DST output
    #[arg(value_name = "SRC", required = true)]
    sources: Vec<OsString>,
    /// Where they go; the other side is haul://HOST/PATH or NAME:PATH
    #[arg(value_name = "DST", required = true)]
    destination: OsString,
    #[command(flatten)]
    how: How,
}

/// How to copy.
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
    /// Send at most: 20M is bits a second, 2.5MB is bytes
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
    // What hands that know scp, cp and rsync type; all of it is what happens anyway.
    #[arg(short = 'r', visible_short_alias = 'R', long, hide = true)]
    recursive: bool,
    #[arg(short = 'a', long, hide = true)]
    archive: bool,
    #[arg(short = 'p', hide = true)]
    preserve: bool,
    #[arg(short = 'P', hide = true, value_name = "PORT")]
    port: Option<OsString>,
    // Their limits have other units; each is told its own in haul's.
    #[arg(short = 'l', hide = true, value_name = "KBIT")]
    scp_limit: Option<OsString>,
    #[arg(long, hide = true, value_name = "RATE")]
    bwlimit: Option<OsString>,
}

/// What becomes of what is there already.
#[derive(Args, Clone, Copy, Default)]
struct Taking {
    /// Show what would be done, and write nothing
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

/// What becomes of sources that are not files at rest.
#[derive(Args, Clone, Copy)]
struct Unruly {
    #[arg(long, hide = true)]
    allow_growing: bool,
    #[arg(long, hide = true, value_name = "HOW", default_value = "skip")]
    specials: Specials,
}

/// What becomes of FIFOs, sockets and devices in directories.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
enum Specials {
    Skip,
    Fail,
}

/// What few need; the help of a command names it in its last lines.
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
    /// Only failures
    #[arg(short, long)]
    quiet: bool,
    /// Name every file; end with the path's figures
    #[arg(short, long)]
    verbose: bool,
    /// One JSON object a line on standard output
    #[arg(long)]
    json: bool,
    #[arg(skip)]
    dry_run: bool,
    /// What the other end is called.
    #[arg(skip = "the server")]
    peer: &'static str,
}

/// Make a directory the same as another, and remove the rest.
#[derive(Args)]
#[command(after_help = "\
Examples: haul sync photos haul://server/photos
          haul sync --dry-run haul://server/photos photos
What the source no longer has is removed at the destination, once all the rest
has arrived. A server lets nobody remove anything unless it runs with
--allow-delete. An empty source needs --max-delete. Also: what haul cp takes.")]
struct Sync {
    /// The directory to copy: here, haul://HOST/PATH or NAME:PATH
    #[arg(value_name = "SRC")]
    source: OsString,
    /// The directory that becomes the same
    #[arg(value_name = "DST")]
    destination: OsString,
    /// Remove nothing if there is more to remove than this
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

/// List what is on a server.
#[derive(Args)]
#[command(after_help = "\
Examples: haul ls haul://server/               what is in the served directory
          haul ls -lR haul://server/photos     all below, with sizes and times
          haul ls 'haul://server/logs/*.gz'    what matches, expanded there
Hidden names are listed too; directories end in /. Names are escaped where they
could steer the terminal; --json has their bytes. Times are UTC. What could not
be read is named on standard error, and the exit code is 1.")]
struct Ls {
    /// haul://HOST[:PORT]/[PATH], or NAME:[PATH]
    #[arg(value_name = "PLACE")]
    place: OsString,
    /// Mode, size, time and target of links too
    #[arg(short, long)]
    long: bool,
    /// All that is below, too
    #[arg(short = 'R', short_alias = 'r', long)]
    recursive: bool,
    /// The key id that the server must have
    #[arg(long, value_name = "SHA256:...")]
    pin: Option<KeyId>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    expert: Expert,
    // What hands that know ls type; it is what happens anyway.
    #[arg(short = 'a', short_alias = 'A', hide = true)]
    all: bool,
}

/// Measure the way to a server, without touching disks.
#[derive(Args)]
#[command(after_help = "\
Example: haul bench haul://server
It loads the way, first up, then down, with bytes that mean nothing. RTT idle is
that of small messages, RTT under load the sender's estimate, loss what it found
lost. Whoever uses the same way meanwhile will notice it.")]
struct Bench {
    /// The server: haul://HOST[:PORT], or NAME:
    #[arg(value_name = "SERVER")]
    server: OsString,
    /// Load each direction for so long; 5, or more where round trips are long
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=60))]
    time: Option<u64>,
    /// Only the way to the server
    #[arg(long, conflicts_with = "down")]
    up: bool,
    /// Only the way back
    #[arg(long)]
    down: bool,
    /// The key id that the server must have
    #[arg(long, value_name = "SHA256:...")]
    pin: Option<KeyId>,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    expert: Expert,
}

/// Print this machine's key id; made at first use.
#[derive(Args)]
#[command(after_help = "\
Example: haul id | ssh server 'cat >> ~/.config/haul/authorized_keys'")]
struct Id {}

/// See it work: a server and a client in one, on this machine.
#[derive(Args)]
#[command(after_help = "\
Example: haul demo ~/photos
Sends PATH to a server on a loopback port, into a new directory, compares every
file byte by byte, and says how fast it went. Nothing is set up or left running.")]
struct Demo {
    /// What to send; a small tree is made when nothing is given
    path: Option<PathBuf>,
}

impl Cli {
    /// The filter of HAUL_LOG when it is not set: a server's operator sees who connects and what came; others see nothing.
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

/// What the exit code says of a session that came to its end.
fn exit_code_of(outcome: &Outcome) -> u8 {
    let Outcome { sent, summary, .. } = outcome;
    let failed = sent.failed > 0 || sent.interrupted.is_some() || summary.unremoved.is_some();
    match sent.vanished {
        _ if failed => FAILED,
        0 => DONE,
        _ => VANISHED,
    }
}

/// The system gives no threads.
pub(crate) fn failed_to_begin(error: std::io::Error) -> ExitCode {
    output::failure(&Error::io("cannot start threads")(error).into());
    ExitCode::from(FAILED)
}

/// What the exit code says of an error.
fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<Error>() {
        Some(Error::Usage(_) | Error::Home { .. }) => USAGE,
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

/// `30s`, `10m`, `2h`, `7d`, or seconds.
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
        .ok_or_else(|| "a time is written 30s, 10m, 2h or 7d".into())
}

/// `ADDR:PORT`, `ADDR`, `:PORT` or `PORT`.
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
        Err("an address is written 192.0.2.1:4433, [::]:4433 or 4433".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_of_one_piece() {
        Cli::command().debug_assert();
    }

    #[test]
    fn exit_codes_are_what_the_help_says() {
        let code = |error: Error| exit_code(&anyhow::Error::from(error));
        assert_eq!(code(Error::Usage(String::new())), USAGE);
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
    fn times_are_what_people_write() {
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
    fn listen_takes_what_people_write() {
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
