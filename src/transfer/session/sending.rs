//! The sending end of a session: a push at the client, a pull at the server.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::ConnectionError;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::content::{OfferEvent, OfferedContent, PullContent};
use super::outcome::{Outcome, held_up};
use super::request::{answer, ask, refuse};
use super::server_context::{ServerContext, hex};
use crate::error::lock::lock;
use crate::error::{Code, Error, Reason, Result};
use crate::net::rate_limit::RateLimits;
use crate::net::stream::{MessageReader, MessageStream, MessageWriter, StreamError, varint_of};
use crate::protocol::rate::Rate;
use crate::protocol::{Frame, GoAway, Message, Pull, Push, Removed, SenderTime, Summary, Working};
use crate::transfer::blocking::blocking;
use crate::transfer::context::Context;
use crate::transfer::sampler::{Sampler, Stage};
use crate::transfer::send::{Allowed, Sender, Sending, TransferStats};

/// Time between two samples of a pull. A server may have many sessions; a client samples more often.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// Runs the client side of a push over one connection, until `lost` reports the loss of that connection. Calls `on_ready`
/// when the server is ready. Adds the measurements and the summary to the outcome.
pub(crate) async fn push(
    context: &Context,
    request: &Push,
    sender: &mut Sender,
    on_ready: impl FnOnce(),
    lost: impl Future<Output = String>,
    outcome: &mut Outcome,
) -> Result<()> {
    let quic = context.connection.quic();
    let deadline = context.config.deadline;
    let mut control = MessageStream::open(quic, deadline).await?;
    ask(&mut control.writer, request, deadline).await?;
    let allowed = Arc::<Allowed>::default();
    let limits = context.limits.clone();
    let sending = sending(context, control.id(), allowed.clone(), limits);
    let mut sampler = Sampler::begin(quic.clone(), sending.stage_counters.clone()).await;
    let MessageStream { mut reader, writer } = control;
    let answered = async {
        allowed.set(&answer(&mut reader, deadline).await?);
        on_ready();
        Ok(reader)
    };
    let ended = tokio::select! {
        // Send the first entries together with the request.
        ended = send_all(sender, sending, answered, || None, writer) => ended,
        why = lost => Err(Error::Lost(why.into())),
        never = sampler.run() => match never {},
    };
    let (path, account) = sampler.end(held_up(ended.as_ref().ok())).await;
    outcome.add_connection(&path, &account);
    outcome.summary = ended?;
    Ok(())
}

/// Serves a pull. The receiver of an offer waits for the close that follows.
pub(super) async fn serve_pull(
    server: &ServerContext,
    pull: Pull,
    control: MessageStream,
) -> Result<()> {
    let context = &server.context;
    let quic = context.connection.quic();
    let deadline = context.config.deadline;
    let MessageStream { reader, mut writer } = control;
    if let Err(why) = check_pull(server) {
        return refuse(writer, why, deadline).await;
    }
    tracing::info!(id = %hex(&pull.session), sources = pull.sources.len(), "pull");
    let allowed = Arc::new(Allowed::by(pull.entries, pull.entry_bytes));
    let limits = context
        .limits
        .preceded_by(pull.limit.and_then(Rate::from_bytes));
    let PullContent {
        ready,
        mut sender,
        held: _held,
    } = match find_content(server, pull).await {
        Ok(content) => content,
        Err(why) => return refuse(writer, why, deadline).await,
    };
    writer.write_within(&ready, deadline).await?;
    let sending = sending(context, reader.id(), allowed, limits);
    if let Some(offered) = &server.offered {
        let from = quic.remote_address();
        report(server, offered, OfferEvent::Begun { from }).await;
    }
    let sampler = Mutex::new(Sampler::begin(quic.clone(), sending.stage_counters.clone()).await);
    let spent = || Some(lock(&sampler).sender_time());
    let sampling = async {
        loop {
            tokio::time::sleep(SAMPLE_INTERVAL).await;
            lock(&sampler).tick();
        }
    };
    let answered = async { Ok(reader) };
    let ended = tokio::select! {
        ended = send_all(&mut sender, sending, answered, spent, writer) => ended,
        () = sampling => return Ok(()),
    };
    let ended = match (ended, quic.close_reason()) {
        // The close of the client has overtaken its summary: quinn discards unread data.
        (Err(_), Some(ConnectionError::ApplicationClosed(close)))
            if close.error_code == varint_of(Code::Done) && sender.is_settled() =>
        {
            Ok(Summary::default())
        }
        (ended, _) => ended,
    };
    let sent = sender.sent();
    if ended.is_ok() {
        tracing::info!(
            committed = sent.files,
            bytes = sent.bytes,
            skipped = sent.skipped,
            failed = sent.failed,
            "done"
        );
    }
    let Some(offered) = &server.offered else {
        return ended.map(drop);
    };
    if ended.is_ok() {
        // The guest has everything and waits for this close. Closing from its side would discard data that is unread
        // here.
        quic.close(varint_of(Code::Done), b"");
    }
    let sampler = sampler.into_inner().unwrap_or_else(PoisonError::into_inner);
    let outcome = offer_outcome(sampler, sent, ended).await;
    report(server, offered, OfferEvent::Ended(outcome.map(Box::new))).await;
    Ok(())
}

/// Checks whether the client may pull now.
fn check_pull(server: &ServerContext) -> Result<(), Reason> {
    match &server.offered {
        Some(offered) if offered.guests.has(server.client()) => {}
        Some(_) => {
            let text = "the offer was not accepted or has ended; run haul receive again";
            return Err(Reason::new(Code::NotAllowed, text));
        }
        None => server.check_read()?,
    }
    server.check_running()
}

async fn find_content(server: &ServerContext, pull: Pull) -> Result<PullContent, Reason> {
    let store = server.store.clone();
    let offered = server.offered.clone();
    let parallel = server.context.config.parallel;
    let observer = server.context.observer.clone();
    let memory = server.context.connection.kept().clone();
    blocking("find the sources", move || match &offered {
        Some(offered) => PullContent::of_offer(offered, &pull, &memory, parallel, observer),
        None => PullContent::of_store(&store, &pull, &memory, parallel, observer),
    })
    .await
}

/// Reports an event of an offer.
async fn report(server: &ServerContext, offered: &OfferedContent, event: OfferEvent) {
    // Fails only if the receiving end is gone.
    let _ = offered.told.send((server.client(), event)).await;
}

/// Returns the outcome of a session for the user of an offer.
async fn offer_outcome(
    sampler: Sampler,
    sent: TransferStats,
    ended: Result<Summary>,
) -> Result<Outcome> {
    let summary = ended?;
    let (path, account) = sampler.end(held_up(Some(&summary))).await;
    let mut outcome = Outcome {
        sent,
        summary,
        ..Outcome::default()
    };
    outcome.add_connection(&path, &account);
    outcome.bottleneck = outcome.time_breakdown.bottleneck();
    Ok(outcome)
}

/// Returns what the sender needs of this connection.
fn sending(context: &Context, handle: u64, allowed: Arc<Allowed>, limits: RateLimits) -> Sending {
    Sending {
        connection: context.connection.quic().clone(),
        handle,
        allowed,
        limits,
        deadline: context.config.deadline,
        stage_counters: Arc::default(),
        // This end announces nothing new while it stops. If the receiver goes away, only this session stops.
        stopping: context.stopping.child_token(),
        all_sent: CancellationToken::new(),
    }
}

/// Sends everything, writes [`End`](crate::protocol::End), and reads the [`Summary`] after the receiver has answered.
async fn send_all(
    sender: &mut Sender,
    sending: Sending,
    answered: impl Future<Output = Result<MessageReader>>,
    spent: impl FnOnce() -> Option<SenderTime>,
    mut writer: MessageWriter,
) -> Result<Summary> {
    let deadline = sending.deadline;
    let stopping = sending.stopping.clone();
    let stage_counters = sending.stage_counters.clone();
    let all_sent = sending.all_sent.clone();
    let reporter = sender.reporter();
    let work = async {
        sender.run(sending).await?;
        // Counts the stage as committing until the summary arrives.
        Ok(stage_counters.at(Stage::Committing))
    };
    let end = async {
        all_sent.cancelled().await;
        writer
            .write_within(&reporter.end(spent()), deadline)
            .await?;
        writer.finish();
        Ok::<_, Error>(())
    };
    let summary = async {
        let mut reader = answered.await?;
        loop {
            let frame = timeout(deadline, reader.frame(Removed::LIMIT))
                .await
                .map_err(|_| StreamError::TimedOut)??;
            match frame {
                Some(frame) if frame.kind == Summary::TYPE && all_sent.is_cancelled() => {
                    return Ok(frame.decode().map_err(StreamError::from)?);
                }
                Some(frame) if frame.kind == Removed::TYPE => {
                    let removed: Removed = frame.decode().map_err(StreamError::from)?;
                    reporter.removed(&removed);
                }
                frame => {
                    if let Some(why) = control_notice(frame)? {
                        reporter.interrupted(why);
                        stopping.cancel();
                    }
                }
            }
        }
    };
    let (_, (), summary) = tokio::try_join!(work, end, summary)?;
    Ok(summary)
}

/// Handles a message from the receiver that is not part of the work: `Working`, or `GoAway`, whose reason it returns.
fn control_notice(frame: Option<Frame>) -> Result<Option<Reason>> {
    let frame = frame.ok_or(StreamError::Ended)?;
    Ok(match frame.kind {
        Working::TYPE => frame.decode::<Working>().map(|_| None),
        _ => frame.decode::<GoAway>().map(|away| Some(away.why.into())),
    }
    .map_err(StreamError::from)?)
}
