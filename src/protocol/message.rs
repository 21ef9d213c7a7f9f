//! Every message, by name and type byte.

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
        /// Name, type byte and limit of every message; PROTOCOL.md is held against it.
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
    Accept = 0x54, limit 64;
    Place = 0x60, limit 1024;
    Placed = 0x61, limit 64;
    Seek = 0x62, limit 1024;
    Found = 0x63, limit 1024;
}

macro_rules! unchecked { ($($name:ident)*) => { $(impl $name { fn validate(&self) -> Result<(), String> { Ok(()) } })* } }
unchecked! { Complete Working Skip Done Committed Trailer Measure Ping Pong Received Introduce Introduced Confirm Accept Placed }

/// First message of both ends on every control stream: what each can do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Hello {
    /// Numbers of the optional features spoken; none are defined in `haul/1` yet.
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

/// Asks to send files to the server.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Push {
    /// Names the session over all its connections; random.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub session: [u8; 16],
    /// The destination below the served directory, as components.
    #[n(1)]
    pub destination: Components,
    /// What the user wrote ends in `/`.
    #[n(2)]
    pub into: bool,
    /// How many sources there are.
    #[n(3)]
    pub sources: u32,
    /// Whether the only source is a directory.
    #[n(4)]
    pub directory: bool,
    /// How durable a commit has to be.
    #[n(5)]
    pub durability: Durability,
    /// How entries are to be taken, if not as usual.
    #[n(6)]
    pub take: Option<ReceiveOptions>,
    /// What a mirror leaves out, and spares.
    #[n(7)]
    pub filter: Option<WireFilter>,
    /// Where it comes from.
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

/// Asks the server to send files.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Pull {
    /// Names the session over all its connections; random.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub session: [u8; 16],
    /// What is asked for, below the served directory.
    #[n(1)]
    pub sources: Vec<Components>,
    /// Most entries that may stand unanswered; here the client is the receiver.
    #[n(2)]
    pub entries: u32,
    /// Most bytes of entries, headers included, that may stand unanswered.
    #[n(3)]
    pub entry_bytes: u32,
    /// Bytes a second that the client wants to be sent at most, within [`Rate`]'s bounds.
    #[n(4)]
    pub limit: Option<u64>,
    /// Whether the entries of files are to carry digests, for the client to compare.
    #[n(6)]
    pub checksum: Option<bool>,
    /// Symbolic links are asked for as what they point to, as far as that is served.
    #[n(7)]
    pub follow: Option<bool>,
    /// What is not asked for.
    #[n(8)]
    pub filter: Option<WireFilter>,
    /// Extended attributes are asked for.
    #[n(9)]
    pub xattrs: Option<bool>,
    /// Owners are asked for.
    #[n(10)]
    pub owner: Option<bool>,
    /// A file that only grows while it is sent is asked for as long as it was at the start.
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

/// Asks the server for a listing.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct List {
    /// Names the session; random.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub session: [u8; 16],
    /// What is asked for, below the served directory.
    #[n(1)]
    pub path: Components,
    /// Whether what is below its directories is asked for too.
    #[n(2)]
    pub recursive: bool,
}

impl List {
    fn validate(&self) -> Result<(), String> {
        Ok(())
    }
}

/// The request is accepted: the sender may announce as much as this says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Ready {
    /// Most entries that may stand unanswered.
    #[n(0)]
    pub entries: u32,
    /// Most bytes of entries, headers included, that may stand unanswered.
    #[n(1)]
    pub entry_bytes: u32,
    /// Where the sources come to stand, as the receiver settled it; components. For people only.
    #[n(2)]
    pub place: Option<Components>,
    /// In a pull of one source without a pattern: what that is. It settles where it comes to stand at the client.
    #[n(3)]
    pub only: Option<Kind>,
    /// In a pull: where it comes from.
    #[n(4)]
    pub origin: Option<Origin>,
}

impl Ready {
    fn validate(&self) -> Result<(), String> {
        self.origin.as_ref().map_or(Ok(()), Origin::validate)
    }
}

/// The request is refused.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Refused {
    /// Why.
    #[n(0)]
    pub why: WireReason,
}

/// The sender has sent all it will, and has an answer for each entry; receipts may still be on their way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct End {
    /// Entries sent on the manifest stream.
    #[n(0)]
    pub entries: u64,
    /// Sources that the sender could not send at all.
    #[n(1)]
    pub failed: u64,
    /// Why the sender did not announce the rest, if it did not.
    #[n(2)]
    pub interrupted: Option<WireReason>,
    /// Where the sender's time went.
    #[n(3)]
    pub spent: Option<SenderTime>,
    /// What the sender could not tell of files that it sent.
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

/// The receiver's last word: what stands on its disk now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Summary {
    /// Files committed in this session.
    #[n(0)]
    pub committed: u64,
    /// Bytes of content committed.
    #[n(1)]
    pub bytes: u64,
    /// Entries that were there already.
    #[n(2)]
    pub skipped: u64,
    /// Entries refused or failed.
    #[n(3)]
    pub failed: u64,
    /// How durable all of it is.
    #[n(4)]
    pub durability: Durability,
    /// Milliseconds in which half of the connection's receive window or more was taken by what the store had not taken.
    #[n(5)]
    pub held_up: Option<u64>,
    /// What could not be kept of what stands there; each kind once.
    #[n(6)]
    pub unkept: Option<Vec<MetadataWarning>>,
    /// How many things a mirror has removed.
    #[n(7)]
    pub removed: Option<u64>,
    /// Why it has removed nothing, or not all.
    #[n(8)]
    pub unremoved: Option<WireReason>,
}

impl Summary {
    fn validate(&self) -> Result<(), String> {
        MetadataWarning::validate(self.unkept.as_deref().unwrap_or_default())
    }
}

/// A server that stops says so: no new entry will be wanted, transfers under way may end.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct GoAway {
    /// Why.
    #[n(0)]
    pub why: WireReason,
}

/// A mirror has removed this, or would in a dry run. For people only.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Removed {
    /// Below the destination.
    #[n(0)]
    pub path: Components,
}

impl Removed {
    fn validate(&self) -> Result<(), String> {
        self.path.validate()
    }
}

/// Sent every 5 s while long disk work keeps an answer back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Working {}

/// One file, directory or link that the session is about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Entry {
    /// The sender's number for it, unique in the session on this connection, ascending.
    #[n(0)]
    pub id: u64,
    /// Components; the first is the name of the source that the entry belongs to.
    #[n(1)]
    pub path: Components,
    /// What it is.
    #[n(2)]
    pub kind: Kind,
    /// Bytes of content; only for files, absent when not known beforehand.
    #[n(3)]
    pub size: Option<u64>,
    /// When its content was last modified.
    #[n(4)]
    pub modified: Option<Time>,
    /// Permission bits (0777).
    #[n(5)]
    pub mode: Option<u32>,
    /// What a symbolic link holds; only for those. At most [`MAX_SYMLINK`] bytes, without NUL.
    #[cbor(n(6), with = "minicbor::bytes")]
    pub target: Option<Vec<u8>>,
    /// Only for files: BLAKE3 of the content, where the sender knows it. The receiver may compare it with what stands there, and
    /// trusts it in nothing else.
    #[cbor(n(7), with = "minicbor::bytes")]
    pub digest: Option<[u8; 32]>,
    /// Only for files: this is another name of the entry with this number, which stands already; its own number when
    /// others may come to be names of this one.
    #[n(8)]
    pub hard_link: Option<u64>,
    /// Whose it is. Only when it is to be kept; then the mode has all bits (07777) on files.
    #[n(9)]
    pub owner: Option<Owner>,
    /// Its extended attributes by name, in order; only when they are to be kept, and not of symbolic links.
    #[n(10)]
    pub xattrs: Option<Vec<Xattr>>,
}

impl Entry {
    fn validate(&self) -> Result<(), String> {
        if let Some(target) = &self.target {
            at_most("target", target.len(), MAX_SYMLINK)?;
            if target.is_empty() || target.contains(&0) {
                return Err("a symbolic link to nothing".into());
            }
        }
        self.owner.iter().try_for_each(Owner::validate)?;
        self.xattrs
            .iter()
            .try_for_each(|xattrs| Xattr::validate(xattrs))?;
        match (self.kind, &self.target, self.size) {
            (Kind::Symlink, None, _) => Err("a symbolic link without a target".into()),
            (Kind::File | Kind::Directory, Some(_), _) => {
                Err("a target on what is no symbolic link".into())
            }
            (Kind::Symlink | Kind::Directory, _, Some(_)) => {
                Err("a size on what is no file".into())
            }
            _ if self.hard_link.is_some() && self.kind != Kind::File => {
                Err("another name of what is no file".into())
            }
            _ if self.hard_link.is_some_and(|first| first > self.id) => {
                Err("a name of what comes later".into())
            }
            (_, _, Some(size)) if size > i64::MAX as u64 => Err("a size over 2^63 - 1".into()),
            _ => self.path.validate(),
        }
    }
}

/// On the manifest: something that is to be sent and cannot be. It has no id and no verdict.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Unsendable {
    /// As in an entry, or as it was asked for; empty for the served directory itself.
    #[n(0)]
    pub path: Components,
    /// Why.
    #[n(1)]
    pub why: WireReason,
    /// With `Special` and `Vanished`: whether that is no failure, since it was only come upon in a directory.
    #[n(2)]
    pub omitted: Option<bool>,
}

/// On the manifest: all there is was found, only directories are still to come. For people, whom it tells how much is left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Complete {}

/// Verdict: it is there already, as announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Skip {
    /// The entry.
    #[n(0)]
    pub id: u64,
}

/// Verdict: the manifest sufficed, it stands there now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Done {
    /// The entry.
    #[n(0)]
    pub id: u64,
}

/// Verdict: send it. An admission: room and a permit are set aside.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Want {
    /// The entry.
    #[n(0)]
    pub id: u64,
    /// What the receiver holds of an earlier attempt: ascending, not touching, aligned to [`HELD_STEP`](super::HELD_STEP).
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

/// Verdict: it cannot stand there.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Refuse {
    /// The entry.
    #[n(0)]
    pub id: u64,
    /// Why.
    #[n(1)]
    pub why: WireReason,
}

/// Begins a transfer: what of the file the body will hold.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Plan {
    /// The entry.
    #[n(0)]
    pub id: u64,
    /// How the body is encoded: [`ENCODING_RANGES`](super::ENCODING_RANGES) or [`ENCODING_PIECES`](super::ENCODING_PIECES).
    #[n(1)]
    pub encoding: u32,
    /// The parts of the file that the body holds: ascending, not overlapping.
    #[n(2)]
    pub ranges: Vec<Range>,
    /// Parts that read as zeros and for which the file takes no space: ascending, not overlapping, apart from the ranges.
    #[n(3)]
    pub holes: Option<Vec<Range>>,
}

impl Plan {
    /// The holes, if there are any.
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

/// Ends a transfer: the digest of the whole file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Trailer {
    /// BLAKE3 of the file's whole content, held ranges included; see [`content_hasher`](super::content_hasher).
    #[cbor(n(0), with = "minicbor::bytes")]
    pub digest: [u8; 32],
    /// Bytes of content, where the entry said none.
    #[n(1)]
    pub size: Option<u64>,
}

/// Receipt: content and trailer agree, and the file stands under its final name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Committed {
    /// Size of the file.
    #[n(0)]
    pub bytes: u64,
    /// How durable it is.
    #[n(1)]
    pub durability: Durability,
}

/// Receipt: it did not go through; what stood under the final name still does.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Failed {
    /// Why.
    #[n(0)]
    pub why: WireReason,
}

/// In the place of a [`Plan`]: the sender cannot send a file that it announced, and opens no transfer for it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Withdraw {
    /// The entry.
    #[n(0)]
    pub id: u64,
    /// Why.
    #[n(1)]
    pub why: WireReason,
}

/// First on a measurement stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Measure {
    /// What the stream is for.
    #[n(0)]
    pub probe: Probe,
    /// For how long; the server may have enough earlier.
    #[n(1)]
    pub milliseconds: u32,
}

/// Asks for a [`Pong`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Ping {
    /// Ascending on the stream.
    #[n(0)]
    pub id: u64,
}

/// Answers a [`Ping`] at once, with what the server knows of the path as a sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Pong {
    /// Which ping.
    #[n(0)]
    pub id: u64,
    /// Packets sent on this path of the connection so far.
    #[n(1)]
    pub packets_sent: u64,
    /// Of these, those that were found lost.
    #[n(2)]
    pub packets_lost: u64,
    /// The smoothed round-trip time in microseconds (RFC 9002, section 5.3).
    #[n(3)]
    pub rtt: u64,
}

/// What of the client's filler has come so far; the last one is the sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Received {
    /// Bytes of filler.
    #[n(0)]
    pub bytes: u64,
    /// Since the stream began.
    #[n(1)]
    pub microseconds: u64,
}

/// Part of a listing: something that stands there.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Listed {
    /// Below the directory that was asked for; what is no directory, or was asked for by a pattern, with its whole path.
    #[n(0)]
    pub path: Components,
    /// What it is; absent for a device, a FIFO, a socket and the like.
    #[n(1)]
    pub kind: Option<Kind>,
    /// Bytes of content; only for files.
    #[n(2)]
    pub size: Option<u64>,
    /// When its content was last modified.
    #[n(3)]
    pub modified: Option<Time>,
    /// Permission bits (07777).
    #[n(4)]
    pub mode: Option<u32>,
    /// What a symbolic link holds; at most [`MAX_SYMLINK`] bytes.
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
