//! Where a sender's time went, for a receiver that wants to know what bound the transfer.

use minicbor::{Decode, Encode};

/// Where a sender's time went, in milliseconds, and what its path was like. What is not known is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SenderTime {
    /// Waiting for files to be read and hashed.
    #[n(0)]
    pub reading: u64,
    /// Waiting for a limit.
    #[n(1)]
    pub limited: u64,
    /// Waiting for the connection.
    #[n(2)]
    pub network: u64,
    /// Mean round-trip time, in microseconds.
    #[n(3)]
    pub rtt: u64,
    /// Shortest round-trip time, in microseconds.
    #[n(4)]
    pub min_rtt: u64,
    /// Packets sent.
    #[n(5)]
    pub sent_packets: u64,
    /// Packets that never arrived.
    #[n(6)]
    pub lost_packets: u64,
    /// UDP payload sent, in bytes.
    #[n(7)]
    pub sent_bytes: u64,
    /// Bytes of the packets that never arrived.
    #[n(8)]
    pub lost_bytes: u64,
    /// Times that the congestion controller saw congestion.
    #[n(9)]
    pub congestion_events: u64,
    /// Times that large packets stopped coming through.
    #[n(10)]
    pub black_holes: u64,
    /// Congestion window, in bytes.
    #[n(11)]
    pub window: u64,
    /// Largest UDP payload that the path carries, in bytes.
    #[n(12)]
    pub mtu: u16,
}
