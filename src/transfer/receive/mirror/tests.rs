use std::sync::Mutex;

use super::*;
use crate::protocol::path::RelativePath;
use crate::protocol::{Delete, Durability};
use crate::storage::filter::Filter;
use crate::storage::walk::gitignore::RuleFiles;
use crate::storage::{Attributes, KeptShare, MemoryStore, PartialKey, Store};
use crate::transfer::receive::name_collisions::NameCollisions;

fn path(name: &str) -> RelativePath {
    RelativePath::from_components(name.split('/').filter(|c| !c.is_empty())).unwrap()
}

fn store(names: &[&str]) -> MemoryStore {
    let store = MemoryStore::new();
    for name in names {
        let claim = PartialKey {
            owner: [0; 32],
            size: 0,
            modified: None,
        };
        store
            .create(&path(name), &claim)
            .unwrap()
            .commit(&Attributes::default(), Durability::Visible)
            .unwrap();
    }
    store
}

fn remove(
    store: &MemoryStore,
    announced: &[&str],
    most: Option<u64>,
    dry_run: bool,
) -> (u64, Option<String>, Vec<String>) {
    let memory = KeptShare::default();
    let rule_files = RuleFiles::default();
    let all = Announced::new(&memory);
    announced.iter().for_each(|name| all.insert(&path(name)));
    let mut told = Vec::new();
    let place = path("m");
    let protected = Filter::default();
    let cleared = Mutex::<ClearedPaths>::default();
    let collisions = NameCollisions::new(&memory);
    let delete = Delete { most };
    let announced = &all;
    let mirror = Mirror {
        store,
        place: &place,
        announced,
        collisions: &collisions,
        protected: &protected,
        rule_files: &rule_files,
        memory: &memory,
        cleared: &cleared,
        delete,
        dry_run,
    };
    let announcement = Announcement {
        is_whole: true,
        missing: 0,
    };
    let removal = mirror.remove(announcement, |path| {
        told.push(path.to_string());
        true
    });
    let incomplete = removal.incomplete.map(|reason| reason.to_string());
    (removal.removed, incomplete, told)
}

#[test]
fn only_unannounced_entries_are_removed_children_first() {
    let store = store(&[
        "m/a",
        "m/old/x/y",
        "m/old/z",
        "m/sub/b",
        "m/sub/c",
        "other/d",
    ]);
    store
        .make_symlink(&path("m/out"), b"../other", &Attributes::default())
        .unwrap();
    let announced = ["m", "m/a", "m/sub", "m/sub/b"];
    let expected = ["old/x/y", "old/x", "old/z", "old", "out", "sub/c"]
        .map(String::from)
        .to_vec();
    assert_eq!(
        remove(&store, &announced, None, true),
        (6, None, expected.clone())
    );
    assert!(
        store.stat(&path("m/old/x/y")).unwrap().is_some(),
        "a dry run removes nothing"
    );
    let before = store.stat(&path("m/sub")).unwrap().unwrap().modified;
    assert_eq!(
        remove(&store, &announced, Some(6), false),
        (6, None, expected)
    );
    assert_eq!(
        store.stat(&path("m/sub")).unwrap().unwrap().modified,
        before,
        "the directory keeps its time"
    );
    let mut left = store.names(&path("m")).unwrap();
    left.sort();
    assert_eq!(left, [b"a".to_vec(), b"sub".to_vec()]);
    assert!(
        store.stat(&path("other/d")).unwrap().is_some(),
        "the target of a link stays"
    );
    assert_eq!(remove(&store, &announced, None, false), (0, None, vec![]));
}

#[test]
fn nothing_is_removed_beyond_the_maximum() {
    let store = store(&["m/a", "m/b", "m/c"]);
    let refused = (
        0,
        Some("2 to remove, and --max-delete allows 1".into()),
        vec![],
    );
    assert_eq!(remove(&store, &["m", "m/a"], Some(1), false), refused);
    assert_eq!(store.names(&path("m")).unwrap().len(), 3);
    assert_eq!(remove(&store, &["m", "m/a"], Some(2), false).0, 2);
}

#[test]
fn nothing_is_removed_if_announced_names_are_missing() {
    let store = store(&["m/a", "m/stored-otherwise"]);
    let (removed, why, _) = remove(&store, &["m", "m/a", "m/sent"], None, false);
    assert_eq!(removed, 0);
    assert!(why.unwrap().starts_with("1 of the received entries"));
    assert_eq!(remove(&store, &["m", "m/a", "m/sent"], None, true).0, 1);
}

#[test]
fn an_empty_source_removes_nothing_without_a_maximum() {
    let store = store(&["m/a"]);
    assert!(
        remove(&store, &["m"], None, false)
            .1
            .unwrap()
            .contains("--max-delete")
    );
    assert_eq!(remove(&store, &["m"], Some(10), false).0, 1);
}

#[test]
fn directories_with_partials_stay_and_the_rest_is_removed() {
    let store = store(&["m/a", "m/old/b"]);
    let claim = PartialKey {
        owner: [0; 32],
        size: 5,
        modified: None,
    };
    let mut upload = store.create(&path("m/old/c"), &claim).unwrap();
    upload.write_at(b"12", 0).unwrap();
    drop(upload);
    let (removed, why, told) = remove(&store, &["m", "m/a"], None, false);
    assert_eq!((removed, told), (1, vec!["old/b".to_owned()]));
    assert!(
        why.unwrap().starts_with("m/old: "),
        "the reason names the directory"
    );
}

#[test]
fn directories_cleared_in_parallel_share_the_maximum() {
    // Repeated, because a race does not show in every run.
    for _ in 0..20 {
        let names: Vec<_> = (0..8)
            .flat_map(|n| ["a", "b", "c"].map(|name| format!("m/{n}/{name}")))
            .collect();
        let store = store(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let place = path("m");
        let protected = Filter::default();
        let cleared = Mutex::<ClearedPaths>::default();
        let memory = KeptShare::default();
        let rule_files = RuleFiles::default();
        let announced = Announced::new(&memory);
        let delete = Delete { most: Some(7) };
        let collisions = NameCollisions::new(&memory);
        let mirror = Mirror {
            store: &store,
            place: &place,
            announced: &announced,
            collisions: &collisions,
            protected: &protected,
            rule_files: &rule_files,
            memory: &memory,
            cleared: &cleared,
            delete,
            dry_run: false,
        };
        let begin = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            for n in 0..8 {
                let mirror = &mirror;
                let begin = &begin;
                scope.spawn(move || {
                    begin.wait();
                    mirror.clear_directory(&path(&format!("m/{n}")))
                });
            }
        });
        let left = (0..8)
            .filter(|n| store.stat(&path(&format!("m/{n}"))).unwrap().is_some())
            .count();
        assert_eq!(
            left, 6,
            "two directories of three files each may go, and no third"
        );
    }
}
