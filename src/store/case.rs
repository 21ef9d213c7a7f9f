//! Whether a directory tells names apart that differ only in case. Nothing is written to find out.

use std::os::fd::AsFd;

/// Filesystems that tell no case, by the magic numbers of Linux's `statfs(2)`: FAT, exFAT, NTFS (both drivers), SMB (three).
#[cfg(target_os = "linux")]
const FOLDING: [u32; 7] = [
    0x4d44,
    0x2011_bab0,
    0x5346_544e,
    0x7366_746e,
    0xff53_4d42,
    0xfe53_4d42,
    0x517b,
];
/// `FS_CASEFOLD_FL`: a directory of ext4 or f2fs that was made so.
#[cfg(target_os = "linux")]
const CASEFOLD: u32 = 0x4000_0000;

/// Whether names in the directory are the same that differ only in case.
#[cfg(target_os = "linux")]
#[allow(
    clippy::unnecessary_cast,
    reason = "f_type has another type on other architectures"
)]
pub(super) fn folds(directory: impl AsFd) -> bool {
    let filesystem =
        rustix::fs::fstatfs(&directory).is_ok_and(|stat| FOLDING.contains(&(stat.f_type as u32)));
    filesystem
        || rustix::fs::ioctl_getflags(&directory)
            .is_ok_and(|flags| flags.bits() as u32 & CASEFOLD != 0)
}

/// Whether names in the directory are the same that differ only in case: as macOS is installed, they are.
#[cfg(not(target_os = "linux"))]
pub(super) fn folds(_: impl AsFd) -> bool {
    cfg!(any(target_os = "macos", target_os = "ios"))
}
