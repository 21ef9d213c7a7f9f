//! `haul demo`: a server, a client and a comparison in one command.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use anyhow::{Context, bail};
use clap::Args;
use haul::{
    Admission, Anyone, Client, Config, Identity, LocalStore, PushOptions, RelativePath, Server,
    ServerOptions, ServerTrust, TransferStats,
};

use super::exit::{DONE, FAILED};
use super::output::{self, Display, OtherEnd, Screen, Style, printable_path};

/// Try haul: a server and a client in one, on this machine.
#[derive(Args)]
#[command(after_help = "\
Example: haul demo ~/photos
Sends PATH to a server on a loopback port, into a new directory, compares every
file byte by byte, and prints the speed. It changes no settings, and nothing
keeps running.")]
pub(crate) struct Demo {
    /// What to send; by default a small tree is made
    path: Option<PathBuf>,
}

/// Bytes compared at a time.
const BLOCK: usize = 1 << 20;

pub(crate) async fn run(demo: Demo) -> anyhow::Result<u8> {
    let directory = new_directory()?;
    let source = match demo.path {
        Some(path) => path,
        None => small_tree(&directory.join("sent"))?,
    };
    let received = directory.join("received");
    std::fs::create_dir(&received).with_context(|| printable_path(&received))?;

    let sent = serve_and_push(&source, &received).await?;
    let compared = tokio::task::spawn_blocking(move || compare_trees(&source, &received)).await??;
    output::line(&format!(
        "{} files compared byte by byte: {} equal, {} different or missing.",
        compared.equal + compared.different,
        compared.equal,
        compared.different
    ));
    output::line(&format!(
        "Speed: {:.0} MB/s on this machine, both ends included.",
        sent.bytes_a_second / 1e6
    ));
    output::line(&format!("The files are in {}", printable_path(&directory)));
    Ok(if compared.different == 0 && sent.stats.failed == 0 {
        DONE
    } else {
        FAILED
    })
}

/// What the client has sent, and how fast.
struct Sent {
    stats: TransferStats,
    bytes_a_second: f64,
}

/// Sends the source to a server that runs until then.
async fn serve_and_push(source: &Path, received: &Path) -> anyhow::Result<Sent> {
    let identity = Identity::generate()?;
    let trust = ServerTrust {
        pin: Some(identity.key_id()),
        ..ServerTrust::default()
    };
    let server = server(identity, received)?;
    let port = server
        .local_addresses()
        .first()
        .context("cannot find the address of the server")?
        .port();
    output::line(&format!(
        "A server runs on 127.0.0.1:{port} (UDP). Sending {} to it over QUIC.",
        printable_path(source)
    ));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(server.run(async { drop(stopped.await) }, std::future::pending()));

    let identity = Identity::generate()?;
    let client = Client::connect(&identity, &trust, "127.0.0.1", port, &Config::default()).await?;
    let options = PushOptions {
        sources: vec![source.to_owned()],
        destination: RelativePath::root(),
        into: true,
        ..PushOptions::default()
    };
    let screen = Screen::new(Display {
        style: Style::Normal,
        dry_run: false,
        other_end: OtherEnd::Server,
    });
    let begun = Instant::now();
    let pushed = client.push(&options, screen.observer()).await;
    let seconds = begun.elapsed().as_secs_f64();
    screen.end(&pushed);
    client.close().await;
    drop(stop);
    running.await.context("cannot go on: the server failed")?;
    let stats = pushed?.sent;
    Ok(Sent {
        bytes_a_second: stats.bytes as f64 / seconds,
        stats,
    })
}

/// Makes a server that takes files from every client, on a free port of this machine alone.
fn server(identity: Identity, directory: &Path) -> haul::Result<Server> {
    Server::bind(ServerOptions {
        listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))],
        identity,
        admission: Admission {
            anyone: Anyone {
                read: false,
                write: true,
            },
            ..Admission::default()
        },
        store: Arc::new(LocalStore::open(directory)?),
        config: Config::default(),
        observer: haul::ignore(),
    })
}

/// Makes a new directory that other users cannot read.
fn new_directory() -> anyhow::Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    for n in 0..100 {
        let name = format!("haul-demo-{}-{}", now.as_secs(), std::process::id() + n);
        let path = std::env::temp_dir().join(name);
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| printable_path(&path)),
        }
    }
    bail!(
        "cannot make a new directory in {}: all names exist",
        printable_path(&std::env::temp_dir())
    )
}

/// Makes files of many sizes, a deep directory, an empty file and a name outside of ASCII.
fn small_tree(root: &Path) -> anyhow::Result<PathBuf> {
    let tree = root.join("demo");
    let write = |name: &str, size: usize| {
        let path = tree.join(name);
        std::fs::create_dir_all(path.parent().unwrap_or(root))?;
        let mut content = vec![0; size];
        blake3::Hasher::new()
            .update(name.as_bytes())
            .finalize_xof()
            .fill(&mut content);
        std::fs::write(&path, content)
    };
    (|| {
        write("large.bin", 64 << 20)?;
        write("a/deep/directory/medium.bin", 3 << 20)?;
        write("empty", 0)?;
        write("größe und 漢字.txt", 1234)?;
        (0..500).try_for_each(|i| write(&format!("many/{i:03}.txt"), i * 61))
    })()
    .with_context(|| printable_path(&tree))?;
    Ok(tree)
}

#[derive(Default)]
struct Compared {
    equal: u64,
    different: u64,
}

/// Compares each file of the source with the received one, by reading both.
fn compare_trees(source: &Path, received: &Path) -> anyhow::Result<Compared> {
    let source = source
        .canonicalize()
        .with_context(|| printable_path(source))?;
    let name = source
        .file_name()
        .context("cannot compare the source: it has no name")?;
    let mut compared = Compared::default();
    let mut open = vec![(source.clone(), received.join(name))];
    while let Some((sent, got)) = open.pop() {
        let kind = sent
            .symlink_metadata()
            .with_context(|| printable_path(&sent))?
            .file_type();
        if kind.is_dir() {
            for entry in std::fs::read_dir(&sent).with_context(|| printable_path(&sent))? {
                let entry = entry.with_context(|| printable_path(&sent))?;
                open.push((entry.path(), got.join(entry.file_name())));
            }
        } else if kind.is_file() {
            match same_content(&sent, &got) {
                Ok(true) => compared.equal += 1,
                Ok(false) => {
                    output::note(&format!("haul: {} differs", printable_path(&got)));
                    compared.different += 1;
                }
                Err(error) => {
                    output::note(&format!("haul: {}: {error}", printable_path(&got)));
                    compared.different += 1;
                }
            }
        }
    }
    Ok(compared)
}

fn same_content(a: &Path, b: &Path) -> std::io::Result<bool> {
    let mut a = std::fs::File::open(a)?;
    let mut b = std::fs::File::open(b)?;
    let mut left = Vec::new();
    let mut right = Vec::new();
    loop {
        left.clear();
        right.clear();
        a.by_ref().take(BLOCK as u64).read_to_end(&mut left)?;
        b.by_ref().take(BLOCK as u64).read_to_end(&mut right)?;
        if left != right {
            return Ok(false);
        }
        if left.is_empty() {
            return Ok(true);
        }
    }
}
