//! The layers of the library: each room uses only those above it in ARCHITECTURE.md, the library prints nothing, and it
//! uses no crate of the binary. The test reads tokens and not lines, so words in comments and strings do not count. Circles
//! of files are in `layering/circles.rs`.

mod circles;

use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// The library's rooms. Each may use those before it.
const ROOMS: &[&str] = &[
    "error",
    "protocol",
    "congestion",
    "storage",
    "config",
    "auth",
    "net",
    "transfer",
    "relay",
    "bench",
    "server",
    "client",
    "pairing",
];
/// The binary's rooms. They use the library as any other program does, by `haul::`, and each other by `crate::`.
const BINARY: &[&str] = &["main", "cli"];
/// Crates that only the binary may use.
const FOREIGN: &[&str] = &[
    "anyhow",
    "clap",
    "console",
    "if_addrs",
    "indicatif",
    "rustyline",
    "serde_json",
    "tracing_subscriber",
];
/// Macros that print. `write!` to a standard stream needs a handle from `stdout()` or `stderr()`: see [`HANDLES`].
const PRINTING: &[&str] = &["print", "println", "eprint", "eprintln", "dbg"];
const HANDLES: &[&str] = &["stdout", "stderr"];

/// The location of a file.
struct Place<'a> {
    /// Relative to src/: receiver/body.rs.
    name: &'a str,
    /// The file or directory right below src/ that it belongs to: receiver.
    room: &'a str,
}

impl<'a> Place<'a> {
    fn of(name: &'a str) -> Self {
        Self {
            name,
            room: name.split(['/', '.']).next().unwrap_or_default(),
        }
    }

    fn may_print(&self) -> bool {
        self.name == "cli/output.rs" || self.name.starts_with("cli/output/")
    }

    /// How many `super` lead from the file to the crate's root.
    fn depth(&self) -> usize {
        self.name.split('/').count()
    }
}

/// The names that the code of one file uses, apart from its tests.
#[derive(Default)]
struct Named {
    /// The name after `crate::`, or after as many `super::` as lead to the crate's root.
    rooms: Vec<String>,
    /// Every identifier; a macro's ends in `!`.
    words: Vec<String>,
}

fn is(token: Option<&TokenTree>, punctuation: char) -> bool {
    matches!(token, Some(TokenTree::Punct(p)) if p.as_char() == punctuation)
}

fn word(token: Option<&TokenTree>) -> Option<String> {
    if let Some(TokenTree::Ident(ident)) = token {
        Some(ident.to_string())
    } else {
        None
    }
}

/// Whether the next tokens are `#[cfg(test)]`.
fn is_test(here: &[TokenTree]) -> bool {
    is(here.first(), '#')
        && matches!(here.get(1), Some(TokenTree::Group(group)) if group.to_string().replace(' ', "") == "[cfg(test)]")
}

/// Skips the next item: up to its block or its semicolon.
fn item(here: &[TokenTree]) -> usize {
    let ends = |token: &TokenTree| {
        is(Some(token), ';')
            || matches!(token, TokenTree::Group(group) if group.delimiter() == Delimiter::Brace)
    };
    here.iter().position(ends).map_or(here.len(), |end| end + 1)
}

impl Named {
    fn of(source: &str, depth: usize) -> Result<Self, String> {
        let mut named = Self::default();
        let tokens: TokenStream = source
            .parse()
            .map_err(|e| format!("is no Rust that this test can read: {e}"))?;
        named.read(tokens, depth);
        Ok(named)
    }

    fn read(&mut self, tokens: TokenStream, depth: usize) {
        let tokens: Vec<_> = tokens.into_iter().collect();
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            if is_test(&tokens[at..]) {
                at += item(&tokens[at..]);
                continue;
            }
            at += 1;
            match token {
                TokenTree::Group(group) => {
                    let inline_module =
                        at >= 3 && word(tokens.get(at - 3)).is_some_and(|word| word == "mod");
                    self.read(group.stream(), depth + usize::from(inline_module));
                }
                TokenTree::Ident(ident) if ident == "crate" => self.path(&tokens[at..]),
                TokenTree::Ident(ident) if ident == "super" => {
                    let follows = |n: &usize| {
                        word(tokens.get(at - 1 + 3 * n)).is_some_and(|word| word == "super")
                    };
                    let supers = (0..).take_while(follows).count();
                    at += 3 * (supers - 1);
                    if supers >= depth {
                        self.path(&tokens[at..]);
                    }
                }
                TokenTree::Ident(ident) => {
                    self.words.push(format!(
                        "{ident}{}",
                        if is(tokens.get(at), '!') { "!" } else { "" }
                    ));
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
        }
    }

    /// Records what a path from the crate's root leads to; a `pub(crate)` leads nowhere.
    fn path(&mut self, rest: &[TokenTree]) {
        if !is(rest.first(), ':') {
            return;
        }
        match rest.get(2) {
            Some(TokenTree::Group(group)) => {
                let group: Vec<_> = group.stream().into_iter().collect();
                self.rooms
                    .extend(group.split(|token| is(Some(token), ',')).filter_map(first));
            }
            _ => self.rooms.extend(first(&rest[2..])),
        }
    }
}

/// The name that a path begins with. A glob counts as one too, since it would admit every room.
fn first(path: &[TokenTree]) -> Option<String> {
    path.first().map(ToString::to_string)
}

/// All faults of a file, given its path below src/.
fn faults(name: &str, source: &str) -> Vec<String> {
    let place = Place::of(name);
    let named = match Named::of(source, place.depth()) {
        Ok(named) => named,
        Err(fault) => return vec![format!("src/{name} {fault}")],
    };
    let above = match ROOMS.iter().position(|room| *room == place.room) {
        Some(level) => &ROOMS[..=level],
        None if BINARY.contains(&place.room) => BINARY,
        None => {
            return vec![format!(
                "src/{name} is in no room: add {} to ROOMS in tests/it/layering.rs, below all that it uses, and to the \
                 list of rooms in ARCHITECTURE.md",
                place.room
            )];
        }
    };
    let mut faults = Vec::new();
    for room in named
        .rooms
        .iter()
        .filter(|room| !above.contains(&room.as_str()))
    {
        faults.push(if ROOMS.contains(&room.as_str()) {
            format!(
                "src/{name} uses {room}, which does not stand above {} in ROOMS",
                place.room
            )
        } else {
            format!(
                "src/{name} uses crate::{room}, which is no room: name the room that it comes from"
            )
        });
    }
    let library = ROOMS.contains(&place.room);
    for word in &named.words {
        let (word, called) = word
            .strip_suffix('!')
            .map_or((word.as_str(), false), |word| (word, true));
        if library && FOREIGN.contains(&word) {
            faults.push(format!(
                "src/{name} uses {word}, which is the binary's alone"
            ));
        }
        // main sends the log to standard error.
        let handle = place.room != "main" && HANDLES.contains(&word);
        if !place.may_print() && (handle || called && PRINTING.contains(&word)) {
            faults.push(format!(
                "src/{name} prints by {word}: only src/cli/output.rs does that"
            ));
        }
    }
    faults
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// A file of the library or the binary.
struct SourceFile {
    /// Relative to src/.
    name: String,
    text: String,
}

/// All files in src/. A module of tests may use anything, also in a file of its own.
fn source_files() -> Vec<SourceFile> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = rust_files(&src).into_iter().map(|path| SourceFile {
        name: path.strip_prefix(&src).unwrap().to_str().unwrap().into(),
        text: std::fs::read_to_string(&path).unwrap(),
    });
    let is_test = |file: &SourceFile| file.name.split(['/', '.']).any(|part| part == "tests");
    files.filter(|file| !is_test(file)).collect()
}

#[test]
fn each_room_uses_only_rooms_above_it() {
    let mut found = Vec::new();
    for file in source_files() {
        // lib.rs only lists the rooms.
        if file.name != "lib.rs" {
            found.extend(faults(&file.name, &file.text));
        }
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn every_listed_room_exists() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for room in ROOMS {
        assert!(
            src.join(room).with_extension("rs").is_file(),
            "{room} is in ROOMS but not in src: take it off"
        );
    }
}

/// Text from a peer is a `PeerText` from the moment it is decoded, so that it cannot be printed unescaped.
#[test]
fn every_text_of_a_message_is_peer_text() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    for path in rust_files(&src.join("protocol")) {
        let source = std::fs::read_to_string(&path).unwrap();
        let mut lines = source.lines().peekable();
        while let Some(line) = lines.next() {
            let field =
                line.trim_start().starts_with("#[n(") || line.trim_start().starts_with("#[cbor(n(");
            if field && lines.peek().is_some_and(|next| next.contains("String")) {
                found.push(format!(
                    "{}: {}",
                    path.display(),
                    lines.peek().unwrap().trim()
                ));
            }
        }
    }
    assert!(
        found.is_empty(),
        "make these a PeerText:\n{}",
        found.join("\n")
    );
}

/// The only fault of a source.
#[track_caller]
fn fault(name: &str, source: &str) -> String {
    let found = faults(name, source);
    assert_eq!(found.len(), 1, "{found:?}");
    found.into_iter().next().unwrap()
}

#[track_caller]
fn sound(name: &str, source: &str) {
    assert_eq!(faults(name, source), Vec::<String>::new());
}

#[test]
fn a_room_below_is_found_however_it_is_named() {
    sound(
        "protocol.rs",
        "use crate::error::Reason; use crate::{error::{Code, Reason}, protocol};",
    );
    assert!(fault("protocol.rs", "use crate::server::Server;").contains("uses server"));
    assert!(
        fault("protocol.rs", "use crate::{error::{Code, Reason}, client};").contains("uses client")
    );
    assert!(fault("transfer.rs", "fn f() { [crate::client::f()] }").contains("uses client"));
    assert!(
        fault(
            "transfer.rs",
            "macro_rules! m { () => { $crate::client::f() } }"
        )
        .contains("uses client")
    );
    assert!(
        fault("transfer/receive/decide.rs", "use crate::server::Server;")
            .contains("above transfer")
    );
    assert!(fault("storage.rs", "use super::server;").contains("uses server"));
    assert!(fault("storage/local.rs", "use super::super::server;").contains("uses server"));
    assert!(fault("storage.rs", "mod inner { use super::super::server; }").contains("uses server"));
    sound("storage/local.rs", "use super::server;");
    sound(
        "storage.rs",
        "pub(crate) mod inner { pub(super) use super::server; }",
    );
}

#[test]
fn a_hidden_room_is_found() {
    assert!(fault("protocol.rs", "use crate::Server;").contains("no room"));
    assert!(fault("protocol.rs", "use crate::*;").contains("no room"));
}

#[test]
fn comments_strings_and_tests_are_ignored() {
    sound(
        "error.rs",
        "/// See [`crate::client`].\nfn f() {} // crate::client /*",
    );
    sound("error.rs", "/* /* crate::client */ println!() */");
    sound(
        "error.rs",
        r##"const A: (char, &str, &str) = ('"', "\" // crate::client", r#" " println!() "#);"##,
    );
    sound(
        "error.rs",
        "#[cfg(test)]\nmod tests { use crate::client; fn f() { println!() } }",
    );
    sound("error.rs", "#[cfg(test)]\nmod tests;");
    assert!(
        fault(
            "error.rs",
            "#[cfg(test)]\nmod tests { use crate::client; } use crate::server;"
        )
        .contains("server")
    );
    assert!(
        fault("error.rs", "#[cfg(test)]\nuse a::{B}; use crate::server;").contains("uses server")
    );
    assert!(
        fault("error.rs", "const A: &str = \"//\"; use crate::server;").contains("uses server")
    );
}

#[test]
fn only_one_file_prints() {
    for call in [
        "print!()",
        "println!()",
        "eprint!()",
        "eprintln!()",
        "dbg!()",
        "std::io::stdout()",
    ] {
        let source = format!("fn f() {{ {call} }}");
        assert!(
            fault("storage/local.rs", &source).contains("prints by"),
            "{call}"
        );
        sound("cli/output.rs", &source);
        sound("cli/output/terminal.rs", &source);
    }
    assert!(fault("cli/cp.rs", "fn f() { println!() }").contains("prints by println"));
    assert!(fault("cli/cp.rs", "fn f() { std::io::stderr() }").contains("prints by stderr"));
    assert!(fault("main.rs", "fn main() { eprintln!() }").contains("prints by eprintln"));
    sound("protocol/path.rs", "fn print() {}");
}

#[test]
fn the_library_uses_no_crate_of_the_binary() {
    for krate in FOREIGN {
        assert!(fault("error.rs", &format!("use {krate}::x;")).contains("binary's alone"));
        sound("cli/cp.rs", &format!("use {krate}::x;"));
    }
    assert!(fault("error.rs", "fn f() { anyhow!(1) }").contains("binary's alone"));
}

#[test]
fn the_binary_uses_the_library_by_its_name() {
    sound(
        "cli/cp.rs",
        "use crate::cli::output; use super::output; use super::super::cli; use haul::Client;",
    );
    sound("main.rs", "mod cli; use cli::run;");
    assert!(fault("cli/cp.rs", "use crate::client::Client;").contains("uses client"));
}

#[test]
fn an_unlisted_file_is_reported() {
    let told = fault("attic/box.rs", "");
    assert!(
        told.contains("add attic to ROOMS") && told.contains("ARCHITECTURE"),
        "{told}"
    );
}
