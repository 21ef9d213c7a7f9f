//! What the digest in a [`Trailer`](super::Trailer) is made with.

use blake3::Hasher;

use super::Range;

/// The context of a digest that speaks of holes (BLAKE3's mode to derive keys), so that it is never one of plain content.
const WITH_HOLES: &str = "haul/1 content with holes";

/// Begins the digest of a file's content.
///
/// Without holes it is that of the bytes, and nothing else. With holes it speaks first of the size and of where they are,
/// and then only of the bytes between them: to hash the zeros of a hole takes an hour for each TiB.
pub fn content_hasher(size: u64, holes: &[Range]) -> Hasher {
    if holes.is_empty() {
        return Hasher::new();
    }
    let mut hasher = Hasher::new_derive_key(WITH_HOLES);
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
