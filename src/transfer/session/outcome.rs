//! The result of a session, over all its connections.

use std::time::Duration;

use crate::protocol::Summary;
use crate::transfer::bottleneck::{Bottleneck, PathStats, TimeBreakdown};
use crate::transfer::send::TransferStats;

/// The result of a session.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// The sender's statistics.
    pub sent: TransferStats,
    /// The receiver's summary of the last connection.
    pub summary: Summary,
    /// The statistics of the path, over all connections.
    pub path: PathStats,
    /// The bottleneck of the transfer, while it was connected.
    pub bottleneck: Bottleneck,
    /// The time in each stage, while it was connected.
    pub time_breakdown: TimeBreakdown,
    /// Whether the sender was the server (a pull).
    pub pulled: bool,
}

impl Outcome {
    /// Adds the measurements of one connection.
    pub(super) fn add_connection(&mut self, path: &PathStats, account: &TimeBreakdown) {
        self.path
            .join(path, self.time_breakdown.elapsed, account.elapsed);
        self.time_breakdown.join(account);
    }
}

/// How long the receiver's disk held the sender up, if the session came to its summary.
pub(super) fn held_up(summary: Option<&Summary>) -> Option<Duration> {
    summary?.held_up.map(Duration::from_millis)
}
