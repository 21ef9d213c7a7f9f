//! An upload service: takes files from everybody into a directory, reports each, and stops cleanly on Ctrl-C.
//!
//!     cargo run --example upload_service -- /srv/inbox

use std::sync::Arc;

use haul::{
    Admission, Anyone, Config, Event, Home, LocalStore, Result, Server, ServerOptions, Settled,
};

#[tokio::main]
async fn main() -> Result<()> {
    let inbox = std::env::args_os().nth(1).unwrap_or_else(|| ".".into());
    let identity = Home::from_env()?.identity()?;
    println!("key id {}", identity.key_id());

    let server = Server::bind(ServerOptions {
        listen: vec!["[::]:4433".parse().expect("an address")],
        identity,
        // Everybody may write; nobody may read what others sent.
        admission: Admission {
            anyone: Anyone {
                read: false,
                write: true,
            },
            ..Admission::default()
        },
        store: Arc::new(LocalStore::open(inbox.as_ref())?),
        // At most 100 transfers write at the same time, over all connections.
        config: Config {
            max_transfers: 100,
            ..Config::default()
        },
        observer: Arc::new(|event| match event {
            Event::Settled {
                path,
                size,
                result: Settled::Committed,
                ..
            } => println!("{path}: {size} bytes"),
            Event::Settled {
                path,
                result: Settled::Failed(why),
                ..
            } => println!("{path}: {why}"),
            _ => {}
        }),
    })?;
    println!("listening on {:?}", server.local_addresses());

    let ctrl_c = || async { drop(tokio::signal::ctrl_c().await) };
    let second = async {
        ctrl_c().await;
        ctrl_c().await;
    };
    server.run(ctrl_c(), second).await;
    Ok(())
}
