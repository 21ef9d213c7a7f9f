//! What is offered: the content, and what the receiver's user is told of it beforehand.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use crate::error::{Error, Result};
use crate::protocol::path::RelativePath;
use crate::protocol::{Components, Kind, MAX_OFFER_TEXT, MAX_OFFERED, Offer};
use crate::storage::pipe::Pipe;
use crate::storage::walk::{Follow, Tree, Walk, WalkItem, WalkOptions};
use crate::transfer::session::{OfferedSource as SessionContent, local_sources};

/// What is offered.
pub enum Content {
    /// Local files and directories.
    Files(Vec<PathBuf>),
    /// What comes out of a pipe, as the content of a file of this name. One receiver can have it.
    Pipe(Vec<u8>, Pipe),
    /// A text; at most [`MAX_OFFER_TEXT`] bytes.
    Text(String),
    /// Nothing but to know each other from then on.
    Pair,
}

impl Content {
    /// The offer, with files not counted yet, and what is sent. `server` is the number of this machine's server. Looks for the files,
    /// and so blocks.
    pub(super) fn prepare(
        self,
        from: String,
        follow: Follow,
        server: u32,
    ) -> Result<(Offer, SessionContent)> {
        let begun = Offer {
            from: from.into(),
            ..Offer::default()
        };
        let nothing = SessionContent::Trees(Vec::new());
        Ok(match self {
            Self::Files(sources) => {
                let (trees, unsendable) = local_sources(&sources, follow)?;
                if let Some((_, why)) = unsendable.into_iter().next() {
                    return Err(Error::Refused(why));
                }
                check_names(&trees)?;
                let names = Components(trees.iter().map(|tree| tree.name.clone()).collect());
                let directory = matches!(&trees[..], [one] if one.directory);
                (
                    Offer {
                        names,
                        directory,
                        ..begun
                    },
                    SessionContent::Trees(trees),
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
                        ..begun
                    },
                    SessionContent::Pipe(name, Arc::new(pipe)),
                )
            }
            Self::Text(text) if text.len() > MAX_OFFER_TEXT => {
                let most = MAX_OFFER_TEXT >> 10;
                return Err(Error::Usage(format!(
                    "a text has at most {most} KiB; send it as a file"
                )));
            }
            Self::Text(text) => (
                Offer {
                    text: Some(text.into()),
                    ..begun
                },
                nothing,
            ),
            Self::Pair => (
                Offer {
                    pair: Some(server),
                    ..begun
                },
                nothing,
            ),
        })
    }
}

fn check_names(trees: &[Tree]) -> Result<()> {
    match trees.len() {
        0 => Err(Error::Usage("there is nothing to send".into())),
        1..=MAX_OFFERED => Ok(()),
        _ => Err(Error::Usage(format!(
            "so many names are more than anybody reads; put them into a directory ({MAX_OFFERED} at most)"
        ))),
    }
}

/// What is there to count.
pub(super) struct Counting {
    /// The offer, without its numbers.
    pub(super) begun: Offer,
    pub(super) trees: Vec<Tree>,
    pub(super) walk: WalkOptions,
    pub(super) counted: watch::Sender<Option<Offer>>,
}

impl Counting {
    /// Counts anew, and tells when that is done: trees change from one receiver to the next.
    pub(super) fn begin(&self) {
        self.counted.send_replace(None);
        let begun = self.begun.clone();
        let trees = self.trees.clone();
        let walk = self.walk.clone();
        let counted = self.counted.clone();
        tokio::task::spawn_blocking(move || counted.send_replace(Some(count(begun, trees, walk))));
    }
}

/// The offer with all files counted. Blocks for as long as walking takes.
fn count(mut offer: Offer, trees: Vec<Tree>, walk: WalkOptions) -> Offer {
    let (directories, mut entered) = mpsc::unbounded_channel();
    let mut others = 0;
    for found in Walk::new(trees, walk, directories) {
        match found {
            WalkItem::Entry(announce) if announce.kind == Kind::File => {
                offer.files += 1;
                // Sparse files may say that they are as long as they like.
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
