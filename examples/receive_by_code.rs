//! Takes what another machine of this network offers by a short code, without asking.
//!
//!     cargo run --example receive_by_code -- 417-maple-canyon-orbit DIRECTORY

use haul::pairing::code::{Credential, ShortCode};
use haul::pairing::receive::meet;
use haul::pairing::route::Whereabouts;
use haul::{AcceptedQuota, Config, Home, PullOptions};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [code, directory] = &arguments[..] else {
        return Err("usage: receive_by_code CODE DIRECTORY".into());
    };
    let code: ShortCode = code.parse()?;
    let identity = Home::from_env()?.identity()?;
    let credential = Credential::from(&code);
    let met = meet(
        &credential,
        Whereabouts::default(),
        &identity,
        &Config::default(),
    )
    .await?;
    let offer = met.offer();
    println!(
        "{} files, {} bytes from {}",
        offer.files, offer.bytes, offer.from
    );
    // No more is taken than was offered.
    let options = PullOptions {
        sources: met.names().to_vec(),
        destination: directory.into(),
        into: true,
        literal: true,
        quota: Some(AcceptedQuota::of(offer)),
        ..PullOptions::default()
    };
    let Some(client) = met.accept().await? else {
        println!("there was nothing to transfer");
        return Ok(());
    };
    let outcome = client.pull(&options, haul::ignore()).await?;
    client.close_after_server().await;
    println!(
        "{} files, {} failed",
        outcome.sent.files, outcome.sent.failed
    );
    Ok(())
}
