//! Detects a source inside the destination or the destination inside a source, on one machine.
//!
//! The sender identifies directories by marks that only the same running system can compare, and that reveal nothing
//! to any other. A mark is a digest of device and inode, keyed by a secret of the boot and the session id.

use std::sync::OnceLock;

use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{MAX_MARKS, Mark, Origin};
use crate::storage::walk::Tree;
use crate::storage::{FileId, Store};
use crate::transfer::receive::Placement;

/// A random id of the boot, which does not leave the machine (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const CONTEXT: &str = "haul/1 origin: a directory of this boot of this machine";

/// Returns the marks of the source directories and, for a single source, of the directories above it. Blocks.
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

/// Refuses a destination inside a source, because its files would be sent again and again. Refuses the source of a
/// mirror inside the destination, because the mirror would remove it. Blocks.
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
    // A source may be the destination itself; then nothing happens.
    let own = usize::from(is_there && matches!(place, Placement::As(_)));
    if mirror && origin.above.len() >= MAX_MARKS {
        let text = format!(
            "cannot mirror a source that is {MAX_MARKS} or more directories deep: it may be inside the destination; \
             mirror a directory above it"
        );
        return Err(Reason::new(Code::Nested, text));
    }
    let text = if marks
        .iter()
        .skip(own)
        .any(|mark| origin.sources.contains(mark))
    {
        "the destination is inside a source; choose one outside of it"
    } else if mirror
        && is_there
        && marks
            .first()
            .is_some_and(|mark| origin.above.contains(mark))
    {
        "the source is inside the destination, and the mirror would remove it"
    } else {
        return Ok(());
    };
    Err(Reason::new(Code::Nested, text))
}

/// Returns the marks of a directory, or of its nearest existing parent, and of all directories above.
fn marks(store: &dyn Store, path: &RelativePath, session: &[u8; 16]) -> Option<Vec<Mark>> {
    static BOOT: OnceLock<Option<Vec<u8>>> = OnceLock::new();
    let boot = BOOT
        .get_or_init(|| std::fs::read(BOOT_ID).ok().filter(|id| id.len() >= 16))
        .as_ref()?;
    let secret = blake3::derive_key(CONTEXT, boot);
    let mark = |file: FileId| {
        let mut hasher = blake3::Hasher::new_keyed(&secret);
        hasher
            .update(session)
            .update(&file.device.to_be_bytes())
            .update(&file.inode.to_be_bytes());
        let mut mark = [0; 16];
        hasher.finalize_xof().fill(&mut mark);
        Mark::from(mark)
    };
    Some(store.ancestry(path).into_iter().map(mark).collect())
}
