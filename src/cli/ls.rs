//! `haul ls`.

use haul::{Argument, Config, Error, ListItem, Listing};

use super::Ls;
use super::connect::connect;
use super::exit::{DONE, FAILED, INTERRUPTED};
use super::output;
use super::output::listing::{Format, Lines};

pub(super) async fn run(ls: Ls) -> anyhow::Result<u8> {
    let format = if ls.json {
        Format::Json
    } else {
        Format::Text { long: ls.long }
    };
    let begin = async {
        let Argument::Remote(target) = Argument::parse(&ls.place)? else {
            let why = "cannot list a local path: use ls; write a server as haul://HOST/PATH";
            return Err(Error::Usage(why.into()).into());
        };
        let config = Config {
            congestion: ls.expert.congestion,
            qlog: ls.expert.qlog.clone(),
            ..Config::default()
        };
        let client = connect(&target, ls.pin, &config).await?;
        let listing = client.list(&target.path, ls.recursive).await?;
        anyhow::Ok((client, listing))
    };
    let (client, listing) = begin
        .await
        .inspect_err(|error| output::report_start_failure(ls.json, error))?;
    let ended = tokio::select! {
        ended = print(listing, Lines::new(format)) => ended,
        _ = tokio::signal::ctrl_c() => Ok(INTERRUPTED),
    };
    client.close().await;
    ended.inspect_err(|error| output::report_start_failure(ls.json, error))
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
