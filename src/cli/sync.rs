//! `haul sync`.

use std::ffi::OsString;

use clap::Args;
use haul::Delete;

use super::cp::{CopyOptions, CopyRequest, copy};

/// Make a directory equal to another, and remove the rest.
#[derive(Args)]
#[command(after_help = "\
Examples: haul sync photos haul://server/photos
          haul sync --dry-run haul://server/photos photos
Entries that the source does not have are removed at the destination, after all
others have arrived. A server removes only if it runs with --allow-delete. An
empty source needs --max-delete. The options of haul cp work as well.")]
pub(crate) struct Sync {
    /// The directory to copy: local, haul://HOST/PATH or NAME:PATH
    #[arg(value_name = "SRC")]
    source: OsString,
    /// The directory to make equal
    #[arg(value_name = "DST")]
    destination: OsString,
    /// Remove nothing if more than N would be removed
    #[arg(long, value_name = "N")]
    max_delete: Option<u64>,
    #[command(flatten)]
    options: CopyOptions,
}

pub(crate) async fn run(sync: Sync) -> anyhow::Result<u8> {
    copy(&CopyRequest {
        sources: vec![sync.source],
        destination: sync.destination,
        delete: Some(Delete {
            most: sync.max_delete,
        }),
        options: sync.options,
    })
    .await
}
