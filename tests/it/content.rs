//! Sparse files: content with holes.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use crate::support::{Host, content, from, pull, push, recorder, to, write};
use haul::Event;

/// Size of a file that consists mostly of holes.
const TIB: u64 = 1 << 40;
/// Bytes that a file system may use in addition for the same holes: one block, and the blocks that record the positions
/// of the others.
const SLACK: u64 = 64 << 10;

/// Makes a file of this size and writes these parts.
fn sparse(path: &Path, size: u64, parts: &[(u64, &[u8])]) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for (offset, bytes) in parts {
        file.write_all_at(bytes, *offset).unwrap();
    }
    file.sync_all().unwrap();
}

/// Bytes that a file occupies on the disk.
fn allocated(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

/// Compares parts of a file with the expected content.
fn holds(path: &Path, size: u64, parts: &[(u64, &[u8])]) {
    let file = File::open(path).unwrap();
    assert_eq!(file.metadata().unwrap().len(), size);
    for (offset, bytes) in parts {
        let mut back = vec![0; bytes.len()];
        file.read_exact_at(&mut back, *offset).unwrap();
        assert!(back == *bytes, "{} bytes at {offset}", bytes.len());
    }
}

/// Whether the file system supports holes.
fn has_holes(directory: &Path) -> bool {
    let probe = directory.join("probe");
    sparse(&probe, 1 << 30, &[]);
    let has = allocated(&probe) < 1 << 20;
    std::fs::remove_file(probe).unwrap();
    if !has {
        println!("skipped: {} has no holes", directory.display());
    }
    has
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_tebibyte_of_holes_only_the_data_is_sent() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    if !has_holes(there.path()) {
        return;
    }
    let bytes = content(1, 3 << 20);
    let zeros = vec![0; 1 << 20];
    let parts: &[(u64, &[u8])] = &[
        (0, &bytes[..5000]),
        (5 << 30, &bytes),
        (700 << 30, &zeros),
        (TIB - 100_000, &bytes[..100_000]),
    ];
    let (big, hole, middle) = (
        here.path().join("big"),
        here.path().join("hole"),
        here.path().join("over 4 GiB"),
    );
    sparse(&big, TIB, parts);
    sparse(&hole, TIB, &[]);
    sparse(&middle, (4 << 30) + 5, &[((4 << 30) + 1, b"end!")]);
    let host = Host::directory(there.path());
    let client = host.connect().await.unwrap();
    let (observer, events) = recorder();
    let outcome = client
        .push(&to(&[&big, &hole, &middle], ""), observer)
        .await
        .unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.failed), (3, 0));
    let moved: u64 = events
        .lock()
        .unwrap()
        .iter()
        .map(|e| {
            if let Event::Moved { bytes, .. } = e {
                *bytes
            } else {
                0
            }
        })
        .sum();
    assert!(moved < 6 << 20, "{moved} bytes were sent");
    holds(&there.path().join("big"), TIB, parts);
    holds(&there.path().join("hole"), TIB, &[(TIB / 2, &zeros)]);
    holds(
        &there.path().join("over 4 GiB"),
        (4 << 30) + 5,
        &[(4 << 30, b"\0end!")],
    );
    for name in ["big", "hole", "over 4 GiB"] {
        let (source, copy) = (
            allocated(&here.path().join(name)),
            allocated(&there.path().join(name)),
        );
        assert!(copy <= source + SLACK, "{name}: {copy} bytes for {source}");
        assert_eq!(
            std::fs::metadata(there.path().join(name))
                .unwrap()
                .mtime_nsec(),
            std::fs::metadata(here.path().join(name))
                .unwrap()
                .mtime_nsec()
        );
    }
    let again = client
        .push(&to(&[&big, &hole, &middle], ""), haul::ignore())
        .await
        .unwrap();
    assert_eq!((again.sent.skipped, again.sent.files), (3, 0));
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sparse_file_comes_back_as_sparse() {
    let (served, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    if !has_holes(here.path()) {
        return;
    }
    let bytes = content(4, 3 << 20);
    let parts: &[(u64, &[u8])] = &[(1 << 30, &bytes), (TIB - 3, b"end")];
    sparse(&served.path().join("f"), TIB, parts);
    let host = Host::directory(served.path());
    let outcome = pull(&host, &from(&["f"], &here.path().join("f")))
        .await
        .unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.failed), (1, 0));
    holds(&here.path().join("f"), TIB, parts);
    assert!(allocated(&here.path().join("f")) <= allocated(&served.path().join("f")) + SLACK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_holes_than_a_plan_lists_arrive_as_holes() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    if !has_holes(there.path()) {
        return;
    }
    let source = here.path().join("f");
    let bytes = content(2, 4096);
    // 1,500 holes of 28 KiB, and 500 of 12.
    let offsets = (0..1500)
        .map(|i| i << 15)
        .chain((0..500).map(|i| (1500 << 15) + (i << 14)));
    let parts: Vec<(u64, &[u8])> = offsets.map(|offset| (offset, &bytes[..])).collect();
    let size = (1500 << 15) + (500 << 14);
    sparse(&source, size, &parts);
    let outcome = push(&Host::directory(there.path()), &to(&[&source], ""))
        .await
        .unwrap();
    assert_eq!(outcome.sent.files, 1);
    let copy = there.path().join("f");
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&source).unwrap());
    let (taken, there) = (allocated(&copy), allocated(&source));
    assert!(taken <= there + SLACK, "{taken} bytes for {there}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_sparse_file_is_resumed_with_its_holes() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    if !has_holes(there.path()) {
        return;
    }
    let source = here.path().join("f");
    let bytes = content(3, 24 << 20);
    let parts: &[(u64, &[u8])] = &[(1 << 30, &bytes[..16 << 20]), (TIB, &bytes[16 << 20..])];
    let size = TIB + (9 << 20);
    sparse(&source, size, parts);
    let host = Host::directory(there.path());
    let identity = haul::Identity::generate().unwrap();
    let config = haul::Config {
        retry_for: std::time::Duration::ZERO,
        ..Default::default()
    };
    let client = host.connect_as(&identity, &config).await.unwrap();
    let (seen, mut half) = tokio::sync::mpsc::unbounded_channel();
    let moved = std::sync::atomic::AtomicU64::new(0);
    let observer: haul::Observer = std::sync::Arc::new(move |event| {
        if let Event::Moved { bytes, .. } = event
            && moved.fetch_add(bytes, std::sync::atomic::Ordering::SeqCst) > 12 << 20
        {
            let _ = seen.send(());
        }
    });
    let options = to(&[&source], "");
    tokio::select! {
        ended = client.push(&options, observer) => panic!("{ended:?}"),
        _ = half.recv() => client.close().await,
    }
    let partial = loop {
        let names: Vec<_> = std::fs::read_dir(there.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        if let [partial] = &names[..]
            && allocated(partial) > 2 << 20
        {
            break partial.clone();
        }
        tokio::task::yield_now().await;
    };
    // Content that never came from this source is where a hole should be.
    File::options()
        .write(true)
        .open(&partial)
        .unwrap()
        .write_all_at(&bytes[..3 << 20], 1 << 20)
        .unwrap();
    let (observer, events) = recorder();
    let client = host.connect_as(&identity, &config).await.unwrap();
    let outcome = client.push(&options, observer).await.unwrap();
    assert_eq!(outcome.sent.files, 1, "{outcome:?}");
    let copy = there.path().join("f");
    holds(&copy, size, parts);
    holds(&copy, size, &[(1 << 20, &vec![0; 4 << 20])]);
    assert!(allocated(&copy) <= allocated(&source) + SLACK);
    let moved: u64 = events
        .lock()
        .unwrap()
        .iter()
        .map(|e| {
            if let Event::Moved { bytes, .. } = e {
                *bytes
            } else {
                0
            }
        })
        .sum();
    assert!(moved < 24 << 20, "{moved} bytes were sent again");
    assert_eq!(
        std::fs::read_dir(there.path()).unwrap().count(),
        1,
        "no partial is left"
    );
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn written_zeros_and_reserved_space_arrive_as_zeros() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(&here.path().join("zeros"), &vec![0; 2 << 20]);
    let reserved = File::create(here.path().join("reserved")).unwrap();
    #[cfg(target_os = "linux")]
    if let Err(e) =
        rustix::fs::fallocate(&reserved, rustix::fs::FallocateFlags::empty(), 0, 2 << 20)
    {
        println!("{e}: nothing is reserved here");
    }
    reserved.set_len(2 << 20).unwrap();
    reserved.write_all_at(b"written", 1 << 20).unwrap();
    let outcome = push(&Host::directory(there.path()), &to(&[here.path()], "to"))
        .await
        .unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.failed), (2, 0));
    for name in ["zeros", "reserved"] {
        let read = |root: &Path| std::fs::read(root.join(name)).unwrap();
        assert!(
            read(here.path()) == read(&there.path().join("to")),
            "{name}"
        );
    }
}
