//! No file uses a file that uses it, directly or through others: so each can be read after the files below it.
//!
//! Re-exports do not count: a parent may offer what its children hold, and the children may use the parent then.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::{SourceFile, is, is_test, item, source_files, word};

/// The path of a module below the crate's root: `["transfer", "send"]`.
type Module = Vec<String>;

/// The module that a file holds, given its path below src/; `None` for a crate's root.
fn module_of(name: &str) -> Option<Module> {
    let path = name.strip_suffix(".rs").unwrap_or(name);
    let is_root = path == "lib" || path == "main";
    (!is_root).then(|| path.split('/').map(str::to_owned).collect())
}

/// The paths in the code of one module, apart from re-exports and tests.
struct Paths<'a> {
    /// The modules that have a file of their own.
    modules: &'a BTreeSet<Module>,
    /// The modules that the paths lead to, with the path in the code.
    found: BTreeMap<Module, String>,
}

impl Paths<'_> {
    fn read(&mut self, module: &Module, tokens: TokenStream) {
        let tokens: Vec<_> = tokens.into_iter().collect();
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            let here = &tokens[at..];
            if is_test(here) || is_reexport(here) {
                at += item(here);
                continue;
            }
            at += 1;
            match token {
                TokenTree::Group(group) => self.read(module, group.stream()),
                TokenTree::Ident(ident) if ident == "use" && !is(here.get(1), '<') => {
                    let end = here.iter().position(|token| is(Some(token), ';'));
                    let end = end.unwrap_or(here.len());
                    self.tree(module, &mut Vec::new(), &here[1..end]);
                    at += end;
                }
                TokenTree::Ident(ident) if ident == "pub" => {
                    // The scope of `pub(in crate::net)` is no use.
                    at += usize::from(matches!(here.get(1), Some(TokenTree::Group(_))));
                }
                TokenTree::Ident(ident) if ident == "mod" => {
                    let Some(TokenTree::Group(body)) = here.get(2) else {
                        continue;
                    };
                    let inner = here[1].to_string();
                    self.read(&extended(module, [inner]), body.stream());
                    at += 2;
                }
                TokenTree::Ident(_) => {
                    let path = segments(here);
                    let before = at.checked_sub(2).and_then(|before| tokens.get(before));
                    if path.len() > 1 && !is(before, ':') && !is(before, '.') {
                        self.add(module, &path);
                    }
                    at += 3 * (path.len() - 1);
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
        }
    }

    /// Reads the tree of a `use`: a path, which may end in a group of trees.
    fn tree(&mut self, module: &Module, prefix: &mut Module, tree: &[TokenTree]) {
        let path = segments(tree);
        let length = prefix.len();
        let after = 3 * path.len();
        prefix.extend(path);
        match tree.get(after) {
            Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                let trees: Vec<_> = group.stream().into_iter().collect();
                for tree in trees.split(|token| is(Some(token), ',')) {
                    self.tree(module, prefix, tree);
                }
            }
            _ => self.add(module, prefix),
        }
        prefix.truncate(length);
    }

    /// Adds the module that a path leads to, if it begins in this crate.
    fn add(&mut self, module: &Module, path: &[String]) {
        let mut base = module.clone();
        let mut rest = path;
        while let Some(first) = rest.first() {
            match first.as_str() {
                "crate" => base.clear(),
                "super" => {
                    base.pop();
                }
                "self" => {}
                _ => break,
            }
            rest = &rest[1..];
        }
        let mut to = extended(&base, rest.iter().cloned());
        if rest.len() == path.len() {
            // A name that is no keyword is a child's, or another crate's.
            let is_child = path
                .first()
                .is_some_and(|child| self.modules.contains(&extended(module, [child.clone()])));
            if !is_child {
                return;
            }
        }
        while !to.is_empty() && !self.modules.contains(&to) {
            to.pop();
        }
        if !to.is_empty() {
            self.found.entry(to).or_insert_with(|| path.join("::"));
        }
    }
}

fn extended(module: &Module, rest: impl IntoIterator<Item = String>) -> Module {
    module.iter().cloned().chain(rest).collect()
}

/// The names of a path at the beginning of these tokens.
fn segments(tokens: &[TokenTree]) -> Vec<String> {
    let mut path = Vec::new();
    for step in tokens.chunks(3) {
        let Some(name) = word(step.first()) else {
            break;
        };
        path.push(name);
        if !(is(step.get(1), ':') && is(step.get(2), ':')) {
            break;
        }
    }
    path
}

/// Whether the next tokens are `pub use` or `pub(...) use`.
fn is_reexport(here: &[TokenTree]) -> bool {
    let is_pub = word(here.first()).is_some_and(|word| word == "pub");
    let is_use = |at| word(here.get(at)).is_some_and(|word| word == "use");
    let is_scoped = matches!(here.get(1), Some(TokenTree::Group(_)));
    is_pub && (is_use(1) || is_scoped && is_use(2))
}

/// The modules that each module uses, with the path by which it does.
type Uses = BTreeMap<Module, BTreeMap<Module, String>>;

fn uses(files: &[SourceFile]) -> Uses {
    let modules = files
        .iter()
        .filter_map(|file| module_of(&file.name))
        .collect();
    let mut uses = Uses::new();
    for SourceFile { name, text } in files {
        let Some(module) = module_of(name) else {
            continue;
        };
        let tokens = text
            .parse::<TokenStream>()
            .unwrap_or_else(|e| panic!("src/{name} is no Rust that this test can read: {e}"));
        let mut paths = Paths {
            modules: &modules,
            found: BTreeMap::new(),
        };
        paths.read(&module, tokens);
        paths.found.remove(&module);
        uses.insert(module, paths.found);
    }
    uses
}

/// The modules that a module uses, directly or through others.
fn reach<'a>(uses: &'a Uses, from: &Module) -> BTreeSet<&'a Module> {
    let mut reached = BTreeSet::new();
    let mut waiting: Vec<_> = uses[from].keys().collect();
    while let Some(module) = waiting.pop() {
        if reached.insert(module) {
            waiting.extend(uses[module].keys());
        }
    }
    reached
}

/// The circles, each as lines `file -> file (path)`.
fn circles(files: &[SourceFile]) -> Vec<String> {
    let uses = uses(files);
    let reached: BTreeMap<_, _> = uses.keys().map(|from| (from, reach(&uses, from))).collect();
    let mut seen = BTreeSet::new();
    let mut circles = Vec::new();
    for (from, reachable) in &reached {
        if !reachable.contains(from) || seen.contains(from) {
            continue;
        }
        let circle: BTreeSet<_> = reachable
            .iter()
            .copied()
            .filter(|other| reached[other].contains(from))
            .collect();
        let mut lines = vec![format!("a circle of {} files:", circle.len())];
        for module in &circle {
            for (to, path) in uses[*module].iter().filter(|(to, _)| circle.contains(to)) {
                lines.push(format!(
                    "  {} -> {} ({path})",
                    module.join("/"),
                    to.join("/")
                ));
            }
        }
        seen.extend(circle);
        circles.push(lines.join("\n"));
    }
    circles
}

#[test]
fn no_file_uses_a_file_that_uses_it() {
    let found = circles(&source_files());
    assert!(
        found.is_empty(),
        "move what both files need into a file below both:\n{}",
        found.join("\n")
    );
}

fn circles_of(files: &[(&str, &str)]) -> Vec<String> {
    let files = files.iter().map(|(name, text)| SourceFile {
        name: (*name).into(),
        text: (*text).into(),
    });
    circles(&files.collect::<Vec<_>>())
}

#[test]
fn a_circle_is_found_however_it_is_written() {
    for (parent, child) in [
        ("use self::b::X;", "use super::Y;"),
        ("use b::X;", "use crate::a::{Y, Z};"),
        ("fn f() { b::f() }", "fn f() { super::f() }"),
        (
            "use crate::{a::{b::X}, c};",
            "mod inner { use super::super::Y; }",
        ),
        ("impl b::X {}", "use super::*;"),
        ("#[derive(b::X)] struct S;", "fn f() -> crate::a::Y {}"),
        (
            "macro_rules! m { () => { $crate::a::b::f() } }",
            "use super::{self as up};",
        ),
    ] {
        let found = circles_of(&[("a.rs", parent), ("a/b.rs", child), ("c.rs", "")]);
        let [circle] = &found[..] else {
            panic!("{parent} {child}: {found:?}");
        };
        assert!(
            circle.contains("a -> a/b") && circle.contains("a/b -> a"),
            "{circle}"
        );
    }
}

#[test]
fn a_circle_through_a_third_file_is_found() {
    let files = [
        ("a.rs", "use crate::b::X;"),
        ("b.rs", "use crate::c::X;"),
        ("c.rs", "use crate::a::X; use crate::d::X;"),
        ("d.rs", ""),
    ];
    let found = circles_of(&files);
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("of 3 files") && !found[0].contains("-> d"));
}

#[test]
fn reexports_tests_and_other_crates_make_no_circle() {
    for parent in [
        "pub use b::X; mod b;",
        "pub(crate) use self::b::{X, Y}; pub(in crate::a) mod b;",
        "#[cfg(test)] mod tests { use super::b::X; }",
        "#[cfg(test)] use b::X;",
        "/// See [`b::X`](self::b::X).\nfn f() { \"b::X\"; }",
        "use std::b::X; use ::b::X; fn f() { std::b::f(); x.b::<u8>(); }",
        "fn f() -> impl Sized + use<'a> {}",
    ] {
        let found = circles_of(&[("a.rs", parent), ("a/b.rs", "use super::Z;")]);
        assert_eq!(found, Vec::<String>::new(), "{parent}");
    }
}
