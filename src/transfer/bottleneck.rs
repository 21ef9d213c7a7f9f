//! What bound a transfer: an account of where the time went, and what follows from it.
//!
//! Every open transfer stands somewhere on its way: it waits for its file to be read, for the limit, for the connection to
//! take what was read, for the peer to have it, or for the receipt. The slowest station is where most of them stand most
//! of the time (Little's law), so each moment is shared out among the stations by how many transfers stand there.

mod cpu;

pub use cpu::Cpu;
pub(crate) use cpu::Usage;

use std::time::Duration;

use crate::protocol::SenderTime;

/// A session shorter than this is over before anything has settled.
const MIN_SESSION_TIME: Duration = Duration::from_secs(1);
/// The station that took this part of the time is what bound the transfer.
const DOMINANT_SHARE: f64 = 0.5;
/// Work that wanted a processor for this part of the time is as fast as the processor lets it be.
const BUSY_SHARE: f64 = 0.85;

/// What the path between two endpoints was like, as quinn saw it from the sender's end.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct PathStats {
    /// Bytes a second that went out and were not lost, over the whole session.
    pub rate: u64,
    /// Mean round-trip time while it ran.
    pub rtt: Duration,
    /// Shortest round-trip time of the connection.
    pub min_rtt: Duration,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets that never arrived.
    pub lost_packets: u64,
    /// UDP payload sent, in bytes.
    pub sent_bytes: u64,
    /// Bytes of the packets that never arrived.
    pub lost_bytes: u64,
    /// UDP payload received, in bytes.
    pub received_bytes: u64,
    /// Times that the congestion controller saw congestion.
    pub congestion_events: u64,
    /// Times that large packets stopped coming through.
    pub black_holes: u64,
    /// Congestion window at the end, in bytes.
    pub window: u64,
    /// Largest UDP payload that the path carries, in bytes.
    pub mtu: u16,
}

impl PathStats {
    /// Adds what it was like over another connection, later; `before` and `after` are how long each was used.
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

    /// The part of the packets that was lost, 0 to 1.
    pub fn loss(&self) -> f64 {
        if self.sent_packets == 0 {
            0.0
        } else {
            self.lost_packets as f64 / self.sent_packets as f64
        }
    }
}

/// Where a session's time went.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct TimeBreakdown {
    /// All of it. What the stations do not account for went by without a transfer, such as in looking for files.
    pub elapsed: Duration,
    /// Waiting for files to be read and hashed.
    pub reading: Duration,
    /// Waiting for the [limit](crate::config::Config::limit).
    pub limited: Duration,
    /// Waiting for the connection to take more, and for the peer to have it.
    pub network: Duration,
    /// Waiting for receipts of what the receiver has in whole, and for its summary.
    pub committing: Duration,
    /// How long much of the receiver's window was taken by what its store had not taken, if it told.
    pub held_up: Option<Duration>,
    /// How much this process wanted the processors; `None` where the system does not tell (only Linux does).
    pub cpu: Option<Cpu>,
}

/// What bound a transfer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Bottleneck {
    /// Nothing for most of the time, or it was too short to say.
    #[default]
    Nothing,
    /// The network. A receiver that does not keep up with its packets, or whose memory for what is in flight is short,
    /// looks the same from here: it slows the connection down.
    Network,
    /// The sender's store: reading.
    SenderStore,
    /// The receiver's store: writing and committing.
    ReceiverStore,
    /// The sender's processors.
    Cpu,
    /// The limit that was asked for.
    Limit,
}

impl Bottleneck {
    /// A name for machines: `network`, `sender_store`, and so on.
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
    /// As a sender tells its receiver.
    pub(crate) fn spent(&self, time: &TimeBreakdown) -> SenderTime {
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

    /// Takes what a sender told for what this end, which received, saw.
    pub(crate) fn tell(&mut self, time: &mut TimeBreakdown, spent: &SenderTime) {
        // It may say what it likes: no more than there was.
        let ms = |ms| Duration::from_millis(ms).min(time.elapsed);
        time.reading = ms(spent.reading);
        time.limited = ms(spent.limited);
        time.network = ms(spent.network);
        self.rtt = Duration::from_micros(spent.rtt);
        self.min_rtt = Duration::from_micros(spent.min_rtt);
        self.sent_packets = spent.sent_packets;
        self.lost_packets = spent.lost_packets.min(spent.sent_packets);
        self.sent_bytes = spent.sent_bytes;
        self.lost_bytes = spent.lost_bytes;
        self.congestion_events = spent.congestion_events;
        self.black_holes = spent.black_holes;
        self.window = spent.window;
        self.mtu = spent.mtu;
    }
}

impl TimeBreakdown {
    /// Adds where the time went over another connection, later.
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

    /// What took most of the time.
    pub fn bound(&self) -> Bottleneck {
        if self.elapsed < MIN_SESSION_TIME {
            return Bottleneck::Nothing;
        }
        let Some((bound, _)) = self
            .parts()
            .into_iter()
            .find(|&(_, part)| part >= DOMINANT_SHARE)
        else {
            return Bottleneck::Nothing;
        };
        let cpu = self.cpu.unwrap_or_default();
        match bound {
            // Reading and hashing go from thread to thread.
            Bottleneck::SenderStore if cpu.all >= BUSY_SHARE => Bottleneck::Cpu,
            // A connection is driven by one at a time.
            Bottleneck::Network if cpu.busiest >= BUSY_SHARE => Bottleneck::Cpu,
            bound => bound,
        }
    }

    /// What each station took of the time, 0 to 1, most first.
    pub fn parts(&self) -> [(Bottleneck, f64); 4] {
        // The connection took nothing since its window was full of what waits for the disk. That the window was used up
        // says nothing by itself: what a sender has ready to go uses it up on any path.
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
        time.bound()
    }

    #[test]
    fn what_took_most_of_the_time_bound_it() {
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
    fn a_connection_that_waits_for_the_receivers_disk_is_not_the_networks_doing() {
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
    fn a_processor_without_rest_is_why_reading_and_sending_are_no_faster() {
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
    fn nothing_in_particular_is_a_verdict_too() {
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
        assert_eq!(TimeBreakdown::default().bound(), Bottleneck::Nothing);
        assert!(
            TimeBreakdown::default()
                .parts()
                .iter()
                .all(|(_, part)| *part == 0.0)
        );
    }

    #[test]
    fn what_two_connections_were_like_adds_up() {
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
    fn loss_is_a_part_of_what_was_sent() {
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
