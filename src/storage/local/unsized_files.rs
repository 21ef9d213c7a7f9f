//! Files of reported size 0 that have content: those of /proc and /sys, and of some FUSE file systems.

use std::collections::HashMap;
use std::sync::Mutex;

use rustix::fs::{fstat, fstatfs};

use super::root::Root;
use super::stat::device_of;
use crate::error::lock::lock;
use crate::protocol::path::RelativePath;
use crate::storage::metadata::Metadata;

/// Types of file systems, as Linux numbers them (statfs(2)), on which a file of size 0 is empty: those on disks or in
/// memory, and NFS. On all others a byte is read to find out, which costs a few calls for each empty file.
const SIZED_FILE_SYSTEMS: [u64; 20] = [
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // btrfs
    0x0102_1994, // tmpfs
    0x8584_58f6, // ramfs
    0x794c_7630, // overlayfs
    0xf2f5_2010, // F2FS
    0x2fc1_2fc1, // ZFS
    0xca45_1a4e, // bcachefs
    0xe0f5_e1e2, // EROFS
    0x7371_7368, // squashfs
    0x6969,      // NFS
    0x4d44,      // FAT
    0x2011_bab0, // exFAT
    0x7366_746e, // NTFS (ntfs3)
    0x3153_464a, // JFS
    0x5265_4973, // ReiserFS
    0x482b,      // HFS+
    0x9660,      // ISO 9660
    0x1501_3346, // UDF
];
/// Most devices in the cache. A full cache is cleared, which only costs time.
const MAX_DEVICES: usize = 4096;

/// Whether reported sizes are right, by device.
#[derive(Default)]
pub(super) struct SizedDevices(Mutex<HashMap<u64, bool>>);

impl SizedDevices {
    /// Whether the file system of a file reports correct sizes.
    pub(super) fn are_sized(&self, root: &Root, path: &RelativePath, seen: &Metadata) -> bool {
        if cfg!(not(target_os = "linux")) {
            return false;
        }
        let file_device = seen.version.file.device;
        let known = |devices: &HashMap<u64, bool>| devices.get(&file_device).copied();
        if let Some(sized) = known(&lock(&self.0)) {
            return sized;
        }
        let Some((sized, device)) = query_directory(root, path) else {
            return false;
        };
        // A file that is itself a mount point is on another device than its directory.
        if device != file_device {
            return false;
        }
        let mut devices = lock(&self.0);
        if devices.len() >= MAX_DEVICES {
            devices.clear();
        }
        devices.insert(file_device, sized);
        sized
    }
}

/// Whether reported sizes are right in the directory of a path, and the device of that directory.
#[allow(
    clippy::unnecessary_cast,
    reason = "the type of a file system has other types on other systems"
)]
fn query_directory(root: &Root, path: &RelativePath) -> Option<(bool, u64)> {
    let (directory, _) = root.parent(path).ok()??;
    // Only the low half counts, and some of the numbers are sign-extended.
    let kind = fstatfs(&directory).ok()?.f_type as u64 & u64::from(u32::MAX);
    let device = device_of(&fstat(&directory).ok()?);
    Some((SIZED_FILE_SYSTEMS.contains(&kind), device))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::storage::{LocalStore, Store};

    fn file(name: &str) -> RelativePath {
        RelativePath::from_components([name]).unwrap()
    }

    #[test]
    fn a_byte_is_read_only_if_sizes_may_be_wrong() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("empty"), "").unwrap();
        let sized = |at: &Path, name: &str| {
            let root = Root::open(at).unwrap();
            let store = LocalStore::open(at).unwrap();
            let seen = store.stat(&file(name)).unwrap().unwrap();
            SizedDevices::default().are_sized(&root, &file(name), &seen)
        };
        if Path::new("/proc/version").exists() {
            assert!(!sized(Path::new("/proc"), "version"));
        }
        if !sized(directory.path(), "empty") {
            return eprintln!("skipped: temporary files are on none of the known file systems");
        }
        // A cached device is not queried again.
        let root = Root::open(directory.path()).unwrap();
        let store = LocalStore::open(directory.path()).unwrap();
        let seen = store.stat(&file("empty")).unwrap().unwrap();
        let devices = SizedDevices(Mutex::new(HashMap::from([(
            seen.version.file.device,
            true,
        )])));
        std::fs::remove_file(directory.path().join("empty")).unwrap();
        assert!(devices.are_sized(&root, &file("empty"), &seen));
    }

    #[test]
    fn proc_files_have_content_and_empty_files_have_none() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("empty"), "").unwrap();
        let has = |at: &Path, name: &str| {
            let store = LocalStore::open(at).unwrap();
            let seen = store.stat(&file(name)).unwrap().unwrap();
            assert_eq!(seen.size, 0);
            store.has_unsized_content(&file(name), &seen).unwrap()
        };
        assert!(!has(directory.path(), "empty"));
        if Path::new("/proc/version").exists() {
            assert!(has(Path::new("/proc"), "version"));
        }
    }
}
