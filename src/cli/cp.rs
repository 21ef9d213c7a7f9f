//! `haul cp`.

use std::path::PathBuf;

use haul::client::{Client, PushOptions};
use haul::config::Config;
use haul::error::Error;
use haul::manifest::{Follow, WalkOptions};
use haul::target::{Argument, Target};
use haul::wire::Durability;

use super::connect::connect;
use super::output::{self, Screen};
use super::{Cp, DONE, FAILED, INTERRUPTED};

pub(super) async fn run(cp: Cp) -> anyhow::Result<u8> {
    let (client, options) = begin(&cp).await.inspect_err(|error| output::never_began(cp.output.json, error))?;
    let screen = Screen::new(cp.output);
    let push = async {
        match from_input(&cp)? {
            true => client.push_from(std::io::stdin(), &options, screen.observer()).await,
            false => client.push(&options, screen.observer()).await,
        }
    };
    let pushed = tokio::select! {
        pushed = push => pushed,
        _ = tokio::signal::ctrl_c() => {
            screen.end(&Err(Error::Lost("interrupted".into())));
            client.close().await;
            output::note("haul: interrupted; what is committed stays. Run the same command again to go on.");
            return Ok(INTERRUPTED);
        }
    };
    screen.end(&pushed);
    client.close().await;
    match pushed {
        Ok(outcome) if outcome.sent.failed == 0 && outcome.sent.interrupted.is_none() => Ok(DONE),
        Ok(_) => Ok(FAILED),
        Err(error @ Error::Lost(_)) if from_input(&cp)? => {
            let how = format!(
                "{error}. Nothing of it was committed, unless it was lost with the very end; run the whole command again"
            );
            Err(anyhow::Error::from(error).context(how))
        }
        Err(error @ Error::Lost(_)) => {
            let how = format!(
                "{error}. What is committed stays, and of the rest the server keeps what it has; run the same command again to \
                 go on"
            );
            Err(anyhow::Error::from(error).context(how))
        }
        Err(error) => Err(error.into()),
    }
}

/// All that comes before the session.
async fn begin(cp: &Cp) -> anyhow::Result<(Client, PushOptions)> {
    if cp.port.is_some() {
        return Err(usage("the port goes into the destination, as in haul://host:4433/"));
    }
    if let Some(kbit) = &cp.scp_limit {
        let kbit = output::shown(kbit.as_ref());
        return Err(usage(&format!("scp's -l {kbit} (kbit/s) is written --limit {kbit}k")));
    }
    if cp.bwlimit.is_some() {
        return Err(usage("rsync's --bwlimit counts in KiB/s: --bwlimit 1000 is written --limit 1000KiB, 1.5m 1.5MiB"));
    }
    let (sources, target) = split(cp)?;
    if cp.filter.has_list() && !matches!(&sources[..], [source] if source.is_dir()) {
        return Err(usage("--files-from names what is below one directory, which is then the only source"));
    }
    let follow = if cp.follow { Follow::Anywhere } else { Follow::Never };
    let walk = WalkOptions { filter: cp.filter.filter(cp.recursive)?, follow, ..WalkOptions::default() };
    let config = Config {
        parallel: cp.parallel as usize,
        congestion: cp.expert.congestion,
        limit: cp.limit,
        qlog: cp.expert.qlog.clone(),
        retry_for: cp.retry_for,
        ..Config::default()
    };
    let client = connect(&target, cp.pin, &config).await?;
    let options = PushOptions {
        sources,
        destination: target.path,
        into: target.into,
        durability: if cp.no_fsync { Durability::Visible } else { Durability::Synced },
        walk,
        ..PushOptions::default()
    };
    Ok((client, options))
}

/// Whether what is sent comes in through a pipe.
fn from_input(cp: &Cp) -> Result<bool, Error> {
    match cp.sources.iter().any(|source| source == "-") {
        true if cp.sources.len() > 1 => {
            Err(Error::Usage("- is what comes in, and goes alone; a file of that name is ./-".into()))
        }
        input => Ok(input),
    }
}

/// Tells sources from the destination.
fn split(cp: &Cp) -> anyhow::Result<(Vec<PathBuf>, Target)> {
    let input = from_input(cp)?;
    let sources = cp.sources.iter().map(|source| Argument::parse(source)).collect::<Result<Vec<_>, _>>()?;
    let local = |argument: &Argument| match argument {
        Argument::Local(path) => Some(path.clone()),
        Argument::Remote(_) => None,
    };
    let from_here: Option<Vec<_>> = sources.iter().map(local).collect();
    match (from_here, Argument::parse(&cp.destination)?) {
        (Some(_), Argument::Remote(target)) if input && target.into => {
            Err(usage(&format!("what comes in needs a name there, as in {target}name.tar")))
        }
        (Some(paths), Argument::Remote(target)) => Ok((paths, target)),
        (None, Argument::Remote(_)) => {
            Err(usage("from server to server haul does not copy; run it on one of the two, with a local name"))
        }
        (None, Argument::Local(_)) => {
            Err(usage("copying from a server comes with a later version; today the destination is haul://HOST/PATH"))
        }
        (Some(_), Argument::Local(path)) => {
            let path = output::shown(&path);
            let example = path.trim_start_matches(['.', '/']);
            Err(usage(&format!("{path} is no server; the destination comes last, as in haul://host/{example}")))
        }
    }
}

fn usage(why: &str) -> anyhow::Error {
    Error::Usage(why.into()).into()
}
