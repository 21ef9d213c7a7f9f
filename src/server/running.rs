//! Whether anything runs on a connection.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// How many sessions run on a connection, and since when none does.
pub(super) struct Running(watch::Sender<(usize, Instant)>);

impl Default for Running {
    fn default() -> Self {
        Self(watch::Sender::new((0, Instant::now())))
    }
}

impl Running {
    /// One more; returns how many others run.
    pub(super) fn begin(&self) -> usize {
        let mut others = 0;
        self.0.send_modify(|(running, _)| {
            others = *running;
            *running += 1;
        });
        others
    }

    pub(super) fn end(&self) {
        self.0
            .send_modify(|(running, since)| (*running, *since) = (*running - 1, Instant::now()));
    }

    /// Waits until no session has run for so long.
    pub(super) async fn idle_for(&self, time: Duration) {
        let mut state = self.0.subscribe();
        loop {
            let (running, since) = *state.borrow_and_update();
            tokio::select! {
                () = sleep_until(since + time), if running == 0 => return,
                // Cannot fail: the sending half is this.
                _ = state.changed() => {}
            }
        }
    }
}
