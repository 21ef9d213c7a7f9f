//! haul's own controller: as fast as the path delivers, with little in its queues, at any random loss.
//!
//! It stands on the model of BBRv3 (draft-ietf-ccwg-bbr): a delivery rate, a round-trip time, and phases that probe for
//! more (Up), drain what probing has queued (Down) and keep to what is known (Cruise), after an exponential Startup. Where
//! it departs, and why:
//!
//! - **The window alone steers.** quinn paces at 1.25 x window / RTT and offers nothing else, so what BBR does with a
//!   pacing rate is done here with what is in flight: the path's bandwidth-delay product and a small margin in the queue,
//!   clocked by acknowledgements.
//! - **Loss is no signal by itself.** BBRv3 takes more than 2 % loss in a round for congestion, which at 5 % random loss
//!   leaves 8 of 100 Mbit/s. Here the loss of rounds without a queue counts as random and is made up for; only loss beyond
//!   that means a full buffer, and makes margin and probes smaller. Where more in flight gave neither rate nor queue, what
//!   was believed to be random is doubted.
//! - **The round-trip time is a mean** over a round, not the least sample, or jitter would leave the path half empty.
//! - **A short memory for rates** (4 rounds) and a concave margin, so that flows of haul come to equal shares with a queue
//!   of a few per cent, as in FAST TCP.
//! - **Others are told from oneself by draining**, instead of a ProbeRTT: when Down leaves the queue as long as it was,
//!   somebody else keeps it. Then what is in flight is held and grows by little, and shrinks at overflows, as with TCP;
//!   whoever yields to Cubic gets nothing. A deeper Down tells a queue of others from a path that has become longer.
//! - **A rate that falls while the queue grows** is believed at once.
//!
//! One round is one flight; all times below are counted in rounds where no unit is named.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerMetrics};
use quinn_proto::RttEstimator;

use super::Steering;
use super::model::{Path, Round};
use super::others::Others;

/// Packets that begin a connection. RFC 9002 has 10; Google's QUIC began with 32, which quinn paces over a round trip.
const INITIAL_PACKETS: u64 = 32;
/// Bytes a second to begin with on a long path, 5 Mbit/s. With a satellite's 600 ms that saves three round trips of
/// Startup; at 100 ms it is 53 packets.
const INITIAL_RATE: f64 = 640_000.0;
/// At most so many packets begin a connection, however long the path.
const MAX_INITIAL_PACKETS: u64 = 512;
/// Packets in flight, at least (draft-ietf-ccwg-bbr: BBRMinPipeCwnd).
const MIN_PACKETS: u64 = 4;
/// Rounds are no shorter than this: on loopback a flight says little.
const MIN_ROUND: Duration = Duration::from_millis(5);
/// Startup ends when a round's rate has not grown by this (draft-ietf-ccwg-bbr), twice in a row.
const STARTUP_GROWTH: f64 = 1.25;
const STARTUP_ROUNDS: u32 = 2;
/// Startup ends at a queue of an eighth of the round-trip time, and at least 4 ms (RFC 9406, section 4.2; its 16 ms at most
/// are what one window of bursts makes on a satellite's path).
const STARTUP_QUEUE: f64 = 0.004;
/// The part of the window that Startup leaves at: between the half that was in flight a round trip ago and made a queue,
/// and the whole that has not shown its own yet.
const STARTUP_PART: f64 = 0.6;
/// Up puts a quarter more in flight, as BBR's does; less where it only overflows a buffer, down to this.
const UP_GAIN: f64 = 1.25;
const MIN_UP_GAIN: f64 = 1.06;
/// Down leaves the link idle for 7 % of a round, at most.
const DOWN_GAIN: f64 = 0.93;
/// A deep Down halves what is in flight, as BBR's ProbeRTT, and is made this often, at most.
const DEEP_GAIN: f64 = 0.5;
const DEEP_EVERY: Duration = Duration::from_secs(3);
/// What Down must take off what was in flight for an unchanged round-trip time to prove anything.
const DEEP: f64 = 0.6;
/// Rounds of Cruise, and up to three more, so that flows on the same path do not probe in step.
const CRUISE_ROUNDS: u32 = 7;
/// Rounds after which Cruise may end early, when its margin is not in the queue: there is room.
const CRUISE_LEAST: u32 = 3;
/// Packets that a probe lets out beyond the window; quinn asks for room for two to send one.
const PROBE_PACKETS: u64 = 4;
/// After so long without any acknowledgement the path is learned anew, and what was lost meanwhile tells nothing of it.
const OUTAGE: Duration = Duration::from_secs(1);

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
    round: Round,
    /// Something sent in this round was acknowledged.
    round_over: bool,
    /// The phase in which what is acknowledged in this round was sent.
    sent_in: Phase,
    delivered: u64,
    /// Moving mean of the round-trip time over some 16 packets, for Startup, which cannot wait for the round's.
    recent_rtt: f64,
    startup: Startup,
    up: Up,
    down: Down,
    others: Others,
    last_ack: Instant,
    /// Losses of what was sent up to here were an outage's.
    forgiven: Instant,
    /// Bytes in flight, as far as this is told of them.
    in_flight: u64,
    steering: Arc<Steering>,
}

#[derive(Debug, Clone, Default)]
struct Startup {
    /// Nothing is known of the path's loss yet.
    first: bool,
    /// The loss of the round before.
    loss: f64,
    rate: f64,
    rounds_without_growth: u32,
}

#[derive(Debug, Clone)]
struct Up {
    gain: f64,
    /// The rate before it.
    from: f64,
}

#[derive(Debug, Clone, Default)]
struct Down {
    deep: bool,
    /// The window and the mean round-trip time before it, and its own window.
    window_before: f64,
    mean_before: f64,
    window: f64,
    /// The rate that fell and made it necessary.
    fallen_to: Option<f64>,
    last_deep: Option<Instant>,
}

impl Haul {
    pub(super) fn new(now: Instant, mtu: u16) -> Self {
        Self {
            path: Path::new(mtu),
            window: (INITIAL_PACKETS * u64::from(mtu)) as f64,
            phase: Phase::Startup,
            phase_rounds: 0,
            round: Round::new(now),
            round_over: false,
            sent_in: Phase::Startup,
            delivered: 0,
            recent_rtt: 0.0,
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
            last_ack: now,
            forgiven: now,
            in_flight: 0,
            steering: Arc::default(),
        }
    }

    pub(super) fn steering(&self) -> Arc<Steering> {
        self.steering.clone()
    }

    fn set_window(&mut self) {
        let network = (self.path.bdp() + self.path.margin()).max(self.path.floor());
        let hold = self.others.hold();
        let cruise = hold.unwrap_or_else(|| self.path.in_flight(network));
        let window = match self.phase {
            Phase::Startup => return,
            Phase::Down if self.down.deep => DEEP_GAIN * self.down.window_before,
            // Nothing is made up for here: loss that goes away with it was no random loss.
            Phase::Down => DOWN_GAIN * self.path.least_bdp(),
            Phase::Cruise => cruise,
            Phase::Up if hold.is_some() => cruise * self.up.gain,
            Phase::Up => cruise + (self.up.gain - 1.0) * self.path.in_flight(self.path.bdp()),
        };
        self.window = window.max(self.least_window());
    }

    fn least_window(&self) -> f64 {
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
        self.down.fallen_to = None;
        self.round = Round::new(now);
        self.round_over = false;
        self.sent_in = Phase::Startup;
        self.enter(Phase::Cruise);
    }

    fn end_round(&mut self, now: Instant) {
        let round = std::mem::replace(&mut self.round, Round::new(now));
        let sent_in = std::mem::replace(&mut self.sent_in, self.phase);
        let Some((rate, mean)) = round.sample(sent_in == Phase::Up) else {
            return;
        };
        let alone = self.others.hold().is_none();
        let unhurried =
            alone && (sent_in == Phase::Down || (sent_in == Phase::Startup && self.startup.first));
        let before = std::mem::replace(&mut self.startup.loss, round.loss());
        let known = if sent_in == Phase::Startup {
            before
        } else {
            1.0
        };
        self.path.learn(
            now,
            &round,
            (rate, mean),
            !alone,
            unhurried.then_some(known),
        );
        let excess = self.path.is_excess(&round);
        self.phase_rounds += 1;
        tracing::trace!(
            phase = ?self.phase, ?sent_in, rate, mean, base = self.path.base(), least = self.path.least(), loss = round.loss(),
            excess, window = self.window, others = ?self.others, app_limited = round.app_limited, "round"
        );
        if round.app_limited {
            // It was not the window that bounded this round, so it tells nothing of one.
            self.set_window();
            return;
        }
        let lost = excess.then(|| self.path.excess_loss(&round));
        let steady = matches!(sent_in, Phase::Cruise | Phase::Down);
        let windows = (self.window, self.least_window());
        self.others
            .note_round(now, &self.path, (lost, steady), windows);
        let found = match sent_in {
            Phase::Up => self.judge_up(rate, mean, excess),
            Phase::Down => self.judge_down(now, rate, mean),
            Phase::Cruise => {
                self.down.mean_before = mean;
                if excess {
                    self.path.margin_part = (self.path.margin_part / 2.0).max(0.25);
                }
                false
            }
            Phase::Startup => false,
        };
        if !found {
            self.next_phase(now, sent_in, (rate, mean), excess);
            self.set_window();
        }
    }

    /// What more in flight has brought. True when it was rate, and there may be yet more.
    fn judge_up(&mut self, rate: f64, mean: f64, excess: bool) -> bool {
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
        let base = if self.others.hold().is_some() {
            self.path.least()
        } else {
            self.path.base()
        };
        let found = self.phase == Phase::Down
            && rate > self.up.from * (1.0 + gain / 2.0)
            && mean - base < base * 0.2 + 2.0 * self.path.noise();
        if found {
            self.others.leave();
            self.enter_startup(rate, self.path.in_flight((1.0 + gain) * self.path.bdp()));
        }
        found
    }

    /// What less in flight has left of the queue. True when another phase has begun to find out more.
    fn judge_down(&mut self, now: Instant, rate: f64, mean: f64) -> bool {
        self.path.margin_part = (self.path.margin_part * 1.2).min(1.0);
        let least = self.path.least();
        let queue = mean - least;
        let same = (mean - self.down.mean_before).abs() < mean * 0.01 + self.path.noise() / 3.0;
        if same && queue > least * 0.15 + self.path.noise() {
            if self.down.window <= DEEP * self.down.window_before && !self.others.overflowed() {
                // Much less in flight, and not a bit less delay: there is no queue, the path has become longer.
                self.path.replace_base(now, mean);
                self.others.leave();
                self.enter_startup(rate, self.down.window_before);
                return true;
            }
            if self.down.last_deep.is_none_or(|at| now - at > DEEP_EVERY) {
                self.down.last_deep = Some(now);
                self.down.deep = true;
                self.enter(Phase::Down);
                return true;
            }
        }
        self.others
            .note_down(&self.path, queue, rate, self.down.window_before);
        if self.others.hold().is_none() {
            self.path.set_base(least);
        } else {
            self.path.set_base(mean);
            if let Some(fallen_to) = self.down.fallen_to {
                self.path.replace_rate(now, fallen_to.max(rate));
            }
        }
        false
    }

    fn next_phase(&mut self, now: Instant, sent_in: Phase, (rate, mean): (f64, f64), excess: bool) {
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
                let without = startup.rounds_without_growth;
                let full = without >= STARTUP_ROUNDS || (excess && without > 0);
                if full || queue > self.path.base() / 4.0 + 2.0 * self.path.noise() {
                    self.leave_startup(now);
                }
            }
            Phase::Up => {
                self.down.fallen_to = None;
                self.enter(Phase::Down);
            }
            Phase::Down => self.enter(Phase::Cruise),
            Phase::Cruise if sent_in == Phase::Cruise => {
                let margin = self.path.margin_delay();
                let long = queue > self.path.base() / 4.0 + 2.0 * margin + 2.0 * self.path.noise();
                if long && rate < self.path.rate() * 0.85 && !self.path.is_local() {
                    self.down.fallen_to = Some(rate);
                    self.path.replace_rate(now, rate);
                    self.enter(Phase::Down);
                } else if self.phase_rounds >= self.cruise_rounds()
                    || (self.phase_rounds >= CRUISE_LEAST && queue < margin / 4.0)
                {
                    self.up.from = self.path.rate();
                    self.enter(Phase::Up);
                }
            }
            Phase::Cruise => {}
        }
    }

    fn cruise_rounds(&self) -> u32 {
        let more = (self.delivered / self.path.mtu % 4) as u32;
        CRUISE_ROUNDS * if self.others.hold().is_some() { 2 } else { 1 } + more
    }

    /// Whether Startup has begun to fill a queue.
    fn is_filling(&self) -> bool {
        let queue = (self.path.base() / 8.0).max(STARTUP_QUEUE);
        self.phase == Phase::Startup
            && self.startup.rate > 0.0
            && self.path.base().is_finite()
            && self.recent_rtt > self.path.base() + queue
    }

    fn after_outage(&mut self, now: Instant) {
        self.forgiven = now;
        self.recent_rtt = 0.0;
        self.round = Round::new(now);
        self.round_over = false;
        self.sent_in = Phase::Startup;
        self.path.forget_rates();
        self.others.leave();
        let window = (self.window / 4.0).max((INITIAL_PACKETS * self.path.mtu) as f64);
        self.enter_startup(0.0, window);
    }
}

impl Controller for Haul {
    fn on_sent(&mut self, _now: Instant, bytes: u64, _last_packet_number: u64) {
        self.in_flight += bytes;
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
        if now.saturating_duration_since(self.last_ack)
            > OUTAGE.max(Duration::from_secs_f64(4.0 * self.recent_rtt))
        {
            self.after_outage(now);
        }
        self.last_ack = now;
        self.delivered += bytes;
        if sent < self.forgiven {
            // What was under way in the dark tells of no round-trip time.
            return;
        }
        // The estimator does not know of this packet yet.
        let rtt = now.saturating_duration_since(sent).as_secs_f64();
        self.recent_rtt = if self.recent_rtt == 0.0 {
            rtt
        } else {
            self.recent_rtt + (rtt - self.recent_rtt) / 16.0
        };
        self.round.ack(bytes, rtt, app_limited);
        self.round_over |= sent >= self.round.began;
        if self.phase == Phase::Startup {
            if !app_limited && self.startup.rounds_without_growth == 0 {
                self.window += bytes as f64;
            }
            if self.startup.first && self.startup.rounds_without_growth == 0 {
                let most = (MAX_INITIAL_PACKETS * self.path.mtu) as f64;
                self.window = self.window.max((INITIAL_RATE * rtt).min(most));
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
        self.in_flight = in_flight;
        self.round.end_acks(now);
        if self.round_over && now.saturating_duration_since(self.round.began) >= MIN_ROUND {
            self.round_over = false;
            self.end_round(now);
        } else if self.is_filling() {
            self.path
                .note_rate(now, self.window * STARTUP_PART / self.recent_rtt);
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
        self.in_flight = self.in_flight.saturating_sub(lost_bytes);
        if sent >= self.forgiven {
            self.round.lost += lost_bytes;
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.path.mtu = u64::from(new_mtu);
    }

    fn window(&self) -> u64 {
        if self.steering.closing.load(Relaxed) {
            // quinn's pacer stands aside above 4 GiB.
            return u64::MAX;
        }
        // Whatever was found, and however datagrams have grown since: through a window that is smaller than one, quinn sends
        // nothing more, nor any ACK while there is something to send, and with nothing in flight no timer makes up for it.
        let window = self.window.max(self.least_window()) as u64;
        if self.steering.probing.load(Relaxed) {
            return window.max(self.in_flight + PROBE_PACKETS * self.path.mtu);
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
    fn a_window_never_falls_below_some_datagrams_however_little_the_path_seems_to_hold_or_large_they_become()
     {
        let mut haul = Haul::new(Instant::now(), 1_200);
        // What Up found on a busy machine: 45 kB/s at 0.8 ms.
        haul.enter_startup(45_000.0, 36.0);
        assert!(haul.window() >= MIN_PACKETS * 1_200);
        haul.on_mtu_update(6_500);
        assert!(haul.window() >= MIN_PACKETS * 6_500);
        haul.steering.probe();
        assert!(haul.window() >= MIN_PACKETS * 6_500);
    }
}
