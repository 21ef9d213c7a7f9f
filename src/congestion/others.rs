//! Whether others keep a queue on the path, and what a flow holds in flight among them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::model::Path;

/// A queue that is left after Down is others' when it is longer than this part of the least round-trip time, in two Downs
/// in a row; after overflows the smaller one suffices, once.
const FOREIGN: f64 = 0.25;
const FOREIGN_OVERFLOWED: f64 = 0.1;
const FOREIGN_DOWNS: f64 = 2.0;
/// Half of such a queue counts for its part, but only while the rate falls: other flows of haul leave as much, and let
/// one keep its rate.
const FOREIGN_LEAST: f64 = 0.5;
const FALL: f64 = 0.9;
/// Downs without others' queue until they count as gone: Cubic's own cycle leaves it for some seconds.
const QUIET_DOWNS: u32 = 4;
/// Overflows within this time that make a difference, and how many.
const OVERFLOW_TIME: Duration = Duration::from_secs(10);
const OVERFLOWS: usize = 3;
/// Rounds of too much loss that no Down has shown to be random: some three cycles. Then it is congestion, whatever the
/// round-trip time says: the least that is known may hold a queue that others keep.
const MAX_EXCESS_ROUNDS: u32 = 32;
/// What is left in flight after an overflow among others (Cubic leaves 0.7, but grows faster), less where much was lost;
/// and rounds until the next.
const BACK_OFF: f64 = 0.85;
const LEAST_BACK_OFF: f64 = 0.5;
const BACK_OFF_ROUNDS: u32 = 4;
/// Growth among others, as a part of what is in flight each round, at most; but a packet, as TCP grows, so that small
/// flows come to equal shares.
const GROWTH: f64 = 0.02;

/// What is held in flight among others.
#[derive(Debug, Clone)]
struct Hold {
    bytes: f64,
    /// Rounds until the next overflow counts.
    rest: u32,
}

/// What is known of other flows.
#[derive(Debug, Clone, Default)]
pub(super) struct Others {
    hold: Option<Hold>,
    /// Downs in a row that left a foreign queue, those that left less of it in part; and those that left none.
    foreign_downs: f64,
    quiet_downs: u32,
    /// The rate of the last Down.
    rate: f64,
    overflows: VecDeque<Instant>,
    /// Rounds that lost more than chance explains, less those that did not.
    excess_rounds: u32,
}

impl Others {
    /// Bytes to hold in flight; `None` when this flow is alone, or among flows that keep no more of a queue than it does.
    pub(super) fn hold(&self) -> Option<f64> {
        self.hold.as_ref().map(|hold| hold.bytes)
    }

    /// Whether a buffer has overflowed of late.
    pub(super) fn overflowed(&self) -> bool {
        !self.overflows.is_empty()
    }

    /// They are gone.
    pub(super) fn leave(&mut self) {
        self.hold = None;
    }

    /// Notes a round and its loss beyond chance, if any; grows and shrinks what is held. `steady` says that the round was
    /// no probe for more, so that its overflow is not of its own making.
    pub(super) fn note_round(
        &mut self,
        now: Instant,
        path: &Path,
        (excess, steady): (Option<f64>, bool),
        (window, least_window): (f64, f64),
    ) {
        if excess.is_some() && steady {
            self.overflows.push_back(now);
        }
        while self
            .overflows
            .front()
            .is_some_and(|at| now - *at > OVERFLOW_TIME)
        {
            self.overflows.pop_front();
        }
        self.excess_rounds = if excess.is_some() {
            self.excess_rounds + 1
        } else {
            self.excess_rounds.saturating_sub(1)
        };
        if self.excess_rounds >= MAX_EXCESS_ROUNDS {
            self.excess_rounds = 0;
            self.hold.get_or_insert(Hold {
                bytes: window,
                rest: 0,
            });
        }
        let Some(hold) = &mut self.hold else { return };
        hold.rest = hold.rest.saturating_sub(1);
        match excess {
            None => {
                let root = (hold.bytes * path.mtu as f64).sqrt();
                hold.bytes += (root / 2.0).min(hold.bytes * GROWTH).max(path.mtu as f64);
            }
            Some(lost) if hold.rest == 0 => {
                let left = (1.0 - lost).clamp(LEAST_BACK_OFF, BACK_OFF);
                *hold = Hold {
                    bytes: (hold.bytes * left).max(least_window),
                    rest: BACK_OFF_ROUNDS,
                };
            }
            Some(_) => {}
        }
    }

    /// Notes the queue that a Down has left, in seconds, and the rate in it.
    pub(super) fn note_down(&mut self, path: &Path, queue: f64, rate: f64, window_before: f64) {
        let overflowed = self.overflows.len() >= OVERFLOWS;
        let foreign = path.least()
            * if overflowed {
                FOREIGN_OVERFLOWED
            } else {
                FOREIGN
            };
        let part = (queue - path.noise()) / foreign;
        let falls = rate < FALL * std::mem::replace(&mut self.rate, rate);
        if part >= 1.0 || (part > FOREIGN_LEAST && falls) {
            self.foreign_downs += part.min(1.0);
            self.quiet_downs = 0;
            if self.foreign_downs >= FOREIGN_DOWNS || (part >= 1.0 && overflowed) {
                self.hold.get_or_insert(Hold {
                    bytes: window_before,
                    rest: 0,
                });
            }
        } else if part < FOREIGN_LEAST {
            self.foreign_downs = 0.0;
            self.quiet_downs += 1;
            if self.quiet_downs >= QUIET_DOWNS {
                self.hold = None;
            }
        }
    }
}
