//! Serving the receiver that has accepted, also over a connection that replaces a lost one.

use tokio::time::{Instant, sleep_until};

use super::{Met, Offering};
use crate::error::text::PeerText;
use crate::error::{Code, Error, Reason, Result};
use crate::net::address::canonical;
use crate::transfer::events::Event;
use crate::transfer::session::{OfferEvent, Outcome};

/// The state of [`Offering::serve`].
struct Serving {
    /// Sessions of the guest that run.
    sessions: u32,
    /// When the last session ended, or the receiver accepted.
    idle_since: Instant,
    /// Why the last session ended; `None` once another has begun.
    lost: Option<PeerText>,
}

impl Offering {
    /// Serves the receiver that has accepted, until it reports that it has everything, or what failed. After a lost connection the
    /// receiver may come back within [`Config::retry_for`](crate::config::Config::retry_for), also as a new process with the
    /// same code.
    ///
    /// # Errors
    /// [`Error::Lost`] when the receiver does not come or come back, or when a pipe was read already; [`Error::Refused`] when
    /// it comes back and declines; [`Error::Stopping`] when the offering has ended.
    pub async fn serve(&mut self) -> Result<Outcome> {
        let mut serving = Serving {
            sessions: 0,
            idle_since: Instant::now(),
            lost: None,
        };
        loop {
            tokio::select! {
                event = self.events.recv() => {
                    let (key_id, event) = event.ok_or(Error::Stopping)?;
                    // An earlier guest may still have a connection.
                    if self.active.is_guest(key_id)
                        && let Some(outcome) = self.on_event(event, &mut serving)? {
                        return Ok(outcome);
                    }
                }
                introduction = self.introductions.recv() => {
                    self.introduce(introduction.ok_or(Error::Stopping)?).await;
                }
                Some(answer) = self.asking.next() => match self.settle(answer) {
                    Some(Met::Accepted { .. }) => serving.idle_since = Instant::now(),
                    Some(Met::Declined { .. }) if serving.sessions == 0 => {
                        let text = "the receiver came back and declined";
                        return Err(Error::Refused(Reason::new(Code::Cancelled, text)));
                    }
                    _ => {}
                },
                () = sleep_until(serving.idle_since + self.retry_for), if serving.sessions == 0 => {
                    let reason = serving.lost.unwrap_or_else(|| "the receiver did not connect".into());
                    return Err(Error::Lost(reason));
                }
            }
        }
    }

    /// Handles what the server reports about the guest. Returns the outcome once the receiver has everything.
    fn on_event(&mut self, event: OfferEvent, serving: &mut Serving) -> Result<Option<Outcome>> {
        match event {
            OfferEvent::Begun { from } => {
                let address = canonical(from);
                serving.sessions += 1;
                self.last_address = Some(address);
                if serving.sessions == 1 && serving.lost.take().is_some() {
                    (self.observer)(Event::Reconnected { address });
                }
            }
            OfferEvent::Ended(Ok(outcome)) => return Ok(Some(*outcome)),
            OfferEvent::Ended(Err(error)) => {
                serving.sessions = serving.sessions.saturating_sub(1);
                serving.idle_since = Instant::now();
                let reason = match error {
                    Error::Lost(reason) => reason,
                    error => error.to_string().into(),
                };
                if self.pipe.as_ref().is_some_and(|pipe| pipe.is_spent()) {
                    let text =
                        format!("{reason}; the input was read already and cannot be read again");
                    return Err(Error::Lost(text.into()));
                }
                if serving.sessions == 0 {
                    (self.observer)(Event::Lost {
                        reason: reason.clone(),
                        retry_for: self.retry_for,
                    });
                }
                serving.lost = Some(reason);
            }
        }
        Ok(None)
    }
}
