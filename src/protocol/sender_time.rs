//! A sender's time breakdown, from which a receiver finds the bottleneck.

use minicbor::{Decode, Encode};

/// A sender's waiting times in milliseconds, and the statistics of its path. An unknown value is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SenderTime {
    /// Waiting for files to be read and hashed.
    #[n(0)]
    pub reading: u64,
    /// Waiting for a rate limit.
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
    /// Packets lost.
    #[n(6)]
    pub lost_packets: u64,
    /// UDP payload sent, in bytes.
    #[n(7)]
    pub sent_bytes: u64,
    /// Bytes in lost packets.
    #[n(8)]
    pub lost_bytes: u64,
    /// Congestion events that the congestion controller saw.
    #[n(9)]
    pub congestion_events: u64,
    /// Times that large packets stopped arriving (black holes, RFC 8899).
    #[n(10)]
    pub black_holes: u64,
    /// Congestion window, in bytes.
    #[n(11)]
    pub window: u64,
    /// Largest UDP payload that the path carries, in bytes.
    #[n(12)]
    pub mtu: u16,
}
