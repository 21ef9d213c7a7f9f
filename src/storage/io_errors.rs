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
            "it is a symbolic link, and a store follows none; remove it or choose another name"
        }
        Code::NotDirectory => {
            "it is not a directory, so it cannot contain files; move it away or choose another name"
        }
        Code::IsDirectory => "a directory has this name; move it away or choose another name",
        Code::Special => {
            "it is not a regular file, directory or symbolic link; only those are transferred"
        }
        Code::Exists => {
            "it exists already and is kept; choose another name, or another mode with --existing"
        }
        Code::NotFound => "no such file or directory; check the name",
        Code::Busy => {
            "another session has this file open; wait until it ends, then run the same command again"
        }
        Code::NoSpace => {
            "no space left on the receiver's disk (an existing file is unchanged); make room, then run the same command again"
        }
        Code::PermissionDenied => {
            "the system denies access (an existing file is unchanged); check the permissions of it and of its directory"
        }
        Code::NotAllowed => {
            "it holds the machine's keys and settings, which no session reads or changes"
        }
        Code::BadName => "the file system does not accept this name; choose another one",
        _ => "it failed (an existing file is unchanged)",
    };
    Reason::new(code, format!("{path}: {sentence}"))
}

/// The error that the system returned when `what` (a verb phrase) was tried on `path`.
pub(crate) fn fault(path: &RelativePath, what: &str, error: impl Into<io::Error>) -> Reason {
    let error = error.into();
    if error.raw_os_error() == Some(rustix::io::Errno::DQUOT.raw_os_error()) {
        let sentence = "the quota on the receiver's disk is used up (an existing file is unchanged); make room, then run \
                        the same command again";
        return Reason::new(Code::NoSpace, format!("{path}: {sentence}"));
    }
    if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) {
        let text = format!(
            "{path}: cannot {what}: the system reports it busy; it may be a mount point, such as a file that is mounted \
             into a container; change it at its source, or choose another name"
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

/// The system's text for an error, without its number.
pub(super) fn error_text(error: rustix::io::Errno) -> String {
    let text = io::Error::from(error).to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}

/// Refuses targets that no symbolic link can hold.
pub(crate) fn check_target(path: &RelativePath, target: &[u8]) -> Result<(), Reason> {
    if target.is_empty() || target.len() > MAX_SYMLINK || target.contains(&0) {
        let text = format!(
            "{path}: the target of a symbolic link must have 1 to {MAX_SYMLINK} bytes and no NUL"
        );
        return Err(Reason::new(Code::BadName, text));
    }
    Ok(())
}
