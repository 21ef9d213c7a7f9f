//! What quinn tells the controller of a connection, and what it asks.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

use super::haul::{Haul, INITIAL_PACKETS, Phase};
use super::startup::Startup;
use super::steering::Steering;

/// Shortest round: on loopback a flight is too short to measure.
const MIN_ROUND: Duration = Duration::from_millis(5);
/// Packets that a probe sends beyond the window; quinn needs room for two to send one.
const PROBE_PACKETS: u64 = 4;
/// Time without any ACK after which the path is measured afresh; losses in that time say nothing about it.
const OUTAGE_TIMEOUT: Duration = Duration::from_secs(1);

/// Builds a controller for each path.
pub(super) struct HaulFactory;

impl ControllerFactory for HaulFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Haul::new(now, current_mtu))
    }
}

impl Steering {
    /// Returns the handle of a connection's current path; `None` if another controller drives it.
    pub(crate) fn of(connection: &quinn::Connection) -> Option<Arc<Self>> {
        let controller = connection
            .congestion_state()
            .into_any()
            .downcast::<Haul>()
            .ok()?;
        Some(controller.steering)
    }
}

impl Controller for Haul {
    fn on_sent(&mut self, _now: Instant, bytes: u64, _last_packet_number: u64) {
        self.acks.in_flight += bytes;
        self.steering.end_probe();
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
            self.window = self
                .startup
                .grow(self.window, &self.path, bytes, rtt, app_limited);
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
        } else if self.phase == Phase::Startup
            && self.startup.is_filling(&self.path, self.acks.recent_rtt)
        {
            let rate = Startup::rate_of(self.window, self.acks.recent_rtt);
            self.path.note_rate(now, rate);
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
        if self.steering.is_closing() {
            // quinn's pacer is off above 4 GiB.
            return u64::MAX;
        }
        // The floor holds for any measurement and after the MTU has grown. With a window below one datagram, quinn
        // sends no data and, while data waits, no ACKs; with nothing in flight, no timer helps.
        let window = self.window.max(self.min_window()) as u64;
        if self.steering.is_probing() {
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
    use crate::congestion::haul::MIN_PACKETS;

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
