//! Every message with its name, type byte and limit. The messages are in one file, in the order of PROTOCOL.md, so that the two can
//! be compared; this makes it longer than others.

use minicbor::{Decode, Encode};

use super::introduce::{Accept, Confirm, Introduce, Introduced, Offer};
use super::rendezvous::{Found, Place, Placed, Seek};
use super::value::{ascending, at_most};
use super::{
    Components, Durability, Held, Kind, MAX_HELD, MAX_HOLES, MAX_PLAN_RANGES, MAX_SYMLINK, Message,
    MetadataWarning, Origin, Owner, Probe, Range, ReceiveOptions, SenderTime, Time, WireFilter,
    WireReason, Xattr,
};
use crate::error::text::PeerText;
use crate::protocol::rate::Rate;

macro_rules! messages {
    ($($name:ident = $kind:literal, limit $limit:expr;)*) => {
        $(impl Message for $name {
            const TYPE: u8 = $kind;
            const NAME: &'static str = stringify!($name);
            const LIMIT: usize = $limit;
            fn check(&self) -> Result<(), String> { self.validate() }
        })*
        /// Name, type byte and limit of every message. A test compares it with PROTOCOL.md.
        pub const MESSAGES: &[(&str, u8, usize)] = &[$((stringify!($name), $kind, $limit)),*];
    };
}

messages! {
    Hello = 0x01, limit 4096;
    Push = 0x02, limit 65536;
    Pull = 0x03, limit 65536;
    List = 0x04, limit 8192;
    Ready = 0x05, limit 4096;
    Refused = 0x06, limit 4096;
    End = 0x07, limit 4096;
    Summary = 0x08, limit 4096;
    GoAway = 0x09, limit 4096;
    Working = 0x0a, limit 4096;
    Removed = 0x0b, limit 8192;
    Entry = 0x10, limit 16384;
    Skip = 0x11, limit 64;
    Done = 0x12, limit 64;
    Want = 0x13, limit 65536;
    Refuse = 0x14, limit 4096;
    Unsendable = 0x15, limit 8192;
    Complete = 0x16, limit 64;
    Plan = 0x20, limit 65536;
    Trailer = 0x21, limit 256;
    Committed = 0x22, limit 256;
    Failed = 0x23, limit 4096;
    Withdraw = 0x24, limit 4096;
    Measure = 0x30, limit 64;
    Ping = 0x31, limit 64;
    Pong = 0x32, limit 64;
    Received = 0x33, limit 64;
    Listed = 0x40, limit 16384;
    Introduce = 0x50, limit 128;
    Introduced = 0x51, limit 128;
    Confirm = 0x52, limit 128;
    Offer = 0x53, limit 65536;
    Accept = 0x54, limit 1024;
    Place = 0x60, limit 1024;
    Placed = 0x61, limit 64;
    Seek = 0x62, limit 1024;
    Found = 0x63, limit 1024;
}

macro_rules! unchecked { ($($name:ident)*) => { $(impl $name { fn validate(&self) -> Result<(), String> { Ok(()) } })* } }
unchecked! { Complete Working Skip Done Committed Trailer Measure Ping Pong Received Introduce Introduced Confirm Placed }

/// First message of both ends on every control stream: the features that each supports.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Hello {
    /// Numbers of the supported optional features. `haul/1` defines none yet.
    #[n(0)]
    pub features: Vec<u64>,
    /// Program and version, for logs only; at most 128 bytes.
    #[n(1)]
    pub agent: PeerText,
}

impl Hello {
    fn validate(&self) -> Result<(), String> {
        at_most("agent", self.agent.len(), 128)
    }
}

/// Requests to send files to the server.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Push {
    /// Random id of the session, the same over all its connections.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub session: [u8; 16],
    /// The destination below the served directory, as components.
    #[n(1)]
    pub destination: Components,
    /// Whether the destination ends in `/`.
    #[n(2)]
    pub into: bool,
    /// Number of sources.
    #[n(3)]
    pub sources: u32,
    /// Whether the only source is a directory.
    #[n(4)]
    pub directory: bool,
    /// Durability that a commit needs.
    #[n(5)]
    pub durability: Durability,
    /// How the server receives entries, if not by the defaults.
    #[n(6)]
    pub take: Option<ReceiveOptions>,
    /// Names that a mirror neither sends nor removes.
    #[n(7)]
    pub filter: Option<WireFilter>,
    /// The directories that are sent.
    #[n(8)]
    pub origin: Option<Origin>,
}

impl Push {
    fn validate(&self) -> Result<(), String> {
        self.filter.as_ref().map_or(Ok(()), WireFilter::validate)?;
        self.origin.as_ref().map_or(Ok(()), Origin::validate)?;
        if self.sources == 0 {
            Err("no sources".into())
        } else {
            Ok(())
        }
    }
}

/// Requests the server to send files.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Pull {
    /// Random id of the session, the same over all its connections.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub session: [u8; 16],
    /// The requested paths below the served directory.
    #[n(1)]
    pub sources: Vec<Components>,
    /// Limit of unanswered entries. The client is the receiver here.
    #[n(2)]
    pub entries: u32,
    /// Limit of unanswered entries in bytes, headers included.
    #[n(3)]
    pub entry_bytes: u32,
    /// The client's limit of the server's rate in bytes a second, within [`Rate`]'s bounds.
    #[n(4)]
    pub limit: Option<u64>,
    /// Whether the entries of files carry digests, for the client to compare.
    #[n(6)]
    pub checksum: Option<bool>,
    /// Whether symbolic links are followed, as far as their targets are served.
    #[n(7)]
    pub follow: Option<bool>,
    /// Names that are not requested.
    #[n(8)]
    pub filter: Option<WireFilter>,
    /// Whether extended attributes are requested.
    #[n(9)]
    pub xattrs: Option<bool>,
    /// Whether owners are requested.
    #[n(10)]
    pub owner: Option<bool>,
    /// Whether a file that only grows while it is sent is requested with the length that was announced.
    #[n(11)]
    pub growing: Option<bool>,
}

impl Pull {
    fn validate(&self) -> Result<(), String> {
        self.filter.as_ref().map_or(Ok(()), WireFilter::validate)?;
        match self.limit {
            _ if self.sources.is_empty() => Err("no sources".into()),
            Some(limit) if Rate::from_bytes(limit).is_none() => {
                Err(format!("a limit of {limit} bytes a second"))
            }
            _ => Ok(()),
        }
    }
}

/// Requests a listing.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct List {
    /// Random id of the session.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub session: [u8; 16],
    /// The requested path below the served directory.
    #[n(1)]
    pub path: Components,
    /// Whether all directories below it are listed too.
    #[n(2)]
    pub recursive: bool,
}

impl List {
    fn validate(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Accepts the request. The sender may announce entries within these limits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Ready {
    /// Limit of unanswered entries.
    #[n(0)]
    pub entries: u32,
    /// Limit of unanswered entries in bytes, headers included.
    #[n(1)]
    pub entry_bytes: u32,
    /// The place of the sources, as the receiver settled it, as components. For display only.
    #[n(2)]
    pub place: Option<Components>,
    /// In a pull of one source without a pattern: the kind of the source. The client settles its place by it.
    #[n(3)]
    pub only: Option<Kind>,
    /// In a pull: the directories that are sent.
    #[n(4)]
    pub origin: Option<Origin>,
}

impl Ready {
    fn validate(&self) -> Result<(), String> {
        self.origin.as_ref().map_or(Ok(()), Origin::validate)
    }
}

/// Refuses the request.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Refused {
    /// The reason.
    #[n(0)]
    pub why: WireReason,
}

/// Ends the sender's part: everything is sent and each entry has its verdict. Receipts may still be on their way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct End {
    /// Entries sent on the manifest stream.
    #[n(0)]
    pub entries: u64,
    /// Sources that the sender could not send.
    #[n(1)]
    pub failed: u64,
    /// Why the sender did not announce the remaining entries, if it did not.
    #[n(2)]
    pub interrupted: Option<WireReason>,
    /// The sender's time breakdown.
    #[n(3)]
    pub spent: Option<SenderTime>,
    /// Metadata that the sender could not read of files that it sent.
    #[n(4)]
    pub unkept: Option<Vec<MetadataWarning>>,
}

impl End {
    fn validate(&self) -> Result<(), String> {
        MetadataWarning::validate(self.unkept.as_deref().unwrap_or_default())?;
        self.interrupted
            .as_ref()
            .map_or(Ok(()), WireReason::validate)
    }
}

/// The receiver's last message: the result of the session.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Summary {
    /// Files committed in this session.
    #[n(0)]
    pub committed: u64,
    /// Bytes of content committed.
    #[n(1)]
    pub bytes: u64,
    /// Entries that existed already.
    #[n(2)]
    pub skipped: u64,
    /// Entries refused or failed.
    #[n(3)]
    pub failed: u64,
    /// Durability of all commits.
    #[n(4)]
    pub durability: Durability,
    /// Milliseconds in which data that the store had not written yet filled half or more of the connection's receive window.
    #[n(5)]
    pub held_up: Option<u64>,
    /// Metadata that could not be kept, once for each attribute.
    #[n(6)]
    pub unkept: Option<Vec<MetadataWarning>>,
    /// Number of entries that a mirror has removed.
    #[n(7)]
    pub removed: Option<u64>,
    /// Why the mirror has removed nothing, or not everything.
    #[n(8)]
    pub unremoved: Option<WireReason>,
}

impl Summary {
    fn validate(&self) -> Result<(), String> {
        MetadataWarning::validate(self.unkept.as_deref().unwrap_or_default())
    }
}

/// Announces that the server stops. It wants no more entries; transfers under way may end.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct GoAway {
    /// The reason.
    #[n(0)]
    pub why: WireReason,
}

/// Reports an entry that a mirror has removed, or would remove in a dry run. For display only.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Removed {
    /// The path below the destination.
    #[n(0)]
    pub path: Components,
}

impl Removed {
    fn validate(&self) -> Result<(), String> {
        self.path.validate()
    }
}

/// Sent every 5 s while long disk work delays an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Working {}

/// Announces one file, directory or symbolic link.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Entry {
    /// The sender's number for the entry, ascending and unique in the session on this connection.
    #[n(0)]
    pub id: u64,
    /// The path as components. The first is the name of the source.
    #[n(1)]
    pub path: Components,
    /// The kind of the entry.
    #[n(2)]
    pub kind: Kind,
    /// Size of a file in bytes; absent when it is unknown.
    #[n(3)]
    pub size: Option<u64>,
    /// Time of the last modification of the content.
    #[n(4)]
    pub modified: Option<Time>,
    /// Permission bits (0777).
    #[n(5)]
    pub mode: Option<u32>,
    /// Target of a symbolic link; at most [`MAX_SYMLINK`] bytes, without NUL.
    #[cbor(n(6), with = "minicbor::bytes")]
    pub target: Option<Vec<u8>>,
    /// BLAKE3 digest of a file's content, if the sender knows it. The receiver may compare it with an existing file, and trusts it
    /// for nothing else.
    #[cbor(n(7), with = "minicbor::bytes")]
    pub digest: Option<[u8; 32]>,
    /// For files: the number of an earlier, committed entry that this is another name of. Its own number if later entries may be
    /// other names of it.
    #[n(8)]
    pub hard_link: Option<u64>,
    /// Owner and group, if they are to be kept. The mode of files then has all bits (07777).
    #[n(9)]
    pub owner: Option<Owner>,
    /// Extended attributes in the order of their names, if they are to be kept. Symbolic links have none.
    #[n(10)]
    pub xattrs: Option<Vec<Xattr>>,
}

impl Entry {
    fn validate(&self) -> Result<(), String> {
        if let Some(target) = &self.target {
            at_most("target", target.len(), MAX_SYMLINK)?;
            if target.is_empty() || target.contains(&0) {
                return Err("a symbolic link with an empty target, or NUL in it".into());
            }
        }
        self.owner.iter().try_for_each(Owner::validate)?;
        self.xattrs
            .iter()
            .try_for_each(|xattrs| Xattr::validate(xattrs))?;
        match (self.kind, &self.target, self.size) {
            (Kind::Symlink, None, _) => Err("a symbolic link without a target".into()),
            (Kind::File | Kind::Directory, Some(_), _) => {
                Err("a target on an entry that is not a symbolic link".into())
            }
            (Kind::Symlink | Kind::Directory, _, Some(_)) => {
                Err("a size on an entry that is not a file".into())
            }
            _ if self.hard_link.is_some() && self.kind != Kind::File => {
                Err("a hard link on an entry that is not a file".into())
            }
            _ if self.hard_link.is_some_and(|first| first > self.id) => {
                Err("a hard link to a later entry".into())
            }
            (_, _, Some(size)) if size > i64::MAX as u64 => Err("a size over 2^63 - 1".into()),
            _ => self.path.validate(),
        }
    }
}

/// Reports on the manifest stream a path that cannot be sent. It has no id and no verdict.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Unsendable {
    /// The path as in an entry, or as requested; empty for the served directory itself.
    #[n(0)]
    pub path: Components,
    /// The reason.
    #[n(1)]
    pub why: WireReason,
    /// With `Special` and `Vanished`: whether this is no failure, because the entry was only found in a directory.
    #[n(2)]
    pub omitted: Option<bool>,
}

/// Reports on the manifest stream that the walk is complete and only directories follow. The receiver can then show how much is
/// left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Complete {}

/// Verdict: the entry exists already, as announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Skip {
    /// The entry.
    #[n(0)]
    pub id: u64,
}

/// Verdict: the entry is committed without a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Done {
    /// The entry.
    #[n(0)]
    pub id: u64,
}

/// Verdict: the sender is to send the content. The receiver holds memory or a permit for it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Want {
    /// The entry.
    #[n(0)]
    pub id: u64,
    /// Ranges that the receiver holds from an earlier attempt: ascending, not adjacent, aligned to [`HELD_STEP`](super::HELD_STEP).
    #[n(1)]
    pub held: Option<Vec<Held>>,
}

impl Want {
    fn validate(&self) -> Result<(), String> {
        let held = self.held.as_deref().unwrap_or_default();
        at_most("held", held.len(), MAX_HELD)?;
        ascending(held.iter().map(|h| h.range), "held")
    }
}

/// Verdict: the receiver refuses the entry.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Refuse {
    /// The entry.
    #[n(0)]
    pub id: u64,
    /// The reason.
    #[n(1)]
    pub why: WireReason,
}

/// Begins a transfer: describes the body.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Plan {
    /// The entry.
    #[n(0)]
    pub id: u64,
    /// Encoding of the body: [`ENCODING_RANGES`](super::ENCODING_RANGES) or [`ENCODING_PIECES`](super::ENCODING_PIECES).
    #[n(1)]
    pub encoding: u32,
    /// The ranges of the file that the body holds: ascending, not overlapping.
    #[n(2)]
    pub ranges: Vec<Range>,
    /// Holes, which read as zeros and take no disk space: ascending, not overlapping each other or the ranges.
    #[n(3)]
    pub holes: Option<Vec<Range>>,
}

impl Plan {
    /// The holes; empty when the message has none.
    pub fn holes(&self) -> &[Range] {
        self.holes.as_deref().unwrap_or_default()
    }

    fn validate(&self) -> Result<(), String> {
        at_most("ranges", self.ranges.len(), MAX_PLAN_RANGES)?;
        at_most("holes", self.holes().len(), MAX_HOLES)?;
        ascending(self.ranges.iter().copied(), "ranges")?;
        ascending(self.holes().iter().copied(), "holes")?;
        let mut both: Vec<Range> = self.ranges.iter().chain(self.holes()).copied().collect();
        both.sort_unstable_by_key(|range| range.offset);
        ascending(both.into_iter(), "ranges and holes")
    }
}

/// Ends a transfer with the digest of the whole file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Trailer {
    /// BLAKE3 digest of the whole content, held ranges included; see [`content_hasher`](super::content_hasher).
    #[cbor(n(0), with = "minicbor::bytes")]
    pub digest: [u8; 32],
    /// Size in bytes, if the entry had none.
    #[n(1)]
    pub size: Option<u64>,
}

/// Receipt: content and trailer agree, and the file is under its final name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Committed {
    /// Size of the file.
    #[n(0)]
    pub bytes: u64,
    /// Durability of the commit.
    #[n(1)]
    pub durability: Durability,
}

/// Receipt: the transfer has failed. A file that existed under the final name is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Failed {
    /// The reason.
    #[n(0)]
    pub why: WireReason,
}

/// Sent instead of a [`Plan`]: the sender cannot send a file that it announced, and opens no transfer for it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Withdraw {
    /// The entry.
    #[n(0)]
    pub id: u64,
    /// The reason.
    #[n(1)]
    pub why: WireReason,
}

/// First message on a measurement stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Measure {
    /// The kind of measurement.
    #[n(0)]
    pub probe: Probe,
    /// Duration in milliseconds. The server may end the measurement earlier.
    #[n(1)]
    pub milliseconds: u32,
}

/// Requests a [`Pong`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Ping {
    /// Number of the ping, ascending on the stream.
    #[n(0)]
    pub id: u64,
}

/// Answers a [`Ping`] at once, with the server's statistics of the path as a sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Pong {
    /// Number of the ping.
    #[n(0)]
    pub id: u64,
    /// Packets sent on this path of the connection so far.
    #[n(1)]
    pub packets_sent: u64,
    /// Packets of these that were declared lost.
    #[n(2)]
    pub packets_lost: u64,
    /// The smoothed round-trip time in microseconds (RFC 9002, section 5.3).
    #[n(3)]
    pub rtt: u64,
}

/// Reports how much of the client's filler has arrived so far. The last one is the sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Received {
    /// Bytes of filler.
    #[n(0)]
    pub bytes: u64,
    /// Time since the stream began, in microseconds.
    #[n(1)]
    pub microseconds: u64,
}

/// One entry of a listing.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Listed {
    /// The path below the requested directory. For a requested non-directory or a match of a pattern, the whole path.
    #[n(0)]
    pub path: Components,
    /// The kind of the entry; absent for a device, FIFO, socket and the like.
    #[n(1)]
    pub kind: Option<Kind>,
    /// Size of a file in bytes.
    #[n(2)]
    pub size: Option<u64>,
    /// Time of the last modification of the content.
    #[n(3)]
    pub modified: Option<Time>,
    /// Permission bits (07777).
    #[n(4)]
    pub mode: Option<u32>,
    /// Target of a symbolic link; at most [`MAX_SYMLINK`] bytes.
    #[cbor(n(5), with = "minicbor::bytes")]
    pub target: Option<Vec<u8>>,
}

impl Listed {
    fn validate(&self) -> Result<(), String> {
        at_most(
            "target",
            self.target.as_ref().map_or(0, Vec::len),
            MAX_SYMLINK,
        )?;
        self.path.validate()
    }
}

macro_rules! carries_reason { ($($name:ident)*) => { $(impl $name { fn validate(&self) -> Result<(), String> { self.why.validate() } })* } }
carries_reason! { Refused GoAway Refuse Failed Withdraw Unsendable }
