//! Which names a directory treats as equal. haul looks names up to find out, because FUSE, SMB and mount options hide
//! the kind of file system.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::fs::{Dir, fstat, renameat};
use unicode_normalization::UnicodeNormalization;

use super::directory::Directory;
use super::names::{PRIVATE_FILE, create_new, remove, temporary_name, temporary_name_with};
use super::root::Root;
use super::stat::device_of;
use crate::error::Reason;
use crate::error::lock::lock;
use crate::protocol::path::{PARTIAL_ACCENT, RelativePath};
use crate::storage::folding::{Folding, trimmed};
use crate::storage::io_errors::fault;

/// Most names of a directory that are tried.
const MAX_SAMPLES: usize = 64;
/// Variants that turn out to be separate names before a temporary file is created instead.
const MAX_TRIES: usize = 4;
/// How long the result of a temporary file is cached. Limited, because another file system may be mounted later.
const CACHE_TIME: Duration = Duration::from_secs(600);
/// Most file systems with a cached result.
const MAX_CACHED: usize = 64;
/// `FS_CASEFOLD_FL`: an empty directory of ext4, f2fs or tmpfs has this flag if it ignores case.
#[cfg(target_os = "linux")]
const CASEFOLD_FLAG: u32 = 0x4000_0000;

/// Cached results of temporary files, by device.
#[derive(Default)]
pub(super) struct ProbedFolding(Mutex<HashMap<u64, (Instant, Folding)>>);

/// Finds out which of the `wanted` differences a directory ignores. A directory that does not exist yet will behave
/// like its parent. Mostly nothing is written: existing names are looked up by variants. Only if no existing name
/// tells, at the top of a file system, a temporary file is created, if it `may_write`.
pub(super) fn probe_folding(
    root: &Root,
    probed: &ProbedFolding,
    directory: &RelativePath,
    wanted: Folding,
    may_write: bool,
) -> Folding {
    let mut found = Folding::default();
    let mut open = wanted;
    let mut next = Some(directory.clone());
    while let Some(path) = next {
        next = path.parent();
        let Ok(Some(here)) = root.find(&path) else {
            continue;
        };
        probe_names(&here, &mut found, &mut open);
        if !open.any() {
            break;
        }
        if has_casefold_flag(&here) {
            let wanted = |asked, known| known || asked;
            return Folding {
                case: wanted(open.case, found.case),
                form: wanted(open.form, found.form),
                ends: found.ends,
            };
        }
        // A directory behaves like its parent, unless another file system starts there.
        let above = next
            .as_ref()
            .and_then(|above| root.find(above).ok().flatten());
        if above.is_none_or(|above| !same_device(&here, &above)) {
            let by_file = probe_file(root, probed, &here, may_write);
            found.case |= open.case && by_file.case;
            found.form |= open.form && by_file.form;
            found.ends |= open.ends && by_file.ends;
            break;
        }
    }
    found
}

/// Tries existing names. A settled difference is no longer open.
fn probe_names(directory: &Directory<'_>, found: &mut Folding, open: &mut Folding) {
    let mut tries = MAX_TRIES;
    for name in names(directory).take(MAX_SAMPLES) {
        if !open.any() || tries == 0 {
            return;
        }
        let mut ask = |open: &mut bool, found: &mut bool, other: Option<Vec<u8>>| {
            let Some(other) = other.filter(|other| *open && *other != name) else {
                return;
            };
            match is_found(directory, &other) {
                // The variant may be a separate name.
                Some(true) if names(directory).any(|listed| listed == other) => {
                    tries = tries.saturating_sub(1);
                }
                Some(true) => (*open, *found) = (false, true),
                // The variant is not found although the name exists. (A partial may have gone meanwhile.)
                Some(false) if is_found(directory, &name) == Some(true) => *open = false,
                Some(false) => tries = tries.saturating_sub(1),
                None => tries = tries.saturating_sub(1),
            }
        };
        ask(&mut open.case, &mut found.case, Some(swap_case(&name)));
        ask(&mut open.form, &mut found.form, other_form(&name));
        ask(
            &mut open.ends,
            &mut found.ends,
            Some([&name, &b"."[..]].concat()),
        );
    }
}

/// The names in a directory, as far as they can be read.
fn names(directory: &Directory<'_>) -> impl Iterator<Item = Vec<u8>> {
    let open = directory.readable().and_then(Dir::new).ok();
    let names = open.into_iter().flatten().map_while(Result::ok);
    names
        .map(|entry| entry.file_name().to_bytes().to_vec())
        .filter(|name| name != b"." && name != b"..")
}

/// Whether a name is found; `None` for a name that is not valid there.
fn is_found(directory: &Directory<'_>, name: &[u8]) -> Option<bool> {
    directory.stat(name).ok().map(|there| there.is_some())
}

/// A name with the case of its ASCII letters swapped.
fn swap_case(name: &[u8]) -> Vec<u8> {
    let swap = |byte: &u8| match byte.is_ascii_uppercase() {
        true => byte.to_ascii_lowercase(),
        false => byte.to_ascii_uppercase(),
    };
    name.iter().map(swap).collect()
}

/// A name in another Unicode normal form, if it is valid UTF-8.
fn other_form(name: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(name).ok()?;
    let composed: String = text.nfc().collect();
    let other = match composed == text {
        true => text.nfd().collect(),
        false => composed,
    };
    Some(other.into_bytes())
}

/// Creates a temporary file and looks it up by variants of its name.
fn probe_file(
    root: &Root,
    probed: &ProbedFolding,
    directory: &Directory<'_>,
    may_write: bool,
) -> Folding {
    let Ok(stat) = fstat(directory) else {
        return Folding::default();
    };
    let mut probed = lock(&probed.0);
    match probed.get(&device_of(&stat)) {
        Some((since, folding)) if since.elapsed() < CACHE_TIME => return *folding,
        _ if !may_write => return Folding::default(),
        _ => {}
    }
    // Not every file system accepts non-ASCII characters.
    let names = [PARTIAL_ACCENT, ""].map(temporary_name_with);
    let create =
        |name: &&String| create_new(root, directory, name.as_bytes(), PRIVATE_FILE).is_ok();
    let Some(name) = names.iter().find(create).map(String::as_bytes) else {
        return Folding::default();
    };
    let finds = |other: Vec<u8>| other != name && is_found(directory, &other) == Some(true);
    let folding = Folding {
        case: finds(swap_case(name)),
        form: other_form(name).is_some_and(finds),
        ends: finds([name, b"."].concat()),
    };
    let _ = remove(root, directory, name);
    if probed.len() >= MAX_CACHED {
        probed.clear();
    }
    probed.insert(device_of(&stat), (Instant::now(), folding));
    folding
}

fn same_device(one: &Directory<'_>, other: &Directory<'_>) -> bool {
    match (fstat(one), fstat(other)) {
        (Ok(one), Ok(other)) => device_of(&one) == device_of(&other),
        _ => false,
    }
}

/// Whether an empty directory has the flag for ignoring case and normal form.
#[cfg(target_os = "linux")]
#[allow(
    clippy::unnecessary_cast,
    reason = "the flags have another type on other architectures"
)]
fn has_casefold_flag(directory: &Directory<'_>) -> bool {
    directory
        .readable()
        .and_then(rustix::fs::ioctl_getflags)
        .is_ok_and(|flags| flags.bits() as u32 & CASEFOLD_FLAG != 0)
}

#[cfg(not(target_os = "linux"))]
fn has_casefold_flag(_: &Directory<'_>) -> bool {
    false
}

/// Renames an entry to exactly this spelling, if the directory stores it with an equal name; `false` if it still has
/// another spelling.
pub(super) fn correct_spelling(
    root: &Root,
    path: &RelativePath,
    folding: Folding,
) -> Result<bool, Reason> {
    let cannot = |e| fault(path, "change the spelling of its name", e);
    let Some((directory, name)) = root.parent(path)? else {
        return Ok(true);
    };
    let key = folding.key(name);
    let mut same: Vec<_> = names(&directory)
        .filter(|listed| folding.key(listed) == key)
        .collect();
    let Some(stored) = same.pop().filter(|_| same.is_empty()) else {
        return Ok(true);
    };
    // The file system would trim the end again.
    let is_same = |listed: &[u8]| listed == name || folding.ends && listed == trimmed(name);
    if is_same(&stored) {
        return Ok(true);
    }
    // Renames by way of a third name: most systems treat the two as the same file, and a direct rename does nothing.
    let temporary = temporary_name();
    let rename = |from: &[u8], to: &[u8]| {
        let rename = || renameat(&directory, from, &directory, to);
        root.modes.change_names(&directory, rename)
    };
    rename(&stored, temporary.as_bytes()).map_err(cannot)?;
    rename(temporary.as_bytes(), name).map_err(|e| {
        let _ = rename(temporary.as_bytes(), &stored);
        cannot(e)
    })?;
    Ok(names(&directory).any(|listed| is_same(&listed)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_sensitive_directory_is_detected() {
        let place = tempfile::tempdir().unwrap();
        let root = Root::open(place.path()).unwrap();
        let probed = ProbedFolding::default();
        let path = RelativePath::from_components(["d"]).unwrap();
        let ask = || probe_folding(&root, &probed, &path, Folding::ALL, true);
        assert_eq!(ask(), Folding::default(), "neither is there: by a file");
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
        std::fs::create_dir(place.path().join("d")).unwrap();
        // Separate names, and hard links of one file, are not case variants.
        let [one, other] = ["d/\u{e9}a", "d/\u{e9}A"].map(|name| place.path().join(name));
        std::fs::write(&one, "1").unwrap();
        std::fs::hard_link(&one, &other).unwrap();
        assert_eq!(ask(), Folding::default());
    }
}
