//! What the tasks of a receiving session share: its parameters, its tables, and the ways to answer and to report.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::file_locks::Claimant;
use super::hard_links::FirstNames;
use super::mirror::{Announced, ClearedPaths, Mirror};
use super::name_collisions::NameCollisions;
use super::options::{Policy, ReceiveContext, Receiving, Target, replaces_other_kinds};
use super::quota::{AcceptedQuota, QuotaUse};
use super::streams::ExpectedStreams;
use super::times::Times;
use super::wanted::{EntryLabel, WantedFile};
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Durability, Existing, Kind, Verdict};
use crate::storage::users::Owners;
use crate::storage::walk::gitignore::RuleFiles;
use crate::storage::{KeptShare, MetadataWarnings, Store};
use crate::transfer::events::{Event, Settled};
use crate::transfer::stats::{Brought, ConnectionCounts, EntryResult};

/// A receiving session on one connection.
pub(super) struct Session {
    /// The sender's key, which partials are bound to.
    pub(super) sender: [u8; 32],
    pub(super) target: Target,
    pub(super) policy: Policy,
    pub(super) context: ReceiveContext,
    /// Identifies this connection in file locks.
    pub(super) claimant: Claimant,
    pub(super) tables: Tables,
    pub(super) streams: ExpectedStreams,
    /// Tasks that must end before the summary.
    pub(super) transfers: TaskTracker,
    /// Receipts that are written and not yet acknowledged.
    pub(super) receipts: TaskTracker,
    /// This connection's number in the session's statistics.
    connection: u64,
    queues: QueueSenders,
    /// Whether this session has made, changed or removed something in the store.
    wrote: AtomicBool,
}

/// What a session remembers of its entries.
pub(super) struct Tables {
    pub(super) first_names: FirstNames,
    pub(super) collisions: NameCollisions,
    pub(super) times: Times,
    pub(super) owners: Owners,
    pub(super) quota: QuotaUse,
    /// Paths of a mirror's announced entries.
    pub(super) announced: Announced,
    /// The rules of .gitignore files at the destination of a mirror.
    rule_files: RuleFiles,
    cleared: Mutex<ClearedPaths>,
}

impl Tables {
    fn new(quota: Option<AcceptedQuota>, memory: &KeptShare) -> Self {
        Self {
            first_names: FirstNames::new(memory),
            collisions: NameCollisions::new(memory),
            times: Times::default(),
            owners: Owners::default(),
            quota: QuotaUse::new(quota),
            announced: Announced::new(memory),
            rule_files: RuleFiles::new(memory.clone()),
            cleared: Mutex::default(),
        }
    }
}

/// An entry that the manifest alone settles.
pub(super) struct SettledEntry {
    pub(super) label: EntryLabel,
    /// Whether the entry was made or replaced; otherwise it existed, and only its metadata may have changed.
    pub(super) made: bool,
}

struct QueueSenders {
    verdicts: mpsc::UnboundedSender<Verdict>,
    unsynced: mpsc::UnboundedSender<Vec<SettledEntry>>,
}

/// What the session's tasks have to write and to sync.
pub(super) struct Queues {
    /// Verdicts that are not yet written.
    pub(super) verdicts: mpsc::UnboundedReceiver<Verdict>,
    /// Groups of entries that are reported after the next sync.
    pub(super) unsynced: mpsc::UnboundedReceiver<Vec<SettledEntry>>,
}

impl Session {
    /// Starts a session on another connection.
    pub(super) fn new(parameters: Receiving) -> (Self, Queues) {
        let Receiving {
            session,
            sender,
            target,
            policy,
            context,
        } = parameters;
        let (verdicts_to, verdicts) = mpsc::unbounded_channel();
        let (unsynced_to, unsynced) = mpsc::unbounded_channel();
        let session = Self {
            sender,
            claimant: Claimant {
                session,
                age: context.file_locks.age(),
                window: Some(context.flow_control.clone()),
                stall: context.config.stall,
            },
            tables: Tables::new(policy.quota, &context.memory),
            streams: ExpectedStreams::default(),
            transfers: TaskTracker::new(),
            receipts: TaskTracker::new(),
            connection: context.stats.start_connection(),
            queues: QueueSenders {
                verdicts: verdicts_to,
                unsynced: unsynced_to,
            },
            wrote: AtomicBool::new(false),
            target,
            policy,
            context,
        };
        (session, Queues { verdicts, unsynced })
    }

    pub(super) fn store(&self) -> &dyn Store {
        &*self.target.store
    }

    /// Answers an entry.
    pub(super) fn answer(&self, verdict: Verdict) {
        if let Verdict::Want(..) = verdict {
            self.context.flow_control.expect_content();
        }
        // Fails only when the session is over.
        let _ = self.queues.verdicts.send(verdict);
    }

    /// Counts a result and reports it to the observer.
    pub(super) fn report(&self, entry: EntryResult) {
        let connection = self.context.flow_control.connection();
        let is_lost = connection.close_reason().is_some();
        let stats = &self.context.stats;
        if stats.count(self.connection, &entry, is_lost) {
            self.observe(entry.into());
        }
    }

    pub(super) fn observe(&self, event: Event) {
        (self.context.observer)(event);
    }

    /// Answers and reports an entry that needs no transfer.
    pub(super) fn settle(&self, entry: SettledEntry) {
        let id = entry.label.id;
        if entry.made {
            self.answer(Verdict::Done(id));
            let committed = (!self.policy.options.dry_run).then_some(0);
            self.report(entry.label.with(Settled::Committed, committed));
        } else {
            self.answer(Verdict::Skip(id));
            self.report(entry.label.with(Settled::Skipped, None));
        }
    }

    /// Answers and reports entries that were made or changed: at once if they need not reach the disk, otherwise after
    /// the next sync.
    pub(super) fn settle_when_durable(&self, group: Vec<SettledEntry>) {
        if !self.policy.options.dry_run {
            self.wrote();
            if self.policy.durability == Durability::Synced {
                // Fails only if the session has ended.
                let _ = self.queues.unsynced.send(group);
                return;
            }
        }
        group.into_iter().for_each(|entry| self.settle(entry));
    }

    /// Answers and reports an entry that this end does not take.
    pub(super) fn refuse(&self, entry: EntryLabel, reason: Reason) {
        self.answer(Verdict::Refuse(entry.id, reason.clone()));
        self.report(entry.with(Settled::Failed(reason), None));
    }

    /// Reports the end of a transfer; `Ok` holds the committed bytes.
    pub(super) fn transfer_ended(&self, file: &WantedFile, result: Result<u64, Reason>) {
        let mut label = file.label();
        match result {
            Ok(size) => {
                self.wrote();
                self.context.flow_control.body_came(size);
                label.size = size;
                self.report(label.with(Settled::Committed, Some(size)));
            }
            Err(reason) => self.report(label.with(Settled::from_failure(reason), None)),
        }
    }

    /// Reports that a transfer starts, of which `held` bytes are here already.
    pub(super) fn transfer_started(&self, file: &WantedFile, held: u64) {
        self.observe(Event::Started {
            id: file.id,
            path: file.name.clone(),
            size: file.known_size(),
            held,
        });
    }

    /// Counts and reports received bytes of content.
    pub(super) fn received(&self, id: u64, bytes: u64) {
        self.context.stats.received(bytes);
        self.observe(Event::Moved { id, bytes });
    }

    /// Counts metadata that could not be kept.
    pub(super) fn warn(&self, path: &RelativePath, warnings: MetadataWarnings) {
        if !warnings.is_empty() {
            self.context.stats.warn(self.connection, path, warnings);
        }
    }

    /// Returns what the session has made. With `Overwrite` each connection brings everything again, so only its own
    /// count.
    pub(super) fn brought(&self) -> Brought {
        match self.policy.options.existing {
            Existing::Overwrite => Brought::default(),
            _ => self.context.stats.brought(),
        }
    }

    /// Returns what this connection has done.
    pub(super) fn counts(&self) -> ConnectionCounts {
        self.context.stats.connection()
    }

    /// Abandons this connection while its disk work may still run. The session continues without it.
    pub(super) fn give_up(&self) {
        self.context.stats.give_up(self.connection);
    }

    /// Records that the store was changed.
    pub(super) fn wrote(&self) {
        self.wrote.store(true, Ordering::Relaxed);
    }

    /// Returns whether the store was changed.
    pub(super) fn has_written(&self) -> bool {
        self.wrote.load(Ordering::Relaxed)
    }

    /// Waits for a future, or fails with [`Code::Stopping`] when no new entries are admitted.
    pub(super) async fn or_stopping<T>(
        &self,
        wait: impl Future<Output = Result<T, Reason>>,
    ) -> Result<T, Reason> {
        tokio::select! {
            biased;
            () = self.context.stopping.cancelled() => Err(Code::Stopping.into()),
            done = wait => done,
        }
    }

    /// Returns the rules of the mirror, if this session is one.
    pub(super) fn mirror(&self) -> Option<Mirror<'_>> {
        self.policy.options.delete.map(|delete| Mirror {
            store: self.store(),
            place: self.target.placement.directory(),
            announced: &self.tables.announced,
            collisions: &self.tables.collisions,
            protected: &self.policy.protected,
            rule_files: &self.tables.rule_files,
            memory: &self.context.memory,
            cleared: &self.tables.cleared,
            delete,
            dry_run: self.policy.options.dry_run,
        })
    }

    /// Returns the mirror if it replaces entries of another kind. Nothing else does that.
    fn replacing_mirror(&self) -> Option<Mirror<'_>> {
        let options = &self.policy.options;
        let replaces = replaces_other_kinds(options) && !options.dry_run;
        self.mirror().filter(|_| replaces)
    }

    /// Removes an entry of another kind in the place of a mirror's entry. Call it when the new content is complete,
    /// directly before the commit. Blocks.
    pub(super) fn make_room(&self, path: &RelativePath, kind: Kind) -> Result<(), Reason> {
        match self.replacing_mirror() {
            Some(mirror) => mirror.make_room(path, kind),
            None => Ok(()),
        }
    }

    /// Removes files and links in the place of parent directories of a mirror's entry, so that its partial can be
    /// made. Blocks.
    pub(super) fn clear_path_above(&self, path: &RelativePath) -> Result<(), Reason> {
        match self.replacing_mirror() {
            Some(mirror) => mirror.clear_path_above(path),
            None => Ok(()),
        }
    }
}
