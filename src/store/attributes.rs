//! The final metadata of what stands on disk. What the filesystem cannot keep, or the system does not permit, is no
//! failure of the file: it is told beside it.

use std::fs::File;
use std::io;

use rustix::fs::{Stat, fstat};
use rustix::io::Errno;

use super::closed;
use super::fault::fault;
use super::{Attributes, Lapses, PERMISSIONS};
use crate::error::Why;
use crate::path::RelativePath;
use crate::wire::{Aspect, Time};

/// What the system says of metadata that it cannot or may not keep; all else, such as a broken disk, fails the file.
const LAPSES: &[Errno] =
    &[Errno::PERM, Errno::ACCESS, Errno::NOTSUP, Errno::OPNOTSUPP, Errno::NOSYS, Errno::OVERFLOW, Errno::INVAL];

/// Sets what is to be set; what is not carried over stays, such as the set-group-ID of a shared directory.
pub(super) fn set(file: &File, path: &RelativePath, attributes: &Attributes) -> Result<Lapses, Why> {
    let there = fstat(file).map_err(|e| fault(path, "look at it", e))?;
    let mut lapses = Lapses::new();
    if let Some(mode) = attributes.mode {
        let kept = mode_of(&there) & !PERMISSIONS;
        let set = closed::set_mode(file, kept | mode & PERMISSIONS);
        allow(&mut lapses, Aspect::Mode, set).map_err(|e| fault(path, "set its mode", e))?;
    }
    if let Some(modified) = attributes.modified {
        let set = closed::set_time(file, modified).and_then(|()| check_time(file, modified));
        allow(&mut lapses, Aspect::Time, set).map_err(|e| fault(path, "set its time", e))?;
    }
    Ok(lapses)
}

/// Filesystems cut times that they cannot hold without a word. That one keeps whole seconds only is no news.
#[allow(clippy::unnecessary_cast, reason = "the fields of stat have other types on other systems")]
fn check_time(file: &File, modified: Time) -> rustix::io::Result<()> {
    let seconds = fstat(file)?.st_mtime as i64;
    if seconds == modified.seconds { Ok(()) } else { Err(Errno::OVERFLOW) }
}

/// Takes what a filesystem has no notion of, or does not let us do, as a lapse.
pub(super) fn allow(lapses: &mut Lapses, aspect: Aspect, result: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match result {
        Err(e) if LAPSES.contains(&e) => {
            lapses.push((aspect, said(e)));
            Ok(())
        }
        other => other,
    }
}

/// What the system calls an error, without its number.
fn said(error: Errno) -> String {
    let text = io::Error::from(error).to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}

#[allow(clippy::unnecessary_cast, reason = "the fields of stat have other types on other systems")]
fn mode_of(stat: &Stat) -> u32 {
    stat.st_mode as u32 & 0o7777
}
