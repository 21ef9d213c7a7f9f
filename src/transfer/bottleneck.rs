//! Finds the bottleneck of a transfer from the time spent in each stage.
//!
//! Every open transfer is in one stage: it waits for its file to be read, for the rate limit, for the connection to
//! take data, for the peer to acknowledge it, or for the receipt. Most transfers are in the slowest stage most of the
//! time (Little's law). Each moment is therefore divided among the stages by the number of transfers in each.

mod cpu;

pub use cpu::Cpu;
pub(crate) use cpu::Usage;

use std::time::Duration;

use crate::protocol::SenderTime;

/// A shorter session ends before the rates settle.
const MIN_SESSION_TIME: Duration = Duration::from_secs(1);
/// The stage that took this share of the time is the bottleneck.
const DOMINANT_SHARE: f64 = 0.5;
/// Work that wanted a CPU for this share of the time is limited by the CPU.
const BUSY_SHARE: f64 = 0.85;

/// Statistics of the path between two endpoints, as quinn measured them at the sender.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct PathStats {
    /// Bytes per second that were sent and not lost, over the whole session.
    pub rate: u64,
    /// Mean round-trip time during the session.
    pub rtt: Duration,
    /// Shortest round-trip time of the connection.
    pub min_rtt: Duration,
    /// Packets sent.
    pub sent_packets: u64,
    /// Lost packets.
    pub lost_packets: u64,
    /// UDP payload sent, in bytes.
    pub sent_bytes: u64,
    /// Bytes of the lost packets.
    pub lost_bytes: u64,
    /// UDP payload received, in bytes.
    pub received_bytes: u64,
    /// Congestion events of the congestion controller.
    pub congestion_events: u64,
    /// MTU black holes: times that large packets stopped arriving.
    pub black_holes: u64,
    /// Congestion window at the end, in bytes.
    pub window: u64,
    /// Largest UDP payload that the path carries, in bytes.
    pub mtu: u16,
}

impl PathStats {
    /// Adds the statistics of a later connection. `before` and `after` are the times that each was used.
    pub(crate) fn join(&mut self, later: &Self, before: Duration, after: Duration) {
        let time = (before + after).as_secs_f64().max(f64::EPSILON);
        let mean = |a: Duration, b: Duration| {
            (a.mul_f64(before.as_secs_f64()) + b.mul_f64(after.as_secs_f64())).div_f64(time)
        };
        let joined = Self {
            rate: ((self.rate as f64 * before.as_secs_f64()
                + later.rate as f64 * after.as_secs_f64())
                / time) as u64,
            rtt: mean(self.rtt, later.rtt),
            min_rtt: if self.sent_packets == 0 {
                later.min_rtt
            } else {
                self.min_rtt.min(later.min_rtt)
            },
            sent_packets: self.sent_packets.saturating_add(later.sent_packets),
            lost_packets: self.lost_packets.saturating_add(later.lost_packets),
            sent_bytes: self.sent_bytes.saturating_add(later.sent_bytes),
            lost_bytes: self.lost_bytes.saturating_add(later.lost_bytes),
            received_bytes: self.received_bytes.saturating_add(later.received_bytes),
            congestion_events: self
                .congestion_events
                .saturating_add(later.congestion_events),
            black_holes: self.black_holes.saturating_add(later.black_holes),
            window: later.window,
            mtu: later.mtu,
        };
        *self = joined;
    }

    /// Returns the share of lost packets, 0 to 1.
    pub fn loss(&self) -> f64 {
        if self.sent_packets == 0 {
            0.0
        } else {
            self.lost_packets as f64 / self.sent_packets as f64
        }
    }
}

/// The time that a session spent in each stage.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct TimeBreakdown {
    /// Total time. Time outside all stages passed without a transfer, for example while looking for files.
    pub elapsed: Duration,
    /// Waiting for files to be read and hashed.
    pub reading: Duration,
    /// Waiting for the [limit](crate::config::Config::limit).
    pub limited: Duration,
    /// Waiting for the connection to take more, and for the peer to have it.
    pub network: Duration,
    /// Waiting for receipts of acknowledged files, and for the summary.
    pub committing: Duration,
    /// How long data that the store had not taken filled much of the receiver's window, if the receiver reported it.
    pub held_up: Option<Duration>,
    /// CPU usage of this process; `None` if the system does not report it (only Linux does).
    pub cpu: Option<Cpu>,
}

/// The bottleneck of a transfer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Bottleneck {
    /// No single stage, or the session was too short to tell.
    #[default]
    Nothing,
    /// The network. A receiver that cannot process its packets, or has little memory for data in flight, looks the
    /// same: it slows the connection down.
    Network,
    /// The sender's store: reading.
    SenderStore,
    /// The receiver's store: writing and committing.
    ReceiverStore,
    /// The sender's processors.
    Cpu,
    /// The rate limit that was requested.
    Limit,
}

impl Bottleneck {
    /// Returns the name for machines: `network`, `sender_store`, and so on.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Network => "network",
            Self::SenderStore => "sender_store",
            Self::ReceiverStore => "receiver_store",
            Self::Cpu => "cpu",
            Self::Limit => "limit",
        }
    }
}

impl PathStats {
    /// Returns the measurements in the form that a sender reports to its receiver.
    pub(crate) fn sender_time(&self, time: &TimeBreakdown) -> SenderTime {
        let ms = |time: Duration| time.as_millis() as u64;
        let us = |time: Duration| time.as_micros() as u64;
        SenderTime {
            reading: ms(time.reading),
            limited: ms(time.limited),
            network: ms(time.network),
            rtt: us(self.rtt),
            min_rtt: us(self.min_rtt),
            sent_packets: self.sent_packets,
            lost_packets: self.lost_packets,
            sent_bytes: self.sent_bytes,
            lost_bytes: self.lost_bytes,
            congestion_events: self.congestion_events,
            black_holes: self.black_holes,
            window: self.window,
            mtu: self.mtu,
        }
    }

    /// Replaces the measurements of this end, which received, with those that the sender reported.
    pub(crate) fn use_sender_time(&mut self, time: &mut TimeBreakdown, reported: &SenderTime) {
        // The sender may report any value: limit it to the elapsed time.
        let ms = |ms| Duration::from_millis(ms).min(time.elapsed);
        time.reading = ms(reported.reading);
        time.limited = ms(reported.limited);
        time.network = ms(reported.network);
        self.rtt = Duration::from_micros(reported.rtt);
        self.min_rtt = Duration::from_micros(reported.min_rtt);
        self.sent_packets = reported.sent_packets;
        self.lost_packets = reported.lost_packets.min(reported.sent_packets);
        self.sent_bytes = reported.sent_bytes;
        self.lost_bytes = reported.lost_bytes;
        self.congestion_events = reported.congestion_events;
        self.black_holes = reported.black_holes;
        self.window = reported.window;
        self.mtu = reported.mtu;
    }
}

impl TimeBreakdown {
    /// Adds the times of a later connection.
    pub(crate) fn join(&mut self, later: &Self) {
        self.elapsed += later.elapsed;
        self.reading += later.reading;
        self.limited += later.limited;
        self.network += later.network;
        self.committing += later.committing;
        self.held_up = match (self.held_up, later.held_up) {
            (None, None) => None,
            (before, after) => Some(before.unwrap_or_default() + after.unwrap_or_default()),
        };
        self.cpu = later.cpu.or(self.cpu);
    }

    /// Returns the bottleneck: the stage that took most of the time.
    pub fn bottleneck(&self) -> Bottleneck {
        if self.elapsed < MIN_SESSION_TIME {
            return Bottleneck::Nothing;
        }
        let Some((bottleneck, _)) = self
            .parts()
            .into_iter()
            .find(|&(_, part)| part >= DOMINANT_SHARE)
        else {
            return Bottleneck::Nothing;
        };
        let cpu = self.cpu.unwrap_or_default();
        match bottleneck {
            // Reading and hashing move from thread to thread, so all threads count.
            Bottleneck::SenderStore if cpu.all >= BUSY_SHARE => Bottleneck::Cpu,
            // One thread at a time drives a connection.
            Bottleneck::Network if cpu.busiest >= BUSY_SHARE => Bottleneck::Cpu,
            bottleneck => bottleneck,
        }
    }

    /// Returns the share of time of each stage, 0 to 1, largest first.
    pub fn parts(&self) -> [(Bottleneck, f64); 4] {
        // While the window was full of data that waits for the disk, the connection took nothing. A full window alone
        // proves nothing: a sender with data ready fills it on any path.
        let held_up = self.network.min(self.held_up.unwrap_or_default());
        let part =
            |time: Duration| time.as_secs_f64() / self.elapsed.as_secs_f64().max(f64::EPSILON);
        let mut parts = [
            (Bottleneck::Network, part(self.network - held_up)),
            (Bottleneck::SenderStore, part(self.reading)),
            (Bottleneck::ReceiverStore, part(self.committing + held_up)),
            (Bottleneck::Limit, part(self.limited)),
        ];
        parts.sort_by(|a, b| b.1.total_cmp(&a.1));
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(change: impl FnOnce(&mut TimeBreakdown)) -> Bottleneck {
        let mut time = TimeBreakdown {
            elapsed: Duration::from_secs(10),
            ..TimeBreakdown::default()
        };
        change(&mut time);
        time.bottleneck()
    }

    #[test]
    fn the_dominant_stage_is_the_bottleneck() {
        let s = Duration::from_secs;
        assert_eq!(time(|a| a.network = s(8)), Bottleneck::Network);
        assert_eq!(time(|a| a.reading = s(8)), Bottleneck::SenderStore);
        assert_eq!(time(|a| a.limited = s(8)), Bottleneck::Limit);
        assert_eq!(time(|a| a.committing = s(8)), Bottleneck::ReceiverStore);
        assert_eq!(
            time(|a| (a.network, a.reading) = (s(6), s(4))),
            Bottleneck::Network
        );
    }

    #[test]
    fn waiting_for_the_receiver_disk_is_not_a_network_limit() {
        let s = Duration::from_secs;
        assert_eq!(
            time(|a| (a.network, a.held_up) = (s(8), Some(s(9)))),
            Bottleneck::ReceiverStore
        );
        assert_eq!(
            time(|a| (a.network, a.held_up) = (s(8), Some(s(1)))),
            Bottleneck::Network
        );
        assert_eq!(
            time(|a| (a.network, a.committing, a.held_up) = (s(5), s(4), Some(s(3)))),
            Bottleneck::ReceiverStore
        );
        assert_eq!(
            time(|a| (a.limited, a.held_up) = (s(8), Some(s(9)))),
            Bottleneck::Limit
        );
    }

    #[test]
    fn a_busy_processor_is_the_bottleneck() {
        let s = Duration::from_secs;
        let cpu = |busiest, all| Some(Cpu { busiest, all });
        assert_eq!(
            time(|a| (a.network, a.cpu) = (s(8), cpu(0.95, 1.5))),
            Bottleneck::Cpu
        );
        assert_eq!(
            time(|a| (a.network, a.cpu) = (s(8), cpu(0.5, 1.5))),
            Bottleneck::Network
        );
        assert_eq!(
            time(|a| (a.reading, a.cpu) = (s(8), cpu(0.5, 1.0))),
            Bottleneck::Cpu
        );
        assert_eq!(
            time(|a| (a.reading, a.cpu) = (s(8), cpu(0.3, 0.6))),
            Bottleneck::SenderStore
        );
        assert_eq!(
            time(|a| (a.limited, a.cpu) = (s(8), cpu(1.0, 2.0))),
            Bottleneck::Limit
        );
    }

    #[test]
    fn mixed_or_short_sessions_have_no_bottleneck() {
        let s = Duration::from_secs;
        assert_eq!(time(|_| {}), Bottleneck::Nothing);
        assert_eq!(
            time(|a| (a.network, a.reading, a.committing) = (s(4), s(3), s(3))),
            Bottleneck::Nothing
        );
        assert_eq!(
            time(|a| (a.elapsed, a.network) = (Duration::from_millis(900), s(1))),
            Bottleneck::Nothing
        );
        assert_eq!(TimeBreakdown::default().bottleneck(), Bottleneck::Nothing);
        assert!(
            TimeBreakdown::default()
                .parts()
                .iter()
                .all(|(_, part)| *part == 0.0)
        );
    }

    #[test]
    fn statistics_of_two_connections_are_combined() {
        let s = Duration::from_secs;
        let seen = |rate, rtt, packets| PathStats {
            rate,
            rtt: s(rtt),
            min_rtt: s(rtt),
            sent_packets: packets,
            mtu: rate as u16,
            ..PathStats::default()
        };
        let mut path = PathStats::default();
        path.join(&seen(100, 1, 10), s(0), s(1));
        assert_eq!(path, seen(100, 1, 10));
        path.join(&seen(500, 5, 20), s(1), s(3));
        assert_eq!(
            path,
            PathStats {
                min_rtt: s(1),
                mtu: 500,
                ..seen(400, 4, 30)
            }
        );

        let took = |time, held_up| TimeBreakdown {
            elapsed: s(time),
            network: s(time),
            held_up,
            ..TimeBreakdown::default()
        };
        let mut time = took(1, None);
        time.join(&took(2, None));
        assert_eq!(time, took(3, None));
        time.join(&took(2, Some(s(1))));
        assert_eq!(time, took(5, Some(s(1))));
    }

    #[test]
    fn loss_is_a_share_of_sent_packets() {
        assert_eq!(PathStats::default().loss(), 0.0);
        assert_eq!(
            PathStats {
                sent_packets: 200,
                lost_packets: 2,
                ..PathStats::default()
            }
            .loss(),
            0.01
        );
    }
}
