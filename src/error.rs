//! Errors, and the codes that report them to the peer.
//!
//! [`Error`] ends an operation. [`Reason`] says why one file or one session failed, and is sent to the peer. A session in
//! which single files failed is not an [`Error`]: its [`Outcome`](crate::transfer::events::Event) reports the failures.

pub(crate) mod text;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::error::text::PeerText;

/// `Result` with haul's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The longest text that a peer may send with a code, in bytes.
pub(crate) const MAX_TEXT: usize = 1024;

/// Whether an error of `flock` means that the file system has no locks: Lustre without its mount option, some FUSE file
/// systems, NFS without its lock service. NFS also refuses (EBADF) to lock a file that is open for reading only.
pub(crate) fn knows_no_flock(error: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    [
        Errno::NOSYS,
        Errno::NOTSUP,
        Errno::OPNOTSUPP,
        Errno::INVAL,
        Errno::NOLCK,
        Errno::BADF,
    ]
    .contains(&error)
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        /// A code that a peer sends: in verdicts and receipts, and as QUIC application error code when a stream is reset or
        /// stopped, or a connection is closed (RFC 9000, section 20.2). PROTOCOL.md lists them.
        ///
        /// Codes of newer peers are kept as [`Code::Other`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $($(#[$doc])* $name,)*
            /// A code that this version does not know.
            Other(u32),
        }

        impl Code {
            /// All codes of this version, by number.
            pub const ALL: &'static [Code] = &[$(Code::$name),*];

            /// Returns the number on the wire.
            pub fn number(self) -> u32 {
                match self { $(Code::$name => $value,)* Code::Other(number) => number }
            }

            /// Returns the code of a number on the wire.
            pub fn from_number(number: u32) -> Self {
                match number { $($value => Code::$name,)* other => Code::Other(other) }
            }

            /// Returns the name in PROTOCOL.md.
            pub fn name(self) -> &'static str {
                match self { $(Code::$name => stringify!($name),)* Code::Other(_) => "Other" }
            }

            fn text(self) -> &'static str {
                match self { $(Code::$name => $text,)* Code::Other(_) => "an error that this version does not know" }
            }
        }
    };
}

codes! {
    /// No error: the operation has ended.
    Done = 0x00, "done";
    /// The peer broke the protocol.
    Protocol = 0x01, "the peer broke the protocol";
    /// A fault inside haul.
    Internal = 0x02, "an internal fault";
    /// A stream type, request or encoding that this peer does not speak.
    Unsupported = 0x03, "not supported by this peer";
    /// The peer was silent until a deadline.
    TimedOut = 0x04, "no progress before the deadline";
    /// The server is stopping. Partials are kept for resume.
    Stopping = 0x05, "the server is stopping";
    /// The user or the application cancelled.
    Cancelled = 0x06, "cancelled";
    /// The key is not admitted.
    NotAdmitted = 0x07, "this key is not admitted";
    /// The server accepts no more connections, or another process has the partial open.
    Busy = 0x08, "too many connections, or another process writes this file";
    /// The same session continues over a newer connection.
    Superseded = 0x09, "the session continues over another connection";
    /// The receiver did not request the transfer.
    NotWanted = 0x10, "not requested, or no longer expected";
    /// The source changed while it was sent.
    Changed = 0x11, "changed while it was being sent";
    /// The source could not be read.
    Unreadable = 0x12, "could not be read";
    /// Content and digest disagree.
    Corrupt = 0x13, "the content does not match its digest";
    /// haul refuses the name.
    BadName = 0x14, "not an acceptable name";
    /// A directory exists where a file should go.
    IsDirectory = 0x15, "a directory exists there";
    /// Something else exists where a directory should go.
    NotDirectory = 0x16, "something that is not a directory is in the way";
    /// The receiver's disk is full, or a quota is used up.
    NoSpace = 0x17, "no space left on the receiver";
    /// The receiver's system denies access.
    PermissionDenied = 0x18, "permission denied";
    /// Another error of the receiver's disk.
    Io = 0x19, "input/output error";
    /// A symbolic link is in the way.
    Symlink = 0x1a, "a symbolic link is in the way";
    /// No entry has that name.
    NotFound = 0x1b, "no such file or directory";
    /// The key may not do this here.
    NotAllowed = 0x1c, "this key may not do that here";
    /// Neither a file nor a directory nor a symbolic link.
    Special = 0x1d, "not a regular file, directory or symbolic link";
    /// An entry exists at the destination and must be kept.
    Exists = 0x1e, "another exists there and must be kept";
    /// More entries would be removed than allowed.
    TooMany = 0x1f, "more would be removed than allowed";
    /// One of source and destination contains the other.
    Nested = 0x20, "one of source and destination contains the other";
    /// The source existed when it was found, and no longer when its turn came.
    Vanished = 0x21, "gone before it could be sent";
}

/// Why something failed, as peers send it: a [`Code`] and a text.
///
/// Its `Display` is safe to print, because it escapes the peer's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// The kind of failure.
    pub code: Code,
    /// An explanation for people, of at most 1,024 bytes. May be empty.
    pub text: PeerText,
}

impl Reason {
    /// Makes a reason with a text. The text is cut at 1,024 bytes.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        let mut text = text.into();
        text.truncate(text.floor_char_boundary_at(MAX_TEXT));
        Self {
            code,
            text: text.into(),
        }
    }

    /// Makes the reason for an error of the local file system.
    pub fn from_io(error: &io::Error) -> Self {
        use rustix::io::Errno;
        let code = match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::NOSPC | Errno::DQUOT) => Code::NoSpace,
            Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => Code::PermissionDenied,
            Some(Errno::NOENT) => Code::NotFound,
            Some(Errno::ISDIR) => Code::IsDirectory,
            Some(Errno::NOTDIR | Errno::EXIST | Errno::NOTEMPTY) => Code::NotDirectory,
            Some(Errno::LOOP | Errno::XDEV) => Code::Symlink,
            Some(Errno::NAMETOOLONG | Errno::ILSEQ) => Code::BadName,
            _ => Code::Io,
        };
        Self::new(code, error.to_string())
    }
}

trait FloorCharBoundary {
    fn floor_char_boundary_at(&self, index: usize) -> usize;
}

impl FloorCharBoundary for String {
    fn floor_char_boundary_at(&self, index: usize) -> usize {
        (0..=index.min(self.len()))
            .rev()
            .find(|&i| self.is_char_boundary(i))
            .unwrap_or(0)
    }
}

impl From<Code> for Reason {
    fn from(code: Code) -> Self {
        Self {
            code,
            text: PeerText::default(),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.text.is_empty() {
            f.write_str(self.code.text())
        } else {
            write!(f, "{}", self.text)
        }
    }
}

/// An error that ends an operation.
///
/// Its `Display` is safe to print, because text that may come from a peer or a ticket is a [`PeerText`] or a [`Reason`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The arguments of the caller are invalid.
    #[error("{0}")]
    Usage(String),
    /// The name of the host could not be resolved.
    #[error("cannot resolve {host}: {why}")]
    Resolve {
        /// The host, as the user gave it.
        host: PeerText,
        /// The resolver's error.
        why: PeerText,
    },
    /// The connection could not be made.
    #[error("cannot connect to {host} ({address}): {why}")]
    Unreachable {
        /// The host, as the user gave it.
        host: PeerText,
        /// The last address that was tried.
        address: SocketAddr,
        /// The cause.
        why: PeerText,
    },
    /// The connection was lost after it was made.
    #[error("the connection was lost: {0}")]
    Lost(PeerText),
    /// First contact: the server's key is not known.
    #[error("cannot trust {host}: its key is not known: {key_id}")]
    UnknownHost {
        /// Host and port, as in known_hosts.
        host: String,
        /// The key id that the server presented, as `SHA256:...`.
        key_id: String,
    },
    /// The server's key differs from the one in known_hosts.
    #[error(
        "THE KEY OF {host} HAS CHANGED: known as {known}, now {presented}. Either the server has a new key, or \
         someone intercepts the connection. Nothing was sent. If you know that the new key is right, remove the line of {host} \
         from {file} and connect again"
    )]
    ChangedHost {
        /// Host and port, as in known_hosts.
        host: String,
        /// The key id in known_hosts.
        known: String,
        /// The key id that the server presented.
        presented: String,
        /// The known_hosts file.
        file: PathBuf,
    },
    /// The server's key differs from the pinned one.
    #[error(
        "cannot trust {host}: its key is {presented}, not the pinned {pinned}; nothing was sent"
    )]
    WrongPin {
        /// Host and port.
        host: String,
        /// The pinned key id.
        pinned: String,
        /// The key id that the server presented.
        presented: String,
    },
    /// The server's certificate was refused for another reason.
    #[error("cannot trust {host}: {why}")]
    NotTrusted {
        /// Host and port.
        host: PeerText,
        /// The verifier's error.
        why: PeerText,
    },
    /// The server does not admit this machine's key.
    #[error("not admitted: {0}")]
    NotAdmitted(Reason),
    /// The peer refused the session.
    #[error("{0}")]
    Refused(Reason),
    /// The peer broke the protocol.
    #[error("protocol error: {0}")]
    Protocol(PeerText),
    /// The server is stopping.
    #[error("the server is stopping; run the same command again later to resume")]
    Stopping,
    /// A key, certificate or list in HAUL_HOME cannot be used.
    #[error("{path}: {why}")]
    Home {
        /// The file or directory.
        path: PathBuf,
        /// The cause, and what to do.
        why: String,
    },
    /// haul has a fault: a part of it panicked. The text is what could not be done, as a verb and its object.
    #[error("cannot {0}: a fault inside haul; please report it")]
    Internal(&'static str),
    /// The operating system gave no random numbers.
    #[error("cannot draw random numbers: the system provides none")]
    NoRandomness,
    /// A system call of this machine failed.
    #[error("{what}: {source}")]
    Io {
        /// The action that failed, with its file or address.
        what: String,
        /// The system's error.
        source: io::Error,
    },
}

impl From<Reason> for Error {
    /// Converts the reason with which a peer refused or closed a session or connection.
    fn from(why: Reason) -> Self {
        match why.code {
            Code::NotAdmitted => Self::NotAdmitted(why),
            Code::Stopping => Self::Stopping,
            Code::Done => Self::Lost("the peer closed it".into()),
            Code::Protocol => Self::Protocol(format!("the peer reports: {why}").into()),
            _ => Self::Refused(why),
        }
    }
}

impl Error {
    /// Returns a function that converts an [`io::Error`], for `map_err`. `what` names the action that failed.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_same_after_the_wire() {
        for &code in Code::ALL {
            assert_eq!(Code::from_number(code.number()), code);
        }
        assert_eq!(Code::from_number(0xffff), Code::Other(0xffff));
    }

    #[test]
    fn a_reasons_text_is_cut_and_escaped() {
        assert_eq!(Reason::new(Code::Io, "ä".repeat(1000)).text.len(), MAX_TEXT);
        assert_eq!(
            Reason::new(Code::Io, "a\x1b[31m").to_string(),
            "a\\u{1b}[31m"
        );
        assert_eq!(
            Reason::from(Code::NoSpace).to_string(),
            "no space left on the receiver"
        );
    }
}
