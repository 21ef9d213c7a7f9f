//! Existing files at the destination: kept, compared, replaced or refused; and dry runs, which write nothing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::support::command::Serving;
use crate::support::{Host, content, listing, pull, push, to, write};
use haul::{Code, Existing, PushOptions, ReceiveOptions, TransferStats};
use tempfile::tempdir;

/// A time before everything that the test writes.
fn set_time(path: &Path, seconds: u64) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    fs::File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_modified(time)
        .unwrap();
}

/// Four files: an equal one, one that differs, one of the same size and time that differs, and a new one.
fn four(source: &Path, there: &Path) {
    for (name, old, new) in [
        ("same", "same", "same"),
        ("differs", "old", "newer"),
        ("alike", "alik1", "alik2"),
        ("new", "", "new"),
    ] {
        write(&source.join(name), new.as_bytes());
        set_time(&source.join(name), 1_000_000);
        if !old.is_empty() {
            write(&there.join(name), old.as_bytes());
            set_time(&there.join(name), 1_000_000);
        }
    }
    std::os::unix::fs::symlink("new", source.join("to-new")).unwrap();
    std::os::unix::fs::symlink("old", there.join("to-new")).unwrap();
}

async fn taken(take: ReceiveOptions) -> (TransferStats, [String; 4], String) {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    four(&source.path().join("t"), &served.path().join("t"));
    let host = Host::directory(served.path());
    let mut options = PushOptions {
        take,
        ..to(&[&source.path().join("t")], "t")
    };
    options.walk.checksum = take.checksum;
    let sent = push(&host, &options).await.unwrap().sent;
    let read =
        |name: &str| fs::read_to_string(served.path().join("t").join(name)).unwrap_or_default();
    let link = fs::read_link(served.path().join("t/to-new"))
        .unwrap()
        .to_string_lossy()
        .into_owned();
    (sent, ["same", "differs", "alike", "new"].map(read), link)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn existing_files_are_treated_as_the_option_says() {
    let existing = |existing| ReceiveOptions {
        existing,
        ..ReceiveOptions::default()
    };
    let of = |names: [&str; 4]| names.map(String::from);
    let counts = |sent: &TransferStats| (sent.files, sent.skipped, sent.failed);

    let (sent, now, link) = taken(existing(Existing::Update)).await;
    assert_eq!(
        (counts(&sent), now, &*link),
        ((3, 2, 0), of(["same", "newer", "alik1", "new"]), "new")
    );
    let (sent, now, link) = taken(existing(Existing::Skip)).await;
    assert_eq!(
        (counts(&sent), now, &*link),
        ((1, 4, 0), of(["same", "old", "alik1", "new"]), "old")
    );
    let (sent, now, link) = taken(existing(Existing::Overwrite)).await;
    assert_eq!(
        (counts(&sent), now, &*link),
        ((5, 0, 0), of(["same", "newer", "alik2", "new"]), "new")
    );
    let (sent, now, link) = taken(existing(Existing::Fail)).await;
    assert_eq!(
        (counts(&sent), now, &*link),
        ((1, 2, 2), of(["same", "old", "alik1", "new"]), "old")
    );
    assert!(
        sent.failures
            .iter()
            .all(|(_, why)| why.code == Code::Exists),
        "{:?}",
        sent.failures
    );
    // Same size and time, and different content.
    let (sent, now, _) = taken(ReceiveOptions {
        checksum: true,
        ..ReceiveOptions::default()
    })
    .await;
    assert_eq!(
        (counts(&sent), now),
        ((4, 1, 0), of(["same", "newer", "alik2", "new"]))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_skipped_file_that_differs_gets_no_further_names() {
    // The existing file under the first name, and whether it counts as the source.
    for (old, time, checksum, same) in [
        ("new", 1_000_000, false, true),
        ("old", 2_000_000, false, false),
        ("older", 1_000_000, false, false),
        ("old", 1_000_000, true, false),
    ] {
        let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
        let root = source.path().join("t");
        write(&root.join("a"), b"new");
        set_time(&root.join("a"), 1_000_000);
        for name in ["b", "c"] {
            fs::hard_link(root.join("a"), root.join(name)).unwrap();
        }
        let there = served.path().join("t");
        write(&there.join("a"), old.as_bytes());
        set_time(&there.join("a"), time);
        let host = Host::directory(served.path());
        let mut options = to(&[&root], "t");
        options.take.existing = Existing::Skip;
        (options.take.checksum, options.walk.checksum) = (checksum, checksum);
        let outcome = push(&host, &options).await.unwrap();
        let sent = &outcome.sent;
        assert_eq!((sent.files, sent.skipped, sent.failed), (2, 1, 0));
        let read = |name: &str| fs::read_to_string(there.join(name)).unwrap();
        assert_eq!(["a", "b", "c"].map(read), [old, "new", "new"]);
        let links = fs::metadata(there.join("a")).unwrap().nlink();
        assert_eq!(links, if same { 3 } else { 1 }, "{old} {time}");
        let unkept = outcome.summary.unkept.unwrap_or_default();
        assert_eq!(unkept.is_empty(), same, "it is said: {unkept:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_content_is_not_sent_again_and_gets_the_new_time() {
    let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
    let bytes = content(1, 3 << 20);
    for (root, time) in [(source.path(), 2_000_000), (served.path(), 1_000_000)] {
        write(&root.join("t/f"), &bytes);
        set_time(&root.join("t/f"), time);
    }
    let host = Host::directory(served.path());
    let mut options = to(&[&source.path().join("t")], "t");
    (options.take.checksum, options.walk.checksum) = (true, true);
    let outcome = push(&host, &options).await.unwrap();
    assert_eq!(
        (
            outcome.sent.files,
            outcome.sent.skipped,
            outcome.sent.failed
        ),
        (0, 1, 0)
    );
    assert!(
        outcome.path.sent_bytes < 1 << 20,
        "the content did not travel: {}",
        outcome.path.sent_bytes
    );
    assert_eq!(
        listing(&served.path().join("t")),
        listing(&source.path().join("t"))
    );
    // In the other direction the server reads for the comparison.
    set_time(&source.path().join("t/f"), 3_000_000);
    let mut back = crate::support::from(&["t"], &source.path().join("t"));
    (back.take.checksum, back.walk.checksum) = (true, true);
    let outcome = pull(&host, &back).await.unwrap();
    assert_eq!(
        (
            outcome.sent.files,
            outcome.sent.skipped,
            outcome.sent.failed
        ),
        (0, 1, 0)
    );
    assert_eq!(
        listing(&served.path().join("t")),
        listing(&source.path().join("t"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_reports_changes_and_writes_nothing() {
    let source = tempdir().unwrap();
    let serving = Serving::start(&[]);
    four(&source.path().join("t"), &serving.served.path().join("t"));
    write(&source.path().join("t/deep/er/file"), b"x");
    let before = listing(serving.served.path());
    let output = serving.cp(source.path(), &["--dry-run", "t"], "t");
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert_eq!(listing(serving.served.path()), before);
    for line in [
        "would copy t/differs",
        "would copy t/new",
        "would copy t/to-new",
        "would copy t/deep/er/file",
    ] {
        assert!(said.lines().any(|l| l == line), "{line} in {said}");
    }
    assert!(
        !said.contains("t/same") && !said.contains("t/alike"),
        "{said}"
    );
    assert!(
        said.contains("would copy 4 files, 9 B; 2 unchanged"),
        "{said}"
    );
    // Also into a destination that does not exist.
    let output = serving.cp(source.path(), &["-n", "t"], "elsewhere");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(listing(serving.served.path()), before);
    // A pull does not make the directories that it would need either.
    let here = tempdir().unwrap();
    let place = format!("{}t", serving.url);
    let pin = serving.key_id.to_string();
    for there in ["new", "new/deep/", "new/deep/er"] {
        let output =
            crate::support::command::haul(here.path(), &["cp", "-n", "--pin", &pin, &place, there]);
        assert_eq!(
            output.status.code(),
            Some(0),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    assert!(listing(here.path()).is_empty());
    // A real run does what the dry run reported.
    assert_eq!(
        serving.cp(source.path(), &["t"], "t").status.code(),
        Some(0)
    );
    assert_eq!(
        fs::read(serving.served.path().join("t/deep/er/file")).unwrap(),
        b"x"
    );
}
