//! The receiving end of a session: a pull at the client, a push at the server.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::destination::{PushDestination, check_options};
use super::outcome::{Outcome, held_up};
use super::request::{WORKING_INTERVAL, answer, ask, refuse};
use super::server_context::{ServerContext, hex};
use super::table::Registration;
use crate::error::{Code, Error, Reason, Result};
use crate::net::stream::{MessageReader, MessageStream, MessageWriter, varint_of};
use crate::protocol::{
    Components, End, GoAway, MAX_UNANSWERED, MAX_UNANSWERED_BYTES, Message, Pull, Push, Ready,
    Removed, Summary, Working,
};
use crate::transfer::blocking::blocking;
use crate::transfer::context::Context;
use crate::transfer::receive::{
    Claimant, FileLock, Keep, Policy, ReceiveContext, Receiver, Receiving, RequestedNames, Target,
};
use crate::transfer::sampler::Sampler;

/// Paths that a mirror has removed and not yet reported.
const REMOVED_QUEUE_LIMIT: usize = 256;

/// Completes when the peer has this end's last messages.
pub(crate) type Delivered = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A session whose summary is written.
struct Received {
    summary: Summary,
    delivered: Delivered,
}

/// Runs the client side of a pull over one connection, until `lost` reports the loss of that connection. `receiver`
/// creates the receiver when the server is ready. Adds the measurements and the summary to the outcome. The returned
/// future completes when the server has the summary and every receipt; closing the connection earlier would discard
/// them.
pub(crate) async fn pull(
    context: &Context,
    request: &Pull,
    receiver: impl AsyncFnOnce(&Ready) -> Result<Arc<Receiver>>,
    lost: impl Future<Output = String>,
    outcome: &mut Outcome,
) -> Result<Delivered> {
    let quic = context.connection.quic();
    let deadline = context.config.deadline;
    let mut sampler = Sampler::begin(quic.clone(), Arc::default()).await;
    outcome.pulled = true;
    let mut sender_time = None;
    let session = async {
        let mut control = MessageStream::open(quic, deadline).await?;
        // Registered before the request, because the manifest may arrive before the answer.
        let registration = context.connection.register(control.id());
        ask(&mut control.writer, request, deadline).await?;
        let ready = answer(&mut control.reader, deadline).await?;
        let receiver = GivenUp(receiver(&ready).await?);
        let received = receive_all(context, registration, receiver.0.clone(), control).await;
        sender_time = receiver.0.spent();
        received
    };
    let ended = tokio::select! {
        ended = session => ended,
        why = lost => Err(Error::Lost(why.into())),
        never = sampler.run() => match never {},
    };
    let summary = ended.as_ref().ok().map(|received| &received.summary);
    let (mut path, mut account) = sampler.end(held_up(summary)).await;
    if let Some(sender_time) = sender_time {
        path.use_sender_time(&mut account, &sender_time);
    }
    path.rate =
        (path.received_bytes as f64 / account.elapsed.as_secs_f64().max(f64::EPSILON)) as u64;
    outcome.add_connection(&path, &account);
    let Received { summary, delivered } = ended?;
    outcome.summary = summary;
    Ok(delivered)
}

/// Abandons its receiver when dropped.
struct GivenUp(Arc<Receiver>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

/// Serves a push.
pub(super) async fn serve_push(
    server: &ServerContext,
    push: Push,
    control: MessageStream,
) -> Result<()> {
    let context = &server.context;
    let deadline = context.config.deadline;
    let MessageStream { reader, mut writer } = control;
    if let Err(why) = check_push(server, &push) {
        return refuse(writer, why, deadline).await;
    }
    let lock = match lock_session(server, &push.session).await {
        Ok(lock) => lock,
        Err(why) => return refuse(writer, why, deadline).await,
    };
    let store = server.store.clone();
    let request = push.clone();
    let memory = context.connection.kept().clone();
    let settle = move || PushDestination::settle(&*store, &request, &memory);
    let destination = match blocking("settle the destination", settle).await {
        Ok(destination) => destination,
        Err(why) => return refuse(writer, why, deadline).await,
    };
    tracing::info!(id = %hex(&push.session), place = ?destination.placement, "push");
    let ready = ready(destination.placement.directory().into());
    let receiver = receiver(server, &push, destination);
    let registration = context.connection.register(reader.id());
    writer.write_within(&ready, deadline).await?;
    let control = MessageStream { reader, writer };
    let Received { summary, delivered } = tokio::select! {
        received = receive_all(context, registration, receiver, control) => received?,
        () = lock.superseded() => {
            let why = Reason::new(Code::Superseded, "the session continues over another connection");
            context.connection.quic().close(varint_of(why.code), why.text.raw().as_bytes());
            return Err(Error::Refused(why));
        }
    };
    tracing::info!(
        committed = summary.committed,
        bytes = summary.bytes,
        skipped = summary.skipped,
        failed = summary.failed,
        "done"
    );
    // A stopping server closes the connection when no session runs, which would discard undelivered data.
    let _ = timeout(deadline, delivered).await;
    Ok(())
}

/// Checks whether the client may push now, with these options.
fn check_push(server: &ServerContext, push: &Push) -> Result<(), Reason> {
    if !server.rights.write {
        let text = "this key may not write on this server";
        return Err(Reason::new(Code::NotAllowed, text));
    }
    server.check_running()?;
    let options = push.take.unwrap_or_default();
    check_options(&options, &server.context.config, server.rights.read)
}

/// Takes a session over from its earlier connection. The client has reconnected, so that connection is dead and must
/// release its locks.
async fn lock_session(
    server: &ServerContext,
    session: &[u8; 16],
) -> Result<FileLock<[u8; 16]>, Reason> {
    let claimant = Claimant {
        session: *session,
        age: server.pushes.age(),
        window: None,
        stall: server.context.config.stall,
    };
    server
        .pushes
        .take(server.client().0, session, &claimant)
        .await
}

/// Makes the receiver of a push.
fn receiver(server: &ServerContext, push: &Push, destination: PushDestination) -> Arc<Receiver> {
    let context = &server.context;
    let options = push.take.unwrap_or_default();
    Receiver::new(Receiving {
        session: push.session,
        sender: server.client().0,
        target: Target {
            store: server.store.clone(),
            placement: destination.placement,
            requested: RequestedNames::Any,
        },
        policy: Policy {
            options,
            keep: Keep {
                owner: context.config.allow_owner,
                xattrs: true,
                ..Keep::default()
            },
            durability: push.durability,
            // The sender knows this option of its user, and applies it itself.
            fail_specials: false,
            protected: destination.protected,
            quota: None,
            // A key without the right to read gets no dedupe, because its timing would reveal which content exists.
            index: (server.rights.read && !options.no_dedupe)
                .then(|| context.config.index.clone())
                .flatten(),
        },
        context: ReceiveContext {
            permits: server.permits.clone(),
            flow_control: context.connection.flow_control().clone(),
            memory: context.connection.kept().clone(),
            file_locks: server.file_locks.clone(),
            config: context.config.clone(),
            stats: Arc::default(),
            observer: context.observer.clone(),
            stopping: context.stopping.clone(),
        },
    })
}

/// Returns the answer to a push. The place is only shown to people, and is left out if the message would be too long.
fn ready(place: Components) -> Ready {
    let ready = Ready {
        entries: MAX_UNANSWERED,
        entry_bytes: MAX_UNANSWERED_BYTES,
        place: Some(place),
        ..Ready::default()
    };
    if ready.fits() {
        ready
    } else {
        Ready {
            place: None,
            ..ready
        }
    }
}

/// Receives until the sender has ended, and writes the [`Summary`].
async fn receive_all(
    context: &Context,
    mut registration: Registration,
    receiver: Arc<Receiver>,
    control: MessageStream,
) -> Result<Received> {
    let deadline = context.config.deadline;
    let MessageStream {
        mut reader,
        mut writer,
    } = control;
    registration.attach(&receiver);
    let manifest = registration.manifest(deadline).await?;
    receive_entries(context, &receiver, manifest, &mut reader, &mut writer).await?;
    remove_unannounced(&receiver, &mut writer, deadline).await?;
    let summary = receiver.summary();
    tokio::pin!(summary);
    let summary = loop {
        match timeout(WORKING_INTERVAL, &mut summary).await {
            Ok(summary) => break summary.map_err(Error::Refused)?,
            Err(_) => writer.write_within(&Working {}, deadline).await?,
        }
    };
    writer.write_within(&summary, deadline).await?;
    let summary_delivered = writer.delivered();
    let receipts_delivered = receiver.receipts_delivered();
    writer.finish();
    let delivered = Box::pin(async {
        summary_delivered.await;
        receipts_delivered.await;
    });
    Ok(Received { summary, delivered })
}

/// Answers the manifest until the sender has ended it and its own work. Announces once if this end stops.
async fn receive_entries(
    context: &Context,
    receiver: &Arc<Receiver>,
    manifest: MessageStream,
    reader: &mut MessageReader,
    writer: &mut MessageWriter,
) -> Result<()> {
    let deadline = context.config.deadline;
    let work = async {
        // Either failure ends the session, because a peer that breaks the protocol on one stream may never end the
        // other.
        let run = receiver.run(manifest.reader, manifest.writer);
        let (_, end) = tokio::try_join!(run, async { Ok(reader.read::<End>().await?) })?;
        receiver.ended(end);
        Ok::<_, Error>(())
    };
    tokio::pin!(work);
    let mut announced_stop = false;
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = context.stopping.cancelled(), if !announced_stop => {
                announced_stop = true;
                let why = Reason::from(Code::Stopping);
                writer.write_within(&GoAway { why: why.into() }, deadline).await?;
            }
            // An entry may wait long for admission. This message shows the sender that the receiver is alive.
            () = sleep(WORKING_INTERVAL) => writer.write_within(&Working {}, deadline).await?,
        }
    }
}

/// Removes what a mirror's source does not have, and tells the sender each path.
async fn remove_unannounced(
    receiver: &Arc<Receiver>,
    writer: &mut MessageWriter,
    deadline: Duration,
) -> Result<()> {
    let (tell, mut removed) = mpsc::channel(REMOVED_QUEUE_LIMIT);
    let mirror = receiver.mirror(tell);
    tokio::pin!(mirror);
    let mut mirroring = true;
    let mut telling = true;
    while mirroring || telling {
        tokio::select! {
            () = &mut mirror, if mirroring => mirroring = false,
            path = removed.recv(), if telling => match path {
                Some(path) => writer.write_within(&Removed { path: Components::from(&path) }, deadline).await?,
                None => telling = false,
            },
            () = sleep(WORKING_INTERVAL) => writer.write_within(&Working {}, deadline).await?,
        }
    }
    Ok(())
}
