//! Whether what is sent and what receives it lie in each other, on one machine.
//!
//! The sender tells directories by marks that only the same running system can compare, and that say nothing to any other:
//! digests of device and inode under a secret of the boot and the session's id.

use std::sync::OnceLock;

use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{MAX_MARKS, Mark, Origin};
use crate::storage::Store;
use crate::storage::walk::Tree;
use crate::transfer::receive::Placement;

/// Differs from system to system and from boot to boot, and does not leave the machine (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const CONTEXT: &str = "haul/1 origin: a directory of this boot of this machine";

/// The sources that are directories, and those that the only one lies in. Blocks.
pub(crate) fn origin(trees: &[Tree], session: &[u8; 16]) -> Option<Origin> {
    let marks = |tree: &Tree| marks(&*tree.store, &tree.path, session);
    let origin = match trees {
        [tree] if tree.directory => {
            let mut above = marks(tree)?;
            let sources = above.drain(..1.min(above.len())).collect();
            above.truncate(MAX_MARKS);
            Origin { sources, above }
        }
        trees => {
            let directories = trees.iter().filter(|tree| tree.directory).take(MAX_MARKS);
            let sources = directories
                .map(|tree| marks(tree)?.into_iter().next())
                .collect::<Option<Vec<_>>>()?;
            Origin {
                sources,
                above: Vec::new(),
            }
        }
    };
    Some(origin).filter(|origin| !origin.sources.is_empty())
}

/// Refuses a destination inside of a source, which would be sent as well, and again; and a mirror's source inside of its
/// destination, which would be removed. Blocks.
pub(crate) fn check(
    store: &dyn Store,
    place: &Placement,
    origin: Option<&Origin>,
    session: &[u8; 16],
    mirror: bool,
) -> Result<(), Reason> {
    let Some(origin) = origin else { return Ok(()) };
    let Some(marks) = marks(store, place.directory(), session) else {
        return Ok(());
    };
    let is_there = store.stat(place.directory())?.is_some();
    // What becomes the destination itself may be the same directory: then nothing happens.
    let own = usize::from(is_there && matches!(place, Placement::As(_)));
    if mirror && origin.above.len() >= MAX_MARKS {
        let text = format!(
            "the source lies {MAX_MARKS} directories deep or more, where it cannot be told whether a mirror would remove it; \
             mirror a directory above it"
        );
        return Err(Reason::new(Code::Nested, text));
    }
    let text = if marks
        .iter()
        .skip(own)
        .any(|mark| origin.sources.contains(mark))
    {
        "the destination lies inside of what is to be sent; choose one outside of it"
    } else if mirror
        && is_there
        && marks
            .first()
            .is_some_and(|mark| origin.above.contains(mark))
    {
        "the source lies inside of the destination, and a mirror would remove it there"
    } else {
        return Ok(());
    };
    Err(Reason::new(Code::Nested, text))
}

/// Of a directory, or the nearest above it that is there, and of all above that.
fn marks(store: &dyn Store, path: &RelativePath, session: &[u8; 16]) -> Option<Vec<Mark>> {
    static BOOT: OnceLock<Option<Vec<u8>>> = OnceLock::new();
    let boot = BOOT
        .get_or_init(|| std::fs::read(BOOT_ID).ok().filter(|id| id.len() >= 16))
        .as_ref()?;
    let secret = blake3::derive_key(CONTEXT, boot);
    let mark = |(device, inode): (u64, u64)| {
        let mut hasher = blake3::Hasher::new_keyed(&secret);
        hasher
            .update(session)
            .update(&device.to_be_bytes())
            .update(&inode.to_be_bytes());
        let mut mark = [0; 16];
        hasher.finalize_xof().fill(&mut mark);
        Mark::from(mark)
    };
    Some(store.ancestry(path).into_iter().map(mark).collect())
}
