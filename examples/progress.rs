//! A client that listens to progress events: a server and a client in one process, and every event as it comes.
//!
//!     cargo run --example progress -- FILE...

use std::sync::Arc;

use haul::{
    Admission, Anyone, Client, Config, Durability, Event, Identity, MemoryStore, Observer,
    PushOptions, Server, ServerOptions, ServerTrust,
};

#[tokio::main]
async fn main() -> haul::Result<()> {
    let identity = Identity::generate()?;
    let trust = ServerTrust {
        pin: Some(identity.key_id()),
        ..ServerTrust::default()
    };
    let server = Server::bind(ServerOptions {
        listen: vec!["127.0.0.1:0".parse().expect("an address")],
        identity,
        admission: Admission {
            anyone: Anyone {
                read: false,
                write: true,
            },
            ..Admission::default()
        },
        store: Arc::new(MemoryStore::new()),
        config: Config::default(),
        observer: haul::ignore(),
    })?;
    let port = server.local_addresses()[0].port();
    tokio::spawn(server.run(std::future::pending(), std::future::pending()));

    // Called from the tasks that do the work: be quick, and hand over to a channel what takes longer.
    let observer: Observer = Arc::new(|event| match event {
        Event::Found {
            files,
            bytes,
            complete,
        } => println!("found {files} files, {bytes} bytes, all: {complete}"),
        Event::Started {
            id,
            path,
            size,
            held,
        } => println!("#{id} {path}: {size} bytes, {held} there already"),
        Event::Moved { id, bytes } => println!("#{id} {bytes} more"),
        Event::Settled { path, result, .. } => println!("{path}: {result:?}"),
        other => println!("{other:?}"),
    });
    let client = Client::connect(
        &Identity::generate()?,
        &trust,
        "127.0.0.1",
        port,
        &Config::default(),
    )
    .await?;
    let sources = std::env::args_os().skip(1).map(Into::into).collect();
    let options = PushOptions {
        sources,
        into: true,
        durability: Durability::Visible,
        ..PushOptions::default()
    };
    client.push(&options, observer).await?;
    client.close().await;
    Ok(())
}
