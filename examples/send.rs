//! A client that sends files to a server it knows by its key.
//!
//!     cargo run --example send -- SHA256:... HOST FILE...

use haul::{Client, Config, DEFAULT_PORT, Home, KeyId, PushOptions, RelativePath, ServerTrust};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(key_id), Some(host)) = (arguments.next(), arguments.next()) else {
        return Err("usage: send SHA256:... HOST FILE...".into());
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
        destination: RelativePath::root(),
        into: true,
        ..PushOptions::default()
    };
    let outcome = client.push(&options, haul::ignore()).await?;
    client.close().await;
    println!(
        "{} files, {} bytes, {} unchanged",
        outcome.sent.files, outcome.sent.bytes, outcome.sent.skipped
    );
    for (path, why) in &outcome.sent.failures {
        println!("failed: {path}: {why}");
    }
    Ok(())
}
