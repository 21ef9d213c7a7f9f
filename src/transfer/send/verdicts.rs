//! Reads the verdicts of the receiver, and starts the transfers that it wants.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::run::Run;
use super::upload::{Wanted, upload};
use crate::error::{Error, Result};
use crate::net::stream::MessageReader;
use crate::protocol::{Kind, Verdict};
use crate::transfer::events::Settled;

/// Reads verdicts and runs the transfers they ask for, as long as it is polled. A wanted file is only an item in a
/// queue until it may transfer. Tasks take kilobytes each, and thousands of files may be wanted.
pub(super) async fn follow_verdicts(
    run: &Arc<Run>,
    verdicts: &mut MessageReader,
    transfers: &mut JoinSet<()>,
) -> Result<Infallible> {
    let mut queue = VecDeque::new();
    loop {
        let verdict = tokio::select! {
            verdict = verdicts.verdict() => verdict?,
            Some(_) = transfers.join_next() => continue,
            Ok(permit) = run.shared.permits.parallel.clone().acquire_owned(), if !queue.is_empty() => {
                if let Some(wanted) = queue.pop_front() {
                    transfers.spawn(upload(run.clone(), wanted, permit));
                }
                continue;
            }
        };
        match verdict {
            Some(verdict) => queue.extend(follow(run, verdict)?),
            None if run.entries().all_sent() => return pending().await,
            None => {
                return Err(Error::Protocol(
                    "the receiver ended the manifest before all entries were answered and sent"
                        .into(),
                ));
            }
        }
    }
}

/// Settles an entry as its verdict says, or returns the wanted file.
fn follow(run: &Run, verdict: Verdict) -> Result<Option<Wanted>> {
    let id = verdict.id();
    let answered = run.entries().answered(id, &verdict)?;
    run.shared.changed.notify_waiters();
    match verdict {
        // This session sent it, and the receipt was lost with a connection.
        Verdict::Skip(_) if answered.sent => run.settle(id, Settled::Committed),
        Verdict::Skip(_) => run.settle(id, Settled::Skipped),
        Verdict::Done(_) => run.settle(id, Settled::Committed),
        Verdict::Refuse(_, reason) => run.settle(id, Settled::Failed(reason)),
        Verdict::Want(_, _) if answered.announce.kind != Kind::File => {
            return Err(Error::Protocol(
                format!("the receiver wants the content of entry {id}, which is not a file").into(),
            ));
        }
        Verdict::Want(_, held) => {
            return Ok(Some(Wanted {
                id,
                announce: answered.announce,
                held,
            }));
        }
    }
    Ok(None)
}
