//! `haul ls`.

use std::ffi::OsString;

use clap::Args;
use haul::{Argument, Client, Error, KeyId, ListItem, Listing};

use super::connect::connect;
use super::exit::{DONE, FAILED, INTERRUPTED};
use super::options::ExpertOptions;
use super::output;
use super::output::listing::{Format, Lines};

/// List files on a server.
#[derive(Args)]
#[command(after_help = "\
Examples: haul ls haul://server/               the served directory
          haul ls -lR haul://server/photos     all below, with sizes and times
          haul ls 'haul://server/logs/*.gz'    matches, expanded on the server
Hidden names are listed too; directories end in /. Characters that could control
the terminal are escaped; --json has the bytes. Times are UTC. Entries that
cannot be read are reported on standard error, and the exit code is 1.")]
pub(crate) struct Ls {
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
    expert: ExpertOptions,
    // An option that users of ls type by habit. haul lists hidden names without it.
    #[arg(short = 'a', short_alias = 'A', hide = true)]
    all: bool,
}

pub(crate) async fn run(ls: Ls) -> anyhow::Result<u8> {
    let format = if ls.json {
        Format::Json
    } else {
        Format::Text { long: ls.long }
    };
    let (client, listing) = begin(&ls)
        .await
        .inspect_err(|error| output::report_start_failure(ls.json, error))?;
    let ended = tokio::select! {
        ended = print(listing, Lines::new(format)) => ended,
        _ = tokio::signal::ctrl_c() => Ok(INTERRUPTED),
    };
    client.close().await;
    ended.inspect_err(|error| output::report_start_failure(ls.json, error))
}

async fn begin(ls: &Ls) -> anyhow::Result<(Client, Listing)> {
    let Argument::Remote(target) = Argument::parse(&ls.place)? else {
        let why = "cannot list a local path: use ls; write a server as haul://HOST/PATH";
        return Err(Error::Usage(why.into()).into());
    };
    let client = connect(&target, ls.pin, &ls.expert.config()).await?;
    let listing = client.list(&target.path, ls.recursive).await?;
    Ok((client, listing))
}

/// Prints entries until the end of the listing, or until standard output has no reader.
async fn print(mut listing: Listing, mut lines: Lines) -> anyhow::Result<u8> {
    let mut code = DONE;
    loop {
        let found = tokio::select! {
            biased;
            found = listing.next() => found,
            // No entry is ready, so the buffered lines are printed before waiting.
            () = std::future::ready(()) => {
                if !lines.flush() {
                    return Ok(code);
                }
                listing.next().await
            }
        };
        let reads_on = match found? {
            Some(ListItem::Listed(path, listed)) => lines.print(&path, &listed),
            Some(ListItem::Failed(path, why)) => {
                code = FAILED;
                lines.print_failure(&path, &why)
            }
            None => {
                lines.flush();
                return Ok(code);
            }
        };
        if !reads_on {
            return Ok(code);
        }
    }
}
