//! A client that gives up after a time. What was committed stays; the server keeps partials of the rest, and the same
//! command goes on from there.
//!
//!     cargo run --example cancel -- SHA256:... HOST SECONDS FILE...

use std::time::Duration;

use haul::{Client, Config, DEFAULT_PORT, Home, KeyId, PushOptions, ServerTrust};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(key_id), Some(host), Some(seconds)) =
        (arguments.next(), arguments.next(), arguments.next())
    else {
        return Err("usage: cancel SHA256:... HOST SECONDS FILE...".into());
    };
    let trust = ServerTrust {
        pin: Some(key_id.parse::<KeyId>()?),
        ..ServerTrust::default()
    };
    let identity = Home::from_env()?.identity()?;
    let client =
        Client::connect(&identity, &trust, &host, DEFAULT_PORT, &Config::default()).await?;
    let options = PushOptions {
        sources: arguments.map(Into::into).collect(),
        into: true,
        ..PushOptions::default()
    };
    let time = Duration::from_secs(seconds.parse()?);
    // Dropping the future of `push`, as the timeout does, cancels it.
    match tokio::time::timeout(time, client.push(&options, haul::ignore())).await {
        Ok(outcome) => {
            println!("done: {} files", outcome?.sent.files);
            client.close().await;
        }
        Err(_) => {
            println!("cancelled; run the same command again to go on");
            client.cancel().await;
        }
    }
    Ok(())
}
