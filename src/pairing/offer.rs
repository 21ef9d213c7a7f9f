//! The offer: the content, and the description that the receiver's user sees before accepting.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use crate::error::{Error, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Components, Kind, MAX_OFFER_TEXT, MAX_OFFERED, Offer};
use crate::storage::pipe::Pipe;
use crate::storage::walk::{Follow, Tree, Walk, WalkItem, WalkOptions};
use crate::transfer::session::{OfferedSource, local_sources};

/// The content of an offer.
pub enum Content {
    /// Local files and directories.
    Files(Vec<PathBuf>),
    /// The output of a pipe, as the content of a file of this name. It can be sent once.
    Pipe(Vec<u8>, Pipe),
    /// A text of at most [`MAX_OFFER_TEXT`] bytes.
    Text(String),
    /// No content: the two machines are to be paired.
    Pair,
}

impl Content {
    /// Makes the offer, with files not counted yet, and the source to send from. `server` is the number of this machine's
    /// server. Blocks: it looks at the files.
    pub(super) fn prepare(
        self,
        from: String,
        follow: Follow,
        server: u32,
    ) -> Result<(Offer, OfferedSource)> {
        let uncounted = Offer {
            from: from.into(),
            ..Offer::default()
        };
        let nothing = OfferedSource::Trees(Vec::new());
        Ok(match self {
            Self::Files(sources) => {
                let (trees, unsendable) = local_sources(&sources, follow)?;
                if let Some((_, reason)) = unsendable.into_iter().next() {
                    return Err(Error::Refused(reason));
                }
                check_names(&trees)?;
                let names = Components(trees.iter().map(|tree| tree.name.clone()).collect());
                let directory = matches!(&trees[..], [one] if one.directory);
                (
                    Offer {
                        names,
                        directory,
                        ..uncounted
                    },
                    OfferedSource::Trees(trees),
                )
            }
            Self::Pipe(name, pipe) => {
                RelativePath::from_components([&name])
                    .map_err(|bad| Error::Usage(bad.to_string()))?;
                let names = Components(vec![name.clone()]);
                (
                    Offer {
                        names,
                        files: 1,
                        piped: Some(true),
                        ..uncounted
                    },
                    OfferedSource::Pipe(name, Arc::new(pipe)),
                )
            }
            Self::Text(text) if text.len() > MAX_OFFER_TEXT => {
                let limit = MAX_OFFER_TEXT >> 10;
                return Err(Error::Usage(format!(
                    "cannot send a text of more than {limit} KiB; send it as a file"
                )));
            }
            Self::Text(text) => (
                Offer {
                    text: Some(text.into()),
                    ..uncounted
                },
                nothing,
            ),
            Self::Pair => (
                Offer {
                    pair: Some(server),
                    ..uncounted
                },
                nothing,
            ),
        })
    }
}

fn check_names(trees: &[Tree]) -> Result<()> {
    match trees.len() {
        0 => Err(Error::Usage(
            "cannot send without a source; name a file, a directory or a text".into(),
        )),
        1..=MAX_OFFERED => Ok(()),
        _ => Err(Error::Usage(format!(
            "cannot offer more than {MAX_OFFERED} names; put them into a directory"
        ))),
    }
}

/// Counts the files of an offer.
pub(super) struct Counting {
    /// The offer, without counts.
    uncounted: Offer,
    trees: Vec<Tree>,
    walk: WalkOptions,
    /// The counted offer; `None` while counting.
    counted: watch::Sender<Option<Offer>>,
}

impl Counting {
    pub(super) fn new(uncounted: Offer, source: &OfferedSource, walk: &WalkOptions) -> Self {
        let trees = match source {
            OfferedSource::Trees(trees) => trees.clone(),
            OfferedSource::Pipe(..) => Vec::new(),
        };
        Self {
            uncounted,
            trees,
            walk: walk.clone(),
            counted: watch::Sender::new(None),
        }
    }

    /// The offer; `None` in it while counting.
    pub(super) fn subscribe(&self) -> watch::Receiver<Option<Offer>> {
        self.counted.subscribe()
    }

    /// Whether the offer is to pair the two machines.
    pub(super) fn pairs(&self) -> bool {
        self.uncounted.pair.is_some()
    }

    /// Counts again in a blocking thread, because files may change between two receivers.
    pub(super) fn begin(&self) {
        self.counted.send_replace(None);
        let uncounted = self.uncounted.clone();
        let trees = self.trees.clone();
        let walk = self.walk.clone();
        let counted = self.counted.clone();
        tokio::task::spawn_blocking(move || {
            counted.send_replace(Some(count(uncounted, trees, walk)))
        });
    }
}

/// Counts all files of an offer. Blocks for as long as the walk takes.
fn count(mut offer: Offer, trees: Vec<Tree>, walk: WalkOptions) -> Offer {
    let (directories, mut entered) = mpsc::unbounded_channel();
    let mut others = 0;
    for found in Walk::new(trees, walk, directories) {
        match found {
            WalkItem::Entry(announce) if announce.kind == Kind::File => {
                offer.files += 1;
                // The sizes of sparse files may add up to more than 64 bits hold.
                offer.bytes = offer.bytes.saturating_add(announce.metadata.size);
            }
            WalkItem::Entry(_) => others += 1,
            _ => {}
        }
        while entered.try_recv().is_ok() {
            others += 1;
        }
    }
    while entered.try_recv().is_ok() {
        others += 1;
    }
    offer.others = Some(others).filter(|others| *others > 0);
    offer
}
