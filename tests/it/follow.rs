//! `--follow`: symbolic links are sent as their targets.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Output;

use crate::support::command::Serving;
use crate::support::{listing, write};
use tempfile::tempdir;

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn names(root: &Path) -> Vec<String> {
    listing(root)
        .iter()
        .map(|line| {
            line.split(['"', ' '])
                .filter(|word| !word.is_empty())
                .take(2)
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect()
}

#[test]
fn links_are_sent_as_their_targets() {
    let (from, server) = (tempdir().unwrap(), Serving::start(&[]));
    write(&from.path().join("elsewhere/d/f"), b"far");
    write(&from.path().join("src/x"), b"near");
    let link =
        |target: &Path, name: &str| symlink(target, from.path().join("src").join(name)).unwrap();
    link(Path::new("x"), "relative");
    link(&from.path().join("elsewhere/d"), "absolute");
    link(Path::new("../elsewhere/d/../d/f"), "file");
    link(Path::new("absolute/f"), "through");
    assert!(
        server
            .cp(from.path(), &["--follow", "src"], "there")
            .status
            .success()
    );
    let there = names(&server.served.path().join("there"));
    assert_eq!(
        there,
        [
            "absolute directory",
            "absolute/f file",
            "file file",
            "relative file",
            "through file",
            "x file"
        ]
    );
    assert_eq!(
        std::fs::read(server.served.path().join("there/through")).unwrap(),
        b"far"
    );
    // A second run has nothing to do.
    let again = server.cp(from.path(), &["-L", "src"], "there");
    assert!(said(&again).contains("nothing to do"), "{}", said(&again));
    // Without the option they stay links.
    assert!(server.cp(from.path(), &["src"], "links").status.success());
    assert!(names(&server.served.path().join("links")).contains(&"file link".to_owned()));
}

#[test]
fn a_loop_is_reported_and_the_rest_is_sent() {
    let (from, server) = (tempdir().unwrap(), Serving::start(&[]));
    write(&from.path().join("src/a/f"), b"f");
    write(&from.path().join("beside"), b"");
    symlink("..", from.path().join("src/a/up")).unwrap();
    symlink("../..", from.path().join("src/a/out")).unwrap();
    symlink("self", from.path().join("src/self")).unwrap();
    let output = server.cp(from.path(), &["--follow", "src"], "there");
    assert_eq!(output.status.code(), Some(1));
    let (said, there) = (said(&output), names(&server.served.path().join("there")));
    for name in ["src/a/up", "src/a/out/src", "src/self"] {
        let lines: Vec<_> = said
            .lines()
            .filter(|line| line.starts_with(&format!("haul: {name}: a loop")))
            .collect();
        assert_eq!(lines.len(), 1, "{name}\n{said}");
    }
    assert_eq!(
        there,
        [
            "a directory",
            "a/f file",
            "a/out directory",
            "a/out/beside file"
        ]
    );
}

#[test]
fn only_dangling_links_that_are_not_excluded_fail() {
    let (from, server) = (tempdir().unwrap(), Serving::start(&[]));
    write(&from.path().join("src/d/f"), b"f");
    symlink("no\nwhere", from.path().join("src/dangling")).unwrap();
    symlink("d", from.path().join("src/to_d")).unwrap();
    let output = server.cp(from.path(), &["--follow", "src"], "one");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said(&output).contains("src/dangling: it points to no\\nwhere, which does not exist"),
        "{}",
        said(&output)
    );
    // A rule for directories applies to a link that is sent as one, and to its content.
    let output = server.cp(
        from.path(),
        &[
            "--follow",
            "--exclude",
            "dangling",
            "--exclude",
            "to_d/",
            "src",
        ],
        "two",
    );
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(
        names(&server.served.path().join("two")),
        ["d directory", "d/f file"]
    );
    let output = server.cp(
        from.path(),
        &[
            "--follow",
            "--exclude",
            "dangling",
            "--exclude",
            "/to_d/f",
            "src",
        ],
        "three",
    );
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(
        names(&server.served.path().join("three")),
        ["d directory", "d/f file", "to_d directory"]
    );
}

#[test]
fn a_server_follows_no_link_out_of_its_served_directory() {
    let (here, outside, server) = (tempdir().unwrap(), tempdir().unwrap(), Serving::start(&[]));
    write(&outside.path().join("secret"), b"secret");
    let served = server.served.path();
    write(&served.join("beside/f"), b"f");
    write(&served.join("src/x"), b"x");
    let link = |target: &Path, name: &str| symlink(target, served.join("src").join(name)).unwrap();
    link(Path::new("../beside"), "inside");
    link(&outside.path().join("secret"), "absolute");
    let up: std::path::PathBuf = std::iter::repeat_n("..", 40).collect();
    link(
        &up.join(outside.path().strip_prefix("/").unwrap())
            .join("secret"),
        "up",
    );
    link(&outside.path().join("secret"), "../stairs");
    link(Path::new("../stairs"), "by_another");
    let (source, pin) = (format!("{}src", server.url), server.key_id.to_string());
    let output = crate::support::command::haul(
        here.path(),
        &["cp", "--pin", &pin, "--follow", &source, "got"],
    );
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(
        said.matches("leads out of the served directory").count(),
        3,
        "{said}"
    );
    assert_eq!(
        names(&here.path().join("got")),
        ["inside directory", "inside/f file", "x file"]
    );
}
