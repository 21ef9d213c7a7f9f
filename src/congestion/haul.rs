//! haul's own controller: uses what the path delivers, with a short queue, at any random loss.
//!
//! It follows the model of BBRv3 (draft-ietf-ccwg-bbr): a delivery rate, a round-trip time, and phases. After an
//! exponential Startup, Up probes for more, Down drains the queue that probing made, and Cruise keeps the known rate.
//! It differs in these points:
//!
//! - **Only the window steers.** quinn paces at 1.25 x window / RTT and offers nothing else. So bytes in flight do
//!   what BBR does with a pacing rate: the bandwidth-delay product and a small margin in the queue, clocked by ACKs.
//! - **Loss alone is no signal.** BBRv3 takes more than 2 % loss in a round for congestion, which at 5 % random loss
//!   leaves 8 of 100 Mbit/s. Here the loss of rounds without a queue counts as random and is compensated. Only more
//!   loss means a full buffer, and shrinks margin and probes. Where more bytes in flight gave neither rate nor queue,
//!   the estimate of random loss is halved.
//! - **The round-trip time is a mean** over a round, not the smallest sample; with that, jitter would leave the path
//!   half empty.
//! - **Rates are remembered for 4 rounds**, and the margin is concave, so that flows of haul converge to equal shares
//!   with a queue of a few per cent, as in FAST TCP.
//! - **Draining detects other flows**, instead of a ProbeRTT: if Down leaves the queue as long as it was, another
//!   flow keeps it. Then the bytes in flight grow slowly and shrink at overflows, as with TCP, since a flow that
//!   yields to Cubic gets nothing. A deeper Down distinguishes the queue of other flows from a path that has become
//!   longer.
//! - **A rate that falls while the queue grows** is believed at once.
//!
//! One round is one flight. Times without a unit are in rounds. The parts that decide are in files of their own:
//! `round.rs` measures, `model.rs` learns the path, `startup.rs`, `probing.rs` and `others.rs` evaluate what was seen,
//! and `controller.rs` speaks with quinn. This file holds the phases and the window.

use std::sync::Arc;
use std::time::Instant;

use super::model::Path;
use super::others::{Others, RoundLoss};
use super::probing::{Down, DownFinding, Up};
use super::round::{Round, RoundSample};
use super::startup::Startup;
use super::steering::Steering;

/// Initial window in packets. RFC 9002 has 10; Google's QUIC has 32, which quinn paces over a round trip.
pub(super) const INITIAL_PACKETS: u64 = 32;
/// Smallest window in packets (draft-ietf-ccwg-bbr: BBRMinPipeCwnd).
pub(super) const MIN_PACKETS: u64 = 4;
/// Factor of bytes in flight in Down: the link is idle for up to 7 % of a round.
const DOWN_GAIN: f64 = 0.93;
/// Factor of bytes in flight in a deep Down, as in BBR's ProbeRTT.
const DEEP_GAIN: f64 = 0.5;
/// Rounds of Cruise, and up to three more, so that flows on the same path do not probe in step.
const CRUISE_ROUNDS: u32 = 7;
/// Rounds after which Cruise may end early, if its margin is not in the queue: there is room.
const MIN_CRUISE_ROUNDS: u32 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Startup,
    Down,
    Cruise,
    Up,
}

/// The controller of one path.
#[derive(Debug, Clone)]
pub(super) struct Haul {
    pub(super) path: Path,
    pub(super) window: f64,
    pub(super) phase: Phase,
    phase_rounds: u32,
    pub(super) rounds: Rounds,
    pub(super) acks: Acks,
    pub(super) startup: Startup,
    up: Up,
    down: Down,
    others: Others,
    pub(super) steering: Arc<Steering>,
}

#[derive(Debug, Clone)]
pub(super) struct Rounds {
    pub(super) current: Round,
    /// Whether a packet sent in this round was acknowledged.
    pub(super) is_over: bool,
    /// The phase in which the packets acknowledged in this round were sent.
    sent_in: Phase,
}

impl Rounds {
    fn new(now: Instant) -> Self {
        Self {
            current: Round::new(now),
            is_over: false,
            sent_in: Phase::Startup,
        }
    }
}

/// Counts and times over all rounds.
#[derive(Debug, Clone)]
pub(super) struct Acks {
    /// Bytes acknowledged so far.
    pub(super) delivered: u64,
    /// Bytes in flight, as far as quinn reports them.
    pub(super) in_flight: u64,
    /// Moving mean of the round-trip time over some 16 packets, for Startup, which cannot wait for a round's mean.
    pub(super) recent_rtt: f64,
    pub(super) last_ack: Instant,
    /// Losses of packets sent before this instant belong to an outage.
    pub(super) outage_end: Instant,
}

impl Haul {
    pub(super) fn new(now: Instant, mtu: u16) -> Self {
        Self {
            path: Path::new(mtu),
            window: (INITIAL_PACKETS * u64::from(mtu)) as f64,
            phase: Phase::Startup,
            phase_rounds: 0,
            rounds: Rounds::new(now),
            acks: Acks {
                delivered: 0,
                in_flight: 0,
                recent_rtt: 0.0,
                last_ack: now,
                outage_end: now,
            },
            startup: Startup::first(),
            up: Up::new(),
            down: Down::default(),
            others: Others::default(),
            steering: Arc::default(),
        }
    }

    fn set_window(&mut self) {
        let network = (self.path.bdp() + self.path.margin()).max(self.path.min_flight());
        let target = self.others.target();
        let cruise = target.unwrap_or_else(|| self.path.in_flight(network));
        let window = match self.phase {
            Phase::Startup => return,
            Phase::Down if self.down.deep => DEEP_GAIN * self.down.window_before,
            // No compensation for loss here: loss that disappears in Down was not random.
            Phase::Down => DOWN_GAIN * self.path.min_bdp(),
            Phase::Cruise => cruise,
            Phase::Up if target.is_some() => cruise * self.up.gain,
            Phase::Up => cruise + (self.up.gain - 1.0) * self.path.in_flight(self.path.bdp()),
        };
        self.window = window.max(self.min_window());
    }

    pub(super) fn min_window(&self) -> f64 {
        (MIN_PACKETS * self.path.mtu) as f64
    }

    fn enter(&mut self, phase: Phase) {
        if self.phase == Phase::Down && phase != Phase::Down {
            self.down.window = self.window;
            self.down.deep = false;
        }
        if phase == Phase::Up || (phase == Phase::Down && self.phase != Phase::Up) {
            self.down.window_before = self.window;
        }
        self.phase = phase;
        self.phase_rounds = 0;
        self.set_window();
    }

    pub(super) fn enter_startup(&mut self, rate: f64, window: f64) {
        self.startup = Startup::from_rate(rate);
        self.enter(Phase::Startup);
        self.window = window;
    }

    pub(super) fn leave_startup(&mut self, now: Instant) {
        self.down.fallen_rate = None;
        self.rounds = Rounds::new(now);
        self.enter(Phase::Cruise);
    }

    pub(super) fn end_round(&mut self, now: Instant) {
        let round = std::mem::replace(&mut self.rounds.current, Round::new(now));
        let sent_in = std::mem::replace(&mut self.rounds.sent_in, self.phase);
        let Some(sample) = round.sample(sent_in == Phase::Up) else {
            return;
        };
        let alone = self.others.target().is_none();
        let without_queue =
            alone && (sent_in == Phase::Down || (sent_in == Phase::Startup && self.startup.first));
        let previous_loss = std::mem::replace(&mut self.startup.loss, round.loss());
        let loss_limit = if sent_in == Phase::Startup {
            previous_loss
        } else {
            1.0
        };
        self.path.learn(
            now,
            &round,
            sample,
            !alone,
            without_queue.then_some(loss_limit),
        );
        let excess = self.path.is_excess(&round);
        self.phase_rounds += 1;
        tracing::trace!(
            phase = ?self.phase, ?sent_in, rate = sample.rate, mean = sample.mean, base = self.path.base(), min_rtt = self.path.min_rtt(), loss = round.loss(),
            excess, window = self.window, others = ?self.others, app_limited = round.app_limited, "round"
        );
        if round.app_limited {
            // The window did not limit this round, so the round says nothing about it.
            self.set_window();
            return;
        }
        let lost = excess.then(|| self.path.excess_loss(&round));
        let steady = matches!(sent_in, Phase::Cruise | Phase::Down);
        let loss = RoundLoss {
            excess: lost,
            steady,
        };
        let min_window = self.min_window();
        self.others
            .note_round(now, &self.path, loss, self.window, min_window);
        let entered = match sent_in {
            Phase::Up => self.end_up(sample, excess),
            Phase::Down => self.end_down(now, sample),
            Phase::Cruise => {
                self.down.mean_before = sample.mean;
                if excess {
                    self.path.margin_part = (self.path.margin_part / 2.0).max(0.25);
                }
                false
            }
            Phase::Startup => false,
        };
        if !entered {
            self.next_phase(now, sent_in, sample, excess);
            self.set_window();
        }
    }

    /// Evaluates an Up. True when it entered Startup, because there may be even more.
    fn end_up(&mut self, sample: RoundSample, excess: bool) -> bool {
        let base = if self.others.target().is_some() {
            self.path.min_rtt()
        } else {
            self.path.base()
        };
        let gain = self.up.gain - 1.0;
        let mean_before = self.down.mean_before;
        let has_room = self
            .up
            .evaluate(&mut self.path, sample, excess, base, mean_before);
        if !has_room || self.phase != Phase::Down {
            return false;
        }
        self.others.forget_target();
        let window = self.path.in_flight((1.0 + gain) * self.path.bdp());
        self.enter_startup(sample.rate, window);
        true
    }

    /// Evaluates a Down. True when it entered another phase to find out more.
    fn end_down(&mut self, now: Instant, sample: RoundSample) -> bool {
        let RoundSample { rate, mean } = sample;
        self.path.margin_part = (self.path.margin_part * 1.2).min(1.0);
        let overflowed = self.others.overflowed();
        let queue = match self.down.evaluate(now, &self.path, mean, overflowed) {
            DownFinding::LongerPath => {
                self.path.replace_base(now, mean);
                self.others.forget_target();
                self.enter_startup(rate, self.down.window_before);
                return true;
            }
            DownFinding::Unclear => {
                self.enter(Phase::Down);
                return true;
            }
            DownFinding::Queue(queue) => queue,
        };
        self.others
            .note_down(&self.path, queue, rate, self.down.window_before);
        if self.others.target().is_none() {
            self.path.set_base(self.path.min_rtt());
        } else {
            self.path.set_base(mean);
            if let Some(fallen_rate) = self.down.fallen_rate {
                self.path.replace_rate(now, fallen_rate.max(rate));
            }
        }
        false
    }

    fn next_phase(&mut self, now: Instant, sent_in: Phase, sample: RoundSample, excess: bool) {
        let queue = sample.mean - self.path.base();
        match self.phase {
            Phase::Startup => {
                let full = self.startup.end_round(sample.rate, excess);
                if full || queue > self.path.base() / 4.0 + 2.0 * self.path.noise() {
                    self.leave_startup(now);
                }
            }
            Phase::Up => {
                self.down.fallen_rate = None;
                self.enter(Phase::Down);
            }
            Phase::Down => self.enter(Phase::Cruise),
            Phase::Cruise if sent_in == Phase::Cruise => {
                self.next_of_cruise(now, sample.rate, queue)
            }
            Phase::Cruise => {}
        }
    }

    /// Ends Cruise when the rate has fallen under a long queue, or when it is time to probe.
    fn next_of_cruise(&mut self, now: Instant, rate: f64, queue: f64) {
        let margin = self.path.margin_delay();
        let is_long = queue > self.path.base() / 4.0 + 2.0 * margin + 2.0 * self.path.noise();
        if is_long && rate < self.path.rate() * 0.85 && !self.path.is_local() {
            self.down.fallen_rate = Some(rate);
            self.path.replace_rate(now, rate);
            self.enter(Phase::Down);
        } else if self.phase_rounds >= self.cruise_rounds()
            || (self.phase_rounds >= MIN_CRUISE_ROUNDS && queue < margin / 4.0)
        {
            self.up.rate_before = self.path.rate();
            self.enter(Phase::Up);
        }
    }

    fn cruise_rounds(&self) -> u32 {
        let more = (self.acks.delivered / self.path.mtu % 4) as u32;
        CRUISE_ROUNDS * if self.others.target().is_some() { 2 } else { 1 } + more
    }

    pub(super) fn after_outage(&mut self, now: Instant) {
        self.acks.outage_end = now;
        self.acks.recent_rtt = 0.0;
        self.rounds = Rounds::new(now);
        self.path.forget_rates();
        self.others.forget_target();
        let window = (self.window / 4.0).max((INITIAL_PACKETS * self.path.mtu) as f64);
        self.enter_startup(0.0, window);
    }
}
