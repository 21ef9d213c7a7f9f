//! The connection to one server. It is replaced after a loss and by one over a better route, and sessions go on over it.

use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use quinn::ConnectionError;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::link::{Dial, Dialed, Link};
use super::operation::Operation;
use super::retry::{Retry, is_temporary, loss_reason};
use crate::auth::identity::KeyId;
use crate::config::{Config, display_duration};
use crate::error::lock::lock;
use crate::error::{Code, Error, Reason, Result};
use crate::net::rate_limit::RateLimits;
use crate::net::stream::varint_of;
use crate::transfer::context::Context;
use crate::transfer::events::{Event, Observer, Route};
use crate::transfer::session::Outcome;

/// First wait before a direct route is tried while a relay is used; it doubles.
const DIRECT_RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Longest such wait.
const MAX_DIRECT_RETRY_INTERVAL: Duration = Duration::from_secs(60);
/// How often the connection is checked for arriving datagrams.
const ROUTE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Keeps a connection to one server.
pub(super) struct Connector {
    /// Connects again, to the same key as the first connection.
    dial: Dial,
    /// Whether several routes are possible, so that the one in use is reported.
    reports_route: bool,
    pub(super) key_id: KeyId,
    pub(super) config: Arc<Config>,
    limits: RateLimits,
    link: Mutex<Arc<Link>>,
    /// Sessions that lost the same connection wait for one new one.
    reconnecting: tokio::sync::Mutex<()>,
}

/// How far a session came on one connection.
struct Attempt {
    /// The server was ready.
    ready: bool,
    /// The connection was open when the session began.
    was_open: bool,
    /// No connection of this session was lost before.
    is_first: bool,
}

impl Connector {
    /// Makes a connector from an open connection and a way to connect again.
    ///
    /// # Errors
    /// As [`Link::over`].
    pub(super) fn new(
        first: Dialed,
        dial: Dial,
        reports_route: bool,
        config: Arc<Config>,
    ) -> Result<Self> {
        let link = Link::over(first, &config)?;
        Ok(Self {
            dial,
            reports_route,
            key_id: link.connection.key_id(),
            limits: RateLimits::new(config.limit),
            config,
            link: Mutex::new(Arc::new(link)),
            reconnecting: tokio::sync::Mutex::default(),
        })
    }

    /// The current connection.
    pub(super) fn link(&self) -> Arc<Link> {
        self.lock_link().clone()
    }

    fn lock_link(&self) -> MutexGuard<'_, Arc<Link>> {
        lock(&self.link)
    }

    /// The context of a session over this connection.
    pub(super) fn context(&self, link: &Link, observer: Observer) -> Context {
        Context {
            connection: link.connection.clone(),
            config: self.config.clone(),
            limits: self.limits.clone(),
            observer,
            // A client does not stop gracefully.
            stopping: CancellationToken::new(),
        }
    }

    pub(super) fn report_connected(&self, link: &Link, observer: &Observer) {
        observer(Event::Connected {
            address: link.address(),
            key_id: self.key_id.to_string(),
        });
    }

    pub(super) fn report_route(&self, link: &Link, observer: &Observer) {
        if self.reports_route {
            observer(Event::Routed {
                address: link.address(),
                route: link.route,
            });
        }
    }

    /// Runs an operation to its end, over as many connections as it needs. The first is `link`.
    pub(super) async fn run(
        &self,
        mut link: Arc<Link>,
        mut operation: Operation,
        observer: &Observer,
    ) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut retry: Option<Retry> = None;
        let mut stopped_mirroring = false;
        let mut moved = false;
        loop {
            let mut attempt = Attempt {
                ready: false,
                was_open: link.quic().close_reason().is_none(),
                is_first: retry.is_none(),
            };
            let was_moved = std::mem::take(&mut moved);
            let on_ready = || {
                attempt.ready = true;
                if !attempt.is_first && !was_moved {
                    observer(Event::Reconnected {
                        address: link.address(),
                    });
                    self.report_route(&link, observer);
                }
            };
            let can_move = operation.can_move();
            let ended = {
                let context = self.context(&link, observer.clone());
                let run = operation.run(&link, &context, on_ready, &mut outcome);
                tokio::pin!(run);
                tokio::select! {
                    ended = &mut run => ended,
                    () = self.move_to_better_route(&link, observer), if can_move => run.await,
                }
            };
            outcome.sent = operation.sent();
            outcome.bottleneck = outcome.time_breakdown.bottleneck();
            let Some(lost) = self.loss(ended, &outcome) else {
                if stopped_mirroring {
                    let text = "the connection was lost meanwhile; run the same command again";
                    outcome.summary.unremoved = Some(Reason::new(Code::Cancelled, text).into());
                }
                return Ok(outcome);
            };
            let current = self.link();
            if can_move && !Arc::ptr_eq(&current, &link) && !matches!(lost, Error::Protocol(_)) {
                link = current;
                moved = true;
                stopped_mirroring |= operation.stop_mirroring();
                continue;
            }
            if self.is_final(&lost, &link, &attempt) {
                return Err(lost);
            }
            if let Some(obstacle) = operation.resume_obstacle() {
                let text = format!("{}; {obstacle}", loss_reason(&lost));
                return Err(Error::Lost(text.into()));
            }
            if attempt.ready || attempt.is_first {
                observer(Event::Lost {
                    reason: loss_reason(&lost),
                    retry_for: self.config.retry_for,
                });
            }
            let progress = operation.progress();
            let retry = retry.get_or_insert_with(|| Retry::new(self.config.retry_for, progress));
            retry.on_loss(progress);
            stopped_mirroring |= operation.stop_mirroring();
            link = self.reconnect(&link, &lost, retry, observer).await?;
        }
    }

    /// The error for which another connection is needed; `None` when the session is complete. A session that a stopping server
    /// interrupted is not complete if something is left to send.
    fn loss(&self, ended: Result<()>, outcome: &Outcome) -> Option<Error> {
        let interrupted = || outcome.sent.interrupted.clone().map(Error::from);
        match ended {
            Err(lost) => Some(lost),
            Ok(()) => interrupted()
                .filter(|stopping| is_temporary(stopping) && !self.config.retry_for.is_zero()),
        }
    }

    /// Whether an error ends the session, so that no other connection is tried. The server's first answer to the request is
    /// final. A connection that is lost before is no answer. Neither is a connection that a stopping server closes during the
    /// session: the close discards answers that were received and not read yet.
    fn is_final(&self, lost: &Error, link: &Link, attempt: &Attempt) -> bool {
        let closed = link.quic().close_reason();
        let closed_locally = matches!(closed, Some(ConnectionError::LocallyClosed));
        let unanswered = match lost {
            Error::Lost(_) => true,
            Error::Stopping => attempt.was_open && closed.is_some(),
            _ => false,
        };
        let answered = !attempt.ready && attempt.is_first && !unanswered;
        !is_temporary(lost) || closed_locally || self.config.retry_for.is_zero() || answered
    }

    /// Looks for a better route, and returns once the client has moved there. A route is better if it needs no relay. If nothing
    /// arrives over the current one, as after a NAT has changed an address, any other is better. The old connection is closed.
    async fn move_to_better_route(&self, link: &Arc<Link>, observer: &Observer) {
        let Some(direct) = &self.dial.direct else {
            return pending().await;
        };
        let arrived = || link.quic().stats().udp_rx.datagrams;
        let mut wait = DIRECT_RETRY_INTERVAL;
        let mut due = Instant::now() + DIRECT_RETRY_INTERVAL;
        let mut before = arrived();
        let mut since = Instant::now();
        loop {
            sleep(ROUTE_CHECK_INTERVAL).await;
            let now = arrived();
            if now != before {
                before = now;
                since = Instant::now();
            }
            let silent = since.elapsed() > self.config.keep_alive + ROUTE_CHECK_INTERVAL;
            let dialed = if silent {
                (self.dial.any)().await
            } else if link.route == Route::Relayed && Instant::now() >= due {
                let dialed = direct().await;
                wait = (wait * 2).min(MAX_DIRECT_RETRY_INTERVAL);
                due = Instant::now() + wait;
                dialed
            } else {
                continue;
            };
            // If something has arrived meanwhile, the current route works again.
            if silent && arrived() != before {
                continue;
            }
            let Ok(better) = dialed.and_then(|dialed| Link::over(dialed, &self.config)) else {
                continue;
            };
            self.report_route(&better, observer);
            *self.lock_link() = Arc::new(better);
            link.quic()
                .close(varint_of(Code::Cancelled), b"there is a better route");
            return;
        }
    }

    /// Waits and tries until there is another connection.
    ///
    /// # Errors
    /// [`Error::Lost`] when the time is up; any error that another attempt cannot change.
    async fn reconnect(
        &self,
        old: &Arc<Link>,
        lost: &Error,
        retry: &mut Retry,
        observer: &Observer,
    ) -> Result<Arc<Link>> {
        let first = loss_reason(lost);
        let mut last = first.clone();
        while let Some((attempt, wait)) = retry.next()? {
            observer(Event::Reconnecting { attempt, wait });
            sleep(wait).await;
            match self.replace_link(old).await {
                Err(error) if is_temporary(&error) => last = loss_reason(&error),
                result => return result,
            }
        }
        let limit = display_duration(self.config.retry_for);
        let last = if last == first {
            String::new()
        } else {
            format!(" (last attempt: {last})")
        };
        let text = format!("{first}; cannot reconnect within {limit}{last}");
        Err(Error::Lost(text.into()))
    }

    /// Replaces a lost connection, once for all sessions that lost it.
    async fn replace_link(&self, old: &Arc<Link>) -> Result<Arc<Link>> {
        let _one = self.reconnecting.lock().await;
        let current = self.link();
        if !Arc::ptr_eq(&current, old) && current.quic().close_reason().is_none() {
            return Ok(current);
        }
        let link = Arc::new(Link::over((self.dial.any)().await?, &self.config)?);
        *self.lock_link() = link.clone();
        Ok(link)
    }
}
