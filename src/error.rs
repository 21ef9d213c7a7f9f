//! What can go wrong, and the codes that say so across the wire.
//!
//! [`Error`] ends an operation; [`Reason`] is the reason one file (or one session) did not go through, in words that
//! cross the wire. A session in which single files failed is no [`Error`]: the failures stand in its
//! [`Outcome`](crate::transfer::events::Event).

pub(crate) mod text;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::error::text::PeerText;

/// `Result` with haul's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Longest sentence in bytes that a peer may send with a code.
pub(crate) const MAX_TEXT: usize = 1024;

/// Whether an error of `flock` says that the filesystem knows no locks: Lustre without its mount option, some FUSE
/// filesystems, NFS without its lock service. NFS also locks no file (EBADF) that is open for reading only.
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
        /// Codes that cross the wire: in verdicts and receipts, and as QUIC application error codes when a stream is
        /// reset or stopped or a connection closed (RFC 9000, section 20.2). PROTOCOL.md lists them.
        ///
        /// A code of a newer peer is kept as [`Code::Other`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $($(#[$doc])* $name,)*
            /// A code that this version does not know.
            Other(u32),
        }

        impl Code {
            /// Every code this version knows, by number.
            pub const ALL: &'static [Code] = &[$(Code::$name),*];

            /// The number on the wire.
            pub fn number(self) -> u32 {
                match self { $(Code::$name => $value,)* Code::Other(number) => number }
            }

            /// The code of a number on the wire.
            pub fn from_number(number: u32) -> Self {
                match number { $($value => Code::$name,)* other => Code::Other(other) }
            }

            /// The name in PROTOCOL.md.
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
    /// No error: the operation is over.
    Done = 0x00, "done";
    /// The peer broke the protocol.
    Protocol = 0x01, "the peer broke the protocol";
    /// A fault inside haul.
    Internal = 0x02, "an internal fault";
    /// A stream type, request or encoding that this peer does not speak.
    Unsupported = 0x03, "not supported by this peer";
    /// The other side was silent past a deadline.
    TimedOut = 0x04, "nothing moved until the deadline";
    /// The server is stopping; what is unfinished is kept for resume.
    Stopping = 0x05, "the server is stopping";
    /// The user or the application cancelled.
    Cancelled = 0x06, "cancelled";
    /// The key is not admitted.
    NotAdmitted = 0x07, "this key is not admitted";
    /// The server has no room for another connection, or another process has the partial open.
    Busy = 0x08, "no room for another connection, or another process writes this file";
    /// The same session goes on over a newer connection.
    Superseded = 0x09, "the session goes on over another connection";
    /// A transfer that was never wanted.
    NotWanted = 0x10, "it was not asked for, or is no longer waited for";
    /// The source changed while it was sent.
    Changed = 0x11, "changed while it was being sent";
    /// The source could not be read.
    Unreadable = 0x12, "could not be read";
    /// Content and digest disagree.
    Corrupt = 0x13, "the content does not match its digest";
    /// A name that haul refuses.
    BadName = 0x14, "not an acceptable name";
    /// A directory stands where a file should go.
    IsDirectory = 0x15, "a directory stands there";
    /// Something else stands where a directory should go.
    NotDirectory = 0x16, "something that is no directory stands in the way";
    /// The receiver's disk is full, or a quota is used up.
    NoSpace = 0x17, "no space left on the receiver";
    /// The receiver's system denies access.
    PermissionDenied = 0x18, "permission denied";
    /// Another fault of the receiver's disk.
    Io = 0x19, "input/output error";
    /// A symbolic link stands in the way.
    Symlink = 0x1a, "a symbolic link stands in the way";
    /// Nothing of that name.
    NotFound = 0x1b, "no such file or directory";
    /// The key may not do this here.
    NotAllowed = 0x1c, "this key may not do that here";
    /// Neither a file nor a directory nor a symbolic link.
    Special = 0x1d, "not a regular file, directory or symbolic link";
    /// What stands there is to be left.
    Exists = 0x1e, "another stands there already, and is to be left";
    /// More would be removed than may be.
    TooMany = 0x1f, "more would be removed than may be";
    /// Source and destination lie in each other.
    Nested = 0x20, "source and destination lie in each other";
    /// The source was there when it was looked for, and gone when its turn came.
    Vanished = 0x21, "gone before it could be sent";
}

/// Why something did not go through, as it crosses the wire: a [`Code`] and a sentence.
///
/// Its `Display` is safe to print: what a peer wrote is escaped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// What kind of failure.
    pub code: Code,
    /// A sentence for people; may be empty. At most 1,024 bytes.
    pub text: PeerText,
}

impl Reason {
    /// A reason with a sentence; the sentence is cut at 1,024 bytes.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        let mut text = text.into();
        text.truncate(text.floor_char_boundary_at(MAX_TEXT));
        Self {
            code,
            text: text.into(),
        }
    }

    /// The reason behind a fault of the local filesystem.
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

/// What ends an operation.
///
/// Its `Display` is safe to print: text that may come from a peer, or from a ticket, is a [`PeerText`] or a [`Reason`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The caller asked for something that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The host's name has no address.
    #[error("cannot resolve {host}: {why}")]
    Resolve {
        /// As the user gave it.
        host: PeerText,
        /// What the resolver said.
        why: PeerText,
    },
    /// No connection came about.
    #[error("no connection to {host} ({address}): {why}")]
    Unreachable {
        /// As the user gave it.
        host: PeerText,
        /// The last address tried.
        address: SocketAddr,
        /// What happened.
        why: PeerText,
    },
    /// The connection broke after it was up.
    #[error("the connection was lost: {0}")]
    Lost(PeerText),
    /// A first contact: nothing says whether this is the right server.
    #[error("the key of {host} is not known: {key_id}")]
    UnknownHost {
        /// Host and port, as known_hosts has them.
        host: String,
        /// What the server presented, as `SHA256:...`.
        key_id: String,
    },
    /// The server has another key than known_hosts says.
    #[error(
        "THE KEY OF {host} HAS CHANGED: known as {known}, now {presented}. Either the server was given a new key, or somebody \
         stands in between. Nothing was sent. If you know the new key to be right, remove the line of {host} from {file} \
         and connect again."
    )]
    ChangedHost {
        /// Host and port, as known_hosts has them.
        host: String,
        /// The key id on file.
        known: String,
        /// What the server presented.
        presented: String,
        /// The known_hosts file.
        file: PathBuf,
    },
    /// The server's key is not the pinned one.
    #[error("the key of {host} is {presented}, not the pinned {pinned}. Nothing was sent.")]
    WrongPin {
        /// Host and port.
        host: String,
        /// The key id asked for.
        pinned: String,
        /// What the server presented.
        presented: String,
    },
    /// The peer's certificate was refused for another reason.
    #[error("{host} is not trusted: {why}")]
    NotTrusted {
        /// Host and port.
        host: PeerText,
        /// What the verifier said.
        why: PeerText,
    },
    /// The server does not admit this machine's key.
    #[error("not admitted: {0}")]
    NotAdmitted(Reason),
    /// The peer refused the session.
    #[error("{0}")]
    Refused(Reason),
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Protocol(PeerText),
    /// The server is stopping.
    #[error("the server is stopping; run the same command again later to go on")]
    Stopping,
    /// A key, certificate or list in HAUL_HOME cannot be used.
    #[error("{path}: {why}")]
    Home {
        /// Which file or directory.
        path: PathBuf,
        /// What is wrong and what to do.
        why: String,
    },
    /// The system refused something local.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with the file or address.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

impl From<Reason> for Error {
    /// What a peer's refusal of a whole session or connection means.
    fn from(why: Reason) -> Self {
        match why.code {
            Code::NotAdmitted => Self::NotAdmitted(why),
            Code::Stopping => Self::Stopping,
            Code::Done => Self::Lost("the peer closed it".into()),
            Code::Protocol => Self::Protocol(format!("so it says of this side: {why}").into()),
            _ => Self::Refused(why),
        }
    }
}

impl Error {
    /// Names what was tried when the system refused.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_survive_the_wire() {
        for &code in Code::ALL {
            assert_eq!(Code::from_number(code.number()), code);
        }
        assert_eq!(Code::from_number(0xffff), Code::Other(0xffff));
    }

    #[test]
    fn a_peers_sentence_is_cut_and_escaped() {
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
