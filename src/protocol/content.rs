//! The digest in a [`Trailer`](super::Trailer).

use blake3::Hasher;

use super::Range;

/// Context of the digest of content with holes (BLAKE3's key derivation mode). It makes the digest differ from any of plain
/// content.
const HOLES_CONTEXT: &str = "haul/1 content with holes";

/// Begins the digest of a file's content.
///
/// Without holes, it is the digest of the bytes alone. With holes, it covers the size and the holes, then only the bytes between
/// them: hashing the zeros of a hole would take an hour for each TiB.
pub fn content_hasher(size: u64, holes: &[Range]) -> Hasher {
    if holes.is_empty() {
        return Hasher::new();
    }
    let mut hasher = Hasher::new_derive_key(HOLES_CONTEXT);
    let mut number = |number: u64| {
        hasher.update(&number.to_le_bytes());
    };
    number(size);
    number(holes.len() as u64);
    for hole in holes {
        number(hole.offset);
        number(hole.length);
    }
    hasher
}
