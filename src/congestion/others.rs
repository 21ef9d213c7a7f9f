//! Detects other flows that keep a queue on the path, and decides how much this flow keeps in flight among them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::model::Path;

/// A queue that remains after Down belongs to other flows if it is longer than this part of the least round-trip
/// time, in two Downs in a row.
const FOREIGN_QUEUE: f64 = 0.25;
/// The same after overflows, where one Down suffices.
const FOREIGN_QUEUE_AFTER_OVERFLOW: f64 = 0.1;
/// Downs in a row that must leave such a queue.
const FOREIGN_DOWNS: f64 = 2.0;
/// A queue of half that length counts in part, but only while the rate falls: other flows of haul leave as much, and
/// let a flow keep its rate.
const MIN_FOREIGN_PART: f64 = 0.5;
/// Part of the previous Down's rate below which the rate falls.
const FALLING_RATE: f64 = 0.9;
/// Downs without a foreign queue until the other flows count as gone: Cubic's own cycle pauses its queue for some
/// seconds.
const QUIET_DOWNS: u32 = 4;
/// Time in which overflows are counted.
const OVERFLOW_TIME: Duration = Duration::from_secs(10);
/// Overflows in that time after which a shorter foreign queue suffices.
const OVERFLOW_LIMIT: usize = 3;
/// Rounds of excess loss that no Down has shown to be random, some three cycles, after which it counts as congestion.
/// The round-trip time cannot refute that: its known minimum may include a queue of other flows.
const MAX_EXCESS_ROUNDS: u32 = 32;
/// Part that stays in flight after an overflow among other flows (Cubic keeps 0.7, but grows faster).
const BACK_OFF: f64 = 0.85;
/// Smallest part that stays where much was lost.
const MIN_BACK_OFF: f64 = 0.5;
/// Rounds after a reduction in which further overflows do not count.
const BACK_OFF_ROUNDS: u32 = 4;
/// Largest growth among other flows in each round, as a part of the bytes in flight. It is at least one packet, as in
/// TCP, so that small flows converge to equal shares.
const MAX_GROWTH: f64 = 0.02;

/// The bytes kept in flight among other flows.
#[derive(Debug, Clone)]
struct Target {
    bytes: f64,
    /// Rounds until the next overflow counts.
    rounds_to_wait: u32,
}

/// The loss of one round.
#[derive(Debug, Clone, Copy)]
pub(super) struct RoundLoss {
    /// The part lost beyond what chance explains, if any.
    pub(super) excess: Option<f64>,
    /// Whether the round did not probe for more, so that an overflow has another cause.
    pub(super) steady: bool,
}

/// State about other flows.
#[derive(Debug, Clone, Default)]
pub(super) struct Others {
    target: Option<Target>,
    /// Downs in a row that left a foreign queue; shorter queues count in part.
    foreign_downs: f64,
    /// Downs in a row that left none.
    quiet_downs: u32,
    /// The rate of the last Down.
    down_rate: f64,
    overflows: VecDeque<Instant>,
    /// Rounds with more loss than chance explains, minus the others.
    excess_rounds: u32,
}

impl Others {
    /// Bytes to keep in flight; `None` when this flow is alone, or among flows that keep no longer queue than it
    /// does.
    pub(super) fn target(&self) -> Option<f64> {
        self.target.as_ref().map(|target| target.bytes)
    }

    /// Whether a buffer has overflowed recently.
    pub(super) fn overflowed(&self) -> bool {
        !self.overflows.is_empty()
    }

    /// Assumes that the other flows are gone.
    pub(super) fn forget_target(&mut self) {
        self.target = None;
    }

    /// Records a round, and grows or shrinks the bytes to keep in flight.
    pub(super) fn note_round(
        &mut self,
        now: Instant,
        path: &Path,
        loss: RoundLoss,
        window: f64,
        min_window: f64,
    ) {
        let RoundLoss { excess, steady } = loss;
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
            self.target.get_or_insert(Target {
                bytes: window,
                rounds_to_wait: 0,
            });
        }
        let Some(target) = &mut self.target else {
            return;
        };
        target.rounds_to_wait = target.rounds_to_wait.saturating_sub(1);
        match excess {
            None => {
                let root = (target.bytes * path.mtu as f64).sqrt();
                target.bytes += (root / 2.0)
                    .min(target.bytes * MAX_GROWTH)
                    .max(path.mtu as f64);
            }
            Some(lost) if target.rounds_to_wait == 0 => {
                let remaining = (1.0 - lost).clamp(MIN_BACK_OFF, BACK_OFF);
                *target = Target {
                    bytes: (target.bytes * remaining).max(min_window),
                    rounds_to_wait: BACK_OFF_ROUNDS,
                };
            }
            Some(_) => {}
        }
    }

    /// Records the queue in seconds that a Down has left, and its rate.
    pub(super) fn note_down(&mut self, path: &Path, queue: f64, rate: f64, window_before: f64) {
        let overflowed = self.overflows.len() >= OVERFLOW_LIMIT;
        let foreign = path.min_rtt()
            * if overflowed {
                FOREIGN_QUEUE_AFTER_OVERFLOW
            } else {
                FOREIGN_QUEUE
            };
        let part = (queue - path.noise()) / foreign;
        let is_falling = rate < FALLING_RATE * std::mem::replace(&mut self.down_rate, rate);
        if part >= 1.0 || (part > MIN_FOREIGN_PART && is_falling) {
            self.foreign_downs += part.min(1.0);
            self.quiet_downs = 0;
            if self.foreign_downs >= FOREIGN_DOWNS || (part >= 1.0 && overflowed) {
                self.target.get_or_insert(Target {
                    bytes: window_before,
                    rounds_to_wait: 0,
                });
            }
        } else if part < MIN_FOREIGN_PART {
            self.foreign_downs = 0.0;
            self.quiet_downs += 1;
            if self.quiet_downs >= QUIET_DOWNS {
                self.target = None;
            }
        }
    }
}
