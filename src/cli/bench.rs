//! `haul bench`.

use std::sync::Arc;
use std::time::Duration;

use haul::{Argument, Config, Error, Event, MeasureOptions, Observer};

use super::connect::connect;
use super::exit::{DONE, INTERRUPTED};
use super::output::{self, StatusLine, measurement};
use super::{Bench, Expert};

pub(super) async fn run(bench: Bench) -> anyhow::Result<u8> {
    let json = bench.json;
    measure(bench)
        .await
        .inspect_err(|error| output::report_start_failure(json, error))
}

async fn measure(bench: Bench) -> anyhow::Result<u8> {
    // A path in the target is ignored, so that a target typed for `haul cp` works here too.
    let Argument::Remote(target) = Argument::parse(&bench.server)? else {
        return Err(Error::Usage(
            "cannot measure a local path: write the server as haul://HOST, or NAME: if it is paired".into(),
        )
        .into());
    };
    let Expert { congestion, qlog } = &bench.expert;
    let config = Config {
        congestion: *congestion,
        qlog: qlog.clone(),
        ..Config::default()
    };
    let client = connect(&target, bench.pin, &config).await?;
    let time = bench.time.map(Duration::from_secs);
    let options = MeasureOptions {
        up: !bench.down,
        down: !bench.up,
        time,
    };
    let status = Arc::new(StatusLine::new());
    let result = tokio::select! {
        result = client.measure(&options, observer(&status)) => Some(result),
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

fn observer(status: &Arc<StatusLine>) -> Observer {
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
