//! `haul cp`, and the copy that `haul sync` shares with it.

mod arguments;

use std::ffi::OsString;
use std::time::Duration;

use clap::Args;
use haul::{
    Client, Config, Delete, Durability, Error, Follow, Home, Index, KeyId, Observer, Outcome,
    PullOptions, PushOptions, Rate, ReceiveOptions, Target, WalkOptions,
};

use self::arguments::{Arguments, Direction};
use super::connect::connect;
use super::exit::{DONE, FAILED, INTERRUPTED, code_of_outcome};
use super::options::{ExistingOptions, ExpertOptions, OutputOptions, SourceOptions, parse_time};
use super::output::{self, Display, OtherEnd, Screen, Style};

/// Copy files and directories to or from a server.
#[derive(Args)]
#[command(after_help = "\
Examples: haul cp photos haul://server/2026    -> 2026/... there
          haul cp haul://server/2026 photos/   -> photos/2026/... here
Unchanged files (same size and time) are skipped; the same command resumes what
was interrupted. Write a local a:b as ./a:b. Also: -c (compare content),
--existing HOW, --no-fsync, --follow, --xattrs, --owner, --exclude, --include,
--files-from, --gitignore, --allow-growing, --specials: see README.md.")]
pub(crate) struct Cp {
    /// Files and directories; - is standard input
    #[arg(value_name = "SRC", required = true)]
    sources: Vec<OsString>,
    /// Destination: haul://HOST/PATH, NAME:PATH, local, or - (stdout)
    #[arg(value_name = "DST", required = true)]
    destination: OsString,
    #[command(flatten)]
    options: CopyOptions,
}

/// Options of commands that copy.
#[derive(Args)]
pub(crate) struct CopyOptions {
    #[command(flatten)]
    connection: ConnectionOptions,
    #[arg(long, hide = true)]
    no_fsync: bool,
    #[command(flatten)]
    metadata: MetadataOptions,
    /// Show what would be done; write nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    #[command(flatten)]
    existing: ExistingOptions,
    #[arg(long, hide = true)]
    no_dedupe: bool,
    #[command(flatten)]
    sources: SourceOptions,
    #[arg(short = 'L', long, visible_alias = "copy-links", hide = true)]
    follow: bool,
    #[command(flatten)]
    output: OutputOptions,
    #[command(flatten)]
    habits: OptionsOfOtherTools,
}

/// Options for the connection.
#[derive(Args)]
struct ConnectionOptions {
    /// The key id that the server must have
    #[arg(long, value_name = "SHA256:...")]
    pin: Option<KeyId>,
    /// Transfers open at the same time
    #[arg(long, hide = true, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1000))]
    parallel: u32,
    /// Keep trying when the connection is lost
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "10m")]
    retry_for: Duration,
    /// Send at most RATE: 20M is bits a second, 2.5MB bytes
    #[arg(long, value_name = "RATE", allow_hyphen_values = true)]
    limit: Option<Rate>,
    #[command(flatten)]
    expert: ExpertOptions,
}

/// Options for what is kept of a file besides its content.
#[derive(Args)]
struct MetadataOptions {
    #[arg(long, hide = true)]
    xattrs: bool,
    #[arg(long, hide = true)]
    owner: bool,
    #[arg(long, hide = true)]
    numeric_ids: bool,
}

/// Options that users of scp, cp and rsync type by habit.
#[derive(Args)]
struct OptionsOfOtherTools {
    // haul does the same without these.
    #[arg(short = 'r', visible_short_alias = 'R', long, hide = true)]
    recursive: bool,
    #[arg(short = 'a', long, hide = true)]
    archive: bool,
    #[arg(short = 'p', hide = true)]
    preserve: bool,
    // These are refused with advice. The rate limits of scp and rsync have other units.
    #[arg(short = 'P', hide = true, value_name = "PORT")]
    port: Option<OsString>,
    #[arg(short = 'l', hide = true, value_name = "KBIT")]
    scp_limit: Option<OsString>,
    #[arg(long, hide = true, value_name = "RATE")]
    bwlimit: Option<OsString>,
}

impl OptionsOfOtherTools {
    /// Refuses options that haul writes in another way.
    fn check(&self) -> Result<(), Error> {
        let why = if self.port.is_some() {
            "cannot use -P: write the port after the host, as in haul://host:4433/".into()
        } else if let Some(kbit) = &self.scp_limit {
            let kbit = output::printable_path(kbit.as_ref());
            format!("cannot use scp's -l {kbit} (kbit/s): write --limit {kbit}k")
        } else if self.bwlimit.is_some() {
            "cannot use rsync's --bwlimit (KiB/s): write --limit 1000KiB for 1000, 1.5MiB for 1.5m"
                .into()
        } else {
            return Ok(());
        };
        Err(Error::Usage(why))
    }
}

pub(crate) async fn run(cp: Cp) -> anyhow::Result<u8> {
    copy(&CopyRequest {
        sources: cp.sources,
        destination: cp.destination,
        delete: None,
        options: cp.options,
    })
    .await
}

/// What to copy, and how.
pub(crate) struct CopyRequest {
    pub(crate) sources: Vec<OsString>,
    pub(crate) destination: OsString,
    /// Removes what the source does not have, if set.
    pub(crate) delete: Option<Delete>,
    pub(crate) options: CopyOptions,
}

/// Copies between this machine and a server, and returns the exit code.
pub(crate) async fn copy(request: &CopyRequest) -> anyhow::Result<u8> {
    let style = request.options.output.style();
    let (client, session) = begin(request)
        .await
        .inspect_err(|error| output::report_start_failure(style == Style::Json, error))?;
    let screen = Screen::new(Display {
        style,
        dry_run: request.options.dry_run,
        other_end: OtherEnd::Server,
    });
    let ended = tokio::select! {
        ended = session.run(&client, screen.observer()) => ended,
        _ = tokio::signal::ctrl_c() => {
            screen.end(&Err(Error::Lost("interrupted".into())));
            client.cancel().await;
            output::note(&format!("haul: interrupted; {}", session.remains_after_interruption()));
            return Ok(INTERRUPTED);
        }
    };
    screen.end(&ended);
    client.close().await;
    session.conclude(ended)
}

/// Checks the command line, connects, and prepares the session.
async fn begin(request: &CopyRequest) -> anyhow::Result<(Client, Session)> {
    let options = &request.options;
    options.habits.check()?;
    let json = options.output.style() == Style::Json;
    let Arguments { server, direction } =
        Arguments::parse(&request.sources, &request.destination, json)?;
    if options.sources.has_list() && !direction.is_of_one_directory() {
        return Err(Error::Usage(
            "cannot use --files-from: it needs one local directory as the only source".into(),
        )
        .into());
    }
    let walk = options.walk_options()?;
    let home = Home::from_env()?;
    let config = options.config(&home);
    let client = connect(&server, options.connection.pin, &config).await?;
    Ok((client, Session::new(server, direction, walk, request)))
}

impl CopyOptions {
    fn walk_options(&self) -> anyhow::Result<WalkOptions> {
        let MetadataOptions {
            xattrs,
            owner,
            numeric_ids,
        } = self.metadata;
        let follow = if self.follow {
            Follow::Anywhere
        } else {
            Follow::Never
        };
        Ok(WalkOptions {
            follow,
            xattrs,
            owner,
            numeric_ids,
            checksum: self.existing.receive_options().checksum,
            ..self.sources.walk_options(self.habits.recursive)?
        })
    }

    fn receive_options(&self, delete: Option<Delete>) -> ReceiveOptions {
        ReceiveOptions {
            dry_run: self.dry_run,
            no_dedupe: self.no_dedupe,
            delete,
            ..self.existing.receive_options()
        }
    }

    fn config(&self, home: &Home) -> Config {
        let connection = &self.connection;
        Config {
            parallel: connection.parallel as usize,
            limit: connection.limit,
            retry_for: connection.retry_for,
            index: (!self.no_dedupe).then(|| Index::new(home.index())),
            reserved: Some(home.path().to_owned()),
            ..connection.expert.config()
        }
    }
}

/// The session to run on the connection.
enum Session {
    Push(PushOptions),
    /// Sends standard input.
    PushInput(PushOptions),
    Pull(PullOptions),
    /// Writes to standard output.
    PullToOutput(PullOptions),
}

impl Session {
    fn new(server: Target, direction: Direction, walk: WalkOptions, request: &CopyRequest) -> Self {
        let take = request.options.receive_options(request.delete);
        let durability = if request.options.no_fsync {
            Durability::Visible
        } else {
            Durability::Synced
        };
        let push = PushOptions {
            destination: server.path,
            into: server.into,
            durability,
            walk: walk.clone(),
            take,
            ..PushOptions::default()
        };
        let pull = PullOptions {
            durability,
            walk,
            take,
            ..PullOptions::default()
        };
        match direction {
            Direction::Push(sources) => Self::Push(PushOptions { sources, ..push }),
            Direction::PushInput => Self::PushInput(push),
            Direction::Pull {
                sources,
                destination,
            } => Self::Pull(PullOptions {
                into: destination.as_os_str().as_encoded_bytes().ends_with(b"/"),
                sources,
                destination,
                ..pull
            }),
            Direction::PullToOutput(source) => Self::PullToOutput(PullOptions {
                sources: vec![source],
                ..pull
            }),
        }
    }

    async fn run(&self, client: &Client, observer: Observer) -> Result<Outcome, Error> {
        match self {
            Self::Push(options) => client.push(options, observer).await,
            Self::PushInput(options) => client.push_from(std::io::stdin(), options, observer).await,
            Self::Pull(options) => client.pull(options, observer).await,
            Self::PullToOutput(options) => {
                let output = output::unbuffered_standard_output()?;
                client.pull_to(output, options, observer).await
            }
        }
    }

    /// Says what remains after an interruption.
    fn remains_after_interruption(&self) -> &'static str {
        match self {
            Self::Push(_) | Self::Pull(_) => {
                "committed files remain. Run the same command again to resume."
            }
            Self::PushInput(_) => "nothing was committed.",
            Self::PullToOutput(_) => "the output is incomplete.",
        }
    }

    /// Says what remains after the connection was lost, and what to do.
    fn advice_after_loss(&self) -> Option<&'static str> {
        match self {
            Self::Push(_) => Some(
                "Committed files remain, and the server keeps partials of the rest; run the same command again to resume",
            ),
            Self::Pull(_) => Some(
                "Committed files remain, and this machine keeps partials of the rest; run the same command again to \
                 resume",
            ),
            Self::PushInput(_) => Some(
                "Nothing was committed, unless the loss came at the very end; run the whole command again",
            ),
            Self::PullToOutput(_) => None,
        }
    }

    /// Returns the exit code, or the error that ended the session with what the user can do about it.
    fn conclude(&self, ended: Result<Outcome, Error>) -> anyhow::Result<u8> {
        let code = ended.as_ref().map_or(FAILED, code_of_outcome);
        let incomplete = matches!(self, Self::PullToOutput(_)) && code != DONE;
        if incomplete {
            output::note("haul: the output is incomplete");
        }
        match (ended, self.advice_after_loss()) {
            (Ok(_), _) if incomplete => Ok(FAILED),
            (Ok(_), _) => Ok(code),
            (Err(error @ Error::Lost(_)), Some(advice)) => {
                let advice = format!("{error}. {advice}");
                Err(anyhow::Error::from(error).context(advice))
            }
            (Err(error), _) => Err(error.into()),
        }
    }
}
