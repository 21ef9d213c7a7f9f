//! A store of one's own: a directory that takes no programs. Everything else is handed on to a [`LocalStore`].
//!
//!     cargo run --example own_store -- DIRECTORY

use std::sync::Arc;
use std::time::Duration;

use haul::{
    Admission, Anyone, Attributes, Code, Config, Home, LocalStore, Metadata, MetadataWarnings,
    PartialKey, Reason, RelativePath, Server, ServerOptions, Source, Store, Upload,
};

/// Refuses files whose name ends in `.exe`.
struct NoPrograms(LocalStore);

impl Store for NoPrograms {
    fn create(&self, path: &RelativePath, key: &PartialKey) -> Result<Box<dyn Upload>, Reason> {
        if path.name().is_some_and(|name| name.ends_with(b".exe")) {
            let text = format!("{path}: this server takes no programs");
            return Err(Reason::new(Code::NotAllowed, text));
        }
        self.0.create(path, key)
    }

    fn stat(&self, path: &RelativePath) -> Result<Option<Metadata>, Reason> {
        self.0.stat(path)
    }

    fn names(&self, directory: &RelativePath) -> Result<Vec<Vec<u8>>, Reason> {
        self.0.names(directory)
    }

    fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Reason> {
        self.0.read_link(path)
    }

    fn open(&self, path: &RelativePath) -> Result<Box<dyn Source>, Reason> {
        self.0.open(path)
    }

    fn make_directory(&self, path: &RelativePath) -> Result<(), Reason> {
        self.0.make_directory(path)
    }

    fn set_attributes(
        &self,
        path: &RelativePath,
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        self.0.set_attributes(path, attributes)
    }

    fn make_symlink(
        &self,
        path: &RelativePath,
        target: &[u8],
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason> {
        self.0.make_symlink(path, target, attributes)
    }

    fn link(&self, existing: &RelativePath, new: &RelativePath) -> Result<(), Reason> {
        self.0.link(existing, new)
    }

    fn remove(&self, path: &RelativePath) -> Result<(), Reason> {
        self.0.remove(path)
    }

    fn sync(&self) -> Result<(), Reason> {
        self.0.sync()
    }

    fn sweep(&self, age: Duration) -> Result<u64, Reason> {
        self.0.sweep(age)
    }
}

#[tokio::main]
async fn main() -> haul::Result<()> {
    let directory = std::env::args_os().nth(1).unwrap_or_else(|| ".".into());
    let server = Server::bind(ServerOptions {
        listen: vec!["[::]:4433".parse().expect("an address")],
        identity: Home::from_env()?.identity()?,
        admission: Admission {
            anyone: Anyone {
                read: true,
                write: true,
            },
            ..Admission::default()
        },
        store: Arc::new(NoPrograms(LocalStore::open(directory.as_ref())?)),
        config: Config::default(),
        observer: haul::ignore(),
    })?;
    println!("listening on {:?}", server.local_addresses());
    let stop = async { drop(tokio::signal::ctrl_c().await) };
    server.run(stop, std::future::pending()).await;
    Ok(())
}
