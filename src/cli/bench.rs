//! `haul bench`.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use haul::bench::MeasureOptions;
use haul::{Argument, Error, Event, KeyId, Observer};

use super::connect::connect;
use super::exit::{DONE, INTERRUPTED};
use super::options::ExpertOptions;
use super::output::{self, StatusLine, measurement};

/// Measure the path to a server, without touching disks.
#[derive(Args)]
#[command(after_help = "\
Example: haul bench haul://server
It loads the path with dummy bytes, first up, then down. The idle RTT is that of
small messages; the RTT under load and the loss are the sender's estimates.
Other users of the same path will notice the load.")]
pub(crate) struct Bench {
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
    expert: ExpertOptions,
}

pub(crate) async fn run(bench: Bench) -> anyhow::Result<u8> {
    measure(&bench)
        .await
        .inspect_err(|error| output::report_start_failure(bench.json, error))
}

async fn measure(bench: &Bench) -> anyhow::Result<u8> {
    // A path in the target is ignored, so that a target typed for `haul cp` works here too.
    let Argument::Remote(target) = Argument::parse(&bench.server)? else {
        return Err(Error::Usage(
            "cannot measure a local path: write the server as haul://HOST, or NAME: if it is paired".into(),
        )
        .into());
    };
    let client = connect(&target, bench.pin, &bench.expert.config()).await?;
    let options = MeasureOptions {
        up: !bench.down,
        down: !bench.up,
        time: bench.time.map(Duration::from_secs),
    };
    let status = Arc::new(StatusLine::new());
    let result = tokio::select! {
        result = client.measure(&options, progress_observer(&status)) => Some(result),
        _ = tokio::signal::ctrl_c() => None,
    };
    drop(status);
    client.close().await;
    match result {
        Some(result) => measurement::show_results(&result?, bench.json),
        None => return Ok(INTERRUPTED),
    }
    Ok(DONE)
}

fn progress_observer(status: &Arc<StatusLine>) -> Observer {
    let status = status.clone();
    Arc::new(move |event| {
        if let Event::Measuring {
            probe,
            bytes,
            elapsed,
        } = event
        {
            status.show(measurement::progress_line(probe, bytes, elapsed));
        }
    })
}
