//! The options of a push and of a pull, and what of them goes into the request.

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{
    Durability, MAX_WIRE_RULES, MAX_WIRE_RULES_BYTES, ReceiveOptions, WireFilter,
};
use crate::storage::filter::Filter;
use crate::storage::walk::WalkOptions;
use crate::transfer::receive::AcceptedQuota;

/// The sources and destination of a push, and its options.
#[derive(Debug, Clone, Default)]
pub struct PushOptions {
    /// Local files and directories. Symbolic links in this list are followed; links inside directories are not.
    pub sources: Vec<PathBuf>,
    /// The destination below the served directory.
    pub destination: RelativePath,
    /// Whether the destination is a directory for the sources, as a trailing `/` means.
    pub into: bool,
    /// Durability that a commit needs.
    pub durability: Durability,
    /// What is announced of the sources.
    pub walk: WalkOptions,
    /// How the server receives.
    pub take: ReceiveOptions,
}

/// The sources and destination of a pull, and its options.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    /// Paths below the served directory. The empty path means everything in it.
    pub sources: Vec<RelativePath>,
    /// The destination on this machine. Symbolic links in this path are followed; links below it are not.
    pub destination: PathBuf,
    /// Whether the destination is a directory for the sources, as a trailing `/` means.
    pub into: bool,
    /// Durability that a commit needs.
    pub durability: Durability,
    /// What the server announces of the sources.
    pub walk: WalkOptions,
    /// How this machine receives.
    pub take: ReceiveOptions,
    /// Whether the sources are names, not patterns.
    pub literal: bool,
    /// The limit of what is received, for a user who has accepted an offer of that size.
    pub quota: Option<AcceptedQuota>,
}

/// Refuses a mirror of a list of names, which would remove everything that is not on the list.
pub(super) fn check_mirror(take: &ReceiveOptions, walk: &WalkOptions) -> Result<()> {
    match take.delete.is_some() && walk.filter.only.is_some() {
        true => Err(Error::Usage(
            "cannot mirror a list of names: everything else would be removed; use rules instead"
                .into(),
        )),
        false => Ok(()),
    }
}

/// The filter's rules as a message; `None` without rules.
///
/// # Errors
/// [`Error::Usage`] when there are more than a message may hold.
pub(super) fn wire_filter(filter: &Filter) -> Result<Option<WireFilter>> {
    let rules = filter.rules.written();
    if rules.len() > MAX_WIRE_RULES
        || rules.iter().map(Vec::len).sum::<usize>() > MAX_WIRE_RULES_BYTES
    {
        return Err(Error::Usage(format!(
            "cannot send more than {MAX_WIRE_RULES} rules or {MAX_WIRE_RULES_BYTES} bytes of rules; use fewer"
        )));
    }
    let rules: Vec<_> = rules.iter().map(|rule| rule.clone().into()).collect();
    Ok(
        (filter.gitignore || !rules.is_empty()).then_some(WireFilter {
            rules,
            gitignore: filter.gitignore,
        }),
    )
}
