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
//! One round is one flight. Times without a unit are in rounds. The file is long since its phases are one state machine
//! over one state.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerMetrics};
use quinn_proto::RttEstimator;

use super::Steering;
use super::model::{Path, Round};
use super::others::{Others, RoundLoss};

/// Initial window in packets. RFC 9002 has 10; Google's QUIC has 32, which quinn paces over a round trip.
const INITIAL_PACKETS: u64 = 32;
/// Initial rate on a long path in bytes a second, 5 Mbit/s. With a satellite's 600 ms that saves three round trips of
/// Startup; at 100 ms it is 53 packets.
const INITIAL_RATE: f64 = 640_000.0;
/// Largest initial window in packets, for any path.
const MAX_INITIAL_PACKETS: u64 = 512;
/// Smallest window in packets (draft-ietf-ccwg-bbr: BBRMinPipeCwnd).
const MIN_PACKETS: u64 = 4;
/// Shortest round: on loopback a flight is too short to measure.
const MIN_ROUND: Duration = Duration::from_millis(5);
/// Growth of the rate in a round below which Startup ends (draft-ietf-ccwg-bbr), twice in a row.
const STARTUP_GROWTH: f64 = 1.25;
/// Rounds without that growth that end Startup.
const STARTUP_ROUNDS: u32 = 2;
/// Queue in seconds at which Startup ends, or an eighth of the round-trip time if that is longer (RFC 9406, section
/// 4.2; its upper bound of 16 ms is what one window of bursts makes on a satellite path).
const MIN_STARTUP_QUEUE: f64 = 0.004;
/// Part of the window that Startup ends with. Half was in flight a round trip ago and made a queue; the effect of the
/// whole is not known yet.
const STARTUP_PART: f64 = 0.6;
/// Factor of bytes in flight in Up, as in BBR.
const UP_GAIN: f64 = 1.25;
/// Its lower bound, where Up only overflows a buffer.
const MIN_UP_GAIN: f64 = 1.06;
/// Factor of bytes in flight in Down: the link is idle for up to 7 % of a round.
const DOWN_GAIN: f64 = 0.93;
/// Factor of bytes in flight in a deep Down, as in BBR's ProbeRTT.
const DEEP_GAIN: f64 = 0.5;
/// Shortest time between deep Downs.
const DEEP_DOWN_INTERVAL: Duration = Duration::from_secs(3);
/// Window of a Down, as a part of the previous one, at which an unchanged round-trip time proves a longer path.
const DEEP_WINDOW_PART: f64 = 0.6;
/// Rounds of Cruise, and up to three more, so that flows on the same path do not probe in step.
const CRUISE_ROUNDS: u32 = 7;
/// Rounds after which Cruise may end early, if its margin is not in the queue: there is room.
const MIN_CRUISE_ROUNDS: u32 = 3;
/// Packets that a probe sends beyond the window; quinn needs room for two to send one.
const PROBE_PACKETS: u64 = 4;
/// Time without any ACK after which the path is measured afresh; losses in that time say nothing about it.
const OUTAGE_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Startup,
    Down,
    Cruise,
    Up,
}

#[derive(Debug, Clone)]
pub(super) struct Haul {
    path: Path,
    window: f64,
    phase: Phase,
    phase_rounds: u32,
    rounds: Rounds,
    acks: Acks,
    startup: Startup,
    up: Up,
    down: Down,
    others: Others,
    steering: Arc<Steering>,
}

#[derive(Debug, Clone)]
struct Rounds {
    current: Round,
    /// Whether a packet sent in this round was acknowledged.
    is_over: bool,
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
struct Acks {
    /// Bytes acknowledged so far.
    delivered: u64,
    /// Bytes in flight, as far as quinn reports them.
    in_flight: u64,
    /// Moving mean of the round-trip time over some 16 packets, for Startup, which cannot wait for a round's mean.
    recent_rtt: f64,
    last_ack: Instant,
    /// Losses of packets sent before this instant belong to an outage.
    outage_end: Instant,
}

#[derive(Debug, Clone, Default)]
struct Startup {
    /// Whether the path's loss is still unknown.
    first: bool,
    /// The loss of the previous round.
    loss: f64,
    rate: f64,
    rounds_without_growth: u32,
}

#[derive(Debug, Clone)]
struct Up {
    gain: f64,
    /// The rate before this phase.
    from: f64,
}

#[derive(Debug, Clone, Default)]
struct Down {
    deep: bool,
    /// The window before this phase.
    window_before: f64,
    /// The mean round-trip time before this phase.
    mean_before: f64,
    /// The window in this phase.
    window: f64,
    /// The fallen rate that started this phase.
    fallen_rate: Option<f64>,
    last_deep: Option<Instant>,
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
            startup: Startup {
                first: true,
                ..Startup::default()
            },
            up: Up {
                gain: UP_GAIN,
                from: 0.0,
            },
            down: Down::default(),
            others: Others::default(),
            steering: Arc::default(),
        }
    }

    pub(super) fn steering(&self) -> Arc<Steering> {
        self.steering.clone()
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

    fn min_window(&self) -> f64 {
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

    fn enter_startup(&mut self, rate: f64, window: f64) {
        self.startup = Startup {
            rate,
            ..Startup::default()
        };
        self.enter(Phase::Startup);
        self.window = window;
    }

    fn leave_startup(&mut self, now: Instant) {
        self.down.fallen_rate = None;
        self.rounds = Rounds::new(now);
        self.enter(Phase::Cruise);
    }

    fn end_round(&mut self, now: Instant) {
        let round = std::mem::replace(&mut self.rounds.current, Round::new(now));
        let sent_in = std::mem::replace(&mut self.rounds.sent_in, self.phase);
        let Some((rate, mean)) = round.sample(sent_in == Phase::Up) else {
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
            rate,
            mean,
            !alone,
            without_queue.then_some(loss_limit),
        );
        let excess = self.path.is_excess(&round);
        self.phase_rounds += 1;
        tracing::trace!(
            phase = ?self.phase, ?sent_in, rate, mean, base = self.path.base(), min_rtt = self.path.min_rtt(), loss = round.loss(),
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
            Phase::Up => self.evaluate_up(rate, mean, excess),
            Phase::Down => self.evaluate_down(now, rate, mean),
            Phase::Cruise => {
                self.down.mean_before = mean;
                if excess {
                    self.path.margin_part = (self.path.margin_part / 2.0).max(0.25);
                }
                false
            }
            Phase::Startup => false,
        };
        if !entered {
            self.next_phase(now, sent_in, rate, mean, excess);
            self.set_window();
        }
    }

    /// Evaluates an Up. True when more bytes in flight increased the rate, so that there may be even more.
    fn evaluate_up(&mut self, rate: f64, mean: f64, excess: bool) -> bool {
        let gain = self.up.gain - 1.0;
        if excess {
            let third = gain / 3.0;
            if rate < self.up.from * (1.0 + third)
                && mean < self.down.mean_before + third * self.path.base()
            {
                self.path.doubt_loss();
            }
            self.up.gain = (1.0 + gain / 2.0).max(MIN_UP_GAIN);
        } else {
            self.up.gain = (1.0 + gain * 1.5).min(UP_GAIN);
        }
        let base = if self.others.target().is_some() {
            self.path.min_rtt()
        } else {
            self.path.base()
        };
        let has_room = self.phase == Phase::Down
            && rate > self.up.from * (1.0 + gain / 2.0)
            && mean - base < base * 0.2 + 2.0 * self.path.noise();
        if has_room {
            self.others.forget_target();
            self.enter_startup(rate, self.path.in_flight((1.0 + gain) * self.path.bdp()));
        }
        has_room
    }

    /// Evaluates a Down: the queue that remained. True when it entered another phase to find out more.
    fn evaluate_down(&mut self, now: Instant, rate: f64, mean: f64) -> bool {
        self.path.margin_part = (self.path.margin_part * 1.2).min(1.0);
        let min_rtt = self.path.min_rtt();
        let queue = mean - min_rtt;
        let same = (mean - self.down.mean_before).abs() < mean * 0.01 + self.path.noise() / 3.0;
        if same && queue > min_rtt * 0.15 + self.path.noise() {
            if self.down.window <= DEEP_WINDOW_PART * self.down.window_before
                && !self.others.overflowed()
            {
                // Far fewer bytes in flight and an unchanged delay: there is no queue, the path has become longer.
                self.path.replace_base(now, mean);
                self.others.forget_target();
                self.enter_startup(rate, self.down.window_before);
                return true;
            }
            if self
                .down
                .last_deep
                .is_none_or(|at| now - at > DEEP_DOWN_INTERVAL)
            {
                self.down.last_deep = Some(now);
                self.down.deep = true;
                self.enter(Phase::Down);
                return true;
            }
        }
        self.others
            .note_down(&self.path, queue, rate, self.down.window_before);
        if self.others.target().is_none() {
            self.path.set_base(min_rtt);
        } else {
            self.path.set_base(mean);
            if let Some(fallen_rate) = self.down.fallen_rate {
                self.path.replace_rate(now, fallen_rate.max(rate));
            }
        }
        false
    }

    fn next_phase(&mut self, now: Instant, sent_in: Phase, rate: f64, mean: f64, excess: bool) {
        let queue = mean - self.path.base();
        match self.phase {
            Phase::Startup => {
                let startup = &mut self.startup;
                if rate > startup.rate * STARTUP_GROWTH {
                    *startup = Startup {
                        rate,
                        rounds_without_growth: 0,
                        ..*startup
                    };
                } else {
                    startup.rounds_without_growth += 1;
                }
                let stalled_rounds = startup.rounds_without_growth;
                let full = stalled_rounds >= STARTUP_ROUNDS || (excess && stalled_rounds > 0);
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
                let margin = self.path.margin_delay();
                let is_long =
                    queue > self.path.base() / 4.0 + 2.0 * margin + 2.0 * self.path.noise();
                if is_long && rate < self.path.rate() * 0.85 && !self.path.is_local() {
                    self.down.fallen_rate = Some(rate);
                    self.path.replace_rate(now, rate);
                    self.enter(Phase::Down);
                } else if self.phase_rounds >= self.cruise_rounds()
                    || (self.phase_rounds >= MIN_CRUISE_ROUNDS && queue < margin / 4.0)
                {
                    self.up.from = self.path.rate();
                    self.enter(Phase::Up);
                }
            }
            Phase::Cruise => {}
        }
    }

    fn cruise_rounds(&self) -> u32 {
        let more = (self.acks.delivered / self.path.mtu % 4) as u32;
        CRUISE_ROUNDS * if self.others.target().is_some() { 2 } else { 1 } + more
    }

    /// Whether Startup fills a queue.
    fn is_filling(&self) -> bool {
        let queue = (self.path.base() / 8.0).max(MIN_STARTUP_QUEUE);
        self.phase == Phase::Startup
            && self.startup.rate > 0.0
            && self.path.base().is_finite()
            && self.acks.recent_rtt > self.path.base() + queue
    }

    fn after_outage(&mut self, now: Instant) {
        self.acks.outage_end = now;
        self.acks.recent_rtt = 0.0;
        self.rounds = Rounds::new(now);
        self.path.forget_rates();
        self.others.forget_target();
        let window = (self.window / 4.0).max((INITIAL_PACKETS * self.path.mtu) as f64);
        self.enter_startup(0.0, window);
    }
}

impl Controller for Haul {
    fn on_sent(&mut self, _now: Instant, bytes: u64, _last_packet_number: u64) {
        self.acks.in_flight += bytes;
        self.steering.probing.store(false, Relaxed);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        if now.saturating_duration_since(self.acks.last_ack)
            > OUTAGE_TIMEOUT.max(Duration::from_secs_f64(4.0 * self.acks.recent_rtt))
        {
            self.after_outage(now);
        }
        self.acks.last_ack = now;
        self.acks.delivered += bytes;
        if sent < self.acks.outage_end {
            // Packets sent before an outage give no valid round-trip time.
            return;
        }
        // The estimator does not include this packet yet.
        let rtt = now.saturating_duration_since(sent).as_secs_f64();
        self.acks.recent_rtt = if self.acks.recent_rtt == 0.0 {
            rtt
        } else {
            self.acks.recent_rtt + (rtt - self.acks.recent_rtt) / 16.0
        };
        self.rounds.current.ack(bytes, rtt, app_limited);
        self.rounds.is_over |= sent >= self.rounds.current.began;
        if self.phase == Phase::Startup {
            if !app_limited && self.startup.rounds_without_growth == 0 {
                self.window += bytes as f64;
            }
            if self.startup.first && self.startup.rounds_without_growth == 0 {
                let limit = (MAX_INITIAL_PACKETS * self.path.mtu) as f64;
                self.window = self.window.max((INITIAL_RATE * rtt).min(limit));
            }
        }
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        _app_limited: bool,
        _largest: Option<u64>,
    ) {
        self.acks.in_flight = in_flight;
        self.rounds.current.end_acks(now);
        if self.rounds.is_over
            && now.saturating_duration_since(self.rounds.current.began) >= MIN_ROUND
        {
            self.rounds.is_over = false;
            self.end_round(now);
        } else if self.is_filling() {
            self.path
                .note_rate(now, self.window * STARTUP_PART / self.acks.recent_rtt);
            self.leave_startup(now);
        }
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        sent: Instant,
        _persistent: bool,
        lost_bytes: u64,
    ) {
        self.acks.in_flight = self.acks.in_flight.saturating_sub(lost_bytes);
        if sent >= self.acks.outage_end {
            self.rounds.current.lost += lost_bytes;
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.path.mtu = u64::from(new_mtu);
    }

    fn window(&self) -> u64 {
        if self.steering.closing.load(Relaxed) {
            // quinn's pacer is off above 4 GiB.
            return u64::MAX;
        }
        // The floor holds for any measurement and after the MTU has grown. With a window below one datagram, quinn
        // sends no data and, while data waits, no ACKs; with nothing in flight, no timer helps.
        let window = self.window.max(self.min_window()) as u64;
        if self.steering.probing.load(Relaxed) {
            return window.max(self.acks.in_flight + PROBE_PACKETS * self.path.mtu);
        }
        window
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.window();
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_PACKETS * self.path.mtu
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_never_falls_below_four_datagrams() {
        let mut haul = Haul::new(Instant::now(), 1_200);
        // Up measured this on a busy machine: 45 kB/s at 0.8 ms.
        haul.enter_startup(45_000.0, 36.0);
        assert!(haul.window() >= MIN_PACKETS * 1_200);
        haul.on_mtu_update(6_500);
        assert!(haul.window() >= MIN_PACKETS * 6_500);
        haul.steering.probe();
        assert!(haul.window() >= MIN_PACKETS * 6_500);
    }
}
