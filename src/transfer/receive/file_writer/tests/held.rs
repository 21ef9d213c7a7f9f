//! Held ranges: what an earlier attempt left, as it is offered and omitted.

use super::*;

#[test]
fn plans_omit_held_ranges_and_nothing_else() {
    let content: Vec<u8> = (0..3 * HELD_BLOCK as usize)
        .map(|i| (i / 7) as u8)
        .collect();
    let middle = Range {
        offset: HELD_BLOCK,
        length: HELD_BLOCK,
    };
    let held = [Held {
        range: middle,
        digest: [0; 32],
    }];
    let around = plan(&[(0, HELD_BLOCK), (2 * HELD_BLOCK, HELD_BLOCK)]);
    assert_eq!(
        receive(&content, &around, &held, &[1000, 2_000_000], 1),
        Ok(())
    );
    let too_little = plan(&[(0, HELD_BLOCK)]);
    assert_eq!(
        receive(&content, &too_little, &held, &[], 0)
            .unwrap_err()
            .code,
        Code::Protocol
    );
}

#[test]
fn data_of_an_earlier_attempt_is_offered_in_blocks() {
    let store = MemoryStore::new();
    let size = 3 * HELD_BLOCK + 5;
    let mut first = upload(&store, size).unwrap();
    first
        .write_at(&vec![7; HELD_BLOCK as usize + 100], HELD_BLOCK - 50)
        .unwrap();
    first.write_at(&[1; 5], 3 * HELD_BLOCK).unwrap();
    drop(first);
    let (_, held) =
        FileWriter::begin(upload(&store, size).unwrap(), &RelativePath::root(), size).unwrap();
    let ranges: Vec<_> = held
        .iter()
        .map(|h| (h.range.offset, h.range.length))
        .collect();
    assert_eq!(ranges, [(HELD_BLOCK, HELD_BLOCK), (3 * HELD_BLOCK, 5)]);
    assert_eq!(
        held[0].digest,
        *blake3::hash(&vec![7; HELD_BLOCK as usize]).as_bytes()
    );
}

#[test]
fn partial_blocks_are_offered_in_steps_up_to_the_limit() {
    let store = MemoryStore::new();
    let size = 8 * HELD_BLOCK;
    let mut first = upload(&store, size).unwrap();
    first
        .write_at(
            &vec![7; HELD_BLOCK as usize + 2 * HELD_STEP as usize],
            HELD_BLOCK - HELD_STEP - 1,
        )
        .unwrap();
    first
        .write_at(&vec![8; HELD_STEP as usize], 5 * HELD_BLOCK + HELD_STEP)
        .unwrap();
    drop(first);
    let (_, held) =
        FileWriter::begin(upload(&store, size).unwrap(), &RelativePath::root(), size).unwrap();
    let ranges: Vec<_> = held
        .iter()
        .map(|h| (h.range.offset, h.range.length))
        .collect();
    let block = HELD_BLOCK;
    let step = HELD_STEP;
    assert_eq!(
        ranges,
        [
            (block - step, step),
            (block, block),
            (5 * block + step, step)
        ]
    );
    assert_eq!(
        held[2].digest,
        *blake3::hash(&vec![8; HELD_STEP as usize]).as_bytes()
    );

    let size = 600 * 2 * HELD_STEP;
    let mut scattered = upload(&store, size).unwrap();
    for i in 0..600 {
        scattered
            .write_at(&vec![9; HELD_STEP as usize], i * 2 * HELD_STEP)
            .unwrap();
    }
    drop(scattered);
    let (_, held) =
        FileWriter::begin(upload(&store, size).unwrap(), &RelativePath::root(), size).unwrap();
    assert_eq!(held.len(), MAX_ENDS as usize);
}
