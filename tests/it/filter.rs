//! Filters: the rules of .gitignore, compared with git itself, and as a user types them.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::command::{Serving, haul};
use crate::support::write;
use haul::internal::storage::walk::{Tree, Walk, WalkItem};
use haul::{Filter, Follow, Rules, WalkOptions};
use proptest::prelude::*;
use tempfile::{TempDir, tempdir};

/// A tree and the rules for it.
#[derive(Debug, Clone, Default)]
struct Case {
    files: Vec<Vec<u8>>,
    /// Rules as in --exclude and --include.
    rules: Vec<Vec<u8>>,
    /// The text of each .gitignore, by its directory.
    ignores: Vec<(Vec<u8>, Vec<u8>)>,
    /// The text of .git/info/exclude.
    info: Vec<u8>,
}

/// Runs git without any user's configuration; `None` if it is not installed.
fn git(directory: &Path) -> Option<Command> {
    let found = Command::new("git")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if found.is_err() {
        println!("skipped: git is not installed");
        return None;
    }
    let mut git = Command::new("git");
    git.current_dir(directory)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1");
    git.env("HOME", directory)
        .env_remove("GIT_DIR")
        .env_remove("XDG_CONFIG_HOME");
    Some(git)
}

impl Case {
    /// Writes the tree as a repository; names that cannot exist there are left out.
    fn lay(&self) -> TempDir {
        let root = tempdir().unwrap();
        let place = |name: &[u8]| root.path().join(OsStr::from_bytes(name));
        for file in &self.files {
            let place = place(file);
            if std::fs::create_dir_all(place.parent().unwrap()).is_ok() {
                let _ = std::fs::write(place, b"");
            }
        }
        for (directory, text) in &self.ignores {
            let directory = place(directory);
            if directory.is_dir() {
                std::fs::write(directory.join(".gitignore"), text).unwrap();
            }
        }
        if let Some(mut git) = git(root.path()) {
            assert!(
                git.args(["init", "-q", "--template="])
                    .status()
                    .unwrap()
                    .success()
            );
        }
        if !self.info.is_empty() {
            write(&root.path().join(".git/info/exclude"), &self.info);
        }
        root
    }

    /// Returns what haul would send of it, without .git.
    fn walked(&self, root: &Path) -> BTreeSet<Vec<u8>> {
        let filter = Filter {
            rules: Rules::new(self.rules.clone()).unwrap(),
            gitignore: true,
            only: None,
        };
        let (directories, _announced) = tokio::sync::mpsc::unbounded_channel();
        let options = WalkOptions {
            filter,
            ..WalkOptions::default()
        };
        let walk = Walk::new(
            vec![Tree::local(root, Follow::Never).unwrap()],
            options,
            directories,
        );
        let names = walk.filter_map(|found| match found {
            WalkItem::Entry(entry) => Some(entry.path.split_first().unwrap().1.as_bytes().to_vec()),
            WalkItem::Failed(path, why) | WalkItem::Omitted(path, why) => panic!("{path}: {why}"),
            WalkItem::Excluded(_) => None,
        });
        names.filter(|name| !name.starts_with(b".git/")).collect()
    }

    /// Returns what git would include of it.
    fn listed(&self, root: &Path) -> Option<BTreeSet<Vec<u8>>> {
        let mut git = git(root)?;
        git.args(["ls-files", "-o", "-z", "--exclude-standard"]);
        for rule in &self.rules {
            git.arg("--exclude").arg(OsStr::from_bytes(rule));
        }
        let output = git.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        Some(
            output
                .stdout
                .split(|&byte| byte == 0)
                .filter(|name| !name.is_empty())
                .map(<[u8]>::to_vec)
                .collect(),
        )
    }
}

/// Asserts that git and haul exclude exactly these names by rules in .gitignore files alone.
#[track_caller]
fn fixed(ignores: &[(&str, &[u8])], all: &[&[u8]], left_out: &[&[u8]]) {
    let bytes = |names: &[&[u8]]| names.iter().map(|name| name.to_vec()).collect::<Vec<_>>();
    let ignores = ignores
        .iter()
        .map(|(directory, text)| (directory.as_bytes().to_vec(), text.to_vec()))
        .collect();
    let case = Case {
        files: bytes(all),
        ignores,
        ..Case::default()
    };
    let root = case.lay();
    let walked = case.walked(root.path());
    let missing: BTreeSet<_> = case
        .files
        .iter()
        .filter(|file| !walked.contains(*file))
        .cloned()
        .collect();
    assert_eq!(missing, bytes(left_out).into_iter().collect());
    if let Some(listed) = case.listed(root.path()) {
        assert_eq!(walked, listed, "git has it otherwise");
    }
}

#[test]
fn two_stars_match_any_directories() {
    fixed(
        &[("", b"**/x")],
        &[b"x", b"a/x", b"a/b/x", b"ax"],
        &[b"x", b"a/x", b"a/b/x"],
    );
    fixed(
        &[("", b"a/**/b")],
        &[b"a/b", b"a/c/b", b"a/c/d/b", b"ab", b"c/a/b"],
        &[b"a/b", b"a/c/b", b"a/c/d/b"],
    );
    fixed(
        &[("", b"a/**")],
        &[b"a/b", b"a/c/d", b"c/a/b"],
        &[b"a/b", b"a/c/d"],
    );
    // Two stars that are not between slashes act as one star; but after the part without wildcards git starts over.
    fixed(&[("", b"b/?**/c")], &[b"b/xx/c", b"b/x/y/c"], &[b"b/xx/c"]);
    fixed(
        &[("", b"x/a**/b")],
        &[b"x/ac/b", b"x/ac/d/b"],
        &[b"x/ac/b", b"x/ac/d/b"],
    );
}

#[test]
fn slashes_anchor_and_mean_directories() {
    fixed(
        &[("", b"/a\nb/c\nd/")],
        &[b"a", b"e/a", b"b/c", b"e/b/c", b"e/d/f", b"g/d"],
        &[b"a", b"b/c", b"e/d/f"],
    );
    // Anchored at the directory of the .gitignore.
    fixed(&[("e", b"/a\n!f")], &[b"a", b"e/a", b"e/b/a"], &[b"e/a"]);
}

#[test]
fn the_last_rule_wins_and_the_nearest_file() {
    fixed(
        &[("", b"*.o\n!a.o"), ("b", b"a.o\n!c.o")],
        &[b"a.o", b"c.o", b"b/a.o", b"b/c.o"],
        &[b"c.o", b"b/a.o"],
    );
    // Files in an excluded directory cannot be included again.
    fixed(
        &[("", b"d/\n!d/a"), ("d", b"!a")],
        &[b"d/a", b"a"],
        &[b"d/a"],
    );
}

#[test]
fn escapes_spaces_comments_and_classes() {
    fixed(
        &[("", b"\\!a\n\\#b\n#c\nd \ne\\ \n\\*")],
        &[b"!a", b"#b", b"#c", b"d", b"d ", b"e ", b"e", b"*", b"f"],
        &[b"!a", b"#b", b"d", b"e ", b"*"],
    );
    fixed(
        &[("", b"[a-c]1\n[!a-y]2\n[]]3\n[[:digit:]]4\n[5")],
        &[b"b1", b"d1", b"z2", b"a2", b"]3", b"14", b"[5"],
        &[b"b1", b"z2", b"]3", b"14"],
    );
    fixed(
        &[("", b"A\n{b,c}")],
        &[b"a", b"A", b"b", b"{b,c}"],
        &[b"A", b"{b,c}"],
    );
    fixed(
        &[("", b"\xffa\n?b")],
        &[b"\xffa", b"\xc3\xa4b", b"\xfeb"],
        &[b"\xffa", b"\xfeb"],
    );
}

#[test]
fn a_repository_in_the_tree_has_its_own_rules() {
    let root = tempdir().unwrap();
    write(&root.path().join(".gitignore"), b"*.o\n");
    write(&root.path().join("a.o"), b"");
    write(&root.path().join("inner/.git/info/exclude"), b"b\nc\n");
    write(&root.path().join("inner/.gitignore"), b"!c\n");
    for name in ["a.o", "b", "c"] {
        write(&root.path().join("inner").join(name), b"");
    }
    let walked = Case::default().walked(root.path());
    let text: Vec<_> = walked
        .iter()
        .map(|name| String::from_utf8_lossy(name))
        .collect();
    assert_eq!(
        text,
        [
            ".gitignore",
            "inner/.git/info/exclude",
            "inner/.gitignore",
            "inner/a.o",
            "inner/c"
        ]
    );
}

fn join(parts: &'static [&'static [u8]], most: usize) -> impl Strategy<Value = Vec<u8>> {
    let part = proptest::sample::select(parts);
    proptest::collection::vec(part, 1..=most).prop_map(|parts| parts.concat())
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let parts: &[&[u8]] = &[
        b"a", b"b", b"ab", b"c", b"x.o", b" ", b"!", b"#", b"]", b"[", b"-", b"\\", b"*", b"\xff",
        b"\t", b"A", b"{a,b}",
    ];
    let name = join(parts, 2).prop_filter("no name", |name| name != b".");
    proptest::collection::vec(name, 1..=3).prop_map(|names| names.join(&b'/'))
}

fn rule() -> impl Strategy<Value = Vec<u8>> {
    let parts: &[&[u8]] = &[
        b"a",
        b"b",
        b"c",
        b"a",
        b"b",
        b"*",
        b"*",
        b"**",
        b"**",
        b"/",
        b"/",
        b"/",
        b"?",
        b"[ab]",
        b"[!a]",
        b"[",
        b"]",
        b"\\",
        b" ",
        b"!",
        b"#",
        b"x.o",
        b"[a-c",
        b"-]",
        b"[[:alpha:]",
        b"[:punct:]",
        b"[^]a]",
        b"\xff",
        b"{a,b}",
        b"\t",
        b"\r",
        b"[\\]-a]",
    ];
    (proptest::bool::weighted(0.2), join(parts, 6)).prop_map(|(negated, rule)| {
        if negated {
            [b"!", &rule[..]].concat()
        } else {
            rule
        }
    })
}

fn case() -> impl Strategy<Value = Case> {
    let rules = |most| proptest::collection::vec(rule(), 0..=most);
    let text = |most| rules(most).prop_map(|rules| rules.join(&b'\n'));
    let ignore = (name(), text(4));
    let files = proptest::collection::vec(name(), 1..20);
    (
        files,
        rules(2),
        text(4),
        proptest::collection::vec(ignore, 0..3),
        text(2),
    )
        .prop_map(|(files, rules, top, mut ignores, info)| {
            // Deeper ones go where a directory of a file is.
            for (at, (directory, _)) in ignores.iter_mut().enumerate() {
                let file = &files[at % files.len()];
                *directory =
                    file[..file.iter().position(|&byte| byte == b'/').unwrap_or(0)].to_vec();
            }
            ignores.retain(|(directory, _)| !directory.is_empty());
            ignores.push((Vec::new(), top));
            Case {
                files,
                rules,
                ignores,
                info,
            }
        })
}

/// The number of cases; `PROPTEST_CASES` sets it.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_rules_leave_out_what_git_leaves_out(case in case()) {
        let root = case.lay();
        if let Some(listed) = case.listed(root.path()) {
            let shown = |names: &BTreeSet<Vec<u8>>| names.iter().map(|name| haul::printable(name)).collect::<Vec<_>>();
            prop_assert_eq!(shown(&case.walked(root.path())), shown(&listed));
        }
    }
}

/// Makes a tree, and returns which files exist on the server after `haul cp OPTIONS src/ there`.
fn copied(names: &[&str], options: &[&str]) -> (Vec<String>, String) {
    let (from, server) = (tempdir().unwrap(), Serving::start(&[]));
    for name in names {
        write(&from.path().join("src").join(name), name.as_bytes());
    }
    let output = server.cp(from.path(), &[options, &["src"]].concat(), "there");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let listed = crate::support::listing(&server.served.path().join("there"));
    let files = listed
        .iter()
        .map(|line| line.split('"').nth(1).unwrap().to_owned());
    (files.collect(), said)
}

#[test]
fn the_order_of_options_is_the_order_of_rules() {
    let names = ["a.o", "b.o", "d/a.o", "d/c"];
    let (there, said) = copied(&names, &["-v", "--exclude", "*.o", "--include", "a.o"]);
    assert_eq!(there, ["a.o", "d", "d/a.o", "d/c"]);
    assert!(said.contains("1 excluded"), "{said}");
    let (there, said) = copied(
        &names,
        &["--include=a.o", "--exclude=*.o", "--exclude=/d/c"],
    );
    assert_eq!(there, ["d"]);
    assert!(!said.contains("excluded"), "{said}");
}

#[test]
fn rules_come_from_a_file_and_from_gitignore() {
    let rules = tempdir().unwrap();
    let file = rules.path().join("rules");
    std::fs::write(&file, "# what is built\n*.o\n!keep.o\n").unwrap();
    let names = ["a.o", "keep.o", "b", ".gitignore"];
    let (there, _) = copied(
        &names,
        &[
            "--exclude-from",
            file.to_str().unwrap(),
            "--include",
            "a.o",
            "--exclude",
            "b",
        ],
    );
    assert_eq!(there, [".gitignore", "a.o", "keep.o"]);
    let from = tempdir().unwrap();
    write(&from.path().join("src/.gitignore"), b"b\n");
    write(&from.path().join("src/b"), b"");
    let server = Serving::start(&[]);
    assert!(
        server
            .cp(from.path(), &["--gitignore", "src"], "one")
            .status
            .success()
    );
    assert!(server.cp(from.path(), &["src"], "two").status.success());
    assert!(
        !server.served.path().join("one/b").exists() && server.served.path().join("two/b").exists()
    );
}

#[test]
fn rules_apply_to_named_files_and_not_to_named_directories() {
    let (from, server) = (tempdir().unwrap(), Serving::start(&[]));
    for name in ["a.o", "b.c", "d.o/x"] {
        write(&from.path().join(name), b"");
    }
    assert!(
        server
            .cp(
                from.path(),
                &["--exclude", "*.o", "a.o", "b.c", "d.o"],
                "to/"
            )
            .status
            .success()
    );
    let there: Vec<_> = crate::support::listing(&server.served.path().join("to"));
    assert_eq!(there.len(), 3, "{there:?}");
    assert!(
        server.served.path().join("to/d.o/x").exists()
            && server.served.path().join("to/b.c").exists()
    );
}

#[test]
fn only_listed_names_and_their_parent_directories_are_sent() {
    let (from, server) = (tempdir().unwrap(), Serving::start(&[]));
    for name in ["a/b/c", "a/b/d", "e/f", "g/h", "i"] {
        write(&from.path().join("src").join(name), name.as_bytes());
    }
    std::fs::write(from.path().join("list"), "a/b/c\n/e\n\n# no\n").unwrap();
    let names = |into: &str| -> Vec<String> {
        let listed = crate::support::listing(&server.served.path().join(into));
        listed
            .iter()
            .map(|line| line.split('"').nth(1).unwrap().to_owned())
            .collect()
    };
    assert!(
        server
            .cp(from.path(), &["--files-from", "list", "src"], "one")
            .status
            .success()
    );
    assert_eq!(names("one"), ["a", "a/b", "a/b/c", "e"]);
    assert!(
        server
            .cp(from.path(), &["-r", "--files-from", "list", "src"], "two")
            .status
            .success()
    );
    assert_eq!(names("two"), ["a", "a/b", "a/b/c", "e", "e/f"]);
    std::fs::write(from.path().join("list"), b"i\0\0#\n\0").unwrap();
    let output = server.cp(from.path(), &["-0", "--files-from", "list", "src"], "three");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(1) && said.contains("src/#\\n: listed, but it does not exist"),
        "{said}"
    );
    assert_eq!(names("three"), ["i"]);
}

#[test]
fn a_list_that_leads_outside_is_refused_before_sending() {
    let from = tempdir().unwrap();
    write(&from.path().join("src/a"), b"");
    std::fs::write(from.path().join("list"), "a\n../b\n").unwrap();
    let run = |arguments: &[&str]| {
        let output = haul(
            from.path(),
            &[&["cp"], arguments, &["haul://127.0.0.1:9/"]].concat(),
        );
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(run(&["--files-from", "list", "src"]).contains("../b"));
    assert!(run(&["--files-from", "list", "src", "list"]).contains("only source"));
    assert!(run(&["--exclude-from", "none", "src"]).contains("cannot read none"));
}

#[test]
fn an_invalid_gitignore_keeps_its_directory_out() {
    let (from, server) = (tempdir().unwrap(), Serving::start(&[]));
    write(
        &from.path().join("src/a/.gitignore"),
        &vec![b'x'; 300 << 10],
    );
    write(&from.path().join("src/a/secret"), b"");
    write(&from.path().join("src/b"), b"");
    let output = server.cp(from.path(), &["--gitignore", "src"], "there");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(1) && said.contains("nothing in src/a was sent"),
        "{said}"
    );
    assert!(
        server.served.path().join("there/b").exists()
            && !server.served.path().join("there/a/secret").exists()
    );
    // As in git, a .gitignore that is a link is not followed.
    std::fs::remove_file(from.path().join("src/a/.gitignore")).unwrap();
    std::os::unix::fs::symlink("../b", from.path().join("src/a/.gitignore")).unwrap();
    assert!(
        server
            .cp(from.path(), &["--gitignore", "src"], "there")
            .status
            .success()
    );
    assert!(server.served.path().join("there/a/secret").exists());
}

#[test]
fn a_server_does_not_send_what_a_pull_excludes() {
    let (here, server) = (tempdir().unwrap(), Serving::start(&[]));
    for name in ["a.o", "keep.o", "b", "d/b", "d/c"] {
        write(
            &server.served.path().join("src").join(name),
            name.as_bytes(),
        );
    }
    write(&server.served.path().join("src/d/.gitignore"), b"/c\n");
    let pull = |options: &[&str], into: &str| {
        let (source, pin) = (format!("{}src", server.url), server.key_id.to_string());
        let output = haul(
            here.path(),
            &[&["cp", "--pin", &pin], options, &[&source, into]].concat(),
        );
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let listed = crate::support::listing(&here.path().join(into));
        listed
            .iter()
            .map(|line| line.split('"').nth(1).unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let got = pull(
        &[
            "--gitignore",
            "--exclude",
            "*.o",
            "--include",
            "keep.o",
            "--exclude",
            "/b",
        ],
        "one",
    );
    assert_eq!(got, ["d", "d/.gitignore", "d/b", "keep.o"]);
    // As many as a server accepts, and no more.
    let many = vec!["--exclude=none"; 1025];
    let source = format!("{}src", server.url);
    let pin = server.key_id.to_string();
    let output = haul(
        here.path(),
        &[&["cp", "--pin", &pin][..], &many, &[&source, "two"]].concat(),
    );
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(pull(&many[..1024], "three").len(), 7);
}
