//! The sender's end: it offers content under a code and serves the receiver that knows the code. The introduction of a
//! receiver is in `introduction.rs`, its service in `send/serve.rs`.

mod begin;
mod running_server;
mod serve;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::debug;

use self::running_server::RunningServer;
use super::active_code::ActiveCode;
use super::code::ShortCode;
use super::introduction::{self, Answer, Asking, Proof};
use super::offer::{Content, Counting};
use super::pair::Paired;
use super::placement::{Placement, Rendezvous};
use super::rendezvous::RelayAt;
use super::ticket::Ticket;
use crate::auth::Guests;
use crate::auth::identity::KeyId;
use crate::auth::peers::Peer;
use crate::error::{Code, Error, Result};
use crate::net::address::canonical;
use crate::net::stream::varint_of;
use crate::protocol::Accept;
use crate::server::Introduction;
use crate::storage::pipe::Pipe;
use crate::storage::walk::WalkOptions;
use crate::transfer::events::{Event, Observer, Route};
use crate::transfer::session::OfferEvent;

/// Pause after a failed introduction. The first wrong guess burns the code, and more attempts only cost work.
const GUESS_INTERVAL: Duration = Duration::from_secs(1);

/// What to send, and how.
pub struct SendOptions {
    /// What to send.
    pub content: Content,
    /// The only machine that may receive it, which then needs no code. `None`: the receiver is the one that has the code.
    pub to: Option<Peer>,
    /// What is announced of files.
    pub walk: WalkOptions,
    /// This machine's name; the receiver's user sees it.
    pub from: String,
    /// Addresses to listen on; port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
    /// Lifetime of a code.
    pub expires: Duration,
    /// The relay at which receivers on other networks find this machine, if there is one.
    pub relay: Option<RelayAt>,
    /// Addresses of this machine, which the relay gives to receivers.
    pub own: Vec<IpAddr>,
}

/// Offers content under one code after the other. Nothing else can be read from it.
///
/// Dropping it ends it at once; a receiver keeps what it has.
pub struct Offering {
    active: ActiveCode,
    rendezvous: Rendezvous,
    server: RunningServer,
    counting: Counting,
    /// The keys that may read.
    guests: Arc<Guests>,
    introductions: mpsc::Receiver<Introduction>,
    asking: Asking,
    events: mpsc::Receiver<(KeyId, OfferEvent)>,
    observer: Observer,
    /// The content, if it can be read only once.
    pipe: Option<Arc<Pipe>>,
    /// Address of the last receiver that began to read.
    last_address: Option<SocketAddr>,
    /// How long a lost receiver may take to come back ([`Config::retry_for`](crate::config::Config::retry_for)).
    retry_for: Duration,
}

/// How a code was used, or that it expired.
#[derive(Debug)]
pub enum Met {
    /// A receiver that knew the code accepts the offer. A text has arrived then; files are asked for next: see
    /// [`Offering::serve`].
    Accepted {
        /// The receiver's address.
        from: SocketAddr,
    },
    /// A machine that knew the code is paired with this one.
    Paired(Paired),
    /// A receiver that knew the code declines the offer.
    Declined {
        /// The receiver's address.
        from: SocketAddr,
    },
    /// A receiver that knew the number used a wrong word. The code cannot be used any more.
    Burnt {
        /// The receiver's address.
        from: SocketAddr,
    },
    /// No receiver came in time.
    Expired,
}

/// The result of one introduction.
enum Introduced {
    Asked,
    Burnt(SocketAddr),
    Failed,
}

impl Offering {
    /// Why the relay gave no number for this code, if it gave none. Receivers on other networks cannot find the offer then.
    pub fn relay_failure(&self) -> Option<&Error> {
        self.rendezvous.placement.as_ref()?.as_ref().err()
    }

    /// Whether receivers can find the offer at a relay.
    pub fn has_relay(&self) -> bool {
        self.rendezvous.placement().is_some()
    }

    /// Address and route of the last receiver that began to read.
    pub fn route(&self) -> Option<(SocketAddr, Route)> {
        let from = self.last_address?;
        let by_relay = self
            .rendezvous
            .placement()
            .and_then(|placement| placement.route(from));
        Some((from, by_relay.unwrap_or(Route::Direct)))
    }

    /// The code; `None` when it was used or burnt or has expired, or when the offer is for a paired machine.
    pub fn code(&self) -> Option<&ShortCode> {
        self.active.code()
    }

    /// The number under which the offer can be found; `None` when it was used or burnt or has expired.
    pub fn number(&self) -> Option<u32> {
        self.active.number()
    }

    /// The code as a ticket, with the addresses of this machine that are known and that others may reach.
    pub fn ticket(&self) -> Option<Ticket> {
        let code = self.active.code()?.clone();
        let port = self.server.addresses.first()?.port();
        let client = self.rendezvous.client.as_ref();
        let relay = client.filter(|_| self.has_relay());
        Some(Ticket {
            code,
            key_id: self.active.key_id(),
            addresses: self.rendezvous.ticket_addresses(port),
            relay: relay.map(|client| client.relay.clone()),
        })
    }

    /// The addresses it listens on.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.server.addresses
    }

    /// Draws another code, unless the offer is for a paired machine. The old code becomes invalid, and its receiver may not
    /// connect any more.
    ///
    /// # Errors
    /// As [`ShortCode::draw`].
    pub async fn renew(&mut self) -> Result<()> {
        self.forget();
        // The receiver's user sees the size. Counting now leaves time until a receiver comes.
        self.counting.begin();
        self.rendezvous.renew(self.active.fixed_number()).await;
        // Events that still wait are about earlier guests.
        while self.events.try_recv().is_ok() {}
        let relay_number = self.rendezvous.placement().map(Placement::number);
        self.active.renew(relay_number)
    }

    /// Waits until a receiver uses or burns the code, or it expires. Cancelling turns away a receiver whose introduction is
    /// under way.
    ///
    /// # Errors
    /// [`Error::Stopping`] when the offering has ended.
    pub async fn meet(&mut self) -> Result<Met> {
        loop {
            let expires_at = self.active.expires_at();
            tokio::select! {
                introduction = self.introductions.recv() => {
                    match self.introduce(introduction.ok_or(Error::Stopping)?).await {
                        Introduced::Asked => {}
                        Introduced::Burnt(from) => return Ok(Met::Burnt { from }),
                        Introduced::Failed => sleep(GUESS_INTERVAL).await,
                    }
                }
                Some(answer) = self.asking.next() => {
                    let met = self.settle(answer);
                    if matches!(met, Some(Met::Declined { .. } | Met::Paired(_))) {
                        self.forget();
                    }
                    if let Some(met) = met {
                        return Ok(met);
                    }
                }
                () = sleep_until(expires_at.unwrap_or_else(Instant::now)), if expires_at.is_some() => {
                    self.forget();
                    return Ok(Met::Expired);
                }
            }
        }
    }

    /// Ends it: lets a receiver that has everything end its session, closes the connections, and waits until the close frames
    /// are sent.
    pub async fn close(mut self) {
        self.server.stop.cancel();
        // Receivers that still wait for their introduction are turned away.
        self.introductions.close();
        while self.introductions.try_recv().is_ok() {}
        // Fails only when the server's task panicked.
        let _ = self.server.task.await;
    }

    /// Ends it at once, in the middle of a transfer too, and tells the receiver that the sender was stopped.
    pub async fn stop(self) {
        // `Cancelled` and not `Stopping`: the receiver must not wait for a restart.
        self.server
            .port
            .endpoint
            .close(varint_of(Code::Cancelled), b"the sender was stopped");
        self.server.stop_now.cancel();
        self.close().await;
    }

    /// Makes the code invalid and removes the guest.
    fn forget(&mut self) {
        self.guests.clear();
        self.active.forget();
        self.asking.cancel();
    }

    /// Lets a receiver prove that it knows the code, and shows it the offer if it does.
    async fn introduce(&mut self, mut introduction: Introduction) -> Introduced {
        let address = canonical(introduction.connection.remote_address());
        match introduction::verify(&mut introduction, &mut self.active).await {
            Ok(Proof::Confirmed { key_id, secret }) => {
                (self.observer)(Event::Asked { address });
                let offer = self.counting.subscribe();
                let addresses = self.rendezvous.own_addresses();
                self.asking
                    .ask(introduction, key_id, secret, offer, addresses);
                Introduced::Asked
            }
            Ok(Proof::Wrong) => {
                introduction.writer.finish();
                Introduced::Burnt(address)
            }
            Ok(Proof::Refused) => {
                introduction.writer.finish();
                Introduced::Failed
            }
            Err(error) => {
                debug!(from = %address, %error, "an introduction failed");
                Introduced::Failed
            }
        }
    }

    /// Acts on a receiver's answer. Returns `None` when the receiver is not the guest any more, or went away without an answer.
    fn settle(&mut self, answer: Answer) -> Option<Met> {
        let Answer {
            introduction,
            key_id,
            secret,
            accept,
        } = answer;
        if !self.active.is_guest(key_id) {
            return None;
        }
        let from = canonical(introduction.connection.remote_address());
        let pairs = self.counting.pairs();
        let met = match accept {
            Ok(None) => Met::Declined { from },
            Ok(Some(Accept {
                pair: Some(number), ..
            })) if pairs => Met::Paired(Paired {
                key_id,
                secret,
                number,
            }),
            Ok(Some(Accept { addresses, .. })) if !pairs => {
                if let Some(placement) = self.rendezvous.placement() {
                    placement.expect_at(addresses.unwrap_or_default());
                }
                // Before the stream ends: the receiver connects again once it has ended.
                self.guests.admit(key_id);
                Met::Accepted { from }
            }
            accept => {
                debug!(%from, ok = accept.is_ok(), "the receiver left without an answer");
                (self.observer)(Event::Left { address: from });
                return None;
            }
        };
        introduction.writer.finish();
        Some(met)
    }
}
