//! A client that fetches a file or directory from a server it knows by its key.
//!
//!     cargo run --example fetch -- SHA256:... HOST PATH DESTINATION

use haul::{Client, Config, DEFAULT_PORT, Home, KeyId, PullOptions, RelativePath, ServerTrust};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [key_id, host, path, destination] = &arguments[..] else {
        return Err("usage: fetch SHA256:... HOST PATH DESTINATION".into());
    };
    let trust = ServerTrust {
        pin: Some(key_id.parse::<KeyId>()?),
        ..ServerTrust::default()
    };
    let identity = Home::from_env()?.identity()?;
    let client = Client::connect(&identity, &trust, host, DEFAULT_PORT, &Config::default()).await?;
    let options = PullOptions {
        sources: vec![RelativePath::from_components(path.split('/'))?],
        destination: destination.into(),
        ..PullOptions::default()
    };
    let outcome = client.pull(&options, haul::ignore()).await?;
    client.close().await;
    println!(
        "{} files, {} bytes, {} unchanged",
        outcome.sent.files, outcome.sent.bytes, outcome.sent.skipped
    );
    for (path, reason) in &outcome.sent.failures {
        println!("failed: {path}: {reason}");
    }
    Ok(())
}
