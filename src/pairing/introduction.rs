//! The introduction at the sender: a receiver proves by SPAKE2 that it knows the code, sees the offer and answers it.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tracing::info;

use super::active_code::ActiveCode;
use super::pake::{Exchange, Parties, Role};
use crate::auth::identity::KeyId;
use crate::error::{Code, Reason};
use crate::net::address::canonical;
use crate::net::endpoint;
use crate::net::stream::StreamError;
use crate::protocol::{
    Accept, Address, Confirm, Hello, Introduce, Introduced, Message, Offer, Refused, Working,
};
use crate::server::Introduction;
use crate::transfer::session::hello;

/// Time for each further message of a receiver, and for it to take each of ours.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for the first message of a receiver. It comes with the stream.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(3);
/// How often the receiver hears that the sender still counts files. The receiver waits 20 s for each message.
const WORKING_INTERVAL: Duration = Duration::from_secs(5);
/// Answers that may wait to be read. Only the last receiver that was asked answers.
const MAX_ANSWERS: usize = 4;

/// The result of an introduction.
pub(super) enum Proof {
    /// The receiver knows the code.
    Confirmed {
        key_id: KeyId,
        /// Known only to the two ends.
        secret: [u8; 32],
    },
    /// A word was wrong, and the code is burnt.
    Wrong,
    /// The receiver was refused before it could prove or disprove anything.
    Refused,
}

/// Lets a receiver prove that it knows the code. A wrong word burns the code; a right one makes the receiver the guest. Both
/// take effect before the receiver is told, so that dropping the future cannot undo them.
pub(super) async fn verify(
    introduction: &mut Introduction,
    active: &mut ActiveCode,
) -> Result<Proof, StreamError> {
    let Some((key_id, _)) = endpoint::peer(&introduction.connection) else {
        return Ok(Proof::Refused);
    };
    let introduce = timeout(FIRST_MESSAGE_TIMEOUT, read_introduce(introduction))
        .await
        .map_err(|_| StreamError::TimedOut)??;
    let Some(credential) = active.credential_for(key_id, introduce.number) else {
        let text = "the code is not in use here, or not any more";
        return refuse(introduction, Reason::new(Code::NotFound, text)).await;
    };
    let parties = Parties::of(&introduction.connection, active.key_id(), key_id);
    let Some(parties) = parties else {
        return Ok(Proof::Refused);
    };
    let (exchange, message) = Exchange::begin(Role::Sender, &credential, &parties);
    let Some(confirmation) = exchange.finish(&introduce.exchange) else {
        return refuse(introduction, Code::Protocol.into()).await;
    };
    let introduced = Introduced { exchange: message };
    introduction
        .writer
        .write_within(&introduced, ANSWER_TIMEOUT)
        .await?;
    let theirs = timeout(ANSWER_TIMEOUT, introduction.reader.read::<Confirm>())
        .await
        .map_err(|_| StreamError::TimedOut)??;
    if !confirmation.is_right(theirs.tag) {
        if credential.key_id.is_some() {
            // The key is the paired machine's, so this is no guess: one of the two was paired anew.
            let text = "the two machines no longer share a secret; pair them again";
            return refuse(introduction, Reason::new(Code::NotAdmitted, text)).await;
        }
        let from = canonical(introduction.connection.remote_address());
        info!(%from, "a receiver used a wrong word; the code is burnt");
        active.burn();
        let text = "a word of the code was wrong, and the code is burnt; ask for a new one";
        refuse(introduction, Reason::new(Code::NotAdmitted, text)).await?;
        return Ok(Proof::Wrong);
    }
    active.used_by(key_id, credential);
    let confirm = Confirm {
        tag: confirmation.ours(),
    };
    introduction
        .writer
        .write_within(&confirm, ANSWER_TIMEOUT)
        .await?;
    Ok(Proof::Confirmed {
        key_id,
        secret: confirmation.shared_secret(),
    })
}

async fn read_introduce(introduction: &mut Introduction) -> Result<Introduce, StreamError> {
    introduction.reader.read::<Hello>().await?;
    introduction
        .writer
        .write_within(&hello(), ANSWER_TIMEOUT)
        .await?;
    introduction.reader.read().await
}

async fn refuse(introduction: &mut Introduction, reason: Reason) -> Result<Proof, StreamError> {
    let refused = Refused { why: reason.into() };
    introduction
        .writer
        .write_within(&refused, ANSWER_TIMEOUT)
        .await?;
    Ok(Proof::Refused)
}

/// A receiver's answer to the offer.
pub(super) struct Answer {
    pub(super) introduction: Introduction,
    pub(super) key_id: KeyId,
    pub(super) secret: [u8; 32],
    /// `None` when it declines.
    pub(super) accept: Result<Option<Accept>, StreamError>,
}

/// Shows the offer to one receiver at a time and collects the answers. A receiver's user may take any time to answer.
pub(super) struct Asking {
    task: Option<AbortOnDropHandle<()>>,
    sender: mpsc::Sender<Answer>,
    answers: mpsc::Receiver<Answer>,
}

impl Asking {
    pub(super) fn new() -> Self {
        let (sender, answers) = mpsc::channel(MAX_ANSWERS);
        Self {
            task: None,
            sender,
            answers,
        }
    }

    /// Shows the offer, with this end's addresses, to a receiver that knows the code. One that was asked before is not waited for any more: it is the same
    /// user in another process.
    pub(super) fn ask(
        &mut self,
        mut introduction: Introduction,
        key_id: KeyId,
        secret: [u8; 32],
        offer: watch::Receiver<Option<Offer>>,
        addresses: Option<Vec<Address>>,
    ) {
        let sender = self.sender.clone();
        let task = tokio::spawn(async move {
            let accept = show_offer(&mut introduction, offer, addresses).await;
            let answer = Answer {
                introduction,
                key_id,
                secret,
                accept,
            };
            // Fails only when the offering has ended.
            let _ = sender.send(answer).await;
        });
        self.task = Some(AbortOnDropHandle::new(task));
    }

    /// The next answer; waits for ever without one. Cancel-safe.
    pub(super) async fn next(&mut self) -> Option<Answer> {
        self.answers.recv().await
    }

    /// Stops waiting for the receiver that was asked.
    pub(super) fn cancel(&mut self) {
        self.task = None;
    }
}

/// Waits until the offer is counted, shows it with this end's addresses, and reads the answer.
async fn show_offer(
    introduction: &mut Introduction,
    mut offer: watch::Receiver<Option<Offer>>,
    addresses: Option<Vec<Address>>,
) -> Result<Option<Accept>, StreamError> {
    loop {
        let counted = async { offer.wait_for(Option::is_some).await.is_ok() };
        match timeout(WORKING_INTERVAL, counted).await {
            Ok(true) => break,
            Ok(false) => return Err(StreamError::Ended),
            Err(_) => {
                introduction
                    .writer
                    .write_within(&Working {}, ANSWER_TIMEOUT)
                    .await?
            }
        }
    }
    let mut offer = offer.borrow().clone().unwrap_or_default();
    offer.addresses = addresses;
    introduction
        .writer
        .write_within(&offer, ANSWER_TIMEOUT)
        .await?;
    let frame = introduction
        .reader
        .frame(Refused::LIMIT)
        .await?
        .ok_or(StreamError::Ended)?;
    if frame.kind == Refused::TYPE {
        frame.decode::<Refused>()?;
        return Ok(None);
    }
    Ok(Some(frame.decode::<Accept>()?))
}
