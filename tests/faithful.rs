//! What is kept of a tree besides its content: modes, times, links, and what is kept only on demand.

mod support;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::{Arc, Mutex};

use haul::progress::{Event, Observer};
use haul::session::Outcome;
use support::command::{Serving, is_root};
use support::{LIMIT, content, listing, to, write};
use tempfile::tempdir;

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

/// Pushes over a connection of its own; all of it must go through.
async fn push(server: &Serving, from: &Path, into: &str) -> Outcome {
    let client = server.connect().await;
    let options = to(&[from], into);
    let pushing = client.push(&options, haul::progress::ignore());
    let outcome = tokio::time::timeout(LIMIT, pushing).await.expect("it ends").unwrap();
    client.close().await;
    assert_eq!(outcome.sent.failed, 0, "{:?}", outcome.sent.failures);
    outcome
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_directory_is_filled_again_by_a_server_that_is_not_root() {
    let (source, server) = (tempdir().unwrap(), Serving::start_as_nobody(&[]));
    let (tree, arrived) = (source.path().join("t"), server.served.path().join("t"));
    write(&tree.join("closed/below/changes"), &content(1, 1000));
    write(&tree.join("closed/changes"), &content(2, 300_000));
    mode(&tree.join("closed/below"), 0o500);
    mode(&tree.join("closed"), 0o555);
    push(&server, &tree, "t").await;
    assert_eq!(listing(&arrived), listing(&tree));

    for directory in ["closed", "closed/below"] {
        let directory = tree.join(directory);
        mode(&directory, 0o755);
        write(&directory.join("changes"), &content(3, 400_000));
        write(&directory.join("new/small"), &content(4, 10));
        write(&directory.join("new/large"), &content(5, 2 << 20));
        write(&directory.join("empty"), b"");
        symlink("nowhere", directory.join("link")).unwrap();
        // The server may change what it may not read. Only root can send and compare it.
        if is_root() {
            write(&directory.join("unreadable"), b"x");
            mode(&directory.join("unreadable"), 0o000);
            mode(&directory.join("new"), 0o111);
        }
    }
    mode(&tree.join("closed/below"), 0o500);
    mode(&tree.join("closed"), 0o555);
    push(&server, &tree, "t").await;
    assert_eq!(listing(&arrived), listing(&tree));
    if is_root() {
        mode(&tree.join("closed/unreadable"), 0o200);
        mode(&tree.join("closed/new"), 0o311);
    }
    assert_eq!(push(&server, &tree, "t").await.sent.files, 0);
    assert_eq!(listing(&arrived), listing(&tree), "also the modes of what cannot be opened");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_directory_is_closed_also_after_a_kill_in_the_middle() {
    let (source, server) = (tempdir().unwrap(), Serving::start_as_nobody(&[]));
    let tree = source.path().join("t");
    write(&tree.join("closed/small"), b"1");
    mode(&tree.join("closed"), 0o555);
    push(&server, &tree, "t").await;
    mode(&tree.join("closed"), 0o755);
    write(&tree.join("closed/large"), &content(1, 16 << 20));
    mode(&tree.join("closed"), 0o555);

    let client = server.connect().await;
    let server = Arc::new(Mutex::new(Some(server)));
    let killed = server.clone();
    let observer: Observer = Arc::new(move |event| {
        if let Event::Moved { .. } = event {
            killed.lock().unwrap().iter_mut().for_each(Serving::kill);
        }
    });
    let options = to(&[&tree], "t");
    let pushing = client.push(&options, observer);
    tokio::time::timeout(LIMIT, pushing).await.expect("it ends").unwrap_err();
    drop(client);
    let server = server.lock().unwrap().take().unwrap();
    let arrived = server.served.path().join("t");
    let closed = std::fs::metadata(arrived.join("closed")).unwrap().permissions().mode();
    assert_eq!(closed & 0o777, 0o555);
    assert!(!arrived.join("closed/large").exists());

    let server = server.restart(&[]);
    push(&server, &tree, "t").await;
    assert_eq!(listing(&arrived), listing(&tree));
}
