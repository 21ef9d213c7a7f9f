//! The operation of a session, which lasts over several connections.

use std::sync::Arc;

use super::destination::Destination;
use super::link::Link;
use super::options::{PullOptions, wire_filter};
use crate::auth::identity::KeyId;
use crate::auth::random::random;
use crate::config::Config;
use crate::error::text::printable;
use crate::error::{Error, Result};
use crate::protocol::rate::Rate;
use crate::protocol::{Components, Message, Pull, Push, Ready};
use crate::protocol::{MAX_UNANSWERED, MAX_UNANSWERED_BYTES};
use crate::storage::OutputStore;
use crate::storage::filter::is_pattern;
use crate::storage::walk::Follow;
use crate::transfer::blocking::blocking;
use crate::transfer::context::Context;
use crate::transfer::permits::TransferPermits;
use crate::transfer::receive::{
    FileLocks, Keep, Placement, Policy, ReceiveContext, Receiver, Receiving, RequestedNames,
    SessionStats, Target,
};
use crate::transfer::send::{Sender, TransferStats};
use crate::transfer::session::{Outcome, nesting, pull, push};

/// A push or pull, with the state that outlives its connections.
pub(super) enum Operation {
    Push { request: Push, sender: Box<Sender> },
    Pull(Box<PullSession>),
}

impl Operation {
    /// Runs over a connection. Calls `on_ready` once the server is ready.
    pub(super) async fn run(
        &mut self,
        link: &Link,
        context: &Context,
        on_ready: impl FnOnce(),
        outcome: &mut Outcome,
    ) -> Result<()> {
        let connection = &context.connection;
        let lost = link.lost(context.config.keep_alive);
        match self {
            Self::Push { request, sender } => {
                let ended = push(context, request, sender, on_ready, lost, outcome).await;
                connection.close_on_protocol_error(ended)
            }
            Self::Pull(session) => {
                let request = session.request.clone();
                let receiver = async |ready: &Ready| {
                    let receiver = session.receiver(context, ready).await?;
                    on_ready();
                    Ok(receiver)
                };
                let ended = pull(context, &request, receiver, lost, outcome).await;
                link.keep_open_until(connection.close_on_protocol_error(ended)?);
                Ok(())
            }
        }
    }

    /// The counts so far.
    pub(super) fn sent(&self) -> TransferStats {
        match self {
            Self::Push { sender, .. } => sender.sent(),
            Self::Pull(session) => session.stats.sent(),
        }
    }

    /// Why the session cannot resume over another connection; `None` if it can.
    pub(super) fn resume_obstacle(&self) -> Option<&'static str> {
        match self {
            Self::Push { sender, .. } if !sender.can_go_on() => {
                Some("the input was read already and cannot be read again")
            }
            Self::Pull(session) if session.output.as_ref().is_some_and(OutputStore::is_taken) => {
                Some("the output was written already and cannot be taken back")
            }
            Self::Push { .. } | Self::Pull(_) => None,
        }
    }

    /// Whether the session can move to another connection at any time without a loss.
    pub(super) fn can_move(&self) -> bool {
        match self {
            Self::Push { request, sender } => {
                sender.can_move()
                    && request
                        .take
                        .as_ref()
                        .is_none_or(|take| take.delete.is_none())
            }
            Self::Pull(session) => session.output.is_none(),
        }
    }

    /// Turns off removing in a push that mirrors, and returns whether it was on. Over another connection a push announces only
    /// the rest, so the receiver does not know what a mirror may remove.
    pub(super) fn stop_mirroring(&mut self) -> bool {
        match self {
            Self::Push { request, .. } => request
                .take
                .as_mut()
                .is_some_and(|take| take.delete.take().is_some()),
            // A pull announces everything again.
            Self::Pull(_) => false,
        }
    }

    /// A measure that grows with the receiver's progress.
    pub(super) fn progress(&self) -> u64 {
        match self {
            Self::Push { sender, .. } => sender.progress(),
            Self::Pull(session) => session.stats.progress(),
        }
    }
}

/// The state of a pull that outlives its connections.
pub(super) struct PullSession {
    request: Pull,
    options: PullOptions,
    requested: RequestedNames,
    /// Receives the only file instead of the destination.
    output: Option<OutputStore>,
    /// Settled with the server's first answer.
    destination: Option<Destination>,
    stats: Arc<SessionStats>,
    /// Shared by all connections: a new one takes files over from the old one, which may not know yet that it is lost.
    file_locks: Arc<FileLocks>,
    permits: TransferPermits,
    /// The server's key. Partials are bound to it.
    key_id: KeyId,
}

impl PullSession {
    pub(super) fn new(options: PullOptions, key_id: KeyId, config: &Config) -> Result<Self> {
        let mut names: Vec<_> = options
            .sources
            .iter()
            .filter_map(|source| source.name().filter(|name| !is_pattern(name)))
            .collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|two| two[0] == two[1]) {
            let name = printable(twice[0]);
            return Err(Error::Usage(format!(
                "cannot pull two sources named {name}: one would replace the other; pull them apart"
            )));
        }
        let filter = &options.walk.filter;
        if filter.only.is_some() {
            return Err(Error::Usage(
                "cannot use a list of names for a pull; name the sources instead".into(),
            ));
        }
        let request = Pull {
            session: random()?,
            sources: options.sources.iter().map(Components::from).collect(),
            entries: MAX_UNANSWERED,
            entry_bytes: MAX_UNANSWERED_BYTES,
            limit: config.limit.map(Rate::bytes),
            checksum: options.walk.checksum.then_some(true),
            follow: (options.walk.follow != Follow::Never).then_some(true),
            filter: wire_filter(filter)?,
            xattrs: options.walk.xattrs.then_some(true),
            owner: options.walk.owner.then_some(true),
            growing: options.walk.allow_growing.then_some(true),
        };
        if !request.fits() {
            return Err(Error::Usage(
                "cannot ask for so many sources or rules at once; pull them in parts".into(),
            ));
        }
        Ok(Self {
            request,
            requested: match RequestedNames::of(&options.sources)
                .map_err(|bad| Error::Usage(bad.to_string()))?
            {
                names if options.literal => names.without_patterns(),
                names => names,
            },
            options,
            output: None,
            destination: None,
            stats: Arc::default(),
            file_locks: Arc::default(),
            permits: TransferPermits::new(config.max_transfers.min(config.parallel)),
            key_id,
        })
    }

    /// Writes the content of the only file to a writer.
    pub(super) fn with_output(mut self, output: OutputStore) -> Self {
        self.output = Some(output);
        self
    }

    /// Makes the receiver for a connection on which the server is ready. The first time, it settles the destination.
    async fn receiver(&mut self, context: &Context, ready: &Ready) -> Result<Arc<Receiver>> {
        let destination = match &self.destination {
            Some(destination) => destination.clone(),
            None => {
                let settled = self.settle(&context.config, ready).await?;
                self.destination.insert(settled).clone()
            }
        };
        let walk = &self.options.walk;
        Ok(Receiver::new(Receiving {
            session: self.request.session,
            sender: self.key_id.0,
            target: Target {
                store: destination.store,
                requested: match &destination.place {
                    // The server reported one source of that kind, so its name is no pattern.
                    Placement::As(_) => self.requested.clone().without_patterns(),
                    Placement::Into(_) => self.requested.clone(),
                },
                placement: destination.place,
            },
            policy: Policy {
                options: self.options.take,
                keep: Keep {
                    owner: walk.owner,
                    numeric_ids: walk.numeric_ids,
                    xattrs: walk.xattrs,
                },
                durability: self.options.durability,
                fail_specials: walk.fail_specials,
                protected: walk.filter.clone(),
                quota: self.options.quota,
                // A server must not learn which content this machine holds.
                index: None,
            },
            context: ReceiveContext {
                permits: self.permits.connection(self.key_id.0),
                flow_control: context.connection.flow_control().clone(),
                memory: context.connection.kept().clone(),
                file_locks: self.file_locks.clone(),
                config: context.config.clone(),
                stats: self.stats.clone(),
                observer: context.observer.clone(),
                stopping: context.stopping.clone(),
            },
        }))
    }

    /// Settles the destination, and checks that it is not inside a source.
    async fn settle(&self, config: &Config, ready: &Ready) -> Result<Destination> {
        let settled = match &self.output {
            Some(output) => Destination::output(output, &self.options, ready.only)?,
            None => {
                let reserved = config.reserved.clone();
                Destination::settle(&self.options, ready.only, reserved).await?
            }
        };
        let store = settled.store.clone();
        let place = settled.place.clone();
        let origin = ready.origin.clone();
        let session = self.request.session;
        let mirror = self.options.take.delete.is_some();
        let check = move || nesting::check(&*store, &place, origin.as_ref(), &session, mirror);
        blocking("look at the destination", check)
            .await
            .map_err(Error::Refused)?;
        Ok(settled)
    }
}
