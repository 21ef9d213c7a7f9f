//! Error messages of a store: one sentence for each code, with the path and what the user can do.
//!
//! The user at the other end reads them, so they name only the path below the store.

use std::io;

use crate::error::{Code, Reason};
use crate::protocol::MAX_SYMLINK;
use crate::protocol::path::RelativePath;

/// A refusal that follows from the state of the store, not from a system error.
pub(crate) fn refusal(code: Code, path: &RelativePath) -> Reason {
    let sentence = match code {
        Code::Symlink => {
            "a symbolic link stands there, and none is followed in a store; remove it or choose another name"
        }
        Code::NotDirectory => {
            "it is no directory, so nothing can stand below it; move it away or choose another name"
        }
        Code::IsDirectory => {
            "a directory stands there, where a file should be; move it away or choose another name"
        }
        Code::Special => {
            "it is no regular file, directory or symbolic link; only those are carried over"
        }
        Code::Exists => {
            "another stands there already, and is to be left; choose another name, or another way with --existing"
        }
        Code::NotFound => "no such file or directory; check the name",
        Code::Busy => {
            "another session has this file open; wait until it ends, then run the same command again"
        }
        Code::NoSpace => {
            "no space left on the receiver's disk; what stood there before is untouched. Make room, then run the same \
             command again"
        }
        Code::PermissionDenied => {
            "the system denies access; what stood there before is untouched. Check the permissions of it and of its \
             directory"
        }
        Code::NotAllowed => {
            "the keys and settings of the machine are kept there, and no session reads or changes them"
        }
        Code::BadName => "the filesystem does not take this name; choose another one",
        _ => "it did not go through; what stood there before is untouched",
    };
    Reason::new(code, format!("{path}: {sentence}"))
}

/// The error that the system returned when `what` (a verb phrase) was tried on `path`.
pub(crate) fn fault(path: &RelativePath, what: &str, error: impl Into<io::Error>) -> Reason {
    let error = error.into();
    if error.raw_os_error() == Some(rustix::io::Errno::DQUOT.raw_os_error()) {
        let sentence = "the quota on the receiver's disk is used up; what stood there before is untouched. Make room, then \
                        run the same command again";
        return Reason::new(Code::NoSpace, format!("{path}: {sentence}"));
    }
    if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) {
        let text = format!(
            "{path}: cannot {what}: the system holds it busy, as it does a mount point such as a file that is mounted into a \
             container; change it where it comes from, or choose another name"
        );
        return Reason::new(Code::Io, text);
    }
    match Reason::from_io(&error).code {
        code @ (Code::Io | Code::NotDirectory) => {
            Reason::new(code, format!("{path}: cannot {what}: {error}"))
        }
        code => refusal(code, path),
    }
}

/// Refuses targets that no symbolic link can hold.
pub(crate) fn check_target(path: &RelativePath, target: &[u8]) -> Result<(), Reason> {
    if target.is_empty() || target.len() > MAX_SYMLINK || target.contains(&0) {
        let text = format!("{path}: a symbolic link holds 1 to {MAX_SYMLINK} bytes and no NUL");
        return Err(Reason::new(Code::BadName, text));
    }
    Ok(())
}
