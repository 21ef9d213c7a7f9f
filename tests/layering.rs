//! The rooms of the house: each uses only those above it, and printing has one place.

use std::path::{Path, PathBuf};

/// The library's rooms, from the ground up. A new file goes here, and into lib.rs's list, where it belongs.
const ROOMS: &[&str] = &[
    "path", "error", "wire", "progress", "config", "target", "limits", "budget", "identity", "trust", "endpoint",
    "stream", "store", "manifest", "sender", "receiver", "session", "server", "client",
];
/// What a library must not know.
const FOREIGN: &[&str] = &["clap", "anyhow", "indicatif", "console", "serde_json", "tracing_subscriber"];
const PRINTING: &[&str] = &["println!", "eprintln!", "print!", "eprint!", "dbg!", "stdout()", "stderr()"];
/// The only file of the binary that prints, and what draws for it.
const PRINTS: &[&str] = &["src/cli/output.rs", "src/cli/output/terminal.rs"];
/// The log goes to standard error from main.
const LOGS: &str = "src/main.rs";

/// The code of a file: without comments, strings and what follows `#[cfg(test)]`, which stands last in our files.
fn code(source: &str) -> String {
    let source = source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let without_comments: String =
        source.lines().map(|line| line.split("//").next().unwrap_or_default().to_owned() + "\n").collect();
    without_comments.split('"').step_by(2).collect::<Vec<_>>().join("\"\"")
}

/// The rooms that a file names by `crate::`.
fn uses(code: &str) -> Vec<String> {
    let mut rooms = Vec::new();
    for rest in code.split("crate::").skip(1) {
        let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 1;
            let mut start = true;
            for (at, c) in group.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 1 => break,
                    '}' => depth -= 1,
                    ',' if depth == 1 => start = true,
                    c if start && c.is_alphabetic() => {
                        rooms.push(word(&group[at..]));
                        start = false;
                    }
                    _ => {}
                }
            }
        } else {
            rooms.push(word(rest));
        }
    }
    rooms
}

/// What is wrong with one file of the library.
fn faults(room: &str, source: &str) -> Vec<String> {
    let code = code(source);
    let Some(level) = ROOMS.iter().position(|r| *r == room) else {
        return vec![format!(
            "{room} is no room yet: add it to ROOMS in tests/layering.rs and to lib.rs, where it belongs"
        )];
    };
    let above = uses(&code).into_iter().filter(|used| {
        used.chars().next().is_some_and(char::is_lowercase) && !ROOMS[..=level].contains(&used.as_str())
    });
    let mut faults: Vec<_> = above.map(|used| format!("{room} uses {used}, which does not stand above it")).collect();
    faults.extend(FOREIGN.iter().filter(|f| code.contains(&format!("{f}::"))).map(|f| format!("{room} knows {f}")));
    faults.extend(PRINTING.iter().filter(|p| code.contains(*p)).map(|p| format!("{room} prints: {p}")));
    faults
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files
}

#[test]
fn each_room_uses_only_those_above_it_and_the_library_never_prints() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for path in rust_files(&root.join("src")) {
        let name = path.strip_prefix(root).unwrap().to_str().unwrap();
        let room = name["src/".len()..].split(['/', '.']).next().unwrap();
        let source = std::fs::read_to_string(&path).unwrap();
        // Tests in files of their own may use anything.
        if matches!(room, "lib") || name.ends_with("/tests.rs") {
            continue;
        }
        if matches!(room, "main" | "cli") {
            let code = code(&source);
            if !PRINTS.contains(&name) && name != LOGS {
                found.extend(PRINTING.iter().filter(|p| code.contains(*p)).map(|p| format!("{name} prints: {p}")));
            }
        } else {
            found.extend(faults(room, &source).into_iter().map(|fault| format!("{name}: {fault}")));
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_fault_is_found() {
    assert_eq!(faults("wire", "use crate::error::Why; // crate::server"), Vec::<String>::new());
    assert_eq!(faults("wire", "use crate::server::Server;").len(), 1);
    assert_eq!(faults("wire", "use crate::{error::{Code, Why}, client};").len(), 1);
    assert_eq!(faults("session", "fn f() { let x = \"crate::client\"; crate::client::f() }").len(), 1);
    assert_eq!(faults("error", "fn f() { println!() }").len(), 1);
    assert_eq!(faults("error", "use anyhow::bail;").len(), 1);
    assert_eq!(faults("attic", "").len(), 1);
    assert!(faults("error", "#[cfg(test)]\nmod tests { use crate::client; }").is_empty());
}
