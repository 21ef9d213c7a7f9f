//! Counts the running sessions of a connection.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// Counts the running sessions of a connection.
#[derive(Debug)]
pub(super) struct Running(watch::Sender<Count>);

#[derive(Debug, Clone, Copy)]
struct Count {
    running: usize,
    /// When the last session ended.
    idle_since: Instant,
}

impl Default for Running {
    fn default() -> Self {
        Self(watch::Sender::new(Count {
            running: 0,
            idle_since: Instant::now(),
        }))
    }
}

impl Running {
    /// Adds a session. Returns how many others run.
    pub(super) fn begin(&self) -> usize {
        let mut others = 0;
        self.0.send_modify(|count| {
            others = count.running;
            count.running += 1;
        });
        others
    }

    /// Removes a session.
    pub(super) fn end(&self) {
        self.0.send_modify(|count| {
            count.running -= 1;
            count.idle_since = Instant::now();
        });
    }

    /// Since when no session has run; `None` while one runs.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let count = *self.0.borrow();
        (count.running == 0).then_some(count.idle_since)
    }

    /// Waits until no session has run for `time`.
    pub(super) async fn idle_for(&self, time: Duration) {
        let mut count = self.0.subscribe();
        loop {
            let Count {
                running,
                idle_since,
            } = *count.borrow_and_update();
            tokio::select! {
                () = sleep_until(idle_since + time), if running == 0 => return,
                // Cannot fail, because `self` is the sending half.
                _ = count.changed() => {}
            }
        }
    }
}
