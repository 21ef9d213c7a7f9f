//! The sender's end: it offers files under a code, and waits for whoever knows it.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info};

use super::code::{Credential, ShortCode};
use super::offer::{Content, Counting};
use super::pair::{self, Paired};
use super::pake::{Exchange, Parties, Role};
use super::rendezvous::{Placement, RelayAt, WantedFile};
use super::ticket::{self, Ticket};
use crate::auth::identity::{Identity, KeyId};
use crate::auth::peers::Peer;
use crate::auth::{Admission, Guests};
use crate::config::Config;
use crate::error::{Code, Error, Reason, Result};
use crate::net::endpoint::{self, Port};
use crate::net::stream::{StreamError, varint_of};
use crate::protocol::{self, Accept, Confirm, Hello, Introduce, Message, Offer, Refused, Working};
use crate::server::{Introduction, Server, ServerOptions};
use crate::storage::MemoryStore;
use crate::storage::pipe::Pipe;
use crate::storage::walk::WalkOptions;
use crate::transfer::events::{Event, Observer, Route};
use crate::transfer::session::{self, OfferEvent, OfferedContent, Outcome, hello};

/// Connections at the same time: one receiver, and those who are turned away.
const MAX_CONNECTIONS: usize = 16;
/// Those who wait to show that they know the code.
const MAX_WAITING: usize = 4;
/// Time for each answer of somebody who shows the code, and for what it is told to be taken.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for the first message of somebody who has just opened a stream: it comes with that.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long whoever failed holds up the next: guesses are burnt by the first wrong one, and the rest only makes work.
const GUESS_INTERVAL: Duration = Duration::from_secs(1);
/// How often the receiver is told that the files are still being counted.
const WORKING_INTERVAL: Duration = Duration::from_secs(5);

/// What to send, and how.
pub struct SendOptions {
    /// What to send.
    pub content: Content,
    /// For this machine alone, which then needs no code; for whoever has the code otherwise.
    pub to: Option<Peer>,
    /// What is announced of files.
    pub walk: WalkOptions,
    /// What this machine is called; the receiver's user sees it.
    pub from: String,
    /// Addresses to listen on; port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
    /// How long a code lasts.
    pub expires: Duration,
    /// Where receivers of other networks find it, if anywhere.
    pub relay: Option<RelayAt>,
    /// Addresses of this machine, for receivers that the relay sends.
    pub own: Vec<IpAddr>,
}

/// Offers something under a code, one after the other. Nothing else can be had from it.
///
/// Dropping it ends it at once; a receiver keeps what it has.
pub struct Offering {
    rendezvous: Rendezvous,
    /// The number at the relay, or why there is none.
    placement: Option<Result<Placement>>,
    /// The code, and what it comes to, until somebody has used or burnt it.
    code: Option<ShortCode>,
    credential: Option<Credential>,
    /// Who used the last one, and which that was.
    guest: Option<(KeyId, Credential)>,
    to: Option<Peer>,
    /// Where it has asked from.
    from: Option<SocketAddr>,
    expires: Duration,
    until: Instant,
    identity: Identity,
    counting: Counting,
    offer: watch::Receiver<Option<Offer>>,
    guests: Arc<Guests>,
    introductions: mpsc::Receiver<Introduction>,
    /// Whoever is asked now, and what those say who were.
    asking: Option<AbortOnDropHandle<()>>,
    answer: mpsc::Sender<Answered>,
    answers: mpsc::Receiver<Answered>,
    observer: Observer,
    /// What is sent, if it can be had once.
    pipe: Option<Arc<Pipe>>,
    told: mpsc::Receiver<(KeyId, OfferEvent)>,
    addresses: Vec<SocketAddr>,
    patience: Duration,
    stop: CancellationToken,
    now: CancellationToken,
    running: Option<JoinHandle<()>>,
}

/// Where numbers come from that receivers of other networks find.
struct Rendezvous {
    port: Port,
    relay: Option<RelayAt>,
    own: Vec<IpAddr>,
    config: Config,
}

impl Rendezvous {
    /// A number at the relay, if there is one.
    async fn place(&self, wanted: Option<WantedFile>) -> Option<Result<Placement>> {
        let relay = self.relay.clone()?;
        Some(
            Placement::take(
                self.port.clone(),
                relay,
                self.own.clone(),
                self.config.clone(),
                wanted,
            )
            .await,
        )
    }
}

/// Whom the code has brought.
#[derive(Debug)]
pub enum Met {
    /// Somebody who knew the code and accepts. A text has arrived then; files are asked for next: see [`Offering::serve`].
    Accepted {
        /// Where it is.
        from: SocketAddr,
    },
    /// Somebody who knew the code, and knows this machine from here on.
    Paired(Paired),
    /// Somebody who knew the code and does not want it.
    Declined {
        /// Where it is.
        from: SocketAddr,
    },
    /// Somebody who knew the number and not the words. Nobody can use the code any more.
    Burnt {
        /// Where it is.
        from: SocketAddr,
    },
    /// Nobody came in time.
    Expired,
}

impl Offering {
    /// Begins to listen. What is sent is only counted: nothing is read. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Usage`] for nothing, too much or two of one name; [`Error::Refused`] for a source that is not there;
    /// [`Error::Io`] when an address cannot be had.
    pub async fn begin(
        options: SendOptions,
        identity: Identity,
        config: Config,
        observer: Observer,
    ) -> Result<Self> {
        let SendOptions {
            content,
            to,
            walk,
            from,
            listen,
            expires,
            relay,
            own,
        } = options;
        let follow = walk.follow;
        let server = pair::number_of_server(&identity);
        let prepared =
            tokio::task::spawn_blocking(move || content.prepare(from, follow, server)).await;
        let (begun, content) = prepared.map_err(|_| Error::Refused(Code::Internal.into()))??;
        let guests = Arc::<Guests>::default();
        let patience = config.retry_for;
        let admission = Admission {
            guests: Some(guests.clone()),
            ..Admission::default()
        };
        let config = Config {
            max_connections: MAX_CONNECTIONS,
            ..config
        };
        let asking = config.clone();
        let store = Arc::new(MemoryStore::default());
        let watching = observer.clone();
        let options = ServerOptions {
            listen,
            identity: identity.clone(),
            admission,
            store,
            config,
            observer,
        };
        let server = Server::bind(options)?;
        let (introduce, introductions) = mpsc::channel(MAX_WAITING);
        let (tell, told) = mpsc::channel(MAX_WAITING);
        let (answer, answers) = mpsc::channel(MAX_WAITING);
        let pipe = if let session::OfferedSource::Pipe(_, pipe) = &content {
            Some(pipe.clone())
        } else {
            None
        };
        let (counted, offer) = watch::channel(None);
        let trees = if let session::OfferedSource::Trees(trees) = &content {
            trees.clone()
        } else {
            Vec::new()
        };
        let counting = Counting {
            begun,
            trees,
            walk: walk.clone(),
            counted,
        };
        let server = server.offering(
            OfferedContent {
                content,
                walk,
                guests: guests.clone(),
                told: tell,
            },
            introduce,
        );
        let rendezvous = Rendezvous {
            port: server.ports()[0].clone(),
            relay,
            own,
            config: asking,
        };
        let addresses = server.local_addresses();
        let stop = CancellationToken::new();
        let now = CancellationToken::new();
        let running = tokio::spawn(server.run(
            stop.clone().cancelled_owned(),
            now.clone().cancelled_owned(),
        ));
        let mut offering = Self {
            rendezvous,
            placement: None,
            code: None,
            credential: None,
            guest: None,
            to,
            from: None,
            expires,
            until: Instant::now(),
            identity,
            counting,
            offer,
            guests,
            introductions,
            asking: None,
            answer,
            answers,
            observer: watching,
            pipe,
            told,
            addresses,
            patience,
            stop,
            now,
            running: Some(running),
        };
        offering.renew().await?;
        Ok(offering)
    }

    /// Whether the relay is why nobody of another network can find it: what has kept it from this code.
    pub fn relay_failure(&self) -> Option<&Error> {
        self.placement.as_ref()?.as_ref().err()
    }

    /// Whether a relay helps others find this.
    pub fn has_relay(&self) -> bool {
        matches!(self.placement, Some(Ok(_)))
    }

    /// Where the last receiver has asked from, and by what way it has come.
    pub fn route(&self) -> Option<(SocketAddr, Route)> {
        let from = self.from?;
        let by_relay = self
            .placement
            .as_ref()
            .and_then(|placement| placement.as_ref().ok()?.route(from));
        Some((from, by_relay.unwrap_or(Route::Direct)))
    }

    /// The code, unless it has been used, burnt or has expired; none for a machine that needs none.
    pub fn code(&self) -> Option<&ShortCode> {
        self.code.as_ref()
    }

    /// The number under which it can be found, for as long as there is one.
    pub fn number(&self) -> Option<u32> {
        self.credential.as_ref().map(Credential::number)
    }

    /// The code as a ticket, with the addresses of this machine that others may reach, as far as they are known.
    pub fn ticket(&self) -> Option<Ticket> {
        let code = self.code.clone()?;
        let port = self.addresses.first()?.port();
        let placement = self
            .placement
            .as_ref()
            .and_then(|placement| placement.as_ref().ok());
        let own = self
            .rendezvous
            .own
            .iter()
            .map(|ip| SocketAddr::new(*ip, port));
        let mut addresses: Vec<_> = placement
            .map(Placement::seen)
            .into_iter()
            .chain(own)
            .collect();
        let mut known = HashSet::new();
        addresses.retain(|address| known.insert(*address));
        let far = addresses.iter().any(|address| !address.ip().is_loopback());
        addresses.retain(|address| !far || !address.ip().is_loopback());
        addresses.truncate(ticket::MAX_ADDRESSES);
        let relay = self
            .rendezvous
            .relay
            .clone()
            .filter(|_| placement.is_some());
        Some(Ticket {
            code,
            key_id: self.identity.key_id(),
            addresses,
            relay,
        })
    }

    /// The addresses it listens on.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Draws another code, unless it is for a machine that needs none. The one before is worth nothing any more, and whoever used it
    /// is no guest.
    ///
    /// # Errors
    /// As [`ShortCode::draw`].
    pub async fn renew(&mut self) -> Result<()> {
        self.forget();
        // Whoever accepts sees how much it is; until somebody comes there is time to find out.
        self.counting.begin();
        let paired = self
            .to
            .as_ref()
            .map(|peer| pair::credential(peer, self.identity.key_id()));
        let wanted = paired
            .as_ref()
            .map(|paired| pair::wanted(paired.number, &self.identity));
        // Its number too: somebody may be waiting there.
        self.placement = None;
        self.placement = self.rendezvous.place(wanted).await;
        // What is still told is of whoever is no guest any more.
        while self.told.try_recv().is_ok() {}
        self.until = Instant::now() + self.expires;
        if paired.is_some() {
            self.credential = paired;
            return Ok(());
        }
        let code = match &self.placement {
            Some(Ok(placement)) => ShortCode::draw_at(placement.number())?,
            _ => ShortCode::draw()?,
        };
        self.credential = Some((&code).into());
        self.code = Some(code);
        Ok(())
    }

    /// Waits for somebody who uses the code up, one way or another. Cancelling it turns away whoever is just being met.
    ///
    /// # Errors
    /// [`Error::Stopping`] when it has ended.
    pub async fn meet(&mut self) -> Result<Met> {
        loop {
            tokio::select! {
                somebody = self.introductions.recv() => {
                    match self.introduced(somebody.ok_or(Error::Stopping)?).await {
                        Introduced::Asked => {}
                        Introduced::Burnt(from) => return Ok(Met::Burnt { from }),
                        Introduced::Nothing => sleep(GUESS_INTERVAL).await,
                    }
                }
                Some(answered) = self.answers.recv() => {
                    let met = self.answered(answered);
                    if matches!(met, Some(Met::Declined { .. } | Met::Paired(_))) {
                        self.forget();
                    }
                    if let Some(met) = met {
                        return Ok(met);
                    }
                }
                () = sleep_until(self.until), if self.credential.is_some() || self.guest.is_some() => {
                    self.forget();
                    return Ok(Met::Expired);
                }
            }
        }
    }

    /// Serves whoever has accepted, until it says that it has all, or what failed. A connection that is lost may come back,
    /// or the receiver be started again with the same code, for [`Config::retry_for`].
    ///
    /// # Errors
    /// [`Error::Lost`] when nobody comes, or comes back, or what comes out of a pipe was begun; [`Error::Refused`] when it comes back and declines;
    /// [`Error::Stopping`] when this has ended.
    pub async fn serve(&mut self) -> Result<Outcome> {
        let mut sessions = 0_u32;
        let mut since = Instant::now();
        let mut lost = None;
        loop {
            tokio::select! {
                told = self.told.recv() => match told.ok_or(Error::Stopping)? {
                    // A guest of before, over a connection that it still has.
                    (key_id, _) if self.guest.as_ref().is_none_or(|(guest, _)| *guest != key_id) => {}
                    (_, OfferEvent::Begun { from }) => {
                        sessions += 1;
                        self.from = Some(canonical(from));
                        if sessions == 1 && lost.take().is_some() {
                            (self.observer)(Event::Reconnected { address: canonical(from) });
                        }
                    }
                    (_, OfferEvent::Ended(Ok(outcome))) => return Ok(*outcome),
                    (_, OfferEvent::Ended(Err(error))) => {
                        sessions = sessions.saturating_sub(1);
                        since = Instant::now();
                        let why = if let Error::Lost(why) = error { why } else { error.to_string().into() };
                        if self.pipe.as_ref().is_some_and(|pipe| pipe.is_spent()) {
                            return Err(Error::Lost(format!("{why}; what was read of the input is gone with it").into()));
                        }
                        if sessions == 0 {
                            (self.observer)(Event::Lost { why: why.clone(), retry_for: self.patience });
                        }
                        lost = Some(why);
                    }
                },
                somebody = self.introductions.recv() => {
                    self.introduced(somebody.ok_or(Error::Stopping)?).await;
                }
                Some(answered) = self.answers.recv() => match self.answered(answered) {
                    Some(Met::Accepted { .. }) => since = Instant::now(),
                    Some(Met::Declined { .. }) if sessions == 0 => {
                        return Err(Error::Refused(Reason::new(Code::Cancelled, "the receiver declined in the end")));
                    }
                    _ => {}
                },
                () = sleep_until(since + self.patience), if sessions == 0 => {
                    return Err(Error::Lost(lost.unwrap_or_else(|| "nobody came for it".into())));
                }
            }
        }
    }

    /// Ends it: lets a receiver that has all hear so, says goodbye, and waits until that has gone out.
    pub async fn close(mut self) {
        self.stop.cancel();
        // Whoever waits to be met is not waited for.
        self.introductions.close();
        while self.introductions.try_recv().is_ok() {}
        if let Some(running) = self.running.take() {
            let _ = running.await;
        }
    }

    /// Ends it at once, whatever is under way, and says so to the receiver.
    pub async fn stop(self) {
        // Not as a server that is started again: nothing is to be waited for.
        self.rendezvous
            .port
            .endpoint
            .close(varint_of(Code::Cancelled), b"the sender was stopped");
        self.now.cancel();
        self.close().await;
    }

    /// No code is worth anything, and nobody is a guest.
    fn forget(&mut self) {
        self.guests.clear();
        self.use_up();
        self.guest = None;
        self.asking = None;
    }

    /// Nobody else can use the code.
    fn use_up(&mut self) {
        self.code = None;
        self.credential = None;
    }

    /// Lets somebody show that it knows the code.
    async fn introduced(&mut self, mut somebody: Introduction) -> Introduced {
        match self.introduce(&mut somebody).await {
            Ok(Shown::Right(key_id, secret)) => {
                self.ask(somebody, key_id, secret);
                Introduced::Asked
            }
            Ok(Shown::Wrong(from)) => {
                somebody.writer.finish();
                Introduced::Burnt(from)
            }
            Ok(Shown::Nothing) => {
                somebody.writer.finish();
                Introduced::Nothing
            }
            Err(why) => {
                debug!(from = %somebody.connection.remote_address(), %why, "an introduction came to nothing");
                Introduced::Nothing
            }
        }
    }

    async fn introduce(&mut self, somebody: &mut Introduction) -> Result<Shown, StreamError> {
        let from = canonical(somebody.connection.remote_address());
        let Some((key_id, _)) = endpoint::peer(&somebody.connection) else {
            return Ok(Shown::Nothing);
        };
        let begun = timeout(FIRST_MESSAGE_TIMEOUT, read_introduce(somebody))
            .await
            .map_err(|_| StreamError::TimedOut)??;
        // Whoever was killed, or lost its connection, comes back with the code that it has used.
        let again = self
            .guest
            .as_ref()
            .filter(|(guest, _)| *guest == key_id)
            .map(|(_, credential)| credential);
        let usable = |credential: &&Credential| {
            credential.number == begun.number
                && credential.key_id.is_none_or(|expected| expected == key_id)
        };
        let Some(credential) = self.credential.as_ref().or(again).filter(usable).cloned() else {
            return refuse(
                somebody,
                Reason::new(Code::NotFound, "the code is not, or no longer, in use here"),
            )
            .await;
        };
        let parties = Parties::of(&somebody.connection, self.identity.key_id(), key_id);
        let Some(parties) = parties else {
            return Ok(Shown::Nothing);
        };
        let (exchange, ours) = Exchange::begin(Role::Sender, &credential, &parties);
        let Some(confirmation) = exchange.finish(&begun.exchange) else {
            return refuse(somebody, Code::Protocol.into()).await;
        };
        somebody
            .writer
            .write_within(&protocol::Introduced { exchange: ours }, ANSWER_TIMEOUT)
            .await?;
        let theirs = timeout(ANSWER_TIMEOUT, somebody.reader.read::<Confirm>())
            .await
            .map_err(|_| StreamError::TimedOut)??;
        if !confirmation.is_right(theirs.tag) && credential.key_id.is_some() {
            // It holds the key, so it is no guess: one of the two was paired anew.
            let text = "the two machines do not share a secret any more; pair them again";
            return refuse(somebody, Reason::new(Code::NotAdmitted, text)).await;
        }
        if !confirmation.is_right(theirs.tag) {
            info!(%from, "a wrong word: the code is burnt");
            self.use_up();
            let text = "a word of the code was wrong. It is burnt now: ask for a new one";
            refuse(somebody, Reason::new(Code::NotAdmitted, text)).await?;
            return Ok(Shown::Wrong(from));
        }
        self.use_up();
        self.guest = Some((key_id, credential));
        somebody
            .writer
            .write_within(
                &Confirm {
                    tag: confirmation.ours(),
                },
                ANSWER_TIMEOUT,
            )
            .await?;
        Ok(Shown::Right(key_id, confirmation.pair()))
    }

    /// Shows what there is to somebody who knows the code, and lets it take its time to answer. Whoever was asked before, the same
    /// user in another process, is not waited for any more.
    fn ask(&mut self, mut somebody: Introduction, key_id: KeyId, secret: [u8; 32]) {
        (self.observer)(Event::Asked {
            address: canonical(somebody.connection.remote_address()),
        });
        let offer = self.offer.clone();
        let answer = self.answer.clone();
        let asking = tokio::spawn(async move {
            let said = offer_to(&mut somebody, offer).await;
            // Fails only when nobody waits for it any more.
            let _ = answer
                .send(Answered {
                    somebody,
                    key_id,
                    secret,
                    said,
                })
                .await;
        });
        self.asking = Some(AbortOnDropHandle::new(asking));
    }

    /// What an answer comes to, if anything.
    fn answered(&mut self, answered: Answered) -> Option<Met> {
        let Answered {
            somebody,
            key_id,
            secret,
            said,
        } = answered;
        if self
            .guest
            .as_ref()
            .is_none_or(|(guest, _)| *guest != key_id)
        {
            return None;
        }
        let from = canonical(somebody.connection.remote_address());
        let pairs = self
            .offer
            .borrow()
            .as_ref()
            .is_some_and(|offer| offer.pair.is_some());
        let met = match said {
            Ok(None) => Met::Declined { from },
            Ok(Some(Accept { pair: Some(number) })) if pairs => Met::Paired(Paired {
                key_id,
                secret,
                number,
            }),
            Ok(Some(_)) if !pairs => {
                // Before the stream ends: that is what the receiver waits for.
                self.guests.admit(key_id);
                Met::Accepted { from }
            }
            said => {
                debug!(%from, ok = said.is_ok(), "it went away without an answer");
                (self.observer)(Event::Left { address: from });
                return None;
            }
        };
        somebody.writer.finish();
        Some(met)
    }
}

/// Whether somebody has shown that it knows the code.
enum Shown {
    /// It has, under this key; and what only the two know from then on.
    Right(KeyId, [u8; 32]),
    /// It has guessed.
    Wrong(SocketAddr),
    /// It said nothing about the code.
    Nothing,
}

/// What an introduction comes to.
enum Introduced {
    Asked,
    Burnt(SocketAddr),
    Nothing,
}

/// What somebody who knew the code says to the offer; nothing, if it does not want it.
struct Answered {
    somebody: Introduction,
    key_id: KeyId,
    secret: [u8; 32],
    said: Result<Option<Accept>, StreamError>,
}

/// Shows what there is, and waits for what the other user says to it.
async fn offer_to(
    somebody: &mut Introduction,
    mut offer: watch::Receiver<Option<Offer>>,
) -> Result<Option<Accept>, StreamError> {
    loop {
        match timeout(WORKING_INTERVAL, async {
            offer.wait_for(Option::is_some).await.is_ok()
        })
        .await
        {
            Ok(true) => break,
            Ok(false) => return Err(StreamError::Ended),
            Err(_) => {
                somebody
                    .writer
                    .write_within(&Working {}, ANSWER_TIMEOUT)
                    .await?
            }
        }
    }
    let offer = offer.borrow().clone().unwrap_or_default();
    somebody.writer.write_within(&offer, ANSWER_TIMEOUT).await?;
    let frame = somebody
        .reader
        .frame(Refused::LIMIT)
        .await?
        .ok_or(StreamError::Ended)?;
    Ok(match frame.kind {
        Refused::TYPE => {
            frame.decode::<Refused>()?;
            None
        }
        _ => Some(frame.decode::<Accept>()?),
    })
}

impl Drop for Offering {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.abort();
        }
    }
}

/// As people write it: a socket that takes both families shows IPv4 as IPv6.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

async fn read_introduce(somebody: &mut Introduction) -> Result<Introduce, StreamError> {
    somebody.reader.read::<Hello>().await?;
    somebody
        .writer
        .write_within(&hello(), ANSWER_TIMEOUT)
        .await?;
    somebody.reader.read().await
}

async fn refuse(somebody: &mut Introduction, why: Reason) -> Result<Shown, StreamError> {
    somebody
        .writer
        .write_within(&Refused { why: why.into() }, ANSWER_TIMEOUT)
        .await?;
    Ok(Shown::Nothing)
}
