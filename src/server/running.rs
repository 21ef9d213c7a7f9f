//! Counts the running sessions of a connection.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// The number of running sessions of a connection, and the time of the last change to zero.
pub(super) struct Running(watch::Sender<(usize, Instant)>);

impl Default for Running {
    fn default() -> Self {
        Self(watch::Sender::new((0, Instant::now())))
    }
}

impl Running {
    /// Adds a session. Returns how many others run.
    pub(super) fn begin(&self) -> usize {
        let mut others = 0;
        self.0.send_modify(|(running, _)| {
            others = *running;
            *running += 1;
        });
        others
    }

    /// Removes a session.
    pub(super) fn end(&self) {
        self.0
            .send_modify(|(running, since)| (*running, *since) = (*running - 1, Instant::now()));
    }

    /// Waits until no session has run for `time`.
    pub(super) async fn idle_for(&self, time: Duration) {
        let mut state = self.0.subscribe();
        loop {
            let (running, since) = *state.borrow_and_update();
            tokio::select! {
                () = sleep_until(since + time), if running == 0 => return,
                // Cannot fail, because `self` is the sending half.
                _ = state.changed() => {}
            }
        }
    }
}
