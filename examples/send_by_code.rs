//! Offers files by a short code to whoever types it on another machine of this network.
//!
//!     cargo run --example send_by_code -- FILE...

use std::time::Duration;

use haul::pairing::discovery::Announcement;
use haul::pairing::offer::Content;
use haul::pairing::send::{Met, Offering, SendOptions};
use haul::{Config, Home, WalkOptions};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let options = SendOptions {
        content: Content::Files(std::env::args_os().skip(1).map(Into::into).collect()),
        to: None,
        walk: WalkOptions::default(),
        from: haul::pairing::machine_name(),
        listen: vec!["[::]:0".parse()?],
        expires: Duration::from_secs(600),
        relay: None,
        own: Vec::new(),
    };
    let identity = Home::from_env()?.identity()?;
    let mut offering =
        Offering::begin(options, identity, Config::default(), haul::ignore()).await?;
    let Some(code) = offering.code() else {
        return Err("no code was drawn".into());
    };
    println!("Code: {code}");
    let port = offering
        .addresses()
        .first()
        .map_or(0, |address| address.port());
    // Multicast DNS tells the receiver where this machine is, for as long as the announcement lives.
    let _announcement = Announcement::of(code.number(), port)?;
    match offering.meet().await? {
        Met::Accepted { from } => {
            println!("accepted by {from}");
            let outcome = offering.serve().await?;
            println!(
                "{} files, {} failed",
                outcome.sent.files, outcome.sent.failed
            );
        }
        Met::Declined { from } => println!("{from} declined"),
        Met::Burnt { from } => println!("a wrong guess from {from} used up the code"),
        Met::Paired(_) | Met::Expired => println!("no receiver came in time"),
    }
    offering.close().await;
    Ok(())
}
