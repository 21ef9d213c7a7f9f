use super::*;
use crate::protocol::{Components, Delete, Time};
use crate::storage::{OwnerIds, Version};

const TIME: Time = Time {
    seconds: 1_700_000_000,
    nanoseconds: 0,
};

fn rules(existing: Existing) -> Rules {
    Rules {
        options: ReceiveOptions {
            existing,
            ..ReceiveOptions::default()
        },
        requested: false,
        into: false,
    }
}

fn mirror(existing: Existing) -> Rules {
    let mut rules = rules(existing);
    rules.options.delete = Some(Delete::default());
    rules
}

fn path(name: &str) -> RelativePath {
    RelativePath::from_components([name]).unwrap()
}

/// A file of 5 bytes, or another entry, in the place of nothing.
fn new(kind: Kind) -> Candidate {
    let entry = Entry {
        id: 7,
        path: Components::from(&path("a")),
        kind,
        size: (kind == Kind::File).then_some(5),
        modified: Some(TIME),
        mode: None,
        target: (kind == Kind::Symlink).then(|| b"target".to_vec()),
        digest: None,
        hard_link: None,
        owner: None,
        xattrs: None,
    };
    Candidate {
        entry,
        name: path("a"),
        path: path("a"),
        attributes: Attributes::default(),
        existing: None,
        link: Link::None,
    }
}

/// What exists, with the announced size, time, attributes and target.
fn same(kind: Option<Kind>) -> ExistingEntry {
    ExistingEntry {
        metadata: Metadata {
            kind,
            size: if kind == Some(Kind::File) { 5 } else { 0 },
            modified: TIME,
            mode: 0o644,
            owner: OwnerIds::default(),
            links: 1,
            version: Version::default(),
        },
        same_time: true,
        same_metadata: true,
        same_target: true,
    }
}

fn over(kind: Kind, existing: ExistingEntry) -> Candidate {
    Candidate {
        existing: Some(existing),
        ..new(kind)
    }
}

fn refused(candidate: &Candidate, rules: &Rules) -> Code {
    decide(candidate, rules).unwrap_err().code
}

#[test]
fn new_entries_are_made_or_received() {
    for existing in Existing::ALL {
        let rules = rules(existing);
        let decided = |kind| decide(&new(kind), &rules);
        assert_eq!(decided(Kind::Directory), Ok(Decision::MakeDirectory));
        assert_eq!(decided(Kind::Symlink), Ok(Decision::MakeSymlink));
        assert_eq!(decided(Kind::File), Ok(Decision::Receive(None)));
        let mut empty = new(Kind::File);
        empty.entry.size = Some(0);
        assert_eq!(decide(&empty, &rules), Ok(Decision::MakeEmptyFile));
    }
}

#[test]
fn a_dry_run_makes_nothing() {
    let mut rules = rules(Existing::Update);
    rules.options.dry_run = true;
    for kind in [Kind::Directory, Kind::Symlink, Kind::File] {
        assert_eq!(decide(&new(kind), &rules), Ok(Decision::WouldMake));
    }
    let mut changed = over(Kind::File, same(Some(Kind::File)));
    changed.existing.as_mut().unwrap().same_metadata = false;
    assert_eq!(decide(&changed, &rules), Ok(Decision::Unchanged));
}

#[test]
fn unchanged_entries_are_skipped_unless_overwritten() {
    let file = over(Kind::File, same(Some(Kind::File)));
    let link = over(Kind::Symlink, same(Some(Kind::Symlink)));
    for existing in [Existing::Update, Existing::Fail] {
        let rules = rules(existing);
        assert_eq!(decide(&file, &rules), Ok(Decision::Unchanged));
        assert_eq!(decide(&link, &rules), Ok(Decision::Skip));
    }
    let overwrite = rules(Existing::Overwrite);
    assert_eq!(decide(&file, &overwrite), Ok(Decision::Receive(None)));
    assert_eq!(decide(&link, &overwrite), Ok(Decision::MakeSymlink));
    let directory = over(Kind::Directory, same(Some(Kind::Directory)));
    for existing in Existing::ALL {
        assert_eq!(decide(&directory, &rules(existing)), Ok(Decision::Skip));
    }
}

#[test]
fn changed_metadata_is_set_without_a_transfer() {
    let mut file = over(Kind::File, same(Some(Kind::File)));
    file.existing.as_mut().unwrap().same_metadata = false;
    let update = rules(Existing::Update);
    assert_eq!(decide(&file, &update), Ok(Decision::SetAttributes));
    file.existing.as_mut().unwrap().same_time = false;
    assert_eq!(decide(&file, &update), Ok(Decision::Receive(None)));
}

#[test]
fn kept_files_get_further_names_only_if_they_are_the_same() {
    let skip = rules(Existing::Skip);
    let mut file = over(Kind::File, same(Some(Kind::File)));
    assert_eq!(decide(&file, &skip), Ok(Decision::Unchanged));
    file.existing.as_mut().unwrap().metadata.size = 6;
    assert_eq!(decide(&file, &skip), Ok(Decision::Leave));
    let mut by_content = skip;
    by_content.options.checksum = true;
    let file = over(Kind::File, same(Some(Kind::File)));
    assert_eq!(decide(&file, &by_content), Ok(Decision::Leave));
    let directory = over(Kind::File, same(Some(Kind::Directory)));
    assert_eq!(
        refused(&directory, &mirror(Existing::Skip)),
        Code::IsDirectory
    );
}

#[test]
fn guarded_files_are_refused_unless_they_are_the_same() {
    let fail = rules(Existing::Fail);
    let mut file = over(Kind::File, same(Some(Kind::File)));
    file.existing.as_mut().unwrap().same_time = false;
    assert_eq!(refused(&file, &fail), Code::Exists);
    file.link = Link::To(path("first"));
    assert_eq!(refused(&file, &fail), Code::Exists);
    let mut by_content = fail;
    by_content.options.checksum = true;
    file.entry.digest = Some([1; 32]);
    let compare = Compare {
        digest: [1; 32],
        same_metadata: true,
    };
    assert_eq!(
        decide(&file, &by_content),
        Ok(Decision::Receive(Some(compare)))
    );
    file.entry.size = Some(6);
    assert_eq!(refused(&file, &by_content), Code::Exists);
}

#[test]
fn only_a_mirror_that_updates_replaces_other_kinds() {
    for rules in [rules(Existing::Update), mirror(Existing::Fail)] {
        let directory = over(Kind::File, same(Some(Kind::Directory)));
        assert_eq!(refused(&directory, &rules), Code::IsDirectory);
        let file = over(Kind::Directory, same(Some(Kind::File)));
        assert_eq!(refused(&file, &rules), Code::NotDirectory);
        let device = over(Kind::File, same(None));
        assert_eq!(refused(&device, &rules), Code::Special);
    }
    let replacing = mirror(Existing::Update);
    for kind in [Some(Kind::Directory), Some(Kind::Symlink), None] {
        let file = over(Kind::File, same(kind));
        assert_eq!(decide(&file, &replacing), Ok(Decision::Receive(None)));
    }
    let directory = over(Kind::Directory, same(Some(Kind::File)));
    assert_eq!(decide(&directory, &replacing), Ok(Decision::MakeDirectory));
}

#[test]
fn further_names_are_linked_or_sent_as_files() {
    let update = rules(Existing::Update);
    let mut file = new(Kind::File);
    file.link = Link::To(path("first"));
    assert_eq!(decide(&file, &update), Ok(Decision::Link(path("first"))));
    file.link = Link::Impossible("no name");
    assert_eq!(decide(&file, &update), Ok(Decision::NotLinked("no name")));
    file.link = Link::Exists;
    assert_eq!(decide(&file, &update), Ok(Decision::Skip));
    file.link = Link::None;
    assert_eq!(decide(&file, &update), Ok(Decision::Receive(None)));
    // A directory in its place is refused as for any file.
    let mut directory = over(Kind::File, same(Some(Kind::Directory)));
    directory.link = Link::To(path("first"));
    assert_eq!(refused(&directory, &update), Code::IsDirectory);
}

#[test]
fn a_pipe_without_a_name_needs_a_full_file_name() {
    let mut pipe = new(Kind::File);
    pipe.entry.size = None;
    pipe.entry.modified = None;
    let mut into = rules(Existing::Update);
    assert_eq!(decide(&pipe, &into), Ok(Decision::Receive(None)));
    into.into = true;
    assert_eq!(refused(&pipe, &into), Code::IsDirectory);
    into.requested = true;
    assert_eq!(decide(&pipe, &into), Ok(Decision::Receive(None)));
}
