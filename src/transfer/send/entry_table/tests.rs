use super::*;
use crate::protocol::{Entry, Frame, Held, Range};
use crate::storage::pipe::Pipe;

fn file(name: &str, size: u64) -> Announce {
    let pipe = Arc::new(Pipe::new(std::io::empty()));
    let mut announce = Announce::of_pipe(name.as_bytes(), pipe).unwrap();
    announce.pipe = None;
    announce.metadata.size = size;
    announce
}

/// A table with the files a (1 byte), b (2 bytes) and so on, announced under the ids 0, 1 and so on.
fn announced(files: usize) -> EntryTable {
    let mut table = EntryTable::default();
    for (name, size) in ["a", "b", "c"][..files].iter().zip(1..) {
        table.put_found(file(name, size), &mut BytesMut::new());
    }
    table
}

/// Announces what an earlier connection left, and returns the ids.
fn reannounced(table: &mut EntryTable) -> Vec<u64> {
    let mut buffer = BytesMut::new();
    while table.put_reannounced(&mut buffer) {}
    let mut ids = Vec::new();
    while let Some(frame) = Frame::take(&mut buffer, Entry::LIMIT).unwrap() {
        ids.push(frame.decode::<Entry>().unwrap().id);
    }
    ids
}

fn want(id: u64, held: &[u64]) -> Verdict {
    let held = held.iter().map(|&length| Held {
        range: Range { offset: 0, length },
        digest: [0; 32],
    });
    Verdict::Want(id, held.collect())
}

#[test]
fn an_entry_is_answered_once() {
    let mut table = announced(1);
    assert!(table.answered(1, &Verdict::Skip(1)).is_err(), "unknown");
    assert!(table.answered(0, &Verdict::Skip(0)).is_ok());
    assert!(table.answered(0, &Verdict::Skip(0)).is_err(), "answered");
}

#[test]
fn everything_is_sent_when_each_wanted_file_is_whole() {
    let mut table = announced(2);
    table.answered(0, &Verdict::Skip(0)).unwrap();
    assert!(!table.all_sent(), "one is unanswered");
    table.answered(1, &want(1, &[])).unwrap();
    assert!(!table.all_sent(), "one is wanted");
    table.sent_whole(1);
    assert!(table.all_sent());
    assert!(!table.is_empty(), "both wait for their results");
    table.settled(0, true);
    table.settled(1, true);
    assert!(table.is_empty());
    assert!(!table.is_settled(), "more may be found");
    table.complete();
    assert!(table.is_settled());
    assert_eq!(table.progress(), 2);
}

#[test]
fn a_wanted_file_that_fails_is_not_waited_for() {
    let mut table = announced(1);
    table.answered(0, &want(0, &[])).unwrap();
    table.settled(0, false);
    assert!(table.all_sent());
}

#[test]
fn unsettled_entries_are_announced_again_under_their_ids() {
    let mut table = announced(3);
    table.answered(1, &Verdict::Done(1)).unwrap();
    table.settled(1, true);
    table.complete();
    table.start_connection();
    assert!(table.all_sent() && !table.is_settled());
    assert_eq!(reannounced(&mut table), [0, 2]);
    assert!(table.answered(0, &Verdict::Done(0)).is_ok());
    assert_eq!(table.stats().entries, 3, "each counts once");
}

#[test]
fn a_later_connection_knows_what_was_completely_sent() {
    let mut table = announced(2);
    for id in [0, 1] {
        let answered = table.answered(id, &want(id, &[])).unwrap();
        assert!(!answered.sent);
    }
    table.sent_whole(0);
    table.start_connection();
    assert_eq!(reannounced(&mut table), [0, 1]);
    assert!(table.answered(0, &Verdict::Skip(0)).unwrap().sent);
    assert!(!table.answered(1, &Verdict::Skip(1)).unwrap().sent);
}

#[test]
fn more_held_bytes_on_a_later_connection_are_progress() {
    let mut table = announced(1);
    for (held, progress) in [(10, 0), (10, 0), (30, 1), (20, 1), (30, 1), (31, 2)] {
        table.answered(0, &want(0, &[held])).unwrap();
        assert_eq!(table.progress(), progress);
        table.start_connection();
        reannounced(&mut table);
    }
}

#[test]
fn a_receiver_may_not_offer_held_ranges_without_bound() {
    let mut table = announced(2);
    let most = vec![1; MAX_OPEN_HELD];
    assert!(table.answered(0, &want(0, &most)).is_ok());
    assert!(table.answered(1, &want(1, &[1])).is_err());

    let mut table = announced(2);
    table.answered(0, &want(0, &most)).unwrap();
    table.settled(0, true);
    assert!(table.answered(1, &want(1, &[1])).is_ok());
}

#[test]
fn entries_that_a_stopping_receiver_leaves_are_kept() {
    let mut table = announced(1);
    table.answered(0, &want(0, &[])).unwrap();
    table.left(0);
    assert!(table.is_empty() && table.all_sent());
    table.complete();
    let interrupted = table.stats().interrupted;
    assert_eq!(interrupted.unwrap().code, Code::Stopping);
    table.start_connection();
    assert_eq!(reannounced(&mut table), [0]);
    assert!(table.stats().interrupted.is_none());
}

#[test]
fn the_first_reason_of_a_leaving_receiver_is_kept() {
    let mut table = announced(1);
    table.receiver_leaves(Code::Busy.into());
    table.stop(Code::Stopping.into());
    assert_eq!(table.stats().interrupted.unwrap().code, Code::Busy);
}

#[test]
fn found_totals_count_files_and_their_bytes() {
    let mut table = announced(3);
    let directory = Announce {
        kind: Kind::Directory,
        ..file("d", 100)
    };
    table.put_found(directory, &mut BytesMut::new());
    let found = |files, bytes, complete| FoundTotals {
        files,
        bytes,
        complete,
    };
    assert_eq!(table.found(), found(3, 6, false));
    table.add_found_bytes(4);
    table.end_walk();
    assert_eq!(table.found(), found(3, 10, true));
}

#[test]
fn a_name_that_cannot_be_linked_becomes_a_file_of_its_own() {
    let mut table = EntryTable::default();
    let mut buffer = BytesMut::new();
    for name in ["a", "b"] {
        let mut file = file(name, 5);
        file.metadata.links = 2;
        table.put_found(file, &mut buffer);
    }
    assert_eq!(table.waiting_names(), 1);
    assert!(!table.put_waiting(&mut buffer));
    table.answered(0, &Verdict::Done(0)).unwrap();
    table.settled(0, true);
    assert!(table.put_waiting(&mut buffer));
    assert_eq!(table.found().bytes, 5, "a link has no bytes");
    table.answered(1, &want(1, &[])).unwrap();
    assert_eq!(table.found().bytes, 10);
    assert_eq!(table.settling(1).unwrap().size, 5);
}
