//! `haul cp`.

use std::path::PathBuf;

use haul::{
    Argument, Client, Config, Durability, Error, Follow, Home, Host, Index, Observer, Outcome,
    PullOptions, PushOptions, ReceiveOptions, RelativePath, Target, WalkOptions,
};

use super::connect::connect;
use super::exit::{DONE, FAILED, INTERRUPTED, code_of_outcome};
use super::output::{self, Display, OtherEnd, Screen};
use super::{Cp, Specials, Taking};

/// The session to run on the connection.
enum Job {
    Push(PushOptions),
    /// Sends standard input.
    Input(PushOptions),
    Pull(PullOptions),
    /// Writes to standard output.
    Output(PullOptions),
}

impl Job {
    async fn run(&self, client: &Client, observer: Observer) -> Result<Outcome, Error> {
        match self {
            Self::Push(options) => client.push(options, observer).await,
            Self::Input(options) => client.push_from(std::io::stdin(), options, observer).await,
            Self::Pull(options) => client.pull(options, observer).await,
            Self::Output(options) => {
                client
                    .pull_to(output::unbuffered_standard_output()?, options, observer)
                    .await
            }
        }
    }

    /// Says what remains after an interruption.
    fn remains(&self) -> &'static str {
        match self {
            Self::Push(_) | Self::Pull(_) => {
                "committed files remain. Run the same command again to resume."
            }
            Self::Input(_) => "nothing was committed.",
            Self::Output(_) => "the output is incomplete.",
        }
    }

    /// Returns the end that keeps the partials.
    fn keeper(&self) -> &'static str {
        match self {
            Self::Push(_) | Self::Input(_) => "the server",
            Self::Pull(_) | Self::Output(_) => "this machine",
        }
    }
}

pub(super) async fn run(cp: Cp) -> anyhow::Result<u8> {
    let (client, job) = begin(&cp)
        .await
        .inspect_err(|error| output::report_start_failure(cp.how.output.json, error))?;
    let screen = Screen::new(Display {
        style: cp.how.output.style(),
        dry_run: cp.how.taking.dry_run,
        other_end: OtherEnd::Server,
    });
    let ended = tokio::select! {
        ended = job.run(&client, screen.observer()) => ended,
        _ = tokio::signal::ctrl_c() => {
            screen.end(&Err(Error::Lost("interrupted".into())));
            client.cancel().await;
            output::note(&format!("haul: interrupted; {}", job.remains()));
            return Ok(INTERRUPTED);
        }
    };
    screen.end(&ended);
    client.close().await;
    let whole = ended
        .as_ref()
        .is_ok_and(|outcome| code_of_outcome(outcome) == DONE);
    if matches!(job, Job::Output(_)) && !whole {
        output::note("haul: the output is incomplete");
    }
    match ended {
        Ok(_) if matches!(job, Job::Output(_)) && !whole => Ok(FAILED),
        Ok(outcome) => Ok(code_of_outcome(&outcome)),
        Err(error @ Error::Lost(_)) if matches!(job, Job::Input(_)) => {
            let how = format!(
                "{error}. Nothing was committed, unless the loss came at the very end; run the whole command again"
            );
            Err(anyhow::Error::from(error).context(how))
        }
        Err(error @ Error::Lost(_)) if matches!(job, Job::Output(_)) => Err(error.into()),
        Err(error @ Error::Lost(_)) => {
            let keeper = job.keeper();
            let how = format!(
                "{error}. Committed files remain, and {keeper} keeps partials of the rest; run the same command again to \
                 resume"
            );
            Err(anyhow::Error::from(error).context(how))
        }
        Err(error) => Err(error.into()),
    }
}

/// Checks the command line, connects, and makes the session's options.
async fn begin(cp: &Cp) -> anyhow::Result<(Client, Job)> {
    if cp.how.port.is_some() {
        return Err(usage(
            "cannot use -P: write the port after the host, as in haul://host:4433/",
        ));
    }
    if let Some(kbit) = &cp.how.scp_limit {
        let kbit = output::printable_path(kbit.as_ref());
        return Err(usage(&format!(
            "cannot use scp's -l {kbit} (kbit/s): write --limit {kbit}k"
        )));
    }
    if cp.how.bwlimit.is_some() {
        return Err(usage(
            "cannot use rsync's --bwlimit (KiB/s): write --limit 1000KiB for 1000, 1.5MiB for 1.5m",
        ));
    }
    let (server, way) = split(cp)?;
    let one_directory =
        matches!(&way, Way::Up(sources) if matches!(&sources[..], [source] if source.is_dir()));
    if cp.how.filter.has_list() && !one_directory {
        return Err(usage(
            "cannot use --files-from: it needs one local directory as the only source",
        ));
    }
    let follow = if cp.how.follow {
        Follow::Anywhere
    } else {
        Follow::Never
    };
    let walk = WalkOptions {
        filter: cp.how.filter.filter(cp.how.recursive)?,
        follow,
        owner: cp.how.owner,
        numeric_ids: cp.how.numeric_ids,
        xattrs: cp.how.xattrs,
        checksum: cp.how.taking.checksum,
        allow_growing: cp.how.unruly.allow_growing,
        fail_specials: cp.how.unruly.specials == Specials::Fail,
        ..WalkOptions::default()
    };
    let Taking {
        dry_run,
        checksum,
        existing,
        modify_window,
        delete,
    } = cp.how.taking;
    let take = ReceiveOptions {
        existing,
        checksum,
        dry_run,
        delete,
        no_dedupe: cp.how.no_dedupe,
        modify_window,
    };
    let home = Home::from_env()?;
    let config = Config {
        parallel: cp.how.parallel as usize,
        congestion: cp.how.expert.congestion,
        limit: cp.how.limit,
        qlog: cp.how.expert.qlog.clone(),
        index: (!cp.how.no_dedupe).then(|| Index::new(home.index())),
        retry_for: cp.how.retry_for,
        reserved: Some(home.path().to_owned()),
        ..Config::default()
    };
    let client = connect(&server, cp.how.pin, &config).await?;
    let durability = if cp.how.no_fsync {
        Durability::Visible
    } else {
        Durability::Synced
    };
    let job = match way {
        Way::Up(sources) => {
            let destination = server.path;
            let into = server.into;
            let options = PushOptions {
                sources,
                destination,
                into,
                durability,
                walk,
                take,
            };
            if from_input(cp)? {
                Job::Input(options)
            } else {
                Job::Push(options)
            }
        }
        Way::Down(sources, destination) => {
            let into = destination.as_os_str().as_encoded_bytes().ends_with(b"/");
            let output = destination.as_os_str() == "-";
            let options = PullOptions {
                sources,
                destination,
                into,
                durability,
                walk,
                take,
                ..PullOptions::default()
            };
            if output {
                Job::Output(options)
            } else {
                Job::Pull(options)
            }
        }
    };
    Ok((client, job))
}

/// Whether the source is standard input.
fn from_input(cp: &Cp) -> Result<bool, Error> {
    match cp.sources.iter().any(|source| source == "-") {
        true if cp.sources.len() > 1 => Err(Error::Usage(
            "cannot send - with other sources: it is standard input; write a file of that name as ./-".into(),
        )),
        input => Ok(input),
    }
}

/// Checks that the sources can go to standard output.
fn check_output(cp: &Cp, sources: &[Target]) -> anyhow::Result<()> {
    if cp.how.output.json {
        return Err(usage(
            "cannot use --json and - together: both write to standard output; leave out one of them",
        ));
    }
    match sources {
        [one] if !one.path.is_root() => Ok(()),
        _ => Err(usage(
            "cannot write a directory or several sources to -: it takes one file; write a directory named - as ./-",
        )),
    }
}

/// The direction of the copy, with its arguments.
enum Way {
    Up(Vec<PathBuf>),
    Down(Vec<RelativePath>, PathBuf),
}

/// Sorts the arguments into local and remote ones, and finds the server and the direction.
fn split(cp: &Cp) -> anyhow::Result<(Target, Way)> {
    let mut here = Vec::new();
    let mut there = Vec::<Target>::new();
    for source in &cp.sources {
        match Argument::parse(source)? {
            Argument::Local(path) => here.push(path),
            Argument::Remote(target) => there.push(target),
        }
    }
    let input = from_input(cp)?;
    match (Argument::parse(&cp.destination)?, there.first().cloned()) {
        (Argument::Remote(target), None) if input && target.into => Err(usage(&format!(
            "cannot send standard input without a name: write {target}name.tar"
        ))),
        (Argument::Remote(target), None) => Ok((target, Way::Up(here))),
        (
            Argument::Remote(_),
            Some(Target {
                host: Host::Peer(_),
                ..
            }),
        ) => {
            let shown = output::printable_path(cp.sources[0].as_ref());
            Err(usage(&format!(
                "cannot copy from server to server: run haul on one of the two, with a local path. If {shown} is a local \
                 file, write ./{shown}"
            )))
        }
        (Argument::Remote(_), Some(_)) => Err(usage(
            "cannot copy from server to server: run haul on one of the two, with a local path",
        )),
        (Argument::Local(path), None) => {
            let path = output::printable_path(&path);
            let example = path.trim_start_matches(['.', '/']);
            Err(usage(&format!(
                "cannot copy between local paths: {path} is not a server; the destination comes last, as in haul://host/{example}"
            )))
        }
        (Argument::Local(path), Some(server)) => {
            if let Some(local) = here.first() {
                let local = output::printable_path(local);
                return Err(usage(&format!(
                    "cannot copy {local}: it is local, and the other sources are on a server; copy it with cp"
                )));
            }
            if let Some(other) = there.iter().find(|target| target.host != server.host) {
                let one = &server.host;
                let other = &other.host;
                return Err(usage(&format!(
                    "cannot copy from {one} and {other} at once: they are two servers; copy from one after the other"
                )));
            }
            if path.as_os_str() == "-" {
                check_output(cp, &there)?;
            }
            Ok((
                server,
                Way::Down(there.into_iter().map(|target| target.path).collect(), path),
            ))
        }
    }
}

fn usage(why: &str) -> anyhow::Error {
    Error::Usage(why.into()).into()
}
