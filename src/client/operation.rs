//! What a client does over one connection after the other.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::destination::Destination;
use super::link::Link;
use super::{PullOptions, blocking, session_id};
use crate::auth::identity::KeyId;
use crate::config::Config;
use crate::error::text::printable;
use crate::error::{Error, Result};
use crate::net::flow_control::FlowControl;
use crate::net::rate_limit::RateLimits;
use crate::protocol::rate::Rate;
use crate::protocol::{
    Components, MAX_WIRE_RULES, MAX_WIRE_RULES_BYTES, Message, Pull, Push, Ready, WireFilter,
};
use crate::protocol::{MAX_UNANSWERED, MAX_UNANSWERED_BYTES};
use crate::storage::OutputStore;
use crate::storage::filter::{Filter, is_pattern};
use crate::storage::open_files::limit_to_open_files;
use crate::storage::walk::Follow;
use crate::transfer::events::Observer;
use crate::transfer::receive::{
    FileLocks, Keep, Permits, Placement, Receiver, Receiving, RequestedNames, SessionStats,
};
use crate::transfer::send::{Sender, TransferStats};
use crate::transfer::session::{Outcome, nesting};

/// A session, as it outlives its connections.
pub(super) enum Operation {
    Push { push: Push, sender: Box<Sender> },
    Pull(Box<Pulling>),
}

impl Operation {
    /// Runs over a connection. `begun` is called once the server is ready.
    pub(super) async fn run(
        &mut self,
        (link, limits, config): (&Link, &RateLimits, &Config),
        begun: impl FnOnce(),
        outcome: &mut Outcome,
    ) -> Result<()> {
        match self {
            Self::Push { push, sender } => {
                link.push((push, limits), sender, config, begun, outcome)
                    .await
            }
            Self::Pull(pulling) => {
                let pull = pulling.pull.clone();
                let receiver = async |ready: &Ready| {
                    let receiver = pulling.receiver(&link.window, ready).await?;
                    begun();
                    Ok(receiver)
                };
                link.pull(&pull, receiver, config, outcome).await
            }
        }
    }

    /// The account so far.
    pub(super) fn sent(&self) -> TransferStats {
        match self {
            Self::Push { sender, .. } => sender.sent(),
            Self::Pull(pulling) => pulling.ledger.sent(),
        }
    }

    /// Why it cannot go on over another connection, if it cannot.
    pub(super) fn spent(&self) -> Option<&'static str> {
        match self {
            Self::Push { sender, .. } if !sender.can_go_on() => {
                Some("what was read of the input is gone with it")
            }
            Self::Pull(pulling) if pulling.output.as_ref().is_some_and(OutputStore::is_taken) => {
                Some("what came out already cannot be taken back")
            }
            Self::Push { .. } | Self::Pull(_) => None,
        }
    }

    /// Whether it can go on over another connection at any time, and lose nothing by it.
    pub(super) fn moves(&self) -> bool {
        match self {
            Self::Push { push, sender } => {
                sender.can_move() && push.take.as_ref().is_none_or(|take| take.delete.is_none())
            }
            Self::Pull(pulling) => pulling.output.is_none(),
        }
    }

    /// A push announces over another connection only what is left, so the receiver no longer knows what a mirror may remove.
    /// Whether it would have.
    pub(super) fn stop_mirroring(&mut self) -> bool {
        match self {
            Self::Push { push, .. } => push
                .take
                .as_mut()
                .is_some_and(|take| take.delete.take().is_some()),
            // Here everything is announced anew.
            Self::Pull(_) => false,
        }
    }

    /// Grows whenever the receiver has come further.
    pub(super) fn progress(&self) -> u64 {
        match self {
            Self::Push { sender, .. } => sender.progress(),
            Self::Pull(pulling) => pulling.ledger.progress(),
        }
    }
}

/// Rules as they travel, if there are any.
pub(super) fn wire_filter(filter: &Filter) -> Result<Option<WireFilter>> {
    let written = filter.rules.written();
    if written.len() > MAX_WIRE_RULES
        || written.iter().map(Vec::len).sum::<usize>() > MAX_WIRE_RULES_BYTES
    {
        return Err(Error::Usage(format!(
            "a server takes {MAX_WIRE_RULES} rules and {MAX_WIRE_RULES_BYTES} bytes of them; use fewer"
        )));
    }
    let rules: Vec<_> = written.iter().map(|rule| rule.clone().into()).collect();
    Ok(
        (filter.gitignore || !rules.is_empty()).then_some(WireFilter {
            rules,
            gitignore: filter.gitignore,
        }),
    )
}

/// A pull, and what of it lasts as long as the session.
pub(super) struct Pulling {
    pull: Pull,
    options: PullOptions,
    asked: RequestedNames,
    /// Takes the only file, if not the destination.
    output: Option<OutputStore>,
    /// Settled with the server's first answer.
    destination: Option<Destination>,
    ledger: Arc<SessionStats>,
    /// So that a connection takes files over from the one before, which may not know yet that it is dead.
    claims: Arc<FileLocks>,
    permits: Arc<Semaphore>,
    /// The server's key, to which partials are bound.
    key_id: KeyId,
    config: Config,
    observer: Observer,
}

impl Pulling {
    pub(super) fn new(
        options: PullOptions,
        key_id: KeyId,
        config: &Config,
        observer: Observer,
    ) -> Result<Self> {
        let mut names: Vec<_> = options
            .sources
            .iter()
            .filter_map(|source| source.name().filter(|name| !is_pattern(name)))
            .collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|two| two[0] == two[1]) {
            let name = printable(twice[0]);
            return Err(Error::Usage(format!(
                "two sources are named {name}; they would fall on each other"
            )));
        }
        let filter = &options.walk.filter;
        if filter.only.is_some() {
            return Err(Error::Usage(
                "a list of names is for what is sent from here; name to the server what it is to send".into(),
            ));
        }
        let pull = Pull {
            session: session_id()?,
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
        if !pull.fits() {
            return Err(Error::Usage(
                "so many sources, or rules, do not fit into one request; pull them in parts".into(),
            ));
        }
        Ok(Self {
            pull,
            asked: match RequestedNames::of(&options.sources)
                .map_err(|bad| Error::Usage(bad.to_string()))?
            {
                asked if options.literal => asked.without_patterns(),
                asked => asked,
            },
            options,
            output: None,
            destination: None,
            ledger: Arc::default(),
            claims: Arc::default(),
            permits: Arc::new(Semaphore::new(limit_to_open_files(
                config.max_transfers.min(config.parallel).max(1),
            ))),
            key_id,
            config: config.clone(),
            observer,
        })
    }

    /// One file, whose content goes to a writer.
    pub(super) fn with_output(mut self, output: OutputStore) -> Self {
        self.output = Some(output);
        self
    }

    /// The receiver over a connection on which the server is ready.
    async fn receiver(
        &mut self,
        window: &Arc<FlowControl>,
        ready: &Ready,
    ) -> Result<Arc<Receiver>> {
        let destination = match &self.destination {
            Some(destination) => destination.clone(),
            None => {
                let settled = match &self.output {
                    Some(output) => Destination::output(output, &self.options, ready.only)?,
                    None => {
                        let reserved = self.config.reserved.clone();
                        Destination::settle(&self.options, ready.only, reserved).await?
                    }
                };
                let store = settled.store.clone();
                let place = settled.place.clone();
                let origin = ready.origin.clone();
                let session = self.pull.session;
                let mirror = self.options.take.delete.is_some();
                let check =
                    move || nesting::check(&*store, &place, origin.as_ref(), &session, mirror);
                blocking(check).await?.map_err(Error::Refused)?;
                self.destination.insert(settled).clone()
            }
        };
        self.ledger.start_connection();
        let walk = &self.options.walk;
        Ok(Receiver::new(Receiving {
            store: destination.store,
            asked: match &destination.place {
                // The one source, which is really named so.
                Placement::As(_) => self.asked.clone().without_patterns(),
                Placement::Into(_) => self.asked.clone(),
            },
            place: destination.place,
            most: self.options.most,
            take: self.options.take,
            spared: self.options.walk.filter.clone(),
            keep: Keep {
                owner: walk.owner,
                numeric_ids: walk.numeric_ids,
                xattrs: walk.xattrs,
            },
            owner: self.key_id.0,
            durability: self.options.durability,
            fail_specials: walk.fail_specials,
            permits: Arc::new(Permits::new(self.permits.clone())),
            window: window.clone(),
            // A server must not find out what is here.
            index: None,
            claims: self.claims.clone(),
            session: self.pull.session,
            config: self.config.clone(),
            ledger: self.ledger.clone(),
            observer: self.observer.clone(),
            stopping: CancellationToken::new(),
        }))
    }
}
