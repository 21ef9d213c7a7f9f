//! What the tests of the writer share, and whole files.

mod held;
mod holes;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::protocol::{HELD_BLOCK, HELD_STEP, MAX_HOLES, Message};
use crate::storage::{Attributes, MemoryStore, OutputStore, PartialKey, Store};
use crate::transfer::receive::body_reader::BodyReader;
use crate::transfer::receive::body_reader::tests::plan;
use crate::transfer::receive::partial::MAX_ENDS;
use crate::transfer::receive::zeros::HOLE_BLOCK;

/// Makes a plan with holes; the rest of the size is ranges.
fn with_holes(size: u64, holes: &[(u64, u64)]) -> Plan {
    let mut ranges = Vec::new();
    let mut next = 0;
    for &(offset, length) in holes.iter().chain([&(size, 0)]) {
        if offset > next {
            ranges.push((next, offset - next));
        }
        next = offset + length;
    }
    Plan {
        holes: Some(plan(holes).ranges),
        ..plan(&ranges)
    }
}

fn upload(store: &MemoryStore, size: u64) -> Result<Box<dyn Upload>, Reason> {
    let path = RelativePath::from_components(["f"])?;
    store.create(
        &path,
        &PartialKey {
            owner: [0; 32],
            size,
            modified: None,
        },
    )
}

/// Commits a verified file without a sync.
fn commit(writer: FileWriter, trailer: Option<Trailer>) -> Result<(), Reason> {
    let file = writer.verify(trailer)?;
    file.upload
        .commit(&Attributes::default(), Durability::Visible)?;
    Ok(())
}

/// Sends `content` as the stream of a plan, cut into pieces that arrive in a given order.
fn receive(
    content: &[u8],
    plan: &Plan,
    held: &[Held],
    cuts: &[usize],
    turn: usize,
) -> Result<(), Reason> {
    let start = 17;
    let mut stream: Vec<u8> = Vec::new();
    for r in &plan.ranges {
        stream.extend(&content[r.offset as usize..(r.offset + r.length) as usize]);
    }
    let mut hasher = content_hasher(content.len() as u64, plan.holes());
    for (at, byte) in content.iter().enumerate() {
        if !plan
            .holes()
            .iter()
            .any(|h| (h.offset..h.offset + h.length).contains(&(at as u64)))
        {
            hasher.update(&[*byte]);
        }
    }
    stream.extend(
        Trailer {
            digest: hasher.finalize().into(),
            size: None,
        }
        .to_bytes(),
    );

    let mut body = BodyReader::new(plan, start, Some(content.len() as u64), false)?;
    let store = MemoryStore::new();
    let mut first = upload(&store, content.len() as u64)?;
    for h in held {
        let from = h.range.offset as usize;
        let to = (h.range.offset + h.range.length) as usize;
        first.write_at(&content[from..to], h.range.offset).unwrap();
    }
    drop(first);
    let (mut disk, _) = FileWriter::begin(
        upload(&store, content.len() as u64)?,
        &RelativePath::root(),
        content.len() as u64,
    )?;
    disk.keep(plan, held)?;

    let mut edges: Vec<usize> = cuts
        .iter()
        .map(|c| c % stream.len())
        .chain([0, stream.len()])
        .collect();
    edges.sort_unstable();
    let mut pieces: Vec<_> = edges
        .windows(2)
        .map(|w| (w[0], &stream[w[0]..w[1]]))
        .collect();
    let turn = turn % pieces.len();
    pieces.rotate_left(turn);
    for (at, piece) in pieces {
        body.take(start + at as u64, Bytes::copy_from_slice(piece))?;
        if at % 3 == 0 {
            disk.write(body.drain().0)?;
        }
    }
    disk.write(body.drain().0)?;
    commit(disk, body.trailer()?)?;
    let mut back = vec![0; content.len()];
    let path = RelativePath::from_components(["f"])?;
    store.open(&path)?.read_at(&mut back, 0).unwrap();
    assert_eq!(back, content);
    Ok(())
}

proptest! {
    #[test]
    fn a_body_in_any_order_becomes_the_file(
        content in proptest::collection::vec(any::<u8>(), 1..5000),
        cuts in proptest::collection::vec(any::<usize>(), 0..40), turn: usize,
    ) {
        let all = plan(&[(0, content.len() as u64)]);
        prop_assert_eq!(receive(&content, &all, &[], &cuts, turn), Ok(()));
    }

    #[test]
    fn a_body_with_holes_in_any_order_becomes_the_file(
        mut content in proptest::collection::vec(any::<u8>(), 1..3000),
        edges in proptest::collection::btree_set(0u64..3000, 0..12),
        cuts in proptest::collection::vec(any::<usize>(), 0..20), turn: usize,
    ) {
        let size = content.len() as u64;
        let edges: Vec<u64> = edges.into_iter().filter(|&edge| edge <= size).collect();
        let holes: Vec<_> = edges.chunks_exact(2).map(|edge| (edge[0], edge[1] - edge[0])).collect();
        for &(offset, length) in &holes {
            content[offset as usize..(offset + length) as usize].fill(0);
        }
        prop_assert_eq!(receive(&content, &with_holes(size, &holes), &[], &cuts, turn), Ok(()));
    }
}

#[test]
fn changed_content_is_not_committed() {
    let store = MemoryStore::new();
    let (disk, _) =
        FileWriter::begin(upload(&store, 0).unwrap(), &RelativePath::root(), 0).unwrap();
    let trailer = Trailer {
        digest: [9; 32],
        size: None,
    };
    let result = commit(disk, Some(trailer));
    assert_eq!(result.unwrap_err().code, Code::Corrupt);
    assert!(
        store
            .stat(&RelativePath::from_components(["f"]).unwrap())
            .unwrap()
            .is_none()
    );
}
