//! Holes: of a plan, of a sparse file, and over the data of an earlier attempt.

use super::*;

#[test]
fn holes_hide_data_of_an_earlier_attempt() {
    let block = HELD_BLOCK as usize;
    let content = [vec![1; block], vec![0; block], vec![3; block]].concat();
    let size = content.len() as u64;
    let store = MemoryStore::new();
    upload(&store, size)
        .unwrap()
        .write_at(&vec![9; 2 * block + 7], 0)
        .unwrap();
    let (mut disk, held) =
        FileWriter::begin(upload(&store, size).unwrap(), &RelativePath::root(), size).unwrap();
    assert_eq!(held.len(), 2, "the hole is offered too");
    disk.keep(&with_holes(size, &[(HELD_BLOCK, HELD_BLOCK)]), &held)
        .unwrap();
    disk.write(vec![
        Run {
            offset: 2 * HELD_BLOCK,
            data: content[2 * block..].into(),
        },
        Run {
            offset: 0,
            data: content[..block].into(),
        },
    ])
    .unwrap();
    let mut hasher = content_hasher(
        size,
        &[Range {
            offset: HELD_BLOCK,
            length: HELD_BLOCK,
        }],
    );
    hasher
        .update(&content[..block])
        .update(&content[2 * block..]);
    let trailer = Trailer {
        digest: hasher.finalize().into(),
        size: None,
    };
    commit(disk, Some(trailer)).unwrap();
    let source = store
        .open(&RelativePath::from_components(["f"]).unwrap())
        .unwrap();
    let mut back = vec![7; content.len()];
    source.read_at(&mut back, 0).unwrap();
    assert!(back == content);
    assert_eq!(
        source.data_from(HELD_BLOCK).unwrap(),
        Some(2 * HELD_BLOCK..size)
    );
}

/// Receives a file whose plan has one hole at its end, in runs of `run` bytes. Returns the ranges that are not
/// holes.
fn receive_sparse(store: &MemoryStore, content: &[u8], hole: u64, run: usize) -> Vec<(u64, u64)> {
    let size = content.len() as u64;
    let plan = with_holes(size, &[(hole, size - hole)]);
    let path = RelativePath::from_components(["f"]).unwrap();
    let (mut disk, held) = FileWriter::begin(upload(store, size).unwrap(), &path, size).unwrap();
    disk.keep(&plan, &held).unwrap();
    let runs = content[..hole as usize].chunks(run).enumerate();
    let mut runs: Vec<Run> = runs
        .map(|(i, data)| Run {
            offset: (i * run) as u64,
            data: data.into(),
        })
        .collect();
    // The first run comes last, so that all others are hashed from the written data.
    runs.rotate_left(1);
    disk.write(runs).unwrap();
    let mut hasher = content_hasher(size, plan.holes());
    hasher.update(&content[..hole as usize]);
    let trailer = Trailer {
        digest: hasher.finalize().into(),
        size: None,
    };
    commit(disk, Some(trailer)).unwrap();
    let source = store.open(&path).unwrap();
    let mut back = vec![7; content.len()];
    assert_eq!(source.read_at(&mut back, 0).unwrap(), content.len());
    assert!(back == content);
    let mut parts = Vec::new();
    let mut at = 0;
    while let Some(part) = source.data_from(at).unwrap() {
        parts.push((part.start, part.end - part.start));
        at = part.end;
    }
    parts
}

#[test]
fn zeros_of_a_sparse_file_are_left_as_holes() {
    let block = HOLE_BLOCK as usize;
    let mut content = vec![0; 64 * block];
    for at in [3, 4, 40] {
        content[at * block..(at + 1) * block].fill(1);
    }
    let data = [
        (3 * HOLE_BLOCK, 2 * HOLE_BLOCK),
        (40 * HOLE_BLOCK, HOLE_BLOCK),
    ];
    let hole = 50 * HOLE_BLOCK;
    // Includes small runs, as on a slow link: no run holds a whole block.
    for run in [1000, block, 10 * block, 64 * block] {
        assert_eq!(
            receive_sparse(&MemoryStore::new(), &content, hole, run),
            data
        );
    }
}

#[test]
fn zeros_left_as_holes_hide_data_of_an_earlier_attempt() {
    let block = HOLE_BLOCK as usize;
    let mut content = vec![0; 64 * block];
    content[..block].fill(1);
    let store = MemoryStore::new();
    let mut earlier = upload(&store, content.len() as u64).unwrap();
    earlier.write_at(&vec![9; 60 * block], 0).unwrap();
    drop(earlier);
    let hole = 50 * HOLE_BLOCK;
    let data = receive_sparse(&store, &content, hole, 10 * block);
    assert_eq!(data, [(0, HOLE_BLOCK)]);
}

#[test]
fn gaps_beyond_the_hole_limit_are_offered_as_held() {
    let parts = MAX_HOLES as u64 + 65;
    let period = HELD_STEP;
    let size = parts * period;
    let store = MemoryStore::new();
    let mut first = upload(&store, size).unwrap();
    for i in 0..parts {
        first.write_at(&[1; 4096], i * period).unwrap();
    }
    drop(first);
    let (_, held) =
        FileWriter::begin(upload(&store, size).unwrap(), &RelativePath::root(), size).unwrap();
    // The last gaps, and the one to the end, may be holes of the plan.
    let bytes: u64 = held.iter().map(|held| held.range.length).sum();
    assert_eq!(bytes, 64 * period);
    assert!(
        held.iter()
            .all(|h| h.range.offset + h.range.length <= 64 * period)
    );
}

#[test]
fn zeros_of_a_file_without_holes_are_written() {
    let store = MemoryStore::new();
    let content = vec![0; 20_000];
    receive(&content, &plan(&[(0, 20_000)]), &[], &[], 0).unwrap();
    let mut disk = FileWriter::begin(
        upload(&store, 20_000).unwrap(),
        &RelativePath::root(),
        20_000,
    )
    .unwrap()
    .0;
    disk.keep(&plan(&[(0, 20_000)]), &[]).unwrap();
    let data = content[..].into();
    disk.write(vec![Run { offset: 0, data }]).unwrap();
    assert_eq!(disk.upload.held().unwrap().first(), Some(&(0..20_000)));
}

#[test]
fn in_order_outputs_receive_holes_as_zeros() {
    let (reader, writer) = std::io::pipe().unwrap();
    let name = RelativePath::from_components(["f"]).unwrap();
    let store = OutputStore::new(name.clone(), writer);
    let upload = store
        .create(
            &name,
            &PartialKey {
                owner: [0; 32],
                size: 30,
                modified: None,
            },
        )
        .unwrap();
    let (mut disk, held) = FileWriter::begin(upload, &name, 30).unwrap();
    assert!(disk.in_order() && held.is_empty());
    let plan = with_holes(30, &[(0, 5), (10, 5), (25, 5)]);
    disk.keep(&plan, &held).unwrap();
    let mut body = BodyReader::new(&plan, 0, Some(30), true).unwrap();
    body.take(5, Bytes::from_static(b"klmnopqrst")).unwrap();
    disk.write(body.drain().0).unwrap();
    assert_eq!(store.written(), 5, "the first hole");
    body.take(0, Bytes::from_static(b"abcde")).unwrap();
    disk.write(body.drain().0).unwrap();
    let mut hasher = content_hasher(30, plan.holes());
    hasher.update(b"abcdeklmnopqrst");
    let trailer = Trailer {
        digest: hasher.finalize().into(),
        size: None,
    };
    commit(disk, Some(trailer)).unwrap();
    let content = std::io::read_to_string(reader).unwrap();
    assert_eq!(content, "\0\0\0\0\0abcde\0\0\0\0\0klmnopqrst\0\0\0\0\0");
}

#[test]
fn plans_with_invalid_holes_are_refused() {
    let size = 3 * HELD_BLOCK;
    let keep = |plan: &Plan| {
        let store = MemoryStore::new();
        let (mut disk, held) =
            FileWriter::begin(upload(&store, size)?, &RelativePath::root(), size)?;
        disk.keep(plan, &held)
    };
    assert_eq!(keep(&with_holes(size, &[(0, size)])), Ok(()));
    let beyond = Plan {
        holes: Some(plan(&[(size - 5, 10)]).ranges),
        ..plan(&[(0, size - 5)])
    };
    let far = Plan {
        holes: Some(plan(&[(1 << 62, 10)]).ranges),
        ..plan(&[(0, size)])
    };
    let gap = Plan {
        holes: Some(plan(&[(10, size - 10)]).ranges),
        ..plan(&[(0, 9)])
    };
    for bad in [beyond, far, gap] {
        assert_eq!(keep(&bad).unwrap_err().code, Code::Protocol, "{bad:?}");
    }
}
