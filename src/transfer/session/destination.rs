//! The destination of a push, at the server: whether its options are allowed, and where its sources go.

use super::nesting;
use super::request::requested_filter;
use crate::config::Config;
use crate::error::{Code, Reason, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Push, ReceiveOptions};
use crate::storage::filter::Filter;
use crate::storage::{KeptShare, Store};
use crate::transfer::receive::{Placement, Sources};

/// The destination of a push.
pub(super) struct PushDestination {
    pub(super) placement: Placement,
    /// The paths that a mirror keeps though they are not announced.
    pub(super) protected: Filter,
}

impl PushDestination {
    /// Settles the destination. Blocks.
    pub(super) fn settle(
        store: &dyn Store,
        push: &Push,
        memory: &KeptShare,
    ) -> Result<Self, Reason> {
        store.check_root()?;
        let destination = RelativePath::from_components(&push.destination.0)?;
        let mirror = push.take.is_some_and(|take| take.delete.is_some());
        if mirror && (push.sources != 1 || !push.directory) {
            return Err(Reason::new(
                Code::NotDirectory,
                "cannot mirror: a mirror needs exactly one directory",
            ));
        }
        let sources = Sources {
            into: push.into,
            several: push.sources > 1,
            directory: push.directory,
            mirror,
        };
        let placement = Placement::settle(store, destination, sources)?;
        let origin = push.origin.as_ref();
        nesting::check(store, &placement, origin, &push.session, mirror)?;
        // Only a mirror looks at the rules. Compiling them takes memory and time.
        let rules = push.filter.as_ref().filter(|_| mirror);
        Ok(Self {
            placement,
            protected: requested_filter(rules, memory)?,
        })
    }
}

/// Checks whether a client may use these options.
pub(super) fn check_options(
    options: &ReceiveOptions,
    config: &Config,
    may_read: bool,
) -> Result<(), Reason> {
    let is_mirror = options.delete.is_some();
    let text = if is_mirror && !config.allow_delete {
        "this server removes nothing; start it with --allow-delete"
    } else if (options.checksum || is_mirror) && !may_read {
        // A comparison and the list of removed paths reveal what the store holds.
        "this key may not read on this server, so it can neither compare content nor mirror"
    } else {
        return Ok(());
    };
    Err(Reason::new(Code::NotAllowed, text))
}
