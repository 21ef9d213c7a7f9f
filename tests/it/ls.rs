//! Listings of a server: complete, in order, and safe to print.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use crate::support::command::{Serving, haul};
use crate::support::{Host, LIMIT, from, path, pull, write};
use haul::{Client, Code, Error, Kind, ListItem};
use tempfile::tempdir;

/// Collects a listing by name, entries that could not be inspected with their code.
async fn listed(client: &Client, of: &str, recursive: bool) -> Result<Vec<String>, Error> {
    let mut listing = client.list(&path(of), recursive).await?;
    let mut all = Vec::new();
    while let Some(found) = tokio::time::timeout(LIMIT, listing.next())
        .await
        .expect("it ends")?
    {
        all.push(match found {
            ListItem::Listed(path, _) => path.to_string(),
            ListItem::Failed(path, why) => format!("{path}: {}", why.code.name()),
        });
    }
    Ok(all)
}

fn tree(root: &Path) {
    for name in [
        "logs/b.gz",
        "logs/a.gz",
        "logs/.c.gz",
        "logs/d.txt",
        "logs/old/e.gz",
        "a[1]",
        "a1",
        "x/1/log",
        "x/2/log",
    ] {
        write(&root.join(name), b"12345");
    }
    symlink("/etc", root.join("out")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_is_listed_as_its_content() {
    let served = tempdir().unwrap();
    tree(served.path());
    let host = Host::directory(served.path());
    let client = host.connect().await.unwrap();
    let cases: [(&str, bool, &[&str]); 11] = [
        ("", false, &["a1", "a[1]", "logs", "out", "x"]),
        ("logs", false, &[".c.gz", "a.gz", "b.gz", "d.txt", "old"]),
        (
            "logs",
            true,
            &[".c.gz", "a.gz", "b.gz", "d.txt", "old", "old/e.gz"],
        ),
        ("logs/a.gz", false, &["logs/a.gz"]),
        ("logs/*.gz", false, &["logs/a.gz", "logs/b.gz"]),
        ("logs/o*", false, &["logs/old"]),
        ("logs/o*", true, &["logs/old", "logs/old/e.gz"]),
        ("x/?/log", false, &["x/1/log", "x/2/log"]),
        ("a[1]", false, &["a[1]"]),
        ("out", true, &["out"]),
        ("ou*", true, &["out"]),
    ];
    for (of, recursive, expected) in cases {
        assert_eq!(
            listed(&client, of, recursive).await.unwrap(),
            expected,
            "{of}"
        );
    }
    for nowhere in ["nowhere", "logs/*.zip", "out/*", "a1/x", "out/passwd"] {
        let error = listed(&client, nowhere, false).await.unwrap_err();
        assert!(matches!(&error, Error::Refused(_)), "{nowhere}: {error:?}");
        assert!(
            error
                .to_string()
                .contains(nowhere.split('/').next().unwrap()),
            "{nowhere}: {error}"
        );
    }
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listing_reports_what_stat_would() {
    let served = tempdir().unwrap();
    write(&served.path().join("f"), b"12345");
    std::fs::set_permissions(served.path().join("f"), PermissionsExt::from_mode(0o4751)).unwrap();
    symlink("to", served.path().join("l")).unwrap();
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        served.path().join("p"),
        rustix::fs::Mode::RUSR,
    )
    .unwrap();
    let host = Host::directory(served.path());
    let client = host.connect().await.unwrap();
    let mut listing = client.list(&path(""), false).await.unwrap();
    let mut all = Vec::new();
    while let Some(ListItem::Listed(_, listed)) = listing.next().await.unwrap() {
        all.push(listed);
    }
    let modified = haul::Time::from(
        served
            .path()
            .join("f")
            .metadata()
            .unwrap()
            .modified()
            .unwrap(),
    );
    assert_eq!(
        (all[0].kind, all[0].size, all[0].mode),
        (Some(Kind::File), Some(5), Some(0o4751))
    );
    assert_eq!(all[0].modified, Some(modified));
    assert_eq!(
        (all[1].kind, all[1].target.as_deref()),
        (Some(Kind::Symlink), Some(&b"to"[..]))
    );
    assert_eq!((all[2].kind, all[2].size), (None, None));
    assert!(
        listing.next().await.unwrap().is_none(),
        "and stays at its end"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unreadable_entries_are_reported_and_the_rest_is_listed() {
    let server = Serving::start_as_nobody(&[]);
    for name in ["a/x", "b/y", "c/z"] {
        write(&server.served.path().join(name), b"1");
    }
    std::fs::set_permissions(
        server.served.path().join("b"),
        PermissionsExt::from_mode(0o700),
    )
    .unwrap();
    rustix::fs::chown(
        server.served.path().join("b"),
        Some(rustix::fs::Uid::ROOT),
        None,
    )
    .unwrap();
    let client = server.connect().await;
    assert_eq!(
        listed(&client, "", true).await.unwrap(),
        ["a", "a/x", "b", "b: PermissionDenied", "c", "c/z"]
    );
    let error = listed(&client, "b", false).await.unwrap_err();
    assert!(
        matches!(&error, Error::Refused(why) if why.code == Code::PermissionDenied),
        "{error:?}"
    );
    let error = listed(&client, "b/*", false).await.unwrap_err();
    assert!(
        matches!(&error, Error::Refused(why) if why.code == Code::PermissionDenied),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_names_come_in_order_while_other_sessions_run() {
    const NAMES: usize = 20_000;
    let (served, here) = (tempdir().unwrap(), tempdir().unwrap());
    for i in 0..NAMES {
        write(
            &served.path().join(format!("many/{:05}", i * 7 % NAMES)),
            b"",
        );
    }
    write(&served.path().join("f"), b"1");
    let host = Host::directory(served.path());
    let client = host.connect().await.unwrap();
    // A listing that was begun and is not read does not delay others.
    let mut unread = client.list(&path("many"), false).await.unwrap();
    assert_eq!(
        listed(&client, "many", true).await.unwrap(),
        (0..NAMES).map(|i| format!("{i:05}")).collect::<Vec<_>>()
    );
    assert_eq!(
        pull(&host, &from(&["f"], here.path()))
            .await
            .unwrap()
            .sent
            .files,
        1
    );
    assert!(
        matches!(unread.next().await.unwrap(), Some(ListItem::Listed(path, _)) if path.to_string() == "00000")
    );
    drop(unread);
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_fetches_the_matches_of_a_pattern() {
    let (served, here) = (tempdir().unwrap(), tempdir().unwrap());
    tree(served.path());
    let host = Host::directory(served.path());
    let outcome = pull(
        &host,
        &from(&["logs/*.gz", "x/1"], &here.path().join("got")),
    )
    .await
    .unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.failed), (3, 0));
    let mut names: Vec<_> = std::fs::read_dir(here.path().join("got"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["1", "a.gz", "b.gz"]);
    // A single match goes into a directory as well: the number of matches must not decide where they go.
    pull(&host, &from(&["logs/d*"], &here.path().join("one")))
        .await
        .unwrap();
    assert!(here.path().join("one/d.txt").is_file());
    // An entry with exactly that name is not treated as a pattern, and goes where the user named.
    pull(&host, &from(&["a[1]"], &here.path().join("copy")))
        .await
        .unwrap();
    assert!(here.path().join("copy").is_file());
    for (pattern, why) in [
        ("logs/*.zip", "logs/*.zip: nothing matches"),
        ("x/*/log", "cannot send two sources named log"),
    ] {
        let error = pull(&host, &from(&[pattern], here.path()))
            .await
            .unwrap_err();
        assert!(error.to_string().starts_with(why), "{error}");
    }
    // A link is sent as a link, and nothing behind it matches.
    pull(&host, &from(&["ou*"], here.path())).await.unwrap();
    assert!(here.path().join("out").is_symlink());
}

/// `haul ls ARGUMENTS`, with `@` for the server.
fn ls(server: &Serving, arguments: &[&str]) -> (Option<i32>, String, String) {
    let (pin, url) = (server.key_id.to_string(), server.url.trim_end_matches('/'));
    let arguments: Vec<String> = arguments.iter().map(|a| a.replace('@', url)).collect();
    let all: Vec<&str> = ["ls", "--pin", &pin]
        .into_iter()
        .chain(arguments.iter().map(String::as_str))
        .collect();
    let output = haul(server.served.path(), &all);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[test]
fn the_command_lists_as_ls_does() {
    let server = Serving::start(&[]);
    tree(server.served.path());
    let odd = std::ffi::OsStr::from_bytes(b"odd\x1b[2J\n\xff");
    write(&server.served.path().join(odd), b"odd");
    let f = std::fs::File::open(server.served.path().join("logs/a.gz")).unwrap();
    f.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000))
        .unwrap();
    std::fs::set_permissions(
        server.served.path().join("logs/a.gz"),
        PermissionsExt::from_mode(0o640),
    )
    .unwrap();

    let lines = |arguments: &[&str]| {
        let (code, said, told) = ls(&server, arguments);
        assert_eq!((code, &told[..]), (Some(0), ""), "{arguments:?}");
        said.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(
        lines(&["@/"]),
        ["a1", "a[1]", "logs/", "odd\\u{1b}[2J\\n\\xff", "out", "x/"]
    );
    assert_eq!(lines(&["-R", "@/x"]), ["1/", "1/log", "2/", "2/log"]);
    assert_eq!(
        lines(&["-l", "@/logs/a*"]),
        ["-rw-r-----             5  2001-09-09T01:46:40Z  logs/a.gz"]
    );
    assert!(
        lines(&["-l", "@"])
            .iter()
            .any(|line| line.starts_with("lrwxrwxrwx") && line.ends_with("  out -> /etc"))
    );
    let json = lines(&["--json", "@/od*"]);
    assert_eq!(json.len(), 1);
    assert!(
        json[0].contains(r#""bytes":3"#) && json[0].contains(r#""path_bytes":"b2RkG1sySgr/""#),
        "{json:?}"
    );

    let (code, said, told) = ls(&server, &["@/nowhere"]);
    assert_eq!(
        (code, &said[..], &told[..]),
        (
            Some(1),
            "",
            "haul: nowhere: no such file or directory; check the name\n"
        )
    );
    let (code, _, told) = ls(&server, &["here"]);
    assert_eq!(code, Some(2));
    assert!(told.contains("haul://HOST/PATH"), "{told}");
    let (code, said, _) = ls(&server, &["--json", "@/*.zip"]);
    assert_eq!(code, Some(1));
    assert!(
        said.starts_with(r#"{"type":"error""#) && said.contains("nothing matches"),
        "{said}"
    );
}

#[test]
fn a_closed_output_ends_a_listing_quietly() {
    let server = Serving::start(&[]);
    for i in 0..5_000 {
        write(
            &server
                .served
                .path()
                .join(format!("{i:05}-{}", "long".repeat(40))),
            b"",
        );
    }
    let home = tempdir().unwrap();
    std::fs::set_permissions(home.path(), PermissionsExt::from_mode(0o700)).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_haul"));
    command
        .args(["ls", "--pin", &server.key_id.to_string(), &server.url])
        .env("HAUL_HOME", home.path());
    command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut first = [0; 10];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
