//! Options that several commands share, and the forms of their values.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use haul::{
    Config, Congestion, DEFAULT_PORT, Existing, Home, Index, Rate, ReceiveOptions, WalkOptions,
};

use super::filter::FilterArgs;
use super::output::Style;

/// Options that few users need. The last lines of a command's help name them.
#[derive(Args)]
pub(crate) struct ExpertOptions {
    #[arg(long, hide = true, value_name = "NAME", default_value_t)]
    congestion: Congestion,
    #[arg(long, hide = true, value_name = "DIR")]
    qlog: Option<PathBuf>,
}

impl ExpertOptions {
    /// Returns the default configuration with these options.
    pub(crate) fn config(&self) -> Config {
        Config {
            congestion: self.congestion,
            qlog: self.qlog.clone(),
            ..Config::default()
        }
    }
}

/// Options that choose what is printed.
#[derive(Args, Clone, Copy)]
#[group(multiple = false)]
pub(crate) struct OutputOptions {
    /// Print only failures
    #[arg(short, long)]
    quiet: bool,
    /// Name every file; end with statistics of the path
    #[arg(short, long)]
    verbose: bool,
    /// Print one JSON object a line on standard output
    #[arg(long)]
    json: bool,
}

impl OutputOptions {
    pub(crate) fn style(&self) -> Style {
        match self {
            Self { json: true, .. } => Style::Json,
            Self { quiet: true, .. } => Style::Quiet,
            Self { verbose: true, .. } => Style::Verbose,
            _ => Style::Normal,
        }
    }
}

/// Options for entries that exist at the destination.
#[derive(Args, Clone, Copy)]
pub(crate) struct ExistingOptions {
    #[arg(short, long, hide = true)]
    checksum: bool,
    #[arg(long, hide = true, value_name = "HOW", default_value_t)]
    existing: Existing,
    #[arg(long, hide = true, value_name = "SECONDS")]
    modify_window: Option<u32>,
}

impl ExistingOptions {
    /// Returns the default options of a receiver with these.
    pub(crate) fn receive_options(&self) -> ReceiveOptions {
        ReceiveOptions {
            checksum: self.checksum,
            existing: self.existing,
            modify_window: self.modify_window,
            ..ReceiveOptions::default()
        }
    }
}

/// Options that choose among the sources.
#[derive(Args)]
pub(crate) struct SourceOptions {
    #[arg(long, hide = true)]
    allow_growing: bool,
    #[arg(long, hide = true, value_name = "HOW", default_value = "skip")]
    specials: Specials,
    #[command(flatten)]
    filter: FilterArgs,
}

/// What to do with FIFOs, sockets and devices in directories.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
enum Specials {
    Skip,
    Fail,
}

impl SourceOptions {
    /// Returns the default options of a walk with these. With `--files-from`, listed directories are entered only if
    /// `recursive`.
    ///
    /// # Errors
    /// The errors of [`FilterArgs::filter`].
    pub(crate) fn walk_options(&self, recursive: bool) -> anyhow::Result<WalkOptions> {
        Ok(WalkOptions {
            filter: self.filter.filter(recursive)?,
            allow_growing: self.allow_growing,
            fail_specials: self.specials == Specials::Fail,
            ..WalkOptions::default()
        })
    }

    /// Whether `--files-from` was given.
    pub(crate) fn has_list(&self) -> bool {
        self.filter.has_list()
    }
}

/// Options of a session between two machines that meet by a code, a ticket or a pairing.
#[derive(Args)]
pub(crate) struct PeerSessionOptions {
    #[arg(long, hide = true, value_name = "RATE", allow_hyphen_values = true)]
    limit: Option<Rate>,
    #[arg(long, hide = true, value_name = "TIME", value_parser = parse_time, default_value = "10m")]
    retry_for: Duration,
    #[command(flatten)]
    expert: ExpertOptions,
}

impl PeerSessionOptions {
    /// Returns the configuration with these options and the digest index of HAUL_HOME.
    pub(crate) fn config(&self, home: &Home) -> Config {
        Config {
            limit: self.limit,
            retry_for: self.retry_for,
            index: Some(Index::new(home.index())),
            ..self.expert.config()
        }
    }
}

/// Parses `30s`, `10m`, `2h`, `7d`, or a number of seconds.
pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let number = &text[..digits];
    let unit = match &text[digits..] {
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
pub(crate) fn parse_listen_address(text: &str) -> Result<SocketAddr, String> {
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
            assert_eq!(parse_time(text), Ok(Duration::from_secs(seconds)));
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
            assert!(parse_time(text).is_err(), "{text}");
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
            assert_eq!(parse_listen_address(text).unwrap().to_string(), address);
        }
        assert!(parse_listen_address("host:1").is_err());
    }
}
