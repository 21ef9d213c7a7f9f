//! The trait of a store, and of its probe for times.

use std::time::Duration;

use super::file_id::FileId;
use super::folding::Folding;
use super::metadata::{Attributes, Metadata, MetadataWarnings};
use super::source::{Source, has_content};
use super::upload::{PartialKey, Upload};
use crate::error::Reason;
use crate::protocol::path::RelativePath;
use crate::protocol::{Time, Xattr};

/// A store of files, addressed by [`RelativePath`].
///
/// No call follows a symbolic link, neither as the last component nor on the way, and none leaves the store.
///
/// **Calls.** Every call blocks, and several threads call at the same time. haul calls from threads that may block. A
/// call cannot be cancelled: it runs to its end even when its session is over, so that what it does is never left half
/// done. Names in results are bytes, without a `/`.
///
/// **Errors** are [`Reason`]s, ready to cross the wire: their text begins with the path in the store, and shows nothing
/// of where the store is. Every call may fail with [`Symlink`] or [`NotDirectory`] when a directory of the path is a
/// link or a file, with [`NotAllowed`] for a reserved name, with [`PermissionDenied`], and with [`Io`] for any other
/// error of the system. Calls that write may also fail with [`NoSpace`] and [`BadName`]. The methods name the others.
///
/// [`Symlink`]: crate::error::Code::Symlink
/// [`NotDirectory`]: crate::error::Code::NotDirectory
/// [`NotAllowed`]: crate::error::Code::NotAllowed
/// [`PermissionDenied`]: crate::error::Code::PermissionDenied
/// [`Io`]: crate::error::Code::Io
/// [`NoSpace`]: crate::error::Code::NoSpace
/// [`BadName`]: crate::error::Code::BadName
pub trait Store: Send + Sync + 'static {
    /// Returns the metadata of a name; `None` when it does not exist, or a directory above it does not. The root of the
    /// store always exists. Metadata of a link is that of the link itself.
    fn stat(&self, path: &RelativePath) -> Result<Option<Metadata>, Reason>;

    /// Returns the names in a directory, unordered, without partials. Fails with [`NotFound`] when it does not exist.
    ///
    /// [`NotFound`]: crate::error::Code::NotFound
    fn names(&self, directory: &RelativePath) -> Result<Vec<Vec<u8>>, Reason>;

    /// Returns the transferable extended attributes of a file or directory, by name, and a warning for each that does
    /// not fit an entry. `privileged` includes those that require an owner. A store without extended attributes returns
    /// none.
    fn xattrs(
        &self,
        path: &RelativePath,
        privileged: bool,
    ) -> Result<(Vec<Xattr>, MetadataWarnings), Reason> {
        let _ = (path, privileged);
        Ok((Vec::new(), MetadataWarnings::new()))
    }

    /// Calls `each` for every name in a directory, unordered, without partials, until it returns `false`. If it can, a
    /// store keeps only one name in memory. Fails as [`names`](Self::names) does, also after some names.
    fn visit(
        &self,
        directory: &RelativePath,
        each: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<(), Reason> {
        let names = self.names(directory)?;
        names.iter().all(|name| each(name));
        Ok(())
    }

    /// Reads the target of a symbolic link: bytes that need not lead anywhere. Fails with [`NotFound`] when the name
    /// does not exist, and with [`Unreadable`] when it is no link.
    ///
    /// [`NotFound`]: crate::error::Code::NotFound
    /// [`Unreadable`]: crate::error::Code::Unreadable
    fn read_link(&self, path: &RelativePath) -> Result<Vec<u8>, Reason>;

    /// Reports whether a file of size 0 has content anyway, as files in /proc have. Called for such files only; `seen`
    /// is their metadata. A store that knows the answer need not read a byte of each.
    fn has_unsized_content(&self, path: &RelativePath, seen: &Metadata) -> Result<bool, Reason> {
        let _ = seen;
        has_content(&*self.open(path)?, path)
    }

    /// Opens a regular file for reading. Never blocks on a FIFO or device: those are refused as [`Special`]. Fails with
    /// [`NotFound`] when the name does not exist, with [`IsDirectory`] for a directory, and with [`Symlink`] for a link.
    ///
    /// [`Special`]: crate::error::Code::Special
    /// [`NotFound`]: crate::error::Code::NotFound
    /// [`IsDirectory`]: crate::error::Code::IsDirectory
    /// [`Symlink`]: crate::error::Code::Symlink
    fn open(&self, path: &RelativePath) -> Result<Box<dyn Source>, Reason>;

    /// Creates a partial beside the final name, which stays unchanged until [`Upload::commit`]. Creates missing parent
    /// directories as `mkdir -p` does (0777 less umask). Resumes a partial of the same key with its content.
    ///
    /// Fails with [`Busy`] while another process has the same partial open, and with [`IsDirectory`] when the path is
    /// the store itself.
    ///
    /// [`Busy`]: crate::error::Code::Busy
    /// [`IsDirectory`]: crate::error::Code::IsDirectory
    fn create(&self, path: &RelativePath, key: &PartialKey) -> Result<Box<dyn Upload>, Reason>;

    /// Creates a directory unless it exists. It is private (0700) until its attributes are set. Creates missing parent
    /// directories as `mkdir -p` does.
    fn make_directory(&self, path: &RelativePath) -> Result<(), Reason>;

    /// Sets the final metadata of a file or directory. Returns a warning for each attribute that the store cannot keep.
    /// Fails with [`NotFound`] when the name does not exist, and with [`Special`] for a device and the like.
    ///
    /// [`NotFound`]: crate::error::Code::NotFound
    /// [`Special`]: crate::error::Code::Special
    fn set_attributes(
        &self,
        path: &RelativePath,
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason>;

    /// Creates a symbolic link, and atomically replaces a file or link of that name. The target is never looked at.
    /// Creates missing parent directories as `mkdir -p` does. Returns warnings as [`set_attributes`] does.
    ///
    /// Fails with [`BadName`] for a target that no link can hold, with [`Exists`] when the name exists and the
    /// attributes say `exclusive`, and with [`IsDirectory`] when it is a directory.
    ///
    /// [`set_attributes`]: Self::set_attributes
    /// [`BadName`]: crate::error::Code::BadName
    /// [`Exists`]: crate::error::Code::Exists
    /// [`IsDirectory`]: crate::error::Code::IsDirectory
    fn make_symlink(
        &self,
        path: &RelativePath,
        target: &[u8],
        attributes: &Attributes,
    ) -> Result<MetadataWarnings, Reason>;

    /// Makes `new` a hard link to the regular file `existing`, and atomically replaces a file or link of that name.
    /// Fails if the file system has no hard links, or if the two are on different file systems.
    fn link(&self, existing: &RelativePath, new: &RelativePath) -> Result<(), Reason>;

    /// Removes a file, link, device or the like, or an empty directory. A link's target is never touched. Fails for the
    /// store itself, with [`NotFound`] for a name that does not exist, and for a directory that contains anything, such
    /// as a partial.
    ///
    /// [`NotFound`]: crate::error::Code::NotFound
    fn remove(&self, path: &RelativePath) -> Result<(), Reason>;

    /// Returns device and inode of a directory, or of its nearest existing parent, and of all directories above that,
    /// also above the store. Shows whether a directory is inside another. Empty for a store outside the file system.
    fn ancestry(&self, path: &RelativePath) -> Vec<FileId> {
        let _ = path;
        Vec::new()
    }

    /// Returns which of the `wanted` differences between names a directory ignores, or will ignore once it exists. A
    /// store may create a temporary file to find out, if it `may_write`.
    fn folding(&self, directory: &RelativePath, wanted: Folding, may_write: bool) -> Folding {
        let _ = (directory, wanted, may_write);
        Folding::default()
    }

    /// Renames an entry to exactly the spelling of `path`, if the directory folds names and stores it with another one.
    /// `false` if it still has another spelling: some file systems show all names in lower case. A store that does not
    /// fold names has nothing to do.
    fn correct_spelling(&self, path: &RelativePath, folding: Folding) -> Result<bool, Reason> {
        let _ = (path, folding);
        Ok(true)
    }

    /// Returns a probe for the times that the file system of `beside` keeps. The probe may create a file, and removes
    /// it when it is dropped. `None` when the store cannot find out.
    fn time_probe(&self, beside: &RelativePath) -> Option<Box<dyn TimeProbe>> {
        let _ = beside;
        None
    }

    /// Fails when the store is no longer where it was opened, for example because the directory was renamed or mounted
    /// over. Every session of a server calls this first.
    fn check_root(&self) -> Result<(), Reason> {
        Ok(())
    }

    /// Syncs to disk everything that was created or found in this store so far. What was committed before the call is
    /// durable after it.
    fn sync(&self) -> Result<(), Reason>;

    /// Removes all partials in the store that no upload has open and that were last written more than `age` ago.
    /// Returns how many it removed. Skips directories that it cannot read.
    fn sweep(&self, age: Duration) -> Result<u64, Reason>;
}

/// Probes which times a file system keeps: some round them, or clamp them to a first and last year.
pub trait TimeProbe: Send {
    /// Returns the time of last modification as the file system keeps it; `None` if it cannot find out.
    fn kept(&mut self, time: Time) -> Option<Time>;
}
